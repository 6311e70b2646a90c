"""Checkpoints of a training: written whole, and read by any number of processes."""
from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmgr.runtime.artifacts import sweep
from llmgr.runtime.console import say
from llmgr.runtime.errors import out_of_memory
from llmgr.runtime.state import discard, read_state, states, write_state
from llmgr.training.distributed import Workers, gathered, rank, size
from llmgr.training.job import Job, Progress


def save_checkpoint(path: Path, progress: Progress, workers: Workers, best: dict[str, Tensor], machine: str, name: str
                    ) -> None:
    """Write a checkpoint from which the training `name` can resume; the one before it stays beside it."""
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    state = {"of": _identity(path, name), "progress": vars(progress), **workers.state(), "best": best,
             "random": gathered(random), "machine": machine}
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_state(path, buffer.getbuffer())


def load_checkpoint(path: Path, name: str, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
                    ) -> dict[str, Any] | None:
    """The newest intact checkpoint of the training `name` with these weights, None without one.

    A checkpoint that is damaged, or belongs to another training or other weights, is removed, and a line says so.
    """
    sweep(path.parent)
    removed = False
    for file in states(path):
        state = _read(file)
        if _fits(state, _identity(path, name), trained, optimizer):
            if removed:
                say(f"{path} is damaged and was removed: the training goes on from the checkpoint before it")
            return state
        discard(file)
        removed = True
    if removed:
        say(f"{path} is damaged and was removed: the training starts anew")
    return None


def _read(file: Path) -> Any:
    content = read_state(file)
    try:
        return None if content is None else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        return None


def _identity(path: Path, name: str) -> str:
    """The training that a checkpoint belongs to: its name, and its folders below `.resume` where it lies there."""
    folders = path.absolute().parts[:-1]
    below = folders[folders.index(".resume") + 1:] if ".resume" in folders else ()
    return " ".join((name, *below))


def _fits(state: Any, identity: str, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """Whether a checkpoint has all that `resumed` reads, for these weights."""
    try:
        initial, progress = vars(Progress()), state["progress"]
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return (
            state["of"] == identity and isinstance(state["machine"], str)
            and progress.keys() == initial.keys()
            and all(type(progress[key]) in {type(value), *([int] if type(value) is float else [])}
                    for key, value in initial.items())
            and state["weights"].keys() == trained.keys()
            and _shaped(state["weights"], trained)
            and state["best"].keys() <= trained.keys() and _shaped(state["best"], trained)
            and [group["params"] for group in state["optimizer"]["param_groups"]]
            == [group["params"] for group in optimizer.state_dict()["param_groups"]]
            and all(value.shape in (order[number].shape, ())
                    for number, moments in state["optimizer"]["state"].items()
                    for value in moments.values() if isinstance(value, Tensor))
            and all(isinstance(part, Tensor) and part.dtype == torch.uint8
                    for parts in state["random"] for part in parts))
    except (AttributeError, KeyError, IndexError, TypeError):
        return False


def _shaped(weights: dict[str, Tensor], trained: dict[str, Tensor]) -> bool:
    return all(value.shape == trained[key].shape and bool(value.isfinite().all()) for key, value in weights.items())


def resumed(state: dict[str, Any], workers: Workers, machine: str) -> tuple[Progress, dict[str, Tensor]]:
    """The progress and the best weights of a checkpoint; restores the optimiser and the random generators.

    Says at which step the training resumes, and whether another kind of machine wrote the checkpoint.
    """
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


def machine_of(workers: Workers, job: Job) -> str:
    """The processes, threads, arithmetic and device in words: what decides rounding."""
    device = next(job.model.parameters()).device.type
    dtype = str(getattr(job, "dtype", torch.float32)).removeprefix("torch.")
    compiled = any(module._compiled_call_impl for module in job.model.modules())
    return (f"{size()} {workers.name} processes of {torch.get_num_threads()} threads, {dtype} on {device}"
            + (", compiled" if compiled else ""))
