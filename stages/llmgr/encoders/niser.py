"""NISER: Normalized Item and Session Representations to Handle Popularity Bias (Gupta et al., 2019, arXiv 1909.04276).

SR-GNN whose item vectors (equation 2) and session vectors (equation 6) have unit length, so that a popular item gains
nothing by a long vector; scores are sigma * cosine (equation 7). NISER+ adds position vectors to the click states.

Shapes: E width of the item vectors, which is D here.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout, GatedGraph, SessionEncoder, Settings, SoftAttention
from llmgr.sessions.graphs import GraphBatch


class Niser(SessionEncoder):
    """GraphBatch, unit item vectors [V+1, D] -> session vectors [B, D] of length sigma."""

    pads = False

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.sigma = settings.sigma
        self.dropout = Dropout(dropout)
        self.graph = nn.ModuleList(GatedGraph(dim) for _ in range(settings.gnn_layers))
        self.positions = nn.Embedding(settings.max_session, dim) if settings.positions else None
        self.readout = SoftAttention(dim)

    def item_vectors(self, table_VE: Tensor, text_VE: Tensor | None) -> Tensor:
        return F.normalize(super().item_vectors(table_VE, text_VE), dim=1)

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        graphs = batch.flat()
        h_MD = F.normalize(self.dropout(F.embedding(batch.nodes_BN.flatten()[graphs.cell_M], vectors_VD)), dim=1)
        for layer in self.graph:
            h_MD = layer(h_MD, graphs)
        x_CD = graphs.clicked(h_MD)
        if self.positions is not None:
            x_CD = x_CD + self.positions(graphs.position_C)
        return self.sigma * F.normalize(self.readout(x_CD, graphs), dim=1)

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: positions and attention, not the graph network."""
        positions = () if self.positions is None else self.positions.parameters()
        return itertools.chain(self.readout.parameters(), positions)
