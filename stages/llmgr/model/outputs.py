"""Output layers that turn a hidden state into logits over all items."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearOutput(nn.Module):
    """The paper's output layer: free weights W [V, H] and biases; `hidden` puts one GELU layer before it."""

    def __init__(self, width: int, items: int, hidden: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU()) if hidden else nn.Identity()
        self.items = nn.Linear(width, items + 1)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.zeros_(self.items.bias)

    def forward(self, h_RH: Tensor, session_RD: Tensor | None, shift_VD: Tensor | None = None
                ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [R, K], item table [V+1, K] and item biases [V+1] whose product and sum are the logits.

        The weights are its own: noise on the item vectors does not concern it.
        """
        return self.inner(h_RH), self.items.weight, self.items.bias


class ItemsOutput(nn.Module):
    """Logits (W h + b) . [x_i ; t_i]: frozen item vectors and text features on the item side.

    Deviation: the paper's layer is free (LinearOutput); an item met five times learns little there, and a text that
    is only read on the session's side cannot raise a cold item's score. With `residual` W starts at zero and the
    encoder's session vector is added, so that tuning starts from the encoder's own scores (with align.enabled=false:
    stage 1 moves W).
    """

    def __init__(self, width: int, vectors_VD: Tensor, text_VT: Tensor, residual: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.cat((vectors_VD, text_VT), 1), persistent=False)
        self.query = nn.Linear(width, self.table.shape[1])
        self.dim, self.residual = vectors_VD.shape[1], residual
        nn.init.normal_(self.query.weight, std=0.0 if residual else 0.1 * width ** -0.5)
        nn.init.zeros_(self.query.bias)

    def forward(self, h_RH: Tensor, session_RD: Tensor | None, shift_VD: Tensor | None = None
                ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [R, K], item table [V+1, K] (its item vectors plus `shift_VD`) and no bias."""
        query = self.query(h_RH)
        if self.residual and session_RD is not None:
            query = query + F.pad(session_RD, (0, query.shape[1] - self.dim))
        if shift_VD is None:
            return query, self.table, None
        return query, torch.cat((self.table[:, :self.dim] + shift_VD, self.table[:, self.dim:]), 1), None


def logits(query_RK: Tensor, table_VK: Tensor, bias_V: Tensor | None) -> Tensor:
    """Scores of all items [R, V+1]; column 0 is padding."""
    return F.linear(query_RK, table_VK, bias_V)
