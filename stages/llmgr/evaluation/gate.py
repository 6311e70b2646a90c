"""The gate: several scorers fused with weights that depend on how often the candidate item was trained on.

The formula and the optimiser are those of `llmgr.ranking.banded_sum`, which the prior uses, too. The ID vector of a
rare item is noise and its text is as good as any other, so its text should count for more: "LLMGR for cold items, the
graph model for head items" (arXiv 2402.16539, discussion), in a few dozen numbers. They are fitted on validation
sessions, which no scorer was trained on, by softmax cross-entropy with seen items masked, unless the scorer `repeat` is
fused.

Shapes: M scorers, N bands, S sessions, X seen items.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.functional import hessian
from torch.nn import functional as F

from llmgr.evaluation.baselines import Over
from llmgr.params.names import REPEAT
from llmgr.ranking.banded_sum import banded_sum, fit
from llmgr.ranking.metrics import metrics, ranks_both
from llmgr.runtime.artifacts import read_json, write_json
from llmgr.runtime.console import Bar
from llmgr.runtime.errors import UserError
from llmgr.sessions.tensors import Sessions

CHUNK = 256  # sessions whose scores of all items are held at a time
CACHED = 2**18  # of these scores on a CPU, so that its cache holds what sums are formed of
RIDGE = 1e-4  # keeps bands without a target finite, and the common constant of the biases fixed
MANY, COARSE = 4096, 8  # of more sessions, one part in eight is fitted first, which spares rounds over all of them
CURVED = 64  # sessions that the curvature is measured on
CLOSE = 1e-5  # gradient in coordinates of curvature 1: the loss is then within 1e-8 nats of its lowest


class Gate:
    """Weights [M, N] of M scorers and biases [N] for N bands of training interactions with lower ends `edges`."""

    def __init__(self, scorers: Sequence[str], edges: Sequence[int], weight_MN: Tensor, bias_N: Tensor) -> None:
        self.scorers, self.edges, self.weight, self.bias = list(scorers), list(edges), weight_MN, bias_N

    def __call__(self, scores_MBV: Sequence[Tensor], band_V: Tensor) -> Tensor:
        """Fused scores [B, V+1] of the scorers' scores, in the order of `scorers`."""
        return banded_sum(scores_MBV, self.weight.to(band_V.device), self.bias.to(band_V.device), band_V)

    def save(self, path: str | Path) -> None:
        """Write the numbers as JSON."""
        write_json(path, {"scorers": self.scorers, "edges": self.edges, "weight": self.weight.tolist(),
                          "bias": self.bias.tolist()})

    @classmethod
    def load(cls, path: str | Path, scorers: Sequence[str], edges: Sequence[int]) -> Gate:
        """Read what `save` wrote; UserError where its scorers or bands are not the given ones."""
        saved = read_json(path)
        if saved["scorers"] != list(scorers) or saved["edges"] != list(edges):
            raise UserError(f"{path} fuses other scorers or bands than the gate section asks for: run `dvc repro gate`")
        return cls(scorers, edges, torch.tensor(saved["weight"]), torch.tensor(saved["bias"]))


def bands(trained_V: Tensor, edges: Sequence[int]) -> Tensor:
    """The band of every item [V+1] by its training interactions; band 0 lies below the first edge."""
    return torch.bucketize(trained_V, torch.tensor(edges), right=True)


def draw(sessions: int, most: int, seed: int) -> Tensor:
    """At most `most` of the sessions (0 takes all), drawn by seed, in order."""
    order = torch.randperm(sessions, generator=torch.Generator().manual_seed(seed))
    return order[:most or sessions].sort()[0]


