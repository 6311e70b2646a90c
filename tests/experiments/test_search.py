"""Picking the best of published runs: which count, what was searched, what is written, and what is refused."""
from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine import DEFAULTS, ROOT
from mlflow_store import HEAD, Store

import pick
from llmgr.experiments import search
from llmgr.experiments.published import Published
from llmgr.params.loading import changed, flat, load, whole
from llmgr.reporting import tracking
from llmgr.runtime.errors import UserError

CONTENT = yaml.safe_load(DEFAULTS.read_text())


LR, LAYERS = "encoder.gcsan.lr", "encoder.gcsan.gnn_layers"
TRIAL = {"kind": "trial", "model": "gcsan"}
OFFICE = {"data.dataset": "office"}


def valid(ndcg: float, seconds: float = 12.345) -> dict[str, float]:
    return {"valid.all/hr_at_20": 2 * ndcg, "valid.all/ndcg_at_20": ndcg, "valid.all/mrr_at_20": ndcg / 2,
            "best_epoch": 5.0, "seconds": seconds}


@pytest.fixture
def grid(mlflow_store: Store) -> Store:
    """A grid over two keys on office; one value is written as YAML 1.1 reads a string."""
    for number, (lr, layers, ndcg) in enumerate([(0.001, 1, 0.051), ("1e-05", 2, 0.055), (0.001, 2, 0.053)]):
        mlflow_store.add(f"exp-{number}", changed(CONTENT, {LR: lr, LAYERS: layers, **OFFICE}), valid(ndcg), **TRIAL)
    return mlflow_store


def trials(grid: Store, model: str = "gcsan", dataset: str = "office") -> list[search.Trial]:
    return search.trials(grid.published(), model, dataset, HEAD)


def test_the_best_by_validation_comes_first_with_the_keys_that_differ(grid: Store) -> None:
    result = search.search(trials(grid), "gcsan")
    assert result.keys == [LR, LAYERS]
    assert [(t.name, t.parameters[LR], t.parameters[LAYERS]) for t in result.trials] == [
        ("exp-1", 1e-5, 2), ("exp-2", 0.001, 2), ("exp-0", 0.001, 1)]
    head, rows = search.table(result)
    assert head == [LR, LAYERS, "valid.hr_at_20", "valid.ndcg_at_20", "valid.mrr_at_20", "best_epoch", "seconds",
                    "experiment"]
    assert rows[0] == ["1.0e-05", "2", "0.110000", "0.055000", "0.027500", "5", "12.3", "exp-1"]


def test_runs_of_another_dataset_model_commit_or_kind_do_not_count(grid: Store) -> None:
    office = changed(CONTENT, {**OFFICE, LR: 0.02})
    grid.add("narm", office, valid(0.9), kind="trial", model="narm")
    grid.add("elsewhere", changed(CONTENT, {"data.dataset": "beauty"}), valid(0.9), **TRIAL)
    grid.add("before", office, valid(0.9), commit="b" * 40, **TRIAL)
    grid.add("whole", office, valid(0.9) | {"test.all/ndcg_at_20": 0.9})
    grid.add("killed", office, valid(0.9), status="RUNNING", **TRIAL)
    assert {t.name for t in trials(grid)} == {"exp-0", "exp-1", "exp-2"}
    assert [t.name for t in trials(grid, dataset="beauty")] == ["elsewhere"]
    (own,) = trials(grid, "llmgr")
    assert own.name == "whole" and set(own.metrics) == {"hr_at_20", "ndcg_at_20", "mrr_at_20", "best_epoch", "seconds"}


def test_a_trial_is_published_once_and_read_back(grid: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("DVC_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_EXP_NAME", "high")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", HEAD)
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"split": {"outs": [
        {"path": "data/sessions", "md5": "0" * 32 + ".dir"}, {"path": "data/core", "md5": "1" * 32 + ".dir"}]}}}))
    params = whole(changed(CONTENT, {**OFFICE, LR: 0.03, "track.experiment": grid.experiment, "track.uri": grid.uri,
                                     "data.mirror": "https://me:secret@host/mirror"})).params
    metrics = {"best_epoch": 7, "epochs": 9, "valid": {"hr_at_20": 0.2, "ndcg_at_20": 0.1, "mrr_at_20": 0.05}}
    first = tracking.publish_trial(params, "gcsan", metrics, 12.5)
    assert tracking.publish_trial(params, "gcsan", metrics, 99.0) == first and first["name"] == "gcsan-high"
    (found,) = [t for t in trials(grid) if t.name == "high"]
    assert len(trials(grid)) == 4
    assert found.metrics == {**metrics["valid"], "best_epoch": 7, "seconds": 12.5} and found.parameters[LR] == 0.03
    assert found.data == {"data/sessions": "0" * 32 + ".dir", "data/core": "1" * 32 + ".dir"}
    assert "secret" not in str(found.parameters)


