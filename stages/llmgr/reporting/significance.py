"""Bootstrap intervals, paired tests and Holm's correction over sessions."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from llmgr.ranking.metrics import gains, names

CHUNK = 64  # resamples held in memory at a time
COVERAGE = (2.5, 97.5)
ROUNDING = 1e-12  # a resampled difference below it is 0


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
