"""Neighbourhood recommenders: item-kNN, session-kNN and word-kNN over sparse matrices, and what vectors score."""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_array

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

    from llmgr.graph import GraphBatch, Sessions

WORD = re.compile(r"[^\W_]+")


def training_matrix(train: pl.DataFrame, items: int) -> csr_array:
    """Which items every training session holds, 0 or 1, [sessions, V+1].

    `train` is the table of train.parquet: a user's first row starts with the first click, and the targets of all rows
    are the other clicks, whatever the window. It holds nothing of a held-out target; a user with one training click is
    not in it, and has no neighbours to give.
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
    """Similarity of items [V+1, V+1], an item to itself 0.

    s_ij = c_ij / (sqrt(c_ii c_jj) + shrinkage) with c_ij the training sessions that hold both: the cosine of ItemKNN
    (Sarwar et al., WWW 2001) shrunk as by Dacrema et al. (RecSys 2019).
    Deviation: all neighbours of an item count, not the most similar ones alone: a session on real data has few.
    """
    together = (sessions.T @ sessions).tocsr()
    root = np.sqrt(together.diagonal())
    row, column = np.repeat(np.arange(together.shape[0]), np.diff(together.indptr)), together.indices
    together.data /= root[row] * root[column] + shrinkage
    together.data[row == column] = 0
    together.eliminate_zeros()
    return together


def word_matrix(texts: Sequence[str]) -> csr_array:
    """Items as unit vectors of the words of their texts [V+1, words], row 0 empty: TF-IDF with a word counted once.

    A word's weight is ln(V / texts that hold it); one that a single text holds joins no two items and is left out.
    """
    words: dict[str, int] = {}
    held = [{words.setdefault(word, len(words)) for word in WORD.findall(text.lower())} for text in texts]
    row = np.repeat(np.arange(1, len(held) + 1), [len(item) for item in held])
    column = np.fromiter((word for item in held for word in sorted(item)), dtype=np.int64, count=len(row))
    count = np.bincount(column, minlength=len(words))
    weight = np.where(count > 1, np.log(len(held) / np.maximum(count, 1)), 0)[column]
    length = np.sqrt(np.bincount(row, weight**2, len(held) + 1))
    matrix = csr_array((weight / np.maximum(length[row], 1e-12), (row, column)), shape=(len(held) + 1, len(words)))
    matrix.eliminate_zeros()
    return matrix


def catalogue_words(shuffle: int | None = None) -> csr_array:
    """The `word_matrix` of the catalogue's titles and brands, dealt out to other items with the seed `shuffle`."""
    from llmgr.text_vectors import item_texts

    return word_matrix(item_texts("data/core/items.parquet", "words", shuffle))


def most_alike(matrix: csr_array, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The `count` other items whose rows have the largest inner products with an item's, and their weights.

    Both [V+1, count]; the weights of an item are the softmax of its products over `temperature`. At most all others.
    """
    items = matrix.shape[0] - 1
    nearest, weight = [], []
    for rows in torch.arange(items + 1).split(512):
        similarity = torch.from_numpy((matrix[rows.numpy()] @ matrix.T).toarray()).float()
        similarity[:, 0] = similarity[torch.arange(len(rows)), rows] = -torch.inf
        best, item = similarity.topk(min(count, items - 1), 1)
        nearest.append(item)
        weight.append((best / temperature).softmax(1))
    return torch.cat(nearest), torch.cat(weight)


def last_clicks(graphs: GraphBatch, decay: float, items: int) -> csr_array:
    """Sessions as weights of their distinct items, [B, V+1]: `decay` to the power of the steps since the last click."""
    position = torch.arange(graphs.items_BS.shape[1], device=graphs.items_BS.device) * graphs.mask_BS()
    last_BN = torch.zeros_like(graphs.nodes_BN).scatter_reduce(1, graphs.alias_BS, position, "amax")
    row, node = graphs.nodes_BN.cpu().nonzero(as_tuple=True)
    back = (graphs.length_B[:, None] - 1 - last_BN).cpu()[row, node]
    weight = torch.full(back.shape, decay, dtype=torch.double).pow(back)
    return csr_array((weight.numpy(), (row.numpy(), graphs.nodes_BN.cpu()[row, node].numpy())),
                     shape=(len(graphs.nodes_BN), items + 1))


def neighbours(clicks: csr_array, sessions: csr_array, most: int) -> csr_array:
    """Similarity of the `most` nearest training sessions to every row of weighted `clicks`, [B, sessions].

    The cosine between the weighted clicks and a training session's 0-1 vector; of equals the earlier row. A training
    session that holds nothing beside the clicks is no neighbour: it has nothing to recommend, and a user's own training
    session is one.
    """
    shared = csr_array((clicks.data + 1j, clicks.indices, clicks.indptr), shape=clicks.shape) @ sessions.T
    shared.sort_indices()  # real part: the weights of the shared clicks; imaginary part: their number
    count = np.diff(shared.indptr)
    row, size = np.repeat(np.arange(len(count)), count), np.diff(sessions.indptr)[shared.indices]
    length = np.sqrt(clicks.multiply(clicks).sum(1))[row]
    similarity = np.where(shared.data.imag < size, shared.data.real / (length * np.sqrt(size)), 0)
    order = np.lexsort((-similarity, row))
    kept = order[(np.arange(len(order)) - shared.indptr[row] < most) & (similarity[order] > 0)]
    return csr_array((similarity[kept], (row[kept], shared.indices[kept])), shape=shared.shape)


def click_weights(graphs: GraphBatch, decay: float) -> Tensor:
    """The weight of every click [B, S]: 1 for the last, `decay` less a step back, 0 at padding."""
    steps = torch.arange(graphs.items_BS.shape[1], device=graphs.items_BS.device)
    back_BS = (graphs.length_B[:, None] - 1 - steps).clamp(min=0)
    return torch.full_like(back_BS, decay, dtype=torch.float).pow(back_BS) * graphs.mask_BS()


def likeness(sessions: Sessions, samples: Tensor, vectors_VH: Tensor, decay: float) -> Tensor:
    """Scores [B, V+1]: cosines of item vectors to those of the clicks, summed with their weights."""
    graphs = sessions.graphs(samples)
    weight_BS = click_weights(graphs, decay)
    return (vectors_VH[graphs.items_BS] * weight_BS[..., None]).sum(1) @ vectors_VH.T
