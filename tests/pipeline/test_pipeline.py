"""The pipeline as its users meet it: `dvc repro` from a clone, experiments, interruptions, full disks, wrong input.

One small clone is reproduced once a session; tests that change something work on a copy of it.
"""
from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import mlflow
import polars as pl
import pytest
import torch
import yaml
from machine import DEFAULTS, ROOT, small_disk, stage, within
from scoring_server import Server
from tiny import CHECKPOINTS, FILES, language_model, tokenizer

from llmgr.experiments.ablations import changes
from llmgr.params import loading
from llmgr.params.names import BASELINES
from llmgr.prior.weighted_sum import build_prior
from llmgr.runtime import memory
from llmgr.runtime.artifacts import digest, load_tensors, read_json, save_tensors
from llmgr.sessions.reading import read_split

SMALL = {
    "data.sample_users": 220, "data.sample_items": 90, "data.max_session": 20, "encoder.dim": 16,
    "encoder.text_dim": 16, "encoder.training.epochs": 2, "encoder.training.batch_size": 256,
    "encoder.training.checkpoint_seconds": 0, "llm.scratch.layers": 1, "llm.scratch.width": 32, "llm.scratch.heads": 2,
    "llm.scratch.vocabulary": 400, "llm.scratch.epochs": 1, "text_encoder.max_text_tokens": 16, "model.text_dim": 16,
    "align.batch_size": 32, "align.candidates": 4, "align.max_text_tokens": 16, "tune.epochs": 1,
    "tune.checkpoint_seconds": 0, "tune.linear": True, "tune.folds": 2, "tune.recency": 0.5,
    "tower.enabled": True, "tower.epochs": 1, "tower.batch_size": 256, "tower.max_text_tokens": 16,
    "bucket.resamples": 100,
}
LAST = {"gate", "evaluate", "bucket", "report", "track"}
TUNING = {"align", "tune", "package", *LAST}
CONTROLS = {"control@gcsan-text", "control@gcsan-shuffled", "linear@gcsan"}
LEARNING = {"pretrain@gcsan", *CONTROLS, "export", "folds", "tower", *TUNING}
WEIGHTS = CHECKPOINTS / "stories260K"
RAN = re.compile(r"^Running stage '(.+)':", re.M)


def environment(root: Path) -> dict[str, str]:
    """This one without what DVC, git or MLflow sessions left in it; one thread, this Python, DVC's caches apart.

    Python writes its bytecode, as it does for a user, whatever this one says.
    """
    dropped = ("DVC_", "GIT_", "MLFLOW_", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return clean | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                    "POLARS_MAX_THREADS": "1", "DVC_SITE_CACHE_DIR": str(root.parent / "dvc"), "DVC_NO_ANALYTICS": "1"}


def run(root: Path, *command: str, status: int | None = 0, **options: Any) -> str:
    """Output and errors of a command in `root` as one text, after its exit status was compared."""
    done = subprocess.run(command, cwd=root, env=environment(root), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=1200, **options)
    if status is not None:
        assert done.returncode == status, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def change(root: Path, **values: Any) -> None:
    """Set parameters in params.yaml; `__` stands for the dot."""
    path = root / "params.yaml"
    content = yaml.safe_load(path.read_text())
    for name, value in values.items():
        *parents, leaf = name.split("__")
        section = content
        for parent in parents:
            section = section[parent]
        assert leaf in section, f"{name} is no parameter"
        section[leaf] = value
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def locked(root: Path) -> dict[str, str]:
    """MD5 by path of what the stages wrote, from dvc.lock, but for what holds times: costs, and what shows them."""
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    found = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    timed = ("reports/metrics/cost/", "reports/metrics.json", "reports/index.html", "reports/figures",
             "reports/mlflow_run.json")
    return {path: md5 for path, md5 in found.items() if not path.startswith(timed)}


