"""What the training engine needs: a job, its settings, and the progress of a run."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Loss(NamedTuple):
    """Summed loss of a micro-batch, the number of targets it sums over, and the useful tokens it read."""

    total: Tensor
    targets: int
    tokens: int


class Settings(Protocol):
    """The keys that the engine reads of a training section of params.yaml, such as `llmgr.params.training.Tune`.

    Two sections have more: `patience` (epochs without a better validation) where a job selects its best epoch, and
    `table_decay` (the weight decay of an encoder's item table).
    """

    epochs: int
    lr: float
    weight_decay: float
    warmup_share: float
    clip: float
    checkpoint_seconds: float


class Job(Protocol):
    """What is trained. `selects` names the validation metric that picks the best epoch; None takes the last epoch."""

    model: nn.Module
    selects: str | None

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        """The epoch's optimiser steps, each a list of micro-batches; the same for the same generator state.

        A micro-batch is a tensor of sample numbers: several processes divide its rows among them.
        """

    def targets(self, micro: Tensor) -> int:
        """The number of targets in a micro-batch, known before its forward pass."""

    def loss(self, micro: Tensor) -> Loss:
        """The forward pass of a micro-batch."""

    def validate(self) -> dict[str, float]:
        """Metrics on the validation sessions (never on test)."""


@dataclass
class Progress:
    """How far a training is: everything in a checkpoint but its tensors.

    `done` counts the steps of the current epoch. `window` and `epoch_loss` hold the summed loss and the number of
    targets since the last point of the curve, and of the epoch so far.
    """

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
