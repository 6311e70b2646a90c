"""Baselines without gradient training: popularity, neighbours, SLIT."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.data.interactions import training_counts
from llmgr.evaluation.neighbours import item_similarity, neighbours, training_matrix
from llmgr.params.schema import Params
from llmgr.prior.left_out import LeftOut
from llmgr.prior.slit import Slit, fitted_slit
from llmgr.ranking.loop import Score
from llmgr.runtime.artifacts import load_tensors, read_table
from llmgr.runtime.layout import Layout
from llmgr.sessions.clicks import last_clicks
from llmgr.sessions.reading import catalogue_size, read_split
from llmgr.sessions.tensors import Sessions
from llmgr.text.vectors import click_similarity, principal_components
from llmgr.text.words import catalogue_words

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_array


Over = Callable[[Sessions], Score]
"""A model: given sessions, it returns their score, which maps samples [B] to scores [B, V+1]."""


def popularity(files: Layout, device: torch.device) -> Over:
    """Scores an item by how many interactions it has in the training sessions."""
    count = training_interactions(files).float().to(device)
    return lambda sessions: lambda samples: count.expand(len(samples), -1)


def training_interactions(files: Layout) -> Tensor:
    """The number of training interactions of every item [V+1]; index 0 is padding."""
    train = read_table(files.sessions("train"))
    return torch.from_numpy(training_counts(train, catalogue_size(files.items)))


def item_knn(files: Layout, shrinkage: float, decay: float, device: torch.device) -> Over:
    """Scores an item by its similarity to the clicks, weighted as in `last_clicks` (ItemKNN; Dacrema et al. 2019).

    Similarity is the shrunk cosine of the items' training sessions (`item_similarity`).
    """
    similarity = item_similarity(_training_sessions(files), shrinkage)
    return _similar(lambda clicks: (clicks @ similarity).toarray(), similarity.shape[0] - 1, decay, device)


def session_knn(files: Layout, most: int, decay: float, device: torch.device) -> Over:
    """Scores an item by the summed similarity of those of the `most` nearest training sessions that contain it.

    SKNN of Jannach & Ludewig (RecSys 2017) with `decay` 1; below that V-SKNN (Ludewig & Jannach, UMUAI 2018), whose
    session vector weighs recent clicks more. Deviation: the nearest sessions come from all training sessions, not from
    a sample of recent ones, because timestamps are days and a user is one session. V-SKNN's decay is exponential here,
    as in the other baselines, not linear.
    """
    matrix = _training_sessions(files)

    def over(sessions: Sessions) -> Score:
        def score(samples: Tensor) -> Tensor:
            clicks = last_clicks(sessions.graphs(samples), decay, matrix.shape[1] - 1)
            return torch.from_numpy((neighbours(clicks, matrix, most) @ matrix).toarray()).float().to(device)

        return score

    return over


def _training_sessions(files: Layout) -> csr_array:
    return training_matrix(read_table(files.sessions("train")), catalogue_size(files.items))


def text_knn(files: Layout, text_dim: int, decay: float, device: torch.device) -> Over:
    """Scores an item by the cosine of its text vector to those of the clicks (`click_similarity`).

    The vectors are whitened to `text_dim` components, which removes what all texts share.
    """
    raw = load_tensors(files.item_vectors)["vectors"]
    vectors = F.normalize(principal_components(raw, text_dim, whiten=True), dim=1).to(device)

    def over(sessions: Sessions) -> Score:
        def score(samples: Tensor) -> Tensor:
            return click_similarity(sessions, samples, vectors, decay)

        return score

    return over


def word_knn(files: Layout, decay: float, device: torch.device) -> Over:
    """Scores an item by the words that its title and brand share with those of the clicks (`word_matrix`).

    No language model: text-kNN has to beat it. Clicks are weighted as in `last_clicks`. Sessions are mapped to words
    and then to items, since the similarity of all pairs of items would take memory that grows with V squared.
    """
    matrix = catalogue_words(files.items)
    return _similar(lambda clicks: (matrix @ (clicks @ matrix).toarray().T).T, matrix.shape[0] - 1, decay, device)


def linear_model(params: Params, files: Layout, device: torch.device, formed: LeftOut | None = None
                 ) -> tuple[Slit, Over]:
    """SLIT of the training sessions, and its solution for a session's clicks, computed once a batch for both baselines.

    The inverse solves it where other models need `formed` anyway, else conjugate gradients do.
    """
    decay = params.slit.decay
    train, _ = read_split(files, "train", params.data.max_session)
    model = fitted_slit(train, decay, params.slit.ridge, catalogue_size(files.items), device)
    solve = model.solved if formed is None else lambda clicks: formed.solved(clicks).to(device)
    return model, functools.cache(lambda sessions: once(lambda samples: solve(
        last_clicks(sessions.graphs(samples), decay, model.items))))


def slit(files: Layout, solved: tuple[Slit, Over], text_share: float) -> Over:
    """Scores of the linear item-item model SLIT, shrunk towards `text_share` times the similarity of words.

    `solved` comes from `linear_model`. Closed form, without a network: it shows how far clicks and words go alone.
    """
    model, over = solved
    words = catalogue_words(files.items) if text_share else None
    return lambda sessions: lambda samples: model.scores(over(sessions)(samples), words, text_share)


def _similar(summed: Callable[[csr_array], np.ndarray], items: int, decay: float, device: torch.device) -> Over:
    """Scores an item by `summed`, which maps weighted clicks [B, V+1] to their summed similarity to the item."""
    def over(sessions: Sessions) -> Score:
        def score(samples: Tensor) -> Tensor:
            clicks = last_clicks(sessions.graphs(samples), decay, items)
            return torch.from_numpy(summed(clicks)).float().contiguous().to(device)

        return score

    return over


def repeat(items: int) -> Over:
    """Scores 1 for the clicked items and 0 for the others, so that a gate can learn how often shoppers click again."""
    def over(sessions: Sessions) -> Score:
        def score(samples: Tensor) -> Tensor:
            clicked = sessions.graphs(samples).items_BS
            return torch.zeros(len(samples), items + 1, device=clicked.device).scatter_(1, clicked, 1.0)

        return score

    return over


def once(score: Score) -> Score:
    """The same score, which remembers the last batch: a gate needs the scores that were just ranked by themselves."""
    last: list[Tensor | None] = [None, None]

    def remembered(samples: Tensor) -> Tensor:
        if last[0] is not samples:
            last[:] = samples, score(samples)
        return last[1]

    return remembered
