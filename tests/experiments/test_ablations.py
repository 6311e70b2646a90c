"""Ablations are told by their parameters, and shown only beside the results that they belong to."""
from __future__ import annotations

import copy
import importlib
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from machine import DEFAULTS
from mlflow_store import Store

from llmgr.experiments import ablations
from llmgr.params.loading import changed, load
from llmgr.reporting import buckets, evidence, naming, seeds, tables
from llmgr.runtime.artifacts import read_json, write_json
from llmgr.runtime.errors import UserError

BASE = yaml.safe_load(DEFAULTS.read_text())


def figures(hit: float) -> dict:
    row = {"n": 10, "hr_at_20": hit, "ndcg_at_20": hit / 2, "mrr_at_20": hit / 4}
    return {"test": {"all": row, "cold": row, "count_lt10": row}, "test_unseen": {"all": row}}


def add(to: Store, name: str, content: dict, hit: float, gated: float | None = None, **further) -> str:
    """An experiment with LLMGR's figures, those of popularity, and a gate's."""
    found = {"llmgr": figures(hit), "pop": figures(0.0)} | ({"gated-llmgr": figures(gated)} if gated else {})
    return to.add(name, content, figures=found, **further)


def test_experiments_are_matched_by_what_decides_their_figures(mlflow_store: Store):
    add(mlflow_store, "earlier", BASE, 0.9)
    add(mlflow_store, "own", BASE, 0.3)
    add(mlflow_store, "exp-other", changed(BASE, {"model.weights": "random", "tune.lr": 0.1}), 0.5)
    add(mlflow_store, "exp-random", changed(BASE, {"model.weights": "random", "bucket.resamples": 500}), 0.2)
    found = ablations.collected(mlflow_store.published(), BASE, ablations.possible(BASE))
    assert list(found) == ["llmgr", "random-weights"]
    assert found["llmgr"] == {"changed": {}, "figures": {
        c: {b: f for b, f in by.items() if b in buckets.COMPARED} for c, by in figures(0.3).items()}}
    assert found["random-weights"]["changed"] == {"model.weights": "random"}
    assert found["random-weights"]["figures"]["test"]["cold"]["hr_at_20"] == 0.2


def test_experiments_on_other_data_are_left_out(mlflow_store: Store):
    add(mlflow_store, "own", BASE, 0.3)
    add(mlflow_store, "exp-7", changed(BASE, {"seed": 7, "data.mirror": "elsewhere"}), 0.4)
    add(mlflow_store, "exp-8", changed(BASE, {"seed": 8}), 0.4, data="others")
    add(mlflow_store, "exp-random", changed(BASE, {"model.weights": "random"}), 0.2, data="others")
    published = mlflow_store.published()
    assert list(ablations.at_seeds(published, BASE)) == ["7", "2026"]
    assert list(ablations.collected(published, BASE, ablations.possible(BASE))) == ["llmgr"]
    own = changed(BASE, {"tune.lr": 0.07})
    add(mlflow_store, "moved", own, 0.3, data="others")
    add(mlflow_store, "moved-random", changed(own, {"model.weights": "random"}), 0.2, data="others")
    assert list(ablations.collected(published, own, ablations.possible(own))) == ["llmgr", "random-weights"]


def test_what_a_run_hides_does_not_part_it_from_its_ablations(mlflow_store: Store):
    own = changed(BASE, {"llm.name": "/home/me/models/small"})
    run = mlflow_store.client.get_run(add(mlflow_store, "own", own, 0.3))
    assert "/home/me" not in run.data.params["llm.name"]
    assert list(ablations.collected(mlflow_store.published(), own, ablations.possible(own))) == ["llmgr"]


def test_a_preset_that_these_parameters_cannot_have_is_no_ablation(capsys, tmp_path: Path, mlflow_store: Store):
    for name, line in (("other-base", "model.base=sasrec-text"), ("random-weights", "model.weights=random")):
        (tmp_path / f"{name}.txt").write_text(f"-S {line}\n")
    content = changed(BASE, {"encoder.controls": [], "model.base": "gcsan", "gate.fuse": {}})
    asked = ablations.possible(content, tmp_path)
    assert "other-base" not in asked and "random-weights" in asked
    add(mlflow_store, "own", content, 0.3)
    assert list(ablations.collected(mlflow_store.published(), content, asked)) == ["llmgr"]
    assert "other-base is no ablation of these parameters: " in capsys.readouterr().err


@pytest.mark.parametrize(("base", "shuffled"), [("gcsan-text", "gcsan-shuffled"), ("sasrec-text", "sasrec-shuffled"),
                                                ("gcsan", "gcsan"), ("gcsan-shuffled", "gcsan-shuffled")])
