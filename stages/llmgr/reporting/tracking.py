"""One MLflow run an experiment, and a run of each model below it, published from the pipeline's files.

Publishing is idempotent: a run is known by a key over parameters and results, so that coming back to earlier
parameters finds the earlier run, and a run that a killed publisher left behind is replaced. Tags to filter by: `kind`
(experiment, model or trial), `dataset`, `base`, `backbone`, `seed`, and `model` where a run is one's.
"""
from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmgr.params.loading import flat
from llmgr.params.names import HEADLINE, SERVED
from llmgr.params.schema import Params
from llmgr.reporting import runs
from llmgr.reporting.cost import training_parts
from llmgr.reporting.evidence import MAIN, evidence, left_behind
from llmgr.reporting.naming import describe, llm_name, text_encoder_name
from llmgr.reporting.runs import legal
from llmgr.reporting.store import address_of, finished, opened
from llmgr.runtime.artifacts import digest, read_json
from llmgr.runtime.masking import masked, masked_all
from llmgr.serving.registry import log_package

KEY = "llmgr.key"
LAYOUT = "2"  # of a run: what was published in another is not what is published now
PACKAGES = ("torch", "transformers", "peft", "polars", "numpy", "mlflow", "dvc")
RESULTS = ("metrics", "curves", "plots", "ranks")
TIMED = "metrics/cost/"  # differs between two runs of the same experiment
VIEW = "columns"  # name of the column set that every experiment has


def key(parameters: Mapping[str, Any], reports: Path) -> str:
    """Hex digest of the parameters and of every result that does not depend on timing."""
    total, ignored = hashlib.sha256(json.dumps([LAYOUT, parameters], sort_keys=True).encode()), left_behind(reports)
    for path in sorted(path for folder in RESULTS for path in (reports / folder).rglob("*.*") if path not in ignored):
        name = path.relative_to(reports).as_posix()
        if not name.startswith(TIMED) and not path.name.startswith("."):
            total.update(f"{name}\0{digest(path)}\n".encode())
    return total.hexdigest()[:32]


def datasets(lock: Path, data: Path) -> dict[str, str]:
    """Digest by folder of `data/`: DVC's from dvc.lock where it has them, else MD5 of what is there."""
    import yaml

    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
    made = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", ())
            if data in Path(out["path"]).parents and out.get("md5", "").endswith(".dir")}
    if made:
        return made
    return {path.as_posix(): digest(path, "md5") for path in sorted(data.glob("[!.]*")) if path.is_dir()}


