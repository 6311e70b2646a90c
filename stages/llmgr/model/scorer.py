"""LLMGR's scores of all items for sessions, for validation and test."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.model.llmgr import Llmgr
from llmgr.model.outputs import logits
from llmgr.model.prompts import BehaviourPrompts
from llmgr.ranking.loop import rank_sessions
from llmgr.ranking.metrics import metrics
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import texts_shuffled
from llmgr.training.distributed import spread


def shortened(sessions: Sessions, prompts: BehaviourPrompts, positions: int, kind: str) -> tuple[Sessions, int]:
    """Sessions whose prompts fit the backbone's positions, by their most recent clicks, and how many lost some.

    What the prompt lost the graph encoder does not see either. UserError where not even one click fits.
    """
    if prompts.longest(sessions.items.shape[1]) <= positions:
        return sessions, 0
    kept = prompts.fitting(sessions, positions)
    if not kept.all():
        raise UserError(f"not even one click fits the backbone's {positions} positions: lower tune.title_tokens, or "
                        "set tune.titles=false or tune.prompt=slot")
    cut = int((kept < sessions.length.cpu()).sum())
    if cut:
        say(f"{cut} of {len(sessions)} {kind} prompts are cut to their most recent clicks: the backbone has "
            f"{positions} positions")
        sessions = sessions.to("cpu").recent(kept).to(sessions.row.device)
    return sessions, cut


class Scorer:
    """Scores of all items for sessions, from a prompt a session; what validation and test both use."""

    def __init__(self, model: Llmgr, prompts: BehaviourPrompts, sessions: Sessions, dtype: torch.dtype) -> None:
        self.model, self.prompts, self.dtype = model, prompts, dtype
        self.sessions, _ = shortened(sessions, prompts, model.positions, "validation or test")
        self.laid_out = self.sessions.to("cpu")

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Scores [B, V+1] of samples [B]."""
        graphs = laid_out = self.sessions.graphs(samples)
        if self.laid_out is not self.sessions:
            laid_out = self.laid_out.graphs(samples.cpu())
        prompts, session_BD = self.prompts(laid_out, laid_out.length_B), self.model.sessions(graphs)
        with torch.autocast(samples.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            query, table, bias = self.model(prompts.to(samples.device), session_BD)
        scores = logits(query.float(), table.float(), bias)
        return scores if self.model.linear_term is None else scores + self.model.linear_term(self.sessions, samples)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and full-ranking metrics at 20 of its sessions."""
        total = 0.0

        def score(samples: Tensor) -> Tensor:
            nonlocal total
            scores = spread(self, samples)
            total += F.cross_entropy(scores[:, 1:], self.sessions.target[samples] - 1, reduction="sum").item()
            return scores

        found = metrics(rank_sessions(score, self.sessions, 128))
        return {"valid_loss": total / len(self.sessions),
                **{f"valid_{name}": found[name] for name in ("hr_at_20", "ndcg_at_20", "mrr_at_20")}}


def behaviour_prompts(params: Any, settings: Any) -> BehaviourPrompts:
    """Stage 2's prompts over models/backbone and the catalogue, as the tune section words them."""
    from llmgr.language_model.loading import load_tokenizer
    from llmgr.text.items import item_texts

    titles = item_texts("data/core/items.parquet", "title", texts_shuffled(params)) if settings.titles else None
    return BehaviourPrompts(load_tokenizer("models/backbone"), settings.prompt, titles, settings.title_tokens,
                            settings.edges)
