"""The contents of the MLflow runs of an experiment and of its models: metrics, curves, tables, times, description.

Metrics are called `test.cold/ndcg_at_20`: MLflow's pages put what stands before the slash over a section of its own, so
that all, cold and warm targets, both conventions, costs and every curve have theirs.
"""
from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmgr.params.names import HEADLINE, STAGES
from llmgr.params.schema import Params
from llmgr.reporting.cost import parameters, ranking_seconds, training_parts, training_seconds
from llmgr.reporting.evidence import MAIN
from llmgr.reporting.naming import describe
from llmgr.reporting.summary import main_models
from llmgr.reporting.verdicts import sentence, verdicts
from llmgr.runtime.artifacts import read_json

BUCKETS = ("all", "cold", "warm")
COLUMNS = ("test.all/hr_at_20", "test.all/ndcg_at_20", "test.all/mrr_at_20", "test.cold/hr_at_20", "test.warm/hr_at_20",
           "test_unseen.all/hr_at_20", "test_unseen.all/ndcg_at_20", "valid.all/ndcg_at_20", "cost/minutes",
           "cost/peak_memory_mb")  # that a list of runs shows
POINTS = 1000  # of a curve; the whole of it is among the artifacts
UNDRAWN = ("step", "epoch", "lr", "train_loss")  # columns of curves that are in the artifacts alone


def model_metrics(evidence: Mapping[str, Any], params: Params, model: str) -> dict[str, float]:
    """A model's figures at cutoff 20 by their MLflow names, the same for every model, and what it cost."""
    values: dict[str, float] = {}
    for split, by in evidence["buckets"][model].items():
        for bucket in BUCKETS:
            values |= {f"{split}.{bucket}/{metric}": by[bucket][metric] for metric in HEADLINE
                       if metric in by.get(bucket, {})}
    valid = _validation(evidence, params, model)
    values |= {f"valid.all/{metric}": valid[metric] for metric in HEADLINE if metric in valid}
    cost_of = evidence["cost"]
    costs = [cost_of[part] for part in training_parts(evidence, params).get(model, ()) if part in cost_of]
    last = cost_of.get("tune" if model == MAIN else model, {})
    spent = {"minutes": training_seconds(evidence, params).get(model, 0.0) / 60 if costs else None,
             "peak_memory_mb": max((cost["peak_memory_mb"] for cost in costs), default=None),
             "parameters": parameters(evidence).get(model), "trainable_parameters": last.get("trainable_parameters"),
             "samples_per_second": last.get("samples_per_second"), "tokens_per_second": last.get("tokens_per_second"),
             "ranking_seconds": ranking_seconds(evidence, params).get(model)}
    values |= {f"cost/{name}": float(value) for name, value in spent.items() if value is not None}
    return {legal(name): value for name, value in values.items()}


def _validation(evidence: Mapping[str, Any], params: Params, model: str) -> Mapping[str, float]:
    """Validation figures; a gate's are cross-fitted, since it was fitted on validation sessions."""
    if model in params.gate.fuse:
        return evidence["facts"].get("gate", {}).get(model, {}).get("valid", {})
    return evidence["evaluate"].get(model, {}).get("valid", {}).get("all", {})


def experiment_metrics(evidence: Mapping[str, Any], params: Params) -> dict[str, float]:
    """LLMGR's metrics, and by how much it is above the main baselines with p (Holm), and sessions by bucket."""
    ours = params.bucket.ours
    if ours not in evidence["buckets"]:
        return {}
    values = model_metrics(evidence, params, ours)
    for other in main_models(evidence, params):
        gap = evidence["differences"].get(other, {}).get("test", {}).get("all", {}).get("ndcg_at_20")
        if gap:
            values |= {legal(f"above.{other}/ndcg_at_20"): gap["difference"], legal(f"above.{other}/p"): gap["p_holm"]}
    values |= {f"sessions/{bucket}": float(evidence["buckets"][ours]["test"][bucket]["n"]) for bucket in BUCKETS
               if bucket in evidence["buckets"][ours]["test"]}
    return values