def forget(root: Path, md5: str) -> None:
    """Take an output out of DVC's cache, so that it comes back by work alone."""
    (root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()


def runs(root: Path) -> dict[str, mlflow.entities.Run]:
    """The MLflow runs of a repository's own store, by run id."""
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    return {r.info.run_id: r for r in client.search_runs([e.experiment_id for e in client.search_experiments()],
                                                         "tags.kind = 'experiment'")}


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the project with small settings after its first `dvc repro`. Not to be changed: take a `copy`."""
    root = tmp_path_factory.mktemp("pipeline") / "llmgr"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    shutil.copy(DEFAULTS, root / "params.yaml")
    change(root, **{name.replace(".", "__"): value for name, value in SMALL.items()})
    for command in (["init", "-q"], ["config", "user.name", "A User"], ["config", "user.email", "user@example.org"],
                    ["config", "commit.gpgsign", "false"], ["add", "-A"], ["commit", "-qm", "clone"]):
        run(root, "git", *command)
    (root / "repro.log").write_text(run(root, "dvc", "repro"))
    run(root, "git", "commit", "-qam", "reproduced")
    return root


@pytest.fixture
def copy(reproduced: Path, tmp_path: Path) -> Path:
    """A copy of the reproduced repository, to be changed."""
    subprocess.run(["cp", "-a", reproduced, tmp_path / "llmgr"], check=True)
    return tmp_path / "llmgr"


@pytest.fixture(scope="session")
def planned(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which no model is trained, whatever its parameters: each test puts them back.

    `export` is told which encoder it reads, as it finds out when it runs: what is exported stays the same where another
    encoder changes, so that nothing after it runs, but `--force-downstream` would have it all run.
    """
    root = tmp_path_factory.mktemp("planned") / "llmgr"
    subprocess.run(["cp", "-a", reproduced, root], check=True)
    dag, lock = (yaml.safe_load((root / name).read_text()) for name in ("dvc.yaml", "dvc.lock"))
    base = yaml.safe_load((root / "params.yaml").read_text())["model"]["base"]
    (own,) = [out for stage in lock["stages"].values() for out in stage["outs"]
              if out["path"] == f"models/encoders/{base}"]
    deps = dag["stages"]["export"]["deps"]
    deps[deps.index("models/encoders")] = own["path"]
    lock["stages"]["export"]["deps"] = [own if dep["path"] == "models/encoders" else dep
                                        for dep in lock["stages"]["export"]["deps"]]
    for name, content in (("dvc.yaml", dag), ("dvc.lock", lock)):
        (root / name).write_text(yaml.safe_dump(content, sort_keys=False))
    assert "up to date" in run(root, "dvc", "repro", "--dry")
    return root


def would_run(root: Path, **changes: Any) -> set[str]:
    """The stages that `dvc repro` would run with these parameters but for `check`, which runs here where it would.

    Its output is always the same, but `--force-downstream` has everything after it run.
    """
    before = {name: (root / name).read_text() for name in ("params.yaml", "dvc.lock")}
    change(root, **changes)
    if any(name.replace("__", ".") in yaml.safe_load((root / "dvc.yaml").read_text())["stages"]["check"]["params"]
           for name in changes):
        run(root, "dvc", "repro", "check")
    said = run(root, "dvc", "repro", "--dry", "--force-downstream", status=None)
    for name, text in before.items():
        (root / name).write_text(text)
    return set(RAN.findall(said))


# ------------------------------------------------------------------------------------------------------- the whole DAG

def test_a_clone_runs_every_stage_once_and_writes_what_it_declares(reproduced: Path) -> None:
    ran = RAN.findall((reproduced / "repro.log").read_text())
    lock = yaml.safe_load((reproduced / "dvc.lock").read_text())["stages"]
    assert sorted(ran) == sorted({"check", "download", "filter", "split", "backbone"} | LEARNING)
    declared = [out["path"] for name in ran for out in lock[name]["outs"]]
    assert len(declared) > 40 and not [path for path in declared if not (reproduced / path).exists()]
    assert (reproduced / "stages/llmgr/encoders/__pycache__").is_dir()
    (folder,) = [dep for dep in lock["align"]["deps"] if dep["path"] == "stages/llmgr/encoders"]
    assert folder["nfiles"] == len(list((reproduced / folder["path"]).glob("*.py"))), "bytecode counts as code"
    assert "deepspeed" not in (reproduced / "repro.log").read_text().lower() and "accelerator" not in (
        reproduced / "repro.log").read_text(), "what nobody asked for was loaded: seconds, and a warning"
    assert run(reproduced, "git", "status", "--porcelain", "--untracked-files=all").split() == ["??", "repro.log"]


def test_a_second_repro_runs_nothing(reproduced: Path) -> None:
    with within(10, "to see that there is nothing to do"):
        said = run(reproduced, "dvc", "repro")
    assert not RAN.findall(said) and "up to date" in said


def test_a_remote_brings_back_every_output(copy: Path, tmp_path: Path) -> None:
    run(copy, "dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    run(copy, "dvc", "push")
    tuned = {path.name: digest(path) for path in (copy / "models/tuned").iterdir()}
    for folder in (".dvc/cache", "models", "data/raw", "data/core", "data/sessions", "reports/metrics/cost"):
        shutil.rmtree(copy / folder)
    run(copy, "dvc", "pull")
    assert {path.name: digest(path) for path in (copy / "models/tuned").iterdir()} == tuned
    assert "up to date" in run(copy, "dvc", "status")


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("track.experiment", "other", {"track"}),
    ("bucket.resamples", 150, {"bucket", "report", "track"}),
    ("evaluate.decay", 0.5, LAST),
    ("tune.lr", 5e-4, {"tune", "package", *LAST}),
    ("align.lr", 5e-4, TUNING),
    ("model.lora_r", 2, TUNING),
    ("model.base", "gcsan-text", {"export", "folds", *TUNING}),
    ("bucket.ours", "gcsan", {"bucket", "report", "track"}),
    ("tune.folds", 3, {"folds", "tower", "tune", "package", *LAST}),
    ("tower.lr", 5e-4, {"tower", "tune", "package", *LAST}),
    ("tower.decay", 0.5, {"tower", "tune", "package", *LAST}),
    ("slit.ridge", 50.0, {"linear@gcsan", "tune", "package", *LAST}),
    ("split.selection", True, {"split", *LEARNING}),
    ("llm.scratch.epochs", 2, {"backbone", "folds", "tower", *CONTROLS, *TUNING}),
    ("text_encoder.max_text_tokens", 8, {"backbone", "folds", "tower", *CONTROLS, *TUNING}),
    ("encoder.gcsan.lr", 5e-4, LEARNING - {"tower"}),
    ("encoder.niser.sigma", 8.0, {"report", "track"}),
    ("split.ties", "file", {"split", *LEARNING}),
    ("filter.core", 4, {"filter", "split", "backbone", *LEARNING}),
], ids=lambda value: value if isinstance(value, str) and "." in value else "to")
def test_a_parameter_reruns_what_it_touches(planned: Path, key: str, value: Any, expected: set[str]) -> None:
    assert would_run(planned, **{key.replace(".", "__"): value}) == expected


