"""The few figures that answer the question: LLMGR beside the main baselines, for `dvc metrics` and the page's top."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from llmgr.params.names import HEADLINE, PRIOR
from llmgr.params.schema import Params
from llmgr.reporting.cost import training_parts, training_seconds
from llmgr.reporting.evidence import MAIN

NUMBERS = 40  # of reports/metrics.json at most: one screen of `dvc metrics diff`
POINTS = 150  # of a drawn training loss
SELECTS = "ndcg_at_20"


def main_models(evidence: Mapping[str, Any], params: Params) -> list[str]:
    """The base without texts, the base with texts, the strongest late fusion without LLMGR, and LLMGR, where evaluated.

    The strongest is so on validation sessions (cross-fitted), so that no choice was made on test sessions.
    """
    base = params.model.base.partition("-")[0]
    named = [base, f"{base}-text", params.model.base, strongest_fusion(evidence, params), MAIN, params.bucket.ours]
    return [model for model in dict.fromkeys(named) if model in evidence["buckets"]]


def strongest_fusion(evidence: Mapping[str, Any], params: Params) -> str | None:
    """The gate with the highest cross-fitted validation NDCG@20 of those that fuse nothing of LLMGR."""
    fitted = evidence["facts"].get("gate", {})
    without = [gate for gate, fused in params.gate.fuse.items()
               if gate in evidence["buckets"] and not {MAIN, PRIOR} & {*fused}]
    return max(without, key=lambda gate: fitted.get(gate, {}).get("valid", {}).get(SELECTS, 0.0), default=None)


def summary(evidence: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The content of reports/metrics.json: at most `NUMBERS` figures at cutoff 20 of the `main_models`.

    `bucket.ours` has figures of all, cold and warm targets, with seen items and without (`unseen`). Each of the
    `baselines` has figures of all targets, HR@20 of cold and warm ones, and NDCG@20 without seen items. `minutes` and
    `peak_memory_mb` are the cost of training all that `bucket.ours` needs.
    """
    ours = params.bucket.ours
    content: dict[str, Any] = {}
    for model in reversed(main_models(evidence, params)):
        figures, unseen = (evidence["buckets"][model][convention] for convention in ("test", "test_unseen"))
        if model == ours:
            content[model] = {**_figures(figures), "unseen": _figures(unseen)}
        else:
            few = ("hr_at_20",)
            content.setdefault("baselines", {})[model] = {
                **_figures(figures, {"all": HEADLINE, "cold": few, "warm": few}),
                "unseen": _figures(unseen, {"all": (SELECTS,)})}
    cost_of = evidence["cost"]
    parts = [cost_of[part] for part in training_parts(evidence, params).get(ours, ()) if part in cost_of]
    if parts:
        content["minutes"] = training_seconds(evidence, params)[ours] / 60
        content["peak_memory_mb"] = max(cost["peak_memory_mb"] for cost in parts)
    return content


def _figures(by: Mapping[str, Any], columns: Mapping[str, tuple] | None = None) -> dict[str, dict[str, float]]:
    columns = columns or dict.fromkeys(("all", "cold", "warm"), HEADLINE)
    return {bucket: {metric: by[bucket][metric] for metric in metrics if metric in by[bucket]}
            for bucket, metrics in columns.items() if by.get(bucket, {}).get("n")}


def losses(steps: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Training losses for `dvc plots`: part, step and the mean of at most `POINTS` stretches of steps."""
    frames = [frame.with_columns(stretch=pl.int_range(pl.len()) * min(POINTS, frame.height) // frame.height)
              .group_by("stretch", maintain_order=True).agg(pl.col("step").last(), pl.col("loss").mean())
              .select(pl.lit(part).alias("part"), pl.col("step").cast(pl.Int64), pl.col("loss").round(5).alias("value"))
              for part, frame in steps.items()]
    return pl.concat(frames) if frames else pl.DataFrame(
        schema={"part": pl.String, "step": pl.Int64, "value": pl.Float64})


def validation(epochs: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """What chose every part's epoch, for `dvc plots`: NDCG@20, else the loss, of validation sessions or held-out items.
    """
    rows = []
    for part, frame in epochs.items():
        measured = [name for name in ("valid_ndcg_at_20", "accuracy_items", "valid_loss", "accuracy")
                    if name in frame.columns]
        if measured:
            rows += [(f"{part}: {measured[0].removeprefix('valid_')}", epoch, value)
                     for epoch, value in frame.select("epoch", measured[0]).drop_nulls().iter_rows()]
    return pl.DataFrame(rows, {"part": pl.String, "epoch": pl.Int64, "value": pl.Float64}, orient="row")
