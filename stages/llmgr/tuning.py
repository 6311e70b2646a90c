"""LLMGR's two training stages and its scoring: which prompts, which targets, which loss (METHOD 1, steps 5 and 6)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.encoders import check_users
from llmgr.encoders.layers import item_cross_entropy
from llmgr.errors import UserError
from llmgr.graph import Sessions, alike
from llmgr.launch import spread
from llmgr.llmgr import Llmgr, logits
from llmgr.params import texts_shuffled
from llmgr.pretraining import rank_sessions
from llmgr.prompts import AlignmentPrompts, BehaviourPrompts
from llmgr.ranking import metrics
from llmgr.stage import say
from llmgr.training import Loss

ACCURACY_ITEMS = 1024
ALIKE, TEMPERATURE = 10, 0.1  # text smoothing: items that share a target's weight, how sharply the likest are preferred
PACKED = 64  # tokens of a row of packed prompts, at least
GROUPED = 4.0  # the longest session that the graph encoder reads at once is shorter than so many times the shortest


def shortened(sessions: Sessions, prompts: BehaviourPrompts, positions: int, kind: str) -> tuple[Sessions, int]:
    """Sessions whose prompts fit the backbone's positions, by their most recent clicks, and how many lost some.

    What the prompt lost the graph encoder does not see either. UserError where not even one click fits.
    """
    if prompts.longest(sessions.items.shape[1]) <= positions:
        return sessions, 0
    kept = prompts.fitting(sessions, positions)
    if not kept.all():
        raise UserError(f"not even one click fits the backbone's {positions} positions: lower tune.title_tokens, or "
                        "set tune.titles=false or tune.prompt=slot")
    cut = int((kept < sessions.length.cpu()).sum())
    if cut:
        say(f"{cut} of {len(sessions)} {kind} prompts are cut to their most recent clicks: the backbone has "
            f"{positions} positions")
        sessions = sessions.to("cpu").recent(kept).to(sessions.row.device)
    return sessions, cut


class AlignJob:
    """Stage 1: among candidate nodes, the one that a text describes; every item is described once an epoch.

    The softmax runs over all items or over the candidates shown (`align.softmax`). Validation draws other candidates
    for a fixed sample of items and reports how often the described node scores highest.
    """

    selects = None

    def __init__(self, model: Llmgr, prompts: AlignmentPrompts, settings: Any, seed: int, dtype: torch.dtype) -> None:
        self.cut = prompts.shorten(settings.candidates, model.positions)
        if self.cut:
            say(f"{self.cut} of {len(prompts.count) - 1} texts are cut: the backbone has {model.positions} positions")
        self.model, self.prompts, self.settings, self.dtype = model, prompts, settings, dtype
        self.device = model.vectors.device
        self.items = len(model.vectors) - 1
        if settings.candidates > self.items:
            raise UserError(f"align.candidates={settings.candidates} exceeds the catalogue's {self.items} items")
        held = torch.Generator().manual_seed(seed + 1)
        self.checked = torch.randperm(self.items, generator=held)[:ACCURACY_ITEMS] + 1
        self.checked_candidates = draw_candidates(self.items, settings.candidates, held)

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        self.candidates = draw_candidates(self.items, self.settings.candidates, generator)
        order = torch.randperm(self.items, generator=generator) + 1
        return drawn_steps(order, self.prompts.count, self.settings, self.model.packs)

    def targets(self, micro: Tensor) -> int:
        return len(micro)

    def loss(self, micro: Tensor) -> Loss:
        query, table, bias, tokens = self._forward(micro, self.candidates)
        shown = self.candidates[micro].to(self.device)
        target = micro.to(self.device)
        if self.settings.softmax == "candidates":
            scores = self._among(query, table, bias, shown)
            total = F.cross_entropy(scores, (shown == target[:, None]).int().argmax(1), reduction="sum")
        else:
            total = item_cross_entropy(query, table, target, bias)
        return Loss(total, len(micro), tokens)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        among = overall = 0
        for micro in self.checked.split(64):
            right = spread(self._right, micro).sum(0)
            among, overall = among + int(right[0]), overall + int(right[1])
        return {"accuracy_candidates": among / len(self.checked), "accuracy_items": overall / len(self.checked)}

    def _right(self, micro: Tensor) -> Tensor:
        """Whether each item is told from its candidates, and from all items [B, 2]."""
        query, table, bias, _ = self._forward(micro, self.checked_candidates)
        shown, target = self.checked_candidates[micro].to(self.device), micro.to(self.device)
        best = self._among(query, table, bias, shown).argmax(1)
        return torch.stack((shown.gather(1, best[:, None])[:, 0] == target,
                            logits(query, table, bias)[:, 1:].argmax(1) + 1 == target), 1)

    def _forward(self, micro: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int]:
        prompts = self.prompts(micro, candidates[micro])
        prompts = self.model.pack(prompts, 2 * PACKED)  # texts are long: one would not leave room for another
        tokens = prompts.tokens
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            query, table, bias = self.model(prompts.to(self.device), None)
        return query.float(), table, bias, tokens

    @staticmethod
    def _among(query: Tensor, table: Tensor, bias: Tensor | None, shown: Tensor) -> Tensor:
        scores = (table[shown] @ query[..., None])[..., 0]
        return scores if bias is None else scores + bias[shown]


def draw_candidates(items: int, count: int, generator: torch.Generator) -> Tensor:
    """For every item (row 0 unused) `count` distinct-from-it nodes with itself at a random place: [V+1, count]."""
    item = torch.arange(items + 1)[:, None]
    others = torch.randint(1, items, (items + 1, count), generator=generator)
    others += others >= item  # skips the item itself, keeps the draw uniform
    place = torch.randint(count, (items + 1, 1), generator=generator)
    return others.clamp(max=items).scatter(1, place, item)


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
        self.prior = log_shares(train.target, len(model.vectors)) * settings.adjustment if settings.adjustment else None
        self.scorer = Scorer(model, prompts, valid.subset(torch.randperm(len(valid), generator=draw)[:count].sort()[0]),
                             dtype, self.prior)
        self.alike = None if alike is None else [t.to(self.device) for t in alike]
        if settings.item_noise:
            model.disturb_items(settings.item_noise, target_counts(train.target, len(model.vectors)))
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
        if self.prior is not None:
            bias = self.prior if bias is None else bias + self.prior
        target_R = self.train.target[sample_R]
        if self.settings.mask_seen or self.weight is not None or self.model.linear_term is not None:
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
        if self.settings.mask_seen:
            seen = torch.zeros_like(scores_RV, dtype=torch.bool).scatter_(1, self.train.graphs(sample_R).items_BS, True)
            scores_RV = scores_RV.masked_fill(seen.scatter_(1, target_R[:, None], False), float("-inf"))
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


class Scorer:
    """Scores of all items for sessions, from a prompt a session; what validation and test both use."""

    def __init__(self, model: Llmgr, prompts: BehaviourPrompts, sessions: Sessions, dtype: torch.dtype,
                 prior_V: Tensor | None = None) -> None:
        self.model, self.prompts, self.dtype, self.prior = model, prompts, dtype, prior_V
        self.sessions, _ = shortened(sessions, prompts, model.positions, "validation or test")
        self.laid_out = self.sessions.to("cpu")

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Scores [B, V+1] of samples [B]."""
        graphs = laid_out = self.sessions.graphs(samples)
        if self.laid_out is not self.sessions:
            laid_out = self.laid_out.graphs(samples.cpu())
        prompts, session_BD = self.prompts(laid_out, laid_out.length_B), self.model.sessions(graphs)
        with torch.autocast(samples.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            query, table, bias = self.model(prompts.to(samples.device), session_BD)
        scores = logits(query.float(), table.float(), bias)
        return scores if self.model.linear_term is None else scores + self.model.linear_term(self.sessions, samples)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss (that of training, `prior_V` included) and full-ranking metrics at 20 (without it) of its sessions."""
        total = 0.0

        def score(samples: Tensor) -> Tensor:
            nonlocal total
            scores = spread(self, samples)
            adjusted = scores if self.prior is None else scores + self.prior
            total += F.cross_entropy(adjusted[:, 1:], self.sessions.target[samples] - 1, reduction="sum").item()
            return scores

        found = metrics(rank_sessions(score, self.sessions, 128))
        return {"valid_loss": total / len(self.sessions),
                **{f"valid_{name}": found[name] for name in ("hr_at_20", "ndcg_at_20", "mrr_at_20")}}


def log_shares(target_N: Tensor, size: int) -> Tensor:
    """Logarithm of every item's share of the targets, one added to each count, [V+1]."""
    count_V = target_counts(target_N, size) + 1
    return (count_V / count_V.sum()).log()


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


def drawn_steps(order: Tensor, length: Tensor, settings: Any, packs: bool) -> list[list[Tensor]]:
    """Steps of accumulate x batch_size samples in `order`, each in micro-batches.

    Where prompts are packed any will do; else a micro-batch holds samples of like `length`, so that little is padding.
    """
    size = settings.batch_size
    return [list(step.split(size)) if packs else [part for group in alike(step, length) for part in group.split(size)]
            for step in order.split(size * settings.accumulate)]


def behaviour_prompts(params: Any, settings: Any) -> BehaviourPrompts:
    """Stage 2's prompts over models/backbone and the catalogue, as the tune section words them."""
    from llmgr.backbone import load_tokenizer
    from llmgr.text_vectors import item_texts

    titles = item_texts("data/core/items.parquet", "title", texts_shuffled(params)) if settings.titles else None
    return BehaviourPrompts(load_tokenizer("models/backbone"), settings.prompt, titles, settings.title_tokens,
                            settings.edges)


def alike_items(params: Any) -> tuple[Tensor, Tensor] | None:
    """For `tune.text_smoothing`, the items whose title and brand share most words with each item's, and their weights.

    Both [V+1, 10], from the catalogue; None where nothing is smoothed. A twin of shuffled texts has shuffled ones.
    """
    if not params.tune.text_smoothing:
        return None
    from llmgr.neighbours import catalogue_words, most_alike

    return most_alike(catalogue_words(texts_shuffled(params)), ALIKE, TEMPERATURE)
