"""Ablations are told by their parameters, and shown only beside the results that they belong to."""
from __future__ import annotations

import copy
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from machine import DEFAULTS

from llmgr.experiments import ablations, search
from llmgr.params.loading import changed, load
from llmgr.reporting import buckets, evidence, naming, seeds, tables
from llmgr.runtime.artifacts import read_json, write_json, write_table
from llmgr.runtime.errors import UserError

FILES: dict[str, dict] = {}  # buckets.json by revision
BASE = yaml.safe_load(DEFAULTS.read_text())


def figures(hit: float) -> dict:
    row = {"n": 10, "hr_at_20": hit, "ndcg_at_20": hit / 2, "mrr_at_20": hit / 4}
    return {"test": {"all": row, "cold": row, "count_lt10": row}, "test_unseen": {"all": row}}


def state(name: str, content: dict, hit: float) -> dict:
    FILES[name] = {"llmgr": figures(hit), "pop": figures(0.0)}
    return {"rev": name, "name": name, "data": {"params": {"params.yaml": {"data": content}}}}


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments' JSON files are those that their states carry."""
    monkeypatch.setattr(ablations, "file_of", lambda revision, path: FILES.get(revision, {}))


def lock(content: dict) -> dict:
    """A dvc.lock that says that evaluate and bucket ran with these parameters."""
    keys = {"tune.lr": content["tune"]["lr"], "model": content["model"], "seed": content["seed"]}
    return {"stages": {"evaluate": {"params": {"params.yaml": keys}, "outs": [{"path": "reports/ranks", "md5": "r"}]},
                       "bucket": {"deps": [{"path": "reports/ranks", "md5": "r"}], "params": {"params.yaml": {}}}}}


def test_experiments_are_matched_by_what_decides_their_figures():
    random = changed(BASE, {"model.weights": "random", "bucket.resamples": 500})
    other = changed(BASE, {"model.weights": "random", "tune.lr": 0.1})
    stale = changed(BASE, {"model.lora_r": 0})
    states = [state("workspace", BASE, 0.9), state("abc", BASE, 0.3), state("exp-other", other, 0.5),
              state("exp-random", random, 0.2), state("exp-stale", stale, 0.1)]
    locks = {"abc": lock(BASE), "exp-other": lock(other), "exp-random": lock(random), "exp-stale": lock(BASE)}
    found = ablations.collected(states, BASE, ablations.possible(BASE), locks.get)
    assert list(found) == ["llmgr", "random-weights"]
    assert found["llmgr"] == {"changed": {}, "figures": {
        c: {b: f for b, f in by.items() if b in buckets.COMPARED} for c, by in figures(0.3).items()}}
    assert found["random-weights"]["changed"] == {"model.weights": "random"}
    assert found["random-weights"]["figures"]["test"]["cold"]["hr_at_20"] == 0.2


def test_experiments_on_other_data_are_left_out():
    other = changed(BASE, {"seed": 7, "data.mirror": "elsewhere"})
    random = changed(BASE, {"model.weights": "random"})
    states = [state("abc", BASE, 0.3), state("exp-7", other, 0.4), state("exp-random", random, 0.2)]
    made = {name: {"stages": {"split": {"outs": [{"path": "data/sessions", "md5": md5}]}, **lock(content)["stages"]}}
            for name, content, md5 in (("abc", BASE, "a"), ("exp-7", other, "a"), ("exp-random", random, "b"))}
    assert list(ablations.at_seeds(states, BASE, made.get)) == ["7", "2026"]
    assert list(ablations.collected(states, BASE, ablations.possible(BASE), made.get)) == ["llmgr"]
    made["exp-7"]["stages"]["split"]["outs"][0]["md5"] = made["abc"]["stages"]["split"]["outs"][0]["md5"] + "b"
    made["exp-random"]["stages"]["split"]["outs"][0]["md5"] = "a"
    assert list(ablations.at_seeds(states, BASE, made.get)) == ["2026"]
    assert list(ablations.collected(states, BASE, ablations.possible(BASE), made.get)) == ["llmgr", "random-weights"]


