"""Where a language model comes from, what is refused and in which words, and the small one trained from scratch."""
from __future__ import annotations

import errno
import http.server
import json
import os
import threading
import types
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
import yaml
from machine import DEFAULTS, stage
from safetensors.torch import load_file, save_file
from tiny import checkpoint, language_model, tokenizer

from llmgr.language_model import scratch
from llmgr.language_model.loading import check_prompts, check_weights, is_causal, load_language_model, load_tokenizer
from llmgr.language_model.lora import add_adapters
from llmgr.language_model.resolve import describe, resolve
from llmgr.language_model.scratch import train_scratch
from llmgr.params.loading import changed
from llmgr.runtime.artifacts import digest
from llmgr.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole model folder in the Hugging Face format, with files that must not be taken along."""
    path = tmp_path / "given"
    language_model("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    (path / "modeling_own.py").write_text("raise SystemExit")
    return path


def test_a_local_folder_is_copied_without_pickles_and_code(folder, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    assert resolve(str(folder), "main", target) == {"name": str(folder), "revision": "local folder"}
    assert {p.name for p in target.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json",
                                                  "tokenizer_config.json"}
    ours, theirs = load_language_model(target), language_model("llama")
    ids = torch.tensor([[1, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    assert load_tokenizer(target)("ab")["input_ids"] == tokenizer()("ab")["input_ids"]


def test_a_folder_is_resolved_from_the_repository_root(folder, tmp_path, monkeypatch):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    target.mkdir(), elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    resolve("given", "main", target)
    assert (target / "model.safetensors").exists()


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_with_a_folder(folder, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors: convert" in refused(lambda: resolve(str(folder), "main", target))
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(lambda: resolve(str(folder), "main", target))
    for name in ("../nowhere/model", "/nowhere", "nowhere", "~/model"):
        said = refused(lambda name=name: resolve(name, "main", target))
        assert f"llm.name={name} is no folder here: give a folder" in said
    assert not list(target.iterdir())


@pytest.mark.parametrize("damage", ["cut", "garbage", "config", "architecture"])
def test_a_damaged_folder_is_one_sentence(folder, damage):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"garbage")
    elif damage == "config":
        config.write_text("{")
    else:
        config.write_text(config.read_text().replace('"llama"', '"nosuch"'))
    assert f"{folder} cannot be loaded (" in refused(lambda: load_language_model(folder))


def test_a_model_whose_sizes_lie_deeper_is_refused(tmp_path):
    from transformers import Gemma3Config, Gemma3Model

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Gemma3Model(Gemma3Config(text_config=sizes | {"vocab_size": 62, "num_key_value_heads": 1, "head_dim": 8},
                             vision_config=sizes | {"image_size": 28, "patch_size": 14})).save_pretrained(tmp_path)
    assert "has no hidden_size, num_hidden_layers, vocab_size, max_position_embeddings; choose another model" in (
        refused(lambda: load_language_model(tmp_path)))


def test_weights_that_no_file_holds_are_not_drawn(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = refused(lambda: load_language_model(folder))
    assert "*.safetensors holds as config.json shapes them: 1, such as layers.1.mlp.up_proj.weight)" in said


@pytest.mark.parametrize(("changes", "told"), [
    ({"vocab_size": 32}, "as config.json shapes them: 1, such as embed_tokens.weight"),
    ({"hidden_size": "wide"}, "expected int, got str"), ({"num_attention_heads": 3}, "not a multiple"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ")])
def test_a_config_that_does_not_fit_is_one_sentence(folder, changes, told):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    said = refused(lambda: load_language_model(folder))
    assert said.startswith(f"{folder} cannot be loaded (") and told in said and said.endswith("choose another model")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA"), OSError(errno.ENOSPC, "full"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_the_machine_lacks_is_no_fault_of_the_folder(folder, monkeypatch, error):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", load)
    with pytest.raises(type(error)) as caught:
        load_language_model(folder)
    assert caught.value is error


def test_heads_poolers_and_tied_weights_may_be_absent(tmp_path):
    from transformers import BertForMaskedLM, LlamaForCausalLM

    for number, head in enumerate((BertForMaskedLM(language_model("bert").config),
                                   LlamaForCausalLM(language_model("llama").config))):
        head.config.tie_word_embeddings = True
        head.save_pretrained(tmp_path / str(number))
        assert getattr(load_language_model(tmp_path / str(number)), "pooler", None) is None


@pytest.mark.parametrize("kind", ["Bert", "OPT", "Llama"])
@torch.no_grad()
def test_a_frozen_model_drops_nothing_and_its_adapters_do(tmp_path, kind):
    config, model = (getattr(transformers, f"{kind}{part}") for part in ("Config", "Model"))
    shape = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = {key: 0.5 for key, value in vars(config()).items() if "drop" in key and isinstance(value, float)}
    assert rates
    more = {"OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16}}
    torch.manual_seed(0)
    model(config(**shape | rates | more.get(kind, {"intermediate_size": 32}))).save_pretrained(tmp_path)
    read, ids = load_language_model(tmp_path), torch.arange(1, 9)[None]
    still = read(input_ids=ids).last_hidden_state
    assert torch.equal(read.train()(input_ids=ids).last_hidden_state, still)
    settings = types.SimpleNamespace(lora_r=2, lora_alpha=4.0, lora_targets=["auto"], lora_dropout=0.5)
    adapted = add_adapters(read, settings).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    assert not torch.equal(*(adapted(input_ids=ids).last_hidden_state for _ in range(2))), "LoRA's own dropout stays"


def test_weights_in_a_pickle_alone_are_never_loaded(folder):
    (folder / "model.safetensors").unlink()
    mark = folder / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    torch.save(Evil(), folder / "pytorch_model.bin")
    refused(lambda: load_language_model(folder))
    assert not mark.exists()


def test_a_folder_without_a_tokenizer(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "config.json").write_text('{"model_type": "nosuch"}')
    assert "has no usable tokenizer" in refused(lambda: load_tokenizer(folder))


def encoded(root: Path, **changes: object) -> tuple[dict, torch.Tensor]:
    """What the stage says of its models, and the items' vectors, with these parameters."""
    content = yaml.safe_load(DEFAULTS.read_text())
    (root / "params.yaml").write_text(yaml.safe_dump(changed(content, {
        key.replace("__", "."): value for key, value in changes.items()})))
    pl.DataFrame({"item_id": [1, 2, 3], "text": ["a red soap", "a comb", "two soaps"]}).write_parquet(
        root / "data/core/items.parquet")
    assert stage("backbone", root=root) == 0
    vectors = load_file(root / "models/text_encoder/item_text.safetensors")["vectors"]
    return json.loads((root / "reports/metrics/backbone.json").read_text()), vectors


