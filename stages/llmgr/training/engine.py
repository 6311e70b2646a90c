"""The one training engine: AdamW, cosine with warm-up, accumulation, clipping, precision, resume, early stopping, cost.

A job says what a step holds and what its loss is; the engine owns the loop. State is checkpointed outside DVC's outs,
so that a run killed at any moment goes on and ends with the same bytes (on a CPU).
`distributed` does a step among several processes; here there is one loop.
"""
from __future__ import annotations

import csv
import io
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmgr.params.encoders import rate_key
from llmgr.runtime.artifacts import write_json, write_text
from llmgr.runtime.console import Bar, during, say
from llmgr.runtime.errors import Diverged
from llmgr.training.checkpoint import load_checkpoint, machine_of, resumed, save_checkpoint
from llmgr.training.cost import cost
from llmgr.training.distributed import added, from_first, partners, rank
from llmgr.training.job import Job, Progress
from llmgr.training.optimizer import adamw, cosine

CURVE_POINTS = 200
SCALED = dict.fromkeys(("align", "tune"), ", or model.lora_alpha where it is high")
"""What makes a stage's training diverge beside its learning rate."""


def fit(job: Job, settings: Any, *, seed: int, resume: Path, name: str, strategy: str = "ddp",
        until: int | None = None) -> Progress:
    """Train `job.model` in place and return how it went; the best epoch's weights where `job.selects` is set.

    `settings` is a training section of params.yaml (epochs, lr, weight_decay, warmup_share, clip, precision,
    checkpoint_seconds, optionally patience); `strategy` is launch.strategy. A checkpoint is whole, so that any number
    of processes goes on from it; the number that wrote it ends with the bytes of an undisturbed run. `until` stops
    after so many epochs of the same schedule; another call goes on from there. Raises Diverged, a UserError, where the
    loss stops being finite: the step is named and the last good checkpoint stays.
    """
    device = next(job.model.parameters()).device
    torch.manual_seed(seed + rank())  # dropout differs between processes
    trained = {k: p for k, p in job.model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained, settings)
    state = from_first(load_checkpoint(resume / "state.pt", name, trained, optimizer) if rank() == 0 else None)
    if state:
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(state["weights"][key])
    workers = partners(job, trained, optimizer, settings.clip, strategy)
    machine = machine_of(workers, job)
    progress, best = resumed(state, workers, machine) if state else (Progress(), {})
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
        with during(f"{name}: first validation"):
            first = workers.validate()
        if first:
            progress.epoch_rows.append({"epoch": 0, "step": 0, **first})
        clock(training=False)
    bar, shown = Bar(total, progress.step, name), ""
    while progress.epoch < (until or settings.epochs) and not (job.selects and progress.stale(settings.patience)):
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
                raise Diverged(f"{name}: the loss or its gradient is not finite at step {progress.step + 1}; lower "
                               f"{rate_key(name)}{SCALED.get(name.split()[0], '')}; {kept}")
            progress.step += 1
            progress.done += 1
            if progress.step % every == 0 or progress.done == len(steps):
                mean = progress.window[0] / max(1.0, progress.window[1])
                progress.step_rows.append({"step": progress.step, "epoch": progress.step / per_epoch, "loss": mean,
                                           "lr": optimizer.param_groups[0]["lr"]})
                progress.epoch_loss = [a + b for a, b in zip(progress.epoch_loss, progress.window)]
                progress.window = [0.0, 0.0]
                shown = f"loss {mean:.4f}"
            bar.show(progress.step, shown)
            clock(training=True)
            if due:
                save_checkpoint(resume / "state.pt", progress, workers, best, machine, name)
                saved = time.monotonic()
        job.model.eval()
        with during(f"{name}: validation"):
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
        save_checkpoint(resume / "state.pt", progress, workers, best, machine, name)
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


def _table(rows: list[dict[str, float]]) -> str:
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns) or ["epoch", "step"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return buffer.getvalue()
