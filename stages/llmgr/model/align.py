"""Stage 1: the node that a text describes, among all nodes or candidates (METHOD 1, step 5)."""
from __future__ import annotations

import torch
from torch import Tensor

from llmgr.language_model.packing import PACKED, drawn_steps
from llmgr.model.llmgr import Llmgr
from llmgr.model.loss import summed_cross_entropy
from llmgr.model.outputs import Factors
from llmgr.model.prompts import AlignmentPrompts
from llmgr.params.schema import Align
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError
from llmgr.training.distributed import spread
from llmgr.training.job import Loss

ACCURACY_ITEMS = 1024


class AlignJob:
    """Stage 1: which of all nodes does a text describe? Every item is described once an epoch.

    The prompt lists candidates; the softmax runs over all items. Validation draws other candidates for a fixed sample
    of items and reports how often the described node scores highest, among the candidates and among all items.
    """

    selects = None

    def __init__(self, model: Llmgr, prompts: AlignmentPrompts, settings: Align, seed: int, dtype: torch.dtype) -> None:
        self.cut = prompts.shorten(settings.candidates, model.positions)
        if self.cut:
            say(f"{self.cut} of {len(prompts.count) - 1} texts are cut: the backbone has {model.positions} positions")
        self.model, self.prompts, self.settings, self.dtype = model, prompts, settings, dtype
        self.device = model.vectors.device
        self.items = len(model.vectors) - 1
        if settings.candidates > self.items:
            raise UserError(f"align.candidates={settings.candidates} exceeds the catalogue's {self.items} items")
        held = torch.Generator().manual_seed(seed + 1)
        self.checked = torch.randperm(self.items, generator=held)[:ACCURACY_ITEMS] + 1
        self.checked_candidates = draw_candidates(self.items, settings.candidates, held)

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        self.candidates = draw_candidates(self.items, self.settings.candidates, generator)
        order = torch.randperm(self.items, generator=generator) + 1
        return drawn_steps(order, self.prompts.count, self.settings, self.model.execution.packs)

    def targets(self, micro: Tensor) -> int:
        return len(micro)

    def loss(self, micro: Tensor) -> Loss:
        factors, tokens = self._forward(micro, self.candidates)
        return Loss(summed_cross_entropy(factors, micro.to(self.device)), len(micro), tokens)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        among = overall = 0
        for micro in self.checked.split(64):
            right = spread(self._right, micro).sum(0)
            among, overall = among + int(right[0]), overall + int(right[1])
        return {"accuracy_candidates": among / len(self.checked), "accuracy_items": overall / len(self.checked)}

    def _right(self, micro: Tensor) -> Tensor:
        """Whether each item scores highest among its candidates, and whether among all items [B, 2]."""
        factors, _ = self._forward(micro, self.checked_candidates)
        shown, target = self.checked_candidates[micro].to(self.device), micro.to(self.device)
        best = self._among(factors, shown).argmax(1)
        return torch.stack((shown.gather(1, best[:, None])[:, 0] == target,
                            factors.logits()[:, 1:].argmax(1) + 1 == target), 1)

    def _forward(self, micro: Tensor, candidates: Tensor) -> tuple[Factors, int]:
        prompts = self.prompts(micro, candidates[micro])
        prompts = self.model.execution.arranged(prompts, 2 * PACKED)  # texts are long: two should fit a row
        tokens = prompts.tokens
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            factors = self.model(prompts.to(self.device), None)
        return factors._replace(query_RK=factors.query_RK.float()), tokens

    @staticmethod
    def _among(factors: Factors, shown: Tensor) -> Tensor:
        query, table, bias = factors
        scores = (table[shown] @ query[..., None])[..., 0]
        return scores if bias is None else scores + bias[shown]


def draw_candidates(items: int, count: int, generator: torch.Generator) -> Tensor:
    """Candidates for every item [V+1, count]: other items, and the item itself at a random position; row 0 is
    unused."""
    item = torch.arange(items + 1)[:, None]
    others = torch.randint(1, items, (items + 1, count), generator=generator)
    others += others >= item  # skips the item itself, keeps the draw uniform
    position = torch.randint(count, (items + 1, 1), generator=generator)
    return others.clamp(max=items).scatter(1, position, item)
