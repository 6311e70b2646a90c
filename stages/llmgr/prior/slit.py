"""SLIT, a linear item-item model in closed form; its ridge can shrink it towards the similarity of item texts."""
from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from llmgr.runtime.errors import UserError
from llmgr.sessions.clicks import prefix_clicks
from llmgr.sessions.tensors import Sessions

CLOSE = 1e-3  # a row is solved when its residual's norm is below this share of its clicks' norm
MOST = 200  # iterations; about ten are usual


class Slit:
    """The matrix B [V+1, V+1] that minimises |S B - T|^2 + ridge |B - text_share K|^2, which is never formed.

    A row of S holds the weighted clicks of a training prefix (`last_clicks`), the same row of T its next item. So
    B = (S'S + ridge)^-1 (S'T + ridge text_share K): SLIT of Choi et al. (Session-aware Linear Item-Item Models, WWW
    2021). K = W W' is the similarity of the items' texts, with W [V+1, words] as in `word_matrix`. For an item without
    clicks B is text_share K. Deviations: in the paper T holds all later clicks, and the ridge shrinks B to 0.
    Scores c B of clicks c come from conjugate gradients (Saad, Iterative Methods, 2nd ed., alg. 9.1, preconditioned by
    the diagonal), so that memory grows with the clicks and the batch, not with V squared.
    """

    def __init__(self, clicks: csr_array, target: np.ndarray, ridge: float, device: torch.device | None = None) -> None:
        targets = csr_array((np.ones(len(target)), (np.arange(len(target)), target)), shape=clicks.shape)
        self.items, self.ridge = clicks.shape[1] - 1, ridge
        self.products, self.following = (_sparse(m).to(device) for m in (clicks.T @ clicks, targets.T @ clicks))
        self.diagonal = torch.from_numpy(clicks.multiply(clicks).sum(0)).float().to(device)[:, None] + ridge

    def solved(self, clicks: csr_array) -> Tensor:
        """(S'S + ridge)^-1 c for each row c of `clicks`, in columns [V+1, B]; UserError if the ridge is too small."""
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
        """Scores [B, V+1] from the result of `solved`; `words` is W, None for a model without texts."""
        scores = self.following @ solved_VB
        if words is not None:
            text_scores = words @ (words.T @ solved_VB.cpu().numpy())
            scores.add_(torch.from_numpy(text_scores).to(scores.device), alpha=self.ridge * text_share)
        return scores.T.contiguous()


def fitted_slit(train: Sessions, decay: float, ridge: float, items: int, device: torch.device | None = None) -> Slit:
    """SLIT of all training prefixes, with clicks weighted as in `last_clicks`; it computes on `device`."""
    return Slit(prefix_clicks(train, decay, items), train.target.cpu().numpy(), ridge, device)


def _sparse(matrix: csr_array) -> Tensor:
    matrix = csr_array(matrix)
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(False):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(torch.from_numpy(matrix.indptr).long(), torch.from_numpy(matrix.indices).long(),
                                       torch.from_numpy(matrix.data).float(), size=matrix.shape)
