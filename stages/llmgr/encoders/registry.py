"""Session encoders, one file each, behind the interface llmgr.encoders.layers.SessionEncoder.

A new encoder is one more file, one line in REGISTRY and a section of its settings in llmgr.params.Encoder. A file is
imported when its encoder is built, so that a change to it reruns the stages of that encoder alone.
"""
from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmgr.encoders.layers import ItemVectors, SessionEncoder, Settings
from llmgr.runtime.artifacts import load_tensors, read_json, replacing_folder, save_tensors, write_json
from llmgr.runtime.errors import UserError

if TYPE_CHECKING:
    from llmgr.params.encoders import Encoder
    from llmgr.sessions.graphs import GraphBatch
    from llmgr.sessions.tensors import Sessions


REGISTRY = {
    "fpmc": "Fpmc", "caser": "Caser", "gru4rec": "Gru4rec", "narm": "Narm", "stamp": "Stamp", "sasrec": "Sasrec",
    "bsarec": "Bsarec", "srgnn": "Srgnn", "gcsan": "Gcsan", "niser": "Niser", "hcgr": "Hcgr"}
"""The class of each encoder; its file has the encoder's name."""
TEXTS = ("text", "shuffled", "linear")
"""The controls of an encoder: with item texts, with shuffled texts, and with texts and a linear prior in the logits."""


class EncoderWithItems(nn.Module):
    """A session encoder with its items: `forward(batch)` returns session vectors [B, E] and item vectors [V+1, E]."""

    def __init__(self, items: int, encoder: SessionEncoder, features_VT: Tensor | None = None) -> None:
        super().__init__()
        self.items = ItemVectors(items, encoder.item_width, encoder.text_width, features_VT)
        self.encoder = encoder
        self.offset: nn.Module | None = None
        """`offset(sessions, samples, trained)` returns logits [R, V+1] that are added to the encoder's own."""
        encoder.initialise(self.items)

    def vectors(self) -> Tensor:
        """Item vectors [V+1, E] as the encoder reads and scores them."""
        return self.encoder.item_vectors(*self.items())

    def forward(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        vectors = self.vectors()
        return self.encoder(batch, vectors), vectors


def family(name: str) -> tuple[str, str]:
    """The encoder of a name and how it reads texts: ("gcsan", "shuffled") for `gcsan-shuffled`, ("gcsan", "none") for
    `gcsan`. UserError where there is no such encoder."""
    base, hyphen, text = name.partition("-")
    if base not in REGISTRY:
        near = difflib.get_close_matches(base, REGISTRY, 1, 0.0)[0]
        raise UserError(f"{name} is no encoder: the nearest of encoder.names and encoder.controls is {near}")
    if hyphen and text not in TEXTS:
        near = difflib.get_close_matches(text, TEXTS, 1, 0.0)[0]
        raise UserError(f"{name} is no encoder: after the hyphen stands {', '.join(TEXTS[:-1])} or {TEXTS[-1]}; the "
                        f"nearest is {base}-{near}")
    return base, text or "none"


def build_encoder(base: str, dim: int, dropout: float, settings: dict[str, Any]) -> SessionEncoder:
    """The untrained encoder `base` of width `dim`; `settings` has the keys of `Settings`."""
    kind = getattr(importlib.import_module(f"llmgr.encoders.{base}"), REGISTRY[base])
    encoder = kind(dim, dropout, Settings(**settings))
    encoder.config = {"dim": dim, "dropout": dropout, "settings": settings}
    return encoder


def build_with_items(name: str, items: int, section: Encoder, features_VT: Tensor | None, *, users: int,
                     max_session: int) -> EncoderWithItems:
    """The untrained encoder `name` with its items, for a catalogue of `items`; `users` and `max_session` as `Settings`.

    `features_VT` are the items' text features, which an encoder without texts ignores.
    """
    base, text = family(name)
    settings = {**vars(getattr(section, base)), "users": users, "max_session": max_session}
    encoder = build_encoder(base, section.dim, section.training.dropout, settings)
    return EncoderWithItems(items, encoder, None if text == "none" else features_VT)


def save_with_items(folder: str | Path, name: str, model: EncoderWithItems) -> None:
    """Write the encoder's weights, its item vectors and the settings to rebuild it into `folder`."""
    with replacing_folder(folder) as temporary, torch.no_grad():
        save_tensors(temporary / "encoder.safetensors", model.encoder.state_dict())
        save_tensors(temporary / "items.safetensors", {"vectors": model.vectors()})
        if model.offset is not None:
            save_tensors(temporary / "offset.safetensors", model.offset.state_dict())
        write_json(temporary / "config.json", {
            "name": name, "items": len(model.items.table.weight) - 1, **model.encoder.config})


def load_encoder(folder: str | Path, items: int) -> tuple[SessionEncoder, Tensor]:
    """The trained encoder of a folder and its item vectors [V+1, E]; UserError where it is of another catalogue."""
    config = read_json(Path(folder) / "config.json")
    if config["items"] != items:
        raise UserError(f"{folder} was trained for {config['items']} items, the catalogue has {items}: run `dvc repro` "
                        "to train it anew")
    base, _ = family(config["name"])
    encoder = build_encoder(base, config["dim"], config["dropout"], config["settings"])
    encoder.load_state_dict(load_tensors(Path(folder) / "encoder.safetensors"))
    return encoder, load_tensors(Path(folder) / "items.safetensors")["vectors"]


def check_users(encoder: SessionEncoder, folder: str | Path, sessions: Sessions) -> None:
    """Raise UserError where the encoder in `folder` has parameters for each user, but not for all of the sessions'."""
    if encoder.reads_users and int(sessions.user.max()) > encoder.config["settings"]["users"]:
        raise UserError(f"{folder} was trained for fewer users than the sessions have: run `dvc repro` to train it "
                        "anew")
