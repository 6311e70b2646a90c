"""Small language models, sessions and settings that the tests of the model core share."""
from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import DEFAULTS, ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
)

from llmgr.encoders.gcsan import Gcsan
from llmgr.language_model.attention import attend_plainly
from llmgr.model.llmgr import Llmgr
from llmgr.params.loading import load
from llmgr.prior.left_out import LeftOut
from llmgr.prior.weighted_sum import Prior
from llmgr.runtime.layout import Layout
from llmgr.sessions.tensors import Sessions

CHECKPOINTS = ROOT.parent / "shared" / "llm"
ITEMS, DIM, TEXT = 12, 8, 5
FILES = Layout("data", "models", "reports")  # of the folder that a test stands in
TITLES = [f"{'abcdefghijkl'[i] * (1 + i % 4)}-{i + 1}" for i in range(ITEMS)]
KINDS = ["llama", "bert", "mpnet", "stories260K", "all-MiniLM-L6-v2"]
DRAWN = ("llama", "bert", "mpnet")


def tokenizer(kind: str = "llama") -> Any:
    """A token a byte, which decodes to the text exactly; or a checkpoint's own."""
    if kind not in DRAWN:
        from llmgr.language_model.loading import load_tokenizer

        return load_tokenizer(checkpoint(kind))
    read = Tokenizer(models.BPE(unk_token="<unk>"))
    read.pre_tokenizer, read.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    read.train_from_iterator([], trainers.BpeTrainer(vocab_size=260, special_tokens=["<pad>", "<s>", "<unk>"],
                                                     initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                                     show_progress=False))
    opening = {"cls_token": "<s>"} if kind != "llama" else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=read, pad_token="<pad>", unk_token="<unk>", **opening)


def checkpoint(kind: str) -> Path:
    """A folder of the workbench's checkpoints; the test skips where it is absent."""
    if not (CHECKPOINTS / kind).is_dir():
        pytest.skip(f"no {kind} here")
    return CHECKPOINTS / kind


def language_model(kind: str = "llama", seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    """A frozen transformer: a random LLaMA with grouped queries, a random BERT or MPNet, or a checkpoint."""
    if kind not in DRAWN:
        from llmgr.language_model.loading import load_language_model

        return load_language_model(checkpoint(kind))
    torch.manual_seed(seed)
    shape = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 700, "initializer_range": 0.2}
    if kind == "llama":
        model = LlamaModel(LlamaConfig(**shape, num_key_value_heads=2, use_cache=False, attention_dropout=dropout))
    elif kind == "mpnet":
        model = MPNetModel(MPNetConfig(**shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout),
                           add_pooling_layer=False)
    else:
        model = BertModel(BertConfig(**shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout),
                          add_pooling_layer=False)
    attend_plainly(model)
    return model.requires_grad_(False).eval()


def encoder_section(dim: int, dropout: float, lr: float = 0.02) -> types.SimpleNamespace:
    """The encoder section of params.yaml at another width, with a short training."""
    section = load(DEFAULTS).encoder
    training = types.SimpleNamespace(**vars(section.training) | {
        "dropout": dropout, "epochs": 20, "patience": 20, "batch_size": 64, "precision": "fp32", "lr": lr})
    return types.SimpleNamespace(**vars(section) | {"dim": dim, "training": training})


def gated_by_hand(layer: torch.nn.Module, h: list[Tensor], edges: set[tuple[int, int]]) -> list[Tensor]:
    """SR-GNN's equations 1-5 for one propagation, node by node."""
    dim, after = len(h[0]), []
    for v in range(len(h)):
        before, following = ([a for a, b in edges if b == v], [b for a, b in edges if a == v])
        message_in, message_out = torch.zeros(dim), torch.zeros(dim)
        for u in before:
            message_in = message_in + (layer.message_in.weight @ h[u] + layer.message_in.bias) / len(before)
        for u in following:
            message_out = message_out + (layer.message_out.weight @ h[u] + layer.message_out.bias) / len(following)
        gates = layer.gates.weight_ih @ torch.cat((message_in, message_out)) + layer.gates.bias_ih
        states = layer.gates.weight_hh @ h[v] + layer.gates.bias_hh
        reset, update = torch.sigmoid(gates[:dim] + states[:dim]), torch.sigmoid((gates + states)[dim:2 * dim])
        candidate = torch.tanh(gates[2 * dim:] + reset * states[2 * dim:])
        after.append((1 - update) * candidate + update * h[v])
    return after


