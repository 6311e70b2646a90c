"""What training and ranking cost, model by model, with everything that a model needs."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmgr.params.derived import base_scores
from llmgr.params.names import PRIOR, SERVED, TOWER
from llmgr.reporting.evidence import MAIN


def parameters(found: Mapping[str, Any]) -> dict[str, float]:
    """Parameters by model, frozen ones included; models without training have none."""
    costs = {MAIN if part == "tune" else part: cost for part, cost in found["cost"].items()}
    return {model: costs[model]["total_parameters"] for model in found["buckets"] if model in costs}


def training_parts(found: Mapping[str, Any], params: Any) -> dict[str, set[str]]:
    """The parts (cost files) that each model needs: a control its text vectors, LLMGR its base and stages, a gate what
    it fuses. `start` stands for what stage 2 prepares of `prior`."""
    needs = {model: [model, *(["backbone"] if "-" in model else [])] for model in found["buckets"]
             if model in found["cost"]}
    tower = [TOWER, "backbone"] if params.tower.enabled else []
    if TOWER in found["buckets"]:
        needs[TOWER] = tower
    if MAIN in found["buckets"]:
        needs[MAIN] = [*needs.get(params.model.base, []), "backbone", "folds", *tower, "align", "tune"]
    if PRIOR in found["buckets"]:
        needs[PRIOR] = ["start", *(needs.get(params.model.base, []) if base_scores(params) else []), "folds", *tower]
    if SERVED in found["buckets"]:
        needs[SERVED] = [*needs.get(MAIN, []), "package"]
    for gate, fused in params.gate.fuse.items():
        if gate in found["buckets"]:
            needs[gate] = ["backbone"] * ("text-knn" in fused) + [p for name in fused for p in needs.get(name, ())]
    return {model: set(parts) for model, parts in needs.items()}


def training_seconds(found: Mapping[str, Any], params: Any) -> dict[str, float]:
    """Training time by model, with everything that it needs, and a gate's own fit."""
    took = {name: cost["seconds"] for name, cost in found["cost"].items()}
    took["start"] = found["cost"].get("tune", {}).get("prepared_seconds", 0.0)
    fits = found["cost"].get("gate", {}).get("seconds_by_model", {})
    return {model: sum(took.get(part, 0.0) for part in sorted(parts)) + fits.get(model, 0.0) * (
        model in params.gate.fuse) for model, parts in training_parts(found, params).items()}


def ranking_seconds(found: Mapping[str, Any], params: Any) -> dict[str, float]:
    """Time to rank all validation and test sessions by model; a gate's has that of the models that it fuses."""
    took = found["cost"].get("evaluate", {}).get("seconds_by_model", {})
    return {model: own + sum(took.get(part, 0.0) for part in params.gate.fuse.get(model, ()))
            for model, own in took.items()}
