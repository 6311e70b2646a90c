"""Publish the results as one MLflow run with a run a model below it, or find the run that already holds them.

The package goes with it, as the registered model llmgr.

Reads:  reports/metrics/, reports/curves/, reports/plots/, reports/figures/, reports/ranks/, reports/index.html,
        models/recommender/; data/ and dvc.lock for the lineage
Writes: reports/mlflow_run.json  run id, experiment, name, key and kind of store
Params: the whole file, to log it; track says where to
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("seed", "data", "filter", "split", "encoder", "llm", "text_encoder", "model", "align", "tune", "tower", "slit",
         "launch", "gate", "evaluate", "bucket", "track")


def main(params) -> None:
    from llmgr.reporting import tracking
    from llmgr.runtime.artifacts import require, write_json
    from llmgr.runtime.layout import PIPELINE

    require("reports/index.html")
    run = tracking.publish(params, Path(PIPELINE.reports), PIPELINE.recommender)
    write_json("reports/mlflow_run.json", run)
    console.say(f"MLflow run {run['name']} ({run['run_id']}) in experiment {run['experiment']}, {run['store']} store")


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
