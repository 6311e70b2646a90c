"""The hybrid encoding layer: text tokens and node or graph slots as one sequence of vectors."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.layers import Dropout
from llmgr.language_model.packing import GRAPH, NODE, PromptBatch


class HybridEncoding(nn.Module):
    """Text tokens and node or graph slots as one sequence of vectors (paper, hybrid encoding layer).

    One linear map W_p in R^{H x D} turns a node's embedding and a session graph's readout into token-shaped vectors;
    text tokens keep the language model's own input embeddings. W_p starts at the scale of the token embeddings.
    With `text_VT` a node is its embedding beside its text features (model.node_text), and a graph's text part is 0.
    """

    def __init__(self, tokens: nn.Embedding, vectors_VD: Tensor, dropout: float, text_VT: Tensor | None = None) -> None:
        super().__init__()
        if text_VT is not None:
            vectors_VD = torch.cat((vectors_VD, text_VT * vectors_VD[1:].square().mean().sqrt()), 1)
        self.register_buffer("nodes", vectors_VD, persistent=False)
        dim = vectors_VD.shape[1]
        self.dropout = Dropout(dropout)
        self.project = nn.Linear(dim, tokens.embedding_dim, bias=False)
        every = torch.arange(tokens.num_embeddings, device=tokens.weight.device)  # Gemma's layer scales its weights
        token_scale = tokens(every).detach().float().square().mean().sqrt()
        node_scale = vectors_VD[1:].square().mean().sqrt().clamp(min=1e-6)
        nn.init.normal_(self.project.weight, std=float(token_scale / node_scale) * dim ** -0.5)

    def forward(self, tokens: nn.Embedding, prompts: PromptBatch, session_RD: Tensor | None,
                shift_VD: Tensor | None = None) -> Tensor:
        """The language model's `inputs_embeds` [B, L, H].

        Node slots read the item vectors (plus `shift_VD`), graph slots the readouts `session_RD`.
        """
        embeds_BLH = tokens(prompts.token_BL).to(self.project.weight.dtype)
        for kind, source, added in ((NODE, self.nodes, shift_VD), (GRAPH, session_RD, None)):
            if source is not None:
                slot_N = prompts.slots(kind)
                ref_N = prompts.ref_BL.flatten()[slot_N]
                read_ND = self._wide(source[ref_N])
                if added is not None:
                    read_ND = read_ND + self._wide(added[ref_N])
                filled_NH = self.project(self.dropout(read_ND)).to(embeds_BLH.dtype)
                embeds_BLH = embeds_BLH.flatten(0, 1).index_copy(0, slot_N, filled_NH).view_as(embeds_BLH)
        return embeds_BLH

    def _wide(self, read_ND: Tensor) -> Tensor:
        """The vectors padded to a node's width: columns of text are 0 where only an item vector was read."""
        return F.pad(read_ND, (0, self.nodes.shape[1] - read_ND.shape[1]))
