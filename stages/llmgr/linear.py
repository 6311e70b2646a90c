"""SLIT, a linear item-item model in closed form, with a ridge that may shrink it towards the likeness of texts.

`Slit` scores sessions by itself; `LinearTerm` adds its scores to another model's logits, in training as well.
"""
from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array, vstack
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.errors import UserError
from llmgr.graph import Sessions, catalogue_size
from llmgr.neighbours import catalogue_words, last_clicks
from llmgr.params import check_pairs
from llmgr.stage import say

if TYPE_CHECKING:
    from llmgr.folds import OutOfFold
    from llmgr.tower import Tower

CLOSE = 1e-3  # a row is solved where its residual's norm falls below this share of its clicks' norm
MOST = 200  # iterations; some ten are the rule
BANDS = (1, 2, 3, 5, 10, 20, 50)  # lower ends: how often an item was a target
BLOCK = 256  # training prefixes whose users are left out at a time
STARTED = 2048  # prefixes that a linear term's first weights are fitted on; twice as many with a base's scores


class Slit:
    """B [V+1, V+1] that minimises |S B - T|^2 + ridge |B - text_share K|^2, never formed.

    A row of S has the weighted clicks of a training prefix (`last_clicks`), the same row of T its next item, so that
    B = (S'S + ridge)^-1 (S'T + ridge text_share K): SLIT of Choi et al. (Session-aware Linear Item-Item Models, WWW
    2021). K = W W' is the likeness of the items' texts, W [V+1, words] as in `word_matrix`; B is text_share K where
    nothing was clicked. Deviations: T holds all later clicks in the paper, and its ridge shrinks to 0 (text_share 0).
    Scores c B of clicks c come from conjugate gradients (Saad, Iterative Methods, 2nd ed., alg. 9.1, preconditioned by
    the diagonal), so that memory grows with the clicks and a batch, not with V squared.
    """

    def __init__(self, clicks: csr_array, target: np.ndarray, ridge: float, place: torch.device | None = None) -> None:
        targets = csr_array((np.ones(len(target)), (np.arange(len(target)), target)), shape=clicks.shape)
        self.items, self.ridge = clicks.shape[1] - 1, ridge
        self.products, self.following = (_sparse(m).to(place) for m in (clicks.T @ clicks, targets.T @ clicks))
        self.diagonal = torch.from_numpy(clicks.multiply(clicks).sum(0)).float().to(place)[:, None] + ridge

    def solved(self, clicks: csr_array) -> Tensor:
        """(S'S + ridge)^-1 c of the rows c of `clicks`, as columns [V+1, B]; UserError where the ridge is too small."""
        residual = torch.from_numpy(np.ascontiguousarray(clicks.toarray().T)).float().to(self.diagonal.device)
        solution = torch.zeros_like(residual)
        enough = CLOSE * residual.norm(dim=0)
        scaled = residual / self.diagonal
        direction, inner = scaled, (residual * scaled).sum(0)
        for _ in range(MOST):
            image = (self.products @ direction).add_(direction, alpha=self.ridge)
            step = inner / (direction * image).sum(0).clamp(min=1e-30)
            solution.addcmul_(direction, step)
            residual.addcmul_(image, step, value=-1)
            if bool((residual.norm(dim=0) <= enough).all()):
                break
            scaled = residual / self.diagonal
            before, inner = inner, (residual * scaled).sum(0)
            direction = scaled.addcmul_(direction, inner / before.clamp(min=1e-30))
        else:
            raise UserError(f"slit is not solved after {MOST} iterations: set slit.ridge above {self.ridge:g}")
        return solution

    def scores(self, solved_VB: Tensor, words: csr_array | None, text_share: float) -> Tensor:
        """Scores [B, V+1] of clicks that `solved` solved; `words` is W, None where texts have no say."""
        scores = self.following @ solved_VB
        if words is not None:
            told = words @ (words.T @ solved_VB.cpu().numpy())
            scores.add_(torch.from_numpy(told).to(scores.device), alpha=self.ridge * text_share)
        return scores.T.contiguous()