def curves(paths: Iterable[Path], name: str | None = None) -> Iterator[tuple[str, float, int]]:
    """(name, value, step) of every curve, at most `POINTS` of each: `curve.tune/loss`, `curve.tune/valid_ndcg_at_20`.

    With `name` the part is called so: a model's own run has `curve.training/...`, whichever model it is.
    """
    for path in sorted(paths):
        part = name or path.stem.removesuffix("_steps").removesuffix("_epochs")
        with path.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        every = -(-len(rows) // POINTS)
        for row in rows[::-1][::every][::-1] if rows else []:  # the last point stays
            for column, value in row.items():
                if value and not column.endswith(("_at_5", "_at_10")) and column not in UNDRAWN:
                    yield legal(f"curve.{part}/{column}"), float(value), int(float(row["step"]))


def own_curves(reports: Path, part: str) -> list[Path]:
    """The curve files of one trained part."""
    return [path for kind in ("steps", "epochs") if (path := reports / f"curves/{part}_{kind}.csv").exists()]


def stage_curves(reports: Path) -> list[Path]:
    """The curve files of LLMGR's own stages; an encoder's are in its own run."""
    return [path for stage in STAGES for path in own_curves(reports, stage)]


def tables(evidence: Mapping[str, Any]) -> dict[str, dict[str, list]]:
    """Full tables by name, a list a column: every figure with its interval, every difference, every cost."""
    figures = [(model, split, bucket, by["n"], metric, value,
                *evidence["intervals"].get(model, {}).get(split, {}).get(bucket, {}).get(metric, (None, None)))
               for model, splits in evidence["buckets"].items() for split, buckets in splits.items()
               for bucket, by in buckets.items() for metric, value in by.items() if metric != "n"]
    gaps = [(model, split, bucket, metric, gap["difference"], gap["low"], gap["high"], gap["p"], gap["p_holm"])
            for model, splits in evidence["differences"].items() for split, buckets in splits.items()
            for bucket, by in buckets.items() for metric, gap in by.items()]
    columns = ("seconds", "samples_per_second", "tokens_per_second", "peak_memory_mb", "trainable_parameters",
               "total_parameters", "hardware")
    costs = [(part, *(cost.get(column) for column in columns)) for part, cost in evidence["cost"].items()]
    made = {"metrics": (("model", "split", "bucket", "n", "metric", "value", "low", "high"), figures),
            "differences": (("against", "split", "bucket", "metric", "difference", "low", "high", "p", "p_holm"), gaps),
            "cost": (("part", *columns), costs)}
    return {name: {head: list(column) for head, column in zip(heads, zip(*rows))}
            for name, (heads, rows) in made.items() if rows}


def times(reports: Path, parts: Iterable[str] | None = None) -> tuple[int, int]:
    """Start and end of the work in milliseconds: its end by the files' age, its start by what the parts took.

    The parts are those that trained a model, by default all; a part that DVC took from another experiment counts with
    what it took there, so that the duration is what these results cost from the start.
    """
    files = [path for path in (reports / "metrics/cost").glob("*.json") if parts is None or path.stem in parts]
    seconds = sum(read_json(path).get("seconds") or 0.0 for path in files)
    ends = [path.stat().st_mtime for path in files or (reports / "metrics").glob("*.json")]
    end = int(max(ends) * 1000)
    return end - int(seconds * 1000), end


def note(evidence: Mapping[str, Any], params: Params, page: str) -> str:
    """The description on a run's page: what came out, in one sentence and a table, and the way to the report."""
    said = verdicts(evidence, params)
    rows = [f"| {model} | {describe(model, params)} | " + " | ".join(
        f"{evidence['buckets'][model]['test']['all'][metric]:.4f}" for metric in HEADLINE) + " |"
        for model in main_models(evidence, params)]
    return "\n".join([
        sentence(said, params.bucket.ours) or "LLMGR was not evaluated.", "",
        "| model | what it is | HR@20 | NDCG@20 | MRR@20 |", "|---|---|---|---|---|", *rows, "",
        f"[The report, with every figure]({page})"])


def legal(name: str) -> str:
    """`name` with what MLflow refuses in a name replaced."""
    return re.sub(r"[^\w\-./: ]", "_", name)
