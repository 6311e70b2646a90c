"""Scores of several scorers summed with weights that depend on how often the candidate item was trained on.

z_j = sum_m w[m, band(j)] s_m,j + b[band(j)], where band(j) is the band of item j's training interactions. The gate
fuses finished models this way, and the prior adds up its parts this way. Softmax cross-entropy of such a sum is convex
in w and b, and one optimiser fits both.

Shapes: M scorers, N bands.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")

ROUNDS = 100


def banded_sum(scores_M: Sequence[Tensor], weight_MN: Sequence[Tensor], bias_N: Tensor, band: Tensor) -> Tensor:
    """The weighted sum of M scorers' scores, float32, in the shape of the scores.

    `weight_MN` has a weight for each scorer and band, `bias_N` a bias for each band. `band` holds the band of every
    candidate and broadcasts to the scores: [V+1] for scores [B, V+1].
    """
    return weighted_sum(scores_M, [weight_N[band] for weight_N in weight_MN], bias_N[band])


def weighted_sum(scores_M: Sequence[Tensor], weight_MV: Sequence[Tensor], bias_V: Tensor) -> Tensor:
    """`banded_sum` where weights and biases are given for each candidate; they broadcast to the scores."""
    total = bias_V
    for scores, weight_V in zip(scores_M, weight_MV):
        total = torch.addcmul(total, scores.float(), weight_V)
    return total


def fit(parameters: Sequence[Tensor], losses: Callable[[Part], Tensor], parts: Sequence[Part],
        tolerance: float = 1e-7) -> None:
    """Move the parameters, in place, to the lowest mean loss: L-BFGS with a line search (Liu & Nocedal 1989).

    `losses` maps one of `parts` to the loss of each of its sessions: only one part's scores are in memory at a time.
    The fit ends when no entry of the gradient exceeds `tolerance`, when the loss no longer falls, or after ROUNDS.
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
