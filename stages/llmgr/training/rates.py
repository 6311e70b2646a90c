"""The learning rate chosen by successive rejects (Audibert & Bubeck, COLT 2010).

All candidate rates train for a few epochs. The one with the worst validation so far is rejected, the others train for
some more epochs, and so on; the last one trains to the end. Every candidate follows the schedule of a full run, so that
it is the first part of its own full run.

A low rate starts slowly, so halving the candidates after two epochs can choose too high a rate. On 5,000 users of
Pantry GC-SAN validates at 0.003 / 0.01 / 0.03 with NDCG@20 of .0132 / .0180 / .0144 after two epochs, .0249 / .0260 /
.0241 after four, .0286 / .0249 / .0247 after five and .0348 / .0327 / .0298 in the end.
"""
from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmgr.runtime.console import say
from llmgr.runtime.errors import Diverged, UserError
from llmgr.training.engine import fit
from llmgr.training.job import Job, Progress, Settings


class Chosen(NamedTuple):
    """A training at the best learning rate: its progress, the rate, the record of the search, and the other rates'
    seconds.

    The record has three lists, an entry a rate: `rates`, `epochs` (the epochs that each was trained for), and the job's
    validation metric (its best so far, None where the loss was no longer finite).
    """

    progress: Progress
    rate: float
    record: dict[str, list[Any]]
    seconds: float


def fit_best_rate(job: Job, settings: Settings, *, seed: int, resume: Path, name: str) -> Chosen:
    """`fit` at the one of `settings.rates` with the best validation metric `job.selects`.

    After each of `settings.rungs` epochs the worst rate is rejected, after the last rung all but the best; fewer rates
    take the later rungs. The weights have the bytes of `fit` at the chosen rate, even where the search was interrupted
    and resumed. A rate whose loss is no longer finite is rejected and not trained again. `settings` is not changed.
    UserError where no rate stays finite; with a single rate, as `fit`.
    """
    first = {key: p.detach().clone() for key, p in job.model.named_parameters() if p.requires_grad}
    progress = {rate: Progress() for rate in settings.rates}
    lost: set[float] = set()

    def train(rate: float, epochs: int) -> None:
        with torch.no_grad():
            for key, parameter in job.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(first[key])
        at_rate = copy.copy(settings)
        at_rate.lr = rate
        started = time.monotonic()
        try:
            progress[rate] = fit(job, at_rate, seed=seed, resume=resume / f"{rate:g}", until=epochs,
                                 name=name if len(progress) == 1 else f"{name} at {rate:g}")
        except Diverged:
            if len(progress) == 1:
                raise
            say(f"{name}: the loss at learning rate {rate:g} stopped being finite: the rate is given up")
            lost.add(rate)
            progress[rate].seconds += time.monotonic() - started  # Diverged carries no progress

    order, left = [*settings.rates], len(settings.rates)
    for epochs in settings.rungs[1 - left:] if left > 1 else ():
        for rate in order[:left]:
            if rate not in lost:
                train(rate, min(epochs, settings.epochs))
        order[:left] = sorted(order[:left], key=lambda rate: (rate in lost, -progress[rate].best))
        left -= 1
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
