"""AdamW with a decay of its own for item tables, and the cosine schedule with warm-up."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from llmgr.runtime.errors import UserError
from llmgr.training.job import Settings

ITEM_TABLE = "items.table.weight"  # an encoder's item embeddings


def cosine(step: int, total: int, warmup_share: float) -> float:
    """The share of the peak learning rate at `step` of `total`: linear warm-up, then half a cosine down to 0."""
    warmup = round(total * warmup_share)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _groups(trained: dict[str, nn.Parameter], decay: float, table_decay: float) -> list[dict[str, Any]]:
    """Parameters by their weight decay; vectors and points of a manifold do not shrink."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        rate = table_decay if name == ITEM_TABLE else decay
        groups.setdefault(rate if parameter.dim() >= 2 and not hasattr(parameter, "manifold") else 0.0, []).append(
            parameter)
    return [{"params": members, "weight_decay": rate} for rate, members in groups.items()]


def adamw(trained: dict[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW, or Riemannian Adam (Becigneul & Ganea, ICLR 2019) where a parameter holds points of a manifold.

    UserError for a weight decay with Riemannian Adam.
    """
    groups = _groups(trained, settings.weight_decay, getattr(settings, "table_decay", settings.weight_decay))
    if not any(hasattr(p, "manifold") for p in trained.values()):
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    if settings.weight_decay:
        raise UserError("encoder.training.weight_decay must be 0 for hcgr: its Riemannian Adam has no decoupled decay")
    from geoopt.optim import RiemannianAdam

    optimizer = RiemannianAdam(groups, lr=settings.lr, stabilize=10)
    optimizer.register_load_state_dict_post_hook(whole_steps)
    return optimizer


def whole_steps(optimizer: torch.optim.Optimizer) -> None:
    """Turn the step counts of a loaded state into integers: torch loads them as float32, whose powers round."""
    for state in optimizer.state.values():
        state["step"] = int(state["step"])
