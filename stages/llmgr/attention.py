"""The language model's attention where a CPU trains: plain products."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llmgr"


def attend_plainly(model: nn.Module) -> None:
    """Let a model's layers call `attention` where they look theirs up in transformers' table; others keep their own."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              dropout: float = 0.0, scaling: float | None = None, **others: Any) -> tuple[Tensor, None]:
    """Attention [B, L, heads, D] of queries, keys and values [B, heads, L, D], as transformers' layers call it.

    torch's own, but where a CPU goes backward through a mask: there its fused form takes three times as long as plain
    products, and its plain form scales queries and keys apart and looks for rows that see nothing.
    """
    if query.device.type != "cpu" or attention_mask is None or not torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    if query.dtype is not torch.float32 or dropout or others.get("position_bias") is not None:
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    unseen = attention_mask
    if attention_mask.dtype is torch.bool:
        unseen = torch.where(attention_mask, 0.0, torch.finfo(query.dtype).min)
    scores_BHLL = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3) + unseen
    return (scores_BHLL.softmax(-1) @ value).transpose(1, 2).contiguous(), None
