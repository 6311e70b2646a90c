"""One MLflow run an experiment, published from the pipeline's files: parameters, metrics, curves, artifacts, lineage.

Publishing is idempotent: a run is known by a key over parameters and results, so that coming back to earlier
parameters finds the earlier run, and a run that a killed publisher left behind is replaced.
"""
from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmgr.params.names import HEADLINE
from llmgr.reporting.evidence import left_behind
from llmgr.runtime.artifacts import digest, read_json, replacing
from llmgr.runtime.errors import UserError, disk_is_full
from llmgr.runtime.masking import masked, masked_all
from llmgr.runtime.resume import home

KEY = "llmgr.key"
PACKAGES = ("torch", "transformers", "peft", "polars", "numpy", "mlflow", "dvc")
RESULTS = ("metrics", "curves", "plots", "ranks")
TIMED = "metrics/cost/"  # differs between two runs of the same experiment
POINTS = 1000  # of a curve; the whole of it is among the artifacts
PROBE_SECONDS = "5"
LOCK_SECONDS = 600


def key(parameters: Mapping[str, Any], reports: Path) -> str:
    """Hex digest of the parameters and of every result that does not depend on timing."""
    total, ignored = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()), left_behind(reports)
    for path in sorted(path for folder in RESULTS for path in (reports / folder).rglob("*.*") if path not in ignored):
        name = path.relative_to(reports).as_posix()
        if not name.startswith(TIMED) and not path.name.startswith("."):
            total.update(f"{name}\0{digest(path)}\n".encode())
    return total.hexdigest()[:32]


