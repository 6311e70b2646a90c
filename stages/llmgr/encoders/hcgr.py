"""HCGR: Hyperbolic Contrastive Graph Representation Learning for Session-based Recommendation (Guo et al., TKDE 2023,
arXiv 2107.05366).

Items are points of the Lorentz model of hyperbolic space, <x, x>_L = -x_0^2 + x_1^2 + ... + x_d^2 = -1. Attention over
the session graph mixes neighbours in tangent spaces, a soft attention readout in the tangent space at the origin o
gives the session's point, items are ranked by geodesic distance d(x, y) = arcosh(-<x, y>_L), and a contrastive ranking
loss on distances joins the cross-entropy. Maps and optimiser are geoopt's.

Deviation: the authors' code is not public; where this file had to choose a layer, it says so below.

Shapes: E = D + 1 coordinates of a point, R relations of two nodes.
"""
from __future__ import annotations

import math
from collections.abc import Iterator

import geoopt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout, ItemVectors, SessionEncoder, Settings, SoftAttention, clicked
from llmgr.sessions.graphs import GraphBatch

LORENTZ = geoopt.Lorentz()
RADIUS = 4.0
"""Farthest a point is read from the origin: beyond, float32 is off the hyperboloid by more than 1e-4."""
NEAREST = 1 + 1e-6
"""Least -<x, y>_L that arcosh is taken of: at 1 its slope is infinite."""
TARGETS = 128
"""Sessions scored at a time: their distances to all items stay in cache."""


