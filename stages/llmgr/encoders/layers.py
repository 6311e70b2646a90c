"""The interface of a session encoder, and the layers that several encoders share.

Shapes: E width of the item vectors, which is D unless an encoder says otherwise.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from llmgr.sessions.graphs import FlatGraphs, GraphBatch


class ItemVectors(nn.Module):
    """The learned part of the items: an ID table [V+1, E] and, for a control, a linear map of their text features.

    `forward` returns both parts, None for the second without features; `SessionEncoder.item_vectors` combines them.
    Row 0 is padding.
    """

    def __init__(self, items: int, width: int, text_width: int, features_VT: Tensor | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(items + 1, width, padding_idx=0)
        self.text = None
        if features_VT is not None:
            self.register_buffer("features", features_VT, persistent=False)
            self.text = nn.Linear(features_VT.shape[1], text_width, bias=False)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.table.weight, None if self.text is None else self.text(self.features)


class Settings(SimpleNamespace):
    """An encoder's settings: the keys of its section of params.yaml, and two facts about the data."""

    users: int
    """Users in the training data, numbered from 1 in `batch.user_B`; 0 is any other user."""
    max_session: int
    """Clicks of the longest session."""


class SessionEncoder(nn.Module):
    """Base of all encoders; an encoder is built as `Encoder(dim, dropout, settings)`.

    `forward(batch, vectors_VE)` maps session graphs and item vectors [V+1, E] to session vectors [B, E]. Their inner
    products with the item vectors rank the items.
    """

    config: dict[str, Any]
    """`dim`, `dropout` and `settings`, from which `build_encoder` makes the same encoder again."""
    reads_users = False
    """Whether it has parameters for each user, so that it fits the training users alone."""
    pads = True
    """Whether it computes at padding, so that a batch is faster in groups of similar length."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.item_width = self.text_width = dim  # columns of the ID table and of the text map

    def forward(self, batch: GraphBatch, vectors_VE: Tensor) -> Tensor:
        raise NotImplementedError

    def item_vectors(self, table_VE: Tensor, text_VE: Tensor | None) -> Tensor:
        """Item vectors [V+1, E] as read, scored and exported: ID vectors, plus the text's linear map in a control."""
        return table_VE if text_VE is None else table_VE + text_VE

    def initialise(self, items: ItemVectors) -> None:
        """Draw the initial values of the items and the encoder: uniform within 1/sqrt(dim), as SR-GNN and GC-SAN."""
        bound = self.dim ** -0.5
        for parameter in [*items.parameters(), *self.parameters()]:
            if parameter.dim() > 1:
                nn.init.uniform_(parameter, -bound, bound)
        with torch.no_grad():
            items.table.weight[0] = 0
            if items.text is not None:  # unit-variance features must not drown the ID part
                items.text.weight.mul_(0.1)

    def loss(self, session_BE: Tensor, vectors_VE: Tensor, target_B: Tensor) -> Tensor:
        """The training loss of a batch, summed: softmax cross-entropy of the inner products over all items."""
        return item_cross_entropy(session_BE, vectors_VE, target_B)

    def logits(self, session_BE: Tensor, vectors_VE: Tensor) -> Tensor:
        """Logits [B, V+1] of all items, whose softmax `loss` takes: inner products."""
        return session_BE @ vectors_VE.T

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that `tune.train_encoder=partial` trains."""
        raise NotImplementedError


def cross_entropy(logits_RV: Tensor, target_R: Tensor, reduction: str = "sum") -> Tensor:
    """Softmax cross-entropy of the targets [R] over all items; column 0 of the logits, padding, is left out.

    `reduction` as in torch: "sum", or "none" for the loss of every row [R].
    """
    return F.cross_entropy(logits_RV[:, 1:], target_R - 1, reduction=reduction)


def item_cross_entropy(query_RD: Tensor, vectors_VD: Tensor, target_R: Tensor, bias_V: Tensor | None = None
                       ) -> Tensor:
    """`cross_entropy` of inner products of queries [R, D] and item vectors [V+1, D], plus biases [V+1], summed.

    On a CPU it works in chunks of 128 targets, so that the logits stay in cache: on two threads with 12,101 items that
    is 2.8 times as fast as one product of 1,024 rows. On a GPU one product is faster.
    """
    if query_RD.is_cuda:
        return cross_entropy(F.linear(query_RD, vectors_VD, bias_V), target_R)
    return F.linear_cross_entropy(query_RD, vectors_VD[1:], target_R - 1, reduction="sum",
                                  linear_bias=None if bias_V is None else bias_V[1:],
                                  options=nn.LinearCrossEntropyOptions(batch_chunk_size=128))


class Dropout(nn.Dropout):
    """Dropout in a quarter of torch's time on a CPU, where torch's took 6 to 15% of an encoder's step.

    One random number of 64 bits decides on four entries, so `p` is rounded to a multiple of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 65536)
        if not self.training or dropped in (0, 65536) or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2 ** 63, None)
        survives = bits.view(torch.int16)[:x.numel()].view(x.shape) >= dropped - 32768
        return x * survives.to(x.dtype).mul_(65536 / (65536 - dropped))


