"""The tiny model through either stage, in one process or in several."""
from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from tiny import linear_prior, llmgr, prefixes
from tiny_stages import align, behave, settings

from llmgr.training.engine import fit

STRATEGIES = ["ddp", "zero2", "zero3"]
CASES: dict[str, dict[str, Any]] = {  # an epoch's last micro-batch is one prompt: none is left for the second process
    "align": {"batch_size": 11, "output": "linear", "accumulate": 2},
    "prefix": {"batch_size": 16, "targets": "prefix", "accumulate": 2, "train_encoder": "none"},
    "positions": {"batch_size": 4, "recompute": True},
    "linear": {"batch_size": 4, "linear": True},
    "positions-bf16": {"batch_size": 4, "recompute": True, "dtype": torch.bfloat16},
}


def trained(case: str, resume: Path, strategy: str = "ddp", stop: int = 0, divided: bool = False, **changes: Any
            ) -> dict[str, Any]:
    """A tiny model through one of the stages: curve and weights.

    It is left before loss number `stop`, if that is given; `divided` micro-batches are what two processes make of them.
    """

    chosen = {"epochs": 3, "weight_decay": 0.01, "clip": 0.5, **CASES[case], **changes}
    dtype = chosen.pop("dtype", torch.float32)
    model = llmgr("llama", dropout=chosen.pop("dropout", 0.0), output=chosen.pop("output", "items"))
    for parameter in model.language_model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.execution.prepare(types.SimpleNamespace(gradient_checkpointing=chosen.pop("recompute", False)),
                  types.SimpleNamespace(compile=False, strategy=strategy), torch.device("cpu"))
    if case.startswith("align"):
        job = align(model, **chosen)
    else:
        model.unfreeze_encoder(chosen.pop("train_encoder", "all"))
        train = prefixes()
        prior = linear_prior(train) if chosen.pop("linear", False) else None
        job = behave(model, train, titles=True, prior=prior, **chosen)
    (job if case.startswith("align") else job.model).dtype = dtype
    if divided:
        steps = job.steps
        job.steps = lambda *given: [[m[n::2] for m in micros for n in (0, 1) if len(m) > n] for micros in steps(*given)]
    if stop:
        loss, calls = job.loss, iter(range(stop))
        job.loss = lambda micro: loss(micro) if next(calls, None) is not None else interrupt()
    try:
        progress = fit(job, settings(**chosen), seed=5, resume=resume, name="tune", strategy=strategy)
    except InterruptedError:
        return {}
    return {"steps": [row["loss"] for row in progress.step_rows], "epochs": progress.epoch_rows,
            "samples": progress.samples, "tokens": progress.tokens,
            "weights": {k: p.detach().clone() for k, p in job.model.named_parameters()}}


def interrupt() -> None:
    raise InterruptedError


def resumed(strategy: str) -> list[dict[str, Any]]:
    """With dropout: undisturbed, and cut in two; the folder `half-STRATEGY-0.0` keeps a checkpoint without."""
    for dropout in (0.2, 0.0):
        half = Path(f"half-{strategy}-{dropout}")
        trained("positions", half, strategy, dropout=dropout, stop=4, checkpoint_seconds=0)
        if dropout:
            found = [trained("positions", folder, strategy, dropout=dropout)
                     for folder in (Path(f"whole-{strategy}"), half)]
    return found
