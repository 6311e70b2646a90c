"""What the training engine asks of a job, and what it keeps of a run."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


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