def tags(key: str) -> dict[str, str]:
    """Versions, revisions and the experiment's names in DVC; nothing about the machine beyond its platform."""
    known = {KEY: key, "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            known[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if revision.returncode == 0:
        known["mlflow.source.git.commit"] = revision.stdout.strip()
    named = {"dvc.experiment": "DVC_EXP_NAME", "dvc.baseline": "DVC_EXP_BASELINE_REV"}
    return known | {tag: os.environ[name] for tag, name in named.items() if os.environ.get(name)}


def kinds(params: Params) -> dict[str, str]:
    """Tags to filter runs by."""
    return {"kind": "experiment", "dataset": params.data.dataset, "base": params.model.base,
            "backbone": llm_name(params), "text_encoder": text_encoder_name(params), "seed": str(params.seed)}


def publish(params: Params, reports: Path, package: Path | None = None) -> dict[str, str]:
    """Publish the results under `reports`, or find the run that already holds them; what stands in mlflow_run.json.

    `params` are all parameters. A new run gets the folder `package` as a model, which `llmgr.serving.registry`
    registers. UserError where the store cannot be reached or does not answer as one.
    """
    logged = {name: value for name, value in flat(params).items() if not name.startswith("track.")}
    results = {"evaluate": read_json(reports / "metrics/evaluate.json")} | evidence(reports)
    identity = key(logged, reports)
    name = os.environ.get("DVC_EXP_NAME") or f"{params.data.dataset}-{identity[:8]}"
    with opened(params.track.experiment, params.track.uri, "dvc repro track") as (client, experiment_id):
        run = finished(client, experiment_id, identity, KEY)
        if run is None:
            start, end = runs.times(reports)
            run = _begun(client, experiment_id, identity, name, kinds(params), start)
            _fill(client, run, logged, results, params, reports, end)
            for model in results["buckets"]:
                _publish_model(client, run, model, logged, results, params, reports)
            if package is not None:
                score = results["evaluate"][SERVED]["valid"]["all"]["ndcg_at_20"]
                log_package(client, run.info.run_id, params.data.dataset, score, package)
            client.set_terminated(run.info.run_id, "FINISHED", end_time=end)
        _save_columns(client, experiment_id)
    return {"run_id": run.info.run_id, "experiment": params.track.experiment, "name": run.info.run_name,
            "key": identity, "store": address_of(params.track.uri).split(":", 1)[0]}


def publish_trial(params: Any, model: str, found: Mapping[str, Any], seconds: float) -> dict[str, str]:
    """Publish an encoder's training as a run of its own, or find the run that already holds it.

    `found` is the encoder's file of metrics. The run has `valid.all/ndcg_at_20` and its like, `best_epoch` and
    `seconds`: no test session was scored. UserError as `publish`.
    """
    logged = {name: value for name, value in flat(params).items() if not name.startswith("track.")}
    values = {f"valid.all/{metric}": found["valid"][metric] for metric in HEADLINE if metric in found["valid"]}
    values["best_epoch"] = found.get("best_epoch", found.get("epochs"))
    content = json.dumps([model, logged, values, datasets(Path("dvc.lock"), Path("data"))], sort_keys=True)
    identity = hashlib.sha256(content.encode()).hexdigest()[:32]
    with opened(params.track.experiment, params.track.uri, f"dvc repro trial@{model}") as (client, experiment_id):
        run = finished(client, experiment_id, identity, KEY)
        if run is None:
            end = int(time.time() * 1000)
            name = f"{model}-{os.environ.get('DVC_EXP_NAME') or identity[:8]}"
            run = _begun(client, experiment_id, identity, name, {
                **kinds(params), "kind": "trial", "model": model}, end - int(1000 * seconds))
            _log_parameters(client, run.info.run_id, logged)
            _log_metrics(client, run.info.run_id, {
                legal(name): value for name, value in {**values, "seconds": seconds}.items()}, iter(()), end)
            _log_inputs(client, run.info.run_id)
            client.set_terminated(run.info.run_id, "FINISHED", end_time=end)
    return {"run_id": run.info.run_id, "experiment": params.track.experiment, "name": run.info.run_name}


def texts(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as a run holds them: JSON, strings as they are, without secrets."""
    return {name: value if isinstance(value, str) else json.dumps(value)
            for name, value in masked_all(parameters).items()}


def _begun(client: Any, experiment_id: str, identity: str, name: str, further: Mapping[str, str], start: int) -> Any:
    labels = {tag: masked(value) for tag, value in {**tags(identity), **further}.items()}
    return client.create_run(experiment_id, start_time=start, tags=labels, run_name=name)


def _log_parameters(client: Any, run_id: str, parameters: Mapping) -> None:
    from mlflow.entities import Param

    written = [Param(name, text) for name, text in texts(parameters).items()]
    for start in range(0, len(written), 100):
        client.log_batch(run_id, params=written[start:start + 100])


def _log_metrics(client: Any, run_id: str, values: Mapping[str, float], points: Iterator, end: int) -> None:
    from mlflow.entities import Metric

    logged = [Metric(name, value, end, 0) for name, value in values.items()]
    logged += [Metric(name, value, end, step) for name, value, step in points]
    for start in range(0, len(logged), 1000):
        client.log_batch(run_id, metrics=logged[start:start + 1000])


def _fill(client: Any, run: Any, logged: Mapping, results: Mapping, params: Params, reports: Path, end: int) -> None:
    """Everything of the experiment's own run."""
    run_id = run.info.run_id
    _log_parameters(client, run_id, logged)
    _log_metrics(client, run_id, runs.experiment_metrics(results, params),
                 runs.curves(runs.stage_curves(reports)), end)
    page = f"#/experiments/{run.info.experiment_id}/runs/{run_id}/artifacts/index.html"
    client.set_tag(run_id, "mlflow.note.content", runs.note(results, params, page))
    _log_inputs(client, run_id)
    for name, table in runs.tables(results).items():
        client.log_table(run_id, table, f"tables/{name}.json")
    client.log_artifact(run_id, str(reports / "index.html"))
    files = {path for folder in ("figures", "metrics", "curves", "plots", "ranks")
             for path in (reports / folder).rglob("*.*") if not path.name.startswith(".")} - left_behind(reports)
    for path in sorted(files):
        folder = path.parent.relative_to(reports).as_posix()
        if path.suffix == ".json":
            content = json.dumps(masked_all(read_json(path)), indent=2, ensure_ascii=False)
            client.log_text(run_id, content, f"{folder}/{path.name}")
        else:
            client.log_artifact(run_id, str(path), folder)


def _log_inputs(client: Any, run_id: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(run_id, [
        DatasetInput(Dataset(path, content[:36], "dvc", json.dumps({"path": path, "md5": content})),
                     [InputTag("mlflow.data.context", path.split("/")[1])])
        for path, content in datasets(Path("dvc.lock"), Path("data")).items()])


def _publish_model(client: Any, parent: Any, model: str, logged: Mapping, results: Mapping, params: Params,
                   reports: Path) -> None:
    """A model's run below the experiment's: the same metrics, its own parameters and training curves."""
    part = "tune" if model == MAIN else model
    start, end = runs.times(reports, training_parts(results, params).get(model, {"evaluate"}))
    run_id = _begun(client, parent.info.experiment_id, f"{parent.data.tags[KEY]}/{model}", model, {
        **kinds(params), "kind": "model", "model": model, "mlflow.parentRunId": parent.info.run_id,
        "mlflow.note.content": describe(model, params)}, start).info.run_id
    sections = ("model.", "align.", "tune.", "llm.", "text_encoder.") if model == MAIN else (
        "encoder.training.", f"encoder.{model.partition('-')[0]}.", f"gate.fuse.{model}", "seed")
    _log_parameters(client, run_id, {name: value for name, value in logged.items() if name.startswith(sections)})
    _log_metrics(client, run_id, runs.model_metrics(results, params, model),
                 runs.curves(runs.own_curves(reports, part), "training"), end)
    client.set_terminated(run_id, "FINISHED", end_time=end)


def _save_columns(client: Any, experiment_id: str) -> None:
    """A column set in MLflow's own way: .../#/experiments/ID/runs?viewStateShareKey=columns shows ten metrics."""
    shown = [*(f"metrics.`{name}`" for name in runs.COLUMNS), "tags.`dataset`", "tags.`base`", "tags.`seed`",
             "attributes.`Duration`"]
    tag = f"mlflow.sharedViewState.{VIEW}"
    if tag not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, tag, json.dumps({"selectedColumns": shown}))
