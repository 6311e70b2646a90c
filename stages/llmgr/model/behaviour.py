"""Stage 2: the next item of every training prefix, from prompts over session graphs (METHOD 1, step 6)."""
from __future__ import annotations

import torch
from torch import Tensor

from llmgr.encoders.registry import check_users
from llmgr.language_model.packing import drawn_steps
from llmgr.model.loss import TextSmoothing
from llmgr.model.ranker import Ranker
from llmgr.params.schema import Tune
from llmgr.runtime.errors import UserError
from llmgr.sessions.tensors import Sessions
from llmgr.training.job import Loss


class BehaviourJob:
    """Stage 2: the next item of every training prefix, from prompts over session graphs.

    With `tune.targets=prefix` every prefix has a prompt; with `positions` every session has one, with a branch for each
    prefix. With `tune.folds` the sessions of a step are of one fold, whose item vectors they share.
    """

    selects = None

    def __init__(self, model: Ranker, train: Sessions, valid: Sessions, settings: Tune, seed: int,
                 smoothing: TextSmoothing | None = None) -> None:
        check_users(model.llmgr.encoder, "model.base", train)
        train, self.cut = model.shortened(train, "training")
        if settings.targets == "positions" and not model.llmgr.causal:
            raise UserError("tune.targets=positions needs causal attention and the backbone is bidirectional: set "
                            "model.attention=causal or tune.targets=prefix")
        self.model, self.settings, self.train, self.device = model, settings, train, model.device
        self.weight = None if settings.recency == 1 else train.recency(settings.recency)
        self.first, self.last, self.sample = spans(train, settings.targets == "positions")
        count = settings.valid_sessions or len(valid)
        order = torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed + 2))
        self.valid, _ = model.shortened(valid.subset(order[:count].sort()[0]), "validation")  # once, not every epoch
        self.smoothing = None if smoothing is None else smoothing.to(self.device)
        model.learn_from(train)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the language model, which a checkpoint records."""
        return self.model.dtype

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        packs, fold_N = self.model.llmgr.execution.packs, self.model.fold_N
        chosen = torch.randperm(len(self.first), generator=generator)[:self.settings.samples or None]
        if fold_N is None:
            return drawn_steps(chosen, self.last, self.settings, packs)
        fold = fold_N[self.sample[chosen]]
        steps = [step for k in fold.unique().tolist()
                 for step in drawn_steps(chosen[fold == k], self.last, self.settings, packs)]
        return [steps[n] for n in torch.randperm(len(steps), generator=generator)]

    def targets(self, micro: Tensor) -> int:
        return int((self.last[micro] - self.first[micro] + 1).sum())

    def loss(self, micro: Tensor) -> Loss:
        count = (self.last[micro] - self.first[micro] + 1)
        within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        samples = self.sample[micro].repeat_interleave(count) + within
        weight = None if self.weight is None else self.weight[samples.to(self.device)]
        return self.model.loss(self.train, samples, count, weight, self.smoothing)

    def validate(self) -> dict[str, float]:
        return self.model.validate(self.valid)


def spans(train: Sessions, positions: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts of a training set: the shortest prefix, the longest prefix and the first sample of each.

    With `positions` a prompt covers all prefixes that share a row; otherwise each sample has its own.
    """
    length, row = train.length.cpu(), train.row.cpu()
    sample = torch.arange(len(train))
    if not positions:
        return length, length, sample
    start = torch.full((int(row.max()) + 1,), len(train)).scatter_reduce(0, row, sample, "amin")
    count = torch.bincount(row)
    assert torch.equal(row, torch.arange(len(count)).repeat_interleave(count)), "prefixes of a row must be consecutive"
    return length[start], length[start] + count - 1, start
