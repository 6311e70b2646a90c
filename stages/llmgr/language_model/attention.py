"""The language model's attention: plain products for training on a CPU, and separate attention for prompts end to
end.

Shapes: N prompts, T columns of a line of prompts, W columns of a row.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llmgr"


class PromptRows(NamedTuple):
    """How a GPU lets N prompts, end to end in T columns, attend separately: each is moved to a row of W columns.

    there_NW: the column that each entry of a row is read from. back_T: the entry of all rows that each column is read
    back from. Both name an entry without a token where there is none. seen_N1WW: the keys (last axis) that a query
    sees, at least one.
    """

    there_NW: Tensor
    back_T: Tensor
    seen_N1WW: Tensor


def attend_plainly(model: nn.Module) -> None:
    """Make a model's layers call `attention`, if they look theirs up in transformers' table; others keep their own."""
    if not getattr(model, "_supports_sdpa", False):
        model.register_forward_pre_hook(_as_summand, with_kwargs=True)
        if hasattr(getattr(model, "encoder", None), "relative_attention_bias"):
            _bias_by_position(model)
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _as_summand(model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """A boolean mask of prompts [B, 1, L, L] as a summand of the scores, which layers with their own attention need."""
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() == 4 and mask.dtype is torch.bool:
        dtype = model.get_input_embeddings().weight.dtype
        given["attention_mask"] = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    return args, given


def _bias_by_position(model: nn.Module) -> None:
    """Make MPNet's bias of relative positions use the given positions, as other models do, instead of the columns."""
    encoder, given = model.encoder, {}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given["position"] = kwargs.get("position_ids")

    def bias(states: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Tensor:
        position_BL = given.get("position")
        if position_BL is None:
            position_BL = torch.arange(states.shape[1], device=states.device)[None]
        distance_BLL = position_BL[:, None, :] - position_BL[:, :, None]
        bucket_BLL = encoder.relative_position_bucket(distance_BLL, num_buckets=num_buckets)
        return encoder.relative_attention_bias(bucket_BLL).permute(0, 3, 1, 2).expand(len(states), -1, -1, -1)

    model.register_forward_pre_hook(note, with_kwargs=True)
    encoder.compute_position_bias = bias


@torch.no_grad()
def reads_prompts(model: nn.Module, causal: bool, offset: int) -> bool:
    """Whether a model can read LLMGR's prompts: vectors in place of tokens, a mask of any form, and given positions.

    Two prompts in one row must have the same states as each alone. `offset` is the number of the first position.
    """
    table = model.get_input_embeddings().weight
    states = table[torch.arange(5, device=table.device) % len(table)][None]
    position, segment = (torch.tensor(x, device=table.device) for x in ([0, 1, 0, 1, 2], [0, 0, 1, 1, 1]))

    def read(part: slice) -> Tensor:
        mask = segment[part, None] == segment[None, part]
        if causal:
            mask = mask.tril()
        return model(inputs_embeds=states[:, part], position_ids=position[None, part] + offset,
                     attention_mask=mask[None, None]).last_hidden_state[0]

    try:
        one, first, second = read(slice(0, 5)), read(slice(0, 2)), read(slice(2, 5))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    both = torch.cat((first, second))
    return bool((one - both).abs().max() <= 1e-3 * both.abs().max().clamp(min=1e-6))


@torch.no_grad()
def separates_prompts(model: nn.Module) -> bool:
    """Whether a model's layers pass `blocks` on to `attention`, so that prompts in one row do not see each other.

    Tried with two prompts of one token, in training mode: a model with dropout of its own attends in another way.
    """
    tokens = model.get_input_embeddings().weight
    device = tokens.device
    states = torch.arange(3.0 * tokens.shape[1], device=device).sin().view(3, -1).to(tokens.dtype)
    two = torch.arange(2, device=device)
    rows = PromptRows(two[:, None], two, two.view(2, 1, 1, 1) >= 0)
    blocks = [torch.zeros(2, 1, 1)] if device.type == "cpu" else rows
    prompts = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "blocks": blocks,
               "position_ids": two[None]}
    trains = model.training
    try:
        with torch.autocast(device.type, tokens.dtype, enabled=tokens.dtype is not torch.float32
                            ), torch.random.fork_rng():
            one, other = (model.train()(inputs_embeds=states[None, [first, 2]], **prompts).last_hidden_state[0, 1]
                          for first in (0, 1))
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(trains)
    return torch.equal(one, other)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              dropout: float = 0.0, scaling: float | None = None, blocks: Sequence[Tensor] | PromptRows | None = None,
              **others: Any) -> tuple[Tensor, None]:
    """Attention [B, L, heads, D] of queries, keys and values [B, heads, L, D], as transformers' layers call it.

    It is torch's own, except for training with a mask on a CPU: there torch's fused form takes three times as long as
    plain products, and its plain form scales queries and keys separately and looks for rows that see nothing. With
    `blocks` (B = 1) prompts attend only to themselves, as in `Separate` or `PromptRows`, and `attention_mask` is
    ignored. ValueError for `blocks` with dropout or a bias of positions.
    """
    if blocks is not None:
        if dropout or others.get("position_bias") is not None:
            raise ValueError("attention in blocks has neither dropout nor a bias of positions")
        if isinstance(blocks, PromptRows):
            return _in_rows(module, query, key, value, blocks, scaling), None
        groups = getattr(module, "num_key_value_groups", 1)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return Separate.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), scaling, blocks), None
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


