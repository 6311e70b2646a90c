"""LoRA adapters (Hu et al., ICLR 2022): added by peft, computed with fewer products.

Shapes: N rows, I inputs, O outputs, R rank of the adapter.
"""
from __future__ import annotations

import warnings
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.params.models import Model
from llmgr.runtime.artifacts import save_tensors, write_json
from llmgr.runtime.errors import UserError

ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin",
                    "out_lin", "c_attn", "query_key_value", "Wqkv", "q", "k", "v")


def add_adapters(model: nn.Module, section: Model) -> nn.Module:
    """The language model with LoRA on `section.lora_targets` (peft); unchanged for lora_r=0.

    UserError where a target does not exist, naming those that do.
    """
    if section.lora_r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    present = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules()
                      if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"})
    targets = section.lora_targets
    if targets == ["auto"]:
        targets = [name for name in present if name in ATTENTION_LAYERS]
    missing = [name for name in targets if name not in present]
    if missing or not targets:
        raise UserError(f"model.lora_targets={','.join(section.lora_targets)}: the backbone has no linear layer "
                        f"{', '.join(missing) or 'of a known attention'}; it has {', '.join(present)}")
    config = LoraConfig(r=section.lora_r, lora_alpha=section.lora_alpha, target_modules=targets,
                        lora_dropout=section.lora_dropout, bias="none")
    with warnings.catch_warnings():  # peft asks transformers for something by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast sees to it; peft would go by way of float32
    return adapted


def save_adapter(folder: Path, model: nn.Module) -> None:
    """Write LoRA's weights as `peft.PeftModel.from_pretrained` reads them over the backbone; nothing where there are
    none."""
    if not hasattr(model, "peft_config"):
        return
    from peft import get_peft_model_state_dict

    about = model.peft_config["default"].to_dict() | {"base_model_name_or_path": None, "inference_mode": True}
    write_json(folder / "adapter_config.json", {key: sorted(value) if isinstance(value, set) else value
                                                for key, value in sorted(about.items())})
    save_tensors(folder / "adapter_model.safetensors", get_peft_model_state_dict(model))


def join_products(model: nn.Module) -> None:
    """Let the linear layers that peft adapted compute with `Adapted`, where LoRA is all that they add.

    What they hold and what it is called stay peft's. Layers with dropout before the adapter or of another kind keep
    peft's own forward pass.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear and len(layer.active_adapters) == 1:
            name, = layer.active_adapters
            if not layer.use_dora[name] and isinstance(layer.lora_dropout[name], nn.Identity) and not layer.merged:
                layer.forward = MethodType(_adapted, layer)  # which torch.compile takes for one function in all layers


def _adapted(layer: Any, states: Tensor) -> Tensor:
    name, = layer.active_adapters
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    return Adapted.apply(states, base.weight, base.bias, down.weight, up.weight, layer.scaling[name])


class Adapted(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T [..., O] of states x [..., I], frozen W [O, I] and b, and LoRA's A [r, I] and B [O, r].

    (Hu et al., ICLR 2022, equation 3.) Computed in W's type, with both parts summed within the products.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor,
                scaling: float) -> Tensor:
        kind, shape = weight_OI.dtype, states.shape
        x_NI, a_RI, b_OR = states.reshape(-1, shape[-1]).to(kind), down_RI.to(kind), up_OR.to(kind)
        low_NR = (x_NI @ a_RI.T).mul_(scaling)
        out_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(low_NR, b_OR.T)
        ctx.save_for_backward(x_NI, low_NR, weight_OI, a_RI, b_OR)
        ctx.scaling, ctx.kinds = scaling, (states.dtype, down_RI.dtype, up_OR.dtype)
        return out_NO.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, low_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        of_states, of_down, of_up = ctx.kinds
        grad_NO = grad.reshape(-1, grad.shape[-1])
        back_NR = (grad_NO @ b_OR).mul_(ctx.scaling)
        to_states = None
        if ctx.needs_input_grad[0]:
            to_states = (grad_NO @ weight_OI).addmm_(back_NR, a_RI).view(*grad.shape[:-1], -1).to(of_states)
        return (to_states, None, None, (back_NR.T @ x_NI).to(of_down), (low_NR.T @ grad_NO).T.to(of_up), None)