def test_the_text_encoder_and_the_model_of_the_prompts_vary_alone(tmp_path):
    (tmp_path / "data/core").mkdir(parents=True)
    for name, kind, seed in (("llama", "llama", 0), ("other", "llama", 1), ("bert", "bert", 0)):
        language_model(kind, seed).save_pretrained(tmp_path / name)
        tokenizer(kind).save_pretrained(tmp_path / name)
    weights = {name: digest(tmp_path / name / "model.safetensors") for name in ("llama", "other", "bert")}
    told, own = encoded(tmp_path, llm__name="llama")
    assert "text_encoder" not in told and told["architecture"] == "LlamaModel" and told["parameters"] > 0
    again, same = encoded(tmp_path, llm__name="llama", text_encoder__name="llama")
    assert again == told and torch.equal(same, own)
    assert digest(tmp_path / "models/text_encoder/model.safetensors") == weights["llama"]
    told, read = encoded(tmp_path, llm__name="llama", text_encoder__name="bert")
    assert (told["architecture"], told["text_encoder"]["architecture"]) == ("LlamaModel", "BertModel")
    assert not torch.allclose(read, own, atol=1e-3)
    before = digest(tmp_path / "models/text_encoder")
    _, still = encoded(tmp_path, llm__name="other", text_encoder__name="bert")
    assert torch.equal(still, read) and digest(tmp_path / "models/text_encoder") == before
    assert digest(tmp_path / "models/backbone/model.safetensors") == weights["other"]
    assert digest(tmp_path / "models/text_encoder/model.safetensors") == weights["bert"]


def test_a_text_encoder_that_is_not_there_is_named_by_its_own_key(tmp_path, capfd):
    (tmp_path / "data/core").mkdir(parents=True)
    language_model("llama").save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    encoded(tmp_path, llm__name="llama")
    kept = digest(tmp_path / "models")
    content = yaml.safe_load((tmp_path / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed(content, {"text_encoder.name": "./nowhere"})))
    assert stage("backbone", root=tmp_path) == 2
    assert "error: text_encoder.name=./nowhere is no folder here" in capfd.readouterr().err
    assert digest(tmp_path / "models") == kept


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Points the hub's client at an address and gives what `resolve` says of a name there."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def ask(name: str, endpoint: str, offline: bool = False) -> str:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        close_session()
        return refused(lambda: resolve(name, "main", tmp_path))

    yield ask
    close_session()


def test_a_hub_out_of_reach_is_one_sentence(hub):
    for name, offline in (("org/model", False), ("an org/model", False), ("org/model", True)):
        said = hub(name, "http://127.0.0.1:9", offline)
        assert said.startswith(f"llm.name={name} cannot be fetched from the hub (")
        assert said.endswith("connect, give a local folder, or set llm.name=scratch")
        assert ("OfflineModeIsEnabled" in said) == offline


