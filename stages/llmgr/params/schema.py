"""params.yaml as frozen dataclasses: every key typed, documented, checked, before any work starts.

Defaults live in params.yaml alone, so every key must stand there.

The docstring below a field is its documentation. Values are coerced to the declared type or refused, because
`dvc exp run -S tune.lr=1e-5` writes `1e-05`, which YAML 1.1 reads as a string.
"""
from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmgr.params.checks import at_least, between, positive, rate, seeds, share
from llmgr.params.names import STAGES
from llmgr.runtime.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Columns of `data.interactions` and `data.items`; null finds them by the usual names."""

    user: str | None
    """Who clicked."""
    item: str | None
    """Which item, in both files; where `data.items` has no such column it is found there by the usual names."""
    time: str | None
    """When: a number of any unit, or an ISO date."""
    title: str | None
    """An item's title."""
    brand: str | None
    """Its brand or maker."""
    category: str | None
    """Its category: a name, or a path as a list or with > or | between."""
    description: str | None
    """Its description."""

    def check(self) -> None:
        """Nothing to check before the files are there."""


@dataclass(frozen=True)
class Data:
    dataset: str
    """`sample`, a name of the catalogue (`beauty`, `office`, `music`, `pantry`, ...), `RELEASE:Category`, or `files`:
    `data.interactions` and `data.items`."""
    interactions: str | None
    """With `dataset=files`: Parquet, CSV, TSV, JSON lines or RecBole's .inter of who clicked what and when."""
    items: str | None
    """With `dataset=files`: the items' texts, in any of these formats; null finds them in `interactions`."""
    session: str | None
    """With `dataset=files`: the column of `interactions` that says which rows are one session; null: a user's are."""
    columns: Columns
    mirror: str | None
    """Folder or URL that holds the files under their official names; null takes the official host."""
    sha256: dict[str, str]
    """Expected digests, file name to hex; a file that differs is refused."""
    max_session: int
    """Items of a session that a model sees, the most recent ones."""
    retries: int
    """Further attempts after a failed request, with exponential back-off."""
    timeout: float
    """Seconds without a byte after which a request is given up."""
    sample_users: int
    """Users that the simulator of the embedded sample draws."""
    sample_items: int
    """Items of the embedded sample."""
    sample_seed: int
    """Seed of the simulator; apart from `seed`, so that another seed trains on the same data and downloads nothing."""

    def check(self) -> None:
        positive(self, "data", "max_session", "timeout", "sample_users", "sample_items")
        at_least(self, "data", "retries", 0)
        seeds(self, "data", "sample_seed")
        if self.dataset == "files" and not self.interactions:
            raise UserError("data.dataset=files needs data.interactions: set it to the file of who clicked what and "
                            "when, such as -S data.interactions=clicks.csv")


@dataclass(frozen=True)
class Filter:
    core: int
    """Least number of interactions of every user and item (k of the k-core)."""
    duplicates: Literal["first", "last", "keep"]
    """Which of several interactions of one user with one item stays."""
    textless: Literal["keep", "drop"]
    """Items without any text: `keep` them with the text "unknown item", or `drop` them before the k-core."""
    max_chars: int
    """Length cap of an item's cleaned text, cut at a word."""
    template_items: int
    """A description sentence that at least so many items share is a template, not a description, and is removed."""
    max_bad_share: float
    """Largest share of malformed lines that is skipped instead of refused."""
    max_textless_share: float
    """Largest share of items without text; more of them are refused, since most likely the ids do not match."""

    def check(self) -> None:
        positive(self, "filter", "core", "max_chars")
        at_least(self, "filter", "template_items", 2)
        share(self, "filter", "max_bad_share", "max_textless_share")


@dataclass(frozen=True)
class Split:
    ties: Literal["hash", "file"]
    """Order among equal timestamps: a seeded hash of (user, item), or the order of the file (common, leaks)."""
    seed: int
    """Key of that hash; apart from `seed`, so that another seed trains and tests on the same sessions."""
    selection: bool
    """For choosing parameters: a session's last training item is no target, so that validation sessions end in a click
    that was never one, as test sessions do. What has fitted its sessions often gains less. Test is not scored then."""

    def check(self) -> None:
        seeds(self, "split", "seed")


