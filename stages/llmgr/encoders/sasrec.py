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

from torch import nn

from llmgr.encoders.layers import AttentionBlock, BlockEncoder, Settings


class Sasrec(BlockEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]. Initial values are RecBole's."""

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim, dropout, settings.max_session, (
            AttentionBlock(dim, settings.heads, dropout, causal=True, attention_dropout=dropout, activation=nn.GELU)
            for _ in range(settings.layers)))
