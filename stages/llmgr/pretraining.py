"""Next-item training of a session encoder over all prefixes, and its full ranking."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmgr.encoders import Recommender
from llmgr.graph import Sessions, alike
from llmgr.ranking import metrics, ranks, ranks_both
from llmgr.training import Loss

Score = Callable[[Tensor], Tensor]


class EncoderJob:
    """Cross-entropy over all items of every prefix's next item, or the encoder's own loss; NDCG@20 selects.

    Batches are random over all lengths. Batches of like length would need no padding, but their gradients are of short
    or of long sessions alone: on Office, 38 batches, GRU4Rec ended 18% lower in NDCG@20.
    """

    selects = "valid_ndcg_at_20"

    def __init__(self, model: Recommender, train: Sessions, valid: Sessions, settings: Any, dtype: torch.dtype) -> None:
        self.model, self.train, self.valid, self.settings, self.dtype = model, train, valid, settings, dtype
        self.length = train.length.cpu()

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        return [[samples] for samples in
                torch.randperm(len(self.train), generator=generator).split(self.settings.batch_size)]

    def targets(self, micro: Tensor) -> int:
        return len(micro)

    def loss(self, micro: Tensor) -> Loss:
        groups = [group.to(self.train.row.device) for group in alike(micro, self.length)]
        with torch.autocast(groups[0].device.type, self.dtype, enabled=self.dtype is not torch.float32):
            vectors_VD = self.model.vectors()
            session_BD = torch.cat([self.model.encoder(self.train.graphs(group), vectors_VD) for group in groups])
            total = self.model.encoder.loss(session_BD, vectors_VD, self.train.target[torch.cat(groups)])
        return Loss(total, len(micro), 0)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        vectors_VD = self.model.vectors()
        kept = rank_sessions(lambda samples: self.model.encoder(self.valid.graphs(samples), vectors_VD) @ vectors_VD.T,
                             self.valid, self.settings.batch_size)
        found = metrics(kept)
        return {f"valid_{name}": found[name] for name in ("hr_at_20", "ndcg_at_20", "mrr_at_20")}


def rank_sessions(score: Score, sessions: Sessions, batch_size: int, seen: Tensor | None = None) -> Any:
    """`rank_models` of one model."""
    return rank_models({"": score}, sessions, batch_size, seen)[0][""]


@torch.no_grad()
def rank_models(scores: Mapping[str, Score], sessions: Sessions, batch_size: int, seen: Tensor | None = None
                ) -> tuple[dict[str, Any], dict[str, float]]:
    """Ranks of all sessions' targets by every model, in the sessions' order, and each model's seconds.

    A score maps samples [B] to scores [B, V+1]; batches are of like length, and every model scores a batch before the
    next one comes. With `seen` [sessions, any] (item ids, 0 pads) a model's ranks are a pair: seen kept, and excluded.
    """
    order = torch.argsort(sessions.length.cpu(), stable=True)
    found = {name: torch.zeros(len(sessions), 1 if seen is None else 2, dtype=torch.long) for name in scores}
    seconds = dict.fromkeys(scores, 0.0)
    for samples in order.split(batch_size):
        here = samples.to(sessions.row.device)
        target_B = sessions.target[here]
        seen_B = None if seen is None else seen[samples].to(here.device).long()
        for name, score in scores.items():
            start = time.monotonic()
            scores_BV = score(here).float()
            rank = [ranks(scores_BV, target_B)] if seen_B is None else ranks_both(scores_BV, target_B, seen_B)
            found[name][samples] = torch.stack(list(rank), 1).cpu()
            seconds[name] += time.monotonic() - start
    return {name: r[:, 0] if seen is None else (r[:, 0], r[:, 1]) for name, r in found.items()}, seconds