class TangentAttention(nn.Module):
    """One attention layer over the session graph: tangent vectors u_BND at o of the nodes -> the same.

    x_i = exp_o(W u_i), the Lorentz linear map; y_i = exp_{x_i}(sum_j a_ij log_{x_i}(x_j)) over a node's predecessors,
    successors and itself (Chami et al., NeurIPS 2019, equation 9), a_i the softmax of LeakyReLU(p . u_i + q . u_j).
    Deviation: predecessors, successors and the node itself have a p and q each, so that edges have a direction.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        self.query, self.key = nn.Linear(dim, 3), nn.Linear(dim, 3, bias=False)

    def forward(self, u_BND: Tensor, batch: GraphBatch) -> Tensor:
        u_BND = within(self.linear(u_BND), RADIUS)
        a_BNN = self.attention(u_BND, batch)
        x_BNE = LORENTZ.expmap0(F.pad(u_BND, (1, 0)))
        inner_BNN = flipped(x_BNE) @ x_BNE.transpose(1, 2)
        # log_x(y) = arcosh(z) / sqrt(z^2 - 1) * (y - z x) with z = -<x, y>_L: sums over y without a tensor of pairs
        z_BNN = (-inner_BNN).clamp(min=NEAREST)
        w_BNN = a_BNN * torch.acosh(z_BNN) / (z_BNN.square() - 1).sqrt()
        mean_BNE = w_BNN @ x_BNE + (w_BNN * inner_BNN).sum(2, keepdim=True) * x_BNE
        return LORENTZ.logmap0(LORENTZ.expmap(x_BNE, mean_BNE))[..., 1:]

    def attention(self, u_BND: Tensor, batch: GraphBatch) -> Tensor:
        """Weights [B, N, N], rows sum to 1."""
        out_BNN = batch.edges_BNN()
        itself = torch.eye(u_BND.shape[1], device=u_BND.device).expand_as(out_BNN)
        relation_BNNR = torch.stack((out_BNN.transpose(1, 2), out_BNN, itself), 3)
        pair_BNNR = F.leaky_relu(self.query(u_BND)[:, :, None] + self.key(u_BND)[:, None], 0.2)
        score_BNN = (pair_BNNR * relation_BNNR).sum(3)
        return score_BNN.masked_fill(relation_BNNR.sum(3) == 0, -math.inf).softmax(2)


class Hcgr(SessionEncoder):
    """GraphBatch, item points [V+1, D+1] -> session points [B, D+1], their time coordinate negated.

    So an inner product is a Lorentz inner product, which falls as the distance grows. Row 0 of the items is o.
    Deviation: the readout is SR-GNN's, and points farther than RADIUS from o are read at that distance.
    """

    def __init__(self, dim: int, dropout: float, settings: Settings) -> None:
        super().__init__(dim)
        self.item_width = dim + 1
        self.scale, self.margin = settings.scale, settings.margin
        self.contrast, self.negatives = settings.contrast, settings.negatives
        self.dropout = Dropout(dropout)
        self.graph = nn.ModuleList(TangentAttention(dim) for _ in range(settings.gnn_layers))
        self.readout = SoftAttention(dim)

    def initialise(self, items: ItemVectors) -> None:
        """As ever, but in the tangent space at o; the points are a parameter of the manifold, in float64."""
        super().initialise(items)
        with torch.no_grad():
            tangent_VE = items.table.weight.double()
            tangent_VE[:, 0] = 0
            points_VE = LORENTZ.expmap0(tangent_VE)
        items.table.weight = geoopt.ManifoldParameter(points_VE, manifold=LORENTZ)

    def item_vectors(self, table_VE: Tensor, text_VE: Tensor | None) -> Tensor:
        """Points in float32; a control adds its text in the tangent space at o: exp_o(log_o(x) + linear(text))."""
        if text_VE is not None:
            tangent_VE = LORENTZ.logmap0(table_VE) + F.pad(text_VE, (1, 0))
            table_VE = LORENTZ.expmap0(within(tangent_VE, RADIUS))
        return LORENTZ.projx(F.pad(within(table_VE[:, 1:].float(), math.sinh(RADIUS)), (1, 0)))

    def forward(self, batch: GraphBatch, vectors_VE: Tensor) -> Tensor:
        with torch.autocast(vectors_VE.device.type, enabled=False):
            u_BND = self.dropout(LORENTZ.logmap0(F.embedding(batch.nodes_BN, vectors_VE))[..., 1:])
            for layer in self.graph:
                u_BND = layer(u_BND, batch)
            s_BD = within(self.readout(clicked(u_BND, batch)[batch.mask_BS()], batch.flat()), RADIUS)
            return flipped(LORENTZ.expmap0(F.pad(s_BD, (1, 0))))

    def loss(self, session_BE: Tensor, vectors_VE: Tensor, target_B: Tensor) -> Tensor:
        """Cross-entropy of softmax(-scale * d) over all items, and `contrast` times the ranking loss.

        The ranking loss is the mean of max(0, margin + d(session, target) - d(session, other)) over `negatives` items
        drawn uniformly.
        """
        total = session_BE.new_zeros(())
        with torch.autocast(session_BE.device.type, enabled=False):
            for session_CE, target_C in zip(session_BE.split(TARGETS), target_B.split(TARGETS)):
                distance_CV = torch.acosh((session_CE @ -vectors_VE[1:].T).clamp(min=NEAREST))
                target_C1 = target_C[:, None] - 1
                other = torch.randint(distance_CV.shape[1], (len(target_C), self.negatives), device=target_C.device)
                excess = self.margin + distance_CV.gather(1, target_C1) - distance_CV.gather(1, other)
                total = total + self.contrast * (excess.relu() * (other != target_C1)).mean(1).sum()
                total = total + F.cross_entropy(-self.scale * distance_CV, target_C1[:, 0], reduction="sum")
        return total

    def logits(self, session_BE: Tensor, vectors_VE: Tensor) -> Tensor:
        """Logits [B, V+1] of the items: -scale times their distance."""
        return -self.scale * torch.acosh((session_BE @ -vectors_VE.T).clamp(min=NEAREST))

    def readout_parameters(self) -> Iterator[nn.Parameter]:
        """What `tune.train_encoder=partial` trains: the readout, not the graph attention."""
        return self.readout.parameters()


def flipped(x: Tensor) -> Tensor:
    """The vector whose inner product with y is <x, y>_L."""
    return torch.cat((-x[..., :1], x[..., 1:]), -1)


def within(x: Tensor, length: float) -> Tensor:
    """Vectors shortened to `length` where they are longer."""
    return x * (length / x.norm(dim=-1, keepdim=True).clamp(min=length))
