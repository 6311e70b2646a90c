"""NARM: Neural Attentive Session-based Recommendation (Li et al., CIKM 2017, arXiv 1711.04725).

A GRU over the clicks; its last state h_t is the global encoder (section 3.3), its states h_j weighted by
v^T sigmoid(A1 h_t + A2 h_j), without a softmax, sum to the local one (section 3.4); the bilinear decoder scores
emb_i^T B [global; local] (section 3.5), which is an inner product with the session vector B [global; local].

Deviation: one GRU serves both encoders, as in RecBole and the authors' code; its reset gate acts behind the state's
matrix (PyTorch's form), in the paper before it.

Shapes: H width of the GRU.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout, ItemVectors, SessionEncoder, Settings, at
from llmgr.sessions.graphs import GraphBatch


class Narm(SessionEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]."""

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        hidden = settings.hidden
        self.dropout, self.session_dropout = Dropout(dropout), Dropout(settings.session_dropout)
        self.gru = nn.GRU(dim, hidden, settings.layers, bias=False, batch_first=True)
        self.ask, self.answer = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.weigh = nn.Linear(hidden, 1, bias=False)
        self.decode = nn.Linear(2 * hidden, dim, bias=False)

    @torch.no_grad()
    def initialise(self, items: ItemVectors) -> None:
        """Glorot's for the ID embeddings and the linear maps, PyTorch's for the GRU, as RecBole."""
        super().initialise(items)
        self.gru.reset_parameters()
        maps = (self.ask, self.answer, self.weigh, self.decode)
        for weight in (items.table.weight[1:], *(layer.weight for layer in maps)):
            nn.init.xavier_normal_(weight)

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        states_BSH, _ = self.gru(self.dropout(F.embedding(batch.items_BS, vectors_VD)))
        global_BH = at(states_BSH, batch.length_B - 1)
        weight_BS1 = self.weigh(torch.sigmoid(self.ask(global_BH)[:, None] + self.answer(states_BSH)))
        local_BH = (weight_BS1 * batch.mask_BS()[..., None] * states_BSH).sum(1)
        return self.decode(self.session_dropout(torch.cat((global_BH, local_BH), -1)))

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the attention and the decoder, not the recurrence."""
        return itertools.chain(*(m.parameters() for m in (self.ask, self.answer, self.weigh, self.decode)))