def metrics(reports: Path) -> dict[str, float]:
    """Every figure by its MLflow name: `test.cold.ndcg_at_20` is LLMGR's, `gcsan.test.all.hr_at_20` another model's.

    Also `NAME.low` and `.high` for LLMGR's intervals, `difference.OTHER.*` at cutoff 20, `n.*` sessions by bucket,
    `cost.PART.*`, and the numbers that the other stages wrote under the stage's name. The rest is in the artifacts: a
    run with every interval of every model would be slow to browse.
    """
    folder = reports / "metrics"
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for inner, content in value.items():
                add(f"{name}.{inner}", content)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[legal(name)] = float(value)

    for model, by in [*read_json(folder / "evaluate.json").items(), *read_json(folder / "buckets.json").items()]:
        for split, in_buckets in by.items():
            for bucket, figures in in_buckets.items():
                add(f"n.{split}.{bucket}", figures.get("n"))
                add(f"{split}.{bucket}" if model == "llmgr" else f"{model}.{split}.{bucket}",
                    {name: value for name, value in figures.items() if name != "n"})
    for split, by in read_json(folder / "intervals.json").get("llmgr", {}).items():
        for bucket, bounds in by.items():
            for metric, (low, high) in bounds.items():
                add(f"{split}.{bucket}.{metric}", {"low": low, "high": high})
    for other, by in read_json(folder / "differences.json").items():
        for split, in_buckets in by.items():
            for bucket, gaps in in_buckets.items():
                for metric in HEADLINE:
                    gap = dict(gaps[metric])
                    add(f"difference.{other}.{split}.{bucket}.{metric}", gap.pop("difference"))
                    add(f"difference.{other}.{split}.{bucket}.{metric}", gap)
    known = {"evaluate", "buckets", "intervals", "differences"}
    for path in sorted({*folder.rglob("*.json")} - left_behind(reports)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name not in known:
            add(name.replace("/", ".").replace("encoders.", "encoder."), read_json(path))
    first = [f"test.all.{metric}" for metric in HEADLINE]  # what the page that compares runs draws unasked
    return {name: found[name] for name in first if name in found} | found


def curves(paths: Iterable[Path]) -> Iterator[tuple[str, float, int]]:
    """(name, value, step) of every curve, at most `POINTS` of each: `curve.tune.loss`, `curve.gcsan.valid_hr_at_20`."""
    for path in sorted(paths):
        part = path.stem.removesuffix("_steps").removesuffix("_epochs")
        with path.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        every = -(-len(rows) // POINTS)
        for row in rows[::-1][::every][::-1] if rows else []:  # the last point stays
            for column, value in row.items():
                if column not in ("step", "epoch") and value:
                    yield legal(f"curve.{part}.{column}"), float(value), int(float(row["step"]))


def legal(name: str) -> str:
    """`name` with what MLflow refuses in a name replaced."""
    return re.sub(r"[^\w\-./: ]", "_", name)


def datasets(lock: Path, data: Path) -> dict[str, str]:
    """Digest by folder of `data/`: DVC's from dvc.lock where it has them, else MD5 of what is there."""
    import yaml

    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
    found = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", ())
             if out["path"].startswith("data/") and out.get("md5", "").endswith(".dir")}
    if found:
        return found
    return {path.as_posix(): digest(path, "md5") for path in sorted(data.glob("[!.]*")) if path.is_dir()}


def tags(key: str) -> dict[str, str]:
    """Versions, revisions and the experiment's names in DVC; nothing about the machine beyond its platform."""
    found = {KEY: key, "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if revision.returncode == 0:
        found["mlflow.source.git.commit"] = revision.stdout.strip()
    named = {"dvc.experiment": "DVC_EXP_NAME", "dvc.baseline": "DVC_EXP_BASELINE_REV"}
    return found | {tag: os.environ[name] for tag, name in named.items() if os.environ.get(name)}


def store(uri: str | None) -> str:
    """Where runs are kept: `uri`, else MLFLOW_TRACKING_URI, else sqlite under the repository root.

    A relative sqlite path is taken from that root, so that DVC's temporary copies share it.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{(home() / uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def beside(address: str) -> Path:
    """Where a store's lock and artifacts lie: beside a sqlite file, which clones may share, else in the root."""
    file = _file(address)
    return home() if file is None else file.parent


def _file(address: str) -> Path | None:
    """The file of a sqlite store."""
    return Path(address.removeprefix("sqlite:///").partition("?")[0]) if address.startswith("sqlite:///") else None


def publish(parameters: Mapping[str, Any], experiment: str, uri: str | None, reports: Path) -> dict[str, str]:
    """Publish the results under `reports`, or find the run that already holds them; what stands in mlflow_run.json.

    UserError where the store cannot be reached or does not answer as one.
    """
    values, identity = metrics(reports), key(parameters, reports)
    name = os.environ.get("DVC_EXP_NAME") or f"{parameters['data.dataset']}-{identity[:8]}"
    with _opened(experiment, uri, "dvc repro track") as (client, experiment_id):
        run = _published(client, experiment_id, identity, name, {}, lambda run_id: _fill(
            client, run_id, parameters, values, reports))
    return {"run_id": run.info.run_id, "experiment": experiment, "name": run.info.run_name, "key": identity,
            "store": store(uri).split(":", 1)[0]}


def publish_trials(model: str, trials: Iterable[Any], experiment: str, uri: str | None) -> None:
    """Publish the trials of a model's search, each a run of its own (tag `llmgr.search`), those that are not there yet.

    Metrics are `valid.ndcg_at_20` and its like, best epoch and seconds: no test session was scored. UserError as
    `publish`.
    """
    from mlflow.entities import Metric

    with _opened(experiment, uri, f"python stages/pick.py --model {model} --dataset ...") as (client, experiment_id):
        for trial in trials:
            logged = {name: value for name, value in trial.parameters.items() if not name.startswith("track.")}
            values = {f"valid.{name}" if name.startswith(("hr_", "ndcg_", "mrr_")) else name: value
                      for name, value in trial.metrics.items() if value is not None}
            told = json.dumps([model, logged, {name: v for name, v in values.items() if name != "seconds"}])
            identity = hashlib.sha256(told.encode()).hexdigest()[:32]
            now = int(time.time() * 1000)

            def fill(run_id: str, logged: Mapping = logged, values: Mapping = values, now: int = now) -> None:
                _log_parameters(client, run_id, logged)
                client.log_batch(run_id, metrics=[Metric(legal(name), value, now, 0) for name, value in values.items()])

            _published(client, experiment_id, identity, f"{model}-{trial.name}",
                       {"llmgr.search": model, "dvc.experiment": trial.name}, fill)


@contextlib.contextmanager
def _opened(experiment: str, uri: str | None, again: str) -> Iterator[tuple[Any, str]]:
    """A client of the store and the experiment's id, while no other process publishes.

    UserError where that fails; `again` is the command that repeats it.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import filelock
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)  # its traces of what is said here in a sentence
    address = store(uri)
    kind = address.split(":", 1)[0]
    shown = kind if kind == "sqlite" else address
    try:
        with filelock.FileLock(beside(address) / ".mlflow.lock", timeout=LOCK_SECONDS):
            _create(mlflow, address)
            client = _client(mlflow, address)
            yield client, _experiment(client, experiment, address)
    except filelock.Timeout:
        raise UserError(f".mlflow.lock has been held for {LOCK_SECONDS} s by another process that publishes: wait for "
                        f"it, then run `{again}` again") from None
    except (MlflowException, OSError) as error:
        if disk_is_full(error):
            raise
        told = f"the MLflow store ({shown}) did not take the run ({masked(' '.join(str(error).split()))[:160]})"
        raise UserError(masked(told) + ": mend track.uri or MLFLOW_TRACKING_URI, or start the "
                        f"server, and run `{again}` again") from None


def _published(client: Any, experiment_id: str, identity: str, name: str, further: Mapping[str, str],
               fill: Callable[[str], None]) -> Any:
    """The finished run with this key, made with `further` tags and filled where there is none."""
    run = _finished(client, experiment_id, identity)
    if run is None:
        run = client.create_run(experiment_id, tags=tags(identity) | further, run_name=name)
        fill(run.info.run_id)
        client.set_terminated(run.info.run_id, "FINISHED")
    return run


def _create(mlflow: Any, address: str) -> None:
    """A new sqlite store takes its name when it is whole: one that was killed or ran full halfway never opens again."""
    file = _file(address)
    if file is None or file.exists():
        return
    for leftover in file.parent.glob(f".{file.name}.*.tmp*"):
        leftover.unlink()
    with replacing(file) as temporary:
        _client(mlflow, f"sqlite:///{temporary}")


def _client(mlflow: Any, address: str) -> Any:
    """A client whose store has answered; a server that does not answer is given up after a few seconds."""
    patience = {"MLFLOW_HTTP_REQUEST_TIMEOUT": PROBE_SECONDS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in patience}
    os.environ.update(patience)
    try:
        client = mlflow.MlflowClient(tracking_uri=address)
        client.search_experiments(max_results=1)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return client


def _experiment(client: Any, name: str, address: str) -> str:
    found = client.get_experiment_by_name(name)
    # A database store would put artifacts below the current folder, which in DVC's temporary copies vanishes.
    place = None if address.startswith("http") else (beside(address) / "mlartifacts").resolve()
    if found is None:
        return client.create_experiment(name, artifact_location=place and place.as_uri())
    if found.lifecycle_stage == "deleted":
        raise UserError(f"track.experiment={name} was deleted in MLflow: restore it there or choose another name")
    file, former = _file(address), found.artifact_location
    if file and place.is_dir() and former != place.as_uri() and re.fullmatch("file:.*/mlartifacts", former):
        _follow(file, former, place.as_uri())
    return found.experiment_id


def _follow(store: Path, former: str, place: str) -> None:
    """Lead the links of a store that was moved, or copied, to the artifacts beside it: MLflow keeps them absolute."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(store, timeout=60)) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, "
                             "?) = ?", (place, len(former) + 1, len(former) + 1, former + "/"))


def _finished(client: Any, experiment_id: str, identity: str) -> Any:
    """The finished run with this key; leftovers of killed publishers are deleted."""
    runs = client.search_runs([experiment_id], f"tags.`{KEY}` = '{identity}'", order_by=["attributes.start_time ASC"])
    finished = None
    for run in runs:
        if run.info.status == "FINISHED":
            finished = finished or run
        else:
            client.delete_run(run.info.run_id)
    return finished


def _log_parameters(client: Any, run_id: str, parameters: Mapping) -> None:
    from mlflow.entities import Param

    texts = [Param(k, v if isinstance(v, str) else json.dumps(v)) for k, v in masked_all(parameters).items()]
    for start in range(0, len(texts), 100):
        client.log_batch(run_id, params=texts[start:start + 100])


def _fill(client: Any, run_id: str, parameters: Mapping, values: Mapping, reports: Path) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    _log_parameters(client, run_id, parameters)
    kept = {path for folder in ("figures", "metrics", "curves", "plots") for path in (reports / folder).rglob("*.*")}
    kept -= left_behind(reports)
    now = int(time.time() * 1000)
    points = [Metric(name, value, now, 0) for name, value in values.items()]
    points += [Metric(name, value, now, step) for name, value, step in curves(
        path for path in kept if path.parent.name == "curves")]
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=points[start:start + 1000])
    client.log_inputs(run_id, [
        DatasetInput(Dataset(path, content[:36], "dvc", json.dumps({"path": path, "md5": content})),
                     [InputTag("mlflow.data.context", path.split("/")[1])])
        for path, content in datasets(Path("dvc.lock"), Path("data")).items()])
    client.log_artifact(run_id, str(reports / "index.html"))
    for path in sorted(kept):
        client.log_artifact(run_id, str(path), path.parent.relative_to(reports).as_posix())