@dataclass(frozen=True)
class Fpmc:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""

    def check(self) -> None:
        rate(self, "encoder.fpmc.lr")


@dataclass(frozen=True)
class Caser:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    length: int
    """Last clicks that it reads (L), and the greatest height of a horizontal filter."""
    horizontal: int
    """Horizontal filters of each height."""
    vertical: int
    """Vertical filters."""

    def check(self) -> None:
        rate(self, "encoder.caser.lr")
        positive(self, "encoder.caser", "length", "horizontal", "vertical")


@dataclass(frozen=True)
class Gru4rec:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    hidden: int
    """Width of the GRU's state."""
    layers: int
    """Stacked GRU layers, 1 to 5."""

    def check(self) -> None:
        rate(self, "encoder.gru4rec.lr")
        positive(self, "encoder.gru4rec", "hidden")
        between(self, "encoder.gru4rec", "layers", 1, 5)


@dataclass(frozen=True)
class Narm:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    hidden: int
    """Width of the GRU's state."""
    layers: int
    """Stacked GRU layers, 1 to 5."""
    session_dropout: float
    """Dropout of the two encoders' joint output, before the decoder."""

    def check(self) -> None:
        rate(self, "encoder.narm.lr")
        positive(self, "encoder.narm", "hidden")
        between(self, "encoder.narm", "layers", 1, 5)
        share(self, "encoder.narm", "session_dropout")


@dataclass(frozen=True)
class Stamp:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""

    def check(self) -> None:
        rate(self, "encoder.stamp.lr")


@dataclass(frozen=True)
class Sasrec:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    layers: int
    """Self-attention blocks, 1 to 5."""
    heads: int
    """Heads of each block; divides encoder.dim."""

    def check(self) -> None:
        rate(self, "encoder.sasrec.lr")
        positive(self, "encoder.sasrec", "heads")
        between(self, "encoder.sasrec", "layers", 1, 5)


@dataclass(frozen=True)
class Bsarec:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    layers: int
    """Blocks, 1 to 5."""
    heads: int
    """Heads of each block's self-attention; divides encoder.dim."""
    alpha: float
    """Weight of the frequency rescaler against self-attention (paper eq. 6)."""
    c: int
    """The lowest c // 2 + 1 Fourier components of a session are its low frequencies."""

    def check(self) -> None:
        rate(self, "encoder.bsarec.lr")
        positive(self, "encoder.bsarec", "heads", "c")
        between(self, "encoder.bsarec", "layers", 1, 5)
        share(self, "encoder.bsarec", "alpha")


@dataclass(frozen=True)
class Srgnn:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    gnn_layers: int
    """Propagation steps of the gated graph network, 1 to 5."""

    def check(self) -> None:
        rate(self, "encoder.srgnn.lr")
        between(self, "encoder.srgnn", "gnn_layers", 1, 5)


@dataclass(frozen=True)
class Gcsan:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    gnn_layers: int
    """Propagation steps of the gated graph network, 1 to 5."""
    attention_layers: int
    """Self-attention blocks, 1 to 5."""
    attention_heads: int
    """Heads of each block; divides encoder.dim."""
    omega: float
    """Weight of the attention output against the last GNN state in the session vector (paper eq. 12)."""

    def check(self) -> None:
        for name in ("gnn_layers", "attention_layers"):
            between(self, "encoder.gcsan", name, 1, 5)
        rate(self, "encoder.gcsan.lr")
        positive(self, "encoder.gcsan", "attention_heads")
        share(self, "encoder.gcsan", "omega")


