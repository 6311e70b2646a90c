"""BSARec: An Attentive Inductive Bias for Sequential Recommendation beyond the Self-Attention (Shin et al., AAAI 2024,
arXiv 2312.10325).

SASRec whose blocks mix self-attention A(X) with a frequency rescaler F(X): alpha F(X) + (1 - alpha) A(X) (equation 6).
Self-attention smooths a session, the rescaler gives its quick changes back: with the discrete Fourier transform over
the clicks, LFC(X) what its lowest c // 2 + 1 components make and HFC(X) = X - LFC(X) the rest,
F(X) = LFC(X) + beta HFC(X) (equation 7), beta learned for each channel.

Deviation: the transform is over a session's own clicks; the paper's runs over its left padding to 50 positions, whose
content it mixes in. So a session of up to c clicks has no high frequencies.
Deviation: beta is the square of what is learned, drawn from N(0, 1), and dropout, residual and layer norm follow the
rescaler, as in the authors' code.
Deviation: positions count back from the last click, which the paper's left padding comes to. As with the other
encoders every prefix is a sample; the loss is the paper's, cross-entropy over all items.

Shapes: R queries (all clicks or the last), N lengths of a session, F components of the transform.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from llmgr.encoders.layers import AttentionBlock, BlockEncoder, Dropout, Settings, at


class FrequencyRescaler(nn.Module):
    """LFC(X) + beta (X - LFC(X)) with dropout, residual and layer norm: clicks [B, S, D] -> the same."""

    def __init__(self, dim: int, components: int, longest: int, dropout: float) -> None:
        super().__init__()
        self.root_D = nn.Parameter(torch.randn(dim))
        self.dropout, self.norm = Dropout(dropout), nn.LayerNorm(dim)
        self.register_buffer("kernel_NS", low_pass(components, longest), persistent=False)

    def forward(self, x_BSD: Tensor, length_B: Tensor, last: bool) -> Tensor:
        """All clicks, or the last alone [B, 1, D]."""
        position_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        query_BR = (length_B - 1)[:, None] if last else position_S.expand(len(x_BSD), -1)
        kernel_BS = self.kernel_NS[length_B, :len(position_S)]
        distance_BRS = (query_BR[:, :, None] - position_S).abs()
        low_pass_BRS = kernel_BS[:, None].expand(-1, query_BR.shape[1], -1).gather(2, distance_BRS)
        low_BRD = (low_pass_BRS * (position_S < length_B[:, None])[:, None]) @ x_BSD
        x_BRD = at(x_BSD, length_B - 1)[:, None] if last else x_BSD
        return self.norm(x_BRD + self.dropout(low_BRD + self.root_D.square() * (x_BRD - low_BRD)))


def low_pass(components: int, longest: int) -> Tensor:
    """What clicks so many places away contribute to the lowest Fourier components of a session: [longest + 1, longest],
    by the session's length and the places between.

    Transform, cut and inverse are one circulant matrix: sum_f w_f cos(2 pi f d / n) / n over f < `components`, where
    w_f counts f and its mirror image n - f.
    """
    length_N11 = torch.arange(longest + 1, dtype=torch.double)[:, None, None].clamp(min=1)
    distance_S1, f = torch.arange(longest, dtype=torch.double)[:, None], torch.arange(components, dtype=torch.double)
    weight_N1F = (2.0 - (f == 0).double() - (2 * f == length_N11).double()) * (2 * f <= length_N11)
    return ((2 * torch.pi * f * distance_S1 / length_N11).cos() * weight_N1F / length_N11).sum(2).float()


class Block(AttentionBlock):
    """A block of SASRec whose self-attention is mixed with the frequency rescaler."""

    def __init__(self, dim: int, settings: Settings, dropout: float) -> None:
        super().__init__(dim, settings.heads, dropout, causal=True, attention_dropout=dropout, activation=nn.GELU)
        self.alpha = settings.alpha
        self.rescaler = FrequencyRescaler(dim, settings.c // 2 + 1, settings.max_session, dropout)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, last_B: Tensor | None = None) -> Tensor:
        rescaled = self.rescaler(x_BSD, mask_BS.sum(1), last_B is not None)
        return self.fed(self.alpha * rescaled + (1 - self.alpha) * self.attended(x_BSD, mask_BS, last_B))


class Bsarec(BlockEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]."""

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim, dropout, settings.max_session,
                         (Block(dim, settings, dropout) for _ in range(settings.layers)))

    def draw(self, layer: nn.Module) -> None:
        """The authors' initial values: as SASRec, and N(0, 1) for the roots of beta."""
        super().draw(layer)
        if isinstance(layer, FrequencyRescaler):
            nn.init.normal_(layer.root_D)
