"""The prior: a weighted sum of the scores of models without a prompt, to which LLMGR's logits are added."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llmgr.encoders.layers import cross_entropy
from llmgr.params.derived import cross_fits
from llmgr.params.schema import Params
from llmgr.prior.cross_fitting import CrossFitted
from llmgr.prior.left_out import LeftOut, left_out
from llmgr.prior.tower import Tower
from llmgr.ranking.banded_sum import banded_sum, fit
from llmgr.runtime.artifacts import load_tensors, read_json
from llmgr.runtime.console import during
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import texts_shuffled

BANDS = (1, 2, 3, 5, 10, 20, 50)  # lower ends: how often an item was a target
FITTED = 2048  # training prefixes for the fit of the weights; twice as many with a base's scores


class Prior(nn.Module):
    """Logits a[band] s + b[band] + c [clicked] + d[band] base + e[band] tower of all items.

    s are the scores of `LeftOut`; `base` (`CrossFitted`) and `tower` (`Tower`) are optional. None of them was trained
    on the user of a training session that it scores. The band of an item is how often it is a target of other users;
    [clicked] is 1 for the items of the session. LLMGR or a control adds its own logits, so that it learns what the
    prior leaves open. The weights a to e start at the best fit to training prefixes (`fit`) and then train with the
    model.
    """

    def __init__(self, model: LeftOut, base: CrossFitted | None = None, tower: Tower | None = None) -> None:
        super().__init__()
        self.model, self.base, self.tower = model, base, tower
        self.register_buffer("count", torch.from_numpy(model.targets.sum(0)), persistent=False)
        self.register_buffer("edges", torch.tensor(BANDS, dtype=self.count.dtype), persistent=False)
        self.scale = 1 / max(float(np.sqrt(np.square(model.matrix).mean(dtype=np.float64))), 1e-12)
        self.weight, self.bias = (nn.Parameter(torch.zeros(len(BANDS) + 1)) for _ in range(2))
        self.clicked = nn.Parameter(torch.zeros(1))
        if base is not None:
            self.base_weight = nn.Parameter(torch.zeros(len(BANDS) + 1))
        if tower is not None:
            self.tower_weight = nn.Parameter(torch.zeros(len(BANDS) + 1))

    def forward(self, sessions: Sessions, samples: Tensor, trained: bool = False) -> Tensor:
        """Logits [R, V+1] of samples [R]; `trained` if they are training sessions."""
        return self._weighted(*self._read(sessions, samples, trained))

    def _read(self, sessions: Sessions, samples: Tensor, trained: bool) -> tuple[Tensor | None, ...]:
        """The arguments of `_weighted`: three scores [R, V+1]; the row, item and band of each item that is a target of
        the sample's own user; and the clicked items [R, N]."""
        device = self.count.device
        scores, own = self.model(sessions, samples, device)
        row, item, often = (torch.from_numpy(part).to(device) for part in (own.row, own.col, own.data))
        band = torch.bucketize(self.count[item.long()] - often, self.edges, right=True)
        others = [None if part is None else part(sessions, samples, trained) for part in (self.base, self.tower)]
        return (scores * self.scale, *others, row.long(), item.long(), band, sessions.graphs(samples).nodes_BN)

    def _weighted(self, scores: Tensor, base: Tensor | None, tower: Tensor | None, row: Tensor, item: Tensor,
                  band: Tensor, nodes: Tensor) -> Tensor:
        parts = [(scores, self.weight)]
        if base is not None:
            parts.append((base, self.base_weight))
        if tower is not None:
            parts.append((tower, self.tower_weight))
        scores_M, weight_MN = zip(*parts)
        logits = banded_sum(scores_M, weight_MN, self.bias, torch.bucketize(self.count, self.edges, right=True))
        own = banded_sum([part[row, item] for part in scores_M], weight_MN, self.bias, band)
        return logits.index_put((row, item), own).scatter_add(1, nodes, self.clicked.expand(nodes.shape))

    def fit(self, train: Sessions, seed: int, recency: float = 1.0) -> None:
        """Fit only the weights a to e, to training prefixes that `seed` draws: a convex problem.

        With `recency` below 1 they are drawn with repetition, by the weights of `Sessions.recency`.
        """
        number, generator = FITTED if self.base is None else 2 * FITTED, torch.Generator().manual_seed(seed)
        if recency == 1:
            drawn = torch.randperm(len(train), generator=generator)[:number]
        else:
            drawn = torch.multinomial(train.recency(recency).cpu(), number, replacement=True, generator=generator)
        drawn = drawn.to(train.row.device)
        read = [(self._read(train, samples, True), train.target[samples]) for samples in drawn.split(256)]

        def losses(part: tuple[tuple[Tensor | None, ...], Tensor]) -> Tensor:
            parts, target = part
            return cross_entropy(self._weighted(*parts), target, reduction="none")

        with during("linear model: fitting its weights"):
            fit(list(self.parameters()), losses, read)


def load_fitted(prior: Prior, folder: Path) -> Prior:
    """The prior with the weights that it had before stage 2, which lie in stage 2's folder.

    UserError where those are of a prior with other parts.
    """
    weights = load_tensors(folder / "prior.safetensors")
    if weights.keys() != prior.state_dict().keys():
        raise UserError(f"{folder} has another prior than tune.folds and tower.enabled ask for: run `dvc repro` to "
                        "train it anew")
    prior.load_state_dict(weights)
    return prior


def build_prior(params: Params, files: Layout, train: Sessions | None, device: torch.device,
                formed: LeftOut | None = None) -> Prior:
    """The prior of the training sessions, not fitted yet: with the base's scores under `tune.folds`, and with the
    tower's where it is enabled.

    Reads the seed and the model, tune, tower and slit sections of `params`. `formed` is a `LeftOut` that exists
    already; then `train` can be None.
    """
    model = left_out(params.slit, files, train, texts_shuffled(params)) if formed is None else formed
    divided = params.tune.folds and cross_fits(read_json(files.embeddings / "config.json")["name"])
    base = CrossFitted(params, files, model.items, device) if divided else None
    tower = Tower(params, files, model.items, device) if params.tower.enabled else None
    return Prior(model, base, tower).to(device)
