"""The one training engine: AdamW, cosine with warm-up, accumulation, clipping, precision, resume, early stopping, cost.

A job says what a step holds and what its loss is; the engine owns the loop. State is checkpointed outside DVC's outs,
so that a run killed at any moment goes on and ends with the same bytes (on a CPU). llmgr.launch does a step among
several processes; here there is one loop.
"""
from __future__ import annotations

import csv
import io
import math
import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llmgr.artifacts import sweep, write_bytes, write_json, write_text
from llmgr.errors import UserError
from llmgr.launch import added, from_first, gathered, partners, rank, size
from llmgr.params import rate_key
from llmgr.stage import out_of_memory, say

CURVE_POINTS = 200
ITEM_TABLE = "items.table.weight"  # an encoder's item embeddings


class Loss(NamedTuple):
    """Summed loss of a micro-batch, the number of targets it sums over, and the useful tokens it read."""

    total: Tensor
    targets: int
    tokens: int


class Job(Protocol):
    """What is trained. `selects` names the validation metric that picks the best epoch; None keeps the last."""

    model: nn.Module
    selects: str | None

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Any]]:
        """The epoch's optimiser steps, each a list of micro-batches; the same for the same generator state.

        Where several processes train, a micro-batch is a tensor whose rows can be divided among them.
        """

    def targets(self, micro: Any) -> int:
        """Targets of a micro-batch, known before it is built."""

    def loss(self, micro: Any) -> Loss:
        """Forward pass of a micro-batch."""

    def validate(self) -> dict[str, float]:
        """Metrics on the validation sessions (never on test)."""


@dataclass
class Progress:
    """Everything but tensors that a checkpoint holds."""

    epoch: int = 0
    done: int = 0
    step: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])
    epoch_loss: list[float] = field(default_factory=lambda: [0.0, 0.0])
    step_rows: list[dict[str, float]] = field(default_factory=list)
    epoch_rows: list[dict[str, float]] = field(default_factory=list)
    best: float = -math.inf
    best_epoch: int = 0

    def stale(self, patience: int) -> bool:
        """Whether `patience` epochs have passed since the best one."""
        return self.epoch - self.best_epoch >= patience


