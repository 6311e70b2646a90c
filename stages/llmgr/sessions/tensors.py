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
    """Samples: prefixes of sessions, each with the item that follows it. Nested prefixes share a row of `items`.

    Sample i is the first `length[i]` clicks of row `row[i]`; its target is `target[i]`. `items` [rows, longest] holds
    item ids, 0 pads. `user` [rows] numbers the users of the training data from 1; 0, the default, is any other user.
    """

    def __init__(self, items: Tensor, row: Tensor, length: Tensor, target: Tensor, user: Tensor | None = None) -> None:
        self.items, self.row, self.length, self.target = items, row, length, target
        self.user = torch.zeros(len(items), dtype=torch.long) if user is None else user
        self.alias, self.nodes, self.count = _node_tables(items)

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Sessions:
        """All samples of lists of item ids (from 1): every prefix, with the item that follows it as the target.

        A list of n items makes n - 1 samples. Each list belongs to a user of its own.
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
        """The same sessions on another device; `self` where they are there already."""
        if self.row.device == torch.empty(0, device=device).device:
            return self
        moved = object.__new__(Sessions)
        moved.__dict__ = {k: v.to(device) for k, v in vars(self).items()}
        return moved

    def subset(self, samples: Tensor) -> Sessions:
        """The same rows with the given samples only."""
        chosen = object.__new__(Sessions)
        chosen.__dict__ = vars(self) | {"row": self.row[samples], "length": self.length[samples],
                                        "target": self.target[samples]}
        return chosen

    def recent(self, count: Tensor) -> Sessions:
        """The same samples, each cut to its last `count` [samples] clicks; all tensors on the CPU.

        A sample that loses clicks gets a row of its own.
        """
        cut = count < self.length
        new_row = cut | (self.row != self.row.roll(1)) | cut.roll(1)
        new_row[0] = True
        first = new_row.nonzero()[:, 0]
        position = (self.length - count)[first][:, None] + torch.arange(self.items.shape[1])
        real = (position < self.length[first][:, None]) | ~cut[first][:, None]
        items = self.items[self.row[first]].gather(1, position.clamp(max=self.items.shape[1] - 1)) * real
        return Sessions(items.int(), new_row.long().cumsum(0) - 1, count, self.target, self.user[self.row[first]])

    def recency(self, decay: float) -> Tensor:
        """Weights [samples] of mean 1: `decay` to the power of the number of later targets of the sample's user.

        A user's samples must be in the order of their targets; samples of other users may stand between them.
        """
        user = self.user[self.row]
        order = torch.argsort(user, stable=True)
        later = torch.empty_like(order)
        later[order] = torch.bincount(user).cumsum(0)[user[order]] - 1 - torch.arange(len(user), device=user.device)
        weight = torch.full(user.shape, decay, dtype=torch.double, device=user.device).pow(later)
        return (weight / weight.mean()).float()

    def graphs(self, samples: Tensor) -> GraphBatch:
        """The graphs of samples [B]."""
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
