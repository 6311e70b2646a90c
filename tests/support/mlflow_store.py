"""Runs in an MLflow store of a test's own, as `track` and `trial` leave them, without a pipeline behind them."""
from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from mlflow.entities import Dataset, DatasetInput, Metric, Param

from llmgr.experiments.published import Published
from llmgr.params.loading import flat, whole
from llmgr.reporting import store, tracking

HEAD = "c" * 40
CLOCK = itertools.count(1)


class Store:
    """One experiment of the store in `folder`."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self.experiment, self.uri = experiment, f"sqlite:///{folder}/mlflow.db"
        with store.opened(experiment, self.uri, "the test") as (self.client, self.id):
            pass

    def published(self) -> Published:
        return Published(self.experiment, self.uri)

    def add(self, name: str, content: dict[str, Any], metrics: dict[str, float] | None = None, kind: str = "experiment",
            figures: dict[str, Any] | None = None, ranks: dict[str, np.ndarray] | None = None, data: str = "sessions",
            commit: str = HEAD, status: str = "FINISHED", **tags: str) -> str:
        """The id of a run with these parameters and figures; every run begins after the one before."""
        now = next(CLOCK)
        run = self.client.create_run(self.id, start_time=now, run_name=name, tags={
            "kind": kind, "dataset": content["data"]["dataset"], "dvc.experiment": name, "dvc.baseline": commit,
            **tags})
        texts = tracking.texts(flat(whole(content).params))
        self.client.log_batch(run.info.run_id,
                              params=[Param(*pair) for pair in texts.items() if not pair[0].startswith("track.")],
                              metrics=[Metric(key, value, now, 0) for key, value in (metrics or {}).items()])
        self.client.log_inputs(run.info.run_id, [
            DatasetInput(Dataset(path, digest, "dvc", "{}"))
            for path, digest in (("data/core", "core"), ("data/sessions", data), ("data/raw", name))])
        if figures:
            self.client.log_text(run.info.run_id, json.dumps(figures), "metrics/buckets.json")
        for model, rank in (ranks or {}).items():
            path = Path(f"{model}.parquet").absolute()
            pl.DataFrame({"target": np.arange(len(rank)), "rank": rank, "rank_unseen": rank}).write_parquet(path)
            self.client.log_artifact(run.info.run_id, str(path), "ranks")
        self.client.set_terminated(run.info.run_id, status, end_time=now)
        return run.info.run_id
