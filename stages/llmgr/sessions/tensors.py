"""Sessions as tensors, and their graphs: built once for all prefixes, batched by indexing alone.

A session's nodes are its distinct items in order of first click, so the graph of a prefix is a corner of the graph of
the whole session: every prefix of a session shares one row of the tables below.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmgr.sessions.graphs import GraphBatch


class Sessions:
    """Prefixes with their targets, over rows that nested prefixes share.

    Sample i is the first `length[i]` clicks of row `row[i]`, to be followed by `target[i]`. `user` [rows] numbers the
    users that training knows from 1; 0, the default, is any other.
    """

    def __init__(self, items: Tensor, row: Tensor, length: Tensor, target: Tensor, user: Tensor | None = None) -> None:
        self.items, self.row, self.length, self.target = items, row, length, target
        self.user = torch.zeros(len(items), dtype=torch.long) if user is None else user
        self.alias, self.nodes, self.count = _node_tables(items)

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Sessions:
        """Every prefix of lists of item ids (from 1), followed by the item that comes next, each of a user of its own.

        A list of n items makes n - 1 samples.
        """
        items = torch.zeros(len(lists), max(map(len, lists)) - 1, dtype=torch.int32)
        for row, clicks in enumerate(lists):
            items[row, :len(clicks) - 1] = torch.tensor(clicks[:-1])
        row, length, target = zip(*((row, n, clicks[n]) for row, clicks in enumerate(lists)
                                    for n in range(1, len(clicks))))
        return cls(items, *map(torch.tensor, (row, length, target)), torch.arange(1, len(lists) + 1))

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
