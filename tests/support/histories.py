"""Thirty users' histories over fifteen items, as the stages before the baselines write them."""
from __future__ import annotations

import collections
import random
from pathlib import Path

import polars as pl

ITEMS = 15
SCHEMA = {"user": pl.String, "items": pl.List(pl.Int32), "target": pl.Int32}


def histories() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randint(1, ITEMS) for _ in range(rng.randint(3, 9))] for _ in range(30)]


def written(folder, window: int) -> None:
    """Items and sessions as the earlier stages write them: a history ends in its validation and its test target."""
    (folder / "data/sessions").mkdir(parents=True)
    (folder / "data/core").mkdir(parents=True)
    held = SCHEMA | {"earlier": pl.List(pl.Int32)}
    prefixes = [(f"u{n:02d}", x[max(0, t - window):t], x[t]) for n, x in enumerate(histories())
                for t in range(1, len(x) - 2)]
    pl.DataFrame(prefixes, SCHEMA, orient="row").write_parquet(folder / "data/sessions/train.parquet")
    for split, ends in (("valid", 2), ("test", 1)):
        before = [(x[:len(x) - ends], x[-ends]) for x in histories()]
        rows = [(f"u{n:02d}", x[-window:], target, x[:-window]) for n, (x, target) in enumerate(before)]
        pl.DataFrame(rows, held, orient="row").write_parquet(folder / f"data/sessions/{split}.parquet")
    count = collections.Counter(i for x in histories() for i in x)
    pl.DataFrame({"item_id": range(1, ITEMS + 1), "count": [count[i] for i in range(1, ITEMS + 1)]}).write_parquet(
        folder / "data/core/items.parquet")


def project(folder: Path, window: int = 50, lists: list[list[int]] | None = None) -> None:
    """What `written` leaves, and train.parquet: a row a training position, its last `window` clicks."""
    written(folder, window)
    rows = [(f"u{n:02d}", x[max(0, at - window):at], x[at])
            for n, x in enumerate(lists or histories()) for at in range(1, len(x) - 2)]
    pl.DataFrame(rows, SCHEMA, orient="row").write_parquet(folder / "data/sessions/train.parquet")


def weights(clicks: list[int], decay: float) -> dict[int, float]:
    return {item: decay ** back for back, item in reversed(list(enumerate(reversed(clicks))))}
