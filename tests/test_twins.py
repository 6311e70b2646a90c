"""Twins are told by their parameters, and shown only beside the results that they belong to."""
from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from llmgr import report, twins
from llmgr.artifacts import write_json
from llmgr.errors import UserError
from llmgr.params import changed, load

ROOT = Path(__file__).resolve().parent.parent
BASE = yaml.safe_load((ROOT / "params.yaml").read_text())


def figures(hit: float) -> dict:
    row = {"n": 10, "hr_at_20": hit, "ndcg_at_20": hit / 2, "mrr_at_20": hit / 4}
    return {"test": {"all": row, "cold": row, "count_lt10": row}, "test_unseen": {"all": row}}


def state(name: str, content: dict, hit: float) -> dict:
    return {"rev": name, "name": name, "data": {
        "params": {"params.yaml": {"data": content}},
        "metrics": {"reports/metrics/buckets.json": {"data": {"llmgr": figures(hit), "pop": figures(0.0)}}}}}


def lock(content: dict) -> dict:
    """A dvc.lock that says that evaluate ran with these parameters."""
    keys = {"tune.lr": content["tune"]["lr"], "model": content["model"], "seed": content["seed"]}
    return {"stages": {"evaluate": {"params": {"params.yaml": keys}}}}


def test_experiments_are_matched_by_what_decides_their_figures():
    random = changed(BASE, {"model.weights": "random", "bucket.resamples": 500})
    other = changed(BASE, {"model.weights": "random", "tune.lr": 0.1})
    stale = changed(BASE, {"model.lora_r": 0})
    states = [state("workspace", BASE, 0.9), state("abc", BASE, 0.3), state("exp-other", other, 0.5),
              state("exp-random", random, 0.2), state("exp-stale", stale, 0.1)]
    locks = {"abc": lock(BASE), "exp-other": lock(other), "exp-random": lock(random), "exp-stale": lock(BASE)}
    found = twins.collected(states, BASE, locks.get)
    assert list(found) == ["llmgr", "random-weights"]
    assert found["llmgr"] == {"changed": {}, "figures": {
        c: {b: f for b, f in by.items() if b in twins.BUCKETS} for c, by in figures(0.3).items()}}
    assert found["random-weights"]["changed"] == {"model.weights": "random"}
    assert found["random-weights"]["figures"]["test"]["cold"]["hr_at_20"] == 0.2


def test_every_preset_changes_parameters_that_exist():
    minilm = changed(BASE, twins.changes(twins.PRESETS.parent / "minilm.txt"))
    for path in sorted(twins.PRESETS.glob("*.txt")):
        assert any(twins.decisive(changed(base, twins.changes(path))) != twins.decisive(base)
                   for base in (BASE, minilm)), path


def test_a_preset_that_is_no_list_of_options_is_refused(tmp_path):
    (tmp_path / "odd.txt").write_text("-S model.lora_r=0 seed=3")
    with pytest.raises(UserError, match=r"odd.txt must hold -S key=value options and nothing else"):
        twins.changes(tmp_path / "odd.txt")


def test_the_report_shows_twins_of_these_results_alone(tmp_path):
    main = figures(0.3)
    content = {"llmgr": {"changed": {}, "figures": copy.deepcopy(main)},
               "without-lora": {"changed": {"model.lora_r": 0}, "figures": figures(0.2)}}
    write_json(tmp_path / "twins.json", content)
    assert list(report._own_twins(tmp_path / "twins.json", main)) == ["llmgr", "without-lora"]
    assert report._own_twins(tmp_path / "twins.json", figures(0.4)) == {}
    assert report._own_twins(tmp_path / "none.json", main) == {}
    text = report._twins({"twins": content}, load(ROOT / "params.yaml"))
    assert "| without-lora | model.lora_r=0 | 0.2000 | 0.1000 |" in text and "| llmgr | – | 0.3000 |" in text
