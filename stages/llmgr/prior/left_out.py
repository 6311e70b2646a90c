"""SLIT fitted to all users, scoring each session as if that user's own clicks had not been fitted."""
from __future__ import annotations

import os
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor
from torch.nn import functional as F

from llmgr.params.checks import check_pairs
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
    """SLIT that scores a session as if that user's own training prefixes had not been fitted, exactly.

    With A = S'S + ridge, B as in `Slit` and the user's own rows S_u and T_u of S and T, what is fitted without them
    scores clicks c as (c + w S_u) B - w T_u, w = c A^-1 S_u' (1 - S_u A^-1 S_u')^-1 (the downdate of Sherman, Morrison
    and Woodbury). So a training prefix, a validation and a test session are all scored by what others clicked, and what
    learns beside these scores meets them in training as it will in use; a stranger, user 0, has no rows. Forms B and
    A^-1: memory grows with V squared. UserError where that is too much, or the ridge too small.
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
        clicks = prefix_clicks(sessions, self.decay, self.items).astype(np.float32)
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


def left_out(slit: Any, files: Layout, train: Sessions, shuffle: int | None = None) -> LeftOut:
    """The linear model of the catalogue and its training sessions, as the slit section has it.

    `shuffle` as in `catalogue_words`.
    """
    words, items = catalogue_words(files.items, shuffle) if slit.text else None, catalogue_size(files.items)
    say(f"linear model: forming the matrices of all pairs of {items:,} items")  # minutes on a large catalogue
    with during("linear model: forming its matrices"):
        return LeftOut(train, slit.ridge, slit.decay, words, slit.text, items)