def _in_rows(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, places: PromptRows, scaling: float | None
            ) -> Tensor:
    """Attention [1, T, heads, D] of prompts [1, heads, T, D], each moved to a row of its own."""
    there_NW, back_T, seen_N1WW = places
    rows = (Moved.apply(t[0].transpose(0, 1), there_NW.flatten(), back_T).unflatten(0, there_NW.shape).transpose(1, 2)
            for t in (query, key, value))
    out_NWHD, _ = sdpa_attention_forward(module, *rows, seen_N1WW, 0.0, scaling)
    return Moved.apply(out_NWHD.flatten(0, 1), back_T, there_NW.flatten())[None]


class Moved(torch.autograd.Function):
    """`states` read at `there`; nearly all are read once, so their gradient is the one at `back`.

    That is exact where entries without a token have no gradient, which holds if no readout and no token sees them.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return states.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back, = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class Separate(torch.autograd.Function):
    """Attention [1, T, heads, D] of prompts end to end [1, heads, T, D], each only with itself.

    Each of `blocks` is a mask [N, L, L] for N consecutive prompts of L tokens, which is added to the scores: 0 where a
    query sees a key (last axis), the least float32 where it does not. Nothing is computed between two prompts. All is
    float32: in bfloat16 torch's softmax over so few keys takes three times as long, and the products of every new
    shape, which every step has, are compiled first.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, blocks: Sequence[Tensor]
                ) -> Tensor:
        out = query.new_empty(query.transpose(1, 2).shape)
        saved = []
        for unseen_NLL, part in zip(blocks, _parts(blocks), strict=True):
            q, k, v = (_block(t, part, unseen_NLL) for t in (query, key, value))
            scores = (q @ k.transpose(1, 2)).view(-1, *unseen_NLL.shape)
            share = torch.add(unseen_NLL, scores, alpha=scaling).softmax(-1).view(-1, *unseen_NLL.shape[1:])
            _together(out, part, share @ v)
            saved += [q, k, v, share]
        ctx.save_for_backward(*saved)
        ctx.scaling, ctx.blocks = scaling, blocks
        return out

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outs = [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(3)]
        grad = grad.transpose(1, 2)
        saved = iter(ctx.saved_tensors)  # to be asked for once, where activations are recomputed
        for unseen_NLL, part in zip(ctx.blocks, _parts(ctx.blocks), strict=True):
            q, k, v, share = itertools.islice(saved, 4)
            g = _block(grad, part, unseen_NLL)
            scores = torch._softmax_backward_data(g @ v.transpose(1, 2), share, -1, torch.float32) * ctx.scaling
            for out, one in zip(outs, (scores @ k, scores.transpose(1, 2) @ q, share.transpose(1, 2) @ g), strict=True):
                _together(out, part, one)
        return *(out.transpose(1, 2) for out in outs), None, None


def _parts(blocks: Sequence[Tensor]) -> list[slice]:
    """The columns of each block's tokens."""
    ends = list(itertools.accumulate(unseen_NLL.shape[0] * unseen_NLL.shape[1] for unseen_NLL in blocks))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _block(states: Tensor, part: slice, unseen_NLL: Tensor) -> Tensor:
    """A block's states [heads * N, L, D] of [1, heads, T, D], in float32."""
    read = states[0, :, part]
    return torch.empty(read.shape, dtype=torch.float32).copy_(read).view(-1, unseen_NLL.shape[1], states.shape[-1])


def _together(out: Tensor, part: slice, states: Tensor) -> None:
    """Write a block's states [heads * N, L, D] to their columns in [1, T, heads, D]."""
    out[0, part].copy_(states.view(out.shape[2], -1, out.shape[3]).transpose(0, 1))