def test_another_language_model_of_the_prompts_leaves_all_that_reads_the_text_encoder(copy: Path, tmp_path: Path
                                                                                      ) -> None:
    language_model("llama").save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    change(copy, llm__name=str(tmp_path / "llama"), text_encoder__name="scratch")
    run(copy, "dvc", "repro", "backbone")
    assert set(RAN.findall(run(copy, "dvc", "repro", "--dry", "--force-downstream"))) == TUNING


def test_a_base_that_is_no_encoder_is_refused_before_any_work(planned: Path) -> None:
    before = (planned / "params.yaml").read_text()
    change(planned, model__base="gcsn")
    said = run(planned, "dvc", "repro", status=255)
    (planned / "params.yaml").write_text(before)
    run(planned, "dvc", "checkout", "data/checked")
    assert "error: model.base names gcsn, which is no encoder; the nearest is gcsan\n" in said and "Errno" not in said


def test_other_encoders_without_controls_simply_work(copy: Path) -> None:
    said = run(copy, "dvc", "exp", "run", "-S", "encoder.names=[sasrec,gru4rec]", "-S", "encoder.controls=[]")
    lines = [line for line in said.splitlines() if "left out" in line or "in place of" in line]
    assert [line.split(":")[0] for line in lines] == [
        "model.base=sasrec in place of gcsan, which encoder.names, encoder.controls and encoder.control_texts do not "
        "train", "gate gated-gcsan-text left out", "gate gated-both left out"]
    assert set(read_json(copy / "reports/metrics/evaluate.json")) == {
        *BASELINES, "tower", "sasrec", "gru4rec", "gcsan-linear", "prior", "llmgr", "gated-llmgr",
        "served"}
    assert read_json(copy / "models/folds/config.json")["base"]["name"] == "sasrec"
    assert set(RAN.findall(said)) >= {"check", "pretrain@sasrec", "pretrain@gru4rec", "export", "folds", "tune"}
    assert "tower" not in RAN.findall(said)


