"""LLMGR built from models/, saved, and loaded again."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llmgr.language_model.loading import load_language_model, load_tokenizer
from llmgr.model.llmgr import Llmgr
from llmgr.runtime.artifacts import load_tensors, read_json, rounded, save_tensors, write_json
from llmgr.runtime.errors import UserError
from llmgr.text.vectors import principal_components, shuffled


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
    from llmgr.encoders.registry import load_encoder

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
