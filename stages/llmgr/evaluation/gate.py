"""The gate: several scorers fused with weights that depend on how often the candidate item was trained on.

z_j = sum_m w[m, bin(j)] s_m,j + b[bin(j)], where bin(j) is the band of the item's training interactions. An item met
once has an ID row that is noise and a text that is as good as any other's, so its text should count for more: "LLMGR
for cold items, the graph model for head items" (arXiv 2402.16539, discussion) as a formula of a few dozen numbers. They
are fitted on validation sessions, which no scorer was trained on, by softmax cross-entropy with seen items masked
(unless the scorer `repeat` is to learn of them): a multinomial logit, convex, whose one optimum Newton's method finds.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmgr.params.names import REPEAT
from llmgr.ranking.metrics import metrics, ranks_both
from llmgr.runtime.artifacts import read_json, write_json
from llmgr.runtime.console import Bar
from llmgr.runtime.errors import UserError
from llmgr.sessions.tensors import Sessions

CHUNK = 256  # sessions whose scores of all items are held at a time
CACHED = 2**19  # of these scores on a CPU, so that its cache holds what sums are formed of
RIDGE = 1e-4  # keeps bands without a target finite, and the common constant of the biases fixed
STEPS = 30
DONE = 1e-7  # Newton decrement, in nats a session
ROUNDING = 1e-6  # what a loss of float32 scores is known to: a step that raises it by less is no worse


class Gate:
    """Weights [M, N] of M scorers and biases [N] for N bands of training interactions with lower ends `edges`."""

    def __init__(self, scorers: Sequence[str], edges: Sequence[int], weight_MN: Tensor, bias_N: Tensor) -> None:
        self.scorers, self.edges, self.weight, self.bias = list(scorers), list(edges), weight_MN, bias_N

    def __call__(self, scores_MBV: Sequence[Tensor], band_V: Tensor) -> Tensor:
        """Fused scores [B, V+1] of the scorers' scores, in the order of `scorers`."""
        fused = self.bias.to(band_V.device)[band_V].expand_as(scores_MBV[0]).clone()
        for weight_N, scores_BV in zip(self.weight.to(band_V.device), scores_MBV):
            fused.addcmul_(weight_N[band_V].expand_as(scores_BV), scores_BV.float())
        return fused

    def save(self, path: str | Path) -> None:
        """Write the numbers as JSON."""
        write_json(path, {"scorers": self.scorers, "edges": self.edges, "weight": self.weight.tolist(),
                          "bias": self.bias.tolist()})

    @classmethod
    def load(cls, path: str | Path, scorers: Sequence[str], edges: Sequence[int]) -> Gate:
        """Read what `save` wrote; UserError where it fuses other scorers or bands than asked for."""
        kept = read_json(path)
        if kept["scorers"] != list(scorers) or kept["edges"] != list(edges):
            raise UserError(f"{path} fuses other scorers or bands than the gate section asks for: run `dvc repro gate`")
        return cls(scorers, edges, torch.tensor(kept["weight"]), torch.tensor(kept["bias"]))


def bands(trained_V: Tensor, edges: Sequence[int]) -> Tensor:
    """The band of every item [V+1] by its training interactions; band 0 lies below the first edge."""
    return torch.bucketize(trained_V, torch.tensor(edges), right=True)


def draw(sessions: int, most: int, seed: int) -> Tensor:
    """At most `most` of the sessions (0 takes all), drawn by seed, in order."""
    order = torch.randperm(sessions, generator=torch.Generator().manual_seed(seed))
    return order[:most or sessions].sort()[0]