def test_what_the_hub_says_is_passed_on(hub):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code = {"gated": "GatedRepo", "norevision": "RevisionNotFound", "missing": "RepoNotFound"}.get(
                self.path.split("/")[4])
            body = b"{}" if code else json.dumps({"id": "org/pickle", "sha": "0" * 40, "siblings": [
                {"rfilename": "pytorch_model.bin"}]}).encode()
            self.send_response(200 if code is None else 403 if code == "GatedRepo" else 404)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = [hub(f"org/{name}", f"http://127.0.0.1:{server.server_port}")
                for name in ("gated", "norevision", "missing", "pickle")]
    finally:
        server.shutdown()
    assert "is gated: accept its licence" in said[0] and "HF_TOKEN" in said[0]
    assert said[1] == "llm.revision=main does not exist for llm.name=org/norevision"
    assert said[2].startswith("llm.name=org/missing is not on the hub")
    assert said[3].startswith("llm.name=org/pickle at llm.revision=main has no *.safetensors")


def test_the_attention_of_architectures():
    from transformers import BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, MistralConfig, RobertaConfig

    assert [is_causal(c()) for c in (LlamaConfig, MistralConfig, GPT2Config)] == [True] * 3
    assert [is_causal(c()) for c in (BertConfig, RobertaConfig, DistilBertConfig)] == [False] * 3
    assert is_causal(BertConfig(is_decoder=True))


def small_llama(tmp_path, name: str, seed: int = 0):
    settings = types.SimpleNamespace(layers=1, width=16, heads=2, vocabulary=300, epochs=2, lr=0.01, weight_decay=0.01,
                                     warmup_share=0.1, clip=1.0, batch_size=16, checkpoint_seconds=60.0)
    texts = [f"{a} {b} for {c}" for a in ("red", "blue", "soft", "small") for b in ("soap", "brush", "cream")
             for c in ("hands", "hair", "face", "men", "women", "children")]
    folder = tmp_path / name
    folder.mkdir()
    progress, model = train_scratch(texts, settings, folder, tmp_path / f"{name}-resume", seed, max_positions=40)
    return progress, model, folder


def test_a_scratch_model_learns_loads_and_is_the_same_twice(tmp_path):
    progress, model, folder = small_llama(tmp_path, "a")
    assert progress.epoch_rows[-1]["valid_loss"] < progress.epoch_rows[0]["valid_loss"] - 0.5
    _, _, again = small_llama(tmp_path, "b")
    _, _, other = small_llama(tmp_path, "c", seed=1)
    files = {p.name for p in folder.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name in files:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    assert (folder / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    read = load_tokenizer(folder)
    ids = read("red soap for hands")["input_ids"]
    assert ids[0] == read.bos_token_id and read.decode(ids[1:]) == "red soap for hands"
    loaded = load_language_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=torch.tensor([ids])).last_hidden_state,
                                   model.eval().model(input_ids=torch.tensor([ids])).last_hidden_state)
    found = describe(folder)
    assert (found["architecture"], found["attention"]) == ("LlamaForCausalLM", "causal")
    assert (found["width"], found["layers"]) == (16, 1)
    assert found["positions"] == scratch.SCRATCH_TOKENS, "as long as the texts it is trained on, at least"
    assert list(found["sha256"]) == ["model.safetensors"]


def test_a_scratch_model_is_saved_as_transformers_saves_it(tmp_path):
    _, model, folder = small_llama(tmp_path, "ours")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_real_checkpoint_is_described():
    assert describe(checkpoint("stories260K"))["attention"] == "causal"
    found = describe(checkpoint("all-MiniLM-L6-v2"))
    assert (found["attention"], found["width"], found["layers"], found["positions"]) == ("bidirectional", 384, 6, 512)


def test_random_weights_have_the_architecture_alone_and_hang_on_the_seed(folder):
    own, drawn, again, other = (load_language_model(folder, random=seed).state_dict() for seed in (None, 1, 1, 2))
    assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in own.items()}
    assert all(torch.equal(drawn[k], again[k]) for k in drawn)
    matrices = [k for k, v in own.items() if v.dim() == 2]
    assert matrices and not any(torch.equal(drawn[k], own[k]) or torch.equal(drawn[k], other[k]) for k in matrices)
    state = torch.get_rng_state()
    load_language_model(folder, random=1)
    assert torch.equal(torch.get_rng_state(), state), "whatever is drawn next stays as it was"


