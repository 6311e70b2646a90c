"""Attention where a CPU trains, against torch's."""
import types

import pytest
import torch
from tiny import language_model
from torch.nn import functional as F

from llmgr.language_model.attention import NAME, attend_plainly, attention, separates_prompts


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients_are_torchs(groups, numbers, dtype):
    torch.manual_seed(0)
    module = types.SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    q, k, v = (torch.randn(2, h, 7, 4, dtype=dtype, requires_grad=True) for h in (6, 6 // groups, 6 // groups))
    mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7).clone()
    mask[1, :, :, 3] = False
    mask[1, :, 3, 0] = True
    given = torch.where(mask, 0.0, float("-inf")).to(dtype) if numbers else mask
    wide = [t.repeat_interleave(groups, 1) for t in (k, v)]
    for scaling in (None, 0.2):
        expected = F.scaled_dot_product_attention(q, *wide, mask, scale=scaling).transpose(1, 2)
        found, _ = attention(module, q, k, v, given, scaling=scaling)
        slack = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.03, "rtol": 0.03}
        torch.testing.assert_close(found, expected, **slack)
        weight = torch.randn_like(found)
        for one, other in zip(*(torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (found, expected)),
                              strict=True):
            torch.testing.assert_close(one, other, **slack)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_model_trains_on_what_it_scores_with(kind):
    model = language_model(kind)
    assert model.config._attn_implementation == NAME
    embeds = torch.randn(3, 9, model.config.hidden_size, requires_grad=True)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(3, 1, 9, 9)
    training = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    with torch.no_grad():
        scoring = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(training, scoring, atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(training[:, 4].square().sum(), embeds)[0][:, 5:].abs().max() == 0


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_attend_separately_as_in_one_row_under_a_mask(groups, dtype):
    torch.manual_seed(0)
    module, sizes = types.SimpleNamespace(num_key_value_groups=groups, is_causal=True), [(3, 2), (1, 7), (2, 4)]
    total = sum(n * length for n, length in sizes)
    q, k, v = (torch.randn(1, h, total, 4, dtype=dtype, requires_grad=True) for h in (6, 6 // groups, 6 // groups))
    seen = [(torch.rand(n, length, length) < 0.5) | torch.eye(length, dtype=torch.bool) for n, length in sizes]
    blocks = [torch.where(s, 0.0, torch.finfo(torch.float32).min) for s in seen]
    mask = torch.block_diag(*(one.float() for s in seen for one in s)).bool()[None, None]
    wide = [t.repeat_interleave(groups, 1) for t in (k, v)]
    slack = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.04, "rtol": 0.04}
    for scaling in (None, 0.2):
        expected = F.scaled_dot_product_attention(q, *wide, mask, scale=scaling).transpose(1, 2)
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            found, _ = attention(module, q, k, v, None, scaling=scaling, blocks=blocks)
        torch.testing.assert_close(found, expected, **slack)
        weight = torch.randn_like(found)
        for one, other in zip(*(torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (found, expected)),
                              strict=True):
            torch.testing.assert_close(one, other, **slack)
    with pytest.raises(ValueError, match="neither dropout"):
        attention(module, q, k, v, None, dropout=0.1, blocks=blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_layers_pass_blocks_on_are_recognised(dtype):
    from transformers import GPT2Config, GPT2Model, MPNetConfig, MPNetModel, OPTConfig, OPTModel

    size = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = GPT2Model(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, use_cache=False, resid_pdrop=0.0,
                                embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    opt = OPTModel(OPTConfig(**size, word_embed_proj_dim=8, ffn_dim=16, use_cache=False, dropout=0.0)).eval()
    mpnet = MPNetModel(MPNetConfig(**size, intermediate_size=16, hidden_dropout_prob=0.0,
                                    attention_probs_dropout_prob=0.0), add_pooling_layer=False).eval()
    models = [language_model("llama"), language_model("bert"), gpt2, opt, mpnet]
    for model in models:
        attend_plainly(model.to(dtype))
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()  # as when it is loaded
    drops = language_model("llama", dropout=0.3).to(dtype)
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        assert [separates_prompts(model) for model in (*models, drops)] == [True, True, True, True, False, False]
        assert torch.equal(torch.get_rng_state(), state) and not drops.training
