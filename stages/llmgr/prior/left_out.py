"""SLIT fitted to all users, scoring each session as if that user's own clicks had not been fitted."""
from __future__ import annotations

import os
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor
from torch.nn import functional as F

from llmgr.params.checks import check_pairs
from llmgr.params.training import Slit
from llmgr.runtime.console import during, say
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.runtime.memory import available
from llmgr.sessions.clicks import prefix_clicks
from llmgr.sessions.reading import catalogue_size
from llmgr.sessions.tensors import Sessions
from llmgr.text.words import catalogue_words

BLOCK = 256  # training prefixes whose users are left out at a time


class LeftOut:
    """SLIT that scores a session exactly as if that user's own training prefixes had not been fitted.

    With A = S'S + ridge, B as in `Slit`, and the user's rows S_u and T_u of S and T, the model that is fitted without
    these rows scores clicks c as (c + w S_u) B - w T_u, where w = c A^-1 S_u' (1 - S_u A^-1 S_u')^-1 (the downdate of
    Sherman, Morrison and Woodbury). So training, validation and test sessions are all scored by what other users
    clicked, and a model that trains beside these scores sees the same kind of scores in training as in use. User 0, who
    is not in the training data, has no rows. Forms B and A^-1, so memory grows with V squared. UserError where that
    does not fit, or where the ridge is too small.
    """

    def __init__(self, train: Sessions, ridge: float, decay: float, words: csr_array | None, text_share: float,
                 items: int) -> None:
        check_pairs(items, available() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # each process forms its own
        self.decay, self.items = decay, items
        user = train.user[train.row].cpu().numpy()
        order = np.argsort(user, kind="stable")
        self.first = np.searchsorted(user[order], np.arange(int(user.max()) + 2))  # by user, the first of their rows
        self.clicks = prefix_clicks(train, decay, items)[order].astype(np.float32)
        target = train.target.cpu().numpy()[order]
        self.targets = csr_array((np.ones(len(target), np.float32), (np.arange(len(target)), target)),
                                 shape=self.clicks.shape)
        gram = torch.from_numpy((self.clicks.T @ self.clicks).toarray())
        gram.diagonal().add_(ridge)
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).T.numpy()  # symmetric: now rows lie together
        except torch.linalg.LinAlgError:
            raise UserError(f"the linear model is not solved: set slit.ridge above {ridge:g}") from None
        del gram  # a quarter of the memory at the peak
        self.matrix = ((self.targets.T @ self.clicks) @ inverse).T
        if words is not None and text_share:
            words = words.astype(np.float32)
            self.matrix += ridge * text_share * (words @ (words.T @ inverse)).T
        self.matrix, self.inverse = np.ascontiguousarray(self.matrix), inverse
        self.prepared: WeakKeyDictionary[Sessions, tuple[csr_array, csr_array, csr_array]] = WeakKeyDictionary()
        self.moved: dict[torch.device, Tensor] = {}

    def __call__(self, sessions: Sessions, samples: Tensor, device: torch.device | None = None
                 ) -> tuple[Tensor, coo_array]:
        """Scores of samples [R] on `device`, and how often each item is a target of the sample's user; both [R, V+1].

        The first call with some sessions prepares all of their samples.
        """
        if sessions not in self.prepared:
            self.prepared[sessions] = self._prepare(sessions)
        clicks, own_scores, own_targets = (table[samples.cpu().numpy()] for table in self.prepared[sessions])
        if device is None or device.type == "cpu":
            scores = torch.from_numpy(clicks @ self.matrix)
        else:
            scores = self._product(clicks, device)
        own_scores = coo_array(own_scores)
        row, column, often = (torch.from_numpy(part).to(scores.device)
                              for part in (own_scores.row, own_scores.col, own_scores.data))
        scores[row.long(), column.long()] -= often
        return scores, coo_array(own_targets)

    def solved(self, clicks: csr_array) -> Tensor:
        """As `Slit.solved`, by the inverse and with all users fitted: columns [V+1, B] of the rows of `clicks`."""
        return torch.from_numpy(np.ascontiguousarray((clicks.astype(np.float32) @ self.inverse).T))

    def _product(self, clicks: csr_array, device: torch.device) -> Tensor:
        """`clicks @ matrix` on a GPU, which keeps a copy of the matrix: rows weighted and summed."""
        if device not in self.moved:
            self.moved[device] = torch.from_numpy(self.matrix).to(device)
        item, start, weight = (torch.from_numpy(part).to(device) for part in (clicks.indices, clicks.indptr[:-1],
                                                                              clicks.data))
        return F.embedding_bag(item.long(), self.moved[device], start.long(), mode="sum", per_sample_weights=weight)

    def _prepare(self, sessions: Sessions) -> tuple[csr_array, csr_array, csr_array]:
        """c + w S_u, w T_u and the sum of the rows of T_u of all samples, each [samples, V+1]."""
        clicks = prefix_clicks(sessions, self.decay, self.items).astype(np.float32)
        user = sessions.user[sessions.row].cpu().numpy()
        order = np.argsort(user, kind="stable")
        count = np.diff(self.first)[user[order]]
        fresh = np.diff(user[order], prepend=-1) > 0
        block = np.cumsum(np.where(fresh, count, 0) + 1) // BLOCK
        block = block[np.maximum.accumulate(np.where(fresh, np.arange(len(user)), 0))]  # a user's are not divided
        blocks = np.split(order, np.flatnonzero(np.diff(block)) + 1)
        parts = [self._weights(clicks, user, samples) for samples in blocks]
        weight, row, column = map(np.concatenate, zip(*parts))
        shape = (len(user), self.clicks.shape[0])
        weights = csr_array((weight, (row, column)), shape=shape)
        same = csr_array((np.ones_like(weight), (row, column)), shape=shape)
        return csr_array(clicks + weights @ self.clicks), csr_array(weights @ self.targets), csr_array(
            same @ self.targets)

    def _weights(self, clicks: csr_array, user: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        """The nonzero weights w of `samples`, and where they stand: the sample and the training row of each."""
        users = np.unique(user[samples])
        own = np.concatenate([np.arange(self.first[u], self.first[u + 1]) for u in users])
        whose = np.repeat(users, self.first[users + 1] - self.first[users])
        rows, ours = self.clicks[own], clicks[samples]
        columns = np.unique(np.concatenate((rows.indices, ours.indices)))
        rows, ours = rows[:, columns], ours[:, columns]
        reach = (rows @ self.inverse[np.ix_(columns, columns)]).T
        among = np.where(whose[:, None] == whose, rows @ reach, 0)
        same = user[samples][:, None] == whose
        left = np.eye(len(own), dtype=np.float32) - among
        weight = np.linalg.solve(left, np.where(same, ours @ reach, 0).T).T.astype(np.float32)
        row, column = same.nonzero()
        return weight[row, column], samples[row], own[column]


def left_out(slit: Slit, files: Layout, train: Sessions, shuffle: int | None = None) -> LeftOut:
    """`LeftOut` of the training sessions over the catalogue, with the settings of the slit section.

    `shuffle` as in `catalogue_words`.
    """
    words, items = catalogue_words(files.items, shuffle) if slit.text else None, catalogue_size(files.items)
    say(f"linear model: forming the matrices of all pairs of {items:,} items")  # minutes on a large catalogue
    with during("linear model: forming its matrices"):
        return LeftOut(train, slit.ridge, slit.decay, words, slit.text, items)
