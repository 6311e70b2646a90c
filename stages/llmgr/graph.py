"""Sessions as tensors, and their graphs: built once for all prefixes, batched by indexing alone.

A session's nodes are its distinct items in order of first click, so the graph of a prefix is a corner of the graph of
the whole session: every prefix of a session shares one row of the tables below.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.artifacts import read_table
from llmgr.errors import UserError

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class GraphBatch:
    """Session graphs of B prefixes, padded.

    items_BS: clicked items, 0 pads. nodes_BN: distinct items in order of first click, 0 pads. alias_BS: the node of
    each click (0 where padded). length_B: clicks. user_B: whose session it is, from 1; 0 for a user that training does
    not know.
    """

    items_BS: Tensor
    nodes_BN: Tensor
    alias_BS: Tensor
    length_B: Tensor
    user_B: Tensor

    def mask_BS(self) -> Tensor:
        """True at clicks, False at padding."""
        return torch.arange(self.items_BS.shape[1], device=self.length_B.device) < self.length_B[:, None]

    def edges_BNN(self) -> Tensor:
        """1 where the node of the column follows that of the row at least once, else 0."""
        size = self.nodes_BN.shape[1]
        edges = torch.zeros(len(self.nodes_BN) * size * size + 1, device=self.length_B.device)
        offset = torch.arange(len(self.nodes_BN), device=self.length_B.device)[:, None] * size * size
        index = offset + self.alias_BS[:, :-1] * size + self.alias_BS[:, 1:]
        edges[torch.where(self.mask_BS()[:, 1:], index, edges.numel() - 1)] = 1.0
        return edges[:-1].view(-1, size, size)

    def flat(self) -> FlatGraphs:
        """The same graphs end to end, without padding; counted on the CPU, since a GPU would wait for every count."""
        if self.length_B.is_cuda:
            return GraphBatch(*(getattr(self, f.name).cpu() for f in fields(self))).flat().to(self.length_B.device)
        session_C, place_C = self.mask_BS().nonzero(as_tuple=True)
        real_BN = self.nodes_BN > 0
        cell_M, count_B = real_BN.flatten().nonzero()[:, 0], real_BN.sum(1)
        node_B = count_B.cumsum(0) - count_B
        alias_C = self.alias_BS[session_C, place_C] + node_B[session_C]
        follows = place_C[1:] > 0
        pair_E = torch.unique(alias_C[:-1][follows] * len(cell_M) + alias_C[1:][follows])
        source_E, target_E = pair_E // len(cell_M), pair_E % len(cell_M)
        end_B = self.length_B.cumsum(0)
        return FlatGraphs(cell_M, node_B, alias_C, session_C, place_C, end_B - self.length_B, end_B - 1,
                          Neighbours.of(target_E, source_E, len(cell_M)),
                          Neighbours.of(source_E, target_E, len(cell_M)))


@dataclass(frozen=True)
class FlatGraphs:
    """Session graphs of B prefixes end to end: M nodes, C clicks.

    cell_M: each node's place among the padded ones, read row by row. node_B: each prefix's first node. alias_C: the
    node of each click. session_C, place_C: whose click it is, and the how manyth, from 0. first_B, last_B: each
    prefix's first and last click. into, out: the nodes that a node follows, and those that follow it.
    """

    cell_M: Tensor
    node_B: Tensor
    alias_C: Tensor
    session_C: Tensor
    place_C: Tensor
    first_B: Tensor
    last_B: Tensor
    into: Neighbours
    out: Neighbours

    def to(self, device: torch.device) -> FlatGraphs:
        """The same graphs on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return FlatGraphs(**moved)

    def clicked(self, h_MD: Tensor) -> Tensor:
        """The state of every click's node [C, D]."""
        return h_MD if len(self.alias_C) == len(h_MD) else F.embedding(self.alias_C, h_MD)  # none is clicked twice

    def padded(self, h_MD: Tensor, alias_BS: Tensor) -> Tensor:
        """The state of every click's node [B, S, D]; at padding that of the prefix's first, to be masked."""
        return F.embedding(alias_BS + self.node_B[:, None], h_MD)