class GatedGraph(nn.Module):
    """One propagation of SR-GNN's gated graph network over the nodes of all graphs: h_MD -> h_MD (equations 1-5).

    Messages are PyTorch Geometric's `SimpleConv`, sums over clicks its `SumAggregation`: SR-GNN, GC-SAN and NISER train
    at 0.95 to 0.97 of the rate of sums by `embedding_bag` over sorted neighbours (Office, a thread, in turns). Its
    `GatedGraphConv` has one direction of edges, and SR-GNN has two in one GRU cell. Its `Batch.from_data_list` takes
    32 ms for 1,024 sessions and `GraphBatch.flat` 5 ms, so batches are ours, and `GraphBatch.to_pyg` converts them.
    Deviation: repeated transitions count once, as in the authors' code; the paper (Wu et al. 2019, fig. 2) counts
    occurrences.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        from torch_geometric.nn import SimpleConv  # takes seconds, which other encoders need not wait for

        self.message_in = nn.Linear(dim, dim)
        self.message_out = nn.Linear(dim, dim)
        self.into, self.out_of = SimpleConv("mean"), SimpleConv("mean", flow="target_to_source")
        self.gates = nn.GRUCell(2 * dim, dim)

    def forward(self, h_MD: Tensor, graphs: FlatGraphs) -> Tensor:
        messages = (self.into(self.message_in(h_MD).float(), graphs.edge_index_2E),
                    self.out_of(self.message_out(h_MD).float(), graphs.edge_index_2E))
        return self.gates(torch.cat(messages, -1), h_MD)


class SoftAttention(nn.Module):
    """SR-GNN's session vectors [B, D] of click states x_CD (equations 6 and 7): W3 [sum_i a_i x_i ; x_last].

    a_i = q . sigmoid(W1 x_last + W2 x_i + c), not normalised. Deviation: W3 has a bias, as in the authors' code.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        from torch_geometric.nn.aggr import SumAggregation

        self.last, self.each = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.score, self.out = nn.Linear(dim, 1, bias=False), nn.Linear(2 * dim, dim)
        self.pool = SumAggregation()

    def forward(self, x_CD: Tensor, graphs: FlatGraphs) -> Tensor:
        last_BD = x_CD[graphs.last_B]
        weight_C1 = self.score(torch.sigmoid(F.embedding(graphs.session_C, self.last(last_BD)) + self.each(x_CD)))
        general_BD = self.pool((weight_C1 * x_CD).float(), graphs.session_C, dim_size=len(last_BD), dim=0)
        return self.out(torch.cat((general_BD, last_BD), 1))


