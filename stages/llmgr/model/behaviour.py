"""Stage 2: the next item of every training prefix, from prompts over session graphs (METHOD 1, step 6)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.encoders.layers import item_cross_entropy
from llmgr.encoders.registry import check_users
from llmgr.model.llmgr import Llmgr
from llmgr.model.outputs import logits
from llmgr.model.packing import PACKED, drawn_steps
from llmgr.model.prompts import BehaviourPrompts
from llmgr.model.scorer import Scorer, shortened
from llmgr.runtime.errors import UserError
from llmgr.sessions.batching import alike
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import texts_shuffled
from llmgr.training.job import Loss

ALIKE, TEMPERATURE = 10, 0.1  # text smoothing: items that share a target's weight, how sharply the likest are preferred
GROUPED = 4.0  # the longest session that the graph encoder reads at once is shorter than so many times the shortest


class BehaviourJob:
    """Stage 2: the next item of every training prefix, from prompts over session graphs.

    `targets: prefix` makes a prompt of every prefix, `positions` a prompt of every session with a branch a prefix.
    `alike` has the items that share a target's weight under `tune.text_smoothing` (see `alike_items`).

    Where the logits start from a base out of fold (`tune.folds`), a step's sessions are of one fold, and node slots,
    graph encoder and the `items` output read the item vectors of the base that was trained without it: how well vectors
    rank what they were fitted to is no guide to what they are worth for a session to come.
    """

    selects = None

    def __init__(self, model: Llmgr, prompts: BehaviourPrompts, train: Sessions, valid: Sessions, settings: Any,
                 seed: int, dtype: torch.dtype, alike: tuple[Tensor, Tensor] | None = None) -> None:
        check_users(model.encoder, "models/embeddings", train)
        train, self.cut = shortened(train, prompts, model.positions, "training")
        if settings.targets == "positions" and not model.causal:
            raise UserError("tune.targets=positions needs causal attention and the backbone is bidirectional: set "
                            "model.attention=causal or tune.targets=prefix")
        self.model, self.prompts, self.settings, self.dtype = model, prompts, settings, dtype
        self.train, self.device = train, model.vectors.device
        self.laid_out = train.to("cpu")
        self.weight = None if settings.recency == 1 else train.recency(settings.recency)
        self.first, self.last, self.sample = spans(train, settings.targets == "positions")
        draw = torch.Generator().manual_seed(seed + 2)
        count = settings.valid_sessions or len(valid)
        self.scorer = Scorer(model, prompts, valid.subset(torch.randperm(len(valid), generator=draw)[:count].sort()[0]),
                             dtype)
        self.alike = None if alike is None else [t.to(self.device) for t in alike]
        self.fold, self.shifts = None, [None]
        if model.linear_term is not None and model.linear_term.base is not None:
            base = model.linear_term.base
            self.fold = base.fold_U[self.laid_out.user[self.laid_out.row]]
            self.shifts = [shift.to(self.device) for shift in base.shifts(target_counts(train.target,
                                                                                        len(model.vectors)))]
        self.frozen = None
        if not any(p.requires_grad for p in model.encoder.parameters()):
            self.frozen = all_sessions(model, train, self.fold, self.shifts)

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        chosen = torch.randperm(len(self.first), generator=generator)[:self.settings.samples or None]
        if self.fold is None:
            return drawn_steps(chosen, self.last, self.settings, self.model.packs)
        fold = self.fold[self.sample[chosen]]
        steps = [step for k in fold.unique().tolist()
                 for step in drawn_steps(chosen[fold == k], self.last, self.settings, self.model.packs)]
        return [steps[n] for n in torch.randperm(len(steps), generator=generator)]

    def targets(self, micro: Tensor) -> int:
        return int((self.last[micro] - self.first[micro] + 1).sum())

    def loss(self, micro: Tensor) -> Loss:
        count = (self.last[micro] - self.first[micro] + 1)
        within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        sample_R = (self.sample[micro].repeat_interleave(count) + within).to(self.device)
        graphs = self.laid_out.prefix_graphs(self.laid_out.row[self.sample[micro]], self.last[micro])
        prompts = self.prompts(graphs, self.first[micro])
        prompts = self.model.pack(prompts, PACKED)
        tokens = prompts.tokens
        shift_VD = self.shifts[0 if self.fold is None else int(self.fold[self.sample[micro[0]]])]
        session_RD = self.frozen[sample_R] if self.frozen is not None else self._sessions(sample_R, shift_VD)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            query, table, bias = self.model(prompts.to(self.device), session_RD, shift_VD)
        target_R = self.train.target[sample_R]
        if self.weight is not None or self.model.linear_term is not None:
            total = self._loss(logits(query.float(), table, bias), sample_R, target_R)
        else:
            total = item_cross_entropy(query.float(), table, target_R, bias)
            if self.alike is not None:
                total = total + self.settings.text_smoothing * self._ahead(query.float(), table, bias, target_R)
        return Loss(total, len(sample_R), tokens)

    def _loss(self, scores_RV: Tensor, sample_R: Tensor, target_R: Tensor) -> Tensor:
        """The summed loss where more than a product of vectors makes the logits or targets differ in weight."""
        if self.model.linear_term is not None:
            scores_RV = scores_RV + self.model.linear_term(self.train, sample_R, True)
        ahead_R = 0.0
        if self.alike is not None:
            nearest_RN, weight_RN = (t[target_R] for t in self.alike)
            mean_R = (weight_RN * scores_RV.gather(1, nearest_RN)).sum(1)
            ahead_R = scores_RV.gather(1, target_R[:, None])[:, 0] - mean_R
        loss_R = F.cross_entropy(scores_RV[:, 1:], target_R - 1, reduction="none")
        loss_R = loss_R + self.settings.text_smoothing * ahead_R
        return (loss_R if self.weight is None else loss_R * self.weight[sample_R]).sum()

    def _ahead(self, query_RK: Tensor, table_VK: Tensor, bias_V: Tensor | None, target_R: Tensor) -> Tensor:
        """How far the targets' logits are ahead of the weighted mean of those of the items alike, summed.

        A share of it, added to the cross-entropy of the targets, makes that of the smoothed targets.
        """
        nearest_RN, weight_RN = (t[target_R] for t in self.alike)
        mean_RK = (weight_RN[:, None] @ table_VK[nearest_RN])[:, 0]
        total = (query_RK * (table_VK[target_R] - mean_RK)).sum()
        return total if bias_V is None else total + (bias_V[target_R] - (weight_RN * bias_V[nearest_RN]).sum(1)).sum()

    def _sessions(self, sample_R: Tensor, shift_VD: Tensor | None) -> Tensor:
        """The graph encoder's readouts [R, D], read in groups of like length where it computes at padding."""
        if not self.model.encoder.pads:
            return self.model.sessions(self.train.graphs(sample_R), shift_VD)
        length = self.laid_out.length[sample_R.cpu()]
        groups = alike(torch.arange(len(sample_R)), length, GROUPED, self.device)
        read = torch.cat([self.model.sessions(self.train.graphs(sample_R[group.to(self.device)]), shift_VD)
                          for group in groups])
        return read[torch.argsort(torch.cat(groups)).to(self.device)]

    def validate(self) -> dict[str, float]:
        return self.scorer.validate()


