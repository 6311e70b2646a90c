"""Batches of sessions of similar length, so that little is computed at padding."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def bucketed(length: Tensor, batch_size: int, generator: torch.Generator, window: int = 64) -> list[Tensor]:
    """Random batches of samples of like length: shuffled, sorted within windows of batches, batches shuffled.

    Padding falls to a few per cent while every epoch still mixes sessions anew.
    """
    order = torch.randperm(len(length), generator=generator)
    batches: list[Tensor] = []
    for chunk in order.split(batch_size * window):
        batches += chunk[torch.argsort(length[chunk], stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def alike(samples: Tensor, length: Tensor, ratio: float = 1.5, place: torch.device | None = None) -> list[Tensor]:
    """Samples in groups of like length, shortest first: a group's longest is less than `ratio` times its shortest.

    A batch of random samples is read group by group, so that little is padded though its lengths differ. To be read on
    a GPU they stay one group: there padding costs less than the calls for each group.
    """
    if place is not None and place.type == "cuda":
        return [samples]
    edges = [1]
    while edges[-1] <= int(length.max()):
        edges.append(max(edges[-1] + 1, math.ceil(ratio * edges[-1])))
    band = torch.bucketize(length[samples], torch.tensor(edges), right=True)
    groups = samples[torch.argsort(band, stable=True)].split(torch.bincount(band).tolist())
    return [group for group in groups if len(group)]