def test_other_models_parameters_are_no_part_of_the_search(grid: Store) -> None:
    grid.add("exp-3", changed(CONTENT, {**OFFICE, LR: 0.001, LAYERS: 1, "tune.lr": 0.01, "bucket.resamples": 100,
                                        "text_encoder.max_text_tokens": 9, "encoder.control_texts": ["text"]}),
             valid(0.051), **TRIAL)
    result = search.search(trials(grid), "gcsan")
    assert result.keys == [LR, LAYERS] and len(result.trials) == 3
    assert search.role("encoder.narm.lr", "gcsan") == search.role("llm.name", "gcsan") == "ignored"
    assert search.role("encoder.text_lr", "narm") == "ignored"
    for key, model in (("encoder.text_lr", "narm-text"), ("encoder.narm.hidden", "narm-text"), ("encoder.dim", "narm"),
                       ("encoder.narm.lr", "narm")):
        assert search.role(key, model) == "searched"
    roles = [search.role("slit.ridge", model) for model in ("narm", "narm-text", "narm-linear", "llmgr")]
    assert roles == ["ignored", "ignored", "searched", "searched"]
    roles = [search.role(key, "llmgr") for key in ("tune.valid_sessions", "align.checkpoint_seconds",
                                                   "tune.gradient_checkpointing", "tune.lr")]
    assert roles == ["fixed", "ignored", "ignored", "searched"]
    assert search.role("encoder.narm.lr", "narm-text") == "ignored", "a control learns at encoder.text_lr"
    assert search.role("llm.name", "narm-text") == search.role("encoder.dim", "llmgr", ["narm"]) == "fixed"
    assert [search.role(key, "llmgr") for key in ("llm.name", "text_encoder.name")] == ["searched", "fixed"]
    assert [search.role(key, "llmgr", ["narm-text"]) for key in (
        "encoder.narm.hidden", "encoder.narm.lr", "encoder.text_lr", "encoder.gcsan.lr")] == [
        "fixed", "ignored", "fixed", "ignored"], "what LLMGR's base is trained with"
    for key in ("launch.processes", "data.mirror", "data.retries", "data.timeout"):
        assert search.role(key, "narm") == search.role(key, "llmgr") == "ignored"


def test_what_is_no_search_is_refused(grid: Store) -> None:
    with pytest.raises(UserError, match=r"0 experiments of this commit trained narm .*presets/grid/narm\.txt"):
        search.search(trials(grid, "narm"), "narm")
    with pytest.raises(UserError, match="1 experiments"):
        search.search(trials(grid)[:1], "gcsan")
    with pytest.raises(UserError, match=r"trained gcsan-text .*-S track.trials=\[gcsan-text\] -S key=a,b"):
        search.search([], "gcsan-text")
    grid.add("window", changed(CONTENT, {**OFFICE, "data.max_session": 20}), valid(0.06), **TRIAL)
    with pytest.raises(UserError, match=r"differ in data\.max_session \(20, 50\)"):
        search.search(trials(grid), "gcsan")


def test_a_name_that_is_no_model_and_a_folder_without_git_are_one_sentence(tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"grurec is no encoder: the nearest .* is gru4rec"):
        pick.main(load(DEFAULTS), "grurec", "office")
    with pytest.raises(UserError, match="run this in the repository root"):
        pick.main(load(DEFAULTS), "gru4rec", "office")


def test_without_a_store_no_run_is_there(tmp_path: Path) -> None:
    assert Published("llmgr", f"sqlite:///{tmp_path}/mlflow.db").runs("trial") == []
    assert not list(tmp_path.iterdir())


def test_trials_on_other_data_do_not_compare(grid: Store) -> None:
    grid.add("exp-3", changed(CONTENT, {**OFFICE, LR: 0.5}), valid(0.9), data="another mirror's", **TRIAL)
    with pytest.raises(UserError, match="trained gcsan did so on other data"):
        search.search(trials(grid), "gcsan")


