"""What is compared: the untrained floor, every encoder, LLMGR and their gates, as scores of all items for a session."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.artifacts import load_tensors, read_json, read_table
from llmgr.encoders import check_users, family, load_encoder
from llmgr.errors import UserError
from llmgr.gate import REPEAT, Gate, bands
from llmgr.graph import Sessions, catalogue_size, padded, read_split
from llmgr.linear import LeftOut, LinearTerm, Slit, fitted_slit, left_out
from llmgr.neighbours import (
    catalogue_words,
    item_similarity,
    last_clicks,
    likeness,
    neighbours,
    training_matrix,
)
from llmgr.params import START, TOWER, texts_shuffled, trained
from llmgr.pretraining import Score, scoring
from llmgr.sessions import training_counts
from llmgr.start import linear_term
from llmgr.text_vectors import principal_components
from llmgr.tower import Tower
from llmgr.training import hardware, peak_memory_mb

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from scipy.sparse import csr_array

Over = Callable[[Sessions], Score]
Formed = Callable[[int | None], LeftOut]
"""The linear model, formed once for all that ask; by what shuffles the texts."""


def scorers(params: Any, device: torch.device) -> dict[str, Callable[[], Over]]:
    """By model name, in the report's order: what loads it; that gives sessions -> samples -> scores [B, V+1]."""
    items = catalogue_size("data/core/items.parquet")

    @functools.cache
    def formed(shuffle: int | None) -> LeftOut:
        train, _ = read_split("train", params.data.max_session)
        return left_out(params.slit, train, shuffle)

    others = (params.tune.linear and texts_shuffled(params) is None) or params.encoder.linear_controls
    solved = functools.cache(lambda: linear_model(params, device, formed(None) if others else None))
    found: dict[str, Callable[[], Over]] = {
        "pop": lambda: popularity(device),
        "item-knn": lambda: item_knn(params.evaluate.item_shrinkage, params.evaluate.item_decay, device),
        "session-knn": lambda: session_knn(params.evaluate.session_neighbours, params.evaluate.session_decay, device),
        "text-knn": lambda: text_knn(params.evaluate.text_dim, params.evaluate.decay, device),
        "word-knn": lambda: word_knn(params.evaluate.decay, device),
        "slit": lambda: slit(solved(), 0.0),
        "slit-text": lambda: slit(solved(), params.slit.text)}
    if params.tower.enabled:
        found[TOWER] = lambda: tower(params, items, device)
    for name in trained(params.encoder):
        found[name] = lambda name=name: encoder(name, items, device, formed)
    if params.tune.linear:
        found[START] = lambda: started(params, device, formed)
    found["llmgr"] = lambda: llmgr(params, device, formed)
    return found


def popularity(device: torch.device) -> Over:
    """Scores an item by its interactions in the training sessions."""
    count = training_interactions().float().to(device)
    return lambda sessions: lambda samples: count.expand(len(samples), -1)


def training_interactions() -> Tensor:
    """How often every item was trained on, [V+1]; index 0 is padding."""
    train = read_table("data/sessions/train.parquet")
    return torch.from_numpy(training_counts(train, catalogue_size("data/core/items.parquet")))


def item_knn(shrinkage: float, decay: float, device: torch.device) -> Over:
    """Scores an item by its similarity to the clicks, weighted by `decay` a step back (ItemKNN; Dacrema et al. 2019).

    Untrained: similarity is the shrunk cosine of the items' training sessions.
    """
    similarity = item_similarity(_training_sessions(), shrinkage)
    return _similar(lambda clicks: (clicks @ similarity).toarray(), similarity.shape[0] - 1, decay, device)


def session_knn(most: int, decay: float, device: torch.device) -> Over:
    """Scores an item by the summed similarity of the session's nearest training sessions that hold it.

    Untrained: SKNN of Jannach & Ludewig (RecSys 2017) where `decay` is 1; below that V-SKNN (Ludewig & Jannach, UMUAI
    2018), whose session vector weighs recent clicks more.
    Deviation: the nearest are taken from all training sessions, not from a sample of recent ones: timestamps are of
    days, and a user is one session. V-SKNN's decay is exponential here, as in the other floors, not linear.
    """
    matrix = _training_sessions()

    def over(sessions: Sessions) -> Score:
        def score(samples: Tensor) -> Tensor:
            clicks = last_clicks(sessions.graphs(samples), decay, matrix.shape[1] - 1)
            return torch.from_numpy((neighbours(clicks, matrix, most) @ matrix).toarray()).float().to(device)

        return score

    return over


