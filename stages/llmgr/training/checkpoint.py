"""Checkpoints of a run: written whole, read back onto any number of processes."""
from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmgr.runtime.artifacts import sweep, write_bytes
from llmgr.runtime.console import say
from llmgr.runtime.errors import out_of_memory
from llmgr.training.distributed import gathered, rank, size
from llmgr.training.job import Job, Progress


def save_checkpoint(path: Path, progress: Progress, workers: Any, best: dict[str, Tensor], machine: str) -> None:
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    state = {"progress": vars(progress), **workers.state(), "best": best, "random": gathered(random),
             "machine": machine}
    if rank() == 0:
        buffer = io.BytesIO()  # written by Python, whose errors say when a disk is full; those of torch.save do not
        torch.save(state, buffer)
        write_bytes(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint, if there is one; a damaged one is removed."""
    sweep(path.parent)
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())  # read by Python, so that no failure of the disk counts as damage
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        say(f"{path} is damaged and was removed: the training starts anew")
        path.unlink()
        return None


def resumed(state: dict[str, Any], workers: Any, machine: str) -> tuple[Progress, dict[str, Tensor]]:
    workers.load(state["optimizer"])
    progress = Progress(**state["progress"])
    other = ""
    if state["machine"] != machine:
        other = f" ({state['machine']} before, {machine} now: not the bytes of an undisturbed run)"
    if len(state["random"]) == size():
        cpu, *cuda = state["random"][rank()]
        torch.set_rng_state(cpu)
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda[0])
    say(f"resuming at step {progress.step}, epoch {progress.epoch}{other}")
    return progress, state["best"]


def machine_of(workers: Any, job: Job) -> str:
    """What decides the order of sums and the arithmetic, hence rounding."""
    place = next(job.model.parameters()).device.type
    dtype = str(getattr(job, "dtype", torch.float32)).removeprefix("torch.")
    compiled = any(module._compiled_call_impl for module in job.model.modules())
    return (f"{size()} {workers.name} processes of {torch.get_num_threads()} threads, {dtype} on {place}"
            + (", compiled" if compiled else ""))