@dataclass(frozen=True)
class Niser:
    lr: float | Literal["auto"]
    """Peak learning rate of Adam; `auto` chooses among encoder.training.rates."""
    gnn_layers: int
    """Propagation steps of the gated graph network, 1 to 5."""
    sigma: float
    """Length of the session vectors: scores are sigma times a cosine (paper eq. 7)."""
    positions: bool
    """Adds a learned vector for the position of a click, as NISER+."""

    def check(self) -> None:
        rate(self, "encoder.niser.lr")
        positive(self, "encoder.niser", "sigma")
        between(self, "encoder.niser", "gnn_layers", 1, 5)


@dataclass(frozen=True)
class Hcgr:
    lr: float | Literal["auto"]
    """Peak learning rate of Riemannian Adam; `auto` chooses among encoder.training.rates."""
    gnn_layers: int
    """Attention layers over the session graph, 1 to 5."""
    scale: float
    """Logits of the softmax are minus so many times the geodesic distances."""
    contrast: float
    """Weight of the contrastive ranking loss beside the cross-entropy; 0 leaves it out."""
    margin: float
    """Distance by which the ranking loss wants the target nearer than other items."""
    negatives: int
    """Other items drawn for each session's ranking loss."""

    def check(self) -> None:
        rate(self, "encoder.hcgr.lr")
        positive(self, "encoder.hcgr", "scale", "negatives")
        between(self, "encoder.hcgr", "gnn_layers", 1, 5)
        at_least(self, "encoder.hcgr", "contrast", 0)
        at_least(self, "encoder.hcgr", "margin", 0)


@dataclass(frozen=True)
class EncoderTraining:
    epochs: int
    """Most passes over all prefixes; the learning rate falls along a cosine over these."""
    rates: list[float]
    """Peak learning rates among which validation NDCG@20 chooses where an encoder's `lr`, or `encoder.text_lr`, is
    `auto`: by successive rejects, see llmgr.training.rates."""
    rungs: list[int]
    """Epochs after each of which the worst of these rates is given up, after the last all but the best."""
    patience: int
    """Epochs without a better validation NDCG@20 after which training stops."""
    batch_size: int
    """Prefixes a step."""
    weight_decay: float
    """Decoupled weight decay of all matrices but the item table."""
    table_decay: float
    """Decoupled weight decay of the item table: an item that few sessions train falls back on its text (not hcgr)."""
    warmup_share: float
    """Share of the steps over which the learning rate rises."""
    dropout: float
    """Dropout inside the encoders."""
    clip: float
    """Largest gradient norm."""
    precision: Literal["auto", "fp32", "bf16"]
    """Arithmetic of matrix products; `auto` takes bf16 where the machine multiplies it faster.

    Products of width 64 gain nothing: on a Zen 4 with AVX-512 bf16, SR-GNN and GC-SAN train 0.44 times as fast in it.
    """
    checkpoint_seconds: float
    """Seconds between checkpoints; an interruption loses at most so much."""

    def check(self) -> None:
        at_least(self, "encoder.training", "checkpoint_seconds", 0)
        positive(self, "encoder.training", "epochs", "patience", "batch_size", "clip")
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise UserError(f"encoder.training.rates={self.rates} must hold one or more different rates above 0")
        if not self.rungs or self.rungs[0] < 1 or self.rungs != sorted(set(self.rungs)):
            raise UserError(f"encoder.training.rungs={self.rungs} must rise from 1 or more")
        at_least(self, "encoder.training", "weight_decay", 0)
        at_least(self, "encoder.training", "table_decay", 0)
        share(self, "encoder.training", "warmup_share", "dropout")


