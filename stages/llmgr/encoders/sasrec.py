"""SASRec: Self-Attentive Sequential Recommendation (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

Item vectors plus learned position vectors (equation 1), causal self-attention blocks (equations 2-5), and the last
click's output. Positions count back from the last click: the paper pads on the left, so that the last click always
has the same one.

Deviation: layer norm follows every residual and the sum of item and position, the inner layer is GELU and four times
as wide, attention has an output projection, and the loss is cross-entropy over all items of the prefix's next item
(the paper: norm before each sub-layer, ReLU of the same width, a binary loss with one negative at every position);
all as in RecBole. RecBole counts positions from the first click.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import AttentionBlock, Dropout, ItemVectors, SessionEncoder, Settings
from llmgr.sessions.graphs import GraphBatch


class Sasrec(SessionEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]."""

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.position = nn.Embedding(settings.max_session, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(dropout)
        self.blocks = nn.ModuleList(
            AttentionBlock(dim, settings.heads, dropout, causal=True, attention_dropout=dropout, activation=nn.GELU)
            for _ in range(settings.layers))

    @torch.no_grad()
    def initialise(self, items: ItemVectors) -> None:
        """RecBole's: N(0, 0.02) for the ID embeddings and all weights, biases 0."""
        super().initialise(items)
        nn.init.normal_(items.table.weight[1:], std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        mask, last = batch.mask_BS(), batch.length_B - 1
        back_BS = last[:, None] - torch.arange(mask.shape[1], device=mask.device)
        x_BSD = F.embedding(batch.items_BS, vectors_VD) + self.position(back_BS.clamp(min=0))
        x_BSD = self.dropout(self.norm(x_BSD))
        for block in self.blocks[:-1]:
            x_BSD = block(x_BSD, mask)
        return self.blocks[-1](x_BSD, mask, last)[:, 0]

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the last block."""
        return self.blocks[-1].parameters()
