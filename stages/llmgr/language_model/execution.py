"""How a language model reads prompts: padded, packed into rows, in blocks of similar length, or replayed on a GPU.

The hidden states are the same in every form but for rounding. Without `Execution.prepare` prompts are packed or padded.

Shapes: T columns of a line of prompts, N prompts and W columns of a row.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmgr.language_model.attention import PromptRows
from llmgr.language_model.cuda_graphs import Recorder, Replayed
from llmgr.language_model.lora import join_products
from llmgr.language_model.packing import PromptBatch
from llmgr.params.training import Launch, Training
from llmgr.text.vectors import position_offset


class Execution:
    """Runs a language model over prompts.

    `causal`: tokens attend only to the left. `packs`: prompts may share a row, since each is read at a token of its
    own. `separable`: prompts in one row need not see each other (`llmgr.language_model.attention.separates_prompts`).
    """

    def __init__(self, language_model: nn.Module, *, causal: bool, packs: bool, separable: bool) -> None:
        self.language_model, self.causal, self.packs, self.separable = language_model, causal, packs, separable
        self.in_blocks = False
        self.replayed: Replayed | None = None
        self.offset = position_offset(language_model)

    def prepare(self, settings: Training, launch: Launch, device: torch.device,
                recorder: Recorder | None = None) -> None:
        """Choose the fastest way to train on `device` and set the layers up for it; to be called once.

        `settings` is the align or tune section.
        """
        if settings.gradient_checkpointing:
            self.checkpoint_activations()
        if launch.compile and device.type == "cuda":
            self.compile_layers()
        self.in_blocks = device.type == "cpu" and self.separable
        if launch.strategy != "zero3":  # which gathers a layer's weights when it is called itself
            self.join_products()
        if device.type == "cuda" and self.separable and launch.strategy == "ddp" and (
                not settings.gradient_checkpointing):
            self.replayed = Replayed(self._cast_anew,
                                     [p for p in self.language_model.parameters() if p.requires_grad], recorder)

    def arranged(self, prompts: PromptBatch, least: int) -> PromptBatch:
        """The prompts of a step as they are read fastest; `least` is the number of tokens in a row of packed
        prompts."""
        if not self.packs:
            return prompts
        if self.replayed is not None:
            return prompts.in_line()
        return prompts.end_to_end(self.causal) if self.in_blocks else prompts.packed(least)

    def __call__(self, embeds_BLH: Tensor, prompts: PromptBatch) -> Tensor:
        """Last hidden states [B, L, H] of prompts given as token-shaped vectors."""
        position_BL = prompts.position_BL + self.offset
        if prompts.there_NW is not None:
            run = self.states if self.replayed is None or not torch.is_grad_enabled() else self.replayed
            return run(embeds_BLH, position_BL, *prompts.rows(self.causal))
        if prompts.blocks is not None:
            return self.states(embeds_BLH, position_BL, blocks=prompts.blocks)
        return self.language_model(inputs_embeds=embeds_BLH, position_ids=position_BL,
                                   attention_mask=prompts.mask(self.causal)).last_hidden_state

    def states(self, embeds_1TH: Tensor, position_1T: Tensor, *rows: Tensor, blocks: list[Tensor] | None = None
               ) -> Tensor:
        """Hidden states [1, T, H] of prompts end to end; each attends only to itself, by `blocks` or the `rows` of a
        `PromptRows`."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds_1TH.device)
        return self.language_model(inputs_embeds=embeds_1TH, position_ids=position_1T, attention_mask=mask,
                                   blocks=PromptRows(*rows) if rows else blocks).last_hidden_state

    def _cast_anew(self, *inputs: Tensor) -> Tensor:
        """`states` without autocast's cache of cast weights, since a recording would keep the first copies for ever."""
        kind = inputs[0].device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            return self.states(*inputs)

    def join_products(self) -> None:
        """Let adapted layers compute with fewer products (`llmgr.language_model.lora.join_products`)."""
        join_products(self.language_model)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass (not reentrant: `inputs_embeds` may need no gradient)."""
        base = self.language_model
        (base.get_base_model() if hasattr(base, "get_base_model") else base).gradient_checkpointing_enable(
            {"use_reentrant": False})

    def compile_layers(self, **options: Any) -> None:
        """Compile the language model's layers with torch.compile: programs for all layers, any batch and length.

        What stands between their matrix products becomes a few kernels. A GPU's step waits for these.
        """
        blocks = max((m for m in self.language_model.modules() if isinstance(m, nn.ModuleList)), key=len)
        for block in blocks:
            block.compile(dynamic=True, **options)
