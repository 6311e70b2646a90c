"""Two experiments publish into one store at the same time; what a run holds, and that it is there only once."""
from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from machine import DEFAULTS, ROOT, small_disk
from tiny_package import package
from tiny_reports import write_reports

from llmgr.experiments.published import Published, logged
from llmgr.params.loading import flat, load
from llmgr.reporting import runs as contents
from llmgr.reporting import store, tracking
from llmgr.runtime.errors import UserError
from llmgr.serving.package import write_package

TRACK = [sys.executable, str(ROOT / "stages/track.py")]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DVC"))}


def experiment(folder: Path, **changes: Any) -> Path:
    """A project folder with results, ready to be tracked; `changes` are dotted parameters."""
    write_reports(folder, sessions=400)
    content = yaml.safe_load(DEFAULTS.read_text())
    content["track"] |= {"experiment": "llmgr", "uri": None}
    for name, value in changes.items():
        section, key = name.split("__")
        content[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    evaluated = folder / "reports/metrics/evaluate.json"
    figures = json.loads(evaluated.read_text())
    evaluated.write_text(json.dumps(figures | {"served": figures["llmgr"]}))
    write_package(folder / "models/recommender", package())
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
        _, errors = process.communicate(timeout=600)
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
    return tracking.publish(load(params), reports)


def runs(client: mlflow.MlflowClient, kind: str = "experiment") -> list:
    return client.search_runs([client.get_experiment_by_name("llmgr").experiment_id], f"tags.kind = '{kind}'")


def test_experiments_that_publish_together_both_arrive(home: Path, inside: mlflow.MlflowClient) -> None:
    found = {run.info.run_name: run for run in runs(inside)}
    assert sorted(found) == ["exp-one", "exp-two"]
    assert {name: run.data.params["model.lora_r"] for name, run in found.items()} == {"exp-one": "8", "exp-two": "16"}
    for name, run in found.items():
        written = json.loads((home / name.removeprefix("exp-") / "reports/mlflow_run.json").read_text())
        assert written == {"run_id": run.info.run_id, "experiment": "llmgr", "name": name,
                           "key": run.data.tags["llmgr.key"], "store": "sqlite"}
        assert run.info.status == "FINISHED" and run.data.tags["dvc.baseline"] == "b" * 40


def test_an_experiments_run_holds_what_its_users_compare(home: Path, inside: mlflow.MlflowClient) -> None:
    run = next(run for run in runs(inside) if run.info.run_name == "exp-one")
    found = json.loads(Path("reports/metrics/buckets.json").read_text())
    data = run.data
    controls = yaml.safe_load(Path("params.yaml").read_text())["encoder"]["controls"]
    assert json.loads(data.params["encoder.controls"]) == controls and data.params["data.mirror"] == "null"
    assert not any(name.startswith("track.") for name in data.params)
    assert 30 < len(data.metrics) <= 60
    for split in ("test", "test_unseen"):
        for bucket in ("all", "cold", "warm"):
            for metric in ("hr_at_20", "ndcg_at_20", "mrr_at_20"):
                assert data.metrics[f"{split}.{bucket}/{metric}"] == found["llmgr"][split][bucket][metric]
    assert data.metrics["sessions/cold"] == found["llmgr"]["test"]["cold"]["n"]
    assert data.metrics["above.gcsan/ndcg_at_20"] == pytest.approx(
        found["llmgr"]["test"]["all"]["ndcg_at_20"] - found["gcsan"]["test"]["all"]["ndcg_at_20"], abs=2e-6)
    assert set(contents.COLUMNS) <= set(data.metrics)
    with open("reports/curves/tune_steps.csv", newline="") as handle:
        losses = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(handle)}
    history = inside.get_metric_history(run.info.run_id, "curve.tune/loss")
    assert {point.step: point.value for point in history} == losses
    assert {"kind": "experiment", "dataset": "sample", "base": "gcsan", "backbone": "scratch",
            "text_encoder": "scratch", "seed": "2026"}.items() <= data.tags.items()
    assert data.tags["version.torch"] and data.tags["python"]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("data/sessions", "0123456789abcdef0123456789abcdef.dir")
    words = " ".join([*data.tags.values(), *data.params.values(), dataset.dataset.source])
    assert socket.gethostname() not in words.split() and str(home) not in words