@dataclass(frozen=True)
class Encoder:
    names: list[str]
    """Session encoders that learn from item ids alone. What needs a model that is trained nowhere is left out, with a
    line that says so (`llmgr.params.derived`): gates, the base (another one stands in), folds, tower."""
    controls: list[str]
    """Encoders that are trained once more with item vectors that add a linear map of the item's text vector."""
    control_texts: list[Literal["text", "shuffled"]]
    """What the controls read: `text`, the item's own, and its twin `shuffled`, another item's. NAME-text names one."""
    linear_controls: list[str]
    """Encoders that are trained as NAME-linear: item vectors as NAME-text, and logits that start from the linear model
    that LLMGR's start from (`tune.linear`): without `tune.folds` the nearest model without a language model. Their loss
    is the softmax cross-entropy over all items, whatever the encoder's own."""
    dim: int
    """Width d of item and session vectors."""
    text_dim: int
    """Principal components of the text vectors that a control reads."""
    text_lr: float | Literal["auto"]
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

    def check(self) -> None:
        positive(self, "encoder", "dim", "text_dim")
        rate(self, "encoder.text_lr")
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


def encoders() -> list[str]:
    """Names of all session encoders: the sections under `encoder` beside `training`."""
    hints = typing.get_type_hints(Encoder)
    return [name for name, hint in hints.items() if dataclasses.is_dataclass(hint) and hint is not EncoderTraining]


def trained(section: Any) -> list[str]:
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


@dataclass(frozen=True)
class Scratch:
    layers: int
    """Decoder blocks of the small LLaMA."""
    width: int
    """Hidden width."""
    heads: int
    """Attention heads; divides the width."""
    vocabulary: int
    """Entries of its BPE tokenizer."""
    epochs: int
    """Passes over the item texts."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Decoupled weight decay of matrices."""
    warmup_share: float
    """Share of the steps over which the learning rate rises."""
    clip: float
    """Largest gradient norm."""
    batch_size: int
    """Texts a step."""
    checkpoint_seconds: float
    """Seconds between checkpoints; an interruption loses at most so much."""

    def check(self) -> None:
        positive(self, "llm.scratch", "layers", "width", "heads", "epochs", "lr", "batch_size", "clip")
        share(self, "llm.scratch", "warmup_share")
        at_least(self, "llm.scratch", "checkpoint_seconds", 0)
        at_least(self, "llm.scratch", "weight_decay", 0)
        at_least(self, "llm.scratch", "vocabulary", 300)
        if self.width % (2 * self.heads):
            raise UserError(f"llm.scratch.heads={self.heads}: llm.scratch.width={self.width} must be a multiple of "
                            "twice the heads (rotary positions need an even head width)")


@dataclass(frozen=True)
class Llm:
    name: str
    """Hub id (owner/model), local folder with safetensors, or `scratch`: a small LLaMA trained on the texts."""
    revision: str
    """Hub revision; what it resolved to is recorded in models/backbone/backbone.json."""
    max_text_tokens: int
    """Tokens of an item's text that the text vectors see."""
    scratch: Scratch

    def check(self) -> None:
        positive(self, "llm", "max_text_tokens")
        if not self.name.strip():
            raise UserError("llm.name is empty: give a hub id, a folder or scratch")


@dataclass(frozen=True)
class Model:
    base: str
    """The pretrained encoder whose item vectors and session graph LLMGR reads: `gcsan`, or a control's `gcsan-text`."""
    lora_r: int
    """Rank of the LoRA adapters; 0 trains no adapter (the language model stays frozen)."""
    lora_alpha: float
    """LoRA scale: updates are multiplied by lora_alpha / lora_r."""
    dropout: float
    """Dropout of node and graph vectors before the projection and of the hidden state before the output layer."""
    lora_dropout: float
    """Dropout before the adapters."""
    lora_targets: list[str]
    """Names of the linear layers that get adapters; `auto` takes the attention projections."""
    attention: Literal["native", "causal"]
    """`native` keeps the backbone's own masking; `causal` puts a bidirectional one under a causal mask."""
    readout: Literal["auto", "last", "first", "mean"]
    """Where the hidden state h is read; `auto`: `last` under causal attention, `first` else."""
    output: Literal["linear", "items"]
    """`linear`: the paper's free layer over items; `items`: (W h)·[x_i ; text_i]."""
    text_dim: int
    """Principal components of the text vectors in the `items` output."""
    weights: Literal["pretrained", "random"]
    """`random` draws the language model anew: the twin that tells what its pretraining is worth."""
    texts: Literal["own", "shuffled"]
    """`shuffled` deals the texts out to other items, here and in the prompts: the twin that tells what they add."""
    node_text: bool
    """Node slots read the item's text features beside its vector: what the text says for no more tokens."""

    def check(self) -> None:
        at_least(self, "model", "lora_r", 0)
        positive(self, "model", "lora_alpha", "text_dim")
        share(self, "model", "dropout", "lora_dropout")
        if not self.lora_targets:
            raise UserError("model.lora_targets is empty: name layers, or set model.lora_r=0 to train no adapter")
        if self.attention == "causal" and self.readout in ("first", "mean"):
            raise UserError(f"model.readout={self.readout} reads nothing useful under model.attention=causal: set "
                            "model.readout=last")


