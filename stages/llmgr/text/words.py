"""Items as vectors of the words of their titles and brands (TF-IDF)."""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_array

from llmgr.text.items import item_texts

if TYPE_CHECKING:
    from torch import Tensor


WORD = re.compile(r"[^\W_]+")


def word_matrix(texts: Sequence[str]) -> csr_array:
    """Unit TF-IDF vectors of the items' texts [V+1, words]; row 0 is empty. A word counts once in a text.

    A word's weight is ln(V / number of texts with it). A word of a single text connects no items and is left out.
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


def catalogue_words(items: str | Path, shuffle: int | None = None) -> csr_array:
    """The `word_matrix` of the titles and brands in items.parquet, shuffled among the items by the seed `shuffle`."""
    return word_matrix(item_texts(items, "words", shuffle))


def most_similar(matrix: csr_array, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The `count` most similar other items of every item, and their weights, both [V+1, count].

    Similarity is the inner product of rows. An item's weights are the softmax of its similarities over `temperature`.
    With fewer than `count` other items all of them are taken.
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
