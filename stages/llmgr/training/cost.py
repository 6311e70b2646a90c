"""The cost of a run: seconds, rates, peak memory, parameters, hardware."""
from __future__ import annotations

import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmgr.training.distributed import size
from llmgr.training.job import Progress


def cost(progress: Progress, model: nn.Module, prepared: float = 0.0) -> dict[str, Any]:
    """The cost file of a training.

    `seconds` includes validation and the `prepared` seconds before the training; rates are per second of training time;
    memory is that of one process, in MB.
    """
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    busy = max(progress.training_seconds, 1e-9)
    return {"seconds": prepared + progress.seconds, **({"prepared_seconds": prepared} if prepared else {}),
            "training_seconds": progress.training_seconds,
            "samples_per_second": progress.samples / busy,
            "tokens_per_second": progress.tokens / busy if progress.tokens else None,
            "peak_memory_mb": peak_memory_mb(), "trainable_parameters": sum(n for n, on in counts if on),
            "total_parameters": sum(n for n, _ in counts), "hardware": hardware()}


def peak_memory_mb() -> float:
    """Peak memory in MB: of the GPU where one is used, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def hardware() -> str:
    """The machine in words, without its name."""
    several = f"{size()} processes, " if size() > 1 else ""
    if torch.cuda.is_available():
        return several + torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    return f"{several}{torch.get_num_threads()} CPU threads, {model}"


def scoring_cost(start: float, seconds: dict[str, float], scored: int, parameters: int = 0) -> dict[str, Any]:
    """The cost file, with the keys of `cost`, of a stage that only scores.

    `start` is the value of time.monotonic() when it began, `seconds` the time of each model, `scored` the number of
    sessions scored by all models together.
    """
    total = time.monotonic() - start
    return {"seconds": total, "seconds_by_model": seconds, "samples_per_second": scored / total,
            "tokens_per_second": None, "peak_memory_mb": peak_memory_mb(), "trainable_parameters": parameters,
            "total_parameters": parameters, "hardware": hardware()}
