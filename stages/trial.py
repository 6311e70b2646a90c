"""Publish an encoder's training as an MLflow run of its own, which a search reads (no part of `dvc repro`).

`make grid` asks for it: track.trials names the encoders whose trainings an experiment publishes.

Reads:  reports/metrics/encoders/<encoder>.json, reports/metrics/cost/<encoder>.json; dvc.lock for the lineage
Writes: reports/trials/<encoder>.json  run id, experiment, name
Params: the whole file, to log it; track says where to
"""
from __future__ import annotations

from typing import Any

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("seed", "data", "filter", "split", "encoder", "llm", "text_encoder", "model", "align", "tune", "tower", "slit",
         "launch", "gate", "evaluate", "bucket", "track")
OPTIONS = {"encoder": "the encoder or control whose training is published"}


def main(params: Any, encoder: str) -> None:
    from llmgr.reporting import tracking
    from llmgr.runtime.artifacts import read_json, write_json

    metrics, cost = (read_json(f"reports/metrics/{folder}/{encoder}.json") for folder in ("encoders", "cost"))
    run = tracking.publish_trial(params, encoder, metrics, cost["seconds"])
    write_json(f"reports/trials/{encoder}.json", run)
    console.say(f"MLflow run {run['name']} ({run['run_id']}) in experiment {run['experiment']}")


if __name__ == "__main__":
    stage.run(main, __doc__, READS, OPTIONS)
