"""Gates, ranking, buckets and where results are published."""
from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from llmgr.params.types import (
    Count,
    Mapped,
    Natural,
    NotNegative,
    OptionalText,
    Share,
    Text,
    Whole,
    Wholes,
    Words,
    dataclass,
)
from llmgr.runtime.errors import UserError


@dataclass
class Gate:
    """Late fusion: which models gates fuse, and how they are fitted."""

    fuse: Annotated[dict[Text, Words], Mapped]
    """The models that each gate fuses, by the gate's name; `repeat` is a scorer that marks clicked items."""
    edges: Wholes
    """Lower ends of the bands of training interactions. Each band has its own weights; one more lies below the
    first."""
    sessions: Natural
    """Validation sessions that gates are fitted on, drawn by seed; 0 takes all."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.sessions == 1:
            raise UserError("gate.sessions=1 cannot be halved, and each half is scored by the other's gate: give more, "
                            "or 0 for all")
        if self.edges != sorted(set(self.edges)) or not self.edges or self.edges[0] < 1:
            raise UserError(f"gate.edges={self.edges} must rise from 1 or more: each edge above the one before")
        for name, parts in self.fuse.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise UserError(f"gate.fuse names a gate {name!r}: use letters, digits, - _ and .")
            if not parts or len(set(parts)) < len(parts) or parts == ["repeat"]:
                raise UserError(f"gate.fuse.{name}=[{', '.join(parts)}] must list distinct models")
        return self


@dataclass
class Evaluate:
    """Ranking, and the settings of the neighbour baselines."""

    batch_size: Count
    """Sessions scored at a time."""
    text_dim: Count
    """text-kNN: whitened principal components of the text vectors."""
    decay: Share
    """text-kNN and word-kNN: an item's weight falls by this factor a step back in the session; 0: the last alone."""
    item_shrinkage: NotNegative
    """item-kNN: added to the denominator of the cosine, so that items which few sessions share count for less."""
    item_decay: Share
    """item-kNN: as `decay`."""
    session_neighbours: Count
    """session-kNN: most similar training sessions whose items are scored."""
    session_decay: Share
    """session-kNN: as `decay` in the similarity of sessions; 1 is SKNN, below that V-SKNN."""


@dataclass
class Bucket:
    """The groups of targets that results are reported for, and the tests of differences."""

    ours: Text
    """The model whose differences from all others are tested and reported: `llmgr`, or a gate such as `gated-llmgr`."""
    resamples: Annotated[Whole, Field(ge=100)]
    """Bootstrap resamples of sessions behind every 95% interval and p; no p falls below 2 / (resamples + 1)."""
    cold: Wholes
    """The paper's cold items: fewest and most interactions in the 5-core data, both ends included."""
    warm: Whole
    """The paper's warm items: fewest interactions in the 5-core data."""
    practice: Wholes
    """Lower ends of all but the first practitioner bucket, by interactions in the 5-core data."""
    trained: Wholes
    """The same by interactions in the training sessions."""

    @model_validator(mode="after")
    def check(self) -> Self:
        for name in ("cold", "practice", "trained"):
            edges = getattr(self, name)
            if edges != sorted(set(edges)) or not edges:
                raise UserError(f"bucket.{name}={edges} must rise: one edge at least, each above the one before")
        if len(self.cold) != 2 or self.warm <= self.cold[-1]:
            raise UserError(f"bucket.cold={self.cold} must be a lowest and a highest count below "
                            f"bucket.warm={self.warm}")
        return self


@dataclass
class Track:
    """Where results are published."""

    experiment: Text
    """MLflow experiment that runs are filed under."""
    trials: Words
    """Encoders and controls whose trainings are published as runs of their own, for a search among them."""
    uri: OptionalText
    """Tracking store; null takes MLFLOW_TRACKING_URI, else sqlite under the repository root."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if not self.experiment.strip():
            raise UserError("track.experiment is empty: give the MLflow experiment a name")
        return self
