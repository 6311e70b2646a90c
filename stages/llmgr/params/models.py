"""The language model of the prompts, the text encoder, and LLMGR over them."""
from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmgr.params.types import (
    Count,
    Flag,
    Natural,
    NotNegative,
    OptionalText,
    Positive,
    Share,
    Text,
    Whole,
    Words,
    dataclass,
)
from llmgr.runtime.errors import UserError


@dataclass
class Scratch:
    """The small LLaMA that `llm.name=scratch` trains."""

    layers: Count
    """Decoder blocks of the small LLaMA."""
    width: Count
    """Hidden width."""
    heads: Count
    """Attention heads; divides the width."""
    vocabulary: Annotated[Whole, Field(ge=300)]
    """Entries of its BPE tokenizer."""
    epochs: Count
    """Passes over the item texts."""
    lr: Positive
    """Peak learning rate."""
    weight_decay: NotNegative
    """Decoupled weight decay of matrices."""
    warmup_share: Share
    """Share of the steps over which the learning rate rises."""
    clip: Positive
    """Largest gradient norm."""
    batch_size: Count
    """Texts a step."""
    checkpoint_seconds: NotNegative
    """Seconds between checkpoints; an interruption loses at most so much."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.width % (2 * self.heads):
            raise UserError(f"llm.scratch.heads={self.heads}: llm.scratch.width={self.width} must be a multiple of "
                            "twice the heads (rotary positions need an even head width)")
        return self


@dataclass
class Llm:
    """The language model."""

    name: Text
    """The language model of the prompts: hub id (owner/model), local folder with safetensors, or `scratch`: a small
    LLaMA trained on the texts."""
    revision: Text
    """Hub revision; what it resolved to is recorded in models/backbone/backbone.json."""
    scratch: Scratch

    @model_validator(mode="after")
    def check(self) -> Self:
        if not self.name.strip():
            raise UserError("llm.name is empty: give a hub id, a folder or scratch")
        return self


@dataclass
class TextEncoder:
    """The model whose vectors of item texts the controls, text-kNN, the tower and LLMGR's items output read."""

    name: OptionalText
    """As `llm.name`; null takes the language model of the prompts. With a name, one varies while the other stays."""
    revision: Text
    """Hub revision; what it resolved to is recorded in models/text_encoder/text_encoder.json."""
    max_text_tokens: Count
    """Tokens of an item's text that its text vector is made of."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.name is not None and not self.name.strip():
            raise UserError("text_encoder.name is empty: give a hub id, a folder, scratch, or null for llm.name")
        return self


@dataclass
class Model:
    """LLMGR: adapters, readout, output layer and texts."""

    base: Text
    """The pretrained encoder whose item vectors and session graph LLMGR reads: `gcsan`, or a control's `gcsan-text`."""
    lora_r: Natural
    """Rank of the LoRA adapters; 0 trains no adapter (the language model stays frozen)."""
    lora_alpha: Positive
    """LoRA scale: updates are multiplied by lora_alpha / lora_r."""
    dropout: Share
    """Dropout of node and graph vectors before the projection and of the hidden state before the output layer."""
    lora_dropout: Share
    """Dropout before the adapters."""
    lora_targets: Words
    """Names of the linear layers that get adapters; `auto` takes the attention projections."""
    attention: Literal["native", "causal"]
    """`native` uses the backbone's own mask; `causal` puts a bidirectional backbone under a causal mask."""
    readout: Literal["auto", "last", "first", "mean"]
    """The token whose hidden state h is read; `auto` is `last` under causal attention and `first` otherwise."""
    output: Literal["linear", "items"]
    """`linear`: the paper's free layer over items; `items`: (W h)·[x_i ; text_i]."""
    text_dim: Count
    """Principal components of the text vectors in the `items` output."""
    weights: Literal["pretrained", "random"]
    """`random` starts the language model from random weights: the ablation of its pretraining."""
    texts: Literal["own", "shuffled"]
    """`shuffled` shuffles the texts among the items, here and in the prompts: the ablation of the texts."""
    node_text: Flag
    """Node slots read the item's text features beside its vector, which takes no more tokens."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if not self.lora_targets:
            raise UserError("model.lora_targets is empty: name layers, or set model.lora_r=0 to train no adapter")
        if self.attention == "causal" and self.readout in ("first", "mean"):
            raise UserError(f"model.readout={self.readout} reads nothing useful under model.attention=causal: set "
                            "model.readout=last")
        return self
