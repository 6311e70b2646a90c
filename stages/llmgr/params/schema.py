"""params.yaml as frozen dataclasses: every key typed, bounded, documented, checked, before any work starts.

Defaults live in params.yaml alone, so every key must stand there. The docstring below a field is its documentation;
its type (`llmgr.params.types`) says what is accepted. A section's `check` holds what ties several of its keys.
"""
from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from llmgr.params.data import Data, Filter, Split
from llmgr.params.encoders import Encoder
from llmgr.params.evaluation import Bucket, Evaluate, Gate, Track
from llmgr.params.models import Llm, Model, TextEncoder
from llmgr.params.training import Align, Launch, Slit, Tower, Tune
from llmgr.params.types import Seed, dataclass
from llmgr.runtime.errors import UserError


@dataclass
class Params:
    """All of params.yaml. `view` gives a stage the keys that it declares."""

    seed: Seed
    """Everything random derives from it."""
    data: Data
    filter: Filter
    split: Split
    encoder: Encoder
    llm: Llm
    text_encoder: TextEncoder
    model: Model
    align: Align
    tune: Tune
    tower: Tower
    slit: Slit
    launch: Launch
    gate: Gate
    evaluate: Evaluate
    bucket: Bucket
    track: Track

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.tower.enabled and self.tower.batch_size <= self.data.max_session:
            raise UserError(f"tower.batch_size={self.tower.batch_size} may hold one session alone, whose targets are "
                            f"not told from each other: set more than data.max_session={self.data.max_session}")
        if self.filter.unseen_share and not (self.tower.enabled and self.tower.encoder == "tokens"):
            raise UserError(f"filter.unseen_share={self.filter.unseen_share} needs a package that reads new texts: set "
                            "tower.enabled=true and tower.encoder=tokens, or filter.unseen_share=0")
        return self

    def view(self, keys: Sequence[str]) -> Params:
        """The parameters under `keys` (`seed`, `tune`, `data.max_session`); reading another is an AttributeError."""
        result = types.SimpleNamespace()
        for key in keys:
            *parents, leaf = key.split(".")
            source, branch = self, result
            for depth, name in enumerate([*parents, leaf]):
                known = vars(source) if dataclasses.is_dataclass(source) else {}
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1, 0.0) or [""]
                    nearest = ".".join([*parents[:depth], near[0]]).rstrip(".")
                    raise UserError(f"params.yaml has no section {key}; the nearest is {nearest}")
                source = known[name]
                if depth < len(parents):
                    branch = vars(branch).setdefault(name, types.SimpleNamespace())
            setattr(branch, leaf, source)
        return result
