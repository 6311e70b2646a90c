"""LLMGR (arXiv 2402.16539): hybrid encoding layer, language model with LoRA, output layer over all items."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.adapters import join_products
from llmgr.artifacts import load_tensors, read_json, rounded, save_tensors, write_json
from llmgr.attention import Apiece, attends_apart
from llmgr.backbone import add_adapters, is_causal, load_language_model, load_tokenizer
from llmgr.encoders.layers import Dropout
from llmgr.errors import UserError
from llmgr.graph import GraphBatch
from llmgr.prompts import GRAPH, NODE, PromptBatch
from llmgr.replay import Recorder, Replayed
from llmgr.text_vectors import position_offset, principal_components, shuffled


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
        every = torch.arange(tokens.num_embeddings, device=tokens.weight.device)  # Gemma's scales its weights
        token_scale = tokens(every).detach().float().square().mean().sqrt()
        node_scale = vectors_VD[1:].square().mean().sqrt().clamp(min=1e-6)
        nn.init.normal_(self.project.weight, std=float(token_scale / node_scale) * dim ** -0.5)

    def forward(self, tokens: nn.Embedding, prompts: PromptBatch, session_RD: Tensor | None,
                shift_VD: Tensor | None = None) -> Tensor:
        """`inputs_embeds` [B, L, H]; node slots read the item vectors (plus `shift_VD`), graph slots `session_RD`."""
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
        """A node's columns; those of text are 0 where only a vector was read."""
        return F.pad(read_ND, (0, self.nodes.shape[1] - read_ND.shape[1]))


class LinearOutput(nn.Module):
    """The paper's output layer: free weights W [V, H] and biases; `hidden` puts one GELU layer before it."""

    def __init__(self, width: int, items: int, hidden: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU()) if hidden else nn.Identity()
        self.items = nn.Linear(width, items + 1)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.zeros_(self.items.bias)

    def forward(self, h_RH: Tensor, session_RD: Tensor | None, shift_VD: Tensor | None = None
                ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [R, K], item table [V+1, K] and item biases [V+1] whose product and sum are the logits.

        The weights are its own: noise on the item vectors does not concern it.
        """
        return self.inner(h_RH), self.items.weight, self.items.bias


class ItemsOutput(nn.Module):
    """Logits (W h + b) . [x_i ; t_i]: frozen item vectors and text features on the item side.

    Deviation: the paper's layer is free (LinearOutput); an item met five times learns little there, and a text that
    is only read on the session's side cannot raise a cold item's score. With `residual` W starts at zero and the
    encoder's session vector is added, so that tuning starts from the encoder's own scores (with align.enabled=false:
    stage 1 moves W).
    """

    def __init__(self, width: int, vectors_VD: Tensor, text_VT: Tensor, residual: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.cat((vectors_VD, text_VT), 1), persistent=False)
        self.query = nn.Linear(width, self.table.shape[1])
        self.dim, self.residual = vectors_VD.shape[1], residual
        nn.init.normal_(self.query.weight, std=0.0 if residual else 0.1 * width ** -0.5)
        nn.init.zeros_(self.query.bias)

    def forward(self, h_RH: Tensor, session_RD: Tensor | None, shift_VD: Tensor | None = None
                ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [R, K], item table [V+1, K] (its item vectors plus `shift_VD`) and no bias."""
        query = self.query(h_RH)
        if self.residual and session_RD is not None:
            query = query + F.pad(session_RD, (0, query.shape[1] - self.dim))
        if shift_VD is None:
            return query, self.table, None
        return query, torch.cat((self.table[:, :self.dim] + shift_VD, self.table[:, self.dim:]), 1), None


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
        self.register_buffer("deviation_V", None, persistent=False)
        self.encoder = encoder.requires_grad_(False)
        width, items = config.hidden_size, len(vectors_VD) - 1
        self.hybrid = HybridEncoding(language_model.get_input_embeddings(), vectors_VD, params.dropout,
                                     text_VT if params.node_text else None)
        self.dropout = Dropout(params.dropout)
        self.output = (ItemsOutput(width, vectors_VD, text_VT, params.session_residual) if params.output == "items"
                       else LinearOutput(width, items, hidden=params.output == "mlp"))
        self.language_model = add_adapters(language_model, params)
        self.linear_term: nn.Module | None = None
        """Scores of all items for samples [R] of sessions, added to the logits (see llmgr.linear)."""

    def disturb_items(self, share: float, count_V: Tensor) -> None:
        """In training, add normal noise to the item vectors, drawn anew a forward pass, the same on both sides.

        Its deviation is `share` of the vectors' root mean square over sqrt(1 + count): pretraining fitted a vector to
        the very targets that it is to explain here, an item's that was met `count_V` [V+1] times the more the fewer
        they were. Without noise the language model learns to trust rare items' vectors as nothing unseen deserves.
        """
        scale = share * self.vectors[1:].square().mean().sqrt()
        self.deviation_V = F.pad(scale * (1 + count_V[1:].to(scale.device)).rsqrt(), (1, 0))

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
        if self.training and self.deviation_V is not None:
            noise_VD = torch.randn_like(self.vectors) * self.deviation_V[:, None]
            shift_VD = noise_VD if shift_VD is None else shift_VD + noise_VD
        return self.output(self.dropout(self.hidden(prompts, session_RD, shift_VD)), session_RD, shift_VD)

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


def logits(query_RK: Tensor, table_VK: Tensor, bias_V: Tensor | None) -> Tensor:
    """Scores of all items [R, V+1]; column 0 is padding."""
    return F.linear(query_RK, table_VK, bias_V)


def save_llmgr(folder: Path, model: Llmgr, params: Any, encoder: bool) -> None:
    """Trained tensors (and the graph encoder's with `encoder`), the shape they belong to and the arithmetic that they
    were trained in, into `folder`."""
    save_tensors(folder / "llmgr.safetensors", dict(model.trained()))
    if encoder:
        save_tensors(folder / "encoder.safetensors", model.encoder.state_dict())
    dtype = model.language_model.get_input_embeddings().weight.dtype
    write_json(folder / "config.json", {"items": len(model.vectors) - 1, "backbone": backbone_digest(),
                                        "encoder": encoder, "precision": "bf16" if dtype is torch.bfloat16 else "fp32",
                                        "model": {k: v for k, v in sorted(vars(params).items())}})


def load_llmgr(folder: Path, model: Llmgr, params: Any) -> None:
    """Load what `save_llmgr` wrote; UserError where it belongs to another backbone, catalogue or model section."""
    config = read_json(folder / "config.json")
    if config["items"] != len(model.vectors) - 1 or config["backbone"] != backbone_digest():
        raise UserError(f"{folder} belongs to another backbone or catalogue: run `dvc repro` to train it anew")
    for key, value in vars(params).items():
        if key not in ("dropout", "lora_dropout") and config["model"].get(key) != rounded(value):
            raise UserError(f"{folder} was trained with model.{key}={config['model'].get(key)}, not {value}: run `dvc "
                            "repro` to train it anew")
    tensors = load_tensors(folder / "llmgr.safetensors")
    own = dict(model.trained())
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in own.items()}:
        raise UserError(f"{folder} has other tensors than the model section, tune.linear, tune.folds and "
                        "tower.enabled ask for: run `dvc repro` to train it anew")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    own_encoder = folder / "encoder.safetensors"
    if config.get("encoder", own_encoder.exists()):  # older folders do not say
        model.encoder.load_state_dict(load_tensors(own_encoder))