def test_an_experiments_run_describes_itself_and_holds_the_files(home: Path, inside: mlflow.MlflowClient) -> None:
    run = next(run for run in runs(inside) if run.info.run_name == "exp-one")
    found = json.loads(Path("reports/metrics/buckets.json").read_text())
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("LLMGR ranks the next item") and f"{found['llmgr']['test']['all']['hr_at_20']:.4f}" in note
    assert f"(#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/index.html)" in note
    assert {f.path for f in inside.list_artifacts(run.info.run_id)} == {
        "index.html", "metrics", "curves", "plots", "ranks", "tables", "model"}
    assert run.info.artifact_uri.startswith((home / "mlartifacts").as_uri())
    table = json.loads((Path(run.info.artifact_uri.removeprefix("file://")) / "tables/metrics.json").read_text())
    rows = [dict(zip(table["columns"], row)) for row in table["data"]]
    (row,) = (r for r in rows if (r["model"], r["split"], r["bucket"], r["metric"]) == (
        "gcsan-text", "test_unseen", "warm", "hr_at_5"))
    assert row["value"] == found["gcsan-text"]["test_unseen"]["warm"]["hr_at_5"] and row["low"] < row["value"]
    costs = [json.loads(path.read_text()) for path in Path("reports/metrics/cost").glob("*.json")]
    assert run.info.end_time - run.info.start_time == pytest.approx(1000 * sum(c["seconds"] for c in costs), abs=2)
    columns = json.loads(inside.get_experiment(run.info.experiment_id).tags["mlflow.sharedViewState.columns"])
    assert "metrics.`test.all/ndcg_at_20`" in columns["selectedColumns"]


def test_every_model_has_a_run_below_with_the_same_metrics(inside: mlflow.MlflowClient) -> None:
    parents = {run.info.run_id: run for run in runs(inside)}
    found = json.loads(Path("reports/metrics/buckets.json").read_text())
    below = {(parents[run.data.tags["mlflow.parentRunId"]].info.run_name, run.info.run_name): run
             for run in runs(inside, "model")}
    assert set(below) == {(name, model) for name in ("exp-one", "exp-two") for model in found}
    assert {run.info.status for run in below.values()} == {"FINISHED"}
    ours, other = below["exp-one", "llmgr"].data, below["exp-one", "gcsan-text"]
    for name in ("test.all/hr_at_20", "test_unseen.cold/ndcg_at_20", "valid.all/mrr_at_20", "cost/minutes",
                 "curve.training/loss"):
        assert name in ours.metrics and name in other.data.metrics
    assert other.data.metrics["test.warm/mrr_at_20"] == found["gcsan-text"]["test"]["warm"]["mrr_at_20"]
    assert other.data.tags["model"] == "gcsan-text" and "encoder.gcsan.lr" in other.data.params
    assert "tune.lr" in ours.params and "tune.lr" not in other.data.params


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
    killed = inside.create_run(place, tags={**tracking.tags(identity), "kind": "experiment"}, run_name="killed")
    killed = killed.info.run_id
    below = inside.create_run(place, tags={"mlflow.parentRunId": killed, "kind": "model"}).info.run_id
    made = publish(tmp_path / "reports")
    assert made["key"] == identity and made["name"] == f"sample-{identity[:8]}" and made["run_id"] != killed
    kept = {run.info.run_id: run.info.status for run in runs(inside)}
    assert below not in {run.info.run_id for run in runs(inside, "model")}
    assert killed not in kept and kept[made["run_id"]] == "FINISHED"


def test_what_is_published_is_read_back(home: Path, inside: mlflow.MlflowClient) -> None:
    published = Published("llmgr", None)
    (run,) = [run for run in published.runs("experiment") if run.name == "exp-one"]
    assert run.parameters == logged(yaml.safe_load(Path("params.yaml").read_text()))
    assert run.data == {"data/sessions": "0123456789abcdef0123456789abcdef.dir"[:36]} and run.commit == "b" * 40
    assert published.figures(run) == json.loads(Path("reports/metrics/buckets.json").read_text())
    with pytest.raises(UserError, match=r"exp-one .* has no ranks/gone.parquet"):
        published.ranks(run, ["gone"])


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    rows = "".join(f"{step},{step / 10},{7 - step / 1e4},0.001\n" for step in range(1, 12_346))
    (tmp_path / "tune_steps.csv").write_text("step,epoch,loss,lr\n" + rows)
    (tmp_path / "tune_epochs.csv").write_text("epoch,step,train_loss,valid_hr_at_20\n0,0,,0.01\n1,100,5.5,0.02\n")
    found = list(contents.curves(tmp_path.glob("*.csv")))
    loss = [(step, value) for name, value, step in found if name == "curve.tune/loss"]
    assert 900 < len(loss) <= 1000 and loss[-1] == (12_345, 7 - 1.2345) and loss == sorted(loss)
    assert [(v, s) for n, v, s in found if n == "curve.tune/valid_hr_at_20"] == [(0.01, 0), (0.02, 100)]


def test_names_are_made_legal() -> None:
    assert contents.legal("gcsan-text.HR@20 (a)") == "gcsan-text.HR_20 _a_"


