"""Every model that is compared, as scores of all items for a session."""
from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmgr.encoders.pretraining import scoring
from llmgr.encoders.registry import check_users, family, load_encoder
from llmgr.evaluation.baselines import (
    Over,
    item_knn,
    linear_model,
    once,
    popularity,
    repeat,
    session_knn,
    slit,
    text_knn,
    training_interactions,
    word_knn,
)
from llmgr.evaluation.gate import Gate, bands
from llmgr.params.encoders import trained
from llmgr.params.names import PRIOR, REPEAT, SERVED, TOWER
from llmgr.prior.left_out import LeftOut, left_out
from llmgr.prior.tower import Tower
from llmgr.prior.weighted_sum import Prior, build_prior
from llmgr.ranking.loop import Score
from llmgr.runtime.artifacts import load_tensors, read_json
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.serving.package import FOLDER, load_package
from llmgr.serving.scoring import Scorer
from llmgr.sessions.reading import catalogue_size, read_split
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import texts_shuffled

Formed = Callable[[int | None], LeftOut]
"""The linear model, formed once for all that ask; by what shuffles the texts."""


def scorers(params: Any, files: Layout, device: torch.device) -> dict[str, Callable[[], Over]]:
    """By model name, in the report's order: what loads it; that gives sessions -> samples -> scores [B, V+1]."""
    items = catalogue_size(files.items)

    @functools.cache
    def formed(shuffle: int | None) -> LeftOut:
        train, _ = read_split(files, "train", params.data.max_session)
        return left_out(params.slit, files, train, shuffle)

    others = (params.tune.linear and texts_shuffled(params) is None) or params.encoder.linear_controls
    solved = functools.cache(lambda: linear_model(params, files, device, formed(None) if others else None))
    found: dict[str, Callable[[], Over]] = {
        "pop": lambda: popularity(files, device),
        "item-knn": lambda: item_knn(files, params.evaluate.item_shrinkage, params.evaluate.item_decay, device),
        "session-knn": lambda: session_knn(files, params.evaluate.session_neighbours, params.evaluate.session_decay,
                                           device),
        "text-knn": lambda: text_knn(files, params.evaluate.text_dim, params.evaluate.decay, device),
        "word-knn": lambda: word_knn(files, params.evaluate.decay, device),
        "slit": lambda: slit(files, solved(), 0.0),
        "slit-text": lambda: slit(files, solved(), params.slit.text)}
    if params.tower.enabled:
        found[TOWER] = lambda: tower(params, files, items, device)
    for name in trained(params.encoder):
        found[name] = lambda name=name: encoder(files.encoder(name), items, device, formed)
    if params.tune.linear:
        found[PRIOR] = lambda: fitted_prior(params, files, device, formed)
    found["llmgr"] = lambda: llmgr(params, files, device, formed)
    found[SERVED] = lambda: served(items)
    return found


def tower(params: Any, files: Layout, items: int, device: torch.device) -> Over:
    """Scores an item by the cosine of its text's tuned vector to those of the clicks (`llmgr.prior.tower`)."""
    model = Tower(params, files, items, device)
    return lambda sessions: lambda samples: model(sessions, samples, False)


def encoder(folder: Path, items: int, device: torch.device, formed: Formed | None = None) -> Over:
    """Scores of a pretrained encoder: inner products of its session and item vectors, over its offset if any."""
    module, vectors = load_encoder(folder, items)
    module, vectors = module.to(device).eval(), vectors.to(device)
    offset = None
    if family(folder.name)[1] == "linear":
        offset = Prior(formed(None))
        offset.load_state_dict(load_tensors(folder / "offset.safetensors"))
        offset.to(device)

    def over(sessions: Sessions) -> Score:
        check_users(module, folder, sessions)
        return scoring(module, vectors, sessions, offset)

    return over


def llmgr(params: Any, files: Layout, device: torch.device, formed: Formed) -> Over:
    """Scores of the tuned LLMGR, in the arithmetic that it was tuned in, whatever this machine would choose."""
    from llmgr.model.building import build_ranker
    from llmgr.training.precision import arithmetic

    dtype = arithmetic(read_json(files.tuned / "config.json").get("precision", params.tune.precision))
    prior = own_prior(params, files, device, formed) if params.tune.linear else None
    model = build_ranker(params, files, dtype, device, prior, weights=files.tuned).eval()
    model.llmgr.execution.join_products()

    def over(sessions: Sessions) -> Score:
        check_users(model.llmgr.encoder, "model.base", sessions)
        return model.over(sessions)

    return over


def own_prior(params: Any, files: Layout, device: torch.device, formed: Formed) -> Prior:
    """LLMGR's prior, its weights yet to be loaded."""
    return build_prior(params, files, None, device, formed(texts_shuffled(params)))


def fitted_prior(params: Any, files: Layout, device: torch.device, formed: Formed) -> Over:
    """Scores of LLMGR's prior as it was fitted before stage 2: no language model but for a tower of one."""
    prior = own_prior(params, files, device, formed)
    weights = load_tensors(files.tuned / "prior.safetensors")
    if weights.keys() != prior.state_dict().keys():
        raise UserError(f"{files.tuned} has another prior than tune.folds and tower.enabled ask for: run `dvc repro` "
                        "to train it anew")
    prior.load_state_dict(weights)
    return lambda sessions: lambda samples: prior(sessions, samples)


def served(items: int) -> Over:
    """Scores of the package in models/recommender, which knows no user, on the CPU as it is served."""
    package = load_package(FOLDER)
    if len(package.items) != items:
        raise UserError(f"{FOLDER} has {len(package.items)} items, the catalogue {items}: run `dvc repro` to write it "
                        "anew")
    scorer = Scorer(package)

    def over(sessions: Sessions) -> Score:
        here = sessions.to("cpu")
        return lambda samples: scorer(here.graphs(samples.cpu())).to(samples.device)

    return over


def parts(params: Any, files: Layout, device: torch.device) -> dict[str, Callable[[], Over]]:
    """`scorers`, and what a gate alone may fuse."""
    return scorers(params, files, device) | {REPEAT: lambda: repeat(catalogue_size(files.items))}


def gated(name: str, params: Any, files: Layout, device: torch.device, shared: dict[str, Over]) -> Over:
    """Scores of the gate `name` of gate.fuse; `shared` holds its scorers, which others may use, too."""
    gate = Gate.load(files.gates / f"{name}.json", params.gate.fuse[name], params.gate.edges)
    band_V = bands(training_interactions(files), gate.edges).to(device)

    def over(sessions: Sessions) -> Score:
        scores = [shared[part](sessions) for part in gate.scorers]
        return lambda samples: gate([score(samples) for score in scores], band_V)

    return over


def loaded(params: Any, files: Layout, device: torch.device) -> dict[str, Over]:
    """Every model, loaded, then the gates of gate.fuse by name; what a gate fuses scores a batch once for all."""
    fused = {name for names in params.gate.fuse.values() for name in names}
    made = {name: make() for name, make in parts(params, files, device).items() if name != REPEAT or REPEAT in fused}
    models = {name: over for name, over in made.items() if name != REPEAT}
    shared = {name: functools.cache(lambda sessions, over=made[name]: once(over(sessions))) for name in fused}
    gates = {name: gated(name, params, files, device, shared) for name in params.gate.fuse}
    return models | {name: over for name, over in shared.items() if name in models} | gates
