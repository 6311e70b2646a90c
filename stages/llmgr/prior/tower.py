"""Scores by the item vectors of a tuned text tower.

Shapes: U users.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmgr.params.schema import Params
from llmgr.prior.cross_fitting import fold_of
from llmgr.runtime.artifacts import load_tensors, read_json, rounded
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.text.vectors import click_similarity

if TYPE_CHECKING:
    from llmgr.sessions.tensors import Sessions


def made_of(params: Params, files: Layout) -> dict[str, Any]:
    """The settings that a tower depends on, as its config.json records them."""
    return rounded({"enabled": params.tower.enabled, "encoder": params.tower.encoder, "folds": params.tune.folds,
                    "seed": params.seed, "decay": params.tower.decay, "texts": params.model.texts,
                    "weights": params.model.weights,
                    "backbone": read_json(files.text_encoder / "text_encoder.json")["sha256"]})


class Tower:
    """The text tower's scores of all items; a training session is scored by the tower tuned without its user."""

    def __init__(self, params: Params, files: Layout, items: int, device: torch.device) -> None:
        """Load the item vectors; UserError where they were made with other settings or for another catalogue."""
        self.folder = files.tower
        config = read_json(files.tower / "config.json")
        for key, value in made_of(params, files).items():
            if config.get(key) != value:
                was = "another text encoder" if key == "backbone" else f"{key}={config.get(key)}, not {value}"
                raise UserError(f"{self.folder} was made with {was}: run `dvc repro` to make it anew")
        names = ["whole", *map(str, range(1, config["folds"] + 1))]
        self.vectors = [load_tensors(files.tower / f"{name}.safetensors")["vectors"].to(device) for name in names]
        if len(self.vectors[0]) != items + 1:
            raise UserError(f"{self.folder} has {len(self.vectors[0]) - 1} items, the catalogue {items}: run `dvc "
                            "repro` to make it anew")
        self.decay, self.users = params.tower.decay, config["users"]
        self.scale = len(self.vectors[0]) / float((self.vectors[0].T @ self.vectors[0]).norm())
        self.fold_U = fold_of(self.users, config["folds"], config["seed"]) if config["folds"] else None

    def __call__(self, sessions: Sessions, samples: Tensor, trained: bool) -> Tensor:
        """Scores [R, V+1] of samples [R], scaled to a mean square of 1; `trained` if it was tuned on the sessions.

        UserError where the users are not those that it was tuned on.
        """
        if not trained:
            return click_similarity(sessions, samples, self.vectors[0], self.decay) * self.scale
        if int(sessions.user.max()) != self.users:
            raise UserError(f"{self.folder} was tuned on other users than the sessions have: run `dvc repro` to make "
                            "it anew")
        fold_R = self.fold_U[sessions.user[sessions.row[samples]].cpu()]
        scores = self.vectors[0].new_empty(len(samples), len(self.vectors[0]))
        for fold in fold_R.unique().tolist():
            at = (fold_R == fold).nonzero()[:, 0].to(samples.device)
            scores[at] = click_similarity(sessions, samples[at], self.vectors[1 + fold], self.decay) * self.scale
        return scores
