"""A package's scores of all items for session graphs: the prior of a stranger, and the student where there is one."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_array
from torch.nn import functional as F

from llmgr.encoders.registry import build_encoder, family
from llmgr.serving.student import Student
from llmgr.sessions.clicks import last_clicks
from llmgr.text.vectors import click_sum

if TYPE_CHECKING:
    from torch import Tensor

    from llmgr.serving.package import Package
    from llmgr.sessions.graphs import GraphBatch

PARTS = ("transitions", "graph", "text", "student", "popularity")
"""What a score is the sum of: SLIT, the session encoder, the text tower, the student, and how often the item was a
target with whether it was clicked."""


class Scorer:
    """Scores [B, V+1] of the items of a package; column 0 has no meaning. Reads nothing but its package.

    As `llmgr.prior.weighted_sum` for a user that training does not know: a[band] SLIT + b[band] + c [clicked]
    + d[band] base + e[band] tower.
    """

    def __init__(self, package: Package) -> None:
        self.package, self.size = package, len(package.items) + 1
        config, tensors = package.config, package.tensors
        count = torch.cat((torch.zeros(1), torch.from_numpy(package.items["count"].to_numpy().copy()).float()))
        self.band_V = torch.bucketize(count, torch.tensor(config["edges"], dtype=torch.float), right=True)
        self.weights = package.under("weights.")
        self.weight_V = {name: value[self.band_V] for name, value in self.weights.items() if name != "clicked"}
        matrix = package.under("transitions.")
        self.matrix = None
        if matrix:
            parts = (matrix[name].numpy() for name in ("value", "item", "start"))
            self.matrix = csr_array(tuple(parts), shape=(self.size, self.size))
        self.base, self.tower, self.encoder = tensors.get("base"), tensors.get("tower"), None
        if self.base is not None:
            about = config["encoder"]
            self.encoder = build_encoder(family(about["name"])[0], about["dim"], about["dropout"], about["settings"])
            self.encoder.load_state_dict(package.under("encoder."))
            self.encoder.eval()

        self.table, self.student = tensors.get("student.table"), None
        if self.table is not None:
            self.student = Student(self.table.shape[1]).eval()
            self.student.load_state_dict(package.under("student.net."))

    def parts(self, graphs: GraphBatch) -> dict[str, Tensor]:
        """The parts [B, V+1] of the scores, those of PARTS that the package has."""
        graphs = replace(graphs, user_B=torch.zeros_like(graphs.user_B))
        made: dict[str, Tensor] = {}
        if self.matrix is not None:
            made["transitions"] = self.transitions(graphs)
        if self.base is not None:
            session_BE = self.encoder(graphs, self.base)
            made["graph"] = self._by_band(self.encoder.logits(session_BE, self.base), "base_weight")
        if self.tower is not None:
            about = self.package.config["tower"]
            summed_BH = click_sum(graphs, self.tower, about["decay"]) * about["scale"]
            made["text"] = self._by_band(summed_BH @ self.tower.T, "tower_weight")
        if self.student is not None:
            query_BK = self.student(graphs, self.table)
            made["student"] = F.linear(query_BK, self.table, self.package.tensors.get("student.bias"))
        bias_BV = self.weight_V["bias"].repeat(len(graphs.length_B), 1)
        clicked = self.weights["clicked"].expand(graphs.nodes_BN.shape)
        made["popularity"] = bias_BV.scatter_add_(1, graphs.nodes_BN, clicked)
        return made

    def transitions(self, graphs: GraphBatch) -> Tensor:
        """The part [B, V+1] that the item-item matrix adds."""
        scores = self._clicks(graphs) @ self.matrix
        return self._by_band(torch.from_numpy(scores if isinstance(scores, np.ndarray) else scores.toarray()),
                             "weight")

    def _clicks(self, graphs: GraphBatch) -> csr_array:
        clicks = last_clicks(graphs, self.package.config["decay"], self.size - 1).astype(np.float32)
        # the package's type: with another one SciPy would copy all indices of its matrix for a product
        clicks.indices, clicks.indptr = clicks.indices.astype(np.int32), clicks.indptr.astype(np.int32)
        return clicks

    def _by_band(self, scores_BV: Tensor, weight: str) -> Tensor:
        return scores_BV.mul_(self.weight_V[weight])

    @torch.inference_mode()
    def __call__(self, graphs: GraphBatch) -> Tensor:
        """The scores [B, V+1] of session graphs."""
        total, *others = self.parts(graphs).values()
        for other in others:
            total += other
        return total

    def because(self, graphs: GraphBatch, items_BK: Tensor) -> Tensor:
        """The click [B, K] that adds most to what transitions and texts say of items [B, K]; 0 where none does."""
        clicks, node_BN = self._clicks(graphs), graphs.nodes_BN
        gain_BNK = torch.zeros(*node_BN.shape, items_BK.shape[1])
        for row, items in enumerate(items_BK.tolist()):
            nodes = [node for node in node_BN[row].tolist() if node]
            if self.matrix is not None:
                weight = torch.tensor([clicks[row, node] for node in nodes])[:, None]
                entries = torch.from_numpy(self.matrix[nodes][:, items].toarray())
                gain_BNK[row, :len(nodes)] += entries * weight * self.weight_V["weight"][items]
            if self.tower is not None:
                about = self.package.config["tower"]
                place = graphs.length_B[row] - 1 - torch.arange(int(graphs.length_B[row]))
                power = torch.full(place.shape, about["decay"]).pow(place)
                weight = torch.zeros(len(nodes)).index_add(0, graphs.alias_BS[row, :len(place)], power)
                cosine = self.tower[nodes] @ self.tower[items].T
                gain_BNK[row, :len(nodes)] += (cosine * weight[:, None] * about["scale"]
                                               * self.weight_V["tower_weight"][items])
        best_BK, node_BK = gain_BNK.max(1)
        return torch.where(best_BK > 0, node_BN.gather(1, node_BK), 0)
