"""The session encoders: which are trained, how, and each one's own parameters."""
from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Annotated, Literal, Self

from pydantic import model_validator

from llmgr.params.names import STAGES
from llmgr.params.types import (
    Count,
    Flag,
    Layers,
    NotNegative,
    Numbers,
    Positive,
    Rate,
    Several,
    Share,
    Wholes,
    Words,
    dataclass,
)
from llmgr.runtime.errors import UserError


@dataclass
class Fpmc:
    """FPMC (Rendle et al. 2010)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""


@dataclass
class Caser:
    """Caser (Tang & Wang 2018)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    length: Count
    """Last clicks that it reads (L), and the greatest height of a horizontal filter."""
    horizontal: Count
    """Horizontal filters of each height."""
    vertical: Count
    """Vertical filters."""


@dataclass
class Gru4rec:
    """GRU4Rec (Hidasi et al. 2016)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    hidden: Count
    """Width of the GRU's state."""
    layers: Layers
    """Stacked GRU layers, 1 to 5."""


@dataclass
class Narm:
    """NARM (Li et al. 2017)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    hidden: Count
    """Width of the GRU's state."""
    layers: Layers
    """Stacked GRU layers, 1 to 5."""
    session_dropout: Share
    """Dropout of the two encoders' joint output, before the decoder."""


@dataclass
class Stamp:
    """STAMP (Liu et al. 2018)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""


@dataclass
class Sasrec:
    """SASRec (Kang & McAuley 2018)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    layers: Layers
    """Self-attention blocks, 1 to 5."""
    heads: Count
    """Heads of each block; divides encoder.dim."""


@dataclass
class Bsarec:
    """BSARec (Shin et al. 2024)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    layers: Layers
    """Blocks, 1 to 5."""
    heads: Count
    """Heads of each block's self-attention; divides encoder.dim."""
    alpha: Share
    """Weight of the frequency rescaler against self-attention (paper eq. 6)."""
    c: Count
    """The lowest c // 2 + 1 Fourier components of a session are its low frequencies."""


@dataclass
class Srgnn:
    """SR-GNN (Wu et al. 2019)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    gnn_layers: Layers
    """Propagation steps of the gated graph network, 1 to 5."""


@dataclass
class Gcsan:
    """GC-SAN (Xu et al. 2019)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    gnn_layers: Layers
    """Propagation steps of the gated graph network, 1 to 5."""
    attention_layers: Layers
    """Self-attention blocks, 1 to 5."""
    attention_heads: Count
    """Heads of each block; divides encoder.dim."""
    omega: Share
    """Weight of the attention output against the last GNN state in the session vector (paper eq. 12)."""


@dataclass
class Niser:
    """NISER (Gupta et al. 2019)."""

    lr: Rate
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    gnn_layers: Layers
    """Propagation steps of the gated graph network, 1 to 5."""
    sigma: Positive
    """Length of the session vectors: scores are sigma times a cosine (paper eq. 7)."""
    positions: Flag
    """Adds a learned vector for the position of a click, as NISER+."""


@dataclass
class Hcgr:
    """HCGR (Guo et al. 2023)."""

    lr: Rate
    """Peak learning rate of Riemannian Adam; `auto` chooses among encoder.training.rates."""
    gnn_layers: Layers
    """Attention layers over the session graph, 1 to 5."""
    scale: Positive
    """Logits of the softmax are minus so many times the geodesic distances."""
    contrast: NotNegative
    """Weight of the contrastive ranking loss beside the cross-entropy; 0 leaves it out."""
    margin: NotNegative
    """Margin of the ranking loss: how much closer the target should be than other items."""
    negatives: Count
    """Other items drawn for each session's ranking loss."""


