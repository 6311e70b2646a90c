"""LLMGR (arXiv 2402.16539): hybrid encoding layer, language model with LoRA, output layer over all items."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmgr.encoders.layers import Dropout
from llmgr.language_model.attention import separates_prompts
from llmgr.language_model.execution import Execution
from llmgr.language_model.loading import is_causal
from llmgr.language_model.lora import add_adapters
from llmgr.language_model.packing import PromptBatch
from llmgr.model.hybrid import HybridEncoding
from llmgr.model.outputs import Factors, ItemsOutput, LinearOutput
from llmgr.params.models import Model
from llmgr.runtime.errors import UserError
from llmgr.sessions.graphs import GraphBatch
from llmgr.text.vectors import position_offset


class Llmgr(nn.Module):
    """Session graph encoder, hybrid encoding layer, language model and output layer.

    `encoder` and `vectors_VD` come from pretraining; the item vectors stay frozen. `section` is the model section.
    UserError where the readout or the LoRA targets do not fit the backbone.
    """

    def __init__(self, language_model: nn.Module, encoder: nn.Module, vectors_VD: Tensor, text_VT: Tensor,
                 section: Model) -> None:
        super().__init__()
        config = language_model.config
        self.causal = is_causal(config) or section.attention == "causal"
        self.readout = section.readout
        if self.readout == "auto":
            self.readout = "last" if self.causal else "first"
        if self.causal and self.readout != "last":
            raise UserError(f"model.readout={self.readout} reads nothing useful under causal attention: "
                            "set model.readout=last")
        separable = separates_prompts(language_model)
        self.positions = config.max_position_embeddings - position_offset(language_model)
        self.register_buffer("vectors", vectors_VD, persistent=False)
        self.encoder = encoder.requires_grad_(False)
        width, items = config.hidden_size, len(vectors_VD) - 1
        self.hybrid = HybridEncoding(language_model.get_input_embeddings(), vectors_VD, section.dropout,
                                     text_VT if section.node_text else None)
        self.dropout = Dropout(section.dropout)
        self.output = (ItemsOutput(width, vectors_VD, text_VT) if section.output == "items"
                       else LinearOutput(width, items))
        self.language_model = add_adapters(language_model, section)
        self.execution = Execution(self.language_model, causal=self.causal, packs=self.readout == "last",
                                   separable=separable)

    def hidden(self, prompts: PromptBatch, session_RD: Tensor | None, shift_VD: Tensor | None = None) -> Tensor:
        """The hidden states at the readouts [R, H]."""
        embeds = self.hybrid(self.language_model.get_input_embeddings(), prompts, session_RD, shift_VD)
        h_BLH = self.execution(embeds, prompts)
        if self.readout == "mean":
            weight_BL1 = prompts.real_BL[..., None].to(h_BLH.dtype)
            return ((h_BLH * weight_BL1).sum(1) / weight_BL1.sum(1))[prompts.row_R].float()
        column_R = torch.zeros_like(prompts.column_R) if self.readout == "first" else prompts.column_R
        return h_BLH[prompts.row_R, column_R].float()

    def forward(self, prompts: PromptBatch, session_RD: Tensor | None, shift_VD: Tensor | None = None) -> Factors:
        """The factors of the logits of all items at the prompts' readouts.

        `session_RD` are the graph encoder's readouts, None where the prompts have no graph slot. `shift_VD` is added to
        the item vectors, both at the node slots and in the output layer.
        """
        return self.output(self.dropout(self.hidden(prompts, session_RD, shift_VD)), shift_VD)

    def sessions(self, graphs: GraphBatch, shift_VD: Tensor | None = None) -> Tensor:
        """The graph encoder's readouts [B, D] of session graphs, with the frozen item vectors (plus `shift_VD`)."""
        return self.encoder(graphs, self.vectors if shift_VD is None else self.vectors + shift_VD)

    def unfreeze_encoder(self, part: str) -> None:
        """Train `all` of the graph encoder, only its readout (`partial`), or nothing of it (`none`)."""
        chosen = {"all": self.encoder.parameters, "partial": self.encoder.readout_parameters, "none": lambda: ()}[part]
        for parameter in chosen():
            parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> Llmgr:
        """As in torch, but a frozen graph encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        if not any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """LLMGR's own trained parameters by name: bridge, output layer and adapters."""
        for name, parameter in self.named_parameters():
            if name.startswith(("hybrid.", "output.")) or "lora_" in name:
                yield name, parameter
