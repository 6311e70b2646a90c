"""From interactions to sessions: duplicates, k-core, order within a day, leave-one-out."""
from __future__ import annotations

import hashlib
import random
from typing import Literal

import numpy as np
import polars as pl

LEAST = 3
"""Interactions from which a user has targets for validation and test; with fewer, all of them are training."""
UNSEEN_SEED = 2026


def without_duplicates(frame: pl.DataFrame, keep: Literal["first", "last", "keep"]) -> pl.DataFrame:
    """Interactions sorted by (user, timestamp, line), of a (user, item) pair the first, the last, or all."""
    frame = frame.sort("user", "timestamp", "line")
    return frame if keep == "keep" else frame.unique(["user", "item"], keep=keep, maintain_order=True)


def k_core(frame: pl.DataFrame, core: int) -> tuple[pl.DataFrame, int]:
    """The largest subset in which every user and item has `core` rows, in the given order, and the rounds it took."""
    rounds = 0
    while True:
        core_rows = frame.filter((pl.len().over("user") >= core) & (pl.len().over("item") >= core))
        if core_rows.height == frame.height:
            return core_rows, rounds
        frame, rounds = core_rows, rounds + 1


def without_unseen(core: pl.DataFrame, share: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The interactions without those of a `share` of the items, and those of that share, which is drawn."""
    items = core["item"].unique().sort().to_list()
    unseen = pl.col("item").is_in(random.Random(UNSEEN_SEED).sample(items, round(share * len(items))))
    return core.filter(~unseen), core.filter(unseen)


def tied() -> pl.Expr:
    """Whether a row shares its user and timestamp with another."""
    return pl.len().over("user", "timestamp") > 1


def ends_in_a_tie(frame: pl.DataFrame) -> pl.DataFrame:
    """Whether a user's last two interactions have one timestamp: columns user and tied, a row a user.

    Where they do, the data does not say which of the two came last, so that the target of leave-one-out is one of them
    by the tie rule.
    """
    last = pl.col("timestamp").sort().tail(2)
    return frame.group_by("user").agg(tied=(last.len() == 2) & (last.first() == last.last()))


def ordered(frame: pl.DataFrame, ties: Literal["hash", "file"], seed: int) -> pl.DataFrame:
    """Rows by user and time; equal times by a hash of (user, item) keyed by `seed`, or by the line in the file.

    The hash is BLAKE2b, so that the order is the same on every machine and tells nothing of item ids or file order,
    which correlate with what a user bought next (same-day reviews of the 2014 release are listed by item id).
    """
    if ties == "file":
        return frame.sort("user", "timestamp", "line")
    key = str(seed).encode()
    rows = frame.filter(tied()).select("line", "user", "item")
    hashes = [
        int.from_bytes(hashlib.blake2b(f"{user}\0{item}".encode(), digest_size=8, key=key).digest())
        for _, user, item in rows.iter_rows()
    ]
    order = rows.select("line", tie=pl.Series(hashes, dtype=pl.UInt64))
    return frame.join(order, on="line", how="left").sort("user", "timestamp", "tie", "line").drop("tie")


def leave_one_out(frame: pl.DataFrame, max_session: int, selection: bool = False) -> dict[str, pl.DataFrame]:
    """Split ordered rows (user, item_id) into `train`, `valid` and `test` sessions.

    A user's last item is the test target, the one before the validation target; a user with fewer than three items
    stays in training whole. `train` has a row for every training position from the second on: user, items (i32 list,
    oldest first, the last `max_session` before the target), target. `valid` and `test` have a row a user, and
    `earlier`: what came before `items`. With `selection` the last training position is no target, so that a validation
    session ends, as a test session does, in a click that was never one.
    """
    rows = frame.select("user", "item_id", position=pl.int_range(pl.len(), dtype=pl.Int64).over("user"),
                        length=pl.len().over("user").cast(pl.Int64)).with_row_index("row")
    fits = pl.col("length") >= LEAST
    before_test = rows.filter(fits & (pl.col("position") == pl.col("length") - 1))
    before_valid = rows.filter(fits & (pl.col("position") == pl.col("length") - 2))
    end = pl.col("length") - 2 - int(selection)
    training = rows.filter(~fits | (pl.col("position") < end), pl.col("position") > 0)
    window = pl.min_horizontal("position", max_session)
    columns = ["user", "items", "target"]
    before = pl.col("position") - window
    parts = {"train": _history(rows, training, pl.lit(0), window, "items").select(columns)}
    for name, targets in (("valid", before_valid), ("test", before_test)):
        sessions = _history(rows, targets, pl.lit(0), window, "items")
        parts[name] = _history(rows, sessions, window, before, "earlier").select(*columns, "earlier")
    return parts


def unseen_sessions(frame: pl.DataFrame, known: int, max_session: int) -> pl.DataFrame:
    """The test sessions of `leave_one_out` whose target's item_id is above `known`.

    `frame` has the rows of all items, ordered. A target comes after all that training has of its user, so that no
    model was trained on a later click.
    """
    return leave_one_out(frame, max_session)["test"].filter(pl.col("target") > known)


def _history(rows: pl.DataFrame, targets: pl.DataFrame, skip: pl.Expr, count: pl.Expr, name: str) -> pl.DataFrame:
    """`targets` with a list column of the `count` items that end `skip` rows before each target."""
    ends = targets.select("row", end=pl.col("row").cast(pl.Int64) - skip, count=count.cast(pl.Int64))
    index = ends.select("row", at=pl.int_ranges(pl.col("end") - pl.col("count"), "end")).explode("at")
    index = index.filter(pl.col("at").is_not_null())
    items = index.select("row", pl.Series(name, rows["item_id"].gather(index["at"]), pl.Int32))
    lists = items.group_by("row", maintain_order=True).agg(name)
    empty = pl.lit([], pl.List(pl.Int32))
    joined = targets.join(lists, on="row", how="left", maintain_order="left")
    return joined.with_columns(pl.col(name).fill_null(empty), target=pl.col("item_id").cast(pl.Int32))


def training_counts(train: pl.DataFrame, items: int) -> np.ndarray:
    """Clicks of every item in the sessions of train.parquet, int64 [V+1]; index 0 is padding.

    A user's first prefix starts with the first click, and the targets are all others, whatever the window. A user with
    one training click has no prefix and counts for nothing.
    """
    first = train.group_by("user", maintain_order=True).agg(pl.col("items").first().list.first())["items"]
    return np.bincount(pl.concat([first, train["target"]]).to_numpy(), minlength=items + 1)