@dataclass
class EncoderTraining:
    """How encoders and controls are trained."""

    epochs: Count
    """The largest number of passes over all prefixes; the learning rate falls along a cosine over them."""
    rates: Numbers
    """Peak learning rates to choose from where an encoder's `lr`, or `encoder.text_lr`, is `auto`: by validation
    NDCG@20 with successive rejects (llmgr.training.rates)."""
    rungs: Wholes
    """Epochs after which the worst of these rates is rejected; after the last rung only the best remains."""
    patience: Count
    """Epochs without a better validation NDCG@20 after which training stops."""
    batch_size: Count
    """Prefixes a step."""
    weight_decay: NotNegative
    """Decoupled weight decay of all matrices but the item table."""
    table_decay: NotNegative
    """Decoupled weight decay of the item table: an item that few sessions train falls back on its text (not hcgr)."""
    warmup_share: Share
    """Share of the steps over which the learning rate rises."""
    dropout: Share
    """Dropout inside the encoders."""
    clip: Positive
    """Largest gradient norm."""
    precision: Literal["auto", "fp32", "bf16"]
    """Arithmetic of matrix products; `auto` takes bf16 where the machine multiplies it faster.

    Products of width 64 gain nothing: on a Zen 4 with AVX-512 bf16, SR-GNN and GC-SAN train 0.44 times as fast in it.
    """
    checkpoint_seconds: NotNegative
    """Seconds between checkpoints; an interruption loses no more."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise UserError(f"encoder.training.rates={self.rates} must hold one or more different rates above 0")
        if not self.rungs or self.rungs[0] < 1 or self.rungs != sorted(set(self.rungs)):
            raise UserError(f"encoder.training.rungs={self.rungs} must rise from 1 or more")
        return self


@dataclass
class Encoder:
    """Which session encoders are trained, and their settings."""

    names: Words
    """Session encoders that learn from item ids alone. Gates, folds and a tower that need an untrained model are left
    out, and another base replaces an untrained one; a line says so (`llmgr.params.derived`)."""
    controls: Words
    """Encoders that are trained once more with item vectors that add a linear map of the item's text vector."""
    control_texts: Annotated[list[Literal["text", "shuffled"]], Several]
    """The texts of the controls: `text` (the item's own) and `shuffled` (another item's). A control is called
    NAME-text."""
    linear_controls: Words
    """Encoders that are trained as NAME-linear: with item vectors as NAME-text, over the same linear model as LLMGR's
    prior (`tune.linear`). Without `tune.folds` it is LLMGR's closest counterpart without a language model. Their loss
    is the softmax cross-entropy over all items, whatever the encoder's own."""
    dim: Count
    """Width d of item and session vectors."""
    text_dim: Count
    """Principal components of the text vectors that a control reads."""
    text_lr: Rate
    """Peak learning rate of controls; `auto` chooses one for each among encoder.training.rates. A text map often wants
    smaller steps than an ID table."""
    training: EncoderTraining
    fpmc: Fpmc
    caser: Caser
    gru4rec: Gru4rec
    narm: Narm
    stamp: Stamp
    sasrec: Sasrec
    bsarec: Bsarec
    srgnn: Srgnn
    gcsan: Gcsan
    niser: Niser
    hcgr: Hcgr

    @model_validator(mode="after")
    def check(self) -> Self:
        for key, heads in (("gcsan.attention_heads", self.gcsan.attention_heads), ("sasrec.heads", self.sasrec.heads),
                           ("bsarec.heads", self.bsarec.heads)):
            if self.dim % heads:
                raise UserError(f"encoder.{key}={heads} does not divide encoder.dim={self.dim}; choose a divisor")
        if self.training.weight_decay and "hcgr" in (*self.names, *self.controls, *self.linear_controls):
            raise UserError("encoder.training.weight_decay must be 0 for hcgr: its Riemannian Adam has no decoupled "
                            "decay")
        for key in ("names", "controls", "control_texts", "linear_controls"):
            chosen = getattr(self, key)
            if len(set(chosen)) < len(chosen):
                raise UserError(f"encoder.{key}=[{', '.join(chosen)}] names one twice")
        known = encoders()
        for key in ("names", "controls", "linear_controls"):
            for name in getattr(self, key):
                base, hyphen, _ = name.partition("-")
                if hyphen and base in known:
                    raise UserError(f"encoder.{key} holds {name}: put {base} into encoder.controls and what it reads "
                                    "into encoder.control_texts")
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1, 0.0)[0]
                    raise UserError(f"encoder.{key} holds {name}, which is no encoder; the nearest is {near}")
        return self


def encoders() -> list[str]:
    """Names of all session encoders: the sections under `encoder` beside `training`."""
    hints = typing.get_type_hints(Encoder)
    return [name for name, hint in hints.items() if dataclasses.is_dataclass(hint) and hint is not EncoderTraining]


def trained(section: Encoder) -> list[str]:
    """Names of the models that the `encoder` section asks for: encoders, then controls such as `gcsan-text`."""
    return [*section.names, *(f"{name}-{text}" for name in section.controls for text in section.control_texts),
            *(f"{name}-linear" for name in section.linear_controls)]


def rate_key(name: str) -> str:
    """The key that holds a training's learning rate: `align`, `tune`, `tower`, `backbone`, an encoder or a control.

    Only the first word counts: `gcsan-text without fold 2` learns as gcsan-text.
    """
    base, hyphen, _ = name.split()[0].partition("-")
    own = {"backbone": "llm.scratch.lr"}.get(base, f"{base if base in STAGES else f'encoder.{base}'}.lr")
    return "encoder.text_lr" if hyphen else own