@torch.no_grad()
def score_tables(makers: Mapping[str, Callable[[], Over]], sessions: Sessions, batch_size: int
                 ) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each scorer's scores of all sessions [S, V+1], on the device of the scores, and its seconds.

    In half precision, or in float32 where a score is too large for that.
    """
    batches = torch.argsort(sessions.length, stable=True).split(batch_size)
    tables, seconds = {}, {}
    for name, make in makers.items():
        start = time.monotonic()
        score, bar = make()(sessions), Bar(len(batches), 0, f"gate: {name}")
        for number, samples in enumerate(batches, 1):
            scores = score(samples)
            if name not in tables:
                tables[name] = scores.new_empty(len(sessions), scores.shape[1], dtype=torch.half)
            if scores.abs().max() > torch.finfo(torch.half).max:
                tables[name] = tables[name].float()
            tables[name][samples] = scores.to(tables[name].dtype)
            bar.show(number)
        bar.close()
        seconds[name] = time.monotonic() - start
    return tables, seconds


def cross_fitted(scorers: Sequence[str], scores_MSV: Sequence[Tensor], target_S: Tensor, seen_SX: Tensor,
                 band_V: Tensor, edges: Sequence[int], seed: int, start: Gate | None = None
                 ) -> dict[str, dict[str, float]]:
    """Cross-fitted metrics of validation sessions: each half is scored by the gate that was fitted to the other half.

    `valid` ranks all items, `valid_unseen` excludes seen ones. A gate's scorers and bands are to be chosen by these. A
    fit may start from the gate of all sessions, since the optimum of a half does not depend on the start. UserError for
    a single session.
    """
    if len(target_S) < 2:
        raise UserError("one validation session cannot be halved for the gates: lower filter.core or take a larger "
                        "data.dataset")
    half = torch.zeros(len(target_S), dtype=torch.bool)
    half[draw(len(target_S), (len(target_S) + 1) // 2, seed)] = True
    rank = torch.zeros(2, len(target_S), dtype=torch.long)
    for fitted in (half, ~half):
        gate = fit_gate(scorers, [t[fitted] for t in scores_MSV], target_S[fitted], seen_SX[fitted], band_V, edges,
                        start)
        for rows in (~fitted).nonzero()[:, 0].split(CHUNK):
            fused = gate([t[rows] for t in scores_MSV], band_V)
            rank[:, rows] = torch.stack(ranks_both(fused, target_S[rows], seen_SX[rows].long())).cpu()
    return {name: metrics(r) for name, r in zip(("valid", "valid_unseen"), rank)}


def fit_gate(scorers: Sequence[str], scores_MSV: Sequence[Tensor], target_S: Tensor, seen_SX: Tensor, band_V: Tensor,
             edges: Sequence[int], start: Gate | None = None) -> Gate:
    """The gate that minimises the cross-entropy of the targets among unseen items (all items if `repeat` is fused).

    `scores_MSV` holds a table [S, V+1] for each scorer, in half precision or more; `seen_SX` the items to mask, 0 pads.
    All tensors are on one device. The fit starts from the first scorer alone, or from the gate `start`, which saves
    steps and does not change the result. UserError where a scorer gives all items the same score.
    """
    if REPEAT in scorers:
        seen_SX = torch.zeros_like(seen_SX[:, :1])
    spread = torch.tensor([float(table[:CHUNK, 1:].float().std()) for table in scores_MSV])
    if not bool((spread > 0).all()):
        flat = scorers[int((spread > 0).logical_not().nonzero()[0])]
        raise UserError(f"gate.fuse: {flat} scores all items alike and cannot be weighed: take it out")
    theta = torch.zeros(len(scores_MSV) + 1, len(edges) + 1, dtype=torch.double)
    theta[0] = spread[0]
    if start is not None:
        theta[:-1], theta[-1] = start.weight * spread[:, None], start.bias
    theta, scale = theta.to(band_V.device), torch.cat((1 / spread, torch.ones(1)))[:, None].to(band_V.device)

    def losses(theta: Tensor, rows: slice) -> Tensor:
        target = target_S[rows].long()
        *weight_MN, bias_N = (theta * scale).float()
        fused = banded_sum([table[rows] for table in scores_MSV], weight_MN, bias_N, band_V)
        hidden = F.pad(seen_SX[rows].long(), (1, 0))  # hides item 0, the padding, everywhere
        fused = fused.scatter(1, hidden.where(hidden != target[:, None], 0), float("-inf"))
        return F.cross_entropy(fused, target, reduction="none").double() + 0.5 * RIDGE * theta.square().sum()

    chunk = CHUNK if band_V.device.type != "cpu" else max(1, CACHED // len(band_V))
    parts = [slice(at, at + chunk) for at in range(0, len(target_S), chunk)]
    for some in [parts[::COARSE], parts] if start is None and len(target_S) > MANY else [parts]:
        theta = _fitted(theta, losses, some, some[::max(1, len(some) * chunk // CURVED)])
    fitted = (theta * scale).float().cpu()
    return Gate(scorers, edges, fitted[:-1], fitted[-1])


def _fitted(theta: Tensor, losses: Callable[[Tensor, slice], Tensor], parts: Sequence[slice], few: Sequence[slice]
            ) -> Tensor:
    """The theta [M+1, N] of the lowest mean loss of `parts`.

    Scorers agree with each other, so the loss is a long valley in theta. L-BFGS moves in coordinates that make the loss
    of a `few` parts equally curved in all directions: some 8 rounds instead of 50.
    """
    curved = hessian(lambda at: torch.cat([losses(at, part) for part in few]).mean(), theta)
    curvature, axes = torch.linalg.eigh(curved.view(theta.numel(), -1))
    axes /= curvature.clamp(min=RIDGE).sqrt()
    step = torch.zeros_like(curvature, requires_grad=True)
    fit([step], lambda part: losses(theta + (axes @ step).view_as(theta), part), parts, CLOSE)
    return theta + (axes @ step.detach()).view_as(theta)