def broken(folder: Path, damage: str) -> None:
    weights, table = folder / "model.safetensors", load_file(folder / "model.safetensors")
    if damage in ("nan", "inf"):
        table["layers.1.mlp.up_proj.weight"][0, 0] = float(damage)
        save_file(table, weights, {"format": "pt"})
    elif damage == "tokenizer":
        more = tokenizer()
        more.add_tokens(["one more", "and another"])
        more.save_pretrained(folder)
    elif damage == "layers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": -1}))
    elif damage == "words":
        read = json.loads((folder / "tokenizer.json").read_text())
        read["model"] |= {"vocab": {}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps(read))
    elif damage == "list":
        (folder / "tokenizer.json").write_text("[1, 2]")
    elif damage == "adapter":
        (folder / "adapter_config.json").write_text("{}")
        save_file({"lora_A": torch.ones(1)}, folder / "adapter_model.safetensors")
    elif damage == "link":
        weights.rename(folder.parent / "away")
        weights.symlink_to("nowhere")
    elif damage == "index":
        weights.rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
            "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    elif damage == "outside":
        weights.rename(folder.parent / "weights.safetensors")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../weights.safetensors"}}')
    elif damage == "consolidated":
        weights.rename(folder / "consolidated.safetensors")
    else:
        (folder / damage).unlink()
        (folder / damage).mkdir()


@pytest.mark.parametrize(("damage", "told"), [
    ("nan", "weights that are no finite numbers, such as in layers.1.mlp.up_proj.weight"), ("inf", "no finite numbers"),
    ("layers", "a config.json with num_hidden_layers=-1"), ("words", "a tokenizer that knows no word"),
    ("tokenizer", "a tokenizer with ids up to 260 and vectors for 260 tokens"), ("list", "has no usable tokenizer ("),
    ("tokenizer.json", "tokenizer.json is a folder"), ("config.json", "config.json is a folder"),
    ("model.safetensors", "model.safetensors is a folder"), ("link", "model.safetensors is a link to nothing"),
    ("adapter", "holds an adapter (adapter_config.json)"), ("index", "no files that are here (model-00002-of-00002"),
    ("outside", "lists no files that are here"), ("consolidated", "has consolidated.safetensors and no model.saf")])
def test_what_a_folder_holds_is_checked_and_called_as_the_user_called_it(folder, tmp_path, monkeypatch, damage, told):
    broken(folder, damage)
    target = tmp_path / "target"
    target.mkdir()

    def backbone() -> None:
        resolve("../given", "main", target)
        called = "llm.name=../given"
        check_weights(load_language_model(target, called=called), load_tokenizer(target, called), called)

    monkeypatch.chdir(target)
    said = refused(backbone)
    assert said.startswith("llm.name=../given") and told in said and str(tmp_path) not in said


def test_of_two_forms_of_the_weights_one_is_taken(folder, tmp_path):
    (folder / "consolidated.safetensors").write_bytes(b"the same in another form")
    target = tmp_path / "target"
    target.mkdir()
    resolve(str(folder), "main", target)
    assert [p.name for p in target.glob("*.safetensors")] == ["model.safetensors"]


@torch.no_grad()
def test_an_architecture_without_torchs_attention_is_read_with_its_own(tmp_path):
    from llmgr.text.vectors import encode_texts

    model, read = language_model("mpnet"), tokenizer("mpnet")
    model.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path)
    check_weights(loaded, read, "llm.name=x")
    check_prompts(loaded, "llm.name=x")
    ids = torch.tensor([[5, 9, 11, 30]])
    plain = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    expected = plain(input_ids=ids).last_hidden_state
    torch.testing.assert_close(loaded(input_ids=ids).last_hidden_state, expected)
    texts = ["abc", "a", "quite another text"]
    together = encode_texts(loaded, read, texts, 16)
    alone = torch.cat([encode_texts(loaded, read, [text], 16) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_an_architecture_that_heeds_no_mask_of_prompts_is_refused(tmp_path):
    shape = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.DebertaV2Model(transformers.DebertaV2Config(**shape, intermediate_size=32))
    model.save_pretrained(tmp_path)
    said = refused(lambda: check_prompts(load_language_model(tmp_path), "llm.name=deberta"))
    assert said.startswith("llm.name=deberta (DebertaV2Model) cannot read prompts")


@pytest.mark.parametrize(("revision", "offline"), [("0" * 40, True), ("0" * 40, False), ("main", True)])
def test_a_model_in_the_hubs_cache_is_taken_without_asking(folder, tmp_path, monkeypatch, revision, offline):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    snapshot = tmp_path / "hub/models--org--model/snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("ENDPOINT", "http://127.0.0.1:9"),
                        ("HF_HUB_OFFLINE", offline)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    close_session()
    target = tmp_path / "target"
    target.mkdir()
    assert resolve("org/model", revision, target) == {"name": "org/model", "revision": "0" * 40}
    assert (target / "model.safetensors").exists() and (target / "tokenizer.json").exists()
    (snapshot / "model.safetensors").unlink()
    assert "cannot be fetched from the hub" in refused(lambda: resolve("org/model", revision, target))
