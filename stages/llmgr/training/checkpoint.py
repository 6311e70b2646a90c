"""Checkpoints of a run: written whole, read back onto any number of processes."""
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
from llmgr.training.distributed import gathered, rank, size
from llmgr.training.job import Job, Progress


def save_checkpoint(path: Path, progress: Progress, workers: Any, best: dict[str, Tensor], machine: str, name: str
                    ) -> None:
    """Write what the training `name` goes on from; the checkpoint before it stays beside it."""
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    state = {"of": _identity(path, name), "progress": vars(progress), **workers.state(), "best": best,
             "random": gathered(random), "machine": machine}
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_state(path, buffer.getbuffer())


def load_checkpoint(path: Path, name: str, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
                    ) -> dict[str, Any] | None:
    """The newest whole checkpoint of the training `name` of these weights, if there is one.

    One that is damaged, of another training or of other weights is removed; a line says so.
    """
    sweep(path.parent)
    removed = False
    for place in states(path):
        state = _read(place)
        if _fits(state, _identity(path, name), trained, optimizer):
            if removed:
                say(f"{path} is damaged and was removed: the training goes on from the checkpoint before it")
            return state
        discard(place)
        removed = True
    if removed:
        say(f"{path} is damaged and was removed: the training starts anew")
    return None


def _read(place: Path) -> Any:
    content = read_state(place)
    try:
        return None if content is None else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        return None


def _identity(path: Path, name: str) -> str:
    """The training that a checkpoint belongs to: its name, and its place below `.resume`, where it lies there."""
    place = path.absolute().parts[:-1]
    below = place[place.index(".resume") + 1:] if ".resume" in place else ()
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
