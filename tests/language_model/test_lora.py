"""LoRA's joined products against peft's own layers, and its adapter as a folder that peft reads."""
import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import language_model, model_settings

from llmgr.language_model.lora import add_adapters, join_products, save_adapter


def adapted(dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    model = language_model("llama").to(dtype)
    torch.manual_seed(1)
    model = add_adapters(model, model_settings(**changes))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.float() if dtype is torch.float32 else model


def joined(model: torch.nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_gradients_are_those_of_peft(dtype):
    plain = adapted(dtype)
    model = copy.deepcopy(plain)
    join_products(model)
    assert joined(model) == 8 and not joined(plain), "queries, keys, values and outputs of two layers"
    slack = {"atol": 1e-5, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.1}
    states, weight = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 5, 16, dtype=dtype)
    found = []
    for one in (plain, model):
        given = states.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            out = one(inputs_embeds=given).last_hidden_state
        trained = {name: p for name, p in one.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((out * weight).sum(), [given, *trained.values()])
        assert len(trained) == 16 and all(g.dtype == p.dtype for g, p in zip(grads[1:], trained.values(), strict=True))
        found.append((out, *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other / one.abs().max(), one / one.abs().max(), **slack)


def test_a_layer_with_dropout_before_its_adapter_keeps_its_own_pass():
    model = adapted(lora_dropout=0.2)
    join_products(model)
    assert not joined(model)


def test_peft_itself_reads_the_saved_adapter_merged_or_not(tmp_path: Path) -> None:
    model = adapted().eval()
    save_adapter(tmp_path, model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    join_products(model)
    states = torch.randn(2, 5, 16)
    with torch.no_grad():
        ours = model(inputs_embeds=states).last_hidden_state
        plain = language_model("llama").eval()(inputs_embeds=states).last_hidden_state
        stock = PeftModel.from_pretrained(language_model("llama"), tmp_path).eval()
        theirs = stock(inputs_embeds=states).last_hidden_state
        merged = stock.merge_and_unload()(inputs_embeds=states).last_hidden_state
    assert not torch.allclose(plain, ours, atol=1e-2), "the adapter changes the states"
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged, ours, atol=1e-4, rtol=1e-3)


def test_no_adapter_is_saved_where_there_is_none(tmp_path: Path) -> None:
    save_adapter(tmp_path, language_model("llama"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_joined_where_nothing_is_adapted():
    model = language_model("bert")
    join_products(model)
    assert not joined(model)
