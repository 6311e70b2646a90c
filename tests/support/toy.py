"""A training of three classes of points, what a test breaks in it, and what it leaves."""
from __future__ import annotations

import io
import types
from pathlib import Path

import torch
from torch import nn

from llmgr.runtime.state import read_state
from llmgr.training.job import Loss


def settings(**changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"epochs": 3, "lr": 0.05, "weight_decay": 0.01, "warmup_share": 0.2, "clip": 1.0,
                                    "checkpoint_seconds": 1e9} | changes)


class Toy:
    """Classes of random points, with dropout; `broken` maps the number of a loss to what happens there."""

    selects = None

    def __init__(self, micro: int = 16, accumulate: int = 1, dropout: float = 0.2, samples: int = 80) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.x = torch.randn(samples, 4)
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0.5).long()
        self.micro, self.accumulate, self.calls, self.broken = micro, accumulate, 0, {}

    def steps(self, epoch, generator):
        order = torch.randperm(len(self.x), generator=generator).split(self.micro)
        return [list(order[i:i + self.accumulate]) for i in range(0, len(order), self.accumulate)]

    def targets(self, micro):
        return len(micro)

    def loss(self, micro):
        self.calls += 1
        total = nn.functional.cross_entropy(self.model(self.x[micro]), self.y[micro], reduction="sum")
        if self.calls in self.broken:
            total = self.broken[self.calls](total)
        return Loss(total, len(micro), 2 * len(micro))

    @torch.no_grad()
    def validate(self):
        assert not self.model.training
        return {"valid_loss": float(nn.functional.cross_entropy(self.model(self.x), self.y))}


def bytes_of(job: Toy) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in job.model.parameters())


def checkpoint_of(path: Path) -> dict:
    return torch.load(io.BytesIO(read_state(path)), weights_only=True)


def stop(_):
    raise InterruptedError
