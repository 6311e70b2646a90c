"""Times of one file in one unit: mixed ones are told by their size, what is no date is counted.

A number of seconds, milliseconds, microseconds or nanoseconds since 1970 tells its unit: dates from 1973 on differ in
size by a factor of 1,000. Files whose numbers are all smaller hold an order, not dates.
"""
from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

FIRST = 100_000_000
"""Seconds since 1970 of the earliest date (March 1973)."""
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
DAY = 86_400


def in_one_unit(times: pl.Series, now: float | None = None) -> tuple[pl.Series, dict[str, Any]]:
    """Times (i64 or null) in the finest unit that a file has, microseconds at most, so that no order is lost.

    Null stands for what is no date in a file of dates (0, or a day before March 1973). Also the counts: `unit` (`order`
    where no number is a date), `converted` by the unit they had, `no_date`, `future` (more than a day after now).
    """
    import polars as pl

    present = times.drop_nulls()
    sizes = {unit: present.is_between(FIRST * factor, FIRST * 1_000 * factor - 1) if unit != "ns"
             else present >= FIRST * factor for unit, factor in UNITS.items()}
    counts = {unit: int(mask.sum()) for unit, mask in sizes.items()}
    if 2 * sum(counts.values()) <= len(present):
        return times, {"unit": "order", "converted": {}, "no_date": 0, "future": 0}
    finest = "us" if counts["us"] or counts["ns"] else "ms" if counts["ms"] else "s"
    result = pl.lit(None, pl.Int64)
    for factor in UNITS.values():
        low, high = FIRST * factor, min(FIRST * 1_000 * factor - 1, 2**63 - 1)
        whole = (pl.col("t") * (UNITS[finest] // factor) if factor <= UNITS[finest]
                 else pl.col("t") // (factor // UNITS[finest]))
        result = pl.when(pl.col("t").is_between(low, high)).then(whole).otherwise(result)
    unified = pl.select(t=times).select(result.alias("t"))["t"]
    latest = ((time.time() if now is None else now) + DAY) * UNITS[finest]
    return unified, {
        "unit": finest, "converted": {unit: count for unit, count in counts.items() if count and unit != finest},
        "no_date": len(present) - sum(counts.values()), "future": int((unified > latest).sum()),
    }


def day(value: int, unit: str) -> str:
    """A time as its date; the number itself in a file without dates."""
    if unit == "order":
        return str(value)
    try:
        return datetime.fromtimestamp(value / UNITS[unit], UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError):  # beyond the year 9999
        return f"{value} {unit}"


def remarks(name: str, counts: dict[str, Any]) -> list[str]:
    """What a user should know of a file's times, in words."""
    said = []
    if counts["unit"] == "order":
        said.append(f"{name}: its times are no dates, and taken as the order of a user's interactions")
    for unit, count in counts["converted"].items():
        said.append(f"{name}: {count} times are in {unit}, the others in {counts['unit']}; converted by their size")
    if counts["no_date"]:
        said.append(f"{name}: {counts['no_date']} times are 0 or before 1973; their lines are skipped as malformed")
    if counts["future"]:
        said.append(f"{name}: {counts['future']} times lie after today; they are kept")
    return said
