"""Output layers that turn a hidden state into logits over all items."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearOutput(nn.Module):
    """The paper's output layer: free weights W [V+1, H] and biases."""

    def __init__(self, width: int, items: int) -> None:
        super().__init__()
        self.items = nn.Linear(width, items + 1)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.zeros_(self.items.bias)

    def forward(self, h_RH: Tensor, shift_VD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [R, K], item table [V+1, K] and item biases [V+1] whose product and sum are the logits.

        The weights are its own: a shift of the item vectors does not concern it.
        """
        return h_RH, self.items.weight, self.items.bias


class ItemsOutput(nn.Module):
    """Logits (W h + b) . [x_i ; t_i]: frozen item vectors and text features on the item side.

    Deviation: the paper's layer is free (LinearOutput); an item met five times learns little there, and a text that
    is only read on the session's side cannot raise a cold item's score.
    """

    def __init__(self, width: int, vectors_VD: Tensor, text_VT: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", torch.cat((vectors_VD, text_VT), 1), persistent=False)
        self.query = nn.Linear(width, self.table.shape[1])
        self.dim = vectors_VD.shape[1]
        nn.init.normal_(self.query.weight, std=0.1 * width ** -0.5)
        nn.init.zeros_(self.query.bias)

    def forward(self, h_RH: Tensor, shift_VD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [R, K], item table [V+1, K] (its item vectors plus `shift_VD`) and no bias."""
        query = self.query(h_RH)
        if shift_VD is None:
            return query, self.table, None
        return query, torch.cat((self.table[:, :self.dim] + shift_VD, self.table[:, self.dim:]), 1), None


def logits(query_RK: Tensor, table_VK: Tensor, bias_V: Tensor | None) -> Tensor:
    """Scores of all items [R, V+1]; column 0 is padding."""
    return F.linear(query_RK, table_VK, bias_V)