@torch.no_grad()
def score_tables(makers: Mapping[str, Callable[[], Any]], sessions: Sessions, batch_size: int
                 ) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Every scorer's scores of all items for all sessions, [S, V+1] where they are; its seconds.

    In half precision, or in float32 where that ends short of a score.
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
    """Metrics of sessions that the gate was not fitted on: each half is scored by the other half's gate.

    Newton may start from the gate of all sessions: the optimum of a half is its own all the same. `valid` keeps seen
    items, `valid_unseen` excludes them. What to choose a gate's scorers and bands by. UserError for a single session.
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

    `scores_MSV`: a table [S, V+1] of each scorer (half precision will do), `seen_SX`: items to mask, 0 pads. Starts
    from the first scorer alone, or from another gate, which saves steps and changes nothing else. UserError where a
    scorer says the same of every item. Sums are formed where the tables are, which the other tensors share.
    """
    if REPEAT in scorers:
        seen_SX = torch.zeros_like(seen_SX[:, :1])
    spread = torch.tensor([float(table[:CHUNK, 1:].float().std()) for table in scores_MSV])
    if not bool((spread > 0).all()):
        flat = scorers[int((spread > 0).logical_not().nonzero()[0])]
        raise UserError(f"gate.fuse: {flat} scores all items alike and cannot be weighed: take it out")
    count, width = len(edges) + 1, len(scores_MSV) + 1
    theta = torch.zeros(width, count, dtype=torch.double)
    theta[0] = spread[0]
    if start is not None:
        theta[:-1], theta[-1] = start.weight * spread[:, None], start.bias
    onehot_VN = F.one_hot(band_V, count).float()
    onehot_VN[0] = 0

    def look(at: Tensor) -> tuple[float, Tensor, Tensor]:
        return _derivatives(at, scores_MSV, spread, target_S, seen_SX, band_V, onehot_VN)

    loss, gradient, hessian = look(theta)
    for _ in range(STEPS):
        step = torch.linalg.solve(hessian, gradient.flatten()).view_as(theta)
        decrement = float((step * gradient).sum())
        if decrement < DONE:
            break
        share = 1.0
        most = loss + ROUNDING
        while (found := look(theta - share * step))[0] > most - 1e-4 * share * decrement and share > 1e-3:
            share /= 2
        theta, (loss, gradient, hessian) = theta - share * step, found
    return Gate(scorers, edges, (theta[:-1] / spread[:, None]).float(), theta[-1].float())


def _derivatives(theta: Tensor, scores_MSV: Sequence[Tensor], spread: Tensor, target_S: Tensor, seen_SX: Tensor,
                 band_V: Tensor, onehot_VN: Tensor) -> tuple[float, Tensor, Tensor]:
    """Mean loss, gradient [M+1, N] and Hessian of the gate's cross-entropy at theta.

    With x_j = (s_1j, ..., s_Mj, 1) in the block of item j's band: g = E_p[x] - x_y and H = E_p[x x'] - E_p[x] E_p[x]':
    items of different bands meet in the second term alone.
    """
    width, count = theta.shape
    place = band_V.device
    weight_WV = theta.float().to(place)[:, band_V]
    gradient = torch.zeros_like(theta, device=place)
    second = torch.zeros(width, width, count, dtype=torch.double, device=place)
    outer = torch.zeros(width * count, width * count, dtype=torch.double, device=place)
    loss = torch.zeros((), dtype=torch.double, device=place)
    chunk = CHUNK if place.type != "cpu" else max(1, CACHED // len(band_V))
    for target, seen, *tables in zip(*(t.split(chunk) for t in (target_S[:, None], seen_SX, *scores_MSV))):
        x = [table.to(torch.float32, copy=True).div_(scale) for table, scale in zip(tables, spread)]
        z = weight_WV[-1].expand(len(target), -1).clone()
        for w, table in zip(weight_WV, x):
            z.addcmul_(w.expand_as(table), table)
        hidden = torch.zeros_like(z, dtype=torch.bool).scatter_(1, seen.long(), True)
        hidden.scatter_(1, target, False)[:, 0] = True
        z.masked_fill_(hidden, float("-inf"))
        top = z.logsumexp(1, keepdim=True)
        loss += (top - z.gather(1, target)).sum()
        p = (z - top).exp_()
        terms = [p * table for table in x] + [p]
        buffer = torch.empty_like(p)
        mean = torch.stack([t @ onehot_VN for t in terms], 1).double()  # [rows, M+1, N]
        gradient += mean.sum(0)
        for m, table in enumerate([*x, torch.ones_like(target, dtype=torch.float)]):
            gradient[m].index_add_(0, band_V[target[:, 0]],
                                   -(table.gather(1, target) if table.shape[1] > 1 else table)[:, 0].double())
        for m in range(width):
            for k in range(m + 1):
                product = mean[:, k].sum(0) if m == width - 1 else (
                    torch.mul(terms[m], x[k], out=buffer).sum(0) @ onehot_VN).double()
                second[m, k] += product
                if k != m:
                    second[k, m] += product
        outer += mean.flatten(1).T @ mean.flatten(1)
    sessions = len(target_S)
    loss, gradient, second, outer = float(loss), gradient.cpu(), second.cpu(), outer.cpu()
    hessian = torch.einsum("mkn,nq->mnkq", second, torch.eye(count, dtype=torch.double)).reshape_as(outer) - outer
    ridge = RIDGE * theta
    return (loss / sessions + float(0.5 * (ridge * theta).sum()), gradient / sessions + ridge,
            hessian / sessions + RIDGE * torch.eye(width * count, dtype=torch.double))