def _training_sessions() -> csr_array:
    return training_matrix(read_table("data/sessions/train.parquet"), catalogue_size("data/core/items.parquet"))


def text_knn(text_dim: int, decay: float, device: torch.device) -> Over:
    """Scores an item by the cosine of its text vector to those of the clicks, weighted by `decay` a step back.

    Untrained. The vectors are whitened to `text_dim` components, which takes away what all texts share.
    """
    raw = load_tensors("models/backbone/item_text.safetensors")["vectors"]
    vectors = F.normalize(principal_components(raw, text_dim, whiten=True), dim=1).to(device)

    def over(sessions: Sessions) -> Score:
        def score(samples: Tensor) -> Tensor:
            return likeness(sessions, samples, vectors, decay)

        return score

    return over


def tower(params: Any, items: int, device: torch.device) -> Over:
    """Scores an item by the cosine of its text's tuned vector to those of the clicks (`llmgr.tower`)."""
    model = Tower(params, items, device)
    return lambda sessions: lambda samples: model(sessions, samples, False)


def word_knn(decay: float, device: torch.device) -> Over:
    """Scores an item by the words that its title and brand share with those of the clicks (see `word_matrix`).

    Untrained, and without a language model: what text-kNN has to beat. An earlier click weighs `decay` less a step.
    A batch goes by way of the words: the likeness of all pairs of items would take memory that grows with V squared.
    """
    matrix = catalogue_words()
    return _similar(lambda clicks: (matrix @ (clicks @ matrix).toarray().T).T, matrix.shape[0] - 1, decay, device)


def linear_model(params: Any, device: torch.device, formed: LeftOut | None = None) -> tuple[Slit, Over]:
    """SLIT of the training sessions, and what solves it for a session's clicks, once for all who ask of a batch.

    By the inverse where it is `formed` for other models anyway, else by conjugate gradients.
    """
    decay = params.slit.decay
    train, _ = read_split("train", params.data.max_session)
    model = fitted_slit(train, decay, params.slit.ridge, catalogue_size("data/core/items.parquet"), device)
    solve = model.solved if formed is None else lambda clicks: formed.solved(clicks).to(device)
    return model, functools.cache(lambda sessions: once(lambda samples: solve(
        last_clicks(sessions.graphs(samples), decay, model.items))))


def slit(solved: tuple[Slit, Over], text_share: float) -> Over:
    """Scores of the linear item-item model SLIT (`linear_model`), with `text_share` shrunk to the likeness of words.

    Closed form, no gradient, no language model: how far clicks and words go without a network.
    """
    model, over = solved
    words = catalogue_words() if text_share else None
    return lambda sessions: lambda samples: model.scores(over(sessions)(samples), words, text_share)


def _similar(summed: Callable[[csr_array], np.ndarray], items: int, decay: float, device: torch.device) -> Over:
    """Scores an item by its similarity to the clicks, weighted by `decay` a step back; `summed` sums it, [B, V+1]."""
    def over(sessions: Sessions) -> Score:
        def score(samples: Tensor) -> Tensor:
            clicks = last_clicks(sessions.graphs(samples), decay, items)
            return torch.from_numpy(summed(clicks)).float().contiguous().to(device)

        return score

    return over


def encoder(name: str, items: int, device: torch.device, formed: Formed | None = None) -> Over:
    """Scores of a pretrained encoder: inner products of its session and item vectors, over its linear term if any."""
    folder = Path("models/encoders") / name
    module, vectors = load_encoder(folder, items)
    module, vectors = module.to(device).eval(), vectors.to(device)
    term = None
    if family(name)[1] == "linear":
        term = LinearTerm(formed(None))
        term.load_state_dict(load_tensors(folder / "linear.safetensors"))
        term.to(device)

    def over(sessions: Sessions) -> Score:
        check_users(module, folder, sessions)
        return scoring(module, vectors, sessions, term)

    return over