def backbone_digest() -> str:
    """The weights' digests as models/backbone records them."""
    return json.dumps(read_json("models/backbone/backbone.json")["sha256"], sort_keys=True)


def build_llmgr(params: Any, dtype: torch.dtype, seed: int, shape: str | None = None,
                place: torch.device | None = None) -> Llmgr:
    """LLMGR over models/backbone and models/embeddings, untrained; `params` is the model section.

    `seed` draws what the twins change: the language model's weights, whose text an item has. With `shape`, the file of
    a config.json, the language model is one of that shape with weights drawn at `place`, to measure what it would cost.
    """
    from llmgr.encoders import load_encoder

    vectors = load_tensors("models/backbone/item_text.safetensors")["vectors"]
    if params.texts == "shuffled":
        vectors = shuffled(vectors, seed)
    text_VT = principal_components(vectors, params.text_dim)
    encoder, vectors_VD = load_encoder("models/embeddings", len(text_VT) - 1)
    random = seed if params.weights == "random" else None
    if shape is None:
        language_model = load_language_model("models/backbone", dtype, random)
    else:
        language_model = load_language_model(shape, dtype, seed, place)
        tokens, config = len(load_tokenizer("models/backbone")), language_model.config
        if not hasattr(config, "max_position_embeddings") or config.vocab_size < tokens:
            raise UserError(f"{shape} must have max_position_embeddings and a vocab_size of at least {tokens}, the "
                            "tokens of models/backbone, whose tokenizer makes the prompts")
    return Llmgr(language_model, encoder, vectors_VD, text_VT, params)
