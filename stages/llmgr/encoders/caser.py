"""Caser: Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding (Tang & Wang, WSDM 2018).

Section numbers are those of arXiv 1809.07426. The last L clicks are an image of L rows (3.1). Horizontal filters of
every height 1..L slide over it, a ReLU follows, and each keeps its largest value; vertical filters are weighted sums
of its rows (3.2). z is a hidden layer on both, and a linear layer on z and the user's vector makes the score (3.3).
Shorter sessions are padded by empty rows in the past, so that the last row is always the last click.

Deviation: the paper scores [z; user] with item vectors twice as wide; here a linear layer maps it to the width of the
input's item vectors, and those are scored (as RecBole, which adds a ReLU that only forbids negative session vectors).
One target a sample (T = 1), cross-entropy over all items in place of a binary loss, and weight decay is the training's
setting, for all encoders alike. RecBole pads after the last click. User 0 is nobody, its vector zero.

Shapes: W rows of the image, N vertical filters.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout, ItemVectors, SessionEncoder, Settings
from llmgr.sessions.graphs import GraphBatch

FEW = 10  # clicks, which are read with their padding: fewer calls, of one shape


class Horizontal(nn.Module):
    """Largest ReLU response of filters of every height 1..L over an image of L rows: x_BWD -> [B, L * filters].

    Rows are given last click first, and only W <= L of them: the rest of the image is empty. All heights are one
    convolution, its kernels zero above their height; it runs over the given rows alone, since a window that holds
    none of them responds with its bias.
    """

    def __init__(self, length: int, dim: int, filters: int) -> None:
        super().__init__()
        height, row = torch.tril_indices(length, length)  # kernel rows of height 1, of height 2, ..., last row first
        self.length = length
        self.weight = nn.Parameter(torch.empty(len(row), filters, dim))
        self.bias = nn.Parameter(torch.empty(length, filters))
        self.register_buffer("where", height * length + row, persistent=False)
        self.register_buffer("height", height + 1, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """U(-1/sqrt(fan in), 1/sqrt(fan in)) for the filters of each height, PyTorch's own for a convolution."""
        dim, heights = self.weight.shape[2], torch.arange(1, self.length + 1, device=self.bias.device)
        self.weight.uniform_(-1, 1).mul_((self.height * dim)[:, None, None] ** -0.5)
        self.bias.uniform_(-1, 1).mul_((heights * dim)[:, None] ** -0.5)

    def forward(self, x_BWD: Tensor) -> Tensor:
        (_, width, dim), length, filters = x_BWD.shape, self.length, self.weight.shape[1]
        kernel = self.weight.new_zeros(length * length, filters, dim).index_copy(0, self.where, self.weight)
        kernel = kernel.view(length, length, filters, dim)[:, :width].permute(0, 2, 3, 1).flatten(0, 1)
        response = F.conv1d(F.pad(x_BWD.transpose(1, 2), (0, width - 1)), kernel, self.bias.flatten())
        height = torch.arange(1, length + 1, device=x_BWD.device)
        fits = torch.arange(width, device=x_BWD.device) + height[:, None] <= length  # windows within the image
        response = F.relu(response.unflatten(1, (length, filters))) * fits[:, None]
        empty = F.relu(self.bias) * (length - height >= width)[:, None]  # heights with a window on the empty rows
        return torch.maximum(response.amax(3), empty).flatten(1)


class Caser(SessionEncoder):
    """GraphBatch, item vectors [V+1, D] -> session vectors [B, D]."""

    reads_users = True

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.length = settings.length
        self.pads = settings.length > FEW
        self.horizontal = Horizontal(settings.length, dim, settings.horizontal)
        self.vertical = nn.Linear(settings.length, settings.vertical)
        self.hidden = nn.Linear(settings.vertical * dim + settings.horizontal * settings.length, dim)
        self.out = nn.Linear(2 * dim, dim)
        self.user = nn.Embedding(settings.users + 1, dim, padding_idx=0)
        self.dropout = Dropout(dropout)

    @torch.no_grad()
    def initialise(self, items: ItemVectors) -> None:
        """RecBole's: N(0, 1/D) for users and ID embeddings, Glorot's for the two layers, PyTorch's for the filters."""
        super().initialise(items)
        for table in (items.table.weight, self.user.weight):
            nn.init.normal_(table[1:], std=1 / self.dim)
        self.user.weight[0] = 0
        for layer in (self.hidden, self.out):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.horizontal.reset_parameters()
        self.vertical.reset_parameters()

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        rows = min(self.length, batch.items_BS.shape[1])
        click_BW = batch.length_B[:, None] - 1 - torch.arange(rows, device=batch.length_B.device)  # last click first
        items_BW = batch.items_BS.gather(1, click_BW.clamp(min=0)) * (click_BW >= 0)
        x_BWD = F.embedding(items_BW, vectors_VD, padding_idx=0)
        vertical_BND = self.vertical.weight[:, :rows] @ x_BWD + self.vertical.bias[:, None]
        seen = self.dropout(torch.cat((vertical_BND.flatten(1), self.horizontal(x_BWD)), 1))
        z_BD = F.relu(self.hidden(seen))
        return self.out(torch.cat((z_BD, self.user(batch.user_B)), 1))

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the layers above the convolutions."""
        return itertools.chain(self.hidden.parameters(), self.out.parameters())
