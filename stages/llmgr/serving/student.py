"""The student: a small network that predicts from the clicks what LLMGR's language model adds to the prior.

LLMGR's logits are its prior's plus the products of a query and the items' rows in a table. Only the query needs the
language model. So the student predicts the query, and the table and the prior's weights are LLMGR's.

Shapes: I = 3 K inputs.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.text.vectors import click_sum

if TYPE_CHECKING:
    from llmgr.sessions.graphs import GraphBatch

DECAY, HIDDEN = 0.7, 256


class Student(nn.Module):
    """Session graphs and a table [V+1, K] -> queries [B, K].

    A linear map plus a hidden layer, over the last click's row, the mean of the clicks' rows and their decayed sum.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3 * width, HIDDEN), nn.Linear(HIDDEN, width)
        self.linear = nn.Linear(3 * width, width)

    def forward(self, graphs: GraphBatch, table_VK: Tensor) -> Tensor:
        return self.queries(inputs(graphs, table_VK))

    def queries(self, read_BI: Tensor) -> Tensor:
        """The queries [B, K] for `inputs`."""
        return self.linear(read_BI) + self.out(F.gelu(self.hidden(read_BI)))


def inputs(graphs: GraphBatch, table_VK: Tensor) -> Tensor:
    """The student's input for session graphs [B, 3K]."""
    last_B = graphs.items_BS.gather(1, graphs.length_B[:, None] - 1)[:, 0]
    return torch.cat((table_VK[last_B], click_sum(graphs, table_VK, 1.0) / graphs.length_B[:, None],
                      click_sum(graphs, table_VK, DECAY)), 1)
