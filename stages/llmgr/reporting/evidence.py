"""What a report is made of: metrics, curves, ablations and seeds, read from reports/."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from llmgr.reporting.buckets import order
from llmgr.runtime.artifacts import read_json


def left_behind(reports: Path) -> set[Path]:
    """Files of encoders that are not evaluated: what earlier, longer lists under encoder left there."""
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
    """All that the report shows, from `reports/`: metrics, facts by stage, costs, and curves as frames.

    UserError where what the bucket stage writes is missing; everything else may be absent.
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
    """What stages/ablations.py collected, if it belongs to these results: LLMGR's own figures tell."""
    found = read_json(path) if path.exists() else {}
    same = main and found.get(MAIN) and all(
        main[convention][bucket] == figures for convention, by in found[MAIN]["figures"].items()
        for bucket, figures in by.items())
    return found if same else {}


def own_seeds(path: Path, buckets: Mapping) -> dict[str, Any]:
    """What stages/seeds.py collected at several seeds, if these results are one of them."""
    whole = read_json(path) if path.exists() else {}
    found = whole.get("figures", {})
    same = any(by.keys() and all(
        buckets.get(model, {}).get(convention, {}).get(bucket) == figures
        for model, conventions in by.items() for convention, inner in conventions.items()
        for bucket, figures in inner.items()) for by in found.values())
    return whole if same and len(found) > 1 else {}


def read_curves(paths: set[Path], order: Mapping) -> dict[str, pl.DataFrame]:
    place = {name: number for number, name in enumerate(order)}
    found = {path.stem.rpartition("_")[0]: path for path in paths}
    frames = {name: pl.read_csv(found[name], infer_schema_length=None)
              for name in sorted(found, key=lambda name: (place.get(name, len(place)), name))}
    return {name: frame for name, frame in frames.items() if frame.height}


def arranged(found: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """The evidence with gates behind the models that they fuse; LLMGR and `bucket.ours` stay last."""
    def place(model: str) -> tuple[bool, ...]:
        return model == params.bucket.ours, model == MAIN, model in params.gate.fuse

    return {**found, **{kind: {model: found[kind][model] for model in sorted(found[kind], key=place)}
                        for kind in REQUIRED}}