def llmgr(params: Any, device: torch.device, formed: Formed) -> Over:
    """Scores of the tuned LLMGR, in the arithmetic that it was tuned in, whatever this machine would choose."""
    from llmgr.adapters import join_products
    from llmgr.llmgr import build_llmgr, load_llmgr
    from llmgr.training import arithmetic
    from llmgr.tuning import Scorer, behaviour_prompts

    folder = Path("models/tuned")
    dtype = arithmetic(read_json(folder / "config.json").get("precision", params.tune.precision))
    model = build_llmgr(params.model, dtype, params.seed)
    if params.tune.linear:
        model.linear_term = own_term(params, device, formed)
    load_llmgr(folder, model, params.model)
    join_products(model.language_model)
    prompts = behaviour_prompts(params, params.tune)

    def over(sessions: Sessions) -> Score:
        check_users(model.encoder, "models/embeddings", sessions)
        return Scorer(model.to(device).eval(), prompts, sessions, dtype)

    return over


def own_term(params: Any, device: torch.device, formed: Formed) -> LinearTerm:
    """The linear term of LLMGR, its weights yet to be loaded."""
    return linear_term(params, None, device, formed(texts_shuffled(params)))


def started(params: Any, device: torch.device, formed: Formed) -> Over:
    """Scores of what LLMGR's logits started from: no language model but for a tower of one."""
    term = own_term(params, device, formed)
    kept = load_tensors("models/tuned/start.safetensors")
    if kept.keys() != term.state_dict().keys():
        raise UserError("models/tuned started from other scores than tune.folds and tower.enabled ask for: run `dvc "
                        "repro` to train it anew")
    term.load_state_dict(kept)
    return lambda sessions: lambda samples: term(sessions, samples)


def parts(params: Any, device: torch.device) -> dict[str, Callable[[], Over]]:
    """`scorers`, and what a gate alone may fuse."""
    return scorers(params, device) | {REPEAT: lambda: repeat(catalogue_size("data/core/items.parquet"))}


def repeat(items: int) -> Over:
    """1 for the clicked items, 0 for the others: what a gate needs to learn whether shoppers click anything twice."""
    def over(sessions: Sessions) -> Score:
        def score(samples: Tensor) -> Tensor:
            clicked = sessions.graphs(samples).items_BS
            return torch.zeros(len(samples), items + 1, device=clicked.device).scatter_(1, clicked, 1.0)

        return score

    return over


def gated(name: str, params: Any, device: torch.device, shared: dict[str, Over]) -> Over:
    """Scores of the gate `name` of gate.fuse; `shared` holds its scorers, which others may use, too."""
    gate = Gate.load(Path("models/gates") / f"{name}.json", params.gate.fuse[name], params.gate.edges)
    band_V = bands(training_interactions(), gate.edges).to(device)

    def over(sessions: Sessions) -> Score:
        scores = [shared[part](sessions) for part in gate.scorers]
        return lambda samples: gate([score(samples) for score in scores], band_V)

    return over


def loaded(params: Any, device: torch.device) -> dict[str, Over]:
    """Every model, loaded, then the gates of gate.fuse by name; what a gate fuses scores a batch once for all."""
    fused = {name for names in params.gate.fuse.values() for name in names}
    made = {name: make() for name, make in parts(params, device).items() if name != REPEAT or REPEAT in fused}
    models = {name: over for name, over in made.items() if name != REPEAT}
    shared = {name: functools.cache(lambda sessions, over=made[name]: once(over(sessions))) for name in fused}
    gates = {name: gated(name, params, device, shared) for name in params.gate.fuse}
    return models | {name: over for name, over in shared.items() if name in models} | gates


def once(score: Score) -> Score:
    """The same scorer, which remembers the last batch: a gate asks for what has been ranked by itself just before."""
    last: list[Tensor | None] = [None, None]

    def remembered(samples: Tensor) -> Tensor:
        if last[0] is not samples:
            last[:] = samples, score(samples)
        return last[1]

    return remembered


def seen_items(frame: pl.DataFrame) -> Tensor:
    """All items a user had before the target, window and earlier, [sessions, longest], 0 pads."""
    import polars as pl

    return padded(frame.select(pl.concat_list("earlier", "items").alias("seen"))["seen"])


def scoring_cost(start: float, seconds: dict[str, float], scored: int, parameters: int = 0) -> dict[str, Any]:
    """The cost file, as training.cost, of what began at `start` (monotonic) and scored so many sessions in all."""
    total = time.monotonic() - start
    return {"seconds": total, "seconds_by_model": seconds, "samples_per_second": scored / total,
            "tokens_per_second": None, "peak_memory_mb": peak_memory_mb(), "trainable_parameters": parameters,
            "total_parameters": parameters, "hardware": hardware()}
