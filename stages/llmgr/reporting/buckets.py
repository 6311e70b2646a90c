"""Metrics by how cold the target item is, with bootstrap intervals and paired tests between models."""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from llmgr.params.evaluation import Bucket
from llmgr.params.names import BASELINES, PRIOR, SERVED
from llmgr.ranking import metrics
from llmgr.reporting import significance
from llmgr.runtime.artifacts import read_table
from llmgr.runtime.errors import UserError

LEVEL = 0.05  # a difference is called one where its corrected p is below
COMPARED = ("all", "cold", "warm")  # buckets whose paired differences are reported
COLUMNS = {"test": "rank", "test_unseen": "rank_unseen"}  # convention -> column of reports/ranks/<model>.parquet
Ranks = dict[str, dict[str, np.ndarray]]


def order(models: Sequence[str], ours: str) -> list[str]:
    """Models in the order of every table: baselines, encoders by name before their controls, prior, LLMGR, `ours`."""
    position = {name: number for number, name in enumerate(BASELINES)}
    return sorted(models, key=lambda name: (name == ours, name == "llmgr", name == SERVED, name == PRIOR,
                                            position.get(name, len(BASELINES)), name.split("-")))


def masks(counts: np.ndarray, trained: np.ndarray, tied: np.ndarray, bucket: Bucket) -> dict[str, np.ndarray]:
    """A mask over the test sessions for each bucket, from the targets' 5-core and training interactions.

    `all`; the paper's `cold` and `warm`; `count_*` by `bucket.practice`; `trained_*` by `bucket.trained`; and, where
    there are ties, `tied` and `untied`: whether the target has the timestamp of the click before it.
    """
    low, high = bucket.cold
    ties = {"tied": tied, "untied": ~tied} if tied.any() else {}
    return {
        "all": np.ones(len(counts), bool),
        "cold": (counts >= low) & (counts <= high),
        "warm": counts >= bucket.warm,
        **_bands("count", counts, bucket.practice),
        **_bands("trained", trained, bucket.trained),
        **ties,
    }


def _bands(prefix: str, values: np.ndarray, edges: Sequence[int]) -> dict[str, np.ndarray]:
    bands = {f"{prefix}_0" if edges[0] == 1 else f"{prefix}_lt{edges[0]}": values < edges[0]}
    for low, end in itertools.pairwise(edges):
        bands[f"{prefix}_{low}" + (f"_{end - 1}" if end > low + 1 else "")] = (values >= low) & (values < end)
    bands[f"{prefix}_ge{edges[-1]}"] = values >= edges[-1]
    return bands


def checked(path: str | Path, test: pl.DataFrame) -> dict[str, np.ndarray]:
    """One model's ranks by convention; UserError if the file does not belong to these test sessions."""
    frame = read_table(path)
    if not frame["target"].equals(test["target"]):
        raise UserError(f"{path} ranks other sessions than those of the test split: run `dvc repro evaluate`")
    return {convention: frame[column].to_numpy() for convention, column in COLUMNS.items()}


def measure(ranks: Ranks, masks: Mapping[str, np.ndarray], ours: str, resamples: int, seed: int
            ) -> tuple[dict, dict, dict]:
    """Metrics, 95% intervals and the paired differences of the model `ours`, by model, convention and bucket.

    Returns `{model: {convention: {bucket: {"n", metric: value}}}}`, `{model: {convention: {bucket: {metric: [low,
    high]}}}}` and `{other: {convention: {bucket: {metric: {"difference", "low", "high", "p", "relative",
    "p_holm"}}}}}`; the last is empty without `ours`. A bucket without sessions has n = 0 and nothing else. All models
    of a bucket share the same resamples. `p_holm` is corrected for the number of other models; every metric, convention
    and bucket is a family of its own.
    """
    figures, bounds, gaps = ({m: {c: {} for c in COLUMNS} for m in ranks} for _ in range(3))
    gaps = {model: gaps[model] for model in ranks if ours in ranks and model != ours}
    for bucket, mask in masks.items():
        inside = {(m, c): rank[mask] for m, by in ranks.items() for c, rank in by.items()}
        sessions = int(mask.sum())
        resampled = significance.bootstrap(inside, resamples, seed) if sessions else {}
        for (model, convention), rank in inside.items():
            figures[model][convention][bucket] = {"n": sessions} | (metrics.metrics(rank) if sessions else {})
            if sessions:
                bounds[model][convention][bucket] = significance.intervals(resampled[model, convention])
        for model, convention in resampled:
            if model in gaps and bucket in COMPARED:
                gaps[model][convention][bucket] = significance.paired(
                    figures[ours][convention][bucket], figures[model][convention][bucket],
                    resampled[ours, convention], resampled[model, convention])
        _correct([by[convention][bucket] for by in gaps.values() if bucket in by[convention]] for convention in COLUMNS)
    return figures, bounds, gaps


def pooled(ranks: Mapping[str, Ranks], ours: str, resamples: int, seed: int) -> dict[str, dict[str, dict]]:
    """Paired differences of the model `ours` over all targets, of every session's mean over the seeds of the training.

    `ranks` are those of every seed, each beside the `target` it is of; models that a seed lacks are left out. Returns
    `{other: {convention: {metric: {"difference", "low", "high", "p", "relative", "p_holm"}}}}`; sessions are resampled,
    so that an interval holds for these seeds. UserError where the seeds have other sessions.
    """
    first, *others = ranks.values()
    models = [model for model in first if all(model in by for by in others)]
    tables = {}
    for model, convention in itertools.product(models, COLUMNS):
        if not all(np.array_equal(first[model]["target"], by[model]["target"]) for by in others):
            raise UserError("the experiments at other seeds ranked other sessions: run them anew with one data section")
        tables[model, convention] = np.mean([metrics.gains(by[model][convention]) for by in ranks.values()], 0)
    if ours not in models:
        return {}
    resampled = significance.resampled_means(tables, resamples, seed)
    means = {key: dict(zip(metrics.names(), table.mean(0).tolist())) for key, table in tables.items()}
    gaps = {model: {convention: significance.paired(means[ours, convention], means[model, convention],
                                               resampled[ours, convention], resampled[model, convention])
                    for convention in COLUMNS} for model in models if model != ours}
    _correct([by[convention] for by in gaps.values()] for convention in COLUMNS)
    return gaps


def _correct(families: Iterable[list[dict]]) -> None:
    for family in families:
        for metric in metrics.names() if family else ():
            for gap, p in zip(family, significance.holm([gap[metric]["p"] for gap in family])):
                gap[metric]["p_holm"] = p


def plot_rows(figures: dict, bounds: dict) -> pl.DataFrame:
    """One row a model and bucket for `dvc plots`, seen items kept: n, HR@20 with its interval, NDCG@20, MRR@20."""
    rows = []
    for model, by in figures.items():
        for bucket, row in by["test"].items():
            low, high = bounds[model]["test"].get(bucket, {}).get("hr_at_20", (None, None))
            rows.append((model, bucket, row["n"], row.get("hr_at_20"), low, high, row.get("ndcg_at_20"),
                         row.get("mrr_at_20")))
    kinds = {"model": pl.String, "bucket": pl.String, "n": pl.Int64}
    kinds |= dict.fromkeys(("hr_at_20", "low", "high", "ndcg_at_20", "mrr_at_20"), pl.Float64)
    return pl.DataFrame(rows, kinds, orient="row").with_columns(pl.col(pl.Float64).round(6))