def readout_by_hand(attention: torch.nn.Module, x: list[Tensor]) -> Tensor:
    """SR-GNN's equations 6 and 7, click by click."""
    general = torch.zeros_like(x[0])
    for click in x:
        inside = attention.last.weight @ x[-1] + attention.each.weight @ click + attention.last.bias
        general = general + attention.score.weight[0] @ torch.sigmoid(inside) * click
    return attention.out.weight @ torch.cat((general, x[-1])) + attention.out.bias


def model_settings(**changes: Any) -> types.SimpleNamespace:
    """The model section of params.yaml."""
    return types.SimpleNamespace(**{
        "lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0,
        "dropout": 0.0, "lora_targets": ["auto"], "attention": "native",
        "readout": "auto", "output": "items", "text_dim": TEXT,
        "weights": "pretrained", "texts": "own", "node_text": False} | changes)


def llmgr(kind: str = "llama", seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **changes: Any
          ) -> Llmgr:
    """LLMGR over random item vectors and text features, in evaluation mode, adapters stirred so that they act."""
    torch.manual_seed(seed)
    encoder = Gcsan(DIM, dropout, types.SimpleNamespace(gnn_layers=1, attention_layers=1, attention_heads=1, omega=0.6))
    vectors, texts = (F.pad(torch.randn(ITEMS, d), (0, 0, 1, 0)) for d in (DIM, TEXT))
    backbone = language_model(kind, seed, dropout).to(dtype)
    for module in backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()  # as when it is loaded
    model = Llmgr(backbone, encoder, vectors, texts, model_settings(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


def linear_prior(train: Sessions, base: Any = None) -> Prior:
    """A prior over the sessions, each of a user of its own, with weights that differ from band to band."""
    train.user = torch.arange(1, len(train.items) + 1)
    prior = Prior(LeftOut(train, 3.0, 0.7, None, 0.0, ITEMS), base)
    with torch.no_grad():
        if base is not None:
            prior.base_weight += 0.2 * torch.arange(1, 1 + len(prior.base_weight))
        prior.weight += 0.1 * torch.arange(len(prior.weight))
        prior.bias += 0.3 * torch.arange(len(prior.bias))
        prior.clicked -= 2
    return prior


LISTS = [[3, 5, 3, 7, 7, 2], [4], [1, 2], [9, 9, 9], [6, 1, 6, 1, 8, 10, 12]]


def prefixes(lists: list[list[int]] = LISTS, seed: int = 0) -> Sessions:
    """Every prefix of every session, with random targets."""
    items = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
    for row, clicks in enumerate(lists):
        items[row, :len(clicks)] = torch.tensor(clicks)
    pairs = [(row, p) for row, clicks in enumerate(lists) for p in range(1, len(clicks) + 1)]
    row, length = torch.tensor(pairs).T
    target = torch.randint(1, ITEMS + 1, (len(pairs),), generator=torch.Generator().manual_seed(seed))
    return Sessions(items, row, length, target)


def chain(count: int, seed: int, shuffle: bool) -> Sessions:
    """Walks on a fixed successor of every item; with `shuffle` the targets belong to other walks."""
    generator = torch.Generator().manual_seed(seed)
    successor = F.pad(torch.randperm(30, generator=torch.Generator().manual_seed(9)) + 1, (1, 0))
    walk = [torch.randint(1, 31, (count,), generator=generator)]
    for _ in range(4):
        walk.append(successor[walk[-1]])
    items, target = torch.stack(walk[:-1], 1).int(), walk[-1]
    if shuffle:
        target = torch.randint(1, 31, (count,), generator=generator)
    return Sessions(items, torch.arange(count), torch.full((count,), 4), target)
