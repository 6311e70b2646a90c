"""GC-SAN: Graph Contextualized Self-Attention Network for Session-based Recommendation (Xu et al., IJCAI 2019).

A gated graph network (equations 1-5, those of SR-GNN, arXiv 1811.00855) over the session graph, self-attention blocks
over the clicks (equations 6-10), and s = omega * attention_last + (1 - omega) * gnn_last (equation 12).
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import AttentionBlock, Dropout, GatedGraph, ItemVectors, SessionEncoder, Settings, at
from llmgr.sessions.graphs import GraphBatch

FIRST = 0.02  # standard deviation of first values


class Gcsan(SessionEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]."""

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.omega = settings.omega
        self.dropout = Dropout(dropout)
        self.graph = nn.ModuleList(GatedGraph(dim) for _ in range(settings.gnn_layers))
        self.attention = nn.ModuleList(
            AttentionBlock(dim, settings.attention_heads, dropout) for _ in range(settings.attention_layers))

    @torch.no_grad()
    def initialise(self, items: ItemVectors) -> None:
        """N(0, 0.02) for the ID embeddings and all weights, biases of linear maps 0, as RecBole.

        Deviation: the paper does not say; SR-GNN's first values, six times as large, end lower.
        """
        super().initialise(items)
        nn.init.normal_(items.table.weight[1:], std=FIRST)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=FIRST)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.GRUCell):
                for weight in layer.parameters():
                    nn.init.normal_(weight, std=FIRST)

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        graphs, h_BND = batch.flat(), self.dropout(F.embedding(batch.nodes_BN, vectors_VD))
        h_MD = h_BND.flatten(0, 1).index_select(0, graphs.cell_M)
        for layer in self.graph:
            h_MD = layer(h_MD, graphs)
        x_BSD = graphs.padded(h_MD, batch.alias_BS)
        mask, last = batch.mask_BS(), batch.length_B - 1
        gnn_last_BD = at(x_BSD, last)
        for block in self.attention[:-1]:
            x_BSD = block(x_BSD, mask)
        attention_last_BD = self.attention[-1](x_BSD, mask, last)[:, 0]
        return self.omega * attention_last_BD + (1 - self.omega) * gnn_last_BD

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the attention, not the graph network."""
        return self.attention.parameters()