# ------------------------------------------------------------------------------------------------------------- figures

def figures(ranks: list[int]) -> dict[str, float]:
    """The nine metrics, straight from their definitions."""
    gain = {"hr": lambda r: 1.0, "ndcg": lambda r: 1 / log2(r + 1), "mrr": lambda r: 1 / r}
    return {f"{name}_at_{k}": sum(of(r) for r in ranks if r <= k) / len(ranks) for name, of in gain.items()
            for k in (5, 10, 20)}


def test_the_logits_start_from_what_fits_later_clicks(reproduced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reproduced)
    settings = loading.load("params.yaml")
    train, place = read_split(FILES, "train", settings.data.max_session)[0], torch.device("cpu")
    fitted = load_tensors("models/tuned/prior.safetensors")
    for recency in (0.5, 1.0):
        prior = build_prior(settings, FILES, train, place)
        prior.fit(train, settings.seed, recency)
        assert all(torch.allclose(fitted[name], value, atol=0.02, rtol=0.02)
                   for name, value in prior.state_dict().items()) == (recency == 0.5)


def test_every_reported_figure_follows_from_the_ranks(reproduced: Path) -> None:
    items = pl.read_parquet(reproduced / "data/core/items.parquet")
    test = pl.read_parquet(reproduced / "data/sessions/test.parquet")
    counts = dict(items.select("item_id", "count").iter_rows())
    evaluated, bucketed, gaps = (read_json(reproduced / f"reports/metrics/{name}.json")
                                 for name in ("evaluate", "buckets", "differences"))
    assert set(evaluated) == set(bucketed) == {*BASELINES, "tower", "gcsan", "gcsan-text", "gcsan-shuffled",
                                               "gcsan-linear", "llmgr", "prior", "served", "gated-gcsan-text",
                                               "gated-llmgr", "gated-both"}
    for model in evaluated:
        table = pl.read_parquet(reproduced / f"reports/ranks/{model}.parquet")
        assert table["target"].to_list() == test["target"].to_list()
        assert (table["rank_unseen"] <= table["rank"]).all() and table["rank"].is_between(1, items.height).all()
        for name, column in (("test", "rank"), ("test_unseen", "rank_unseen")):
            expected = figures(table[column].to_list())
            assert evaluated[model][name]["all"] == pytest.approx(expected, abs=1e-6), model
            found = bucketed[model][name]["all"]
            assert found.pop("n") == test.height and found == pytest.approx(expected, abs=1e-6), model
            cold = table.filter(table["target"].replace_strict(counts).is_between(5, 10))
            found = bucketed[model][name]["cold"]
            assert found.pop("n") == cold.height and found == pytest.approx(figures(cold[column].to_list()), abs=1e-6)
    for other, by in gaps.items():
        for metric, gap in by["test"]["all"].items():
            difference = evaluated["llmgr"]["test"]["all"][metric] - evaluated[other]["test"]["all"][metric]
            assert gap["difference"] == pytest.approx(difference, abs=3e-6), (other, metric)
    (published,) = runs(reproduced).values()
    assert published.data.metrics["test.all/ndcg_at_20"] == evaluated["llmgr"]["test"]["all"]["ndcg_at_20"]
    page = (reproduced / "reports/index.html").read_text()
    assert f"{evaluated['llmgr']['test']['all']['hr_at_20']:.4f}" in page


# ------------------------------------------------------------------------------------------------------------- leakage

def test_the_real_server_ranks_targets_as_evaluate_wrote(reproduced: Path, tmp_path: Path) -> None:
    """The registered model, asked over HTTP for the whole catalogue: a target stands where `served` ranked it."""
    ids = ["", *pl.read_parquet(reproduced / "models/recommender/items.parquet")["item"]]
    test = pl.read_parquet(reproduced / "data/sessions/test.parquet").head(40)
    sessions = [{"items": [ids[number] for number in [*row["earlier"], *row["items"]]]}
                for row in test.iter_rows(named=True)]
    ranks = pl.read_parquet(reproduced / "reports/ranks/served.parquet").head(40)
    assert ranks["target"].equals(test["target"])
    server, compared = Server(f"sqlite:///{reproduced}/mlflow.db", "models:/llmgr@best", None, tmp_path / "log"), 0
    try:
        for column, without in (("rank", False), ("rank_unseen", True)):
            status, answer = server.ask({"inputs": sessions, "params": {"k": len(ids), "exclude_seen": without}})
            assert status == 200
            for row, rank, target in zip(answer["predictions"], ranks[column], ranks["target"], strict=True):
                scores = torch.tensor(row["scores"])
                if ids[target] not in row["items"]:
                    continue  # clicked before: the server leaves it out, evaluate ranks it all the same
                own = scores[row["items"].index(ids[target])]
                near = 1e-5 * max(1.0, float(scores.abs().max()))  # rounding of batches of another size
                assert (scores > own + near).sum() < rank <= (scores >= own - near).sum()
                compared += 1
        assert compared > len(test)
    finally:
        server.stop()


