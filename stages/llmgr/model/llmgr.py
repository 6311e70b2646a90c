"""LLMGR (arXiv 2402.16539): hybrid encoding layer, language model with LoRA, output layer over all items."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmgr.encoders.layers import Dropout
from llmgr.language_model.attention import Apiece, attends_apart
from llmgr.language_model.cuda_graphs import Recorder, Replayed
from llmgr.language_model.loading import is_causal
from llmgr.language_model.lora import add_adapters, join_products
from llmgr.model.hybrid import HybridEncoding
from llmgr.model.outputs import ItemsOutput, LinearOutput
from llmgr.model.packing import PromptBatch
from llmgr.runtime.errors import UserError
from llmgr.sessions.graphs import GraphBatch
from llmgr.text.vectors import position_offset


class Llmgr(nn.Module):
    """Session graph encoder, hybrid encoding layer, language model and output layer.

    `encoder` and `vectors_VD` come from pretraining; the item vectors stay frozen. `params` is the model section.
    UserError where the readout or the LoRA targets do not fit the backbone.
    """

    def __init__(self, language_model: nn.Module, encoder: nn.Module, vectors_VD: Tensor, text_VT: Tensor, params: Any
                 ) -> None:
        super().__init__()
        config = language_model.config
        self.causal = is_causal(config) or params.attention == "causal"
        self.readout = params.readout
        if self.readout == "auto":
            self.readout = "last" if self.causal else "first"
        if self.causal and self.readout != "last":
            raise UserError(f"model.readout={self.readout} reads nothing useful under causal attention: "
                            "set model.readout=last")
        self.packs = self.readout == "last"  # a readout that stands anywhere in a row, and averages nothing over one
        self.apart = False  # prompts stand in one row and attend in blocks; see `prepare`
        self.replayed: Replayed | None = None  # the language model's pass on a GPU, over prompts in line
        self.can_be_apart = attends_apart(language_model)
        self.offset = position_offset(language_model)
        self.positions = config.max_position_embeddings - self.offset
        self.register_buffer("vectors", vectors_VD, persistent=False)
        self.encoder = encoder.requires_grad_(False)
        width, items = config.hidden_size, len(vectors_VD) - 1
        self.hybrid = HybridEncoding(language_model.get_input_embeddings(), vectors_VD, params.dropout,
                                     text_VT if params.node_text else None)
        self.dropout = Dropout(params.dropout)
        self.output = (ItemsOutput(width, vectors_VD, text_VT) if params.output == "items"
                       else LinearOutput(width, items))
        self.language_model = add_adapters(language_model, params)
        self.linear_term: nn.Module | None = None
        """Scores of all items for samples [R] of sessions, added to the logits (see llmgr.prior)."""

    def pack(self, prompts: PromptBatch, least: int) -> PromptBatch:
        """The prompts of a step end to end, where the readout allows it: in one row, or in rows of `least` tokens."""
        if not self.packs:
            return prompts
        if self.replayed is not None:
            return prompts.in_line()
        return prompts.end_to_end(self.causal) if self.apart else prompts.packed(least)

    def hidden(self, prompts: PromptBatch, session_RD: Tensor | None, shift_VD: Tensor | None = None) -> Tensor:
        """Hidden states at the readouts [R, H]."""
        embeds = self.hybrid(self.language_model.get_input_embeddings(), prompts, session_RD, shift_VD)
        position_BL = prompts.position_BL + self.offset
        if prompts.there_NW is not None:
            run = self.states if self.replayed is None or not torch.is_grad_enabled() else self.replayed
            h_BLH = run(embeds, position_BL, *prompts.apiece(self.causal))
        elif prompts.blocks is not None:
            h_BLH = self.states(embeds, position_BL, blocks=prompts.blocks)
        else:
            h_BLH = self.language_model(inputs_embeds=embeds, position_ids=position_BL,
                                        attention_mask=prompts.mask(self.causal)).last_hidden_state
        if self.readout == "mean":
            weight_BL1 = prompts.real_BL[..., None].to(h_BLH.dtype)
            return ((h_BLH * weight_BL1).sum(1) / weight_BL1.sum(1))[prompts.row_R].float()
        column_R = torch.zeros_like(prompts.column_R) if self.readout == "first" else prompts.column_R
        return h_BLH[prompts.row_R, column_R].float()

    def states(self, embeds_1TH: Tensor, position_1T: Tensor, *places: Tensor, blocks: list[Tensor] | None = None
               ) -> Tensor:
        """Hidden states [1, T, H] of prompts that stand end to end, each attending to itself as `blocks` or the places
        of an `Apiece` say."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds_1TH.device)
        return self.language_model(inputs_embeds=embeds_1TH, position_ids=position_1T, attention_mask=mask,
                                   blocks=Apiece(*places) if places else blocks).last_hidden_state

    def forward(self, prompts: PromptBatch, session_RD: Tensor | None, shift_VD: Tensor | None = None
                ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [R, K], item table [V+1, K], biases [V+1] or None; see the output layers.

        `shift_VD` is added to the item vectors, at the node slots and in the output layer.
        """
        return self.output(self.dropout(self.hidden(prompts, session_RD, shift_VD)), shift_VD)

    def sessions(self, graphs: GraphBatch, shift_VD: Tensor | None = None) -> Tensor:
        """The encoder's readouts [B, D] of session graphs over the frozen item vectors (plus `shift_VD`)."""
        return self.encoder(graphs, self.vectors if shift_VD is None else self.vectors + shift_VD)

    def unfreeze_encoder(self, part: str) -> None:
        """Let `all` of the graph encoder learn, its readout (`partial`) or nothing (`none`)."""
        chosen = {"all": self.encoder.parameters, "partial": self.encoder.readout_parameters, "none": lambda: ()}[part]
        for parameter in chosen():
            parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> Llmgr:
        """As usual, but a frozen graph encoder stays without dropout."""
        super().train(mode)
        if not any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What LLMGR's own files hold: bridge, output layer, linear term and adapters, with their names."""
        for name, parameter in self.named_parameters():
            if name.startswith(("hybrid.", "output.", "linear_term.")) or "lora_" in name:
                yield name, parameter

    def prepare(self, settings: Any, launch: Any, place: torch.device, recorder: Recorder | None = None
                ) -> None:
        """What the align or tune section and `launch` ask of the language model's layers, to be called once."""
        if settings.gradient_checkpointing:
            self.checkpoint_activations()
        if launch.compile and place.type == "cuda":
            self.compile_layers()
        self.apart = place.type == "cpu" and self.can_be_apart
        if launch.strategy != "zero3":  # which gathers a layer's weights when it is called itself
            join_products(self.language_model)
        if place.type == "cuda" and self.can_be_apart and launch.strategy == "ddp" and (
                not settings.gradient_checkpointing):
            self.replayed = Replayed(self._cast_anew,
                                     [p for p in self.language_model.parameters() if p.requires_grad], recorder)

    def _cast_anew(self, *inputs: Tensor) -> Tensor:
        """`states`, whose weights autocast casts every time: a recording would keep those of the day it was made."""
        kind = inputs[0].device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            return self.states(*inputs)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass (not reentrant: `inputs_embeds` may need no gradient)."""
        base = self.language_model
        (base.get_base_model() if hasattr(base, "get_base_model") else base).gradient_checkpointing_enable(
            {"use_reentrant": False})

    def compile_layers(self, **options: Any) -> None:
        """Compile the language model's layers with torch.compile: programs for all layers, any batch and length.

        What stands between their matrix products becomes a few kernels, which is what a GPU's step waits for.
        """
        blocks = max((m for m in self.language_model.modules() if isinstance(m, nn.ModuleList)), key=len)
        for block in blocks:
            block.compile(dynamic=True, **options)
