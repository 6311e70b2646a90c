"""Every model that is compared, as scores of all items for a session."""
from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

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
from llmgr.params.schema import Params
from llmgr.prior.left_out import LeftOut, left_out
from llmgr.prior.tower import Tower
from llmgr.prior.weighted_sum import Prior, build_prior, load_fitted
from llmgr.ranking.loop import Score
from llmgr.runtime.artifacts import load_tensors, read_json
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.serving.package import load_package
from llmgr.serving.scoring import Scorer
from llmgr.sessions.reading import catalogue_size, read_split
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import texts_shuffled

Formed = Callable[[int | None], LeftOut]
"""Returns the linear model for the seed that shuffles the texts (None: not shuffled); it is formed once for all."""


def scorers(params: Params, files: Layout, device: torch.device) -> dict[str, Callable[[], Over]]:
    """A loader of every model, by name in the report's order."""
    items = catalogue_size(files.items)

    @functools.cache
    def formed(shuffle: int | None) -> LeftOut:
        train, _ = read_split(files, "train", params.data.max_session)
        return left_out(params.slit, files, train, shuffle)

    others = (params.tune.linear and texts_shuffled(params) is None) or params.encoder.linear_controls
    solved = functools.cache(lambda: linear_model(params, files, device, formed(None) if others else None))
    models: dict[str, Callable[[], Over]] = {
        "pop": lambda: popularity(files, device),
        "item-knn": lambda: item_knn(files, params.evaluate.item_shrinkage, params.evaluate.item_decay, device),
        "session-knn": lambda: session_knn(files, params.evaluate.session_neighbours, params.evaluate.session_decay,
                                           device),
        "text-knn": lambda: text_knn(files, params.evaluate.text_dim, params.evaluate.decay, device),
        "word-knn": lambda: word_knn(files, params.evaluate.decay, device),
        "slit": lambda: slit(files, solved(), 0.0),
        "slit-text": lambda: slit(files, solved(), params.slit.text)}
    if params.tower.enabled:
        models[TOWER] = lambda: tower(params, files, items, device)
    for name in trained(params.encoder):
        models[name] = lambda name=name: encoder(files.encoder(name), items, device, formed)
    if params.tune.linear:
        models[PRIOR] = lambda: fitted_prior(params, files, device, formed)
    models["llmgr"] = lambda: llmgr(params, files, device, formed)
    models[SERVED] = lambda: served(files, items)
    return models


def tower(params: Params, files: Layout, items: int, device: torch.device) -> Over:
    """Scores of the text tower (`llmgr.prior.tower`)."""
    model = Tower(params, files, items, device)
    return lambda sessions: lambda samples: model(sessions, samples, False)


def encoder(folder: Path, items: int, device: torch.device, formed: Formed | None = None) -> Over:
    """Scores of a pretrained encoder: inner products of its session and item vectors, plus its offset if it has one."""
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


def llmgr(params: Params, files: Layout, device: torch.device, formed: Formed) -> Over:
    """Scores of the tuned LLMGR, in the precision that it was tuned in."""
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


def own_prior(params: Params, files: Layout, device: torch.device, formed: Formed) -> Prior:
    """LLMGR's prior; its weights are loaded later."""
    return build_prior(params, files, None, device, formed(texts_shuffled(params)))


def fitted_prior(params: Params, files: Layout, device: torch.device, formed: Formed) -> Over:
    """Scores of LLMGR's prior as it was fitted before stage 2. UserError where it has other parts than `params`."""
    prior = load_fitted(own_prior(params, files, device, formed), files.tuned)
    return lambda sessions: lambda samples: prior(sessions, samples)


def served(files: Layout, items: int) -> Over:
    """Scores of the package, which knows no user, on the CPU as it is served. UserError for another catalogue."""
    package = load_package(files.recommender)
    if len(package.items) != items:
        raise UserError(f"{files.recommender} has {len(package.items)} items, the catalogue {items}: run `dvc repro` "
                        "to write it anew")
    scorer = Scorer(package)

    def over(sessions: Sessions) -> Score:
        here = sessions.to("cpu")
        return lambda samples: scorer(here.graphs(samples.cpu())).to(samples.device)

    return over


def parts(params: Params, files: Layout, device: torch.device) -> dict[str, Callable[[], Over]]:
    """`scorers`, and `repeat`, which only gates use."""
    return scorers(params, files, device) | {REPEAT: lambda: repeat(catalogue_size(files.items))}


def gated(name: str, params: Params, files: Layout, device: torch.device, shared: dict[str, Over]) -> Over:
    """Scores of the gate `name` of gate.fuse; `shared` holds the models that gates fuse."""
    gate = Gate.load(files.gates / f"{name}.json", params.gate.fuse[name], params.gate.edges)
    band_V = bands(training_interactions(files), gate.edges).to(device)

    def over(sessions: Sessions) -> Score:
        scores = [shared[part](sessions) for part in gate.scorers]
        return lambda samples: gate([score(samples) for score in scores], band_V)

    return over


def loaded(params: Params, files: Layout, device: torch.device) -> dict[str, Over]:
    """All models and then the gates of gate.fuse, loaded. A model that gates fuse scores a batch only once."""
    fused = {name for names in params.gate.fuse.values() for name in names}
    made = {name: make() for name, make in parts(params, files, device).items() if name != REPEAT or REPEAT in fused}
    models = {name: over for name, over in made.items() if name != REPEAT}
    shared = {name: functools.cache(lambda sessions, over=made[name]: once(over(sessions))) for name in fused}
    gates = {name: gated(name, params, files, device, shared) for name in params.gate.fuse}
    return models | {name: over for name, over in shared.items() if name in models} | gates
