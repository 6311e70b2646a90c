"""Reduce the raw files to their k-core and clean the items' texts.

Reads:  data/raw/ (found through data/raw/source.json)
Writes: data/core/interactions.parquet (user, item, timestamp as the release has it, rating, line; by user, time, line),
        data/core/items.parquet (item_id from 1 in the order of the item strings, item, title, brand, category,
        description, text, count); reports/metrics/filter.json
Params: filter

Malformed lines are counted by reason and skipped, up to filter.max_bad_share of a file.
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("filter",)


def main(params) -> None:
    """Read, drop duplicates, take the core to its fixed point, attach texts, describe the result."""
    import polars as pl

    from llmgr.data import amazon, cleaning, interactions
    from llmgr.runtime.artifacts import read_json, require, write_json, write_table
    from llmgr.runtime.errors import UserError

    options = params.filter
    source = read_json("data/raw/source.json")
    reviews_file, meta_file = (require(Path("data/raw", source["files"][role]["name"])) for role in ("reviews", "meta"))
    raw, read = amazon.read_reviews(reviews_file, source["release"], options.max_bad_share)
    unique = interactions.without_duplicates(raw, options.duplicates)
    core, rounds = interactions.k_core(unique, options.core)
    metadata, meta_read = amazon.read_metadata(meta_file, source["release"], set(core["item"]), options.max_bad_share)
    items = cleaning.item_texts(core["item"].unique().sort().to_list(), metadata, options.template_items,
                                options.max_chars)
    textless = [row["item"] for row in items if not row["text"]]
    if options.textless == "drop" and textless:
        # The core of a subset lies inside the core of the whole, so that dropping afterwards is the same as before.
        core, more = interactions.k_core(core.filter(~pl.col("item").is_in(textless)), options.core)
        rounds += more
    if core.is_empty():
        raise UserError(f"no user and item of {source['dataset']} has {options.core} interactions with the others: "
                        f"lower filter.core={options.core}")
    counts = core.group_by("item").agg(count=pl.len().cast(pl.Int32))
    table = (
        pl.DataFrame(items, schema=dict.fromkeys(cleaning.FIELDS, pl.String)).join(counts, on="item").sort("item")
        .with_columns(pl.col("text").replace("", cleaning.UNKNOWN),
                      item_id=pl.int_range(1, pl.len() + 1, dtype=pl.Int32))
        .select("item_id", *cleaning.FIELDS, "count")
    )
    write_table("data/core/interactions.parquet", core)
    write_table("data/core/items.parquet", table)

    def size(frame: pl.DataFrame) -> dict[str, int]:
        return {"users": frame["user"].n_unique(), "items": frame["item"].n_unique(), "interactions": frame.height}

    after = size(core)
    write_json("reports/metrics/filter.json", {
        "dataset": source["dataset"],
        "before": size(raw),
        "after": after,
        "published": source["published"],
        "rounds": rounds,
        "duplicates_dropped": raw.height - unique.height,
        "reviews": read,
        "metadata": meta_read,
        "items_without_metadata": sum(row["item"] not in metadata for row in items),
        "items_without_text": len(textless),
        "share_with": {name: table[name].fill_null("").ne("").mean() for name in cleaning.FIELDS[1:5]},
        "mean_text_chars": table["text"].str.len_chars().mean(),
        "mean_session_length": core.height / after["users"],
        "sparsity": 1 - core.height / (after["users"] * after["items"]),
    })
    console.say(f"{after['users']} users, {after['items']} items, {after['interactions']} interactions "
              f"after {rounds} rounds")


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
