"""LLMGR built from the files of a pipeline, its own weights saved and loaded again."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from llmgr.encoders.registry import load_encoder
from llmgr.language_model.loading import load_language_model, load_tokenizer
from llmgr.model.llmgr import Llmgr
from llmgr.params.schema import Model
from llmgr.runtime.artifacts import load_tensors, read_json, rounded, save_tensors, write_json
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.text.vectors import principal_components, shuffled


def build_llmgr(section: Model, files: Layout, dtype: torch.dtype, seed: int, shape: str | None = None,
                device: torch.device | None = None) -> Llmgr:
    """LLMGR over a backbone and a pretrained encoder, untrained.

    `seed` draws what the ablations change: the language model's weights, and the shuffling of the texts. With `shape`,
    a config.json file, the language model has that shape and weights drawn on `device`, to measure its cost. UserError
    where the shape does not fit the tokenizer.
    """
    vectors = load_tensors(files.item_vectors)["vectors"]
    if section.texts == "shuffled":
        vectors = shuffled(vectors, seed)
    text_VT = principal_components(vectors, section.text_dim)
    encoder, vectors_VD = load_encoder(files.embeddings, len(text_VT) - 1)
    if shape is None:
        random = seed if section.weights == "random" else None
        language_model = load_language_model(files.backbone, dtype, random)
    else:
        language_model = load_language_model(shape, dtype, seed, device)
        tokens, config = len(load_tokenizer(files.backbone)), language_model.config
        if not hasattr(config, "max_position_embeddings") or config.vocab_size < tokens:
            raise UserError(f"{shape} must have max_position_embeddings and a vocab_size of at least {tokens}, the "
                            f"tokens of {files.backbone}, whose tokenizer makes the prompts")
    return Llmgr(language_model, encoder, vectors_VD, text_VT, section)


def save_llmgr(folder: Path, model: Llmgr, section: Model, files: Layout, prior: nn.Module | None = None, *,
               encoder: bool) -> None:
    """Write the trained tensors, the prior's included, and a config.json that says what they belong to into `folder`.

    With `encoder` the graph encoder's weights are written, too. `files` has the models below it.
    """
    save_tensors(folder / "llmgr.safetensors", own_tensors(model, prior))
    if encoder:
        save_tensors(folder / "encoder.safetensors", model.encoder.state_dict())
    dtype = model.language_model.get_input_embeddings().weight.dtype
    write_json(folder / "config.json", {"items": len(model.vectors) - 1, "backbone": backbone_digest(files),
                                        "encoder": encoder, "precision": "bf16" if dtype is torch.bfloat16 else "fp32",
                                        "model": {k: v for k, v in sorted(vars(section).items())}})


def load_llmgr(folder: Path, model: Llmgr, section: Model, files: Layout, prior: nn.Module | None = None) -> None:
    """Load what `save_llmgr` wrote; UserError where it belongs to another backbone, catalogue or model section."""
    config = read_json(folder / "config.json")
    if config["items"] != len(model.vectors) - 1 or config["backbone"] != backbone_digest(files):
        raise UserError(f"{folder} belongs to another backbone or catalogue: run `dvc repro` to train it anew")
    for key, value in vars(section).items():
        if key not in ("dropout", "lora_dropout") and config["model"].get(key) != rounded(value):
            raise UserError(f"{folder} was trained with model.{key}={config['model'].get(key)}, not {value}: run `dvc "
                            "repro` to train it anew")
    tensors, own = load_tensors(folder / "llmgr.safetensors"), own_tensors(model, prior)
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in own.items()}:
        raise UserError(f"{folder} has other tensors than the model section, tune.linear, tune.folds and "
                        "tower.enabled ask for: run `dvc repro` to train it anew")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    if config["encoder"]:
        model.encoder.load_state_dict(load_tensors(folder / "encoder.safetensors"))


def own_tensors(model: Llmgr, prior: nn.Module | None) -> dict[str, nn.Parameter]:
    """The trained parameters of LLMGR and of its prior by name, without the graph encoder's."""
    return dict(model.trained()) | {f"prior.{name}": p for name, p in (prior.named_parameters() if prior else ())}


def backbone_digest(files: Layout) -> str:
    """The digests of the text encoder's weights and vectors and, where it is another model, the language model's."""
    own, reader = (read_json(folder / f"{folder.name}.json")["sha256"] for folder in (files.backbone,
                                                                                     files.text_encoder))
    return json.dumps(reader if own.items() <= reader.items() else [own, reader], sort_keys=True)
