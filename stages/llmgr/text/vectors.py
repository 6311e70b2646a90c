"""Item text vectors: mean hidden states of a language model, their principal components, their similarity.

Shapes: H width of the text vectors.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.runtime.console import Bar
from llmgr.runtime.errors import UserError
from llmgr.sessions.clicks import click_weights
from llmgr.text.items import deal, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmgr.sessions.graphs import GraphBatch
    from llmgr.sessions.tensors import Sessions


BATCH_TEXTS = 512
FLAT = 1e-6
"""A direction in which the vectors vary by less than this share of their length is rounding alone, and is set to 0."""


def position_offset(model: nn.Module) -> int:
    """The number of a language model's first position: 0, but in RoBERTa's family the id of the padding plus 1."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


@torch.no_grad()
def encode_texts(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int,
                 batch_tokens: int = 8192) -> Tensor:
    """A unit vector for each text [len(texts), H]: the mean of the last hidden states of its tokens (Sentence-BERT).

    A batch holds texts of similar length, at most `batch_tokens` tokens with padding. UserError where `max_tokens`
    exceeds the model's positions.
    """
    positions = model.config.max_position_embeddings - position_offset(model)
    if max_tokens > positions:
        raise UserError(f"text_encoder.max_text_tokens={max_tokens} exceeds the text encoder's {positions} positions: "
                        "lower it")
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
    """The first `dim` principal components of item text vectors [V+1, dim]; row 0, padding, is 0.

    Their mean variance is 1; with `whiten` each component has variance 1. Vectors narrower than `dim` have only as many
    components as columns.
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
    """Mean [H] and axes [H, H] so that the columns of (v - mean) @ axes are uncorrelated with variance 1.

    Directions in which the vectors hardly vary get less than variance 1, so that noise is not magnified.
    """
    mean_H = vectors_VH.mean(0)
    centred = (vectors_VH - mean_H).double()
    variance_H, axes_HH = torch.linalg.eigh(centred.T @ centred / len(centred))
    deviation_H = variance_H.clamp(min=0).sqrt()
    axes_HH = axes_HH * (deviation_H > FLAT * vectors_VH.double().square().sum(1).mean().sqrt())
    return mean_H, (axes_HH / deviation_H.clamp(min=max(1e-2 * float(deviation_H.max()), 1e-12))).float()


def shuffled(vectors_VH: Tensor, seed: int) -> Tensor:
    """The same vectors shuffled among the items; row 0, padding, stays. A gain that remains is not due to texts."""
    return torch.cat((vectors_VH[:1], vectors_VH[1:][deal(len(vectors_VH) - 1, seed)]))


def click_sum(graphs: GraphBatch, vectors_VH: Tensor, decay: float) -> Tensor:
    """The sum of the clicks' vectors with the weights of `click_weights` [B, H]."""
    return (vectors_VH[graphs.items_BS] * click_weights(graphs, decay)[..., None]).sum(1)


def click_similarity(sessions: Sessions, samples: Tensor, vectors_VH: Tensor, decay: float) -> Tensor:
    """Scores [B, V+1]: each item's cosine to the clicks, summed over the clicks with the weights of `click_weights`.

    `vectors_VH` are unit vectors.
    """
    return click_sum(sessions.graphs(samples), vectors_VH, decay) @ vectors_VH.T
