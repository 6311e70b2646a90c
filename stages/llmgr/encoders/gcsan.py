"""GC-SAN: Graph Contextualized Self-Attention Network for Session-based Recommendation (Xu et al., IJCAI 2019).

A gated graph network (equations 1-5, those of SR-GNN, arXiv 1811.00855) over the session graph, self-attention blocks
over the clicks (equations 6-10), and s = omega * attention_last + (1 - omega) * gnn_last (equation 12).
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import GatedGraph, SessionEncoder, at, clicked
from llmgr.graph import GraphBatch


class AttentionBlock(nn.Module):
    """Self-attention and feed-forward, each with dropout, residual and layer norm (equations 6-9).

    Deviation: the paper has no layer norm, dropout, residual around the attention, output projection or wider inner
    layer here; its public re-implementations (RecBole) do, and train better. With `last_B`
    only the query of that click is computed, which is all the readout needs.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.inner = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.norm_attention, self.norm_inner = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, last_B: Tensor | None = None) -> Tensor:
        asked = x_BSD if last_B is None else at(x_BSD, last_B)[:, None]
        split = (len(x_BSD), -1, self.heads, x_BSD.shape[2] // self.heads)
        key, value = (t.reshape(split).transpose(1, 2) for t in self.key_value(x_BSD).chunk(2, -1))
        query = self.query(asked).view(split).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, mask_BS[:, None, None])
        attended = self.out(attended.transpose(1, 2).flatten(2))
        x = self.norm_attention(asked + self.dropout(attended))
        return self.norm_inner(x + self.dropout(self.inner(x)))


class Gcsan(SessionEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]."""

    def __init__(self, dim: int, dropout: float, settings: Any) -> None:
        super().__init__(dim)
        self.omega = settings.omega
        self.dropout = nn.Dropout(dropout)
        self.graph = nn.ModuleList(GatedGraph(dim) for _ in range(settings.gnn_layers))
        self.attention = nn.ModuleList(
            AttentionBlock(dim, settings.attention_heads, dropout) for _ in range(settings.attention_layers))

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        h_BND = self.dropout(F.embedding(batch.nodes_BN, vectors_VD))
        adjacency = batch.normalised()
        for layer in self.graph:
            h_BND = layer(h_BND, *adjacency)
        x_BSD = clicked(h_BND, batch)
        mask, last = batch.mask_BS(), batch.length_B - 1
        gnn_last_BD = at(x_BSD, last)
        for block in self.attention[:-1]:
            x_BSD = block(x_BSD, mask)
        attention_last_BD = self.attention[-1](x_BSD, mask, last)[:, 0]
        return self.omega * attention_last_BD + (1 - self.omega) * gnn_last_BD

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the attention, not the graph network."""
        return self.attention.parameters()
