"""Session graphs as tensors, batched by indexing alone: padded (`GraphBatch`) or flat (`FlatGraphs`)."""
from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


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
