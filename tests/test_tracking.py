"""Two experiments publish into one store at the same time; what a run holds, and that it is there only once."""
from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from machine import DEFAULTS, small_disk
from test_report import write_reports

from llmgr.experiments.search import Trial
from llmgr.params.loading import flat, load
from llmgr.reporting import tracking
from llmgr.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
TRACK = [sys.executable, str(ROOT / "stages/track.py")]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DVC"))}


def experiment(folder: Path, **changes: Any) -> Path:
    """A project folder with results, ready to be tracked; `changes` are dotted parameters."""
    write_reports(folder, sessions=400)
    content = yaml.safe_load(DEFAULTS.read_text())
    content["track"] = {"experiment": "llmgr", "uri": None}
    for name, value in changes.items():
        section, key = name.split("__")
        content[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    (folder / "reports/index.html").write_text("<p>report</p>")
    (folder / "reports/ranks").mkdir()
    (folder / "reports/ranks/llmgr.parquet").write_bytes(b"ranks")
    (folder / "data/sessions").mkdir(parents=True)
    (folder / "data/sessions/test.parquet").write_bytes(b"sessions")
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {
        "split": {"cmd": "x", "outs": [{"path": "data/sessions", "md5": "0123456789abcdef0123456789abcdef.dir"}]},
        "check": {"cmd": "x", "outs": [{"path": "data/checked", "md5": "e" * 32}]},
        "tune": {"cmd": "x", "outs": [{"path": "models/tuned", "md5": "f" * 32}]}}}))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository root in whose store two experiments, started together, have published."""
    root = tmp_path_factory.mktemp("home")
    folders = [experiment(root / "one"), experiment(root / "two", model__lora_r=16)]
    running = [subprocess.Popen(TRACK, cwd=folder, stderr=subprocess.PIPE, text=True, env={
        **CLEAN, "DVC_ROOT": str(root), "DVC_EXP_NAME": f"exp-{folder.name}", "DVC_EXP_BASELINE_REV": "b" * 40})
        for folder in folders]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return root


@pytest.fixture
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """A client of that store, from inside the first experiment's folder."""
    for name in os.environ.keys() - CLEAN.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_ROOT", str(home))
    monkeypatch.chdir(home / "one")
    return mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")


def publish(reports: Path = Path("reports"), params: Path = Path("params.yaml")) -> dict[str, str]:
    logged = {name: value for name, value in flat(load(params)).items() if not name.startswith("track.")}
    return tracking.publish(logged, "llmgr", None, reports)


def runs(client: mlflow.MlflowClient) -> list:
    return client.search_runs([client.get_experiment_by_name("llmgr").experiment_id])


def test_experiments_that_publish_together_both_arrive(home: Path, inside: mlflow.MlflowClient) -> None:
    found = {run.info.run_name: run for run in runs(inside)}
    assert sorted(found) == ["exp-one", "exp-two"]
    assert {name: run.data.params["model.lora_r"] for name, run in found.items()} == {"exp-one": "8", "exp-two": "16"}
    for name, run in found.items():
        written = json.loads((home / name.removeprefix("exp-") / "reports/mlflow_run.json").read_text())
        assert written == {"run_id": run.info.run_id, "experiment": "llmgr", "name": name,
                           "key": run.data.tags["llmgr.key"], "store": "sqlite"}
        assert run.info.status == "FINISHED" and run.data.tags["dvc.baseline"] == "b" * 40


def test_a_run_holds_parameters_metrics_curves_files_and_lineage(home: Path, inside: mlflow.MlflowClient) -> None:
    run = next(run for run in runs(inside) if run.info.run_name == "exp-one")
    found = json.loads(Path("reports/metrics/buckets.json").read_text())
    data = run.data
    controls = yaml.safe_load(Path("params.yaml").read_text())["encoder"]["controls"]
    assert json.loads(data.params["encoder.controls"]) == controls and data.params["data.mirror"] == "null"
    assert not any(name.startswith("track.") for name in data.params)
    assert data.metrics["test.cold.ndcg_at_20"] == found["llmgr"]["test"]["cold"]["ndcg_at_20"]
    assert data.metrics["gcsan-text.test_unseen.all.hr_at_5"] == found["gcsan-text"]["test_unseen"]["all"]["hr_at_5"]
    assert data.metrics["n.test.cold"] == found["llmgr"]["test"]["cold"]["n"]
    low, value, high = (data.metrics[f"test.warm.hr_at_20{end}"] for end in (".low", "", ".high"))
    assert low < value < high
    assert data.metrics["difference.gcsan.test.all.hr_at_20"] == pytest.approx(
        data.metrics["test.all.hr_at_20"] - data.metrics["gcsan.test.all.hr_at_20"], abs=2e-6)
    assert next(iter(tracking.metrics(Path("reports")))) == "test.all.hr_at_20"
    assert data.metrics["cost.tune.peak_memory_mb"] > 900 and data.metrics["filter.after.users"] == 1500
    with open("reports/curves/tune_steps.csv", newline="") as handle:
        losses = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(handle)}
    history = inside.get_metric_history(run.info.run_id, "curve.tune.loss")
    assert {point.step: point.value for point in history} == losses
    assert {f.path for f in inside.list_artifacts(run.info.run_id)} == {"index.html", "metrics", "curves", "plots"}
    assert run.info.artifact_uri.startswith((home / "mlartifacts").as_uri())
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("data/sessions", "0123456789abcdef0123456789abcdef.dir")
    assert data.tags["version.torch"] and data.tags["python"]
    words = " ".join([*data.tags.values(), *data.params.values(), dataset.dataset.source])
    assert socket.gethostname() not in words.split() and str(home) not in words