def test_rewriting_changes_the_values_and_nothing_else() -> None:
    text = DEFAULTS.read_text().replace("  omega: 0.6", "  omega: 0.6   # of attention, not GNN", 1)
    changes = {LR: 1e-05, LAYERS: 3, "encoder.gcsan.omega": 0.25, "bucket.practice": [5, 20],
               "data.mirror": "a: b", "tune.titles": True, "seed": 7}
    found = search.rewritten(text, changes)
    before, after = (dict(_flat(yaml.safe_load(t))) for t in (text, found))
    assert after == before | changes
    differing = [(a, b) for a, b in zip(text.split("\n"), found.split("\n"), strict=True) if a != b]
    assert len(differing) == len(changes)
    assert ("    omega: 0.6   # of attention, not GNN", "    omega: 0.25   # of attention, not GNN") in differing
    with pytest.raises(UserError, match=r"encoder\.gcsan\.layers is missing"):
        search.rewritten(text, {"encoder.gcsan.layers": 3})
    with pytest.raises(UserError, match=r"encoder\.dim\.lr is missing"):
        search.rewritten(text, {"encoder.dim.lr": 3})


def test_a_block_is_replaced_whole_and_what_follows_stays() -> None:
    text = "gate:\n  fuse:\n    one: [a, b]\n    two:\n      - c  # last\n  # of edges\n  edges: [1]\nseed: 1\n"
    found = search.rewritten(text, {"gate.fuse": {"mine": ["x", "y"]}, "seed": 2})
    assert found == "gate:\n  fuse:\n    {mine: [x, y]}  # last\n  # of edges\n  edges: [1]\nseed: 2\n"
    assert yaml.safe_load(found) == {"gate": {"fuse": {"mine": ["x", "y"]}, "edges": [1]}, "seed": 2}


def _flat(content: dict[str, Any], prefix: str = "") -> Any:
    for key, value in content.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def test_the_choice_is_printed_recorded_and_written_back(grid: Store, tmp_path: Path, capsys: Any,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = DEFAULTS.read_text()
    Path("params.yaml").write_text(text)
    monkeypatch.setattr("llmgr.experiments.published.head", lambda: HEAD)
    params = load(DEFAULTS)
    params = dataclasses.replace(params, track=dataclasses.replace(params.track, experiment=grid.experiment,
                                                                   uri=grid.uri))
    pick.main(params, model="gcsan", dataset="office")
    found = load("params.yaml")
    assert (found.encoder.gcsan.lr, found.encoder.gcsan.gnn_layers) == (1e-5, 2)
    assert Path("params.yaml").read_text() == search.rewritten(text, {LR: 1e-5, LAYERS: 2})
    assert found.data.dataset == CONTENT["data"]["dataset"]
    with open("reports/results/office/search-gcsan.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [float(row["valid.ndcg_at_20"]) for row in rows] == [0.055, 0.053, 0.051]
    assert [float(row[LR]) for row in rows] == [1e-5, 0.001, 0.001]
    said = capsys.readouterr()
    assert said.out.count("\n") == 4 and "the best of 3" in said.err and "warning" not in said.err
    Path("params.yaml").write_text(yaml.safe_dump(changed(CONTENT, {"encoder.dim": 32, "tune.lr": 0.5})))
    pick.main(params, model="gcsan", dataset="office")
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "warning: the trials had encoder.dim=64, which was not searched; params.yaml keeps 32"]


def test_a_folder_that_a_run_hides_is_not_written_back(mlflow_store: Store, tmp_path: Path, capsys: Any,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = changed(CONTENT, {"track.experiment": mlflow_store.experiment, "track.uri": mlflow_store.uri})
    Path("params.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr("llmgr.experiments.published.head", lambda: HEAD)
    for name, rate, ndcg in (("/home/me/models/small", 0.01, 0.2), ("org/other", 0.02, 0.1)):
        mlflow_store.add(name[-5:], changed(CONTENT, {"llm.name": name, "tune.lr": rate}), valid(ndcg))
    pick.main(load("params.yaml"), model="llmgr", dataset="sample")
    chosen = load("params.yaml")
    assert (chosen.tune.lr, chosen.llm.name) == (0.01, CONTENT["llm"]["name"])
    assert "MLflow holds llm.name=…/small without its folder" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "stages/presets/grid").glob("*.txt")), ids=lambda p: p.stem)
def test_every_grid_searches_known_keys_with_values_that_load(path: Path) -> None:
    from llmgr.params.loading import build
    from llmgr.params.schema import Params

    for line in path.read_text().splitlines():
        option, assignment = line.split(" ", 1)
        key, values = assignment.split("=", 1)
        assert option == "-S" and key in flat(load(DEFAULTS))
        if key not in search.LISTS:
            assert search.role(key, path.stem) == "searched" and "," in values
            for value in values.split(","):
                build(Params, changed(CONTENT, {key: yaml.safe_load(value)}), "")