def test_shuffled_texts_change_the_base_in_its_texts_alone(base: str, shuffled: str):
    content = changed(BASE, {"encoder.names": ["gcsan", "sasrec"], "encoder.controls": ["gcsan", "sasrec"],
                             "model.base": base})
    ablation, own = ablations.possible(content)["shuffled-texts"], ablations.decisive(content)
    other = {key: value for key, value in ablation.decisive.items() if value != own[key]}
    assert other == {"model.texts": "shuffled"} | ({"model.base": shuffled} if shuffled != base else {})


def test_without_a_tower_none_is_taken_away():
    own = yaml.safe_load((ablations.PRESETS.parents[2] / "params.yaml").read_text())
    assert "without-tower" in ablations.possible(own)
    assert "without-tower" not in ablations.possible(changed(own, {"tower.enabled": False}))


def test_the_recommended_run_has_every_ablation():
    own = yaml.safe_load((ablations.PRESETS.parents[2] / "params.yaml").read_text())
    assert {path.stem for path in ablations.PRESETS.glob("*.txt")} == set(ablations.possible(own)) - {"llmgr"}


def test_seeds_are_told_from_other_changes(mlflow_store: Store):
    for name, values, hit in (("own", {}, 0.3), ("exp-9", {"seed": 9, "tune.lr": 0.1}, 0.6),
                              ("exp-7", {"seed": 7, "encoder.names": ["gcsan", "sasrec"]}, 0.4),
                              ("exp-8", {"seed": 8, "gate.fuse": {"gated-llmgr": ["llmgr", "item-knn"]}}, 0.5),
                              ("decay", {"seed": 10, "evaluate.decay": 0.1}, 0.6),
                              ("slower", {"seed": 11, "evaluate.batch_size": 7}, 0.7),
                              ("bounds", {"seed": 12, "bucket.cold": [5, 20]}, 0.6)):
        add(mlflow_store, name, changed(BASE, values), hit, 0.8)
    collected = ablations.at_seeds(mlflow_store.published(), BASE)
    assert {seed: run.name for seed, (run, _) in collected.items()} == {
        "7": "exp-7", "8": "exp-8", "11": "slower", "2026": "own"}
    found = {seed: figures for seed, (_, figures) in collected.items() if seed != "11"}
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


def test_the_scripts_collect_figures_and_ranks_from_published_runs(tmp_path, monkeypatch, capsys, mlflow_store: Store):
    monkeypatch.chdir(tmp_path)
    own = changed(BASE, {"track.experiment": mlflow_store.experiment, "track.uri": mlflow_store.uri})
    Path("params.yaml").write_text(yaml.safe_dump(own))
    params = load("params.yaml")
    for script in ("seeds", "ablations"):
        importlib.import_module(script).main(params)
        assert "MLflow has no run of what params.yaml asks for" in capsys.readouterr().err, script
    random, ids, ranks = np.random.default_rng(1), {}, {}
    for seed, hit in ((2026, 0.5), (7, 0.25)):
        for model, chance in (("llmgr", hit), ("pop", 0.05)):
            ranks[seed, model] = np.where(random.random(200) < chance, 1, 50).astype(np.int32)
        ids[seed] = add(mlflow_store, f"exp-{seed}", changed(own, {"seed": seed}), hit, ranks={
            model: ranks[seed, model] for model in ("llmgr", "pop")})
    importlib.import_module("seeds").main(params)
    found = read_json("reports/seeds.json")
    assert list(found["figures"]) == ["7", "2026"] and found["ours"] == "llmgr"
    gap = found["differences"]["pop"]["test"]["hr_at_20"]
    hits = {model: np.mean([ranks[seed, model] <= 20 for seed in (2026, 7)]) for model in ("llmgr", "pop")}
    assert gap["difference"] == pytest.approx(hits["llmgr"] - hits["pop"], abs=1e-6) and gap["p_holm"] < 0.01
    assert "llmgr minus it +0." in capsys.readouterr().err
    importlib.import_module("ablations").main(params)
    assert list(read_json("reports/ablations.json")) == ["llmgr"]
    assert "MLflow has no run" not in capsys.readouterr().err
    shutil.rmtree(unquote(mlflow_store.client.get_run(ids[7]).info.artifact_uri).removeprefix("file://") + "/ranks")
    importlib.import_module("seeds").main(params)
    said = capsys.readouterr().err
    assert f"warning: no paired differences: the MLflow run exp-7 ({ids[7]}) has no ranks/llmgr.parquet" in said
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
