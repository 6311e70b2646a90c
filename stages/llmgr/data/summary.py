"""What a user should check before any training: how much there is, from when, with what texts, and what was dropped."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmgr.data.times import day
from llmgr.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl

EXAMPLES = 10


def check_texts(items: list[dict[str, Any]], described: set[str], other: str, name: str, largest: float) -> None:
    """UserError where more than a share `largest` of the items has no text; it says whose ids match nothing.

    `described` are the items with a row in the file `name`, `other` an id of that file which is no item, if any.
    """
    textless = [row["item"] for row in items if not row["text"]]
    if len(textless) <= largest * len(items):
        return
    missing = [item for item in textless if item not in described]
    if missing:
        ids = f"{name} has no row for {len(missing)} of them, such as {missing[0]!r}"
        ids += f", and rows for others, such as {other!r}" if other else ""
    else:
        ids = f"their rows in {name} hold none"
    raise UserError(f"{len(textless)} of {len(items)} items have no text, more than "
                    f"filter.max_textless_share={largest:g}: {ids}; give a file with the interactions' ids "
                    "(data.mirror, or data.items and data.columns), or raise filter.max_textless_share")


def examples(core: pl.DataFrame, table: pl.DataFrame, unit: str) -> list[dict[str, str]]:
    """The first interactions of users at even distances, with their items' titles."""
    import polars as pl

    firsts = core.unique("user", keep="first", maintain_order=True).sort("user")
    chosen = firsts.gather_every(max(1, firsts.height // EXAMPLES)).head(EXAMPLES)
    joined = chosen.join(table.select("item", "title", "text"), on="item", how="left", maintain_order="left")
    title = pl.when(pl.col("title") == "").then("text").otherwise("title")
    return [{"user": user, "item": item, "time": day(when, unit), "title": words}
            for user, item, when, words in joined.select("user", "item", "timestamp", title).iter_rows()]


def summary(raw: pl.DataFrame, core: pl.DataFrame, table: pl.DataFrame, read: dict[str, Any], repeated: int,
            textless: int) -> dict[str, Any]:
    """Rows, users, items, days, share of items with text, examples, and rows dropped by reason, ready for JSON."""
    unit = read["times"]["unit"]
    return {
        "rows": read["lines"], "users": raw["user"].n_unique(), "items": raw["item"].n_unique(),
        "first": day(raw["timestamp"].min(), unit), "last": day(raw["timestamp"].max(), unit),
        "share_with_text": 1 - textless / table.height,
        "dropped": {**read["malformed_by_reason"], "repeated": repeated,
                    "of rare users and items": raw.height - repeated - core.height},
        "examples": examples(core, table, unit),
    }


def as_lines(name: str, summary: dict[str, Any]) -> list[str]:
    """A summary in lines for a terminal."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary["dropped"].items() if count)
    width = max(len(row["user"]) for row in summary["examples"])
    return [
        f"{name}: {summary['rows']:,} rows, {summary['users']:,} users, {summary['items']:,} items, from "
        f"{summary['first']} to {summary['last']}",
        f"dropped: {dropped or 'nothing'}",
        f"items with text: {summary['share_with_text']:.1%}",
        *(f"  {row['user'][:24]:{min(width, 24)}}  {row['time']}  {row['item'][:24]}  {row['title'][:60]}"
          for row in summary["examples"]),
    ]
