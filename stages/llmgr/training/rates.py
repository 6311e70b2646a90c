"""The learning rate chosen by successive halving (Jamieson & Talwalkar, AISTATS 2016), as the beginning of a full run.

All candidates train for a few epochs; the better half, by the best validation figure so far, goes on to twice as many,
and so forth; the last one goes on to the end. The schedule is that of the full length throughout, so that a candidate
is the first part of its own full run: short schedules, which end before a low rate has come far, favour high rates.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmgr.runtime.console import say
from llmgr.runtime.errors import Diverged, UserError
from llmgr.training.engine import fit
from llmgr.training.job import Job, Progress


class Chosen(NamedTuple):
    """A training at the best learning rate: how it went, the rate, the record of the search, the seconds of the others.

    The record has a list for each of `rates`, `epochs` (how many each was trained for) and the job's validation figure
    (the best by then, None where the loss stopped being finite).
    """

    progress: Progress
    rate: float
    record: dict[str, list[Any]]
    seconds: float


def fit_best_rate(job: Job, settings: Any, *, seed: int, resume: Path, name: str) -> Chosen:
    """`fit` at the one of `settings.rates` that validates best by `job.selects`; the first rung has `settings.rung`
    epochs.

    Leaves the bytes of `fit` at the chosen rate, also where the search was interrupted and goes on. A rate whose loss
    stops being finite is given up. UserError where none stays finite, and as `fit` where there is one rate alone.
    """
    first = {key: p.detach().clone() for key, p in job.model.named_parameters() if p.requires_grad}
    progress = {rate: Progress() for rate in settings.rates}
    lost: set[float] = set()

    def train(rate: float, epochs: int) -> None:
        with torch.no_grad():
            for key, parameter in job.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(first[key])
        settings.lr = rate
        try:
            progress[rate] = fit(job, settings, seed=seed, resume=resume / f"{rate:g}", until=epochs,
                                 name=name if len(progress) == 1 else f"{name} at {rate:g}")
        except Diverged:
            if len(progress) == 1:
                raise
            say(f"{name}: the loss at learning rate {rate:g} stopped being finite: the rate is given up")
            lost.add(rate)

    order, left, epochs = [*settings.rates], len(settings.rates), settings.rung
    while left > 1:
        for rate in order[:left]:
            train(rate, min(epochs, settings.epochs))
        order[:left] = sorted(order[:left], key=lambda rate: (rate in lost, -progress[rate].best))
        left, epochs = (left + 1) // 2, 2 * epochs
    for rate in order:
        if rate not in lost:
            train(rate, settings.epochs)
        if rate not in lost:
            break
    else:
        raise UserError(f"{name}: the loss stopped being finite at each of encoder.training.rates="
                        f"[{', '.join(map(str, settings.rates))}]: add lower ones")
    record = {"rates": [*progress], "epochs": [one.epoch for one in progress.values()],
              job.selects: [None if rate in lost else one.best for rate, one in progress.items()]}
    return Chosen(progress[rate], rate, record, sum(p.seconds for r, p in progress.items() if r != rate))
