"""The cost of training and ranking each model, with everything that the model needs."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmgr.params.derived import base_scores
from llmgr.params.names import PRIOR, SERVED, TOWER
from llmgr.params.schema import Params
from llmgr.reporting.evidence import MAIN


def parameters(evidence: Mapping[str, Any]) -> dict[str, float]:
    """The number of parameters of each trained model, frozen ones included."""
    costs = {MAIN if part == "tune" else part: cost for part, cost in evidence["cost"].items()}
    return {model: costs[model]["total_parameters"] for model in evidence["buckets"] if model in costs}


def training_parts(evidence: Mapping[str, Any], params: Params) -> dict[str, set[str]]:
    """The trained parts (cost files) that each model needs.

    A control needs its text vectors, LLMGR its base and its stages, a gate the models that it fuses. `start` is what
    stage 2 prepares for `prior`.
    """
    needs = {model: [model, *(["backbone"] if "-" in model else [])] for model in evidence["buckets"]
             if model in evidence["cost"]}
    tower = [TOWER, "backbone"] if params.tower.enabled else []
    if TOWER in evidence["buckets"]:
        needs[TOWER] = tower
    if MAIN in evidence["buckets"]:
        needs[MAIN] = [*needs.get(params.model.base, []), "backbone", "folds", *tower, "align", "tune"]
    if PRIOR in evidence["buckets"]:
        needs[PRIOR] = ["start", *(needs.get(params.model.base, []) if base_scores(params) else []), "folds", *tower]
    if SERVED in evidence["buckets"]:
        needs[SERVED] = [*needs.get(MAIN, []), "package"]
    for gate, fused in params.gate.fuse.items():
        if gate in evidence["buckets"]:
            needs[gate] = ["backbone"] * ("text-knn" in fused) + [p for name in fused for p in needs.get(name, ())]
    return {model: set(parts) for model, parts in needs.items()}


def training_seconds(evidence: Mapping[str, Any], params: Params) -> dict[str, float]:
    """Seconds of training by model: of everything that it needs, and of a gate's own fit."""
    took = {name: cost["seconds"] for name, cost in evidence["cost"].items()}
    took["start"] = evidence["cost"].get("tune", {}).get("prepared_seconds", 0.0)
    fits = evidence["cost"].get("gate", {}).get("seconds_by_model", {})
    return {model: sum(took.get(part, 0.0) for part in sorted(parts)) + fits.get(model, 0.0) * (
        model in params.gate.fuse) for model, parts in training_parts(evidence, params).items()}


def ranking_seconds(evidence: Mapping[str, Any], params: Params) -> dict[str, float]:
    """Seconds to rank all validation and test sessions by model; a gate's include those of the models that it fuses."""
    took = evidence["cost"].get("evaluate", {}).get("seconds_by_model", {})
    return {model: own + sum(took.get(part, 0.0) for part in params.gate.fuse.get(model, ()))
            for model, own in took.items()}
