"""SR-GNN: Session-based Recommendation with Graph Neural Networks (Wu et al., AAAI 2019, arXiv 1811.00855).

A gated graph network over the session graph (equations 1-5) and a soft attention readout that mixes the whole session
with its last click (equations 6 and 7); scores are inner products with the item vectors (equation 8).
"""
from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout, GatedGraph, SessionEncoder, Settings, SoftAttention
from llmgr.sessions.graphs import GraphBatch


class Srgnn(SessionEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D].

    Deviation: dropout on the item vectors that the graph network reads; the paper has none. Every layer has weights of
    its own, where the paper repeats one.
    """

    pads = False

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.dropout = Dropout(dropout)
        self.graph = nn.ModuleList(GatedGraph(dim) for _ in range(settings.gnn_layers))
        self.readout = SoftAttention(dim)

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        graphs = batch.flat()
        h_MD = self.dropout(F.embedding(batch.nodes_BN.flatten()[graphs.cell_M], vectors_VD))
        for layer in self.graph:
            h_MD = layer(h_MD, graphs)
        return self.readout(graphs.clicked(h_MD), graphs)

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the attention, not the graph network."""
        return self.readout.parameters()
