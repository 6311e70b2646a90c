"""The same experiment at several seeds: how much of a difference between two models is chance in training."""
from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping

COLUMNS = [*(("test", "all", metric) for metric in ("hr_at_20", "ndcg_at_20", "mrr_at_20")),
           *(("test_unseen", "all", metric) for metric in ("hr_at_20", "ndcg_at_20")),
           ("test", "cold", "hr_at_20"), ("test", "warm", "hr_at_20")]
Figures = dict[str, dict[str, dict[str, dict[str, float]]]]  # model, convention, bucket, metric


def models(figures: Mapping[str, Figures]) -> list[str]:
    """The models that every seed has, in the first seed's order."""
    return [model for model in next(iter(figures.values()), {}) if all(model in by for by in figures.values())]


def spread(figures: Mapping[str, Figures], model: str, column: tuple[str, str, str], minus: str | None = None
           ) -> tuple[float, float, float, float] | None:
    """Mean, standard deviation, least and greatest over the seeds of a figure, or of its excess over `minus`'s.

    None where a seed lacks it; NaN is the deviation of a single seed.
    """
    values = []
    for by in figures.values():
        pair = [functools.reduce(lambda inner, key: inner.get(key, {}), (name, *column), by)
                for name in (model, minus or model)]
        if {} in pair:
            return None
        values.append(pair[0] - pair[1] if minus else pair[0])
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.fmean(values), deviation, min(values), max(values)
