"""The dataset catalogue and the three line formats of the Amazon review data (2014, 2018, 2023).

Sources: McAuley et al., SIGIR 2015 (2014 release); Ni et al., EMNLP 2019 (2018); Hou et al., arXiv 2403.03952 (2023).
Files are streamed line by line; a malformed line is counted by reason and skipped.
"""
from __future__ import annotations

import ast
import contextlib
import difflib
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr.data import times
from llmgr.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl

MAX_LINE = 4_000_000
"""Bytes; a longer line is malformed, so that a file without line ends cannot fill the memory."""
MAX_LITERAL = 1_000_000
"""Bytes of a Python literal that is still parsed."""
BATCH = 200_000
"""Reviews held as Python objects before they become a table."""
ITEM_ID = re.compile(rb"""asin["']\s*:\s*(?:"([^"]+)"|'([^']+)')""")


@dataclass(frozen=True)
class Release:
    """Where a release lies and what its fields are called."""

    reviews: str
    """Address of a category's reviews, `{}` for the category."""
    metadata: str
    """Address of its item metadata."""
    user: str
    item: str
    time: str
    rating: str
    brand: str
    categories: str
    descriptions: tuple[str, ...]


SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/"
HUB = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/raw/"
RELEASES = {
    "2014": Release(SNAP + "reviews_{}_5.json.gz", SNAP + "meta_{}.json.gz", "reviewerID", "asin", "unixReviewTime",
                    "overall", "brand", "categories", ("description",)),
    "2018": Release(UCSD + "categoryFilesSmall/{}_5.json.gz", UCSD + "metaFiles2/meta_{}.json.gz", "reviewerID", "asin",
                    "unixReviewTime", "overall", "brand", "category", ("description", "feature")),
    "2023": Release(HUB + "review_categories/{}.jsonl", HUB + "meta_categories/meta_{}.jsonl", "user_id", "parent_asin",
                    "timestamp", "rating", "store", "categories", ("description", "features")),
}


@dataclass(frozen=True)
class Dataset:
    """A category of a release."""

    name: str
    release: str
    category: str
    published: dict[str, int] | None
    """Users, items and interactions that the literature reports for the 5-core, where they are well known."""

    def addresses(self) -> dict[str, str]:
        """Official addresses of the two files, by role."""
        release = RELEASES[self.release]
        return {"reviews": release.reviews.format(self.category), "meta": release.metadata.format(self.category)}


CATALOGUE = {
    entry.name: entry
    for entry in (
        Dataset("sample", "2018", "Sample", None),
        Dataset("music", "2018", "Musical_Instruments", None),
        Dataset("beauty", "2014", "Beauty", {"users": 22_363, "items": 12_101, "interactions": 198_502}),
        Dataset("luxury_beauty", "2018", "Luxury_Beauty", None),
        Dataset("all_beauty", "2018", "All_Beauty", None),
        Dataset("pantry", "2018", "Prime_Pantry", None),
        Dataset("office", "2014", "Office_Products", {"users": 4_905, "items": 2_420, "interactions": 53_258}),
    )
}
ALIASES = {"musical_instruments": "music", "prime_pantry": "pantry", "office_products": "office"}


def dataset(name: str) -> Dataset:
    """The dataset called `name`: a catalogue name in any case, or `RELEASE:Category`; UserError names the nearest."""
    release, colon, category = name.partition(":")
    if colon:
        if release not in RELEASES:
            raise UserError(f"data.dataset={name}: release {release!r} is unknown; it is one of {', '.join(RELEASES)}, "
                            "as in 2018:Toys_and_Games")
        if not re.fullmatch(r"\w+", category, re.ASCII):
            raise UserError(f"data.dataset={name}: give the category as its files spell it, as in 2018:Toys_and_Games")
        known = {(e.release, e.category): e for e in CATALOGUE.values() if e.name != "sample"}
        return known.get((release, category)) or Dataset(f"{release}:{category}", release, category, None)
    key = re.sub(r"\W+", "_", name.strip().lower())
    key = ALIASES.get(key, key)
    if key not in CATALOGUE:
        near = difflib.get_close_matches(key, [*CATALOGUE, *ALIASES], 1, 0.0)[0]
        raise UserError(f"data.dataset={name} is unknown; the nearest known name is {near} (or give RELEASE:Category, "
                        "as in 2018:Toys_and_Games)")
    return CATALOGUE[key]


