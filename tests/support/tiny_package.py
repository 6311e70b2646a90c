"""A package of twelve items, made of tensors, that the tests of serving share."""
from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from tiny import DIM, ITEMS, prefixes, tokenizer
from torch.nn import functional as F

from llmgr.encoders.registry import build_encoder
from llmgr.prior.left_out import LeftOut
from llmgr.prior.text_tower import TextTower, TokenMeans
from llmgr.prior.weighted_sum import BANDS, Prior
from llmgr.serving.building import rows_of
from llmgr.serving.new_items import text_tensors, word_tensors
from llmgr.serving.package import Package
from llmgr.serving.student import Student
from llmgr.sessions.graphs import GraphBatch
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import token_table
from llmgr.text.vectors import click_similarity

IDS = [f"B{number:04d}" for number in range(1, ITEMS + 1)]
ENCODER = {"name": "gcsan", "dim": DIM, "dropout": 0.0, "settings": {
    "gnn_layers": 1, "attention_layers": 1, "attention_heads": 1, "omega": 0.6, "users": 5, "max_session": 6}}
TEXTS = [f"{colour} {thing} soap" for colour in ("red", "blue", "green", "pale") for thing in ("rose", "mint", "oat")]
LONGEST = 24
TOWER = {"decay": 0.7, "scale": 1.5}


def prior(seed: int = 0) -> tuple[Prior, Any]:
    """A prior with a base and a tower, every weight its own, and the base's encoder."""
    torch.manual_seed(seed)
    encoder = build_encoder("gcsan", DIM, 0.0, ENCODER["settings"]).eval()
    base, tower = (F.pad(torch.randn(ITEMS, width), (0, 0, 1, 0)) for width in (DIM, 5))

    def scores(sessions: Sessions, samples: torch.Tensor, trained: bool) -> torch.Tensor:
        return encoder(sessions.graphs(samples), base) @ base.T

    def cosines(sessions: Sessions, samples: torch.Tensor, trained: bool) -> torch.Tensor:
        return click_similarity(sessions, samples, tower, TOWER["decay"]) * TOWER["scale"]

    train = prefixes()
    train.user = torch.arange(1, len(train.items) + 1)
    term = Prior(LeftOut(train, 3.0, 0.7, None, 0.0, ITEMS), scores, cosines)
    with torch.no_grad():
        for parameter in term.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    term.vectors = {"base": base, "tower": tower}
    return term, encoder


def package(term: Prior | None = None, encoder: Any = None, entries: int = ITEMS + 1, **config: Any) -> Package:
    """The package of a prior, all entries of its item-item matrix in it."""
    if term is None:
        term, encoder = prior()
    items = pl.DataFrame({"item": IDS, "title": [f"title of {item}" for item in IDS],
                          "count": term.count[1:].int().numpy(), "blocked": [False] * ITEMS})
    tensors = {**{f"weights.{name}": value.detach().clone() for name, value in term.named_parameters()},
               **{f"encoder.{name}": value for name, value in encoder.state_dict().items()},
               **rows_of(term.model.matrix * term.scale, entries), **term.vectors}
    return Package({"max_session": 6, "decay": 0.7, "edges": list(BANDS), "encoder": ENCODER, "tower": TOWER,
                    "student": False} | config, items, tensors)


def graphs(lists: list[list[int]]) -> GraphBatch:
    """The session graphs of lists of item numbers, of strangers."""
    items = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
    for row, clicks in enumerate(lists):
        items[row, :len(clicks)] = torch.tensor(clicks)
    row = torch.arange(len(lists))
    return Sessions(items, row, torch.tensor([len(clicks) for clicks in lists]), row + 1).graphs(row)


def renamed() -> object:
    """Another package: its items are called C0001 to C0012."""
    whole = package()
    return type(whole)(whole.config, whole.items.with_columns(pl.col("item").str.replace("B", "C")), whole.tensors)


def readable_package() -> Package:
    """A package with a token tower of TEXTS, a student, and the words."""
    torch.manual_seed(5)
    reads = tokenizer("bert")
    token_VL, count_V = token_table(reads(TEXTS, truncation=True, max_length=LONGEST)["input_ids"], LONGEST)
    tower = TextTower(TokenMeans(token_VL, count_V, 16)).eval()
    tower.whiten()
    plain = package(entries=6)
    table = F.pad(torch.randn(ITEMS, 4), (0, 0, 1, 0))
    student = Student(4)
    tensors = plain.tensors | {"tower": tower.vectors(), "student.table": table, **{
        f"student.net.{name}": value for name, value in student.state_dict().items()}}
    made = Package(plain.config | {"entries": 6, "student": True, "tower": plain.config["tower"] | {
        "max_text_tokens": LONGEST}}, plain.items.with_columns(title=pl.Series(TEXTS)), tensors)
    used = torch.unique(token_VL[torch.arange(LONGEST) < count_V[:, None]])
    weights = {name: value.detach() for name, value in tower.named_parameters()}
    share = np.full(ITEMS + 1, 0.5) / (1 + np.arange(ITEMS + 1))
    return Package(made.config, made.items, made.tensors | text_tensors(
        made, weights, used, reads.backend_tokenizer.to_str().encode()) | word_tensors(TEXTS, share))
