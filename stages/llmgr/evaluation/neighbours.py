"""Item-item and session-session similarities of the neighbour baselines."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

if TYPE_CHECKING:
    import polars as pl


def training_matrix(train: pl.DataFrame, items: int) -> csr_array:
    """The items of every training session, 0 or 1, [sessions, V+1].

    `train` is the table of train.parquet. A user's first row starts with the first click, and the targets of the rows
    are the other clicks, so nothing of a held-out target is in it. A user with a single training click has no row.
    """
    import polars as pl

    users = train.group_by("user", maintain_order=True).agg(pl.col("items").first().list.first(), "target")
    clicks = users.select(pl.concat_list("items", "target").alias("all"))["all"]
    row = np.repeat(np.arange(len(clicks)), clicks.list.len().to_numpy())
    matrix = csr_array((np.ones(len(row)), (row, clicks.explode().to_numpy())), shape=(len(clicks), items + 1))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def item_similarity(sessions: csr_array, shrinkage: float) -> csr_array:
    """The similarity of items [V+1, V+1]; that of an item to itself is 0.

    s_ij = c_ij / (sqrt(c_ii c_jj) + shrinkage), where c_ij counts the training sessions with both items: the cosine of
    ItemKNN (Sarwar et al., WWW 2001), shrunk as by Dacrema et al. (RecSys 2019).
    Deviation: all neighbours of an item count, not only the most similar ones, since on real data there are few.
    """
    together = (sessions.T @ sessions).tocsr()
    root = np.sqrt(together.diagonal())
    row, column = np.repeat(np.arange(together.shape[0]), np.diff(together.indptr)), together.indices
    together.data /= root[row] * root[column] + shrinkage
    together.data[row == column] = 0
    together.eliminate_zeros()
    return together


def neighbours(clicks: csr_array, sessions: csr_array, most: int) -> csr_array:
    """The similarity of the `most` nearest training sessions to each row of weighted `clicks` [B, sessions].

    Similarity is the cosine of the weighted clicks and a training session's 0-1 vector; of equal ones the earlier row
    counts. A training session without other items than the clicks, such as the user's own, is no neighbour.
    """
    shared = csr_array((clicks.data + 1j, clicks.indices, clicks.indptr), shape=clicks.shape) @ sessions.T
    shared.sort_indices()  # real part: the weights of the shared clicks; imaginary part: their number
    count = np.diff(shared.indptr)
    row, size = np.repeat(np.arange(len(count)), count), np.diff(sessions.indptr)[shared.indices]
    length = np.sqrt(clicks.multiply(clicks).sum(1))[row]
    similarity = np.where(shared.data.imag < size, shared.data.real / (length * np.sqrt(size)), 0)
    order = np.lexsort((-similarity, row))
    nearest = order[(np.arange(len(order)) - shared.indptr[row] < most) & (similarity[order] > 0)]
    return csr_array((similarity[nearest], (row[nearest], shared.indices[nearest])), shape=shared.shape)
