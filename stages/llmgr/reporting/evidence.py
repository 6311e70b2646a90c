"""The evidence that a report shows: metrics, curves, ablations and seeds, read from the folder of reports."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from llmgr.params.schema import Params
from llmgr.reporting.buckets import order
from llmgr.runtime.artifacts import read_json


def left_behind(reports: Path) -> set[Path]:
    """Files of encoders that are not evaluated: earlier runs with more encoders left them."""
    metrics, curves = reports / "metrics", reports / "curves"
    evaluated = read_json(metrics / "buckets.json")
    gone = [path.stem for path in (metrics / "encoders").glob("*.json") if path.stem not in evaluated]
    return {path for name in gone for path in (metrics / f"encoders/{name}.json", metrics / f"cost/{name}.json",
                                               curves / f"{name}_steps.csv", curves / f"{name}_epochs.csv")}


CONVENTIONS = {"test": "Seen items kept", "test_unseen": "Seen items excluded"}
REQUIRED = ("buckets", "intervals", "differences")
MAIN = "llmgr"  # without a gate
FACTS = ("filter", "split", "backbone", "folds", "tower", "align", "tune", "gate")


def evidence(reports: Path) -> dict[str, Any]:
    """All that the report shows, from the folder `reports`: metrics, facts by stage, costs, and curves as frames.

    Only the files of the bucket stage are required: UserError where one is missing.
    """
    metrics, curves = reports / "metrics", reports / "curves"
    parts = [*FACTS, "evaluate"]
    facts = {name: read_json(metrics / f"{name}.json") for name in FACTS if (metrics / f"{name}.json").exists()}
    facts = {name: fact for name, fact in facts.items() if fact}
    ignored = left_behind(reports)
    encoders = order([path.stem for path in {*metrics.glob("encoders/*.json")} - ignored], MAIN)
    spent = {path.stem: path for path in {*metrics.glob("cost/*.json")} - ignored}
    costs = {name: read_json(spent[name]) for name in sorted(
        order(spent, MAIN), key=lambda name: name in parts and 1 + parts.index(name))}
    costs = {name: cost for name, cost in costs.items() if cost["seconds"] or cost["total_parameters"]}
    if encoders:
        facts["encoders"] = {name: read_json(metrics / f"encoders/{name}.json") for name in encoders}
    required = {name: read_json(metrics / f"{name}.json") for name in REQUIRED}
    return required | {
        "ablations": own_ablations(reports / "ablations.json", required["buckets"].get(MAIN)),
        "seeds": own_seeds(reports / "seeds.json", required["buckets"]),
        "facts": facts,
        "cost": costs,
        "steps": read_curves({*curves.glob("*_steps.csv")} - ignored, costs),
        "epochs": read_curves({*curves.glob("*_epochs.csv")} - ignored, costs),
    }


def own_ablations(path: Path, main: Mapping | None) -> dict[str, Any]:
    """The ablations that stages/ablations.py collected, if they belong to these results: LLMGR's figures must agree."""
    ablations = read_json(path) if path.exists() else {}
    same = main and ablations.get(MAIN) and all(
        main[convention][bucket] == figures for convention, by in ablations[MAIN]["figures"].items()
        for bucket, figures in by.items())
    return ablations if same else {}


def own_seeds(path: Path, buckets: Mapping) -> dict[str, Any]:
    """The results that stages/seeds.py collected at several seeds, if these results are among them."""
    whole = read_json(path) if path.exists() else {}
    by_seed = whole.get("figures", {})
    same = any(by.keys() and all(
        buckets.get(model, {}).get(convention, {}).get(bucket) == figures
        for model, conventions in by.items() for convention, inner in conventions.items()
        for bucket, figures in inner.items()) for by in by_seed.values())
    return whole if same and len(by_seed) > 1 else {}


def read_curves(paths: set[Path], order: Mapping) -> dict[str, pl.DataFrame]:
    """Curve files as frames by the trained part, in the order of `order`; empty ones are left out."""
    position = {name: number for number, name in enumerate(order)}
    files = {path.stem.rpartition("_")[0]: path for path in paths}
    frames = {name: pl.read_csv(files[name], infer_schema_length=None)
              for name in sorted(files, key=lambda name: (position.get(name, len(position)), name))}
    return {name: frame for name, frame in frames.items() if frame.height}


def arranged(evidence: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The evidence with models in the page's order: gates after the models that they fuse, then LLMGR and
    `bucket.ours`.
    """
    def last(model: str) -> tuple[bool, ...]:
        return model == params.bucket.ours, model == MAIN, model in params.gate.fuse

    return {**evidence, **{kind: {model: evidence[kind][model] for model in sorted(evidence[kind], key=last)}
                        for kind in REQUIRED}}
