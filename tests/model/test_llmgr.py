"""The hybrid model: what reaches the readout, where gradients flow, what is saved and what is refused."""
from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from tiny import DIM, ITEMS, LISTS, TITLES, language_model, llmgr, model_settings, prefixes, tokenizer
from transformers import LlamaConfig, LlamaModel

from llmgr.encoders.layers import Dropout
from llmgr.language_model.lora import join_products
from llmgr.language_model.packing import GRAPH, NODE, TEXT, PromptBatch
from llmgr.model.checkpoint import load_llmgr, save_llmgr
from llmgr.model.hybrid import HybridEncoding
from llmgr.model.llmgr import Llmgr
from llmgr.model.prompts import AlignmentPrompts, BehaviourPrompts
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout

FILES = Layout("data", "models", "reports")


def prompted(kind: str = "llama", titles: bool = True) -> tuple[PromptBatch, torch.Tensor]:
    """A prompt of every whole session, and session vectors of its readouts."""
    sessions = prefixes()
    graphs = sessions.prefix_graphs(torch.arange(len(LISTS)), torch.tensor([len(x) for x in LISTS]))
    prompts = BehaviourPrompts(tokenizer(kind), "slot", TITLES if titles else None, 4, False)(graphs, graphs.length_B)
    return prompts, torch.randn(len(LISTS), DIM, generator=torch.Generator().manual_seed(5))


def scores(model: Llmgr, prompts: PromptBatch, session_RD: torch.Tensor) -> torch.Tensor:
    return model(prompts, session_RD).logits()



@pytest.mark.parametrize("output", ["linear", "items"])
@pytest.mark.parametrize("kind", ["llama", "bert", "stories260K"])
@torch.no_grad()
def test_nodes_graph_and_text_all_reach_the_scores(kind, output):
    model = llmgr(kind, output=output, attention="causal")
    prompts, session_RD = prompted(kind)
    before = scores(model, prompts, session_RD)
    assert before.shape == (len(LISTS), ITEMS + 1)
    changed = session_RD.clone()
    changed[0] += 1
    moved = (scores(model, prompts, changed) - before).abs().amax(1)
    assert moved[0] > 1e-4 and moved[1:].max() < 1e-5, "the graph slot belongs to one session"
    model.vectors[4] += 1  # item 4 is session 1's only click; the output table is a copy
    moved = (scores(model, prompts, session_RD) - before).abs().amax(1)
    assert moved[1] > 1e-4 and moved[[0, 2, 3, 4]].max() < 1e-5
    model.vectors[4] -= 1
    at = (prompts.kind_BL[3] == NODE).nonzero()[0, 0] + 1  # the first token of a title
    assert prompts.kind_BL[3, at] == TEXT
    prompts.token_BL[3, at] = (prompts.token_BL[3, at] + 7) % 250
    moved = (scores(model, prompts, session_RD) - before).abs().amax(1)
    assert moved[3] > 1e-4 and moved[[0, 1, 2, 4]].max() < 1e-5


def gradients(model: Llmgr, kind: str = "llama") -> set[str]:
    sessions = prefixes()
    graphs = sessions.prefix_graphs(torch.arange(len(LISTS)), torch.tensor([len(x) for x in LISTS]))
    prompts, _ = prompted(kind)
    scores(model, prompts, model.sessions(graphs)).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("part", ["all", "partial", "none"])
def test_gradients_flow_where_they_must_and_nowhere_else(part):
    model = llmgr()
    model.unfreeze_encoder(part)
    found = gradients(model)
    own = {name for name, _ in model.trained()}
    assert own <= found and any("lora_A" in n for n in own) and "hybrid.project.weight" in own
    encoder = {n for n, _ in model.encoder.named_parameters()}
    expected = {"all": encoder, "partial": {n for n in encoder if n.startswith("attention.")}, "none": set()}[part]
    reached = {n.removeprefix("encoder.") for n in found - own}
    assert reached <= expected
    assert {n for n in expected - reached} <= {n for n in expected if n.endswith("key_value.bias")}, "keys have no bias"
    assert not any("base_layer" in n or "embed" in n for n in found)
    assert model.vectors.grad is None and not model.vectors.requires_grad
    assert "vectors" not in dict(model.named_parameters())