@dataclass(frozen=True)
class Training:
    epochs: int
    """Passes over the stage's prompts."""
    batch_size: int
    """Prompts a micro-batch."""
    accumulate: int
    """Micro-batches an optimiser step."""
    lr: float
    """Peak learning rate of AdamW; cosine with warm-up."""
    weight_decay: float
    """Decoupled weight decay of matrices."""
    warmup_share: float
    """Share of the steps over which the learning rate rises."""
    clip: float
    """Largest gradient norm."""
    precision: Literal["auto", "fp32", "bf16"]
    """Arithmetic of the language model; `auto` takes bf16 where the machine multiplies it faster."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_seconds: float
    """Seconds between checkpoints; an interruption loses at most so much."""

    section: typing.ClassVar[str] = ""

    def check(self) -> None:
        positive(self, self.section, "epochs", "batch_size", "accumulate", "lr", "clip")
        at_least(self, self.section, "weight_decay", 0)
        at_least(self, self.section, "checkpoint_seconds", 0)
        share(self, self.section, "warmup_share")


@dataclass(frozen=True)
class Align(Training):
    enabled: bool
    """False skips stage 1: tuning starts from an untrained bridge (the paper's RQ3)."""
    candidates: int
    """Node slots that a prompt lists, the described one among them."""
    max_text_tokens: int
    """Tokens of the description in a prompt."""

    section = "align"

    def check(self) -> None:
        super().check()
        at_least(self, "align", "candidates", 2)
        positive(self, "align", "max_text_tokens")


@dataclass(frozen=True)
class Tune(Training):
    epochs: int
    targets: Literal["prefix", "positions"]
    """`prefix`: a prompt a prefix, as the paper; `positions`: one prompt a session, every position a target."""
    prompt: Literal["paper", "slot"]
    """Stage-2 template of llmgr.model.prompts: the paper's wording, or `slot`: the clicks, then the graph slot."""
    samples: int
    """Training prompts an epoch, drawn by seed; 0 takes all."""
    train_encoder: Literal["all", "partial", "none"]
    """What of the graph encoder learns in stage 2: everything, its readout, nothing. Item embeddings stay frozen."""
    titles: bool
    """Titles stand beside the node slots."""
    title_tokens: int
    """Tokens of each title in a prompt."""
    edges: bool
    """The prompt lists the session graph's edges (nearly redundant: sessions hardly repeat items)."""
    valid_sessions: int
    """Validation sessions scored after each epoch, drawn by seed; 0 takes all."""
    text_smoothing: float
    """Label smoothing (Szegedy et al., CVPR 2016) by text: the share of a target's weight in the loss of training that
    goes to the ten items whose title and brand share most words with its own. 0 leaves it all to the target."""
    recency: float
    """A target's weight in training is this to the power of how many later targets its user has, scaled to a mean of 1:
    what users click last, on sparse data oftener a cold item, is nearer to what is to be predicted. The training loss
    is weighted so, the validation loss is not; the linear start is fitted to prefixes drawn likewise. 1 weighs all
    alike, which without `linear` spares memory: the logits need not be formed."""
    linear: bool
    """The logits start from a linear item-item model in closed form (slit-text), every session scored by what others
    clicked, with weights by how often an item is a target; LLMGR learns what that leaves open."""
    folds: int
    """With `linear`, the logits start from the scores of `model.base`, too, weighted alike. It is trained once more
    without each of so many parts of the users: a training session is scored by the one that has not met its user, whose
    item vectors LLMGR then reads, too; validation and test sessions by the base itself, which has not met their
    targets. 0 leaves the base's scores out. Not over a base that has something of each user (fpmc, caser), a curved
    space of items (hcgr) or a linear start of its own."""

    section = "tune"

    def check(self) -> None:
        super().check()
        at_least(self, "tune", "samples", 0)
        share(self, "tune", "text_smoothing")
        share(self, "tune", "recency")
        at_least(self, "tune", "valid_sessions", 0)
        at_least(self, "tune", "folds", 0)
        if self.folds == 1:
            raise UserError("tune.folds=1 leaves all users out of the one training: set it to 0, or at least to 2")
        positive(self, "tune", "title_tokens")
        if self.edges and self.prompt != "paper":
            raise UserError("tune.edges=true needs tune.prompt=paper: the slot prompt has no place for edges")
        if self.edges and self.targets == "positions":
            raise UserError("tune.edges=true needs tune.targets=prefix: an edge list differs from prefix to prefix")


@dataclass(frozen=True)
class Tower(Training):
    """A text encoder tuned on item texts, all its weights: a prefix's next item lies near its clicks."""

    enabled: bool
    """Tune one, and with `tune.folds` one without each fold of the users, for LLMGR's logits to start from its scores,
    too. In one process."""
    encoder: Literal["tokens", "language-model"]
    """language-model: the mean of the backbone's last hidden states; of MiniLM's size minutes on a GPU, a day on a
    CPU's core, with other rates (stages/presets/language-model-tower.txt). tokens: the mean of vectors of the text's
    tokens, drawn at random whatever `model.weights`, without a language model: minutes on a CPU."""
    batch_size: int
    """Training prefixes a micro-batch, those of a session together; the targets of one are told from each other."""
    max_text_tokens: int
    """Tokens of each item's text."""
    decay: float
    """A click's weight falls by this factor a step back in the session; 0: the last alone."""

    section = "tower"

    def check(self) -> None:
        super().check()
        positive(self, "tower", "max_text_tokens")
        share(self, "tower", "decay")
        if self.enabled and self.encoder == "tokens" and self.gradient_checkpointing:
            raise UserError("tower.gradient_checkpointing=true spares nothing with tower.encoder=tokens: set it to "
                            "false, or lower tower.batch_size")


@dataclass(frozen=True)
class Evaluate:
    batch_size: int
    """Sessions scored at a time."""
    text_dim: int
    """text-kNN: whitened principal components of the text vectors."""
    decay: float
    """text-kNN and word-kNN: an item's weight falls by this factor a step back in the session; 0: the last alone."""
    item_shrinkage: float
    """item-kNN: added to the denominator of the cosine, so that items which few sessions share count for less."""
    item_decay: float
    """item-kNN: as `decay`."""
    session_neighbours: int
    """session-kNN: most similar training sessions whose items are scored."""
    session_decay: float
    """session-kNN: as `decay` in the similarity of sessions; 1 is SKNN, below that V-SKNN."""

    def check(self) -> None:
        positive(self, "evaluate", "batch_size", "text_dim", "session_neighbours")
        at_least(self, "evaluate", "item_shrinkage", 0)
        share(self, "evaluate", "decay", "item_decay", "session_decay")


@dataclass(frozen=True)
class Slit:
    """The linear item-item model, wherever it stands: the floors, and under the logits of LLMGR and of a control."""

    ridge: float
    """Weight of the ridge, in clicks, at least 0.01, below which single precision solves it wrongly; the larger, the
    less is learned of rare transitions."""
    decay: float
    """An item's weight falls by this factor a step back in the session; 0: the last alone."""
    text: float
    """All but the floor `slit`: what the ridge shrinks a weight to, as a share of the likeness of two items' texts."""

    def check(self) -> None:
        at_least(self, "slit", "ridge", 0.01)
        at_least(self, "slit", "text", 0)
        share(self, "slit", "decay")


@dataclass(frozen=True)
class Launch:
    processes: int
    """Processes that align and tune run in, each on a GPU of its own or on the CPU; torchrun's number goes first."""
    strategy: Literal["ddp", "zero2", "zero3"]
    """How several divide the work: `ddp`, the whole model in each; DeepSpeed ZeRO-2 divides gradients and the
    optimiser's state, too, ZeRO-3 all weights. Results differ by rounding alone (and by where dropout strikes)."""
    device: Literal["auto", "cpu", "cuda"]
    """Where align and tune compute; `auto` takes the GPU where there is one."""
    compile: bool
    """Compile the language model's layers on a GPU (torch.compile), which takes minutes at first, so that a step starts
    fewer kernels. Not with zero3. Results differ by rounding alone."""

    def check(self) -> None:
        positive(self, "launch", "processes")
        if self.compile and self.strategy == "zero3":
            raise UserError("launch.compile=true does not go with launch.strategy=zero3, which gathers a layer's "
                            "weights as it runs: set launch.compile=false")


@dataclass(frozen=True)
class Gate:
    fuse: dict[str, list[str]]
    """Gates by name, each the scorers that it fuses: models of the report, or `repeat`, which marks clicked items."""
    edges: list[int]
    """Lower ends of the bands of training interactions, each with weights of its own; below the first lies one more."""
    sessions: int
    """Validation sessions that gates are fitted on, drawn by seed; 0 takes all."""

    def check(self) -> None:
        at_least(self, "gate", "sessions", 0)
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


@dataclass(frozen=True)
class Bucket:
    ours: str
    """The model whose differences from all others are tested and reported: `llmgr`, or a gate such as `gated-llmgr`."""
    resamples: int
    """Bootstrap resamples of sessions behind every 95% interval and p; no p falls below 2 / (resamples + 1)."""
    cold: list[int]
    """The paper's cold items: fewest and most interactions in the 5-core data, both ends included."""
    warm: int
    """The paper's warm items: fewest interactions in the 5-core data."""
    practice: list[int]
    """Lower ends of all but the first practitioner bucket, by interactions in the 5-core data."""
    trained: list[int]
    """The same by interactions in the training sessions."""

    def check(self) -> None:
        at_least(self, "bucket", "resamples", 100)
        for name in ("cold", "practice", "trained"):
            edges = getattr(self, name)
            if edges != sorted(set(edges)) or not edges:
                raise UserError(f"bucket.{name}={edges} must rise: one edge at least, each above the one before")
        if len(self.cold) != 2 or self.warm <= self.cold[-1]:
            raise UserError(f"bucket.cold={self.cold} must be a lowest and a highest count below "
                            f"bucket.warm={self.warm}")


@dataclass(frozen=True)
class Track:
    experiment: str
    """MLflow experiment that runs are filed under."""
    uri: str | None
    """Tracking store; null takes MLFLOW_TRACKING_URI, else sqlite under the repository root."""

    def check(self) -> None:
        if not self.experiment.strip():
            raise UserError("track.experiment is empty: give the MLflow experiment a name")


@dataclass(frozen=True)
class Params:
    """All of params.yaml. `view` gives a stage the keys that it declares."""

    seed: int
    """Everything random derives from it."""
    data: Data
    filter: Filter
    split: Split
    encoder: Encoder
    llm: Llm
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

    def check(self) -> None:
        seeds(self, "", "seed")
        if self.tower.enabled and self.tower.batch_size <= self.data.max_session:
            raise UserError(f"tower.batch_size={self.tower.batch_size} may hold one session alone, whose targets are "
                            f"not told from each other: set more than data.max_session={self.data.max_session}")

    def view(self, keys: Sequence[str]) -> Any:
        """The parameters under `keys` (`seed`, `tune`, `data.max_session`) and no others, by attribute."""
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