def test_training_sessions_end_before_the_held_out_items(reproduced: Path) -> None:
    parts = {name: pl.read_parquet(reproduced / f"data/sessions/{name}.parquet") for name in ("train", "valid", "test")}
    bought = dict(pl.read_parquet(reproduced / "data/core/interactions.parquet").join(
        pl.read_parquet(reproduced / "data/core/items.parquet").select("item", "item_id"), on="item"
    ).group_by("user").agg("item_id").iter_rows())
    assert {user: len(items) for user, items in bought.items()} == {
        user: len(earlier) + len(items) + 1 for user, items, _, earlier in parts["test"].iter_rows()}
    held = {user: {target} for user, target in parts["test"].select("user", "target").iter_rows()}
    for user, items, target, earlier in parts["valid"].iter_rows():
        assert not held[user] & {target, *items, *earlier}
        held[user].add(target)
    seen = 0
    for user, items, target in parts["train"].iter_rows():
        assert not held[user] & {target, *items}, f"{user}'s held-out items are in its training sessions"
        seen += 1
    assert seen == sum(len(items) - 3 for items in bought.values())


@pytest.mark.parametrize(("name", "script"), [
    ("encoders/gcsan-text", ["pretrain", "--encoder", "gcsan-text"]),
    ("encoders/gcsan-linear", ["linear", "--encoder", "gcsan"]), ("folds", ["folds"]), ("tower", ["tower"]),
    ("aligned", ["align"]), ("tuned", ["tune"]), ("gates", ["gate"])
], ids=["control", "linear", "folds", "tower", "align", "tune", "gate"])
def test_training_by_hand_without_the_test_sessions_gives_the_same_model(copy: Path, name: str, script: list[str]
                                                                         ) -> None:
    model = copy / "models" / name
    before = digest(model)
    shutil.rmtree(model)
    (copy / "data/sessions/test.parquet").unlink()
    (copy / "data/core/interactions.parquet").unlink()
    items = pl.read_parquet(copy / "data/core/items.parquet")
    items.with_columns(count=pl.lit(5, pl.Int32)).write_parquet(copy / "data/core/items.parquet")
    assert stage(*script, root=copy) == 0
    assert digest(model) == before, "training read something of the test split, or is not the same twice"


def test_the_benchmark_runs_on_what_a_repro_left(copy: Path, capfd: pytest.CaptureFixture) -> None:
    assert stage("bench", root=copy) == 0
    said = capfd.readouterr().err
    rate, part = re.search(r"([\d,]+) useful tokens/s.* (\d+)% of the machine", said).groups()
    assert float(rate.replace(",", "")) > 10 and 0 <= int(part) <= 100
    assert re.search(r"sessions/s: [\d.]+; plain loop [\d.]+ .*: [\d.]+ times", said) and "a step's time: " in said


def test_the_benchmark_takes_the_shape_of_a_model_that_is_not_there(copy: Path, capfd: pytest.CaptureFixture) -> None:
    shape = json.loads((copy / "stages/presets/llama-2-7b.json").read_text())
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]) == (4096, 32, 11008)
    shape |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
              "num_key_value_heads": 4}
    (copy / "shape.json").write_text(json.dumps(shape))
    assert stage("bench", "--shape", "shape.json", root=copy) == 0
    assert "of the machine" in capfd.readouterr().err
    assert stage("bench", "--shape", "nowhere.json", root=copy) == 2
    assert "nowhere.json is missing" in capfd.readouterr().err
    for text, told in ((json.dumps(shape | {"vocab_size": 100}), "must have max_position_embeddings and a vocab_size"),
                       (json.dumps(shape | {"vocab_size": -1}), "is no config.json"), ("{", "is no config.json"),
                       (json.dumps(shape | {"hidden_size": 30}), "is no config.json"),
                       (json.dumps(shape | {"model_type": "t5"}), "is an encoder with a decoder")):
        (copy / "shape.json").write_text(text)
        assert stage("bench", "--shape", "shape.json", root=copy) == 2
        assert f"error: shape.json {told}" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------- experiments

