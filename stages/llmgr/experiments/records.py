"""Records: the figures of a run as long tables, small enough for git, and the tables of pages made from them.

A record is a folder under reports/results/:

    metrics.csv       seed, model, convention, bucket, metric, value, low, high   (95% interval, or empty)
    differences.csv   seed, model, convention, bucket, metric, difference, low, high, relative, p, p_holm
    run.json          facts by stage (counts, choices of pretraining) and costs
    params.yaml       the run's parameters

`model` is LLMGR's name, a baseline's, or `llmgr.ABLATION`. `convention` says whether seen items are kept in the ranking
or excluded. Differences are LLMGR's (or those of `bucket.ours`) over `model`; seed `mean` is the paired test of every
session's mean over the seeds. `sessions` counts a bucket's test sessions.
"""
from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from llmgr.runtime.artifacts import read_json, write_json, write_text
from llmgr.runtime.errors import UserError

CONVENTIONS = {"test": "kept", "test_unseen": "excluded"}
METRICS = ("hr_at_10", "ndcg_at_10", "hr_at_20", "ndcg_at_20", "mrr_at_20")
METRIC_COLUMNS = ("seed", "model", "convention", "bucket", "metric", "value", "low", "high")
DIFFERENCE_COLUMNS = ("seed", "model", "convention", "bucket", "metric", "difference", "low", "high", "relative", "p",
                      "p_holm")
MEAN = "mean"


def write(folder: Path, evidence: Mapping[str, Any], seed: int) -> None:
    """Write a run's evidence (`reporting.evidence`) as a record, but for its params.yaml."""
    write_text(folder / "metrics.csv", _csv(METRIC_COLUMNS, _metrics(evidence, seed)))
    write_text(folder / "differences.csv", _csv(DIFFERENCE_COLUMNS, _differences(evidence, seed)))
    write_json(folder / "run.json", {name: evidence[name] for name in ("facts", "cost")})


class Record:
    """The record in a folder."""

    def __init__(self, folder: Path, seed: str = "") -> None:
        """With `seed` only that seed's figures are read."""
        self.folder, self.seed = folder, seed
        if not (folder / "metrics.csv").exists():
            raise UserError(f"{folder} holds no metrics.csv: name the folder of a record")

    @cached_property
    def figures(self) -> dict[tuple[str, ...], dict[str, tuple[float, ...]]]:
        """(model, convention, bucket, metric) to seed to (value, and low and high where there are any)."""
        figures: dict[tuple[str, ...], dict[str, tuple[float, ...]]] = {}
        for seed, *key, value, low, high in _rows(self.folder / "metrics.csv"):
            if self.seed and seed != self.seed:
                continue
            figures.setdefault(tuple(key), {})[seed] = tuple(float(cell) for cell in (value, low, high) if cell)
        return figures

    @cached_property
    def differences(self) -> dict[tuple[str, ...], dict[str, float]]:
        """(seed, model, convention, bucket, metric) to difference, low, high, relative, p and p_holm."""
        return {tuple(row[:5]): {name: float(cell) for name, cell in zip(DIFFERENCE_COLUMNS[5:], row[5:]) if cell}
                for row in _rows(self.folder / "differences.csv")}

    @cached_property
    def costs(self) -> dict[str, dict[str, Any]]:
        """Part of the run (a stage, or an encoder) to its seconds, peak memory, rates and hardware."""
        return read_json(self.folder / "run.json")["cost"]

    @cached_property
    def models(self) -> list[str]:
        """The models of the run, without ablations, in the report's order."""
        return list(dict.fromkeys(model for model, *_ in self.figures if model and "." not in model))

    def by_seed(self, model: str, metric: str, bucket: str = "all", convention: str = "excluded",
                ) -> dict[str, tuple[float, ...]]:
        """Seed to (value, low, high) or (value,)."""
        key = (model, convention, bucket, metric)
        if key not in self.figures:
            raise UserError(f"{self.folder / 'metrics.csv'} has no {' '.join(key)}: mend the name, or record it")
        return self.figures[key]

    def mean(self, model: str, metric: str, bucket: str = "all", convention: str = "excluded") -> float:
        """The mean over the record's seeds."""
        return fmean(value for value, *_ in self.by_seed(model, metric, bucket, convention).values())

    def test(self, model: str, metric: str, bucket: str = "all", convention: str = "excluded") -> dict[str, float]:
        """The paired test against `model`: of the means over seeds, or of the record's one seed."""
        keys = {key[0]: key for key in self.differences if key[1:] == (model, convention, bucket, metric)}
        several = any(key[0] == MEAN for key in self.differences)
        if not keys or (several and MEAN not in keys):
            raise UserError(f"{self.folder / 'differences.csv'} has no test of {model} {metric} {bucket}")
        return self.differences[keys[MEAN] if several else min(keys.values())]


def _metrics(evidence: Mapping[str, Any], seed: int) -> Iterator[tuple]:
    for convention, short in CONVENTIONS.items():
        first = next(iter(evidence["buckets"].values()))
        for bucket, figures in first[convention].items():
            yield seed, "", short, bucket, "sessions", figures["n"]
    intervals = evidence["intervals"]
    yield from _figures(seed, evidence["buckets"], lambda *key: _nested(intervals, key))
    for other, models in (evidence["seeds"] or {"figures": {}})["figures"].items():
        if str(other) != str(seed):
            yield from _figures(other, models)
    ablations = {f"llmgr.{name}": one["figures"] for name, one in evidence["ablations"].items() if name != "llmgr"}
    yield from _figures(seed, ablations)


def _figures(seed: int | str, models: Mapping[str, Any], interval: Any = lambda *key: ()) -> Iterator[tuple]:
    for model, conventions in models.items():
        for convention, buckets in conventions.items():
            for bucket, figures in buckets.items():
                for metric in METRICS:
                    yield (seed, model, CONVENTIONS[convention], bucket, metric, figures[metric],
                           *interval(model, convention, bucket, metric))


def _nested(tree: Any, key: Sequence[str]) -> Sequence[float]:
    for part in key:
        tree = tree.get(part) or {}
    return tree or ()


def _differences(evidence: Mapping[str, Any], seed: int) -> Iterator[tuple]:
    for model, conventions in evidence["differences"].items():
        for convention, buckets in conventions.items():
            for bucket, metrics in buckets.items():
                yield from _tests(seed, model, convention, bucket, metrics)
    for model, conventions in (evidence["seeds"] or {"differences": {}})["differences"].items():
        for convention, metrics in conventions.items():
            yield from _tests(MEAN, model, convention, "all", metrics)


def _tests(seed: int | str, model: str, convention: str, bucket: str, metrics: Mapping[str, Any]) -> Iterator[tuple]:
    for metric in METRICS:
        if metric in metrics:
            yield (seed, model, CONVENTIONS[convention], bucket, metric,
                   *(metrics[metric].get(name, "") for name in DIFFERENCE_COLUMNS[5:]))


def _csv(columns: Sequence[str], rows: Iterator[tuple]) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        cells = [f"{cell:.6f}".rstrip("0").rstrip(".") if isinstance(cell, float) else cell for cell in row]
        table.writerow(cells + [""] * (len(columns) - len(cells)))
    return out.getvalue()


def _rows(path: Path) -> list[list[str]]:
    with open(path, newline="") as handle:
        return list(csv.reader(handle))[1:]