def test_figures_that_an_experiment_did_not_make_are_left_out():
    second = changed(BASE, {"seed": 7})

    def with_encoder(content: dict, md5: str) -> dict:
        made = lock(content)
        made["stages"]["pretrain@gcsan"] = {"outs": [{"path": "models/encoders/gcsan", "md5": md5}]}
        return made

    def kept(states: list, locks: dict) -> list:
        return list(ablations.at_seeds(states, BASE, locks.get))

    states = [state("abc", BASE, 0.3), state("exp-7", second, 0.4)]
    assert kept(states, {"abc": lock(BASE), "exp-7": lock(second)}) == ["7", "2026"]
    stale = lock(second)
    stale["stages"]["evaluate"]["outs"][0]["md5"] = "ranks that bucket has not read"
    assert kept(states, {"abc": lock(BASE), "exp-7": stale}) == ["2026"]
    picked = changed(BASE, {"encoder.gcsan.lr": 0.5})
    locks = {"abc": with_encoder(BASE, "before"), "trial": with_encoder(picked, "trained anew")}
    states = [states[0], state("trial", picked, 0.5)]
    assert not ablations.at_seeds(states, picked, locks.get), "its encoder was not scored: the ranks are the commit's"
    for entry in ("outs", "deps"):
        locks["trial"]["stages"]["evaluate" if entry == "outs" else "bucket"][entry][0]["md5"] = "scored"
    assert list(ablations.at_seeds(states, picked, locks.get)) == ["2026"]
    for key, value in (("evaluate.decay", 0.1), ("bucket.cold", [5, 20])):
        other = changed(second, {key: value})
        assert kept([states[0], state("exp-7", other, 0.4)], {"abc": lock(BASE), "exp-7": lock(other)}) == ["2026"], key
        slower = state("e", changed(second, {"evaluate.batch_size": 7}), 0.4)
        assert list(ablations.at_seeds([states[0], slower], BASE, {
            "abc": lock(BASE), "e": lock(second)}.get)) == ["7", "2026"]


def test_a_preset_that_these_parameters_cannot_have_is_no_ablation(capsys, tmp_path: Path):
    for name, line in (("other-base", "model.base=sasrec-text"), ("random-weights", "model.weights=random")):
        (tmp_path / f"{name}.txt").write_text(f"-S {line}\n")
    content = changed(BASE, {"encoder.controls": [], "model.base": "gcsan", "gate.fuse": {}})
    asked = ablations.possible(content, tmp_path)
    assert "other-base" not in asked and "random-weights" in asked
    collected = ablations.collected([state("abc", content, 0.3)], content, asked, {"abc": lock(content)}.get)
    assert list(collected) == ["llmgr"]
    assert "other-base is no ablation of these parameters: " in capsys.readouterr().err


@pytest.mark.parametrize(("base", "shuffled"), [("gcsan-text", "gcsan-shuffled"), ("sasrec-text", "sasrec-shuffled"),
                                                ("gcsan", "gcsan"), ("gcsan-shuffled", "gcsan-shuffled")])
def test_shuffled_texts_change_the_base_in_its_texts_alone(base: str, shuffled: str):
    content = changed(BASE, {"encoder.names": ["gcsan", "sasrec"], "encoder.controls": ["gcsan", "sasrec"],
                             "model.base": base})
    ablation = ablations.possible(content)["shuffled-texts"]
    other = {key: value for key, value in ablation.decisive.items() if value != ablations.decisive(content)[key]}
    assert other == {"model.texts": "shuffled"} | ({"model.base": shuffled} if shuffled != base else {})


def test_without_a_tower_none_is_taken_away():
    own = yaml.safe_load((ablations.PRESETS.parents[2] / "params.yaml").read_text())
    assert "without-tower" in ablations.possible(own)
    assert "without-tower" not in ablations.possible(changed(own, {"tower.enabled": False}))


def test_the_recommended_run_has_every_ablation():
    own = yaml.safe_load((ablations.PRESETS.parents[2] / "params.yaml").read_text())
    assert {path.stem for path in ablations.PRESETS.glob("*.txt")} == set(ablations.possible(own)) - {"llmgr"}


