"""Batches of sessions of similar length, so that little is computed at padding."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def bucketed(length: Tensor, batch_size: int, generator: torch.Generator, window: int = 64) -> list[Tensor]:
    """Random batches of sample numbers, each of sessions of similar length.

    All samples are shuffled, then sorted by length within windows of `window` batches, then the batches are shuffled.
    Padding falls to a few per cent, and every epoch still mixes the sessions anew.
    """
    order = torch.randperm(len(length), generator=generator)
    batches: list[Tensor] = []
    for chunk in order.split(batch_size * window):
        batches += chunk[torch.argsort(length[chunk], stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def by_length(samples: Tensor, length: Tensor, ratio: float = 1.5, device: torch.device | None = None) -> list[Tensor]:
    """Samples [B] in groups of similar length, shortest first.

    The longest session of a group has less than `ratio` times the clicks of its shortest. A batch of random samples is
    read group by group, so that little is padded. On a GPU they stay one group: padding costs less there than a call
    for each group.
    """
    if device is not None and device.type == "cuda":
        return [samples]
    edges = [1]
    while edges[-1] <= int(length.max()):
        edges.append(max(edges[-1] + 1, math.ceil(ratio * edges[-1])))
    band = torch.bucketize(length[samples], torch.tensor(edges), right=True)
    groups = samples[torch.argsort(band, stable=True)].split(torch.bincount(band).tolist())
    return [group for group in groups if len(group)]