@dataclass(frozen=True)
class Neighbours:
    """For each of M nodes some others, in a list of all E: other_E, and where a node's begin, start_M."""

    other_E: Tensor
    start_M: Tensor
    weight_E: Tensor

    @classmethod
    def of(cls, node_E: Tensor, other_E: Tensor, nodes: int) -> Neighbours:
        """The `other_E` of the nodes `node_E`."""
        order = torch.argsort(node_E, stable=True)
        count_M = torch.bincount(node_E, minlength=nodes)
        return cls(other_E[order], count_M.cumsum(0) - count_M, count_M.float().reciprocal()[node_E[order]])

    def to(self, device: torch.device) -> Neighbours:
        """The same on another device."""
        return Neighbours(self.other_E.to(device), self.start_M.to(device), self.weight_E.to(device))

    def mean(self, x_MD: Tensor) -> Tensor:
        """The mean of what each node's others have, 0 where it has none (the rows of SR-GNN's connection matrix).

        Deviation: repeated transitions count once, as in the authors' code; the paper (Wu et al. 2019, fig. 2) counts
        occurrences.
        """
        return F.embedding_bag(self.other_E, x_MD.float(), self.start_M, mode="sum", per_sample_weights=self.weight_E)


class Sessions:
    """Prefixes with their targets, over rows that nested prefixes share.

    Sample i is the first `length[i]` clicks of row `row[i]`, to be followed by `target[i]`. `user` [rows] numbers the
    users that training knows from 1; 0, the default, is any other.
    """

    def __init__(self, items: Tensor, row: Tensor, length: Tensor, target: Tensor, user: Tensor | None = None) -> None:
        self.items, self.row, self.length, self.target = items, row, length, target
        self.user = torch.zeros(len(items), dtype=torch.long) if user is None else user
        self.alias, self.nodes, self.count = _node_tables(items)

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device | str) -> Sessions:
        """The same tables on another device; itself where they are there."""
        if self.row.device == torch.empty(0, device=device).device:
            return self
        moved = object.__new__(Sessions)
        moved.__dict__ = {k: v.to(device) for k, v in vars(self).items()}
        return moved

    def subset(self, samples: Tensor) -> Sessions:
        """The same rows with `samples` alone."""
        chosen = object.__new__(Sessions)
        chosen.__dict__ = vars(self) | {"row": self.row[samples], "length": self.length[samples],
                                        "target": self.target[samples]}
        return chosen

    def recent(self, kept: Tensor) -> Sessions:
        """The same samples with their last `kept` clicks; one that loses some gets a row of its own. All on the CPU."""
        cut = kept < self.length
        apart = cut | (self.row != self.row.roll(1)) | cut.roll(1)
        apart[0] = True
        first = apart.nonzero()[:, 0]
        place = (self.length - kept)[first][:, None] + torch.arange(self.items.shape[1])
        real = (place < self.length[first][:, None]) | ~cut[first][:, None]
        items = self.items[self.row[first]].gather(1, place.clamp(max=self.items.shape[1] - 1)) * real
        return Sessions(items.int(), apart.long().cumsum(0) - 1, kept, self.target, self.user[self.row[first]])

    def recency(self, decay: float) -> Tensor:
        """Weights [samples] of mean 1: `decay` to the power of how many later targets the sample's user has.

        A user's samples stand in the order of their targets, wherever they stand.
        """
        user = self.user[self.row]
        order = torch.argsort(user, stable=True)
        later = torch.empty_like(order)
        later[order] = torch.bincount(user).cumsum(0)[user[order]] - 1 - torch.arange(len(user), device=user.device)
        weight = torch.full(user.shape, decay, dtype=torch.double, device=user.device).pow(later)
        return (weight / weight.mean()).float()

    def graphs(self, samples: Tensor) -> GraphBatch:
        """The graphs of samples [B], by indexing, without a loop over them."""
        return self.prefix_graphs(self.row[samples], self.length[samples])

    def prefix_graphs(self, row: Tensor, length: Tensor) -> GraphBatch:
        """The graphs of the first `length` [B] clicks of rows [B]."""
        steps = int(length.max())
        position = torch.arange(steps, device=length.device)
        mask = position < length[:, None]
        items = self.items[row, :steps].long() * mask
        alias = self.alias[row, :steps].long() * mask
        count = self.count[row, length - 1].long()
        width = int(count.max())
        nodes = self.nodes[row, :width].long() * (torch.arange(width, device=row.device) < count[:, None])
        return GraphBatch(items, nodes, alias, length, self.user[row])