@pytest.mark.parametrize("frozen_bridge", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradient_checkpointing_changes_no_gradient(kind, frozen_bridge):
    found = []
    for checkpointed in (False, True):
        model = llmgr(kind, dropout=0.1, attention="causal", lora_dropout=0.1)
        model.hybrid.requires_grad_(not frozen_bridge)
        if checkpointed:
            model.execution.checkpoint_activations()
        model.train()
        torch.manual_seed(3)
        prompts, session_RD = prompted(kind)
        scores(model, prompts, session_RD).square().sum().backward()
        found.append({n: p.grad for n, p in model.trained() if p.requires_grad})
    assert any("lora_A" in n for n in found[0])
    for name, gradient in found[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def test_checkpointing_recomputes_layers():
    model = llmgr()
    calls = []
    model.language_model.get_base_model().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.execution.checkpoint_activations()
    model.train()
    prompts, session_RD = prompted()
    scores(model, prompts, session_RD).sum().backward()
    assert len(calls) == 2


def test_a_frozen_encoder_keeps_no_dropout_and_a_trained_one_does():
    model = llmgr(dropout=0.5)
    model.train()
    assert not model.encoder.training and model.language_model.training
    model.unfreeze_encoder("partial")
    model.train()
    assert model.encoder.training
    assert not model.eval().encoder.training


@torch.no_grad()
def test_the_models_dropout_strikes_slots_and_readout_in_training_alone():
    plain = llmgr()
    model = Llmgr(language_model(), plain.encoder, plain.vectors, plain.output.table[:, DIM:],
                  model_settings(dropout=0.5, lora_r=0)).train()
    tokens, (prompts, session_RD) = model.language_model.get_input_embeddings(), prompted()
    drop = Dropout(0.5)
    torch.manual_seed(4)
    embeds = model.hybrid(tokens, prompts, session_RD)
    torch.manual_seed(4)
    for kind, source in ((NODE, model.vectors), (GRAPH, session_RD)):
        slot = prompts.kind_BL == kind
        read = drop(source[prompts.ref_BL[slot]])
        torch.testing.assert_close(embeds[slot], read @ model.hybrid.project.weight.T)
        assert 0.3 < read.eq(0).float().mean() < 0.7
    assert torch.equal(embeds[prompts.kind_BL == TEXT], tokens(prompts.token_BL)[prompts.kind_BL == TEXT])
    model.hybrid.eval()
    h = model.hidden(prompts, session_RD)
    torch.manual_seed(4)
    query = model(prompts, session_RD)[0]
    torch.manual_seed(4)
    torch.testing.assert_close(query, model.output(drop(h))[0])
    assert torch.equal(model.eval()(prompts, session_RD)[0], model.output(h)[0])


@pytest.mark.parametrize("output", ["linear", "items"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
@torch.no_grad()
def test_what_is_saved_comes_back_and_holds_no_frozen_weight(tmp_path, monkeypatch, kind, output):
    monkeypatch.chdir(tmp_path)
    backbone(tmp_path, "aa")
    model = llmgr(kind, seed=1, output=output, attention="causal")
    prompts, session_RD = prompted(kind)
    before = scores(model, prompts, session_RD)
    settings = model_settings(output=output, attention="causal")
    save_llmgr(tmp_path, model, settings, FILES, encoder=True)
    other = llmgr(kind, seed=1, output=output, attention="causal")
    for _, parameter in [*other.trained(), *other.encoder.named_parameters()]:
        parameter.add_(0.1)
    assert not torch.allclose(scores(other, prompts, session_RD), before, atol=1e-3)
    load_llmgr(tmp_path, other, settings, FILES)
    assert torch.equal(scores(other, prompts, session_RD), before)
    for ours, theirs in zip(model.encoder.parameters(), other.encoder.parameters()):
        assert torch.equal(ours, theirs)
    with safe_open(tmp_path / "llmgr.safetensors", "pt") as file:
        names = set(file.keys())
        size = sum(file.get_tensor(n).numel() * 4 for n in names)
    assert all(n.startswith(("hybrid.", "output.")) or "lora_" in n for n in names)
    assert not any("table" in n or "base_layer" in n or "embed" in n for n in names)
    adapters = sum(p.numel() * 4 for n, p in model.named_parameters()
                   if p.requires_grad and not n.startswith("encoder."))
    assert size == adapters and (tmp_path / "llmgr.safetensors").stat().st_size < size + 6000
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "fp32"
    other.language_model.to(torch.bfloat16)
    save_llmgr(tmp_path, other, settings, FILES, encoder=True)
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "bf16"
    save_llmgr(tmp_path, model, settings, FILES, encoder=True)
    first = (tmp_path / "llmgr.safetensors").read_bytes()
    save_llmgr(tmp_path, model, settings, FILES, encoder=True)
    assert (tmp_path / "llmgr.safetensors").read_bytes() == first


@torch.no_grad()
def test_a_lost_encoder_is_missed_and_a_folder_that_has_none_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone(tmp_path, "aa")
    model, path = llmgr(), tmp_path / "config.json"
    model.encoder.attention[0].out.weight.add_(1)
    save_llmgr(tmp_path, model, model_settings(), FILES, encoder=True)
    kept, config = (tmp_path / "encoder.safetensors").read_bytes(), json.loads(path.read_text())
    (tmp_path / "encoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"encoder\.safetensors is missing: run `dvc repro`"):
        load_llmgr(tmp_path, llmgr(), model_settings(), FILES)
    path.write_text(json.dumps(config | {"encoder": False}))
    load_llmgr(tmp_path, llmgr(), model_settings(), FILES)
    path.write_text(json.dumps(config))
    (tmp_path / "encoder.safetensors").write_bytes(kept)
    other = llmgr()
    load_llmgr(tmp_path, other, model_settings(), FILES)
    assert torch.equal(other.encoder.attention[0].out.weight, model.encoder.attention[0].out.weight)


def backbone(folder, digest: str, reader: str | None = None) -> None:
    """Records of the language model and, where it is another, the text encoder."""
    for name, own in (("backbone", digest), ("text_encoder", reader or digest)):
        (folder / "models" / name).mkdir(parents=True, exist_ok=True)
        (folder / f"models/{name}/{name}.json").write_text(json.dumps({"sha256": {"model.safetensors": own}}))


def test_what_belongs_elsewhere_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone(tmp_path, "aa")
    save_llmgr(tmp_path, llmgr(), model_settings(), FILES, encoder=False)
    load_llmgr(tmp_path, llmgr(), model_settings(), FILES)
    load_llmgr(tmp_path, llmgr(dropout=0.5), model_settings(dropout=0.5), FILES)
    long = model_settings(lora_alpha=8 * 2 ** 0.5)
    save_llmgr(tmp_path / "long", llmgr(lora_alpha=long.lora_alpha), long, FILES, encoder=False)
    load_llmgr(tmp_path / "long", llmgr(lora_alpha=long.lora_alpha), long, FILES)
    for changes in ({"lora_r": 2}, {"lora_targets": ["q_proj"]}, {"output": "linear"}, {"lora_r": 0},
                    {"node_text": True}):
        (key, value), = changes.items()
        with pytest.raises(UserError, match=rf"trained with model\.{key}=.*, not {re.escape(str(value))}: run `dvc"):
            load_llmgr(tmp_path, llmgr(**changes), model_settings(**changes), FILES)
    with pytest.raises(UserError, match=r"other tensors than .* tune\.folds and tower\.enabled ask for"):
        load_llmgr(tmp_path, llmgr(), model_settings(), FILES, torch.nn.Linear(1, 1))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"items": ITEMS + 1}))
    with pytest.raises(UserError, match="another backbone or catalogue"):
        load_llmgr(tmp_path, llmgr(), model_settings(), FILES)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for changed in (("bb",), ("aa", "bb")):
        backbone(tmp_path, *changed)
        with pytest.raises(UserError, match="another backbone or catalogue"):
            load_llmgr(tmp_path, llmgr(), model_settings(), FILES)


@torch.no_grad()
def test_the_items_output_is_a_product_with_item_vector_and_text():
    model = llmgr()
    h = torch.randn(3, 16)
    factors = model.output(h)
    _, table, bias = factors
    expected = (h @ model.output.query.weight.T + model.output.query.bias) @ model.output.table.T
    torch.testing.assert_close(factors.logits(), expected)
    assert torch.equal(table[:, :DIM], model.vectors) and table.shape[1] > DIM
    assert bias is None


@torch.no_grad()
def test_slots_are_projections_at_the_scale_of_token_embeddings():
    model = llmgr("llama")
    tokens = model.language_model.get_input_embeddings()
    prompts, session_RD = prompted()
    embeds = model.hybrid(tokens, prompts, session_RD)
    node = prompts.kind_BL == NODE
    torch.testing.assert_close(embeds[node], model.vectors[prompts.ref_BL[node]] @ model.hybrid.project.weight.T)
    text = (prompts.kind_BL == TEXT) & prompts.real_BL
    torch.testing.assert_close(embeds[text], tokens.weight[prompts.token_BL[text]])
    graph = (prompts.kind_BL != NODE) & (prompts.kind_BL != TEXT)
    torch.testing.assert_close(embeds[graph], session_RD @ model.hybrid.project.weight.T)
    ratio = embeds[node].square().mean().sqrt() / tokens.weight.square().mean().sqrt()
    assert 0.5 < ratio < 2


@torch.no_grad()
def test_slots_are_at_the_scale_of_embeddings_that_multiply_their_weights():
    from transformers import GemmaConfig, GemmaModel

    torch.manual_seed(0)
    tokens = GemmaModel(GemmaConfig(vocab_size=50, hidden_size=64, intermediate_size=8, num_hidden_layers=1,
                                    num_attention_heads=1, num_key_value_heads=1, head_dim=8)).get_input_embeddings()
    vectors = torch.randn(ITEMS + 1, DIM)
    slots, scale = vectors[1:] @ HybridEncoding(tokens, vectors, 0.0).project.weight.T, tokens(torch.arange(50)).std()
    assert scale > 4 * tokens.weight.std() and 0.5 < slots.std() / scale < 2


def test_targets_that_do_not_exist_are_named_with_those_that_do():
    said = ("model.lora_targets=qproj,v_proj: the backbone has no linear layer qproj; it has down_proj, gate_proj, "
            "k_proj, o_proj, q_proj, up_proj, v_proj")
    with pytest.raises(UserError, match=re.escape(said)):
        llmgr(lora_targets=["qproj", "v_proj"])
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, _ in llmgr("bert").trained() if "lora_" in n}
    assert adapted == {"query", "key", "value"}
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, _ in llmgr("stories260K").trained() if "lora_" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any("lora_" in n for n, _ in llmgr(lora_r=0).trained())


def test_adapters_stay_within_the_language_model():
    model = llmgr(lora_targets=["down_proj"])
    assert all(n.startswith("language_model.") for n, _ in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("readout", ["first", "mean"])
def test_a_readout_that_sees_nothing_is_refused(readout):
    with pytest.raises(UserError, match=rf"model.readout={readout} .* set model.readout=last"):
        llmgr("llama", readout=readout)
    with pytest.raises(UserError, match=r"model\.readout=last"):
        llmgr("bert", attention="causal", readout=readout)
    assert llmgr("bert", readout=readout).readout == readout


@torch.no_grad()
def test_readouts_of_a_bidirectional_backbone():
    prompts, session_RD = prompted("bert")
    found = {}
    for readout in ("auto", "first", "last", "mean"):
        model = llmgr("bert", readout=readout)
        embeds = model.hybrid(model.language_model.get_input_embeddings(), prompts, session_RD)
        found[readout] = model.hidden(prompts, session_RD)
        for row in range(len(LISTS)):  # row by row, unpadded, by the backbone's own mask
            real = int(prompts.real_BL[row].sum())
            states = model.language_model(inputs_embeds=embeds[row:row + 1, :real]).last_hidden_state[0]
            expected = {"auto": states[0], "first": states[0], "last": states[-1], "mean": states.mean(0)}[readout]
            torch.testing.assert_close(found[readout][row], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found["first"], found["last"], atol=1e-2)


@torch.no_grad()
def test_a_causal_backbone_is_read_as_by_its_own_mask():
    for kind in ("llama", "stories260K"):
        model = llmgr(kind)
        prompts = AlignmentPrompts(tokenizer(kind), TITLES, 8)(torch.tensor([3, 7]), torch.tensor([[3, 1], [2, 7]]))
        embeds = model.hybrid(model.language_model.get_input_embeddings(), prompts, None)
        for row in range(2):
            real = int(prompts.real_BL[row].sum())
            states = model.language_model(inputs_embeds=embeds[row:row + 1, :real]).last_hidden_state[0, -1]
            torch.testing.assert_close(model.hidden(prompts, None)[row], states, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_node_slot_may_read_the_items_text():
    plain, model = llmgr("llama"), llmgr("llama", node_text=True)
    tokens, (prompts, session_RD) = model.language_model.get_input_embeddings(), prompted()
    node, graph = (prompts.kind_BL == kind for kind in (NODE, GRAPH))
    embeds = model.hybrid(tokens, prompts, session_RD)
    weight, dim = model.hybrid.project.weight, model.vectors.shape[1]
    assert weight.shape[1] == model.output.table.shape[1] > plain.hybrid.project.weight.shape[1] == dim
    torch.testing.assert_close(embeds[graph], session_RD @ weight[:, :dim].T)
    text = embeds[node] - model.vectors[prompts.ref_BL[node]] @ weight[:, :dim].T
    scale = model.vectors[1:].square().mean().sqrt()
    features = model.output.table[prompts.ref_BL[node], dim:] * scale
    torch.testing.assert_close(text, features @ weight[:, dim:].T, atol=1e-4, rtol=1e-4)
    assert text.abs().max() > 1e-2


@pytest.mark.slow
def test_all_layers_compile_to_a_few_programs_with_their_products_joined():
    from torch._dynamo.testing import CompileCounter

    config = LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=12,
                         num_attention_heads=4, max_position_embeddings=50, use_cache=False)
    model = Llmgr(LlamaModel(config).requires_grad_(False), llmgr().encoder, torch.randn(ITEMS + 1, DIM),
                  torch.randn(ITEMS + 1, 5), model_settings())
    states, counter = torch.randn(2, 7, 16), CompileCounter()
    before = model.language_model(inputs_embeds=states).last_hidden_state
    join_products(model.language_model)
    torch._dynamo.reset()
    model.execution.compile_layers(backend=counter)
    torch.testing.assert_close(model.language_model(inputs_embeds=states).last_hidden_state, before)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.slow
def test_compiled_layers_compute_the_same_for_any_batch():
    model = llmgr()
    prompts, session_RD = prompted()
    before = scores(model, prompts, session_RD)
    model.execution.compile_layers(backend="eager", fullgraph=True)  # what torch.compile traces, without its compiler
    torch.testing.assert_close(scores(model, prompts, session_RD), before)
    torch.testing.assert_close(scores(model, prompts.packed(64), session_RD), before, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == set(llmgr().state_dict()), "files have the same names"
