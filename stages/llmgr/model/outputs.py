"""Output layers that turn a hidden state into logits over all items."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Factors(NamedTuple):
    """Logits of all items before they are formed: queries [R, K], item table [V+1, K], item biases [V+1] or None."""

    query_RK: Tensor
    table_VK: Tensor
    bias_V: Tensor | None

    def logits(self) -> Tensor:
        """Logits of all items [R, V+1]; column 0 is padding."""
        return F.linear(self.query_RK, self.table_VK, self.bias_V)


class LinearOutput(nn.Module):
    """The paper's output layer: free weights W [V+1, H] and biases."""

    def __init__(self, width: int, items: int) -> None:
        super().__init__()
        self.items = nn.Linear(width, items + 1)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.zeros_(self.items.bias)

    def forward(self, h_RH: Tensor, shift_VD: Tensor | None = None) -> Factors:
        """The factors of the logits at hidden states h [R, H]; `shift_VD` has no effect on free weights."""
        return Factors(h_RH, self.items.weight, self.items.bias)


class ItemsOutput(nn.Module):
    """Logits (W h + b) . [x_i ; t_i]: frozen item vectors and text features on the item side.

    Deviation: the paper's layer is free (LinearOutput). There an item with five interactions learns little, and a text
    that is read only on the session's side cannot raise a cold item's score.
    """

    def __init__(self, width: int, vectors_VD: Tensor, text_VT: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", torch.cat((vectors_VD, text_VT), 1), persistent=False)
        self.query = nn.Linear(width, self.table.shape[1])
        self.dim = vectors_VD.shape[1]
        nn.init.normal_(self.query.weight, std=0.1 * width ** -0.5)
        nn.init.zeros_(self.query.bias)

    def forward(self, h_RH: Tensor, shift_VD: Tensor | None = None) -> Factors:
        """The factors of the logits at hidden states h [R, H]; `shift_VD` is added to the item vectors. No bias."""
        query = self.query(h_RH)
        if shift_VD is None:
            return Factors(query, self.table, None)
        return Factors(query, torch.cat((self.table[:, :self.dim] + shift_VD, self.table[:, self.dim:]), 1), None)
