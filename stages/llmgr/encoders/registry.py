"""Session encoders, one file each, behind the interface llmgr.encoders.layers.SessionEncoder.

A new encoder is one more file, one line in REGISTRY and a section of its settings in llmgr.params.Encoder. Files are
imported when their encoder is asked for, so that a change to one of them reruns the stages of that encoder alone.
"""
from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmgr.encoders.layers import ItemVectors, SessionEncoder
from llmgr.runtime.artifacts import load_tensors, read_json, replacing_folder, save_tensors, write_json
from llmgr.runtime.errors import UserError

if TYPE_CHECKING:
    from llmgr.sessions.tensors import Sessions



REGISTRY = {
    "fpmc": "Fpmc", "caser": "Caser", "gru4rec": "Gru4rec", "narm": "Narm", "stamp": "Stamp", "sasrec": "Sasrec",
    "bsarec": "Bsarec", "srgnn": "Srgnn", "gcsan": "Gcsan", "niser": "Niser", "hcgr": "Hcgr"}
"""Class by encoder; the file has the encoder's name."""
TEXTS = ("text", "shuffled", "linear")
"""What a control reads: its own texts, those of other items, or its own over the offset that LLMGR's logits have."""


class EncoderWithItems(nn.Module):
    """A session encoder with its items: `forward(batch)` gives session vectors and the item vectors to score."""

    def __init__(self, items: int, encoder: SessionEncoder, features_VT: Tensor | None = None) -> None:
        super().__init__()
        self.items = ItemVectors(items, encoder.item_width, encoder.text_width, features_VT)
        self.encoder = encoder
        self.offset: nn.Module | None = None
        """`offset(sessions, samples, trained)` gives logits [R, V+1] that are added to the encoder's."""
        encoder.initialise(self.items)

    def vectors(self) -> Tensor:
        """Item vectors [V+1, E] as the encoder reads and scores them."""
        return self.encoder.item_vectors(*self.items())

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        vectors = self.vectors()
        return self.encoder(batch, vectors), vectors


def family(name: str) -> tuple[str, str]:
    """The encoder and how it reads texts: `gcsan-shuffled` is ("gcsan", "shuffled"), `gcsan` is ("gcsan", "none")."""
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
    """The untrained encoder `base`."""
    kind = getattr(importlib.import_module(f"llmgr.encoders.{base}"), REGISTRY[base])
    encoder = kind(dim, dropout, SimpleNamespace(**settings))
    encoder.config = {"dim": dim, "dropout": dropout, "settings": settings}
    return encoder


def build_with_items(name: str, items: int, params: Any, features_VT: Tensor | None, *, users: int, max_session: int
                     ) -> EncoderWithItems:
    """The untrained encoder `name` with its items, for a catalogue of `items`; `params` is the encoder section.

    `users` counts those that training knows; `max_session` is the longest session. Its settings get both.
    """
    base, text = family(name)
    settings = {**vars(getattr(params, base)), "users": users, "max_session": max_session}
    encoder = build_encoder(base, params.dim, params.training.dropout, settings)
    return EncoderWithItems(items, encoder, None if text == "none" else features_VT)


def save_with_items(folder: str | Path, name: str, model: EncoderWithItems) -> None:
    """Weights, item vectors as scored, and what to build them from, under `folder`."""
    with replacing_folder(folder) as temporary, torch.no_grad():
        save_tensors(temporary / "encoder.safetensors", model.encoder.state_dict())
        save_tensors(temporary / "items.safetensors", {"vectors": model.vectors()})
        if model.offset is not None:
            save_tensors(temporary / "offset.safetensors", model.offset.state_dict())
        write_json(temporary / "config.json", {
            "name": name, "items": len(model.items.table.weight) - 1, **model.encoder.config})


def load_encoder(folder: str | Path, items: int) -> tuple[SessionEncoder, Tensor]:
    """A trained encoder and its item vectors [V+1, E]; UserError where it belongs to another catalogue."""
    config = read_json(Path(folder) / "config.json")
    if config["items"] != items:
        raise UserError(f"{folder} was trained for {config['items']} items, the catalogue has {items}: run `dvc repro` "
                        "to train it anew")
    base, _ = family(config["name"])
    encoder = build_encoder(base, config["dim"], config["dropout"], config["settings"])
    encoder.load_state_dict(load_tensors(Path(folder) / "encoder.safetensors"))
    return encoder, load_tensors(Path(folder) / "items.safetensors")["vectors"]


def check_users(encoder: SessionEncoder, folder: str | Path, sessions: Sessions) -> None:
    """Raise UserError where the encoder in `folder` has something of each user, but not of all in the sessions."""
    if encoder.reads_users and int(sessions.user.max()) > encoder.config["settings"]["users"]:
        raise UserError(f"{folder} was trained for fewer users than the sessions have: run `dvc repro` to train it "
                        "anew")
