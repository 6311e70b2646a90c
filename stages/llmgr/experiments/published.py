"""The runs that the stages `track` and `trial` published to MLflow, which comparisons of experiments read."""
from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmgr.params.loading import flat, whole
from llmgr.reporting import store, tracking
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import PIPELINE

DATA = (PIPELINE.items.parent.as_posix(), PIPELINE.sessions("train").parent.as_posix())
"""What models are trained and scored on."""


class Run(NamedTuple):
    """A finished run: its parameters by dotted key, its last metrics, and digests of `DATA`."""

    id: str
    name: str
    commit: str
    parameters: dict[str, Any]
    metrics: dict[str, float]
    data: dict[str, str]


class Published:
    """Finished runs of one MLflow experiment. UserError where the store cannot be read."""

    def __init__(self, experiment: str, uri: str | None) -> None:
        self.client = store.reading(uri)
        place = self.client and self.client.get_experiment_by_name(experiment)
        self.ids = [place.experiment_id] if place else []

    def runs(self, kind: str, **tags: str) -> list[Run]:
        """The runs of a kind (experiment or trial) with these tags, newest first."""
        asked = " and ".join(f"tags.`{key}` = '{value}'" for key, value in {"kind": kind, **tags}.items())
        runs, token, more = [], None, bool(self.ids)
        while more:
            page = self.client.search_runs(self.ids, f"{asked} and attributes.status = 'FINISHED'",
                                           order_by=["attributes.start_time DESC"], page_token=token)
            runs, token, more = [*runs, *page], page.token, bool(page.token)
        return [self._read(run) for run in runs]

    def _read(self, run: Any) -> Run:
        tags = run.data.tags
        return Run(run.info.run_id, tags.get("dvc.experiment") or run.info.run_name,
                   tags.get("dvc.baseline") or tags.get("mlflow.source.git.commit", ""),
                   {name: _value(text) for name, text in run.data.params.items()}, run.data.metrics,
                   {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs
                    if entry.dataset.name in DATA})

    def figures(self, run: Run) -> dict[str, Any]:
        """Every model's figures by convention and bucket, as the run's metrics/buckets.json holds them."""
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(self._artifact(run, "metrics/buckets.json", folder).read_text())

    def ranks(self, run: Run, models: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Test targets and their ranks by model and convention."""
        import polars as pl

        from llmgr.reporting.buckets import COLUMNS

        ranks = {}
        with tempfile.TemporaryDirectory() as folder:
            for model in models:
                frame = pl.read_parquet(self._artifact(run, f"ranks/{model}.parquet", folder))
                ranks[model] = {convention: frame[column].to_numpy() for convention, column in COLUMNS.items()}
                ranks[model]["target"] = frame["target"].to_numpy()
        return ranks

    def _artifact(self, run: Run, path: str, folder: str) -> Path:
        from mlflow.exceptions import MlflowException

        try:
            return Path(self.client.download_artifacts(run.id, path, folder))
        except (MlflowException, OSError):
            raise UserError(f"the MLflow run {run.name} ({run.id}) has no {path}: delete the run and publish it anew "
                            "with `dvc repro track`") from None


def logged(content: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter file's content as a run gives it back, by dotted key: what is masked there is masked here."""
    every = flat(whole(dict(content)).params)
    return {name: _value(text) for name, text in tracking.texts(every).items() if not name.startswith("track.")}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def head() -> str:
    """The current commit. UserError outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        raise UserError("git is not on the path: install it") from None
    if done.returncode:
        raise UserError("this is no git repository with a commit: run this in the repository root")
    return done.stdout.strip()
