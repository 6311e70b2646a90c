"""Session encoders, one file each, behind one interface.

An encoder is a module built as `Encoder(dim, dropout, settings)` whose `forward(batch, vectors_VD)` returns session
vectors [B, D] for a GraphBatch; `vectors_VD` holds a vector an item, row 0 for padding. Item scores are inner
products of the two. `readout_parameters()` names what `tune.train_encoder=partial` trains. A new encoder is one more
file, one line in REGISTRY and a section of its settings in llmgr.params.Encoder.
"""
from __future__ import annotations

import difflib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmgr.artifacts import load_tensors, read_json, replacing_folder, save_tensors, write_json
from llmgr.encoders.gcsan import Gcsan
from llmgr.errors import UserError

REGISTRY: dict[str, type[nn.Module]] = {"gcsan": Gcsan}


class ItemVectors(nn.Module):
    """Item vectors [V+1, D]: an ID embedding and, for a control, a linear map of the item's text features.

    The second is the text+GNN control's item vector (METHOD: ID + linear(frozen text vector), on the input and the
    output side); with features_VT None it is an ID table.
    """

    def __init__(self, items: int, dim: int, features_VT: Tensor | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(items + 1, dim, padding_idx=0)
        self.text = None
        if features_VT is not None:
            self.register_buffer("features", features_VT, persistent=False)
            self.text = nn.Linear(features_VT.shape[1], dim, bias=False)

    def forward(self) -> Tensor:
        return self.table.weight if self.text is None else self.table.weight + self.text(self.features)


class Recommender(nn.Module):
    """A session encoder with its item vectors: `forward(batch)` gives session vectors and the vectors to score."""

    def __init__(self, items: int, encoder: nn.Module, dim: int, features_VT: Tensor | None = None) -> None:
        super().__init__()
        self.vectors = ItemVectors(items, dim, features_VT)
        self.encoder = encoder
        bound = dim ** -0.5
        for parameter in self.parameters():  # SR-GNN's and GC-SAN's initialisation
            if parameter.dim() > 1:
                nn.init.uniform_(parameter, -bound, bound)
        with torch.no_grad():
            self.vectors.table.weight[0] = 0
            if self.vectors.text is not None:  # unit-variance features must not drown the ID part
                self.vectors.text.weight.mul_(0.1)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        vectors = self.vectors()
        return self.encoder(batch, vectors), vectors


def family(name: str) -> tuple[str, str]:
    """The encoder and how it reads texts: `gcsan-shuffled` is ("gcsan", "shuffled"), `gcsan` is ("gcsan", "none")."""
    base, _, text = name.partition("-")
    if base not in REGISTRY:
        near = difflib.get_close_matches(base, REGISTRY, 1, 0.0)[0]
        raise UserError(f"encoder.names or encoder.controls holds {name}, which is no encoder; the nearest is {near}")
    return base, text or "none"


def build_recommender(name: str, items: int, params: Any, features_VT: Tensor | None) -> Recommender:
    """The untrained recommender `name` for a catalogue of `items`; `params` is the encoder section."""
    base, text = family(name)
    encoder = REGISTRY[base](params.dim, params.training.dropout, getattr(params, base))
    return Recommender(items, encoder, params.dim, None if text == "none" else features_VT)


def save_recommender(folder: str | Path, name: str, model: Recommender, params: Any) -> None:
    """Weights, item vectors as scored, and the shape, under `folder`; `params` is the encoder section."""
    base, _ = family(name)
    with replacing_folder(folder) as temporary, torch.no_grad():
        save_tensors(temporary / "encoder.safetensors", model.encoder.state_dict())
        save_tensors(temporary / "items.safetensors", {"vectors": model.vectors()})
        write_json(temporary / "config.json", {
            "name": name, "items": len(model.vectors.table.weight) - 1, "dim": params.dim,
            "dropout": params.training.dropout, "settings": vars(getattr(params, base))})


def load_encoder(folder: str | Path, items: int) -> tuple[nn.Module, Tensor]:
    """A trained encoder and its item vectors [V+1, D]; UserError where it belongs to another catalogue."""
    config = read_json(Path(folder) / "config.json")
    if config["items"] != items:
        raise UserError(f"{folder} was trained for {config['items']} items, the sessions have {items}: run `dvc repro` "
                        "to train it anew")
    kind, _ = family(config["name"])
    encoder = REGISTRY[kind](config["dim"], config["dropout"], SimpleNamespace(**config["settings"]))
    encoder.load_state_dict(load_tensors(Path(folder) / "encoder.safetensors"))
    return encoder, load_tensors(Path(folder) / "items.safetensors")["vectors"]
