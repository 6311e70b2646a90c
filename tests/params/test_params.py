from __future__ import annotations

import ast
import copy
import dataclasses
import datetime
import inspect
import re
import typing
from pathlib import Path

import pytest
import yaml
from machine import DEFAULTS, ROOT

from llmgr.encoders import pretraining
from llmgr.encoders.registry import REGISTRY
from llmgr.experiments import ablations
from llmgr.params import encoders, loading, schema
from llmgr.runtime.errors import UserError

CONTENT = yaml.safe_load(DEFAULTS.read_text())
PRESETS = sorted((ROOT / "stages/presets").glob("*.txt"))


def changed(**settings: object) -> dict:
    """The committed parameters with `tune__lr=...` set, as `-S tune.lr=...` sets it."""
    return loading.changed(CONTENT, {key.replace("__", "."): value for key, value in settings.items()})


def refused(**settings: object) -> str:
    with pytest.raises(UserError) as caught:
        loading.whole(changed(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(**settings: object) -> schema.Params:
    return loading.whole(changed(**settings)).params


def test_the_projects_own_parameters_are_valid_and_the_tests_have_the_same():
    own, tests = (loading.flat(loading.load(path)) for path in (ROOT / "params.yaml", DEFAULTS))
    gates = ("data.sha256", "gate.fuse")  # theirs are anyone's names
    assert {k for k in own if not k.startswith(gates)} == {k for k in tests if not k.startswith(gates)}


def test_every_committed_key_arrives_with_its_value():
    flat = loading.flat(loaded())
    assert flat["seed"] == CONTENT["seed"]
    assert flat["encoder.gcsan.lr"] == CONTENT["encoder"]["gcsan"]["lr"]
    leaves = {k for k in flat if k != "data.sha256"}

    def keys(content: dict, prefix: str = "") -> set[str]:
        return {name for key, value in content.items() for name in
                (keys(value, f"{prefix}{key}.") if isinstance(value, dict) and key not in ("sha256", "fuse")
                 else {prefix + key})}

    assert leaves | {"data.sha256"} == keys(CONTENT)


@pytest.mark.parametrize(("settings", "words"), [
    ({"tune__text_smoothing": 1.5}, ("tune.text_smoothing",)),
    ({"tune__recency": 1.5}, ("tune.recency",)),
    ({"slit__ridge": 1e-3}, ("slit.ridge=0.001", "at least 0.01")),
    ({"tune__epoch": 3}, ("tune.epoch", "nearest known one is tune.epochs")),
    ({"encoder__training__learning_rate": 1}, ("encoder.training.learning_rate", "encoder.training.")),
    ({"tuen": {}}, ("unknown key tuen", "tune")),
    ({"tune__lr": "fast"}, ("tune.lr=fast", "a number", "-S tune.lr=")),
    ({"tune__epochs": 2.5}, ("tune.epochs=2.5", "a whole number")),
    ({"tune__epochs": "1e400"}, ("tune.epochs",)),
    ({"tune__lr": 10**400}, ("tune.lr",)),
    ({"tune__lr": float("nan")}, ("tune.lr",)),
    ({"tune__lr": True}, ("tune.lr=True", "a number")),
    ({"tune__lr": None}, ("tune.lr=None", "a number")),
    ({"tune__titles": 1}, ("tune.titles=1", "true or false")),
    ({"tune__targets": "all"}, ("tune.targets=all", "prefix, positions")),
    ({"tune": 3}, ("tune=3", "section")),
    ({"llm__name": None}, ("llm.name",)),
    ({"llm__name": " "}, ("llm.name", "scratch")),
    ({"text_encoder__name": " "}, ("text_encoder.name", "scratch", "null")),
    ({"model__lora_targets": {"a": 1}}, ("model.lora_targets", "list")),
    ({"model__lora_targets": []}, ("model.lora_targets", "model.lora_r=0")),
    ({"data__sha256": ["a"]}, ("data.sha256",)),
    ({"bucket__practice": ["ten"]}, ("bucket.practice=ten", "whole number")),
    ({"bucket__practice": [50, 10]}, ("bucket.practice",)),
    ({"bucket__warm": 7}, ("bucket.cold", "bucket.warm=7")),
    ({"tune__lr": 0}, ("tune.lr=0", "above 0")),
    ({"encoder__training__dropout": 1.5}, ("encoder.training.dropout=1.5", "0 and 1")),
    ({"encoder__gcsan__gnn_layers": 6}, ("encoder.gcsan.gnn_layers=6", "1 and 5")),
    ({"encoder__gcsan__attention_heads": 7}, ("encoder.gcsan.attention_heads=7", "encoder.dim=64")),
    ({"encoder__sasrec__heads": 5}, ("encoder.sasrec.heads=5", "encoder.dim=64")),
    ({"encoder__bsarec__heads": 5}, ("encoder.bsarec.heads=5", "encoder.dim=64")),
    ({"encoder__bsarec__alpha": 2}, ("encoder.bsarec.alpha=2", "0 and 1")),
    ({"encoder__gru4rec__layers": 0}, ("encoder.gru4rec.layers=0", "1 and 5")),
    ({"encoder__narm__session_dropout": -0.1}, ("encoder.narm.session_dropout=-0.1", "0 and 1")),
    ({"encoder__stamp__lr": 0}, ("encoder.stamp.lr=0", "above 0")),
    ({"encoder__caser__length": 0}, ("encoder.caser.length=0", "above 0")),
    ({"encoder__names": ["gru4rek"]}, ("encoder.names holds gru4rek", "the nearest is gru4rec")),
    ({"encoder__gcsan__lr": 0}, ("encoder.gcsan.lr=0", "above 0, or auto")),
    ({"encoder__gcsan__lr": "automatic"}, ("encoder.gcsan.lr=automatic", "a number")),
    ({"encoder__training__rates": []}, ("encoder.training.rates=[]",)),
    ({"encoder__training__rungs": [4, 2]}, ("encoder.training.rungs=[4, 2]", "rise")),
    ({"encoder__training__rates": [0.1, -1]}, ("encoder.training.rates=[0.1, -1.0]",)),
    ({"encoder__names": ["gcsan-text"]}, ("encoder.names holds gcsan-text", "put gcsan into encoder.controls")),
    ({"encoder__linear_controls": ["gcsam"]}, ("encoder.linear_controls holds gcsam", "the nearest is gcsan")),
    ({"encoder__controls": ["gcsan-text"]}, ("encoder.controls holds gcsan-text", "encoder.control_texts")),
    ({"encoder__names": ["gcsam"]}, ("encoder.names holds gcsam, which is no encoder; the nearest is gcsan",)),
    ({"encoder__controls": ["gsan"]}, ("encoder.controls holds gsan, which is no encoder; the nearest is gcsan",)),
    ({"encoder__names": ["gcsan", "gcsan"]}, ("encoder.names=[gcsan, gcsan]", "twice")),
    ({"encoder__control_texts": ["texts"]}, ("encoder.control_texts=texts", "text, shuffled")),
    ({"model__base": "gcsan-textt"}, ("model.base names gcsan-textt, which is no encoder; the nearest is gcsan-text",)),
    ({"encoder__names": [], "encoder__controls": [], "encoder__linear_controls": []}, ("encoder.names is empty",)),
    ({"tune__linear": True, "tune__folds": 1}, ("tune.folds=1", "at least to 2")),
    ({"tune__linear": True, "tune__folds": -1}, ("tune.folds=-1", "at least 0")),
    ({"tune__linear": True, "tune__folds": 2, "tower__enabled": True, "tower__batch_size": 50}, (
        "tower.batch_size=50", "more than data.max_session=50")),
    ({"tower__encoder": "minilm"}, ("tower.encoder=minilm", "tokens, language-model")),
    ({"tower__enabled": True, "tower__encoder": "tokens", "tower__gradient_checkpointing": True}, (
        "spares nothing", "tower.encoder=tokens")),
    ({"tune__edges": True, "tune__prompt": "slot"}, ("tune.edges", "tune.prompt=paper")),
    ({"tune__edges": True, "tune__prompt": "paper", "tune__targets": "positions"},
     ("tune.edges", "tune.targets=prefix")),
    ({"align__candidates": 1}, ("align.candidates=1", "at least 2")),
    ({"align__lr": -1}, ("align.lr=-1",)),
    ({"llm__scratch__heads": 3}, ("llm.scratch.heads=3", "llm.scratch.width=128")),
    ({"track__experiment": ""}, ("track.experiment",)),
    ({"gate__fuse": {"mine": ["item-kn"]}}, ("gate.fuse.mine names item-kn, which is no model", "is item-knn")),
    ({"gate__fuse": {"pop": ["item-knn"]}}, ("gate.fuse names a gate pop, which is a model or a stage already",)),
    ({"gate__fuse": {"tune": ["item-knn"]}}, ("gate.fuse names a gate tune, which is a model or a stage already",)),
    ({"gate__sessions": 1}, ("gate.sessions=1 cannot be halved", "0 for all")),
    ({"bucket__practice": []}, ("bucket.practice=[] must rise: one edge at least",)),
    ({"launch__compile": True, "launch__strategy": "zero3"},
     ("launch.compile=true does not go with launch.strategy=zero3", "set launch.compile=false")),
    ({"seed": -1}, ("seed=-1 must lie between 0",)),
    ({"split__seed": 2**63}, (f"split.seed={2**63} must lie between 0",)),
    ({"data__sample_seed": -2}, ("data.sample_seed=-2",)),
    ({"encoder__names": ["gcsan", "hcgr"], "encoder__training__weight_decay": 0.1},
     ("encoder.training.weight_decay must be 0 for hcgr",)),
    ({"model__attention": "causal", "model__readout": "mean"}, ("model.readout=mean", "model.readout=last")),
    ({"bucket__ours": "gated-lmgr"}, ("bucket.ours names gated-lmgr", "the nearest is gated-llmgr")),
])
def test_what_is_refused_and_how(settings, words):
    message = refused(**settings)
    for word in words:
        assert word in message


@pytest.mark.parametrize(("settings", "key", "value"), [
    ({"tune__lr": "1e-05"}, "tune.lr", 1e-5),
    ({"tune__lr": 1}, "tune.lr", 1.0),
    ({"encoder__gcsan__lr": "auto"}, "encoder.gcsan.lr", "auto"),
    ({"encoder__gcsan__lr": "1e-2"}, "encoder.gcsan.lr", 0.01),
    ({"tune__epochs": "4"}, "tune.epochs", 4),
    ({"tune__epochs": 4.0}, "tune.epochs", 4),
    ({"seed": 2**60 + 1}, "seed", 2**60 + 1),
    ({"tune__titles": "True"}, "tune.titles", True),
    ({"tune__titles": "false"}, "tune.titles", False),
    ({"data__mirror": "null"}, "data.mirror", None),
    ({"data__mirror": ""}, "data.mirror", None),
    ({"data__mirror": "../shared/amazon"}, "data.mirror", "../shared/amazon"),
    ({"llm__revision": 7}, "llm.revision", "7"),
    ({"model__lora_targets": "q_proj"}, "model.lora_targets", ["q_proj"]),
    ({"bucket__practice": ["10", 50.0]}, "bucket.practice", [10, 50]),
    ({"data__sha256": {"a.gz": "00"}}, "data.sha256", {"a.gz": "00"}),
])
def test_values_are_coerced_to_the_declared_type(settings, key, value):
    found = loading.flat(loaded(**settings))[key]
    assert found == value
    assert type(found) is type(value)


def test_what_dvc_writes_for_a_small_rate_is_a_string_to_yaml_and_a_number_here(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(re.sub(r"    lr: \S+", "    lr: 1e-05", DEFAULTS.read_text(), count=1))
    assert isinstance(yaml.safe_load(file.read_text())["encoder"]["fpmc"]["lr"], str)
    assert loading.load(file).encoder.fpmc.lr == 1e-5


@pytest.mark.parametrize("section", list(CONTENT))
def test_a_missing_key_is_named(section):
    content = copy.deepcopy(CONTENT)
    missing = section
    if isinstance(content[section], dict):
        key = next(iter(content[section]))
        del content[section][key]
        missing = f"{section}.{key}"
    else:
        del content[section]
    with pytest.raises(UserError, match=rf"{missing} is missing"):
        loading.build(schema.Params, content, "")


@pytest.mark.parametrize(("text", "word"), [(None, "root folder"), ("a: [", "not YAML"), ("- 1", "git checkout")])
def test_a_file_that_is_no_parameter_file(tmp_path, text, word):
    file = tmp_path / "params.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=word) as caught:
        loading.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_view_holds_the_declared_keys_and_no_others():
    view = loaded().view(("seed", "data.max_session", "encoder.training", "encoder.dim"))
    assert view.data.max_session == CONTENT["data"]["max_session"]
    assert view.encoder.training.epochs == CONTENT["encoder"]["training"]["epochs"]
    assert set(loading.flat(view)) == {"seed", "data.max_session", "encoder.dim"} | {
        f"encoder.training.{k}" for k in CONTENT["encoder"]["training"]}
    with pytest.raises(AttributeError):
        view.data.mirror  # noqa: B018
    with pytest.raises(UserError, match=r"no section encoder\.gcsam; the nearest is encoder\.gcsan"):
        loaded().view(("encoder.gcsam",))


def test_the_models_to_train_and_the_encoders_there_are():
    section = loaded(encoder__control_texts=["shuffled", "text"]).encoder
    assert encoders.trained(section) == ["gcsan", "gcsan-shuffled", "gcsan-text", "gcsan-linear"]
    assert encoders.trained(loaded(encoder__controls=[], encoder__linear_controls=[], gate__fuse={}).encoder) == [
        "gcsan"]
    assert set(encoders.encoders()) == set(REGISTRY)
    settings = pretraining.with_rate(section.training, 0.07)
    assert settings.rates == [0.07] and settings.epochs == section.training.epochs
    assert pretraining.with_rate(section.training, "auto").rates == section.training.rates


def sections() -> dict[type, Path]:
    """Every dataclass of params.yaml, and the file that it stands in."""
    found, todo = {}, [schema.Params]
    while todo:
        kind = todo.pop()
        found[kind] = Path(inspect.getsourcefile(kind))
        todo += [hint for hint in typing.get_type_hints(kind).values() if dataclasses.is_dataclass(hint)]
    return found


def test_every_key_is_documented_below_its_field():
    undocumented, seen = [], 0
    for kind, file in sections().items():
        (body,) = [node for node in ast.parse(file.read_text()).body
                   if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
        inherited = {f.name for base in kind.__mro__[1:] if dataclasses.is_dataclass(base)
                     for f in dataclasses.fields(base)}
        hints = typing.get_type_hints(kind)
        for field, following in zip(body.body, [*body.body[1:], None]):
            if isinstance(field, ast.AnnAssign):
                seen += 1
                said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and (
                    len(following.value.value) > 10)
                section = dataclasses.is_dataclass(hints[field.target.id])
                if not said and not section and field.target.id not in inherited:
                    undocumented.append(f"{kind.__name__}.{field.target.id}")
    assert not undocumented and seen > 100


EXTREMES = [None, True, False, -1, 0, 0.5, 1, 7, 10**9 + 1, 2**63, 2**64, -2**70, 10**400, 1e308, -1e308, 5e-324,
            float("inf"), float("nan"), "", " ", "1e-05", "1e999", "true", "null", "x" * 100_000, "a\nb", "a\0b",
            "\ud800", "99" * 3000, [], [[]], [None], [1e308], {}, {"a": 1}, {1: [2]}, b"\xff",
            datetime.date(2020, 1, 1)]


@pytest.mark.parametrize("value", EXTREMES, ids=lambda value: repr(value)[:20])
def test_whatever_a_key_is_set_to_it_is_taken_or_refused_in_a_sentence(value):
    whole = loading.flat(loaded())
    taken = 0
    for key in [*whole, *CONTENT]:
        try:
            params = loading.whole(loading.changed(CONTENT, {key: value})).params
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500 and str(error).encode(), key
        else:
            taken += 1
            numbers = [v for v in loading.flat(params).values() if isinstance(v, float)]
            assert all(abs(v) <= 1e9 for v in numbers)
    assert taken < len(whole)


@pytest.mark.parametrize(("text", "words"), [
    (b"seed: \xff\xfe", "is not UTF-8 from byte 6 on"),
    (b"seed: " + b"[" * 20_000, "nests values in values without end"),
    (b"seed: " + b"9" * 5000, "is not YAML"),
    (b"seed: 2026-99-99", "is not YAML"),
    (b"tune: &a [*a]", "seed is missing"),
    (b"tune: &a {epochs: *a}", "is missing"),
    (b"? [1, 2]\n: 3", "is not YAML"),
    (b"seed: 0x" + b"f" * 5000, "seed="),
    (b"a: \x00", "is not YAML"),
])
def test_files_that_break_readers_are_refused_in_a_sentence(tmp_path, text, words):
    file = tmp_path / "params.yaml"
    rest = b"".join(line for line in DEFAULTS.read_bytes().splitlines(True) if not line.startswith((b"seed:",)))
    file.write_bytes(text + b"\n" + (rest if b"seed" in text and b"[" not in text and b"\xff" not in text else b""))
    with pytest.raises(UserError) as caught:
        loading.load(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_a_preset_holds_what_differs_from_the_recommended_run_and_no_more(preset):
    settings, own = ablations.changes(preset), yaml.safe_load((ROOT / "params.yaml").read_text())
    assert len(preset.read_text().splitlines()) <= 10
    before, derived = loading.flat(loading.load(ROOT / "params.yaml")), loading.whole(loading.changed(own, settings))
    assert [key for key, value in settings.items() if before[key] == value] == []
    assert {key: loading.flat(derived.params)[key] for key in settings} == settings
    assert [line for line in derived.lines if not line.startswith("gate ")] == []


def test_the_paper_preset_is_the_papers_configuration():
    own, preset = yaml.safe_load((ROOT / "params.yaml").read_text()), ROOT / "stages/presets/paper.txt"
    paper = loading.flat(loading.whole(loading.changed(own, ablations.changes(preset))).params)
    assert {key: paper[key] for key in (
        "llm.name", "model.base", "model.output", "model.attention", "model.readout", "align.epochs", "tune.epochs",
        "tune.targets", "tune.prompt", "tune.edges", "tune.batch_size", "tune.linear", "tune.folds", "tower.enabled",
        "tune.text_smoothing", "tune.recency", "model.node_text")} == {
        "llm.name": "meta-llama/Llama-2-7b-hf", "model.base": "gcsan", "model.output": "linear",
        "model.attention": "native", "model.readout": "last", "align.epochs": 1, "tune.epochs": 3,
        "tune.targets": "prefix", "tune.prompt": "paper", "tune.edges": True, "tune.batch_size": 16,
        "tune.linear": False, "tune.folds": 0, "tower.enabled": False, "tune.text_smoothing": 0.0,
        "tune.recency": 1.0, "model.node_text": False}
