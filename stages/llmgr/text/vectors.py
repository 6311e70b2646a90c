"""Item text vectors: mean hidden states of a language model, their principal components, their similarity."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.runtime.console import Bar
from llmgr.runtime.errors import UserError
from llmgr.sessions.clicks import click_weights
from llmgr.text.items import deal, token_ids

if TYPE_CHECKING:
    from llmgr.sessions.graphs import GraphBatch
    from llmgr.sessions.tensors import Sessions



BATCH_TEXTS = 512
FLAT = 1e-6
"""Share of the vectors' length below which they do not differ in a direction but for float32's rounding: it is 0."""


def position_offset(model: nn.Module) -> int:
    """What a language model calls the first position: in RoBERTa's family the one after the padding's id."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


@torch.no_grad()
def encode_texts(model: nn.Module, tokenizer: Any, texts: list[str], max_tokens: int, batch_tokens: int = 8192
                 ) -> Tensor:
    """A unit vector a text [len(texts), H]: the mean of the last hidden states over its tokens (Sentence-BERT).

    Texts go through in batches of like length, at most `batch_tokens` tokens with padding. UserError where `max_tokens`
    passes the model's positions.
    """
    positions = model.config.max_position_embeddings - position_offset(model)
    if max_tokens > positions:
        raise UserError(f"llm.max_text_tokens={max_tokens} exceeds the backbone's {positions} positions: lower it")
    ids = token_ids(tokenizer, texts, max_tokens, special=True)
    device = next(model.parameters()).device
    length = torch.tensor([len(i) for i in ids])
    order = torch.argsort(length, stable=True)
    vectors = torch.zeros(len(texts), model.config.hidden_size)
    start, bar = 0, Bar(len(texts), 0, "encoding item texts", unit="text")
    while start < len(order):
        longest = int(length[order[min(len(order), start + BATCH_TEXTS) - 1]])
        size = min(BATCH_TEXTS, max(1, batch_tokens // max(1, longest)))
        chosen = order[start:start + size]
        start += size
        padded = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in chosen], batch_first=True).to(device)
        mask = (torch.arange(padded.shape[1]) < length[chosen][:, None]).to(device)
        hidden = model(input_ids=padded, attention_mask=mask.long()).last_hidden_state.float()
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        vectors[chosen] = F.normalize(pooled, dim=-1).cpu()
        bar.show(min(start, len(order)))
    bar.close()
    return vectors


def principal_components(vectors_VH: Tensor, dim: int, whiten: bool = False) -> Tensor:
    """The first `dim` principal components of item text vectors, scaled to unit mean variance; row 0 (padding) is 0.

    Where the vectors are narrower than `dim`, all of their components. With `whiten` each has unit variance by itself.
    """
    centred = vectors_VH[1:].double()
    centred = centred - centred.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes.flip(1)[:, :dim]
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    reduced = centred @ axes
    reduced = reduced * (reduced.square().mean(0).sqrt() > FLAT * vectors_VH[1:].double().square().sum(1).mean().sqrt())
    if whiten:
        deviation = reduced.square().mean(0).sqrt()
        reduced = reduced / deviation.clamp(min=max(1e-3 * float(deviation.max()), 1e-12))
    reduced = reduced / reduced.square().mean().sqrt().clamp(min=1e-12)
    return torch.cat((torch.zeros(1, reduced.shape[1]), reduced.float()))


def whitening(vectors_VH: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [H] and axes [H, H] such that (v - mean) @ axes has no correlations and, but for directions in which the
    vectors hardly differ, unit variances."""
    mean_H = vectors_VH.mean(0)
    centred = (vectors_VH - mean_H).double()
    variance_H, axes_HH = torch.linalg.eigh(centred.T @ centred / len(centred))
    deviation_H = variance_H.clamp(min=0).sqrt()
    axes_HH = axes_HH * (deviation_H > FLAT * vectors_VH.double().square().sum(1).mean().sqrt())
    return mean_H, (axes_HH / deviation_H.clamp(min=max(1e-2 * float(deviation_H.max()), 1e-12))).float()


def shuffled(vectors_VH: Tensor, seed: int) -> Tensor:
    """The same vectors dealt out to other items (row 0 stays): what is left of a gain is not the text."""
    return torch.cat((vectors_VH[:1], vectors_VH[1:][deal(len(vectors_VH) - 1, seed)]))


def click_sum(graphs: GraphBatch, vectors_VH: Tensor, decay: float) -> Tensor:
    """The clicks' vectors, summed with the weights of `click_weights`, [B, H]."""
    return (vectors_VH[graphs.items_BS] * click_weights(graphs, decay)[..., None]).sum(1)


def likeness(sessions: Sessions, samples: Tensor, vectors_VH: Tensor, decay: float) -> Tensor:
    """Scores [B, V+1]: cosines of item vectors to those of the clicks, summed with their weights."""
    return click_sum(sessions.graphs(samples), vectors_VH, decay) @ vectors_VH.T
