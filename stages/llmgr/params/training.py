"""The two stages of LLMGR's training, and the prior that its logits start from."""
from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmgr.params.types import Count, Flag, Natural, NotNegative, Number, Positive, Share, Whole, dataclass
from llmgr.runtime.errors import UserError


@dataclass
class Training:
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
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_seconds: NotNegative
    """Seconds between checkpoints; an interruption loses at most so much."""


@dataclass
class Align(Training):
    enabled: Flag
    """False skips stage 1: tuning starts from an untrained bridge (the paper's RQ3)."""
    candidates: Annotated[Whole, Field(ge=2)]
    """Node slots that a prompt lists, the described one among them."""
    max_text_tokens: Count
    """Tokens of the description in a prompt."""


@dataclass
class Tune(Training):
    epochs: Whole
    targets: Literal["prefix", "positions"]
    """`prefix`: a prompt a prefix, as the paper; `positions`: one prompt a session, every position a target."""
    prompt: Literal["paper", "slot", "titles"]
    """Stage-2 template of llmgr.model.prompts: the paper's wording; `slot`: the clicks, then the graph slot; `titles`:
    the clicks' titles and no slot at all, so that the graph encoder is not read."""
    samples: Natural
    """Training prompts an epoch, drawn by seed; 0 takes all."""
    train_encoder: Literal["all", "partial", "none"]
    """What of the graph encoder learns in stage 2: everything, its readout, nothing. Item embeddings stay frozen."""
    titles: Flag
    """Titles stand beside the node slots; with `prompt: titles` they do in their place."""
    title_tokens: Count
    """Tokens of each title in a prompt."""
    edges: Flag
    """The prompt lists the session graph's edges (nearly redundant: sessions hardly repeat items)."""
    valid_sessions: Natural
    """Validation sessions scored after each epoch, drawn by seed; 0 takes all."""
    text_smoothing: Share
    """Label smoothing (Szegedy et al., CVPR 2016) by text: the share of a target's weight in the loss of training that
    goes to the ten items whose title and brand share most words with its own. 0 leaves it all to the target."""
    recency: Share
    """A target's weight in training is this to the power of how many later targets its user has, scaled to a mean of 1:
    what users click last, on sparse data oftener a cold item, is nearer to what is to be predicted. The training loss
    is weighted so, the validation loss is not; the prior is fitted to prefixes drawn likewise. 1 weighs all
    alike, which without `linear` spares memory: the logits need not be formed."""
    linear: Flag
    """The logits start from a linear item-item model in closed form (slit-text), every session scored by what others
    clicked, with weights by how often an item is a target; LLMGR learns what that leaves open."""
    folds: Natural
    """With `linear`, the logits start from the scores of `model.base`, too, weighted alike. It is trained once more
    without each of so many parts of the users: a training session is scored by the one that has not met its user, whose
    item vectors LLMGR then reads, too; validation and test sessions by the base itself, which has not met their
    targets. 0 leaves the base's scores out. Not over a base that has something of each user (fpmc, caser), a curved
    space of items (hcgr) or a linear model of its own."""

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
    """A text encoder tuned on item texts, all its weights: a prefix's next item lies near its clicks."""

    enabled: Flag
    """Tune one, and with `tune.folds` one without each fold of the users, for LLMGR's logits to start from its scores,
    too. In one process."""
    encoder: Literal["tokens", "language-model"]
    """language-model: the mean of the text encoder's last hidden states; of MiniLM's size minutes on a GPU, a day on a
    CPU's core, with other rates (stages/presets/language-model-tower.txt). tokens: the mean of vectors of the text's
    tokens, drawn at random whatever `model.weights`, without a language model: minutes on a CPU."""
    batch_size: Whole
    """Training prefixes a micro-batch, those of a session together; the targets of one are told from each other."""
    max_text_tokens: Count
    """Tokens of each item's text."""
    decay: Share
    """A click's weight falls by this factor a step back in the session; 0: the last alone."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.enabled and self.encoder == "tokens" and self.gradient_checkpointing:
            raise UserError("tower.gradient_checkpointing=true spares nothing with tower.encoder=tokens: set it to "
                            "false, or lower tower.batch_size")
        return self


@dataclass
class Slit:
    """The linear item-item model, wherever it stands: as a baseline, and under the logits of LLMGR and of a control."""

    ridge: Annotated[Number, Field(ge=0.01)]
    """Weight of the ridge, in clicks, at least 0.01, below which single precision solves it wrongly; the larger, the
    less is learned of rare transitions."""
    decay: Share
    """An item's weight falls by this factor a step back in the session; 0: the last alone."""
    text: NotNegative
    """The ridge shrinks a weight to this share of the similarity of two items' texts, everywhere but in the baseline
    `slit`."""


@dataclass
class Launch:
    processes: Count
    """Processes that align and tune run in, each on a GPU of its own or on the CPU; torchrun's number goes first."""
    strategy: Literal["ddp", "zero2", "zero3"]
    """How several divide the work: `ddp`, the whole model in each; DeepSpeed ZeRO-2 divides gradients and the
    optimiser's state, too, ZeRO-3 all weights. Results differ by rounding alone (and by where dropout strikes)."""
    device: Literal["auto", "cpu", "cuda"]
    """Where align and tune compute; `auto` takes the GPU where there is one."""
    compile: Flag
    """Compile the language model's layers on a GPU (torch.compile), which takes minutes at first, so that a step starts
    fewer kernels. Not with zero3. Results differ by rounding alone."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.compile and self.strategy == "zero3":
            raise UserError("launch.compile=true does not go with launch.strategy=zero3, which gathers a layer's "
                            "weights as it runs: set launch.compile=false")
        return self
