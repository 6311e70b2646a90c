"""Full ranking of all sessions by one or several models."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmgr.ranking.metrics import ranks, ranks_both
from llmgr.runtime.console import Bar
from llmgr.sessions.tensors import Sessions

Score = Callable[[Tensor], Tensor]
"""Maps samples [B] to scores of all items [B, V+1]; column 0 is padding."""
Ranks = Tensor | tuple[Tensor, Tensor]
"""Ranks [sessions] of the targets; a pair with `seen`: among all items, and without the seen ones."""


def rank_sessions(score: Score, sessions: Sessions, batch_size: int, seen: Tensor | None = None
                  ) -> Ranks:
    """The ranks of `rank_models` for a single model."""
    return rank_models({"": score}, sessions, batch_size, seen)[0][""]


@torch.no_grad()
def rank_models(scores: Mapping[str, Score], sessions: Sessions, batch_size: int, seen: Tensor | None = None,
                bar: Bar | None = None) -> tuple[dict[str, Ranks], dict[str, float]]:
    """Each model's ranks of the sessions' targets, in the order of the sessions, and its seconds.

    A batch holds sessions of similar length, and all models score it before the next one. `seen` [sessions, any width]
    holds item ids, 0 pads: with it, each model gets two ranks, among all items and without the seen ones. `bar` shows
    progress; without one the function makes its own. Diverged where a score is not a number.
    """
    order = torch.argsort(sessions.length.cpu(), stable=True)
    ranks_of = {name: torch.zeros(len(sessions), 1 if seen is None else 2, dtype=torch.long) for name in scores}
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
            ranks_of[name][samples] = torch.stack(list(rank), 1).cpu()
            seconds[name] += time.monotonic() - start
        bar.show(number)
    if own is not None:
        own.close()
    return {name: r[:, 0] if seen is None else (r[:, 0], r[:, 1]) for name, r in ranks_of.items()}, seconds
