"""Parameters that follow from others: what needs an untrained part is left out or replaced."""
from __future__ import annotations

import dataclasses
from typing import NamedTuple

from llmgr.params.checks import one_of
from llmgr.params.encoders import encoders, trained
from llmgr.params.names import BASELINES, PRIOR, REPEAT, SERVED, STAGES, TOWER, WHOLE
from llmgr.params.schema import Params
from llmgr.runtime.errors import UserError

TEXTS = ("text", "shuffled", "linear")  # what may follow an encoder's name


class Derived(NamedTuple):
    """Parameters that can be carried out, and a line on each difference from the given ones."""

    params: Params
    lines: list[str]


def derived(given: Params) -> Derived:
    """Leave out or replace what other parameters do not provide.

    Another base replaces a `model.base` that is not trained; LLMGR replaces a `bucket.ours` that is not made. Folds
    without a prior, a tower beside a prior without folds, and gates of models that are not made are left out. UserError
    for names that no parameters could make.
    """
    lines: list[str] = []
    params = _with_base(given, lines)
    if params.tune.folds and not params.tune.linear:
        lines.append(f"tune.folds={params.tune.folds} left out: it adds to the prior, which tune.linear=false "
                     "takes away")
        params = dataclasses.replace(params, tune=dataclasses.replace(params.tune, folds=0))
    if params.tower.enabled and params.tune.linear and not params.tune.folds:
        lines.append("tower left out: the logits can start from its scores only where tune.folds is at least 2, or "
                     "tune.linear=false")
        params = dataclasses.replace(params, tower=dataclasses.replace(params.tower, enabled=False))
    params = _with_gates(params, lines)
    made = [*models(params), SERVED, *params.gate.fuse]
    if params.bucket.ours not in made:
        one_of([*possible(), SERVED, *given.gate.fuse], params.bucket.ours, "bucket.ours",
               "which is not among the models compared")
        lines.append(f"bucket.ours={params.bucket.ours} is not made here: llmgr is compared in its place")
        params = dataclasses.replace(params, bucket=dataclasses.replace(params.bucket, ours="llmgr"))
    return Derived(params, lines)


def cross_fits(base: str) -> bool:
    """Whether a base can be cross-fitted, that is, trained without a part of the users."""
    encoder, _, text = base.partition("-")
    return encoder not in WHOLE and text != "linear"


def base_scores(params: Params) -> bool:
    """Whether LLMGR's prior has its base's scores."""
    return params.tune.folds > 0 and cross_fits(params.model.base)


def models(params: Params) -> list[str]:
    """Every model that these parameters make except gates, in the order of all tables."""
    return [*BASELINES, *([TOWER] if params.tower.enabled else []), *trained(params.encoder),
            *([PRIOR] if params.tune.linear else []), "llmgr"]


def possible() -> list[str]:
    """Every model that some parameters could make except gates."""
    return [*BASELINES, TOWER, *(name for base in encoders() for name in (base, *(f"{base}-{text}" for text in TEXTS))),
            PRIOR, "llmgr"]


def _with_base(params: Params, lines: list[str]) -> Params:
    base, known = params.model.base, trained(params.encoder)
    if not known:
        raise UserError("encoder.names is empty, and so are encoder.controls and encoder.linear_controls: LLMGR reads "
                        "an encoder, name one such as 'encoder.names=[gcsan]'")
    if base not in known:
        one_of(possible()[len(BASELINES) + 1:-2], base, "model.base", "which is no encoder")
        own = base.partition("-")[0]
        base = own if own in known else known[0]
        lines.append(f"model.base={base} in place of {params.model.base}, which encoder.names, encoder.controls and "
                     "encoder.control_texts do not train")
        params = dataclasses.replace(params, model=dataclasses.replace(params.model, base=base))
    if params.tune.folds and params.tune.linear and not cross_fits(base):
        reason = WHOLE.get(base.partition("-")[0], "has a linear model of its own")
        lines.append(f"tune.folds={params.tune.folds} leaves the scores of model.base={base} out, which {reason}")
    return params


def _with_gates(params: Params, lines: list[str]) -> Params:
    made, parts_known = models(params), [*possible(), REPEAT]
    fuse = {}
    for name, parts in params.gate.fuse.items():
        if name in (*possible(), REPEAT, SERVED, *STAGES):
            raise UserError(f"gate.fuse names a gate {name}, which is a model or a stage already: choose another name")
        for part in parts:
            one_of(parts_known, part, f"gate.fuse.{name}", "which is no model")
        missing = next((part for part in parts if part not in (*made, REPEAT)), None)
        if missing is None:
            fuse[name] = parts
        else:
            lines.append(f"gate {name} left out: it needs {missing}, which {_maker(missing)}")
    return dataclasses.replace(params, gate=dataclasses.replace(params.gate, fuse=fuse))


def _maker(model: str) -> str:
    """The parameters that would have made a model, as the end of a sentence."""
    if model == TOWER:
        return "tower.enabled and tune.folds do not make"
    if model == PRIOR:
        return "tune.linear=false does not make"
    text = model.partition("-")[2]
    key = {"": "encoder.names", "linear": "encoder.linear_controls", "text": "encoder.controls",
           "shuffled": "encoder.controls with encoder.control_texts"}[text]
    return f"{key} does not train"
