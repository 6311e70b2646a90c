"""Items that were held out of training, added to the package by their texts, and ranked among all items.

Sessions are those that end in such an item; they may hold other such items. Beside the package: the text tower alone,
and text-kNN over the texts of all items.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.language_model.loading import load_language_model, load_tokenizer
from llmgr.params.names import SERVED, TOWER
from llmgr.ranking.loop import rank_models
from llmgr.ranking.metrics import metrics, ranks
from llmgr.runtime.artifacts import load_tensors, read_table
from llmgr.runtime.layout import Layout
from llmgr.serving.new_items import with_items
from llmgr.serving.package import load_package
from llmgr.serving.scoring import Scorer
from llmgr.sessions.reading import catalogue_size, read_sessions, read_split, seen_items
from llmgr.text.items import item_texts
from llmgr.text.vectors import click_similarity, encode_texts, principal_components

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmgr.params.schema import Params
    from llmgr.serving.package import Package
    from llmgr.sessions.tensors import Sessions

BATCH = 256


@dataclass(frozen=True)
class Unseen:
    """Ranks [sessions] by model: among all items, all but the seen ones, and the items held out; their targets, and the
    share of test sessions in which adding items changed the target's rank among the others."""

    targets: Tensor
    among: dict[str, dict[str, Tensor]]
    items: int
    changed: float

    def figures(self) -> dict[str, object]:
        """What reports/metrics/unseen.json has."""
        return {"items": self.items, "sessions": len(self.targets), "ranks_of_others_changed": self.changed,
                "models": {name: {kind: metrics(rank) for kind, rank in by.items()} for name, by in self.among.items()}}


@torch.inference_mode()
def rank_unseen(params: Params, files: Layout) -> Unseen:
    """Rank the sessions that end in an item held out of training; UserError where the package reads no new texts."""
    before = load_package(files.recommender)
    after = with_items(before, read_table(files.unseen_items).sort("item_id").select(
        "item", pl.col("title").replace("", None), "text"))
    sessions, frame = read_sessions(files.sessions("unseen"), params.data.max_session)
    known, scorer = catalogue_size(files.items), Scorer(after)
    vectors = {TOWER: (after.tensors["tower"], params.tower.decay),
               "text-knn": (text_vectors(params, files), params.evaluate.decay)}
    scores = {SERVED: lambda samples: scorer(sessions.graphs(samples)), **{
        name: lambda samples, of=of: click_similarity(sessions, samples, *of) for name, of in vectors.items()}}
    every, _ = rank_models(scores, sessions, BATCH, seen_items(frame))
    new, _ = rank_models({name: among(score, known) for name, score in scores.items()}, shifted(sessions, known), BATCH)
    return Unseen(sessions.target, {name: {"all": rank, "all_unseen": unseen, "new": new[name]}
                                    for name, (rank, unseen) in every.items()}, len(after.items) - known,
                  changed_ranks(before, after, read_split(files, "test", params.data.max_session)[0]))


def among(score: Callable[[Tensor], Tensor], known: int) -> Callable[[Tensor], Tensor]:
    """The scores of the items behind the first `known`, as scores of a catalogue of its own."""
    return lambda samples: F.pad(score(samples)[:, known + 1:], (1, 0))


def shifted(sessions: Sessions, known: int) -> Sessions:
    """The same sessions with targets numbered from behind the first `known` items."""
    moved = sessions.subset(torch.arange(len(sessions)))
    moved.target = sessions.target - known
    return moved


def text_vectors(params: Params, files: Layout) -> Tensor:
    """text-kNN's vectors [V+1, H] of all items, the language model's raw ones of those held out made here."""
    known = load_tensors(files.item_vectors)["vectors"]
    new = encode_texts(load_language_model(files.text_encoder), load_tokenizer(files.text_encoder),
                       item_texts(files.unseen_items, "text"), params.text_encoder.max_text_tokens)
    return F.normalize(principal_components(torch.cat((known, new)), params.evaluate.text_dim, whiten=True), dim=1)


def changed_ranks(before: Package, after: Package, test: Sessions) -> float:
    """The share of sessions whose target has another rank among the items of `before` under `after`."""
    old, new, changed = Scorer(before), Scorer(after), 0
    for samples in torch.argsort(test.length, stable=True).split(BATCH):
        graphs, target = test.graphs(samples), test.target[samples]
        scores = new(graphs)[:, :len(before.items) + 1]
        changed += int((ranks(old(graphs), target) != ranks(scores, target)).sum())
    return changed / len(test)