def fitted_slit(train: Sessions, decay: float, ridge: float, items: int, place: torch.device | None = None) -> Slit:
    """SLIT of all training prefixes, whose earlier clicks weigh `decay` less a step; solves and scores at `place`."""
    return Slit(_prefixes(train, decay, items), train.target.cpu().numpy(), ridge, place)


class LeftOut:
    """SLIT that scores a session as if that user's own training prefixes had not been fitted, exactly.

    With A = S'S + ridge, B as in `Slit` and the user's own rows S_u and T_u of S and T, what is fitted without them
    scores clicks c as (c + w S_u) B - w T_u, w = c A^-1 S_u' (1 - S_u A^-1 S_u')^-1 (the downdate of Sherman, Morrison
    and Woodbury). So a training prefix, a validation and a test session are all scored by what others clicked, and what
    learns beside these scores meets them in training as it will in use; a stranger, user 0, has no rows. Forms B and
    A^-1: memory grows with V squared. UserError where that is too much, or the ridge too small.
    """

    def __init__(self, train: Sessions, ridge: float, decay: float, words: csr_array | None, text_share: float,
                 items: int) -> None:
        check_pairs(items)
        self.decay, self.items = decay, items
        user = train.user[train.row].cpu().numpy()
        order = np.argsort(user, kind="stable")
        self.first = np.searchsorted(user[order], np.arange(int(user.max()) + 2))  # by user, the first of their rows
        self.clicks = _prefixes(train, decay, items)[order].astype(np.float32)
        target = train.target.cpu().numpy()[order]
        self.targets = csr_array((np.ones(len(target), np.float32), (np.arange(len(target)), target)),
                                 shape=self.clicks.shape)
        gram = torch.from_numpy((self.clicks.T @ self.clicks).toarray())
        gram.diagonal().add_(ridge)
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).T.numpy()  # symmetric: now rows lie together
        except torch.linalg.LinAlgError:
            raise UserError(f"the linear model is not solved: set slit.ridge above {ridge:g}") from None
        self.matrix = ((self.targets.T @ self.clicks) @ inverse).T
        if words is not None and text_share:
            words = words.astype(np.float32)
            self.matrix += ridge * text_share * (words @ (words.T @ inverse)).T
        self.matrix, self.inverse = np.ascontiguousarray(self.matrix), inverse
        self.prepared: WeakKeyDictionary[Sessions, tuple[csr_array, csr_array, csr_array]] = WeakKeyDictionary()
        self.moved: dict[torch.device, Tensor] = {}

    def __call__(self, sessions: Sessions, samples: Tensor, place: torch.device | None = None
                 ) -> tuple[Tensor, coo_array]:
        """Scores [R, V+1] of samples [R] at `place`, and how often every item is a target of the same user, [R, V+1].

        What is left out is found for all samples when sessions are first met.
        """
        if sessions not in self.prepared:
            self.prepared[sessions] = self._prepare(sessions)
        clicks, told, own = (table[samples.cpu().numpy()] for table in self.prepared[sessions])
        if place is None or place.type == "cpu":
            scores = torch.from_numpy(clicks @ self.matrix)
        else:
            scores = self._product(clicks, place)
        told = coo_array(told)
        row, column, often = (torch.from_numpy(part).to(scores.device) for part in (told.row, told.col, told.data))
        scores[row.long(), column.long()] -= often
        return scores, coo_array(own)

    def solved(self, clicks: csr_array) -> Tensor:
        """As `Slit.solved`, by the inverse: columns [V+1, B] of the rows of `clicks`, every user's rows fitted."""
        return torch.from_numpy(np.ascontiguousarray((clicks.astype(np.float32) @ self.inverse).T))

    def _product(self, clicks: csr_array, place: torch.device) -> Tensor:
        """`clicks @ matrix` on a GPU, which keeps a copy of the matrix: rows weighted and summed."""
        if place not in self.moved:
            self.moved[place] = torch.from_numpy(self.matrix).to(place)
        item, start, weight = (torch.from_numpy(part).to(place) for part in (clicks.indices, clicks.indptr[:-1],
                                                                              clicks.data))
        return F.embedding_bag(item.long(), self.moved[place], start.long(), mode="sum", per_sample_weights=weight)

    def _prepare(self, sessions: Sessions) -> tuple[csr_array, csr_array, csr_array]:
        """For all samples c + w S_u, w T_u and the sum of the rows of T_u, each [samples, V+1]."""
        clicks = _prefixes(sessions, self.decay, self.items).astype(np.float32)
        user = sessions.user[sessions.row].cpu().numpy()
        order = np.argsort(user, kind="stable")
        count = np.diff(self.first)[user[order]]
        fresh = np.diff(user[order], prepend=-1) > 0
        block = np.cumsum(np.where(fresh, count, 0) + 1) // BLOCK
        block = block[np.maximum.accumulate(np.where(fresh, np.arange(len(user)), 0))]  # a user's are not divided
        parts = [self._weights(clicks, user, asked) for asked in np.split(order, np.flatnonzero(np.diff(block)) + 1)]
        weight, row, column = map(np.concatenate, zip(*parts))
        shape = (len(user), self.clicks.shape[0])
        weights = csr_array((weight, (row, column)), shape=shape)
        same = csr_array((np.ones_like(weight), (row, column)), shape=shape)
        return csr_array(clicks + weights @ self.clicks), csr_array(weights @ self.targets), csr_array(
            same @ self.targets)

    def _weights(self, clicks: csr_array, user: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, ...]:
        """w of the samples `asked` with their places: sample and training row."""
        users = np.unique(user[asked])
        own = np.concatenate([np.arange(self.first[u], self.first[u + 1]) for u in users])
        whose = np.repeat(users, self.first[users + 1] - self.first[users])
        rows, ours = self.clicks[own], clicks[asked]
        columns = np.unique(np.concatenate((rows.indices, ours.indices)))
        rows, ours = rows[:, columns], ours[:, columns]
        reach = (rows @ self.inverse[np.ix_(columns, columns)]).T
        among = np.where(whose[:, None] == whose, rows @ reach, 0)
        same = user[asked][:, None] == whose
        left = np.eye(len(own), dtype=np.float32) - among
        weight = np.linalg.solve(left, np.where(same, ours @ reach, 0).T).T.astype(np.float32)
        row, column = same.nonzero()
        return weight[row, column], asked[row], own[column]


