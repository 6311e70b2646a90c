"""Scores of several scorers summed with weights that depend on how often the candidate item was trained on.

z_j = sum_m w[m, band(j)] s_m,j + b[band(j)], where band(j) is the band of item j's training interactions. The gate
fuses finished models this way, and the prior sums what LLMGR's logits start from. Softmax cross-entropy of such a sum
is convex in w and b, and one optimiser fits both.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")

ROUNDS = 100


def banded_sum(scores_M: Sequence[Tensor], weight_MN: Sequence[Tensor], bias_N: Tensor, band: Tensor) -> Tensor:
    """The sum, float32 of the scores' shape: M scorers' scores, each weighted by the band of its candidate.

    `band` has the candidates' bands, in a shape that broadcasts to that of the scores: [V+1] for scores [B, V+1].
    """
    total = bias_N[band]
    for scores, weight_N in zip(scores_M, weight_MN):
        total = torch.addcmul(total, scores.float(), weight_N[band])
    return total


def fit(parameters: Sequence[Tensor], losses: Callable[[Part], Tensor], parts: Sequence[Part],
        tolerance: float = 1e-7) -> None:
    """Move the parameters, in place, to the lowest mean loss: L-BFGS with a line search (Liu & Nocedal 1989).

    `losses` gives the loss of every session of one of `parts`; no more than one part's scores are held at a time. The
    fit ends where no number of the gradient exceeds `tolerance`, where the loss no longer falls, or after ROUNDS.
    """
    optimizer = torch.optim.LBFGS(parameters, max_iter=ROUNDS, tolerance_grad=tolerance, line_search_fn="strong_wolfe")

    def mean_loss() -> float:
        optimizer.zero_grad()
        total, sessions = 0.0, 0
        for part in parts:
            loss = losses(part).double()
            loss.sum().backward()
            total, sessions = total + loss.detach().sum(), sessions + len(loss)
        for parameter in parameters:
            parameter.grad /= sessions
        return float(total) / sessions

    optimizer.step(mean_loss)
    optimizer.zero_grad()