def test_publishing_again_finds_the_run_and_timing_does_not_matter(inside: mlflow.MlflowClient, tmp_path: Path) -> None:
    before = runs(inside)
    shutil.copytree("reports", tmp_path / "reports")
    (tmp_path / "reports/metrics/cost/tune.json").write_text('{"seconds": 1}')
    (tmp_path / "reports/index.html").write_text("another time")
    again = publish(tmp_path / "reports")
    assert again["name"] == "exp-one" and again["run_id"] in {run.info.run_id for run in before}
    assert len(runs(inside)) == len(before)


def test_other_results_are_another_run_and_leftovers_vanish(inside: mlflow.MlflowClient, tmp_path: Path) -> None:
    shutil.copytree("reports", tmp_path / "reports")
    (tmp_path / "reports/ranks/llmgr.parquet").write_bytes(b"other ranks")
    logged = {name: v for name, v in flat(load("params.yaml")).items() if not name.startswith("track.")}
    identity = tracking.key(logged, tmp_path / "reports")
    assert identity != tracking.key(logged, Path("reports"))
    assert identity != tracking.key(logged | {"model.lora_r": 4}, tmp_path / "reports")
    place = inside.get_experiment_by_name("llmgr").experiment_id
    killed = inside.create_run(place, tags=tracking.tags(identity), run_name="killed").info.run_id
    made = publish(tmp_path / "reports")
    assert made["key"] == identity and made["name"] == f"sample-{identity[:8]}" and made["run_id"] != killed
    kept = {run.info.run_id: run.info.status for run in runs(inside)}
    assert killed not in kept and kept[made["run_id"]] == "FINISHED"


def test_the_trials_of_a_search_are_runs_of_their_own_once(inside: mlflow.MlflowClient) -> None:
    parameters = flat(load("params.yaml"))
    metrics = {"hr_at_20": 0.2, "ndcg_at_20": 0.1, "mrr_at_20": 0.05, "best_epoch": 7, "seconds": 12.5}
    trials = [Trial(name, {**parameters, "encoder.gcsan.lr": lr}, {**metrics, "ndcg_at_20": value, "seconds": seconds})
              for name, lr, value, seconds in (("low", 0.001, 0.1, 12.5), ("high", 0.01, 0.3, None))]
    for _ in range(2):
        tracking.publish_trials("gcsan", trials, "searches", None)
    published = inside.search_runs([inside.get_experiment_by_name("searches").experiment_id])
    found = {run.data.tags["dvc.experiment"]: run for run in published}
    assert sorted(found) == ["high", "low"] and len(published) == 2
    low, high = found["low"], found["high"]
    assert (low.info.run_name, low.data.tags["llmgr.search"], low.info.status) == ("gcsan-low", "gcsan", "FINISHED")
    assert low.data.metrics == {**{f"valid.{name}": metrics[name] for name in ("hr_at_20", "ndcg_at_20", "mrr_at_20")},
                                "best_epoch": 7.0, "seconds": 12.5}
    assert high.data.metrics["valid.ndcg_at_20"] == 0.3 and "seconds" not in high.data.metrics
    assert {run.data.params["encoder.gcsan.lr"] for run in (low, high)} == {"0.001", "0.01"}
    assert not any(name.startswith("track.") for name in low.data.params)


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    rows = "".join(f"{step},{step / 10},{7 - step / 1e4},0.001\n" for step in range(1, 12_346))
    (tmp_path / "tune_steps.csv").write_text("step,epoch,loss,lr\n" + rows)
    (tmp_path / "tune_epochs.csv").write_text("epoch,step,train_loss,valid_hr_at_20\n0,0,,0.01\n1,100,5.5,0.02\n")
    found = list(tracking.curves(tmp_path.glob("*.csv")))
    loss = [(step, value) for name, value, step in found if name == "curve.tune.loss"]
    assert 900 < len(loss) <= 1000 and loss[-1] == (12_345, 7 - 1.2345) and loss == sorted(loss)
    assert [(v, s) for n, v, s in found if n == "curve.tune.valid_hr_at_20"] == [(0.01, 0), (0.02, 100)]
    assert [(v, s) for n, v, s in found if n == "curve.tune.train_loss"] == [(5.5, 100)]


