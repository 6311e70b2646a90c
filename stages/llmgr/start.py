"""What LLMGR's logits start from, before a language model adds to them."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmgr.folds import OutOfFold
from llmgr.linear import LeftOut, LinearTerm, left_out
from llmgr.params import texts_shuffled
from llmgr.tower import Tower

if TYPE_CHECKING:
    from llmgr.graph import Sessions


def linear_term(params: Any, train: Sessions | None, place: torch.device, formed: LeftOut | None = None) -> LinearTerm:
    """The linear model of the training sessions, and with `tune.folds` the base's scores, and with a tower its scores,
    weighted; yet to be fitted.

    `params` has the seed and the model, tune, tower and slit sections; what is `formed` already needs no sessions.
    """
    model = left_out(params.slit, train, texts_shuffled(params)) if formed is None else formed
    base = OutOfFold(params, model.items, place) if params.tune.folds else None
    tower = Tower(params, model.items, place) if params.tower.enabled else None
    return LinearTerm(model, base, tower).to(place)
