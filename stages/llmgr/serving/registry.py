"""The package in MLflow's model registry, beside the run that it belongs to."""
from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from llmgr.runtime.artifacts import read_table
from llmgr.serving.package import ITEMS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

NAME, BEST = "llmgr", "best"
NEEDS = ("mlflow", "torch", "numpy", "scipy", "polars", "pyarrow", "safetensors", "tqdm")
HERE = Path(__file__).resolve().parent
SCORE, DATASET = "valid.ndcg_at_20", "dataset"  # tags of a version


def log_package(client: MlflowClient, run_id: str, dataset: str, score: float, folder: str | Path) -> str:
    """Log the package with a run, register it as `llmgr`, and return its version.

    The alias best-DATASET moves to it where its `score`, NDCG@20 on validation, is at least that of the version that
    has the alias; `best` is the best on the dataset that was published last.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        save_model(model, folder)
        client.log_artifacts(run_id, str(model), "model")
    _registered(client)
    made = client.create_model_version(NAME, f"runs:/{run_id}/model", run_id, tags={
        DATASET: dataset, SCORE: f"{score:.6f}"})
    alias = f"{BEST}-{re.sub(r'[^A-Za-z0-9_-]', '-', dataset)}"
    former = _version(client, alias)
    best = made if former is None or score >= float(former.tags[SCORE]) else former
    for name in (alias, BEST):
        client.set_registered_model_alias(NAME, name, best.version)
    return made.version


def save_model(path: Path, folder: str | Path) -> None:
    """The package in `folder` as an MLflow model of code at `path`; it holds the library, and no pickle."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    logging.getLogger("mlflow.models").setLevel(logging.WARNING)
    ids = read_table(Path(folder) / ITEMS, ["item"])["item"].head(2).to_list()
    with contextlib.redirect_stderr(io.StringIO()):  # MLflow warns that it leaves the check of sessions to the model
        mlflow.pyfunc.save_model(
            path, python_model=str(HERE / "mlflow_model.py"), artifacts={"package": str(folder)},
            code_paths=[str(HERE.parent)], pip_requirements=[f"{name}=={version(name)}" for name in NEEDS],
            input_example=([{"items": ids}], {"k": 20, "exclude_seen": True, "explain": False}))
    about = path / "MLmodel"
    about.write_text(about.read_text().replace(f"{HERE}{os.sep}", ""))  # nothing about this machine goes out


def _registered(client: MlflowClient) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(NAME)
    except MlflowException:
        client.create_registered_model(NAME, description="Recommendations without a language model per request.")


def _version(client: MlflowClient, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(NAME, alias)
    except MlflowException:
        return None
