"""Full ranking of all sessions by one or several models."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmgr.ranking.metrics import ranks, ranks_both
from llmgr.runtime.console import Bar
from llmgr.sessions.tensors import Sessions

Score = Callable[[Tensor], Tensor]


def rank_sessions(score: Score, sessions: Sessions, batch_size: int, seen: Tensor | None = None) -> Any:
    """`rank_models` of one model."""
    return rank_models({"": score}, sessions, batch_size, seen)[0][""]


@torch.no_grad()
def rank_models(scores: Mapping[str, Score], sessions: Sessions, batch_size: int, seen: Tensor | None = None,
                bar: Bar | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Ranks of all sessions' targets by every model, in the sessions' order, and each model's seconds.

    A score maps samples [B] to scores [B, V+1]; batches are of like length, and every model scores a batch before the
    next one comes. With `seen` [sessions, any] (item ids, 0 pads) a model's ranks are a pair: seen kept, and excluded.
    """
    order = torch.argsort(sessions.length.cpu(), stable=True)
    found = {name: torch.zeros(len(sessions), 1 if seen is None else 2, dtype=torch.long) for name in scores}
    seconds = dict.fromkeys(scores, 0.0)
    batches, own = order.split(batch_size), None
    if bar is None:
        bar = own = Bar(len(batches), 0, f"ranking {len(sessions):,} sessions", unit="batch")
    for number, samples in enumerate(batches, 1):
        here = samples.to(sessions.row.device)
        target_B = sessions.target[here]
        seen_B = None if seen is None else seen[samples].to(here.device).long()
        for name, score in scores.items():
            start = time.monotonic()
            scores_BV = score(here).float()
            rank = [ranks(scores_BV, target_B)] if seen_B is None else ranks_both(scores_BV, target_B, seen_B)
            found[name][samples] = torch.stack(list(rank), 1).cpu()
            seconds[name] += time.monotonic() - start
        bar.show(number)
    if own is not None:
        own.close()
    return {name: r[:, 0] if seen is None else (r[:, 0], r[:, 1]) for name, r in found.items()}, seconds
