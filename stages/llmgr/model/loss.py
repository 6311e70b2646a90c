"""The loss of both stages: softmax cross-entropy over all items, with weighted targets and smoothing by text.

Shapes: N neighbours of an item.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmgr.encoders.layers import cross_entropy, item_cross_entropy

if TYPE_CHECKING:
    from llmgr.model.outputs import Factors


@dataclass(frozen=True)
class TextSmoothing:
    """Label smoothing by text: `share` of a target's weight goes to its N nearest items, in proportion to `weight_VN`.

    The smoothed cross-entropy is the plain one plus `share` times the target's lead: its logit less the weighted mean
    of its neighbours' logits.
    """

    share: float
    nearest_VN: Tensor
    weight_VN: Tensor

    def to(self, device: torch.device) -> TextSmoothing:
        """The same smoothing on another device."""
        return TextSmoothing(self.share, self.nearest_VN.to(device), self.weight_VN.to(device))

    def lead(self, scores_RV: Tensor, target_R: Tensor) -> Tensor:
        """The leads [R] of the targets."""
        mean_R = (self.weight_VN[target_R] * scores_RV.gather(1, self.nearest_VN[target_R])).sum(1)
        return scores_RV.gather(1, target_R[:, None])[:, 0] - mean_R

    def summed_lead(self, factors: Factors, target_R: Tensor) -> Tensor:
        """The sum of the leads, without forming the logits."""
        query_RK, table_VK, bias_V = factors
        nearest_RN, weight_RN = self.nearest_VN[target_R], self.weight_VN[target_R]
        mean_RK = (weight_RN[:, None] @ table_VK[nearest_RN])[:, 0]
        total = (query_RK * (table_VK[target_R] - mean_RK)).sum()
        return total if bias_V is None else total + (bias_V[target_R] - (weight_RN * bias_V[nearest_RN]).sum(1)).sum()


def summed_cross_entropy(factors: Factors, target_R: Tensor, offset_RV: Tensor | None = None,
                         weight_R: Tensor | None = None, smoothing: TextSmoothing | None = None) -> Tensor:
    """Summed cross-entropy of the targets [R] over all items.

    The logits are those of the factors plus `offset_RV`; a target counts `weight_R` times. Without offset and weights
    the logits of all rows are never in memory at once.
    """
    if offset_RV is None and weight_R is None:
        total = item_cross_entropy(factors.query_RK, factors.table_VK, target_R, factors.bias_V)
        return total if smoothing is None else total + smoothing.share * smoothing.summed_lead(factors, target_R)
    scores_RV = factors.logits() if offset_RV is None else factors.logits() + offset_RV
    loss_R = cross_entropy(scores_RV, target_R, reduction="none")
    if smoothing is not None:
        loss_R = loss_R + smoothing.share * smoothing.lead(scores_RV, target_R)
    return (loss_R if weight_R is None else loss_R * weight_R).sum()