def target_counts(target_N: Tensor, size: int) -> Tensor:
    """How often every item is a target, [V+1]."""
    return torch.bincount(target_N, minlength=size).float()


def spans(train: Sessions, positions: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of a training set: shortest prefix, longest prefix and first sample of each.

    With `positions` a prompt covers all prefixes that share a row; else each sample is a prompt of its own.
    """
    length, row = train.length.cpu(), train.row.cpu()
    sample = torch.arange(len(train))
    if not positions:
        return length, length, sample
    start = torch.full((int(row.max()) + 1,), len(train)).scatter_reduce(0, row, sample, "amin")
    count = torch.bincount(row)
    assert torch.equal(row, torch.arange(len(count)).repeat_interleave(count)), "prefixes of a row must be consecutive"
    return length[start], length[start] + count - 1, start


@torch.no_grad()
def all_sessions(model: Llmgr, sessions: Sessions, fold_N: Tensor | None = None,
                 shifts: Sequence[Tensor | None] = (None,)) -> Tensor:
    """The frozen encoder's readouts of all samples, computed once [samples, D], each over its fold's item vectors."""
    model.encoder.eval()
    place = model.vectors.device
    result = torch.zeros(len(sessions), model.vectors.shape[1], device=place)
    order = torch.argsort(sessions.length.cpu(), stable=True)
    for fold, shift_VD in enumerate(shifts):
        chosen = order if fold_N is None else order[fold_N[order] == fold]
        for samples in chosen.to(place).split(1024) if len(chosen) else ():
            result[samples] = model.sessions(sessions.graphs(samples), shift_VD)
    return result


def alike_items(params: Any) -> tuple[Tensor, Tensor] | None:
    """For `tune.text_smoothing`, the items whose title and brand share most words with each item's, and their weights.

    Both [V+1, 10], from the catalogue; None where nothing is smoothed. A twin of shuffled texts has shuffled ones.
    """
    if not params.tune.text_smoothing:
        return None
    from llmgr.text.words import catalogue_words, most_alike

    return most_alike(catalogue_words(texts_shuffled(params)), ALIKE, TEMPERATURE)