def test_an_experiment_runs_what_it_touches_and_going_back_finds_the_first_run(copy: Path) -> None:
    first, before = read_json(copy / "reports/mlflow_run.json"), locked(copy)
    said = run(copy, "dvc", "exp", "run", "-n", "narrow", "-S", "model.lora_r=2", "-S", "tune.lr=1e-5")
    assert set(RAN.findall(said)) == TUNING
    second = read_json(copy / "reports/mlflow_run.json")
    assert locked(copy)["models/tuned"] != before["models/tuned"]
    found = runs(copy)
    assert set(found) == {first["run_id"], second["run_id"]} and second["name"] == "narrow"
    of = found[second["run_id"]].data.params
    assert (of["model.lora_r"], float(of["tune.lr"])) == ("2", 1e-5)
    unlike = {name for name, value in found[first["run_id"]].data.params.items() if of[name] != value}
    assert unlike == {"model.lora_r", "tune.lr"}

    run(copy, "git", "checkout", "-q", "--", "params.yaml")
    said = run(copy, "dvc", "repro")
    assert set(RAN.findall(said)) == {"bucket", "report", "track"}, "going back trained anew what DVC had kept"
    assert locked(copy) == before
    assert read_json(copy / "reports/mlflow_run.json")["run_id"] == first["run_id"], said
    assert set(runs(copy)) == set(found), "going back published a duplicate"


