"""A package's scores of all items for session graphs: the prior for an unknown user, plus the student if there is
one."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_array
from torch.nn import functional as F

from llmgr.encoders.registry import build_encoder, family
from llmgr.ranking.banded_sum import weighted_sum
from llmgr.runtime.errors import UserError
from llmgr.serving.student import Student
from llmgr.sessions.clicks import last_clicks
from llmgr.text.vectors import click_sum

if TYPE_CHECKING:
    from torch import Tensor

    from llmgr.serving.package import Package
    from llmgr.sessions.graphs import GraphBatch

PARTS = ("transitions", "graph", "text", "student", "popularity")
"""The parts that add up to a score: SLIT, the session encoder, the text tower, the student, and the item's bias with
whether the session has clicked it."""


class Scorer:
    """Scores [B, V+1] of a package's items; column 0 has no meaning. It reads nothing but the package.

    They are the logits of `llmgr.prior.weighted_sum.Prior` for a user who is not in the training data, plus the
    student's.
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
        """The parts of the scores, each [B, V+1]: those of PARTS that the package has."""
        graphs = replace(graphs, user_B=torch.zeros_like(graphs.user_B))
        parts = {name: scores_BV * weight_V for name, (scores_BV, weight_V) in self._terms(graphs).items()}
        if self.student is not None:
            parts["student"] = self._student_logits(graphs)
        parts["popularity"] = self._with_clicked(self.weight_V["bias"].repeat(len(graphs.length_B), 1), graphs)
        return parts

    def transitions(self, graphs: GraphBatch) -> Tensor:
        """The part [B, V+1] that the item-item matrix adds."""
        return self._transition_scores(graphs) * self.weight_V["weight"]

    @torch.inference_mode()
    def __call__(self, graphs: GraphBatch) -> Tensor:
        """The scores [B, V+1] of session graphs."""
        graphs = replace(graphs, user_B=torch.zeros_like(graphs.user_B))
        terms = self._terms(graphs).values()
        total = weighted_sum([scores_BV for scores_BV, _ in terms], [weight_V for _, weight_V in terms],
                             self.weight_V["bias"].expand(len(graphs.length_B), -1))
        if self.student is not None:
            total = total + self._student_logits(graphs)
        return self._with_clicked(total, graphs)

    def _terms(self, graphs: GraphBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """The scores [B, V+1] of the prior's parts, and the weight of every item in each [V+1]."""
        terms: dict[str, tuple[Tensor, Tensor]] = {}
        if self.matrix is not None:
            terms["transitions"] = self._transition_scores(graphs), self.weight_V["weight"]
        if self.base is not None:
            logits_BV = self.encoder.logits(self.encoder(graphs, self.base), self.base)
            terms["graph"] = logits_BV, self.weight_V["base_weight"]
        if self.tower is not None:
            about = self.package.config["tower"]
            summed_BH = click_sum(graphs, self.tower, about["decay"]) * about["scale"]
            terms["text"] = summed_BH @ self.tower.T, self.weight_V["tower_weight"]
        return terms

    def _transition_scores(self, graphs: GraphBatch) -> Tensor:
        scores = self._clicks(graphs) @ self.matrix
        return torch.from_numpy(scores if isinstance(scores, np.ndarray) else scores.toarray())

    def _student_logits(self, graphs: GraphBatch) -> Tensor:
        return F.linear(self.student(graphs, self.table), self.table, self.package.tensors.get("student.bias"))

    def _with_clicked(self, scores_BV: Tensor, graphs: GraphBatch) -> Tensor:
        """The scores, in place, plus the weight of clicked items."""
        return scores_BV.scatter_add_(1, graphs.nodes_BN, self.weights["clicked"].expand(graphs.nodes_BN.shape))

    def _clicks(self, graphs: GraphBatch) -> csr_array:
        clicks = last_clicks(graphs, self.package.config["decay"], self.size - 1).astype(np.float32)
        # the package's type: with another one SciPy would copy all indices of its matrix for a product
        clicks.indices, clicks.indptr = clicks.indices.astype(np.int32), clicks.indptr.astype(np.int32)
        return clicks

    @torch.inference_mode()
    def item_vectors(self) -> Tensor:
        """Vectors [V+1, D] whose inner products with `session_vectors` are the scores without two sparse parts.

        These parts are what the item-item matrix adds, and the weight of clicked items. Row 0 has no meaning. UserError
        where the encoder's scores are no inner products.
        """
        bias_V, columns = self.weight_V["bias"], []
        if self.base is not None:
            about = self.package.config["encoder"]
            table_VD = self.encoder.logits(torch.eye(about["dim"]), self.base).T
            probe = torch.randn(8, about["dim"], generator=torch.Generator().manual_seed(0))
            if not torch.allclose(self.encoder.logits(probe, self.base), probe @ table_VD.T, rtol=1e-4, atol=1e-4):
                raise UserError(f"the scores of the encoder {about['name']} are no inner products, so no vectors can "
                                "stand for them: package another model.base")
            columns.append(table_VD * self.weight_V["base_weight"][:, None])
        if self.tower is not None:
            columns.append(self.tower * self.weight_V["tower_weight"][:, None])
        if self.student is not None:
            columns.append(self.table)
            bias_V = bias_V + self.package.tensors.get("student.bias", torch.zeros(1))
        return torch.cat([*columns, bias_V[:, None]], 1)

    @torch.inference_mode()
    def session_vectors(self, graphs: GraphBatch) -> Tensor:
        """Vectors [B, D] of session graphs, see `item_vectors`."""
        graphs = replace(graphs, user_B=torch.zeros_like(graphs.user_B))
        columns = []
        if self.base is not None:
            columns.append(self.encoder(graphs, self.base))
        if self.tower is not None:
            about = self.package.config["tower"]
            columns.append(click_sum(graphs, self.tower, about["decay"]) * about["scale"])
        if self.student is not None:
            columns.append(self.student(graphs, self.table))
        return torch.cat([*columns, torch.ones(len(graphs.length_B), 1)], 1)

    def because(self, graphs: GraphBatch, items_BK: Tensor) -> Tensor:
        """The click that adds most to the transition and text scores of items [B, K], as item ids; 0 where none
        adds."""
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
                back = graphs.length_B[row] - 1 - torch.arange(int(graphs.length_B[row]))
                power = torch.full(back.shape, about["decay"]).pow(back)
                weight = torch.zeros(len(nodes)).index_add(0, graphs.alias_BS[row, :len(back)], power)
                cosine = self.tower[nodes] @ self.tower[items].T
                gain_BNK[row, :len(nodes)] += (cosine * weight[:, None] * about["scale"]
                                               * self.weight_V["tower_weight"][items])
        best_BK, node_BK = gain_BNK.max(1)
        return torch.where(best_BK > 0, node_BN.gather(1, node_BK), 0)