def lines(path: Path) -> Iterator[bytes | None]:
    """Lines of a plain or gzip file in constant memory; None stands for one longer than MAX_LINE."""
    with path.open("rb") as raw:
        handle = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if path.suffix == ".gz" else raw
        try:
            while line := handle.readline(MAX_LINE):
                if len(line) < MAX_LINE or line.endswith(b"\n"):
                    yield line
                    continue
                while (rest := handle.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield None
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{path} is damaged or cut short: run `dvc repro -f download` to fetch it again") from None


def read_reviews(path: Path, release: str, max_bad_share: float) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Interactions of a reviews file: user, item, timestamp (i64), rating (f32 or null), line (i64, 0-based).

    Times are as the release has them, seconds or (2023) milliseconds: two clicks of one second keep their order. Where
    a file mixes units they are in the finest. Also the counts: lines, malformed by reason, times (as
    `times.in_one_unit` has them). UserError if more than `max_bad_share` of the lines are malformed.
    """
    import orjson
    import polars as pl

    form = RELEASES[release]
    schema = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "rating": pl.Float32, "line": pl.Int64}
    frames = [pl.DataFrame(schema=schema)]
    rows: list[tuple[str, str, int, float | None, int]] = []
    bad: Counter[str] = Counter()
    total = 0
    for number, line in enumerate(lines(path)):
        if line is not None and line.isspace():
            continue
        total += 1
        try:
            record = orjson.loads(line) if line is not None else None
        except orjson.JSONDecodeError:
            bad["not JSON"] += 1
            continue
        if type(record) is not dict:
            bad["not an object" if line is not None else "too long"] += 1
            continue
        user, item, time = record.get(form.user), record.get(form.item), record.get(form.time)
        if type(user) is not str or not user or user.isspace():
            bad[_fault(form.user, user)] += 1
        elif type(item) is not str or not item or item.isspace():
            bad[_fault(form.item, item)] += 1
        elif type(time) is not int or not 0 <= time < 1 << 63:
            bad[_fault(form.time, time)] += 1
        else:
            rating = record.get(form.rating)
            rows.append((user, item, time, rating if type(rating) in (int, float) else None, number))
            if len(rows) == BATCH:
                frames.append(pl.DataFrame(rows, schema=schema, orient="row"))
                rows.clear()
    frames.append(pl.DataFrame(rows, schema=schema, orient="row"))
    table, counts = dated(pl.concat(frames, rechunk=True), form.time, bad)
    return table, checked(path, total, bad, max_bad_share) | {"times": counts}


def dated(table: pl.DataFrame, name: str, bad: Counter[str]) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Interactions with their times in one unit, without those that have none, which `bad` counts; and the counts."""
    unified, counts = times.in_one_unit(table["timestamp"])
    if counts["no_date"]:
        bad[f"{name} zero or no date"] += counts["no_date"]
    return table.with_columns(timestamp=unified).filter(unified.is_not_null()), counts


def read_metadata(
    path: Path, release: str, wanted: set[str], max_bad_share: float
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Raw title, brand, category (path below the root, joined by " > ") and description (list) of the `wanted` items.

    A field that is missing or no text is empty. Lines of other items are recognised by their id and not parsed; the
    first line of an item counts. Also the counts: lines, malformed by reason, repeated, titles missing or no text, and
    `other_item`, the id of the first line of another item.
    """
    form = RELEASES[release]
    names = {name.encode() for name in wanted}
    rows: dict[str, dict[str, Any]] = {}
    bad: Counter[str] = Counter()
    total = repeated = untitled = 0
    other = ""
    for line in lines(path):
        if line is not None and line.isspace():
            continue
        total += 1
        ids = [double or single for double, single in ITEM_ID.findall(line)] if line is not None else []
        if not ids:
            bad["too long" if line is None else f"{form.item} missing or no text"] += 1
            continue
        if names.isdisjoint(ids) and not any(b"\\" in name for name in ids):  # an id may be escaped
            other = other or ids[0].decode(errors="replace")
            continue
        try:
            record = _record(line)
        except Exception:  # whatever a line makes literal_eval raise, such as TypeError for a list as a key
            bad["neither JSON nor a Python literal"] += 1
            continue
        item = record.get(form.item) if type(record) is dict else None
        if type(item) is not str:
            bad[f"{form.item} missing or no text"] += 1
        elif item in rows:
            repeated += 1
        elif item not in wanted:
            other = other or item
        else:
            title = record.get("title")
            untitled += type(title) is not str or not title.strip()
            rows[item] = {
                "title": title if type(title) is str else "",
                "brand": record.get(form.brand) if type(record.get(form.brand)) is str else "",
                "category": _category(record.get(form.categories), record.get("main_category")),
                "description": [text for field in form.descriptions for text in _texts(record.get(field))],
            }
    counts = checked(path, total, bad, max_bad_share)
    return rows, counts | {"repeated": repeated, "titles_missing_or_no_text": untitled, "other_item": other}


def _record(line: bytes) -> Any:
    """A line as JSON or, as the 2014 metadata has them, a Python literal, which is never evaluated as code."""
    import orjson

    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(line)
    if len(line) > MAX_LITERAL:
        raise ValueError("too long")
    return ast.literal_eval(line.decode().strip())


def _category(value: Any, fallback: Any) -> str:
    """A category path without its root; 2014 nests several paths, of which the deepest (the first such) counts."""
    entries = value if isinstance(value, list) else []
    paths = [entry for entry in entries if isinstance(entry, list)] or [entries]
    longest = [name for name in max(paths, key=len) if isinstance(name, str)]
    # The 2018 lists end in feature bullets now and then; a category name is short and holds no markup.
    names = [name.strip() for name in longest[1:] if 0 < len(name.strip()) <= 60 and "<" not in name]
    return " > ".join(names) or (fallback if isinstance(fallback, str) else "")


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _fault(field: str, value: Any) -> str:
    if value is None:
        return f"{field} missing"
    return f"{field} empty" if isinstance(value, str) and not value.strip() else f"{field} of a wrong type or range"


def checked(path: Path, total: int, bad: Counter[str], max_bad_share: float) -> dict[str, Any]:
    """The counts of a file's lines; UserError where there are none, or too many are malformed."""
    if not total:
        raise UserError(f"{path} holds no lines: run `dvc repro -f download`, or look at data.mirror")
    if bad.total() > max_bad_share * total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(bad.items()))
        raise UserError(f"{path}: {bad.total()} of {total} lines are malformed ({reasons}), more than "
                        f"filter.max_bad_share={max_bad_share:g}: fetch the file again or raise filter.max_bad_share")
    return {"lines": total, "malformed": bad.total(), "malformed_by_reason": dict(sorted(bad.items()))}