def fit(job: Job, settings: Any, *, seed: int, resume: Path, name: str, strategy: str = "ddp") -> Progress:
    """Train `job.model` in place and return how it went; the best epoch's weights where `job.selects` is set.

    `settings` is a training section of params.yaml (epochs, lr, weight_decay, warmup_share, clip, precision,
    checkpoint_seconds, optionally patience); `strategy` is launch.strategy. A checkpoint is whole, so that any number
    of processes goes on from it; the number that wrote it ends with the bytes of an undisturbed run. Raises UserError
    where the loss stops being finite: the step is named and the last good checkpoint stays.
    """
    device = next(job.model.parameters()).device
    torch.manual_seed(seed + rank())  # dropout differs between processes
    trained = {k: p for k, p in job.model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(trained, settings)
    state = from_first(_load(resume / "state.pt") if rank() == 0 else None)
    if state:
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(state["weights"][key])
    workers = partners(job, trained, optimizer, settings.clip, strategy)
    machine = _machine(workers, job)
    progress, best = _resumed(state, workers, machine) if state else (Progress(), {})
    generator = torch.Generator()
    per_epoch = len(job.steps(0, generator.manual_seed(seed)))
    total = per_epoch * settings.epochs
    every = max(1, total // CURVE_POINTS)
    saved = tick = time.monotonic()

    def clock(training: bool) -> None:
        nonlocal tick
        now = time.monotonic()
        progress.seconds += now - tick
        progress.training_seconds += (now - tick) * training
        tick = now

    if not progress.epoch_rows and progress.step == 0:
        job.model.eval()
        if first := workers.validate():
            progress.epoch_rows.append({"epoch": 0, "step": 0, **first})
        clock(training=False)
    bar = Bar(total, progress.step, name)
    while progress.epoch < settings.epochs and not (job.selects and progress.stale(settings.patience)):
        steps = job.steps(progress.epoch, generator.manual_seed(seed + 1000 * progress.epoch))
        job.model.train()
        for micros in steps[progress.done:]:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * cosine(progress.step, total, settings.warmup_share)
            targets = sum(map(job.targets, micros))
            losses, read = zip(*(workers.loss(micro, targets) for micro in micros))
            due = rank() == 0 and time.monotonic() - saved >= settings.checkpoint_seconds  # one clock decides
            *losses, tokens, due = added([*losses, sum(read), due])
            for loss in losses:
                progress.window[0] += loss
            progress.tokens += int(tokens)
            progress.samples += targets
            progress.window[1] += targets
            norm = workers.step()
            if not math.isfinite(progress.window[0] + norm):
                kept = "the last good checkpoint is kept" if (resume / "state.pt").exists() else "no checkpoint yet"
                raise UserError(f"{name}: the loss or its gradient is not finite at step {progress.step + 1}; lower "
                                f"{rate_key(name)}; {kept}")
            progress.step += 1
            progress.done += 1
            if progress.step % every == 0 or progress.done == len(steps):
                mean = progress.window[0] / max(1.0, progress.window[1])
                progress.step_rows.append({"step": progress.step, "epoch": progress.step / per_epoch, "loss": mean,
                                           "lr": optimizer.param_groups[0]["lr"]})
                progress.epoch_loss = [a + b for a, b in zip(progress.epoch_loss, progress.window)]
                progress.window = [0.0, 0.0]
                bar.show(progress.step, f"loss {mean:.4f}")
            clock(training=True)
            if due:
                _save(resume / "state.pt", progress, workers, best, machine)
                saved = time.monotonic()
        job.model.eval()
        metrics = workers.validate()
        progress.epoch += 1
        progress.done = 0
        row = {"epoch": progress.epoch, "step": progress.step,
               "train_loss": progress.epoch_loss[0] / max(1.0, progress.epoch_loss[1]), **metrics}
        progress.epoch_rows.append(row)
        progress.epoch_loss = [0.0, 0.0]
        say(f"{name}: " + "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        if job.selects and metrics[job.selects] > progress.best:
            progress.best, progress.best_epoch = metrics[job.selects], progress.epoch
            best = {k: p.detach().clone() for k, p in trained.items()}
        clock(training=False)
        _save(resume / "state.pt", progress, workers, best, machine)
        saved = time.monotonic()
    bar.close()
    workers.close()
    with torch.no_grad():
        for key, value in best.items():
            trained[key].copy_(value.to(device))
    job.model.eval()
    return progress


def finish(progress: Progress, model: nn.Module, *, name: str, resume: Path, reports: Path, prepared: float = 0.0
           ) -> None:
    """Write curves and cost of a finished training under `reports`, then drop its resume state.

    `prepared` seconds went by before it began and count in its cost.
    """
    write_text(reports / "curves" / f"{name}_steps.csv", _table(progress.step_rows))
    write_text(reports / "curves" / f"{name}_epochs.csv", _table(progress.epoch_rows))
    write_json(reports / "metrics" / "cost" / f"{name}.json", cost(progress, model, prepared))
    shutil.rmtree(resume, ignore_errors=True)


def cost(progress: Progress, model: nn.Module, prepared: float = 0.0) -> dict[str, Any]:
    """What a training took: seconds (validation and `prepared` ones included), rates over training time, memory (of
    one process), parameters, machine."""
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


def device_of() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arithmetic(precision: str) -> torch.dtype:
    """float32 or bfloat16 for `precision`; `auto` takes bf16 where the machine multiplies it faster, and says why.

    That is a GPU, a CPU with AMX tiles, and an AMD one with AVX-512 bf16 (2.3 to 2.5 times the fp32 rate on two threads
    of a Zen 4). Intel's AVX-512 bf16 without AMX ran at 0.6 to 1.3 times that rate: not worth the rounding.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if torch.cuda.is_available():
        chosen, reason = torch.bfloat16, "the GPU multiplies it faster"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            chosen, reason = torch.float32, "the GPU has no bf16"
    else:
        cpu = torch.cpu.get_capabilities()
        amd = cpu.get("avx512_bf16", False) and "AMD" in cpu.get("cpu_name", "")
        chosen = torch.bfloat16 if amd or cpu.get("amx_bf16", False) else torch.float32
        reason = {(True, True): "the CPU has AMX tiles", (True, False): "an AMD CPU with AVX-512 bf16"}.get(
            (chosen is torch.bfloat16, bool(cpu.get("amx_bf16", False))), "bf16 is no faster on this CPU")
    say(f"precision auto: {'bf16' if chosen is torch.bfloat16 else 'fp32'} ({reason})")
    return chosen


def cosine(step: int, total: int, warmup_share: float) -> float:
    """Share of the peak learning rate at `step` of `total`: linear warm-up, then half a cosine down to 0."""
    warmup = round(total * warmup_share)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class Bar:
    """A bar with rate and time left in a terminal, a line now and then in a log."""

    def __init__(self, total: int, start: int, name: str, every: float = 20.0) -> None:
        self.total, self.name, self.every = total, name, every
        self.begun = self.shown = time.monotonic()
        self.start = start
        self.bar = tqdm(total=total, initial=start, desc=name, leave=False) if (
            sys.stderr.isatty() and rank() == 0) else None

    def show(self, step: int, text: str = "") -> None:
        """Bring the display to `step`."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.shown > self.every:
            self.shown = time.monotonic()
            rate = (step - self.start) / (self.shown - self.begun)
            say(f"{self.name}: step {step}/{self.total}  {rate:.2f} steps/s  "
                f"{(self.total - step) / max(rate, 1e-9) / 60:.1f} min left  {text}".rstrip())

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()


def _groups(trained: dict[str, nn.Parameter], decay: float, table_decay: float) -> list[dict[str, Any]]:
    """Parameters by their weight decay; vectors and points of a manifold do not shrink."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        rate = table_decay if name == ITEM_TABLE else decay
        groups.setdefault(rate if parameter.dim() >= 2 and not hasattr(parameter, "manifold") else 0.0, []).append(
            parameter)
    return [{"params": members, "weight_decay": rate} for rate, members in groups.items()]


def _optimizer(trained: dict[str, nn.Parameter], settings: Any) -> torch.optim.Optimizer:
    """AdamW; where a parameter holds points of a manifold, Adam that follows it (Becigneul & Ganea, ICLR 2019)."""
    groups = _groups(trained, settings.weight_decay, getattr(settings, "table_decay", settings.weight_decay))
    if not any(hasattr(p, "manifold") for p in trained.values()):
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    if settings.weight_decay:
        raise UserError("encoder.training.weight_decay must be 0 for hcgr: its Riemannian Adam has no decoupled decay")
    from geoopt.optim import RiemannianAdam

    optimizer = RiemannianAdam(groups, lr=settings.lr, stabilize=10)
    optimizer.register_load_state_dict_post_hook(_whole_steps)
    return optimizer


def _whole_steps(optimizer: torch.optim.Optimizer) -> None:
    """Torch loads a count of steps as a float32 tensor, whose powers round; geoopt counts in integers."""
    for state in optimizer.state.values():
        state["step"] = int(state["step"])


def _save(path: Path, progress: Progress, workers: Any, best: dict[str, Tensor], machine: str) -> None:
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    state = {"progress": vars(progress), **workers.state(), "best": best, "random": gathered(random),
             "machine": machine}
    if rank() == 0:
        buffer = io.BytesIO()  # written by Python, whose errors say when a disk is full; those of torch.save do not
        torch.save(state, buffer)
        write_bytes(path, buffer.getbuffer())


def _load(path: Path) -> dict[str, Any] | None:
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


def _resumed(state: dict[str, Any], workers: Any, machine: str) -> tuple[Progress, dict[str, Tensor]]:
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


def _machine(workers: Any, job: Job) -> str:
    """What decides the order of sums and the arithmetic, hence rounding."""
    place = next(job.model.parameters()).device.type
    dtype = str(getattr(job, "dtype", torch.float32)).removeprefix("torch.")
    compiled = any(module._compiled_call_impl for module in job.model.modules())
    return (f"{size()} {workers.name} processes of {torch.get_num_threads()} threads, {dtype} on {place}"
            + (", compiled" if compiled else ""))


def _table(rows: list[dict[str, float]]) -> str:
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns) or ["epoch", "step"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return buffer.getvalue()


