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

import torch
from torch import Tensor, nn

from llmgr.params.encoders import rate_key
from llmgr.runtime.artifacts import write_json, write_text
from llmgr.runtime.console import Bar, during, say
from llmgr.runtime.errors import Diverged
from llmgr.training.checkpoint import load_checkpoint, machine_of, resumed, save_checkpoint
from llmgr.training.cost import cost
from llmgr.training.distributed import added, from_first, partners, rank
from llmgr.training.job import Job, Progress, Settings
from llmgr.training.optimizer import adamw, cosine

CURVE_POINTS = 200
SCALED = dict.fromkeys(("align", "tune"), ", or model.lora_alpha where it is high")
"""What makes a stage's training diverge beside its learning rate."""


def fit(job: Job, settings: Settings, *, seed: int, resume: Path, name: str, strategy: str = "ddp",
        until: int | None = None) -> Progress:
    """Train `job.model` in place and return its progress; where `job.selects` is set, the best epoch's weights stay.

    `settings` is a training section of params.yaml; with `job.selects` it has `patience`, too. `strategy` is
    launch.strategy. A checkpoint is whole: any number of processes can resume it, and the number that wrote it ends
    with the bytes of an uninterrupted run. `until` stops after that many epochs of the same schedule, and another call
    resumes from there. Raises Diverged, a UserError, where the loss is no longer finite: it names the step, and the
    last good checkpoint stays.
    """
    run = _Run(job, settings, seed, resume / "state.pt", name, strategy)
    progress = run.progress
    if not progress.epoch_rows and progress.step == 0:
        run.first_validation()
    run.bar = Bar(run.total, progress.step, name)
    while progress.epoch < (until or settings.epochs) and not (job.selects and progress.stale(settings.patience)):
        run.epoch()
    run.close()
    return progress


class _Run:
    """A training under way: the optimiser, the workers, and everything that a checkpoint holds."""

    def __init__(self, job: Job, settings: Settings, seed: int, path: Path, name: str, strategy: str) -> None:
        self.job, self.settings, self.seed, self.path, self.name = job, settings, seed, path, name
        self.device = next(job.model.parameters()).device
        torch.manual_seed(seed + rank())  # dropout differs between processes
        self.trained = {k: p for k, p in job.model.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.trained, settings)
        state = from_first(load_checkpoint(path, name, self.trained, self.optimizer) if rank() == 0 else None)
        if state:
            with torch.no_grad():
                for key, parameter in self.trained.items():
                    parameter.copy_(state["weights"][key])
        self.workers = partners(job, self.trained, self.optimizer, settings.clip, strategy)
        self.machine = machine_of(self.workers, job)
        self.progress, self.best = resumed(state, self.workers, self.machine) if state else (Progress(), {})
        self.generator = torch.Generator()
        self.per_epoch = len(job.steps(0, self.generator.manual_seed(seed)))
        self.total = self.per_epoch * settings.epochs
        self.every = max(1, self.total // CURVE_POINTS)
        self.bar: Bar | None = None
        self.shown = ""
        self.saved = self.tick = time.monotonic()

    def first_validation(self) -> None:
        """The figures before any step, as epoch 0 of the curve."""
        self.job.model.eval()
        with during(f"{self.name}: first validation"):
            first = self.workers.validate()
        if first:
            self.progress.epoch_rows.append({"epoch": 0, "step": 0, **first})
        self._clock(training=False)

    def epoch(self) -> None:
        """The rest of the current epoch, its validation and a checkpoint."""
        job, progress = self.job, self.progress
        steps = job.steps(progress.epoch, self.generator.manual_seed(self.seed + 1000 * progress.epoch))
        job.model.train()
        for micros in steps[progress.done:]:
            due = self._step(micros)
            progress.step += 1
            progress.done += 1
            if progress.step % self.every == 0 or progress.done == len(steps):
                self._note_loss()
            self.bar.show(progress.step, self.shown)
            self._clock(training=True)
            if due:
                self._save()
        job.model.eval()
        with during(f"{self.name}: validation"):
            metrics = self.workers.validate()
        progress.epoch += 1
        progress.done = 0
        row = {"epoch": progress.epoch, "step": progress.step,
               "train_loss": progress.epoch_loss[0] / max(1.0, progress.epoch_loss[1]), **metrics}
        progress.epoch_rows.append(row)
        progress.epoch_loss = [0.0, 0.0]
        say(f"{self.name}: " + "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                                         for k, v in row.items()))
        if job.selects and metrics[job.selects] > progress.best:
            progress.best, progress.best_epoch = metrics[job.selects], progress.epoch
            self.best = {k: p.detach().clone() for k, p in self.trained.items()}
        self._clock(training=False)
        self._save()

    def _step(self, micros: list[Tensor]) -> bool:
        """One optimiser step; returns whether a checkpoint is due. Diverged where the loss is not finite."""
        progress, settings = self.progress, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * cosine(progress.step, self.total, settings.warmup_share)
        targets = sum(map(self.job.targets, micros))
        losses, read = zip(*(self.workers.loss(micro, targets) for micro in micros))
        due = rank() == 0 and time.monotonic() - self.saved >= settings.checkpoint_seconds  # one clock decides
        *losses, tokens, due = added([*losses, sum(read), due])
        for loss in losses:
            progress.window[0] += loss
        progress.tokens += int(tokens)
        progress.samples += targets
        progress.window[1] += targets
        norm = self.workers.step()
        if not math.isfinite(progress.window[0] + norm):
            checkpoint = "the last good checkpoint is kept" if self.path.exists() else "no checkpoint yet"
            raise Diverged(f"{self.name}: the loss or its gradient is not finite at step {progress.step + 1}; lower "
                           f"{rate_key(self.name)}{SCALED.get(self.name.split()[0], '')}; {checkpoint}")
        return bool(due)

    def _note_loss(self) -> None:
        """A point of the training curve: the mean loss since the last one."""
        progress = self.progress
        mean = progress.window[0] / max(1.0, progress.window[1])
        progress.step_rows.append({"step": progress.step, "epoch": progress.step / self.per_epoch, "loss": mean,
                                   "lr": self.optimizer.param_groups[0]["lr"]})
        progress.epoch_loss = [a + b for a, b in zip(progress.epoch_loss, progress.window)]
        progress.window = [0.0, 0.0]
        self.shown = f"loss {mean:.4f}"

    def _clock(self, training: bool) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.tick
        self.progress.training_seconds += (now - self.tick) * training
        self.tick = now

    def _save(self) -> None:
        save_checkpoint(self.path, self.progress, self.workers, self.best, self.machine, self.name)
        self.saved = time.monotonic()

    def close(self) -> None:
        """Leave the model in evaluation mode, with the best epoch's weights where there are some."""
        self.bar.close()
        self.workers.close()
        with torch.no_grad():
            for key, value in self.best.items():
                self.trained[key].copy_(value.to(self.device))
        self.job.model.eval()


def finish(progress: Progress, model: nn.Module, *, name: str, resume: Path, reports: Path, prepared: float = 0.0
           ) -> None:
    """Write the curves and the cost of a finished training under `reports`, then drop its resume state.

    `prepared` is the time in seconds of what had to be made before the training began; it counts in the cost.
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
