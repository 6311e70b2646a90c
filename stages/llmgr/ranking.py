"""Full-ranking metrics: the rank of a target among all items, HR, NDCG and MRR of ranks, bootstrap intervals and tests.

A rank is 1 + the number of other items that score at least as much as the target: ties count against the model, so a
constant scorer earns nothing (Krichene & Rendle, KDD 2020, on why ranking is over all items and never over samples).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from llmgr.errors import UserError

if TYPE_CHECKING:
    import torch

CUTOFFS = (5, 10, 20)
CHUNK = 64  # resamples held in memory at a time
COVERAGE = (2.5, 97.5)
ROUNDING = 1e-12  # a resampled difference below it is 0


def ranks(scores_BV: torch.Tensor, targets_B: torch.Tensor, exclude: torch.Tensor | None = None) -> torch.Tensor:
    """Rank of every target, int64 of shape (B,), 1 is best.

    Column 0 of the scores is padding and never counts. `exclude` holds item ids, (B, any width) padded with 0, that
    leave the ranking; a target among them stays. UserError where a score is not a number.
    """
    if exclude is not None:
        return ranks_both(scores_BV, targets_B, exclude)[1]
    kept_B, _ = _kept(scores_BV, targets_B)
    return kept_B


def ranks_both(
    scores_BV: torch.Tensor, targets_B: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks with the seen items kept, and with them excluded, from one pass over the scores; see `ranks`.

    `seen` holds item ids, (B, any width), padded with 0, in any order and with repetitions.
    """
    kept_B, own_B1 = _kept(scores_BV, targets_B)
    seen = seen.sort(dim=1).values
    counts = (seen > 0) & (seen != targets_B[:, None])
    counts[:, 1:] &= seen[:, 1:] != seen[:, :-1]
    above = scores_BV.gather(1, seen) >= own_B1
    return kept_B, kept_B - (above & counts).sum(1)


def _kept(scores_BV: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    items = scores_BV[:, 1:]
    if items.numel() and bool(items.amax().isnan()):  # a maximum passes NaN on
        raise UserError("scores are not a number: the model diverged; lower its learning rate (the encoder's own lr, a "
                        "control's encoder.text_lr, align.lr, tower.lr or tune.lr) or set its precision to fp32")
    if bool((targets_B < 1).any()):
        raise ValueError("a target is 0, which is padding")
    own_B1 = scores_BV.gather(1, targets_B[:, None])
    counts_B = (items >= own_B1).view(torch.uint8).sum(1, dtype=torch.int32)  # bytes add up thrice as fast as bools
    return counts_B.long(), own_B1  # the target counts itself, which is the 1 of the rank


def names(cutoffs: Sequence[int] = CUTOFFS) -> list[str]:
    """Metric names in their fixed order: `hr_at_5`, ..., `mrr_at_20`."""
    return [f"{kind}_at_{k}" for kind in ("hr", "ndcg", "mrr") for k in cutoffs]


def gains(ranks: Any, cutoffs: Sequence[int] = CUTOFFS) -> np.ndarray:
    """What every session adds to every metric: (sessions, metrics), columns as `names`.

    With one relevant item: HR@k = [r <= k], NDCG@k = [r <= k] / log2(r + 1), MRR@k = [r <= k] / r.
    """
    rank = np.asarray(ranks, dtype=np.float64)
    inside = rank[:, None] <= np.asarray(cutoffs)
    return np.concatenate([inside * gain[:, None] for gain in (np.ones_like(rank), 1 / np.log2(rank + 1), 1 / rank)], 1)


def metrics(ranks: Any, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """HR, NDCG and MRR at the cutoffs over at least one session's rank."""
    return dict(zip(names(cutoffs), gains(ranks, cutoffs).mean(0).tolist()))


def bootstrap(ranks: Mapping[str, Any], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Metrics of every model on the same `resamples` draws of sessions with replacement: (resamples, metrics) each.

    `ranks` maps a model to its ranks, all of the same sessions in the same order.
    """
    return resampled_means({model: gains(rank) for model, rank in ranks.items()}, resamples, seed)


def resampled_means(tables: Mapping[Any, np.ndarray], resamples: int, seed: int) -> dict[Any, np.ndarray]:
    """`bootstrap` of what every session adds to every metric: tables (sessions, metrics) as `gains` makes them."""
    table = np.concatenate(list(tables.values()), 1)
    sessions = len(table)
    hit = np.flatnonzero(table.any(1))  # the other sessions add nothing to any metric
    table = table[hit]
    random = np.random.default_rng(seed)
    means = np.empty((resamples, table.shape[1]))
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        drawn = random.integers(sessions, size=(size, sessions), dtype=np.int32)
        weights = np.stack([np.bincount(row, minlength=sessions)[hit] for row in drawn])
        with threadpool_limits(1):  # the last bits do not hang on the thread count, nor the time on a busy machine
            means[start:start + size] = weights.astype(np.float64) @ table / sessions
    return dict(zip(tables, np.split(means, len(tables), 1)))


def intervals(resampled: np.ndarray) -> dict[str, list[float]]:
    """95% percentile intervals [low, high] of every metric, from one model's `bootstrap`."""
    low, high = np.percentile(resampled, COVERAGE, axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(names(), low, high)}


def paired(
    ours: Mapping[str, float], theirs: Mapping[str, float], our_resamples: np.ndarray, their_resamples: np.ndarray
) -> dict[str, dict[str, float]]:
    """Difference of two models' metrics with its 95% interval and p, from the same resamples of the same sessions.

    The paired interval is narrower than two separate ones, because easy sessions are easy for both. `relative` is the
    difference as a share of the other model's figure, left out where that is 0.
    """
    resampled = our_resamples - their_resamples
    bounds = intervals(resampled)
    result = {}
    for (name, (low, high)), p in zip(bounds.items(), p_values(resampled).tolist()):
        difference = ours[name] - theirs[name]
        result[name] = {"difference": difference, "low": low, "high": high, "p": p}
        if theirs[name] > 0:
            result[name]["relative"] = difference / theirs[name]
    return result


def p_values(differences: np.ndarray) -> np.ndarray:
    """Two-sided bootstrap p of every column of resampled differences (resamples, metrics): are they 0?

    Twice the share of resamples on the rarer side of 0, which is the level at which the percentile interval just
    reaches 0 (Efron & Tibshirani 1993, ch. 15); those at 0 are on both sides; one is added to count and total (Davison
    & Hinkley 1997, ch. 4), so that no p falls below `least_p`.
    """
    count = np.minimum((differences < ROUNDING).sum(0), (differences > -ROUNDING).sum(0))
    return np.minimum(1.0, 2 * (1 + count) / (1 + len(differences)))


def least_p(resamples: int) -> float:
    """The smallest p that so many resamples can show; the true one may be anything below it."""
    return 2 / (1 + resamples)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p values (Scand. J. Statist. 1979), in their order.

    The i-th smallest of m is multiplied by m - i + 1, and none falls below a smaller one's. Rejecting below 0.05 errs
    on any of the m hypotheses with a probability of at most 0.05, however they depend on each other.
    """
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0).tolist()
