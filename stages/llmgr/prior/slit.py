"""SLIT, a linear item-item model in closed form, with a ridge that may shrink it towards the similarity of texts."""
from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from llmgr.runtime.errors import UserError
from llmgr.sessions.clicks import prefix_clicks
from llmgr.sessions.tensors import Sessions

CLOSE = 1e-3  # a row is solved where its residual's norm falls below this share of its clicks' norm
MOST = 200  # iterations; some ten are the rule


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
    return Slit(prefix_clicks(train, decay, items), train.target.cpu().numpy(), ridge, place)


def _sparse(matrix: csr_array) -> Tensor:
    matrix = csr_array(matrix)
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(False):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(torch.from_numpy(matrix.indptr).long(), torch.from_numpy(matrix.indices).long(),
                                       torch.from_numpy(matrix.data).float(), size=matrix.shape)