def test_seeds_are_told_from_other_changes():
    second = changed(BASE, {"seed": 7, "encoder.names": ["gcsan", "sasrec"], "track.experiment": "seeds"})
    gate = changed(BASE, {"seed": 8, "gate.fuse": {"gated-llmgr": ["llmgr", "item-knn"]}})
    other, stale = changed(BASE, {"seed": 9, "tune.lr": 0.1}), changed(BASE, {"seed": 10})
    states = [state("workspace", BASE, 0.9), state("abc", BASE, 0.3), state("exp-7", second, 0.4),
              state("exp-8", gate, 0.5), state("exp-9", other, 0.6), state("exp-10", stale, 0.7)]
    for s in states:
        FILES[s["rev"]]["gated-llmgr"] = figures(0.8)
    locks = {"abc": lock(BASE), "exp-7": lock(second), "exp-8": lock(gate), "exp-9": lock(other), "exp-10": lock(BASE)}
    collected = ablations.at_seeds(states, BASE, locks.get)
    assert {seed: revision for seed, (revision, _) in collected.items()} == {
        "7": "exp-7", "8": "exp-8", "2026": "abc"}
    found = {seed: figures for seed, (_, figures) in collected.items()}
    assert list(found) == ["7", "8", "2026"]
    assert [found[seed]["llmgr"]["test"]["all"]["hr_at_20"] for seed in found] == [0.4, 0.5, 0.3]
    assert seeds.models(found) == ["llmgr", "pop"], "one gate fused something else"
    assert "count_lt10" not in found["7"]["llmgr"]["test"]
    column = ("test", "all", "hr_at_20")
    assert seeds.spread(found, "llmgr", column) == pytest.approx((0.4, 0.1, 0.3, 0.5))
    assert seeds.spread(found, "pop", column, minus="llmgr") == pytest.approx((-0.4, 0.1, -0.5, -0.3))
    assert seeds.spread(found, "gated-llmgr", column) is None and seeds.spread({}, "pop", column) is None


def test_the_report_shows_seeds_of_these_results_alone(tmp_path):
    found = {str(n): {"llmgr": {"test": {"all": figures(0.25 * n)["test"]["all"]}},
                      "pop": {"test": {"all": figures(0.125)["test"]["all"]}}} for n in (1, 3)}
    buckets = {"llmgr": figures(0.75), "pop": figures(0.125)}
    whole = {"figures": found, "ours": "llmgr", "resamples": 1000, "differences": {}}
    write_json(tmp_path / "seeds.json", whole)
    assert evidence.own_seeds(tmp_path / "seeds.json", buckets) == whole
    assert evidence.own_seeds(tmp_path / "seeds.json", {**buckets, "llmgr": figures(0.2)}) == {}
    assert evidence.own_seeds(tmp_path / "none.json", buckets) == {}
    write_json(tmp_path / "seeds.json", {**whole, "figures": {"3": found["3"]}})
    assert evidence.own_seeds(tmp_path / "seeds.json", buckets) == {}, "one seed is no spread"
    params = load(DEFAULTS)
    (first, _, means), (_, _, gaps) = tables.seed_tables(whole, params)
    assert "2 seeds (1, 3)" in first and means["llmgr"][0] == "0.5000 ± 0.3536" and means["llmgr"][-1] == "–"
    assert list(gaps) == ["pop"] and gaps["pop"][0] == "+0.3750 [+0.1250, +0.6250]"
    gap = {"difference": 0.01, "low": 0.002, "high": 0.02, "p": 0.03, "p_holm": 0.06, "relative": 0.1}
    paired = {"pop": {c: dict.fromkeys(("hr_at_20", "ndcg_at_20", "mrr_at_20"), gap) for c in ("test", "test_unseen")}}
    *_, (kept, _, _), (unseen, head, cells) = tables.seed_tables({**whole, "differences": paired}, params)
    assert "seen items kept" in kept and "seen items excluded" in unseen and head == ["HR@20", "NDCG@20", "MRR@20"]
    assert cells == {"pop": ["+0.0100 [+0.0020, +0.0200], +10.0%, p 0.03, Holm 0.06"] * 3}
    assert len(tables.seed_tables({**whole, "ours": "pop", "differences": paired}, params)) == 2, "another model's"


