"""STAMP: Short-Term Attention/Memory Priority Model for Session-based Recommendation (Liu et al., KDD 2018).

Item vectors x_i are weighted by W0 sigmoid(W1 x_i + W2 x_t + W3 m_s + b), with x_t the last click and m_s the
session's mean, and sum to m_a (section 3.3); h_s = tanh(W_s m_a + b_s), h_t = tanh(W_t x_t + b_t), and the trilinear
score <h_s, h_t, x_i> (section 3.2) is an inner product with the session vector h_s * h_t.

Deviation: m_s is added to m_a and no sigmoid squashes the score before the softmax, both as in the authors' code and
RecBole; dropout falls on the item vectors. First values are SR-GNN's: from the paper's, N(0, 0.002) for items and
N(0, 0.05) for weights, scores are products of near-zeros and hardly move (Office, validation NDCG@20 after 5 and 10
epochs: 0.015 and 0.045, against 0.044 and 0.056).
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout, SessionEncoder, Settings, at
from llmgr.sessions.graphs import GraphBatch


class Stamp(SessionEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]."""

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.dropout = Dropout(dropout)
        self.of_item, self.of_last = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.of_mean, self.weigh = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 1, bias=False)
        self.memory, self.last = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        mask_BS1 = batch.mask_BS()[..., None]
        x_BSD = self.dropout(F.embedding(batch.items_BS, vectors_VD)) * mask_BS1
        last_BD = at(x_BSD, batch.length_B - 1)
        mean_BD = x_BSD.sum(1) / batch.length_B[:, None]
        aspects_BD = self.of_last(last_BD) + self.of_mean(mean_BD)
        weight_BS1 = self.weigh(torch.sigmoid(self.of_item(x_BSD) + aspects_BD[:, None]))
        memory_BD = (weight_BS1 * x_BSD).sum(1) + mean_BD
        return torch.tanh(self.memory(memory_BD)) * torch.tanh(self.last(last_BD))

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the two output cells, not the attention."""
        return itertools.chain(self.memory.parameters(), self.last.parameters())
