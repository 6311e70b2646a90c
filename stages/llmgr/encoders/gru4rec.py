"""GRU4Rec: Session-based Recommendations with Recurrent Neural Networks (Hidasi et al., ICLR 2016, arXiv 1511.06939).

Item vectors, GRU layers over the clicks (section 3), and a linear layer on the last state.

Deviation: the paper ranks sampled items (TOP1, BPR) over session-parallel mini-batches and has an output row an item.
Here every prefix is a sample and dropout falls on the item vectors (both from Tan et al., DLRS 2016, arXiv 1606.08117),
the loss is cross-entropy over all items, and the output rows are the input vectors, all as in RecBole. The reset gate
acts behind the state's matrix (PyTorch's form), in the paper before it.

Shapes: H width of the GRU.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout, ItemVectors, SessionEncoder, Settings, at
from llmgr.sessions.graphs import GraphBatch


class Gru4rec(SessionEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]."""

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.dropout = Dropout(dropout)
        self.gru = nn.GRU(dim, settings.hidden, settings.layers, bias=False, batch_first=True)
        self.out = nn.Linear(settings.hidden, dim)

    @torch.no_grad()
    def initialise(self, items: ItemVectors) -> None:
        """Glorot's for the ID embeddings and the GRU, PyTorch's for the output layer, as RecBole."""
        super().initialise(items)
        nn.init.xavier_normal_(items.table.weight[1:])
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)
        self.out.reset_parameters()

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        states_BSH, _ = self.gru(self.dropout(F.embedding(batch.items_BS, vectors_VD)))
        return self.out(at(states_BSH, batch.length_B - 1))

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the output layer, not the recurrence."""
        return self.out.parameters()