def test_the_store_is_the_parameter_else_the_environment_else_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert store.address_of(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert store.address_of(None) == "http://elsewhere:5000"
    assert store.address_of("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"


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
        assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
        assert failed.stderr.splitlines()[-1].startswith("error: the disk is full"), failed.stderr
        assert (disk / "mlflow.db").exists() == (store == "full"), "half a store has the name of a whole one"
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
        monkeypatch.setenv("DVC_ROOT", str(tmp_path))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
        run_id = publish()["run_id"]
        found = runs(mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"]))
        assert run_id in {run.info.run_id for run in found} and {run.info.status for run in found} == {"FINISHED"}
        assert len(found) == 1, "what was begun on the full disk is gone"


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


def test_a_store_that_was_copied_leaves_the_original_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved & renamed"
    shutil.copytree(home, moved)
    before = sorted(path for path in home.rglob("*") if ".db" not in path.name)
    monkeypatch.chdir(moved / "one")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(moved))
    for experiment_name in ("llmgr", "Default"):
        content = yaml.safe_load(Path("params.yaml").read_text())
        content["track"]["experiment"], content["model"]["lora_r"] = experiment_name, 32
        Path("params.yaml").write_text(yaml.safe_dump(content))
        run_id = publish()["run_id"]
        client = mlflow.MlflowClient(f"sqlite:///{moved}/mlflow.db")
        run = client.get_run(run_id)
        assert run.info.artifact_uri == f"{(moved / 'mlartifacts').as_uri()}/{run_id}/artifacts"
        assert "index.html" in {file.path for file in client.list_artifacts(run_id)}
        assert publish()["run_id"] == run_id, "the second time the run is found"
    assert sorted(path for path in home.rglob("*") if ".db" not in path.name) == before
    shutil.copy(home / "one/params.yaml", "params.yaml")
    assert publish()["run_id"] == json.loads((home / "one/reports/mlflow_run.json").read_text())["run_id"]
    former = client.get_experiment_by_name("llmgr (former 1)")
    earlier = client.search_runs([former.experiment_id], "tags.kind = 'experiment'")
    assert {run.info.run_name for run in earlier} >= {"exp-one", "exp-two"}, "earlier runs stay readable"
    assert all(run.data.metrics["test.all/hr_at_20"] > 0 for run in earlier)


def test_results_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"evaluate\.json is missing"):
        tracking.publish(load(DEFAULTS), Path("reports"))


def damaged_store(kind: str, root: Path, whole: bytes) -> str:
    """The uri of a store that cannot take a run."""
    file = root / "odd.db"
    if kind == "folder":
        file.mkdir()
    elif kind != "no file":
        file.write_bytes({"truncated": whole[:len(whole) // 2], "garbage": b"no database " * 999, "empty": b"",
                          "text in a page": whole[:9000] + b"x" * 40_000 + whole[49_000:]}[kind])
    return "sqlite:///" if kind == "no file" else f"sqlite:///{file}"


@pytest.mark.parametrize("kind", ["truncated", "garbage", "empty", "folder", "text in a page", "no file"])
def test_a_store_that_is_none_is_one_sentence_at_once(home: Path, inside: Any, monkeypatch: pytest.MonkeyPatch,
                                                      tmp_path: Path, kind: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", damaged_store(kind, tmp_path, (home / "mlflow.db").read_bytes()))
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        publish()
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value) and ("odd.db" in str(caught.value) or kind == "no file")


@pytest.mark.parametrize(("uri", "words"), [
    ("postgresql+nodriver://me:s3cret/x@127.0.0.1:9/x", "127.0.0.1"), ("oddity://me:s3cret@somewhere/x", "oddity"),
    ("mysql+pymysql://me:s3cret@127.0.0.1:9/x", "not installed"), ("sqlite:////nowhere/at/all.db", "/nowhere/at")])
def test_a_store_that_cannot_be_reached_is_one_sentence(inside: Any, monkeypatch: pytest.MonkeyPatch, uri: str,
                                                        words: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        publish()
    assert time.monotonic() - start < 10
    said = str(caught.value)
    assert words in said and "s3cret" not in said and "\n" not in said


def test_a_locked_store_is_waited_for_with_a_word(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mlflow.db"
    shutil.copy(home / "mlflow.db", file)
    monkeypatch.setattr(store, "BUSY_SECONDS", 1.0)
    monkeypatch.setattr(store, "QUIET_SECONDS", 0.2)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="has been locked by another program"):
            store.check(f"sqlite:///{file}")
        other.execute("ROLLBACK")
    assert f"waiting for {file}" in capsys.readouterr().err
    store.check(f"sqlite:///{file}")


def test_secrets_and_folders_stay_here(inside: mlflow.MlflowClient, tmp_path: Path) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["data"]["mirror"] = "http://user:s3/cret@host/data?token=s3cret"
    content["llm"]["name"] = "/home/somebody/models/llama"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    shutil.copytree("reports", tmp_path / "reports")
    (tmp_path / "reports/metrics/backbone.json").write_text('{"name": "/home/somebody/models/llama"}')
    run = inside.get_run(publish(tmp_path / "reports", tmp_path / "params.yaml")["run_id"])
    assert run.data.params["data.mirror"] == "http://***@host/data?token=***"
    assert run.data.params["llm.name"] == "…/llama" and run.data.tags["backbone"] == "llama"
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".html", ".csv")]
    words = " ".join([*texts, *run.data.params.values(), *run.data.tags.values()])
    assert "cret" not in words and "somebody" not in words and len(texts) > 10
