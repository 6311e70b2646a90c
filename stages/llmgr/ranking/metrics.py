"""Full-ranking metrics: the rank of a target among all items, HR, NDCG and MRR of ranks, bootstrap intervals and tests.

A rank is 1 + the number of other items that score at least as much as the target: ties count against the model, so a
constant scorer earns nothing (Krichene & Rendle, KDD 2020, on why ranking is over all items and never over samples).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmgr.runtime.errors import Diverged

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

CUTOFFS = (5, 10, 20)


def ranks(scores_BV: torch.Tensor, targets_B: torch.Tensor, exclude: torch.Tensor | None = None) -> torch.Tensor:
    """Rank of every target, int64 [B]; 1 is best.

    Column 0 of the scores is padding and never counts. `exclude` [B, any width] holds item ids that leave the ranking,
    0 pads; the target stays even if it is among them. Diverged where a score is not a number.
    """
    if exclude is not None:
        return ranks_both(scores_BV, targets_B, exclude)[1]
    rank_B, _ = _ranks(scores_BV, targets_B)
    return rank_B


def ranks_both(
    scores_BV: torch.Tensor, targets_B: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks among all items, and without the seen items, from one pass over the scores; see `ranks`.

    `seen` [B, any width] holds item ids in any order, repetitions allowed; 0 pads.
    """
    rank_B, own_B1 = _ranks(scores_BV, targets_B)
    seen = seen.sort(dim=1).values
    counts = (seen > 0) & (seen != targets_B[:, None])
    counts[:, 1:] &= seen[:, 1:] != seen[:, :-1]
    above = scores_BV.gather(1, seen) >= own_B1
    return rank_B, rank_B - (above & counts).sum(1)


def _ranks(scores_BV: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    items = scores_BV[:, 1:]
    if items.numel() and bool(items.amax().isnan()):  # a maximum passes NaN on
        raise Diverged("scores are not a number: the model diverged; lower its learning rate (the encoder's own lr, a "
                       "control's encoder.text_lr, align.lr, tower.lr or tune.lr) or set its precision to fp32")
    if bool((targets_B < 1).any()):
        raise ValueError("a target is 0, which is padding")
    own_B1 = scores_BV.gather(1, targets_B[:, None])
    counts_B = (items >= own_B1).view(torch.uint8).sum(1, dtype=torch.int32)  # bytes add up thrice as fast as bools
    return counts_B.long(), own_B1  # the target counts itself, which is the 1 of the rank


def names(cutoffs: Sequence[int] = CUTOFFS) -> list[str]:
    """Metric names in their fixed order: `hr_at_5`, ..., `mrr_at_20`."""
    return [f"{kind}_at_{k}" for kind in ("hr", "ndcg", "mrr") for k in cutoffs]


def gains(ranks: ArrayLike, cutoffs: Sequence[int] = CUTOFFS) -> np.ndarray:
    """Each session's contribution to each metric [sessions, metrics]; the columns are `names`.

    With one relevant item: HR@k = [r <= k], NDCG@k = [r <= k] / log2(r + 1), MRR@k = [r <= k] / r.
    """
    rank = np.asarray(ranks, dtype=np.float64)
    inside = rank[:, None] <= np.asarray(cutoffs)
    return np.concatenate([inside * gain[:, None] for gain in (np.ones_like(rank), 1 / np.log2(rank + 1), 1 / rank)], 1)


def metrics(ranks: ArrayLike, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """HR, NDCG and MRR at the cutoffs, averaged over the sessions; at least one rank is needed."""
    return dict(zip(names(cutoffs), gains(ranks, cutoffs).mean(0).tolist()))
