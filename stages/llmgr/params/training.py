"""The two stages of LLMGR's training, and the models of its prior."""
from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmgr.params.types import Count, Flag, Natural, NotNegative, Number, Positive, Share, Whole, dataclass
from llmgr.runtime.errors import UserError


@dataclass
class Training:
    """What the training of align, tune and tower shares."""

    epochs: Count
    """Passes over the stage's prompts."""
    batch_size: Count
    """Prompts a micro-batch."""
    accumulate: Count
    """Micro-batches an optimiser step."""
    lr: Positive
    """Peak learning rate of AdamW; cosine with warm-up."""
    weight_decay: NotNegative
    """Decoupled weight decay of matrices."""
    warmup_share: Share
    """Share of the steps over which the learning rate rises."""
    clip: Positive
    """Largest gradient norm."""
    precision: Literal["auto", "fp32", "bf16"]
    """Arithmetic of the language model; `auto` takes bf16 where the machine multiplies it faster."""
    gradient_checkpointing: Flag
    """Recompute activations in the backward pass: less memory for about a third more time."""
    checkpoint_seconds: NotNegative
    """Seconds between checkpoints; an interruption loses no more."""


@dataclass
class Align(Training):
    """Stage 1: alignment of nodes and texts."""

    enabled: Flag
    """False skips stage 1: tuning starts from an untrained bridge (the paper's RQ3)."""
    candidates: Annotated[Whole, Field(ge=2)]
    """Node slots that a prompt lists, the described one among them."""
    max_text_tokens: Count
    """Tokens of the description in a prompt."""


@dataclass
class Tune(Training):
    """Stage 2: tuning on behaviour, and the prior."""

    epochs: Whole
    targets: Literal["prefix", "positions"]
    """`prefix`: a prompt a prefix, as the paper; `positions`: one prompt a session, every position a target."""
    prompt: Literal["paper", "slot", "titles"]
    """Stage-2 template of llmgr.model.prompts: the paper's wording; `slot`: the clicks, then the graph slot; `titles`:
    the clicks' titles and no slot at all, so that the graph encoder is not read."""
    samples: Natural
    """Training prompts an epoch, drawn by seed; 0 takes all."""
    train_encoder: Literal["all", "partial", "none"]
    """The part of the graph encoder that stage 2 trains: all, its readout, or none. Item embeddings stay frozen."""
    titles: Flag
    """Write each item's title beside its node slot; with `prompt: titles`, in place of it."""
    title_tokens: Count
    """Tokens of each title in a prompt."""
    edges: Flag
    """The prompt lists the session graph's edges (nearly redundant: sessions hardly repeat items)."""
    valid_sessions: Natural
    """Validation sessions scored after each epoch, drawn by seed; 0 takes all."""
    text_smoothing: Share
    """Label smoothing (Szegedy et al., CVPR 2016) by text: the share of a target's weight in the training loss that
    goes to the ten items whose title and brand share most words with its own. 0 switches it off."""
    recency: Share
    """A target's weight in the training loss is this to the power of the number of its user's later targets, scaled to
    a mean of 1: the last clicks, on sparse data more often cold items, are most like what is to be predicted. The prior
    is fitted to prefixes drawn with these weights; the validation loss is not weighted. With 1 all targets weigh the
    same, which without `linear` saves memory, since the logits are not formed."""
    linear: Flag
    """Add the prior to LLMGR's logits: the scores of a linear item-item model in closed form (slit-text), fitted to the
    clicks of other users and weighted by how often an item is a target. LLMGR learns what that leaves open."""
    folds: Natural
    """With `linear`, the prior also has the scores of `model.base`, cross-fitted: the base is trained once more without
    each of so many parts of the users. A training session is scored by the base that was trained without its user,
    whose item vectors LLMGR then reads; validation and test sessions are scored by the base itself, which was not
    trained on their targets. 0 leaves the base's scores out. Not possible for a base with parameters for each user
    (fpmc, caser), items on a curved space (hcgr) or a linear model of its own."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.folds == 1:
            raise UserError("tune.folds=1 leaves all users out of the one training: set it to 0, or at least to 2")
        if self.edges and self.prompt != "paper":
            raise UserError("tune.edges=true needs tune.prompt=paper: the other prompts have no place for edges")
        if self.edges and self.targets == "positions":
            raise UserError("tune.edges=true needs tune.targets=prefix: an edge list differs from prefix to prefix")
        return self


@dataclass
class Tower(Training):
    """The text tower: a text encoder, all weights tuned so that a prefix's next item is close to its clicks."""

    enabled: Flag
    """Tune a tower, and with `tune.folds` one without each fold of the users, and add its scores to LLMGR's prior. In
    one process."""
    encoder: Literal["tokens", "language-model"]
    """language-model: the mean of the text encoder's last hidden states; at MiniLM's size it takes minutes on a GPU and
    a day on one CPU core, at other rates (stages/presets/language-model-tower.txt). tokens: the mean of vectors of the
    text's tokens, which start at random whatever `model.weights` says, without a language model: minutes on a CPU."""
    batch_size: Whole
    """Training prefixes a micro-batch, those of a session together; each target is ranked among the batch's targets."""
    max_text_tokens: Count
    """Tokens of each item's text."""
    decay: Share
    """A click's weight falls by this factor for each step back in the session; 0 reads only the last click."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.enabled and self.encoder == "tokens" and self.gradient_checkpointing:
            raise UserError("tower.gradient_checkpointing=true spares nothing with tower.encoder=tokens: set it to "
                            "false, or lower tower.batch_size")
        return self


@dataclass
class Slit:
    """The linear item-item model: as a baseline, in LLMGR's prior, and under a control's logits."""

    ridge: Annotated[Number, Field(ge=0.01)]
    """Weight of the ridge, in clicks; the larger, the less is learned of rare transitions. At least 0.01, below which
    single precision is too coarse."""
    decay: Share
    """A click's weight falls by this factor for each step back in the session; 0 reads only the last click."""
    text: NotNegative
    """The ridge shrinks the weight between two items towards this share of the similarity of their texts; not in the
    baseline `slit`."""


@dataclass
class Launch:
    """Processes and devices of align and tune."""

    processes: Count
    """Number of processes for align and tune, each on a GPU of its own or on the CPU; torchrun's number has
    priority."""
    strategy: Literal["ddp", "zero2", "zero3"]
    """How several processes divide the work. `ddp`: the whole model in each; DeepSpeed's `zero2` divides the gradients
    and the optimiser's state, `zero3` also all weights. Results differ only by rounding, and by the dropout drawn."""
    device: Literal["auto", "cpu", "cuda"]
    """The device of align and tune; `auto` takes a GPU if there is one."""
    compile: Flag
    """Compile the language model's layers on a GPU (torch.compile), so that a step starts fewer kernels; the first step
    takes minutes. Not with zero3. Results differ only by rounding."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.compile and self.strategy == "zero3":
            raise UserError("launch.compile=true does not go with launch.strategy=zero3, which gathers a layer's "
                            "weights as it runs: set launch.compile=false")
        return self
