"""Sessions and the catalogue read from the files of the pipeline, as tensors."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmgr.runtime.artifacts import read_table
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.sessions.tensors import Sessions

if TYPE_CHECKING:
    import polars as pl


def read_sessions(path: str | Path, max_session: int) -> tuple[Sessions, pl.DataFrame]:
    """The sessions of a split's Parquet file, and its table.

    In train.parquet a user's rows are the user's prefixes in order. The first `max_session` of them nest and share one
    row of the tensors; each later one is a window with a row of its own. Users are numbered by the sorted names in the
    train.parquet of the same folder, so that a user has one number in all splits. UserError where the table is empty
    or was split with another `max_session`.
    """
    import polars as pl

    frame = read_table(path)
    if frame.is_empty():
        raise UserError(f"{path} holds no session: lower filter.core or take a larger data.dataset")
    frame = frame.with_row_index("sample")
    rank = pl.int_range(1, pl.len() + 1).over("user")
    within = frame.with_columns(length=pl.col("items").list.len(), rank=rank,
                                longest=rank == pl.len().over("user").clip(upper_bound=max_session))
    cut = pl.col("rank") > pl.col("length")
    if "earlier" in frame.columns:
        cut |= pl.col("earlier").list.len() > 0
    if within.select((cut & (pl.col("length") != max_session) | (pl.col("length") > max_session)).any()).item():
        raise UserError(f"{path} was split with another data.max_session than {max_session}: run `dvc repro` to split "
                        "anew")
    nests = (within["rank"] == within["length"]).to_numpy()
    base = within["longest"].to_numpy() | ~nests
    owner = within.select(pl.col("user").rle_id())["user"].to_torch().long()
    base_rows = torch.from_numpy(base.copy()).nonzero()[:, 0]
    row_of_sample = torch.full((len(frame),), -1)
    row_of_sample[base_rows] = torch.arange(len(base_rows))
    nested_base = torch.from_numpy((base & nests).copy()).nonzero()[:, 0]
    row_of_user = torch.full((int(owner.max()) + 1,), -1)
    row_of_user[owner[nested_base]] = row_of_sample[nested_base]
    row = torch.where(row_of_sample >= 0, row_of_sample, row_of_user[owner])
    length = within["length"].to_torch().long()
    items = padded(frame["items"].gather(base_rows.numpy()))
    user = _user_numbers(frame["user"], Path(path).with_name("train.parquet"))
    return Sessions(items, row, length, frame["target"].to_torch().long(), user[base_rows]), frame


def _user_numbers(users: pl.Series, train: Path) -> Tensor:
    import polars as pl

    known = read_table(train, ["user"]).select(pl.col("user").unique().sort()).with_row_index("number", 1)
    numbers = users.to_frame("user").join(known, on="user", how="left", maintain_order="left")["number"]
    return numbers.fill_null(0).to_torch().long()


def padded(lists: pl.Series) -> Tensor:
    """A column of item lists as int32 [rows, longest], 0 pads."""
    length = lists.list.len().to_torch().long()
    flat = lists.explode(empty_as_null=False).to_torch() if len(lists) else torch.zeros(0, dtype=torch.int32)
    table = torch.zeros(len(lists), max(1, int(length.max()) if len(lists) else 1), dtype=torch.int32)
    table[torch.arange(table.shape[1]) < length[:, None]] = flat.int()
    return table


def read_split(files: Layout, split: str, max_session: int) -> tuple[Sessions, pl.DataFrame]:
    """The sessions of the split `train`, `valid` or `test`, and their table.

    UserError where they hold an item that the catalogue lacks.
    """
    path, items = files.sessions(split), catalogue_size(files.items)
    sessions, frame = read_sessions(path, max_session)
    highest = max(int(sessions.items.max()), int(sessions.target.max()))
    if highest > items:
        raise UserError(f"{path} holds item {highest}, but {files.items} has {items} items: run `dvc repro` "
                        "to split anew")
    return sessions, frame


def catalogue_size(path: str | Path) -> int:
    """The number V of items of items.parquet; ids run from 1 to V."""
    return len(read_table(path, ["item_id"]))


def seen_items(frame: pl.DataFrame) -> Tensor:
    """All items that a user clicked before the target [sessions, longest], 0 pads: the session and what precedes it."""
    import polars as pl

    return padded(frame.select(pl.concat_list("earlier", "items").alias("seen"))["seen"])