def test_the_scripts_collect_figures_and_ranks_from_experiments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*command: str) -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    for command in ("git init -q", "git config user.name A", "git config user.email a@example.org",
                    "git config commit.gpgsign false", "dvc init -q"):
        run(*command.split())
    random, states, locks, ranks = np.random.default_rng(1), [], {}, {}
    for seed, hit in ((2026, 0.5), (7, 0.25)):
        content = changed(BASE, {"seed": seed})
        Path("params.yaml").write_text(yaml.safe_dump(content))
        for model, chance in (("llmgr", hit), ("pop", 0.05)):
            rank = np.where(random.random(200) < chance, 1, 50).astype(np.int32)
            ranks[seed, model] = rank
            table = pl.DataFrame({"target": np.arange(200), "rank": rank, "rank_unseen": rank})
            write_table(f"reports/ranks/{model}.parquet", table)
        for command in ("dvc add -q reports/ranks", "git add -A", f"git commit -qm {seed}"):
            run(*command.split())
        revision = run("git", "rev-parse", "HEAD")
        states.append(state(revision, content, hit))
        locks[revision] = lock(content)
    monkeypatch.setattr(search, "shown", lambda: states)
    monkeypatch.setattr(search, "lock_of", locks.get)
    params = load("params.yaml")
    importlib.import_module("seeds").main(params)
    found = read_json("reports/seeds.json")
    assert list(found["figures"]) == ["7", "2026"] and found["ours"] == "llmgr"
    gap = found["differences"]["pop"]["test"]["hr_at_20"]
    hits = {model: np.mean([ranks[seed, model] <= 20 for seed in (2026, 7)]) for model in ("llmgr", "pop")}
    assert gap["difference"] == pytest.approx(hits["llmgr"] - hits["pop"], abs=1e-6) and gap["p_holm"] < 0.01
    assert "llmgr minus it +0." in capsys.readouterr().err
    importlib.import_module("ablations").main(params)
    assert list(read_json("reports/ablations.json")) == ["llmgr"]
    assert "no commit and no experiment" not in capsys.readouterr().err
    monkeypatch.setattr(search, "shown", lambda: states[:1])
    for script in ("seeds", "ablations"):
        importlib.import_module(script).main(params)
        assert "params.yaml asks for is itself no commit and no experiment" in capsys.readouterr().err, script
    monkeypatch.setattr(search, "shown", lambda: states)
    importlib.import_module("ablations").main(params)
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("reports/ranks")
    capsys.readouterr()
    importlib.import_module("seeds").main(params)
    told = capsys.readouterr().err
    assert re.search(r"warning: no paired differences: reports/ranks/llmgr.parquet of \w{7} is not in DVC's ", told)
    assert read_json("reports/seeds.json") == found | {"differences": {}}, "means and deviations need no ranks"


def test_a_preset_that_is_no_list_of_options_is_refused(tmp_path):
    (tmp_path / "odd.txt").write_text("-S model.lora_r=0 seed=3")
    with pytest.raises(UserError, match=r"odd.txt must hold -S key=value options and nothing else"):
        ablations.changes(tmp_path / "odd.txt")


def test_the_report_shows_ablations_of_these_results_alone(tmp_path):
    main = figures(0.3)
    content = {"llmgr": {"changed": {}, "figures": copy.deepcopy(main)},
               "without-lora": {"changed": {"model.lora_r": 0}, "figures": figures(0.2)}}
    write_json(tmp_path / "ablations.json", content)
    assert list(evidence.own_ablations(tmp_path / "ablations.json", main)) == ["llmgr", "without-lora"]
    assert evidence.own_ablations(tmp_path / "ablations.json", figures(0.4)) == {}
    assert evidence.own_ablations(tmp_path / "none.json", main) == {}
    assert (naming.four(0.2), naming.four(None)) == ("0.2000", "–"), "a bucket without sessions"
    assert [naming.changes(ablation) for ablation in content.values()] == ["–", "model.lora_r=0"]