class AttentionBlock(nn.Module):
    """Self-attention and feed-forward, each with dropout, residual and layer norm (GC-SAN's equations 6-9).

    Deviation: GC-SAN's paper has no layer norm, dropout, residual around the attention, output projection or wider
    inner layer here; its public re-implementations (RecBole) do, and train better. With `last_B` only the query of
    that click is computed, which is all the readout needs. In a `causal` block no click attends to later ones, and the
    outputs at padding have no meaning.
    """

    def __init__(self, dim: int, heads: int, dropout: float, *, causal: bool = False, attention_dropout: float = 0.0,
                 activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.causal, self.attention_dropout = causal, attention_dropout
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.inner = nn.Sequential(nn.Linear(dim, 4 * dim), activation(), nn.Linear(4 * dim, dim))
        self.norm_attention, self.norm_inner = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, last_B: Tensor | None = None) -> Tensor:
        return self.fed(self.attended(x_BSD, mask_BS, last_B))

    def attended(self, x_BSD: Tensor, mask_BS: Tensor, last_B: Tensor | None) -> Tensor:
        """Self-attention, dropout, residual and layer norm: [B, S, D], or [B, 1, D] for the click `last_B` alone."""
        queried = x_BSD if last_B is None else at(x_BSD, last_B)[:, None]
        split = (len(x_BSD), -1, self.heads, x_BSD.shape[2] // self.heads)
        key, value = (t.reshape(split).transpose(1, 2) for t in self.key_value(x_BSD).chunk(2, -1))
        query = self.query(queried).view(split).transpose(1, 2)
        triangle = self.causal and last_B is None  # padding follows the clicks, so the triangle hides it too
        attended = F.scaled_dot_product_attention(
            query, key, value, None if triangle else mask_BS[:, None, None],
            dropout_p=self.attention_dropout if self.training else 0.0, is_causal=triangle)
        attended = self.out(attended.transpose(1, 2).flatten(2))
        return self.norm_attention(queried + self.dropout(attended))

    def fed(self, x: Tensor) -> Tensor:
        """The feed-forward layer, dropout, residual and layer norm: [B, any, D] -> the same."""
        return self.norm_inner(x + self.dropout(self.inner(x)))


class BlockEncoder(SessionEncoder):
    """What SASRec and BSARec share: item and position vectors, layer norm, dropout, blocks, the last click's output.

    Positions count back from the last click.
    """

    def __init__(self, dim: int, dropout: float, longest: int, blocks: Iterable[AttentionBlock]) -> None:
        super().__init__(dim)
        self.position = nn.Embedding(longest, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)

    @torch.no_grad()
    def initialise(self, items: ItemVectors) -> None:
        """N(0, 0.02) for the ID embeddings and all weights, biases 0."""
        super().initialise(items)
        nn.init.normal_(items.table.weight[1:], std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        for layer in self.modules():
            self.draw(layer)

    def draw(self, layer: nn.Module) -> None:
        """Draw the initial values of one layer."""
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, batch: GraphBatch, vectors_VD: Tensor) -> Tensor:
        mask, last = batch.mask_BS(), batch.length_B - 1
        back_BS = last[:, None] - torch.arange(mask.shape[1], device=mask.device)
        x_BSD = F.embedding(batch.items_BS, vectors_VD) + self.position(back_BS.clamp(min=0))
        x_BSD = self.dropout(self.norm(x_BSD))
        for block in self.blocks[:-1]:
            x_BSD = block(x_BSD, mask)
        return self.blocks[-1](x_BSD, mask, last)[:, 0]

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the last block."""
        return self.blocks[-1].parameters()


def clicked(h_BND: Tensor, batch: GraphBatch) -> Tensor:
    """The node state of every click [B, S, D]; at padding the state of some node, to be masked."""
    return h_BND.gather(1, batch.alias_BS[..., None].expand(-1, -1, h_BND.shape[2]))


def at(x_BSD: Tensor, index_B: Tensor) -> Tensor:
    """The vector at one position of every row: [B, S, D], [B] -> [B, D]."""
    return x_BSD[torch.arange(len(x_BSD), device=x_BSD.device), index_B]