class LinearTerm(nn.Module):
    """What `LeftOut` says of every item, weighted by how often the item is a target of other users.

    Logits a[band] s + b[band] + c [clicked], to which LLMGR or a control adds its own, so that it learns what a linear
    model of clicks and words leaves open. With a `base` (`llmgr.folds.OutOfFold`: a training session's scores are of
    one that has not met its user either) the logits have d[band] times its scores, too, and with a `tower`
    (`llmgr.tower.Tower`, likewise) e[band] times those. a to e learn with it, from the values that fit training
    prefixes best.
    """

    def __init__(self, model: LeftOut, base: OutOfFold | None = None, tower: Tower | None = None) -> None:
        super().__init__()
        self.model, self.base, self.tower = model, base, tower
        self.register_buffer("count", torch.from_numpy(model.targets.sum(0)), persistent=False)
        self.register_buffer("edges", torch.tensor(BANDS, dtype=self.count.dtype), persistent=False)
        self.scale = 1 / max(float(np.sqrt(np.square(model.matrix).mean(dtype=np.float64))), 1e-12)
        self.weight, self.bias = (nn.Parameter(torch.zeros(len(BANDS) + 1)) for _ in range(2))
        self.clicked = nn.Parameter(torch.zeros(1))
        if base is not None:
            self.base_weight = nn.Parameter(torch.zeros(len(BANDS) + 1))
        if tower is not None:
            self.tower_weight = nn.Parameter(torch.zeros(len(BANDS) + 1))

    def forward(self, sessions: Sessions, samples: Tensor, trained: bool = False) -> Tensor:
        """Logits [R, V+1] of samples [R]; `trained` where the sessions are those that are learned from."""
        return self._weighted(*self._read(sessions, samples, trained))

    def _read(self, sessions: Sessions, samples: Tensor, trained: bool) -> tuple[Tensor | None, ...]:
        """Scores [R, V+1], those of base and tower; place, band of items that the user's own targets hold; clicked
        [R, N]."""
        place = self.count.device
        scores, own = self.model(sessions, samples, place)
        row, item, often = (torch.from_numpy(part).to(place) for part in (own.row, own.col, own.data))
        band = torch.bucketize(self.count[item.long()] - often, self.edges, right=True)
        others = [None if part is None else part(sessions, samples, trained) for part in (self.base, self.tower)]
        return (scores * self.scale, *others, row.long(), item.long(), band, sessions.graphs(samples).nodes_BN)

    def _weighted(self, scores: Tensor, base: Tensor | None, tower: Tensor | None, row: Tensor, item: Tensor,
                  band: Tensor, nodes: Tensor) -> Tensor:
        band_V = torch.bucketize(self.count, self.edges, right=True)
        logits = torch.addcmul(self.bias[band_V], scores, self.weight[band_V])
        own = self.bias[band] + scores[row, item] * self.weight[band]
        for other, weight in ((base, "base_weight"), (tower, "tower_weight")):
            if other is not None:
                logits = torch.addcmul(logits, other, getattr(self, weight)[band_V])
                own = own + other[row, item] * getattr(self, weight)[band]
        return logits.index_put((row, item), own).scatter_add(1, nodes, self.clicked.expand(nodes.shape))

    def start(self, train: Sessions, seed: int, recency: float = 1.0) -> None:
        """Fit a to e alone to training prefixes drawn by `seed`: a convex problem (L-BFGS, Liu & Nocedal 1989).

        Below 1, `recency` has them drawn with repetition, by the weights of `Sessions.recency`.
        """
        number, generator = STARTED if self.base is None else 2 * STARTED, torch.Generator().manual_seed(seed)
        if recency == 1:
            drawn = torch.randperm(len(train), generator=generator)[:number]
        else:
            drawn = torch.multinomial(train.recency(recency).cpu(), number, replacement=True, generator=generator)
        drawn = drawn.to(train.row.device)
        read = [(self._read(train, samples, True), train.target[samples] - 1) for samples in drawn.split(256)]
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            total = 0.0
            for parts, target in read:
                part = F.cross_entropy(self._weighted(*parts)[:, 1:], target, reduction="sum") / len(drawn)
                part.backward()
                total += part.item()
            return total

        optimizer.step(loss)
        optimizer.zero_grad()


def left_out(slit: Any, train: Sessions, shuffle: int | None = None) -> LeftOut:
    """The linear model of the catalogue and its training sessions, as the slit section has it.

    `shuffle` as in `catalogue_words`.
    """
    words, items = catalogue_words(shuffle) if slit.text else None, catalogue_size("data/core/items.parquet")
    say(f"linear model: forming the matrices of all pairs of {items:,} items")  # minutes on a large catalogue
    return LeftOut(train, slit.ridge, slit.decay, words, slit.text, items)


def _prefixes(train: Sessions, decay: float, items: int) -> csr_array:
    rows = [last_clicks(train.graphs(samples), decay, items) for samples in torch.arange(len(train)).split(4096)]
    return csr_array(vstack(rows))


def _sparse(matrix: csr_array) -> Tensor:
    matrix = csr_array(matrix)
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(False):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(torch.from_numpy(matrix.indptr).long(), torch.from_numpy(matrix.indices).long(),
                                       torch.from_numpy(matrix.data).float(), size=matrix.shape)
