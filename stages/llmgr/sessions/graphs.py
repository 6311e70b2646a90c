"""Session graphs as tensors, batched by indexing alone: padded (`GraphBatch`) or flat (`FlatGraphs`)."""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch_geometric.data import Batch


@dataclass(frozen=True)
class GraphBatch:
    """Session graphs of B prefixes, padded.

    items_BS: clicked items, 0 pads. nodes_BN: distinct items in order of first click, 0 pads. alias_BS: the node of
    each click, 0 at padding. length_B: the number of clicks. user_B: the session's user, from 1; 0 for a user who is
    not in the training data.
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
        """Adjacency matrices [B, N, N]: 1 where the column's node follows the row's node at least once, else 0."""
        size = self.nodes_BN.shape[1]
        edges = torch.zeros(len(self.nodes_BN) * size * size + 1, device=self.length_B.device)
        offset = torch.arange(len(self.nodes_BN), device=self.length_B.device)[:, None] * size * size
        index = offset + self.alias_BS[:, :-1] * size + self.alias_BS[:, 1:]
        edges[torch.where(self.mask_BS()[:, 1:], index, edges.numel() - 1)] = 1.0
        return edges[:-1].view(-1, size, size)

    def flat(self) -> FlatGraphs:
        """The same graphs end to end, without padding. The CPU counts, since a GPU would wait for every count."""
        if self.length_B.is_cuda:
            return GraphBatch(*(getattr(self, f.name).cpu() for f in fields(self))).flat().to(self.length_B.device)
        session_C, position_C = self.mask_BS().nonzero(as_tuple=True)
        real_BN = self.nodes_BN > 0
        cell_M, count_B = real_BN.flatten().nonzero()[:, 0], real_BN.sum(1)
        node_B = count_B.cumsum(0) - count_B
        alias_C = self.alias_BS[session_C, position_C] + node_B[session_C]
        follows = position_C[1:] > 0
        pair_E = torch.unique(alias_C[:-1][follows] * len(cell_M) + alias_C[1:][follows])
        return FlatGraphs(cell_M, node_B, alias_C, session_C, position_C, self.length_B.cumsum(0) - 1,
                          torch.stack((pair_E // len(cell_M), pair_E % len(cell_M))))

    def to_pyg(self) -> Batch:
        """The same graphs for PyTorch Geometric, on the CPU.

        Each graph has `x` [nodes], the items; `edge_index` [2, edges] from a click's node to the next click's, each
        pair once; `click_index` [clicks], the node of every click in order; and `user` [1].
        """
        from torch_geometric.data import Batch, Data  # takes seconds, which only its users need

        graphs = []
        for nodes, alias, length, user in zip(self.nodes_BN.cpu(), self.alias_BS.cpu(), self.length_B.tolist(),
                                              self.user_B.cpu()):
            clicks = alias[:length].long()
            edges = torch.stack((clicks[:-1], clicks[1:])).unique(dim=1) if length > 1 else clicks.new_zeros(2, 0)
            graphs.append(Data(x=nodes[nodes > 0], edge_index=edges, click_index=clicks, user=user[None]))
        return Batch.from_data_list(graphs)


@dataclass(frozen=True)
class FlatGraphs:
    """Session graphs of B prefixes end to end: M nodes, C clicks.

    cell_M: each node's index among the padded nodes, read row by row. node_B: each prefix's first node. alias_C: the
    node of each click. session_C, position_C: each click's prefix, and its position there, from 0. last_B: each
    prefix's last click. edge_index_2E: sorted edges from a node to the next, in PyTorch Geometric's form; a repeated
    transition is one edge.
    """

    cell_M: Tensor
    node_B: Tensor
    alias_C: Tensor
    session_C: Tensor
    position_C: Tensor
    last_B: Tensor
    edge_index_2E: Tensor

    def to(self, device: torch.device) -> FlatGraphs:
        """The same graphs on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return FlatGraphs(**moved)

    def clicked(self, h_MD: Tensor) -> Tensor:
        """The state of every click's node [C, D]."""
        return h_MD if len(self.alias_C) == len(h_MD) else F.embedding(self.alias_C, h_MD)  # none is clicked twice

    def padded(self, h_MD: Tensor, alias_BS: Tensor) -> Tensor:
        """The state of every click's node [B, S, D]; padding repeats the prefix's first node and must be masked."""
        return F.embedding(alias_BS + self.node_B[:, None], h_MD)
