"""The simple baselines against plain loops, and what counts as seen."""
from __future__ import annotations

import collections
import types

import numpy as np
import polars as pl
import pytest
import torch
from histories import ITEMS, histories, written
from machine import DEFAULTS
from tiny import FILES, llmgr, tokenizer

from llmgr.encoders.registry import build_with_items, save_with_items
from llmgr.evaluation import baselines, models
from llmgr.evaluation.gate import Gate, bands
from llmgr.model import building
from llmgr.model.prompts import BehaviourPrompts
from llmgr.model.ranker import Ranker
from llmgr.params.loading import load
from llmgr.params.names import BASELINES, SERVED
from llmgr.runtime.artifacts import save_tensors, write_json
from llmgr.runtime.errors import UserError
from llmgr.sessions import reading
from llmgr.sessions.reading import read_sessions

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [1, 50])
def test_popularity_counts_every_training_click_once(tmp_path, monkeypatch, window):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, window)
    expected = collections.Counter(i for x in histories() if len(x) > 3 for i in x[:-2])  # one click trains nothing
    sessions, _ = read_sessions("data/sessions/test.parquet", window)
    scores = baselines.popularity(FILES, CPU)(sessions)(torch.tensor([4, 0]))
    assert scores.shape == (2, ITEMS + 1)
    assert scores[0].tolist() == scores[1].tolist() == [float(expected[i]) for i in range(ITEMS + 1)]


@pytest.mark.parametrize(("decay", "dim"), [(0.0, 6), (0.7, 6), (1.0, 3)])
def test_text_knn_is_a_decayed_sum_of_cosines_of_whitened_vectors(tmp_path, monkeypatch, decay, dim):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, 4)
    raw = torch.randn(ITEMS + 1, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 6) + 2
    raw[0] = 0
    save_tensors("models/text_encoder/item_text.safetensors", {"vectors": raw})
    centred = raw[1:].double().numpy()
    axes, _, _ = np.linalg.svd(centred - centred.mean(0), full_matrices=False)
    white = axes[:, :dim] / np.linalg.norm(axes[:, :dim], axis=1, keepdims=True)
    sessions, frame = read_sessions("data/sessions/test.parquet", 4)
    samples = torch.tensor([7, 2, 11, 0])
    scores = baselines.text_knn(FILES, dim, decay, CPU)(sessions)(samples)
    for row, sample in enumerate(samples.tolist()):
        items = frame["items"][sample].to_list()
        for candidate in range(1, ITEMS + 1):
            expected = sum(decay**back * float(white[i - 1] @ white[candidate - 1])
                           for back, i in enumerate(reversed(items)))
            assert float(scores[row, candidate]) == pytest.approx(expected, abs=1e-4)


def test_seen_items_are_all_a_user_had_before_the_target(tmp_path):
    written(tmp_path, 3)
    frame = pl.read_parquet(tmp_path / "data/sessions/test.parquet")
    assert frame["earlier"].list.len().max() > 0
    for row, items in zip(reading.seen_items(frame).tolist(), histories()):
        assert [i for i in row if i] == items[:-1]


def test_every_model_is_loaded_by_name_and_an_encoder_scores_by_products(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, 5)
    section = types.SimpleNamespace(dim=8, training=types.SimpleNamespace(dropout=0.3), gcsan=types.SimpleNamespace(
        gnn_layers=1, attention_layers=1, attention_heads=1, omega=0.6))
    torch.manual_seed(0)
    model = build_with_items("gcsan", ITEMS, section, None, users=0, max_session=5).eval()
    save_with_items("models/encoders/gcsan", "gcsan", model)
    params = types.SimpleNamespace(data=types.SimpleNamespace(max_session=5),
                                   evaluate=types.SimpleNamespace(decay=0.7, text_dim=6),
                                   slit=types.SimpleNamespace(text=0.0),
                                   tune=types.SimpleNamespace(linear=False),
                                   tower=types.SimpleNamespace(enabled=False),
                                   encoder=types.SimpleNamespace(
                                       names=["gcsan"], controls=["gcsan"], control_texts=["text"],
                                       linear_controls=[]))
    found = models.scorers(params, FILES, CPU)
    assert list(found) == [*BASELINES, "gcsan", "gcsan-text", "llmgr", SERVED]
    sessions, _ = read_sessions("data/sessions/test.parquet", 5)
    samples = torch.arange(len(sessions))
    with torch.no_grad():
        query, vectors = model(sessions.graphs(samples))
        torch.testing.assert_close(found["gcsan"]()(sessions)(samples), query @ vectors.T)