def test_names_are_made_legal() -> None:
    assert tracking.legal("gcsan-text.HR@20 (a)") == "gcsan-text.HR_20 _a_"


def test_the_store_is_the_parameter_else_the_environment_else_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert tracking.store(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert tracking.store(None) == "http://elsewhere:5000"
    assert tracking.store("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"


def test_without_a_lock_the_data_themselves_give_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("data/sessions/test.parquet")
    file.parent.mkdir(parents=True)
    found = []
    for content in (b"some", b"other", b"some"):
        file.write_bytes(content)
        found.append(tracking.datasets(Path("dvc.lock"), Path("data")))
    assert found[0] == found[2] != found[1]
    assert list(found[0]) == ["data/sessions"] and len(found[0]["data/sessions"]) == 32


@pytest.mark.parametrize("silent", [False, True])
def test_an_unreachable_server_is_one_sentence(inside: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch,
                                               silent: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()  # takes the connection and never answers
        address = f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        start = time.monotonic()
        with pytest.raises(UserError, match=r"track\.uri") as caught:
            publish()
        assert time.monotonic() - start < 15
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("store", ["new", "full"])
def test_a_full_disk_is_one_sentence_and_the_next_time_it_works(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    disk = tmp_path / "disk"
    known = (home / "mlflow.db").read_bytes()
    with small_disk(disk, 300 if store == "new" else len(known) // 1024 + 100):
        environment = {**CLEAN, "DVC_ROOT": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{disk}/mlflow.db"}
        if store == "full":
            (disk / "mlflow.db").write_bytes(known)
            monkeypatch.chdir(experiment(tmp_path / "three", model__lora_r=3))
        else:
            monkeypatch.chdir(home / "one")
        failed = subprocess.run(TRACK, capture_output=True, text=True, timeout=120, env=environment)
        assert failed.returncode == 2 and failed.stderr.startswith("error: the disk is full"), failed.stderr
        assert len(failed.stderr.splitlines()) == 1
        assert (disk / "mlflow.db").exists() == (store == "full"), "half a store has the name of a whole one"
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
        monkeypatch.setenv("DVC_ROOT", str(tmp_path))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
        run_id = publish()["run_id"]
        found = runs(mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"]))
        assert run_id in {run.info.run_id for run in found} and {run.info.status for run in found} == {"FINISHED"}
        assert len(found) == (1 if store == "new" else 4)


def test_a_store_whose_making_was_killed_is_made_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**CLEAN, "DVC_ROOT": str(tmp_path)}
    making = subprocess.Popen(TRACK, cwd=home / "one", env=environment, stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob(".mlflow.db.*.tmp")):
        assert making.poll() is None, "it was made before it could be killed"
        time.sleep(0.005)
    making.kill()
    making.wait()
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.chdir(home / "one")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    run_id = publish()["run_id"]
    (run,) = runs(mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"))
    assert run.info.run_id == run_id and not list(tmp_path.glob(".mlflow.db.*"))


def test_links_follow_a_store_that_was_moved(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved & renamed"
    shutil.copytree(home, moved)
    monkeypatch.chdir(moved / "one")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(moved))
    before = json.loads((home / "one/reports/mlflow_run.json").read_text())
    assert publish()["run_id"] == before["run_id"], "the run is found again"
    client = mlflow.MlflowClient(f"sqlite:///{moved}/mlflow.db")
    for run in runs(client):
        assert run.info.artifact_uri == f"{(moved / 'mlartifacts').as_uri()}/{run.info.run_id}/artifacts"
        assert "index.html" in {file.path for file in client.list_artifacts(run.info.run_id)}
    (there,) = {run.info.artifact_uri for run in runs(mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db"))
                if run.info.run_id == before["run_id"]}
    assert there.startswith(home.as_uri())


def test_results_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"evaluate\.json is missing"):
        tracking.publish({"data.dataset": "sample"}, "llmgr", None, Path("reports"))
