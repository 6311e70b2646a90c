"""Picking the best of DVC experiments: which count, what was searched, what is written, and what is refused."""
from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine import DEFAULTS, ROOT

import pick
from llmgr.experiments import search
from llmgr.params.loading import changed, flat, load
from llmgr.reporting import tracking
from llmgr.runtime.errors import UserError

CONTENT = yaml.safe_load(DEFAULTS.read_text())
METRICS = "reports/metrics/encoders/{}.json"


class Repository:
    """What `dvc exp show --json` and the locks of its revisions say, for experiments that ran `trained` stages."""

    def __init__(self) -> None:
        self.locks: dict[str, dict] = {}
        self.base = self.state("main", {}, {"gcsan": 0.2, "narm": 0.3}, trained=("gcsan", "narm"))
        self.experiments: list[dict] = []

    def file(self, revision: str, path: str) -> dict:
        states = [self.base, *self.experiments]
        found = next((state["files"] for state in states if state["rev"] == revision), {})
        return found.get(path, {})

    def state(self, name: str, settings: dict[str, Any], ndcg: dict[str, float], trained: tuple[str, ...]) -> dict:
        content, revision = changed(CONTENT, settings), f"{name}-revision"
        data = f"sessions of {content['data']['dataset']} by {content['split']}"
        stages = copy.deepcopy(self.locks["main-revision"]["stages"]) if self.locks else {}
        stages["split"] = {"params": {"params.yaml": {"split": content["split"]}},
                           "outs": [{"path": "data/sessions", "md5": data}]}
        for model in trained:
            stages[f"pretrain@{model}"] = {
                "deps": [{"path": "stages/pretrain.py", "md5": "code"}, {"path": "data/sessions", "md5": data}],
                "params": {"params.yaml": {"encoder.training": content["encoder"]["training"],
                                           "encoder.gcsan": content["encoder"]["gcsan"]}},
                "outs": [{"path": f"models/encoders/{model}", "md5": "weights"}]}
        self.locks[revision] = {"schema": "2.0", "stages": stages}
        metrics = {METRICS.format(model): {"best_epoch": 5, "epochs": 9, "valid": {
            "hr_at_20": 2 * value, "ndcg_at_20": value, "mrr_at_20": value / 2}} for model, value in ndcg.items()}
        metrics["reports/metrics/cost/gcsan.json"] = {"seconds": 12.345}
        return {"rev": revision, "name": name, "error": None, "experiments": None, "files": metrics,
                "data": {"params": {"params.yaml": {"data": content}}}}

    def run(self, name: str, settings: dict[str, Any], ndcg: float, trained: tuple[str, ...] = ("gcsan",)) -> None:
        """An experiment; what it did not train keeps the figures of the commit."""
        figures = {"gcsan": 0.2, "narm": 0.3} | dict.fromkeys(trained, ndcg)
        self.experiments.append(self.state(name, settings, figures, trained))

    def shown(self) -> list[dict]:
        groups = [{"revs": [state], "executor": {"state": "success"}, "name": state["name"]}
                  for state in self.experiments]
        for kind in ("queued", "running", "failed"):  # as DVC shows them: their parameters, the commit's figures
            data = copy.deepcopy(self.base["data"])
            data["params"]["params.yaml"]["data"] = changed(CONTENT, {"data.dataset": "office", LR: "fast"})
            late = {"rev": kind * 5, "name": kind, "data": data, "error": None, "experiments": None}
            groups.append({"revs": [late], "executor": {"state": kind}, "name": kind})
        wrong = {**self.base, "rev": "wrong", "data": None, "error": {"msg": "unreadable", "type": ""}}
        groups.append({"revs": [wrong], "executor": None, "name": "wrong"})
        return [{**self.base, "rev": "workspace"}, {**self.base, "experiments": groups}]

    def trials(self, model: str = "gcsan", dataset: str = "office") -> list[search.Trial]:
        return search.trials(self.shown(), model, dataset, lambda revision: self.locks.get(revision, {}))