@pytest.mark.parametrize(("kept", "asked", "expected"), [
    ("bf16", "fp32", torch.bfloat16), ("fp32", "bf16", torch.float32), (None, "bf16", torch.bfloat16)])
def test_llmgr_is_scored_in_the_arithmetic_that_it_was_tuned_in(tmp_path, monkeypatch, kept, asked, expected):
    class Built(Exception):
        pass

    def build(params, files, dtype, *_):
        raise Built(dtype)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(building, "build_llmgr", build)
    write_json("models/tuned/config.json", {"precision": kept} if kept else {})
    params = types.SimpleNamespace(seed=0, model=None, tune=types.SimpleNamespace(precision=asked, linear=False))
    with pytest.raises(Built) as built:
        models.llmgr(params, FILES, CPU, None)
    assert built.value.args == (expected,)


def test_a_batch_is_remembered_and_another_of_its_size_is_not():
    calls = []
    score = baselines.once(lambda samples: (calls.append(len(samples)), samples * 2.0)[1])
    one, two = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert score(one) is score(one) and calls == [2]
    assert [score(batch).tolist() for batch in (two, one)] == [[4, 6], [0, 2]] and calls == [2, 2, 2]


@pytest.mark.parametrize("base", ["fpmc", "caser"])
def test_sessions_of_more_users_than_an_encoder_knows_are_refused(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, 5)
    sessions, _ = read_sessions("data/sessions/test.parquet", 5)
    users = int(sessions.user.max())
    write_json("models/tuned/config.json", {})
    params = types.SimpleNamespace(seed=0, model=None, tune=types.SimpleNamespace(precision="fp32", linear=False))
    for known in (users - 1, users):
        model = build_with_items(base, ITEMS, load(DEFAULTS).encoder, None, users=known, max_session=5)
        save_with_items(f"models/encoders/{base}", base, model)
        tuned = Ranker(llmgr(), BehaviourPrompts(tokenizer(), "slot", None, 4, False), torch.float32)
        tuned.llmgr.encoder = model.encoder
        monkeypatch.setattr(building, "build_ranker", lambda *_, tuned=tuned, **__: tuned)
        for folder, over in ((f"models/encoders/{base}", models.encoder(FILES.encoder(base), ITEMS, CPU)),
                             ("model.base", models.llmgr(params, FILES, CPU, None))):
            if known == users:
                over(sessions)
                continue
            with pytest.raises(UserError, match=f"{folder} was trained for fewer users than the sessions have"):
                over(sessions)


def gate_params(**fuse: list[str]) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        data=types.SimpleNamespace(max_session=5), evaluate=types.SimpleNamespace(item_shrinkage=1.0, item_decay=0.5),
        slit=types.SimpleNamespace(text=0.0), tune=types.SimpleNamespace(linear=False),
        tower=types.SimpleNamespace(enabled=False),
        encoder=types.SimpleNamespace(names=[], controls=[], control_texts=[], linear_controls=[]),
        gate=types.SimpleNamespace(fuse=fuse, edges=[1, 3]))


def test_gates_stand_beside_their_scorers_which_score_a_batch_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, 5)
    calls = []
    makers = models.scorers(gate_params(), FILES, CPU)
    counted = baselines.popularity(FILES, CPU)

    def over(sessions):
        score = counted(sessions)
        return lambda samples: (calls.append(len(samples)), score(samples))[1]

    chosen = {"pop": lambda: over, "item-knn": makers["item-knn"]}
    monkeypatch.setattr(models, "scorers", lambda *_: chosen)
    params = gate_params(mine=["pop", "item-knn"], other=["item-knn", "pop", "repeat"])
    for name, parts in params.gate.fuse.items():
        weight = torch.arange(1.0, 1 + 3 * len(parts)).view(len(parts), 3)
        Gate(parts, [1, 3], weight, torch.zeros(3)).save(tmp_path / f"models/gates/{name}.json")
    scorers = models.loaded(params, FILES, CPU)
    assert list(scorers) == ["pop", "item-knn", "mine", "other"]
    sessions, _ = read_sessions("data/sessions/test.parquet", 5)
    samples = torch.arange(4)
    scores = {name: over(sessions)(samples) for name, over in scorers.items()}
    assert calls == [4]
    band = bands(baselines.training_interactions(FILES), [1, 3])
    repeat = torch.zeros(4, ITEMS + 1).scatter_(1, sessions.graphs(samples).items_BS, 1.0)
    weight = torch.arange(1.0, 10.0).view(3, 3)[:, band]
    expected = weight[0] * scores["item-knn"] + weight[1] * scores["pop"] + weight[2] * repeat
    torch.testing.assert_close(scores["other"][:, 1:], expected[:, 1:], atol=1e-4, rtol=1e-4)