def read_sessions(path: str | Path, max_session: int) -> tuple[Sessions, pl.DataFrame]:
    """Sessions of a split and the table itself.

    In train.parquet a user's rows are the prefixes in order; the first `max_session` of them nest and share one row
    here, later ones are windows of their own. Users are numbered in the order of their names in the train.parquet that
    lies beside, so that one has one number in all splits. UserError where the table is empty or was split with another
    `max_session`.
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


def bucketed(length: Tensor, batch_size: int, generator: torch.Generator, window: int = 64) -> list[Tensor]:
    """Random batches of samples of like length: shuffled, sorted within windows of batches, batches shuffled.

    Padding falls to a few per cent while every epoch still mixes sessions anew.
    """
    order = torch.randperm(len(length), generator=generator)
    batches: list[Tensor] = []
    for chunk in order.split(batch_size * window):
        batches += chunk[torch.argsort(length[chunk], stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def alike(samples: Tensor, length: Tensor, ratio: float = 1.5, place: torch.device | None = None) -> list[Tensor]:
    """Samples in groups of like length, shortest first: a group's longest is less than `ratio` times its shortest.

    A batch of random samples is read group by group, so that little is padded though its lengths differ. To be read on
    a GPU they stay one group: there padding costs less than the calls for each group.
    """
    if place is not None and place.type == "cuda":
        return [samples]
    edges = [1]
    while edges[-1] <= int(length.max()):
        edges.append(max(edges[-1] + 1, math.ceil(ratio * edges[-1])))
    band = torch.bucketize(length[samples], torch.tensor(edges), right=True)
    groups = samples[torch.argsort(band, stable=True)].split(torch.bincount(band).tolist())
    return [group for group in groups if len(group)]


def _node_tables(items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, steps = items.shape
    position = torch.arange(steps).expand(rows, steps)
    key = torch.arange(rows)[:, None] * (int(items.max()) + 1) + items.long()
    _, inverse = torch.unique(key, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), steps).scatter_reduce(
        0, inverse.flatten(), position.flatten(), "amin")[inverse]
    fresh = (first == position) & (items > 0)
    count = fresh.cumsum(1)
    alias = (count - 1).clamp(min=0).gather(1, first.clamp(max=steps - 1))
    nodes = torch.zeros(rows, steps, dtype=torch.int32)
    nodes[fresh.nonzero()[:, 0], (count - 1)[fresh]] = items[fresh]
    return alias.short(), nodes, count.short()


def read_split(split: str, max_session: int) -> tuple[Sessions, pl.DataFrame]:
    """The sessions of `train`, `valid` or `test` and their table.

    UserError where they hold an item that the catalogue lacks.
    """
    path, items = f"data/sessions/{split}.parquet", catalogue_size("data/core/items.parquet")
    sessions, frame = read_sessions(path, max_session)
    highest = max(int(sessions.items.max()), int(sessions.target.max()))
    if highest > items:
        raise UserError(f"{path} holds item {highest}, but data/core/items.parquet has {items} items: run `dvc repro` "
                        "to split anew")
    return sessions, frame


def catalogue_size(path: str | Path) -> int:
    """The number V of items of items.parquet; ids run from 1 to V."""
    return len(read_table(path, ["item_id"]))