LR, LAYERS = "encoder.gcsan.lr", "encoder.gcsan.gnn_layers"


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A grid over two keys on office; DVC wrote one value as YAML 1.1 reads a string."""
    made = Repository()
    monkeypatch.setattr(search, "file_of", made.file)
    for number, (lr, layers, ndcg) in enumerate([(0.001, 1, 0.051), ("1e-05", 2, 0.055), (0.001, 2, 0.053)]):
        made.run(f"exp-{number}", {LR: lr, LAYERS: layers, "data.dataset": "office"}, ndcg)
    return made


def test_the_best_by_validation_comes_first_with_the_keys_that_differ(grid: Repository) -> None:
    result = search.search(grid.trials(), "gcsan")
    assert result.keys == [LR, LAYERS]
    assert [(t.name, t.parameters[LR], t.parameters[LAYERS]) for t in result.trials] == [
        ("exp-1", 1e-5, 2), ("exp-2", 0.001, 2), ("exp-0", 0.001, 1)]
    head, rows = search.table(result)
    assert head == [LR, LAYERS, "valid.hr_at_20", "valid.ndcg_at_20", "valid.mrr_at_20", "best_epoch", "seconds",
                    "experiment"]
    assert rows[0] == ["1.0e-05", "2", "0.110000", "0.055000", "0.027500", "5", "12.3", "exp-1"]


def test_figures_of_another_dataset_model_or_run_do_not_count(grid: Repository) -> None:
    grid.run("narm only", {"data.dataset": "office"}, 0.9, trained=("narm",))  # its gcsan.json is the commit's
    grid.run("elsewhere", {"data.dataset": "beauty", LR: 0.01}, 0.9)
    grid.run("unrun", {"data.dataset": "office", LR: 0.02}, 0.9, trained=())
    assert [t.name for t in grid.trials()] == ["exp-0", "exp-1", "exp-2"]
    assert [t.name for t in grid.trials(dataset="beauty")] == ["elsewhere"]
    assert [t.name for t in grid.trials(dataset="sample")] == ["main"]


def test_stale_inputs_do_not_count(grid: Repository) -> None:
    assert len(grid.trials()) == 3
    grid.locks["exp-1-revision"]["stages"]["split"]["outs"][0]["md5"] = "made anew later"
    grid.locks["exp-2-revision"]["stages"]["split"]["params"]["params.yaml"]["split"] = {"ties": "file"}
    assert [t.name for t in grid.trials()] == ["exp-0"]


def test_other_models_parameters_are_no_part_of_the_search(grid: Repository) -> None:
    grid.run("exp-3", {"data.dataset": "office", LR: 0.001, LAYERS: 1, "tune.lr": 0.01, "bucket.resamples": 100,
                       "text_encoder.max_text_tokens": 9, "encoder.control_texts": ["text"]}, 0.051)
    result = search.search(grid.trials(), "gcsan")
    assert result.keys == [LR, LAYERS] and len(result.trials) == 3
    assert search.role("encoder.narm.lr", "gcsan") == search.role("llm.name", "gcsan") == "ignored"
    assert search.role("encoder.text_lr", "narm") == "ignored"
    for key, model in (("encoder.text_lr", "narm-text"), ("encoder.narm.hidden", "narm-text"), ("encoder.dim", "narm"),
                       ("encoder.narm.lr", "narm")):
        assert search.role(key, model) == "searched"
    roles = [search.role("slit.ridge", model) for model in ("narm", "narm-text", "narm-linear", "llmgr")]
    assert roles == ["ignored", "ignored", "searched", "searched"]
    assert [search.stage_of(model) for model in ("narm", "narm-text", "narm-linear", "llmgr")] == [
        "pretrain@narm", "control@narm-text", "linear@narm", "tune"]
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


def test_what_is_no_search_is_refused(grid: Repository) -> None:
    with pytest.raises(UserError, match=r"0 experiments of this commit trained narm .*presets/grid/narm\.txt"):
        search.search(grid.trials("narm"), "narm")
    with pytest.raises(UserError, match="1 experiments"):
        search.search(grid.trials()[:1], "gcsan")
    with pytest.raises(UserError, match=r"trained gcsan-text .*dvc exp run --queue -S key=a,b"):
        search.search([], "gcsan-text")
    grid.run("window", {"data.dataset": "office", "data.max_session": 20}, 0.06)
    with pytest.raises(UserError, match=r"differ in data\.max_session \(20, 50\)"):
        search.search(grid.trials(), "gcsan")


def test_a_name_that_is_no_model_and_a_path_without_dvc_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"grurec is no encoder: the nearest .* is gru4rec"):
        pick.main(load(DEFAULTS), "grurec", "office")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="dvc is not on the path"):
        pick.main(load(DEFAULTS), "gru4rec", "office")


def test_trials_on_other_data_do_not_compare(grid: Repository) -> None:
    for deps in ("outs", "deps"):
        for name in ("split", "pretrain@gcsan"):
            for entry in grid.locks["exp-2-revision"]["stages"][name].get(deps, ()):
                if entry["path"] == "data/sessions":
                    entry["md5"] = "another mirror's"
    assert len(grid.trials()) == 3
    with pytest.raises(UserError, match="trained gcsan did so on other data"):
        search.search(grid.trials(), "gcsan")


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


def test_the_choice_is_printed_recorded_and_written_back(grid: Repository, tmp_path: Path, capsys: Any,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = DEFAULTS.read_text()
    Path("params.yaml").write_text(text)
    monkeypatch.setattr(search, "shown", grid.shown)
    monkeypatch.setattr(search, "lock_of", lambda revision: grid.locks.get(revision, {}))
    told = []
    monkeypatch.setattr(tracking, "publish_trials", lambda *arguments: told.append(arguments))
    pick.main(load(DEFAULTS), model="gcsan", dataset="office")
    ((model, trials, experiment, uri),) = told
    assert (model, experiment, uri) == ("gcsan", load(DEFAULTS).track.experiment, None)
    assert [trial.name for trial in trials] == ["exp-1", "exp-2", "exp-0"]
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
    pick.main(load(DEFAULTS), model="gcsan", dataset="office")
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "warning: the trials had encoder.dim=64, which was not searched; params.yaml keeps 32"]


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
