"""The text tower: a text encoder, tuned so that an item's vector is close to those of the clicks before it.

Shapes: N texts, L tokens of a text, T tokens that occur in some text.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.language_model.loading import is_causal
from llmgr.text.vectors import position_offset, whitening

TEMPERATURE = 0.1  # at the start of training
QUICK = 50.0  # the temperature's logarithm has so many times the learning rate
CELLS = {"cpu": 8192, "cuda": 65536}  # tokens of a batch of texts, with padding


class LanguageModelMeans(nn.Module):
    """Unit vectors of texts: the mean of the language model's last hidden states over a text's tokens (Sentence-BERT).

    `token_VL` holds the texts' token ids and `count_V` their number; row 0 is padding.
    """

    def __init__(self, language_model: nn.Module, token_VL: Tensor, count_V: Tensor) -> None:
        super().__init__()
        self.language_model = language_model
        self.register_buffer("token", token_VL, persistent=False)
        self.count = count_V  # on the CPU, where batches are laid out
        self.causal, self.offset = is_causal(language_model.config), position_offset(language_model)
        self.width = language_model.config.hidden_size

    def forward(self, items: Tensor) -> Tensor:
        """The vectors [N, H] of the texts of items [N]; the ids are on the CPU."""
        device, states, start = self.token.device, [], 0
        count_N, order = torch.sort(self.count[items], descending=True, stable=True)
        while start < len(items):
            longest = max(1, int(count_N[start]))
            part = slice(start, start + max(1, CELLS[device.type] // longest))
            states.append(self._states(items[order[part]].to(device), count_N[part].to(device), longest))
            start = part.stop
        return torch.cat(states)[torch.argsort(order).to(device)]

    def _states(self, items: Tensor, count_N: Tensor, longest: int) -> Tensor:
        real_NL = torch.arange(longest, device=items.device) < count_N[:, None]
        seen_N1LL = real_NL[:, None, None].expand(-1, 1, longest, -1)
        if self.causal:
            seen_N1LL = seen_N1LL.tril()
        position_NL = torch.arange(longest, device=items.device).expand(len(items), -1) + self.offset
        h_NLH = self.language_model(input_ids=self.token[items, :longest], position_ids=position_NL,
                                    attention_mask=seen_N1LL).last_hidden_state.float()
        return F.normalize((h_NLH * real_NL[..., None]).sum(1) / count_N[:, None].clamp(min=1), dim=-1)


class TokenMeans(nn.Module):
    """Unit vectors of texts: the mean of the normalised vectors of a text's tokens, whatever their order.

    A text encoder without a language model. The vectors [T, `width`] of all tokens that occur in a text are drawn at
    random. A LayerNorm without weights gives every token of a text the same weight.
    """

    def __init__(self, token_VL: Tensor, count_V: Tensor, width: int) -> None:
        super().__init__()
        used_T, flat_N = torch.unique(token_VL[torch.arange(token_VL.shape[1]) < count_V[:, None]], return_inverse=True)
        self.weight = nn.Parameter(torch.randn(max(1, len(used_T)), width) * 0.02)
        self.register_buffer("token", flat_N, persistent=False)  # of all texts, one after another
        self.count, self.first, self.width = count_V, torch.cumsum(count_V, 0) - count_V, width

    def forward(self, items: Tensor) -> Tensor:
        """The vectors [N, width] of the texts of items [N]; the ids are on the CPU."""
        device, count_N = self.token.device, self.count[items]
        start_N = torch.cumsum(count_N, 0) - count_N
        at = torch.arange(int(count_N.sum())) + (self.first[items] - start_N).repeat_interleave(count_N)
        with torch.autocast(device.type, enabled=False):
            normed_TH = F.layer_norm(self.weight, (self.width,))
            return F.normalize(F.embedding_bag(self.token[at.to(device)], normed_TH, start_N.to(device), mode="mean"),
                               dim=-1)


class TextTower(nn.Module):
    """Unit vectors of item texts: a linear map of the unit vectors that `means` makes of the texts.

    The map starts as the whitening of the vectors before tuning, so that a language model starts from text-kNN.
    """

    def __init__(self, means: LanguageModelMeans | TokenMeans) -> None:
        super().__init__()
        self.means, self.count = means, means.count
        self.head = nn.Linear(means.width, means.width)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE) / QUICK))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def whiten(self) -> None:
        """Set the map to the whitening of the texts' current vectors."""
        with torch.no_grad():
            mean_VH = torch.cat([self.means(items) for items in torch.arange(1, len(self.count)).split(4096)])
            mean_H, axes_HH = whitening(mean_VH)
            self.head.weight.copy_(axes_HH.T)
            self.head.bias.copy_(-mean_H @ axes_HH)

    def forward(self, items: Tensor) -> Tensor:
        """Unit vectors [N, H] of the texts of items [N]; the ids are on the CPU. The map is float32 under autocast."""
        mean_NH = self.means(items)
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self.head(mean_NH), dim=-1)

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """The vectors of all items [V+1, H]; row 0 is zeros."""
        every = torch.arange(1, len(self.count))
        return F.pad(torch.cat([self(items) for items in every.split(4096)]), (0, 0, 1, 0))
