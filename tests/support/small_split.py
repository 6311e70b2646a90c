"""A split of forty users over nine items, its parameters, and a stage run over it as a process."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
from machine import DEFAULTS, ROOT

from llmgr.experiments import search

ITEMS, USERS = 9, 40


def write_data(folder: Path) -> None:
    """A small split under `folder`: users walk through the items in order, one step at a time."""
    (folder / "data/sessions").mkdir(parents=True)
    (folder / "data/core").mkdir()
    walks = {f"u{n:02}": [(n + step) % ITEMS + 1 for step in range(5)] for n in range(USERS)}
    rows = [(user, walk[:n], walk[n]) for user, walk in walks.items() for n in (1, 2)]
    splits = {"train": rows, "valid": [(user, walk[:3], walk[3]) for user, walk in walks.items()],
              "test": [(user, walk[:4], walk[4]) for user, walk in walks.items()]}
    schema = {"user": pl.String, "items": pl.List(pl.Int32), "target": pl.Int32}
    for name, found in splits.items():
        frame = pl.DataFrame(found, schema, orient="row")
        if name != "train":
            frame = frame.with_columns(earlier=pl.lit([], pl.List(pl.Int32)))
        frame.write_parquet(folder / f"data/sessions/{name}.parquet")
    pl.DataFrame({"item_id": range(1, ITEMS + 1), "count": [20] * ITEMS}, {"item_id": pl.Int32, "count": pl.Int32}
                 ).write_parquet(folder / "data/core/items.parquet")


def set_up(folder: Path, **changes: object) -> None:
    text = DEFAULTS.read_text()
    short = {"encoder.dim": 8, "encoder.training.epochs": 2, "encoder.training.batch_size": 16,
             "encoder.training.precision": "fp32", "encoder.training.checkpoint_seconds": 0.001}
    (folder / "params.yaml").write_text(search.rewritten(
        text, short | {key.replace("__", "."): value for key, value in changes.items()}))


def run(folder: Path, *command: str, status: int = 0) -> str:
    """What a stage says to standard error."""
    environment = {**os.environ, "DVC_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "stages" / command[0]), *command[1:]], cwd=folder, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stderr