def test_an_encoder_that_is_left_out_leaves_report_and_run(copy: Path) -> None:
    change(copy, encoder__control_texts=["text"])
    assert [stage(name, root=copy) for name in ("evaluate", "bucket", "report", "track")] == [0] * 4
    run_id = read_json(copy / "reports/mlflow_run.json")["run_id"]
    client = mlflow.MlflowClient(f"sqlite:///{copy}/mlflow.db")
    below = client.search_runs([runs(copy)[run_id].info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    names = {*(run.info.run_name for run in below), *(f.path for f in client.list_artifacts(run_id, "metrics/cost"))}
    assert [name for name in names if "gcsan-text" in name] and not [name for name in names if "shuffled" in name]
    assert "gcsan-shuffled" not in (copy / "reports/index.html").read_text()


def test_an_experiment_in_a_temporary_copy_shares_store_and_code(copy: Path) -> None:
    before = (copy / "params.yaml").read_text(), read_json(copy / "reports/mlflow_run.json")["run_id"]
    said = run(copy, "dvc", "exp", "run", "--temp", "-n", "apart", "-S", "bucket.resamples=150")
    assert set(RAN.findall(said)) == {"bucket", "report", "track"}
    assert ((copy / "params.yaml").read_text(), read_json(copy / "reports/mlflow_run.json")["run_id"]) == before
    (run_id,) = set(runs(copy)) - {before[1]}
    published = runs(copy)[run_id]
    assert (published.info.run_name, published.data.params["bucket.resamples"]) == ("apart", "150")
    assert not list((copy / ".dvc/tmp/exps").glob("*/mlflow.db")), "the copy kept a store of its own"
    assert json.loads(run(copy, "dvc", "exp", "show", "--json"))


def test_the_papers_literal_form_runs_to_the_report(copy: Path, tmp_path: Path) -> None:
    preset = changes(ROOT / "stages/presets/paper.txt")
    assert preset["model.output"] == "linear" and preset["tune.targets"] == "prefix" and preset["tune.epochs"] == 3
    small = {"llm.name": str(WEIGHTS), "tune.samples": 128, "tune.valid_sessions": 20}
    if not WEIGHTS.is_dir():
        small["llm.name"] = str(tmp_path / "llama")
        language_model("llama").save_pretrained(tmp_path / "llama")
        tokenizer().save_pretrained(tmp_path / "llama")
    change(copy, **{key.replace(".", "__"): value for key, value in (preset | small).items()},
           gate__fuse={"gated-gcsan-text": ["gcsan-text", "text-knn"]})
    for name in ("backbone", "align", "tune", "gate", "evaluate", "bucket", "report"):
        assert stage(name, root=copy) == 0, name
    written = load_tensors(copy / "models/tuned/llmgr.safetensors")
    items = pl.read_parquet(copy / "data/core/items.parquet").height
    free = [name for name, tensor in written.items() if tensor.dim() == 2 and tensor.shape[0] == items + 1]
    assert free and [name for name in written if "lora_A" in name], sorted(written)
    tuned, cost = (read_json(copy / f"reports/metrics/{name}.json") for name in ("tune", "cost/tune"))
    assert tuned["epochs"] == 3 and cost["tokens_per_second"] > 0
    losses = pl.read_csv(copy / "reports/curves/tune_epochs.csv")["valid_loss"].to_list()
    assert len(losses) == 4 and losses[-1] < losses[0], "before the first epoch, and after each of three"
    page = (copy / "reports/index.html").read_text()
    assert f"<code>{Path(small['llm.name']).name}</code>, Llama" in page
    assert f"{read_json(copy / 'reports/metrics/evaluate.json')['llmgr']['test']['all']['hr_at_20']:.4f}" in page


def test_launch_parameters_alone_put_a_stage_into_two_processes(copy: Path) -> None:
    change(copy, model__dropout=0.0, tune__train_encoder="none", tune__precision="fp32")  # dropout strikes elsewhere
    curves = {}
    for processes, strategy in ((1, "ddp"), (2, "zero2")):
        change(copy, launch__processes=processes, launch__strategy=strategy, launch__device="cpu")
        said = run(copy, "dvc", "repro", "--single-item", "tune")
        assert said.count("tune: epoch 1 ") == 1, said
        curves[processes] = pl.read_csv(copy / "reports/curves/tune_steps.csv")["loss"].to_list()
        assert ("2 processes" in read_json(copy / "reports/metrics/cost/tune.json")["hardware"]) == (processes == 2)
    assert curves[2] == pytest.approx(curves[1], rel=1e-4) and len(curves[1]) > 5
    assert not list((copy / ".resume").glob("*/*/*"))


# --------------------------------------------------------------------------------------- determinism and interruptions

@pytest.mark.parametrize(("name", "model"), [("pretrain@gcsan", "models/encoders/gcsan"), ("tune", "models/tuned")],
                         ids=["pretrain", "tune"])
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(copy: Path, name: str, model: str) -> None:
    before, resume = locked(copy), copy / ".resume"
    forget(copy, before[model])
    command = subprocess.Popen(["dvc", "repro", "--force", "--single-item", name], cwd=copy, env=environment(copy),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: list(resume.rglob("state.pt")), command)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    assert list(resume.rglob("state.pt")), "the stage had finished before it was killed"
    assert not (copy / model).exists(), "a half-trained model lies where a finished one belongs"
    said = run(copy, "dvc", "repro", name)
    assert re.search(r"resuming at step [1-9]", said), said
    assert locked(copy) == before
    assert not list(resume.glob("*/*/*")), "the resume state outlived the training"


def wait_for(found: Callable[[], Any], command: subprocess.Popen) -> None:
    """Until something is found while the command runs."""
    deadline = time.monotonic() + 600
    while not found():
        assert command.poll() is None, "the stage ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint within ten minutes"
        time.sleep(0.005)


@pytest.mark.parametrize(("name", "script", "model", "disk"), [
    ("split", ["split.py"], "data/sessions", ("data/sessions", 16)),
    ("split", ["split.py"], "data/sessions", None),
    ("tune", ["tune.py"], "models/tuned", (".resume", 64)),
], ids=["split", "split, a file limit", "tune"])
def test_a_full_disk_is_one_sentence_and_the_next_repro_completes(copy: Path, name: str, script: list[str], model: str,
                                                                 disk: tuple[str, int] | None) -> None:
    before = locked(copy)
    forget(copy, before[model])
    shutil.rmtree(copy / model)
    command = [sys.executable, f"stages/{script[0]}", *script[1:]]
    if disk is None:
        limit = (4 * 1024, 4 * 1024)  # where nothing may be mounted
        said = run(copy, *command, status=2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    else:
        with small_disk(copy / disk[0], disk[1]):
            said = run(copy, *command, status=2)
    assert "Traceback" not in said and said.splitlines()[-1].startswith("error: the disk is full"), said
    assert RAN.findall(run(copy, "dvc", "repro", name)) == [name]
    assert locked(copy) == before
    assert not [p for p in copy.rglob(".*.tmp") if ".dvc" not in p.parts], "unfinished files were left behind"


# --------------------------------------------------------------------------------------------------------- wrong input

@pytest.mark.parametrize(("setting", "told"), [
    ("tune.lr=fast", "tune.lr=fast must be a number"),
    ("encoder.names=[gcsam]", "encoder.names holds gcsam, which is no encoder; the nearest is gcsan"),
], ids=["type", "encoder"])
def test_a_wrong_parameter_is_one_sentence_of_the_stage(copy: Path, setting: str, told: str) -> None:
    said = run(copy, "dvc", "exp", "run", "-S", setting, status=None)
    (sentence,) = re.findall(r"^error: (.+)$", said, re.M)
    assert sentence.startswith(told) and "Traceback" not in said, said
    assert re.search(r"failed to run: python stages/\w+\.py, exited with 2", said), said


def refused(copy: Path, capfd: pytest.CaptureFixture, name: str, *arguments: str) -> str:
    """The one sentence with which a stage stops, after its exit status was seen to be 2."""
    capfd.readouterr()
    assert stage(name, *arguments, root=copy) == 2
    said = capfd.readouterr().err
    (sentence,) = re.findall(r"^error: (.+)$", said, re.M)
    assert "Traceback" not in said and said.endswith(f"error: {sentence}\n"), said
    return sentence


def test_a_catalogue_too_large_for_the_linear_model_is_refused_before_any_training(
        copy: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "capacity", lambda: 1e4)
    said = refused(copy, capfd, "split")
    assert "there are 0.0 GB; set tune.linear=false, tune.folds=0 and encoder.linear_controls=[]" in said
    change(copy, tune__linear=False, tune__folds=0, encoder__linear_controls=[])
    assert stage("split", root=copy) == 0


def test_test_is_not_scored_while_parameters_are_chosen(copy: Path, capfd: pytest.CaptureFixture) -> None:
    before = digest(copy / "reports/ranks")
    change(copy, split__selection=True)
    assert "test is not scored: name gate as the last stage" in refused(copy, capfd, "evaluate")
    assert digest(copy / "reports/ranks") == before


def test_a_backbone_without_safetensors(copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text("{}")
    (tmp_path / "llama/pytorch_model.bin").write_bytes(b"pickle")
    change(copy, llm__name=str(tmp_path / "llama"))
    before = digest(copy / "models/backbone")
    assert "has no *.safetensors: convert its weights" in refused(copy, capfd, "backbone")
    assert digest(copy / "models/backbone") == before, "what was there is gone, and nothing came of it"


def test_adapters_for_layers_that_are_not_there(copy: Path, capfd: pytest.CaptureFixture) -> None:
    change(copy, model__lora_targets=["nothing"])
    assert refused(copy, capfd, "align").startswith(
        "model.lora_targets=nothing: the backbone has no linear layer nothing; it has ")


@pytest.mark.parametrize(("name", "told"), [
    ("gcsam", "gcsan"), ("gcsan-txt", "gcsan-text"), ("gcsan-", "after the hyphen stands text, shuffled or linear"),
    ("gcsan-text-text", "after the hyphen stands text, shuffled or linear"), ("training", "no encoder"),
    ("gcsan-linear", "run stages/linear.py --encoder gcsan"),
])
def test_an_encoder_by_hand_that_is_none(copy: Path, capfd: pytest.CaptureFixture, name: str, told: str) -> None:
    assert told in refused(copy, capfd, "pretrain", "--encoder", name)


def test_a_missing_input_names_the_file_and_the_mend(copy: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.rmtree(copy / "models/aligned")
    assert re.match(r"models/aligned\S* is missing: run `dvc repro`", refused(copy, capfd, "tune"))


def test_diverged_vectors_stop_before_the_tuning(copy: Path, capfd: pytest.CaptureFixture) -> None:
    path = copy / "models/encoders/gcsan/items.safetensors"
    vectors = load_tensors(path)["vectors"].clone()
    vectors[3] = float("nan")
    path.unlink()
    save_tensors(path, {"vectors": vectors})
    assert "not finite: lower encoder.gcsan.lr" in refused(copy, capfd, "export")
