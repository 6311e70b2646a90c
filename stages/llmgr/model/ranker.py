"""LLMGR's logits of all items for sessions, which training, validation, evaluation and serving share.

Shapes: N training samples, U users.
"""
from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmgr.encoders.layers import cross_entropy
from llmgr.language_model.packing import PACKED
from llmgr.model.llmgr import Llmgr
from llmgr.model.loss import TextSmoothing, summed_cross_entropy
from llmgr.model.outputs import Factors
from llmgr.model.prompts import BehaviourPrompts
from llmgr.prior.weighted_sum import Prior
from llmgr.ranking.loop import Score, rank_sessions
from llmgr.ranking.metrics import metrics
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError
from llmgr.sessions.batching import by_length
from llmgr.sessions.tensors import Sessions
from llmgr.training.distributed import spread
from llmgr.training.job import Loss

GROUPED = 4.0  # `ratio` of `by_length` for the sessions that the graph encoder reads together
VALIDATED = 128  # sessions that validation scores at a time
READ = 1024  # sessions that a frozen graph encoder reads at a time


class Ranker(nn.Module):
    """The logits of all items: LLMGR's, from a prompt, plus the prior's where there is one.

    `dtype` is the precision of the language model. Training under `tune.folds` needs `learn_from` first. Then a
    training session is scored by the cross-fitted base, and its prompt and the `items` output read the item vectors of
    the base that was trained without its user, since the base's own vectors were trained on the same targets.
    """

    def __init__(self, llmgr: Llmgr, prompts: BehaviourPrompts, dtype: torch.dtype, prior: Prior | None = None) -> None:
        super().__init__()
        self.llmgr, self.prior = llmgr, prior
        self.prompts, self.dtype = prompts, dtype
        self.fold_N: Tensor | None = None
        """The fold of each training sample's user, on the CPU; None without folds."""
        self.shifts: list[Tensor] = []
        self.readouts: Tensor | None = None
        self._laid_out: WeakKeyDictionary[Sessions, Sessions] = WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        return self.llmgr.vectors.device

    def logits(self, sessions: Sessions, samples_R: Tensor, count_B: Tensor | None = None, *, trained: bool = False
               ) -> Tensor:
        """Logits [R, V+1] of samples [R] whose sessions fit the prompt (`shortened`); column 0 is padding.

        `trained` marks training sessions. For these `count_B` can give the number of samples of each prompt:
        consecutive prefixes of a row, shortest first. With folds all samples of a call must be of one fold, whose item
        vectors they share; ValueError otherwise.
        """
        scores_RV = self.factors(sessions, samples_R, count_B, trained=trained)[0].logits()
        offset_RV = self.offset(sessions, samples_R, trained)
        return scores_RV if offset_RV is None else scores_RV + offset_RV

    def offset(self, sessions: Sessions, samples_R: Tensor, trained: bool) -> Tensor | None:
        """The prior's logits [R, V+1], None without a prior."""
        return None if self.prior is None else self.prior(sessions, samples_R, trained)

    def factors(self, sessions: Sessions, samples_R: Tensor, count_B: Tensor | None = None, *, trained: bool = False
                ) -> tuple[Factors, int]:
        """The factors of LLMGR's own logits, and the number of useful tokens in the prompts; arguments as in `logits`.

        ValueError where `trained` samples are of several folds.
        """
        laid_out, sample_R = self._on_cpu(sessions), samples_R.cpu()
        samples_R = samples_R.to(self.device)
        graphs = laid_out.graphs(sample_R if count_B is None else sample_R[count_B.cumsum(0) - 1])
        prompts = self.prompts(graphs, graphs.length_B if count_B is None else graphs.length_B - count_B + 1)
        shift_VD = None
        if trained:
            prompts = self.llmgr.execution.arranged(prompts, PACKED)
            shift_VD = self._shift(sample_R)
        tokens = prompts.tokens
        if not self.prompts.reads_graph:
            session_RD = None
        elif trained and self.readouts is not None:
            session_RD = self.readouts[samples_R]
        elif trained:
            session_RD = self._read_in_groups(sessions, samples_R, laid_out.length[sample_R], shift_VD)
        else:
            session_RD = self.llmgr.sessions(sessions.graphs(samples_R))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            factors = self.llmgr(prompts.to(self.device), session_RD, shift_VD)
        return factors._replace(query_RK=factors.query_RK.float()), tokens

    def loss(self, sessions: Sessions, samples_R: Tensor, count_B: Tensor | None = None,
             weight_R: Tensor | None = None, smoothing: TextSmoothing | None = None) -> Loss:
        """The summed loss of training samples; arguments as in `logits` and `summed_cross_entropy`.

        With folds all samples of a call must be of one fold; ValueError otherwise.
        """
        factors, tokens = self.factors(sessions, samples_R, count_B, trained=True)
        samples_R = samples_R.to(self.device)
        offset_RV = self.offset(sessions, samples_R, trained=True)
        total = summed_cross_entropy(factors, sessions.target[samples_R], offset_RV, weight_R, smoothing)
        return Loss(total, len(samples_R), tokens)

    def over(self, sessions: Sessions) -> Score:
        """The score of validation or test sessions, which are cut to what fits the prompt."""
        sessions, _ = self.shortened(sessions, "validation or test")
        return torch.no_grad()(lambda samples: self.logits(sessions, samples))

    @torch.no_grad()
    def validate(self, sessions: Sessions) -> dict[str, float]:
        """The mean loss and the metrics at 20 of validation sessions that fit the prompt (`shortened`)."""
        total = 0.0

        def scored(samples: Tensor) -> Tensor:
            nonlocal total
            scores = spread(lambda part: self.logits(sessions, part), samples)
            total += cross_entropy(scores, sessions.target[samples]).item()
            return scores

        result = metrics(rank_sessions(scored, sessions, VALIDATED))
        return {"valid_loss": total / len(sessions),
                **{f"valid_{name}": result[name] for name in ("hr_at_20", "ndcg_at_20", "mrr_at_20")}}

    def shortened(self, sessions: Sessions, kind: str) -> tuple[Sessions, int]:
        """The sessions cut to the most recent clicks whose prompt fits the backbone's positions, and how many were cut.

        The graph encoder does not see the lost clicks either. UserError where not even one click fits.
        """
        positions = self.llmgr.positions
        if self.prompts.longest(sessions.items.shape[1]) <= positions:
            return sessions, 0
        recent = self.prompts.fitting(sessions, positions)
        if not recent.all():
            raise UserError(f"not even one click fits the backbone's {positions} positions: lower tune.title_tokens, "
                            "or set tune.titles=false or tune.prompt=slot")
        cut = int((recent < sessions.length.cpu()).sum())
        if cut:
            say(f"{cut} of {len(sessions)} {kind} prompts are cut to their most recent clicks: the backbone has "
                f"{positions} positions")
            sessions = sessions.to("cpu").recent(recent).to(sessions.row.device)
        return sessions, cut

    @torch.no_grad()
    def learn_from(self, sessions: Sessions) -> None:
        """Compute once what every step of training on these sessions needs: the folds' item vectors, and the readouts
        of a frozen graph encoder."""
        self.fold_N, self.shifts, self.readouts = None, [], None
        if self.prior is not None and self.prior.base is not None:
            base = self.prior.base
            count_V = torch.bincount(sessions.target, minlength=len(self.llmgr.vectors)).float()
            self.fold_N = base.fold_U[self._on_cpu(sessions).user[self._on_cpu(sessions).row]]
            self.shifts = [shift_VD.to(self.device) for shift_VD in base.shifts(count_V)]
        if self.prompts.reads_graph and not any(p.requires_grad for p in self.llmgr.encoder.parameters()):
            self.readouts = self._all_readouts(sessions)

    def _shift(self, sample_R: Tensor) -> Tensor | None:
        """The item vectors of the samples' fold less the base's [V+1, D]; None without folds."""
        if self.fold_N is None:
            return None
        fold_R = self.fold_N[sample_R]
        if (fold_R != fold_R[0]).any():
            raise ValueError(f"samples of one call must be of one fold, not of {fold_R.unique().tolist()}")
        return self.shifts[int(fold_R[0])]

    def _all_readouts(self, sessions: Sessions) -> Tensor:
        """The graph encoder's readouts of all samples [samples, D], each with its fold's item vectors."""
        self.llmgr.encoder.eval()
        readouts = torch.zeros(len(sessions), self.llmgr.vectors.shape[1], device=self.device)
        order = torch.argsort(sessions.length.cpu(), stable=True)
        for fold, shift_VD in enumerate(self.shifts or [None]):
            chosen = order if self.fold_N is None else order[self.fold_N[order] == fold]
            for samples in chosen.to(self.device).split(READ) if len(chosen) else ():
                readouts[samples] = self.llmgr.sessions(sessions.graphs(samples), shift_VD)
        return readouts

    def _read_in_groups(self, sessions: Sessions, samples_R: Tensor, length_R: Tensor, shift_VD: Tensor | None
                        ) -> Tensor:
        """The graph encoder's readouts [R, D], computed in groups of similar length where it computes at padding."""
        if not self.llmgr.encoder.pads:
            return self.llmgr.sessions(sessions.graphs(samples_R), shift_VD)
        groups = by_length(torch.arange(len(samples_R)), length_R, GROUPED, self.device)
        session_RD = torch.cat([self.llmgr.sessions(sessions.graphs(samples_R[group.to(self.device)]), shift_VD)
                                for group in groups])
        return session_RD[torch.argsort(torch.cat(groups)).to(self.device)]

    def _on_cpu(self, sessions: Sessions) -> Sessions:
        """The same sessions on the CPU, where prompts are laid out."""
        if sessions.row.device.type == "cpu":
            return sessions
        if sessions not in self._laid_out:
            self._laid_out[sessions] = sessions.to("cpu")
        return self._laid_out[sessions]
