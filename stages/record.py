"""Keep the current results under reports/results/NAME/, small enough for git (no stage of the DAG).

NAME is the dataset's unless --name says otherwise; a record of that name is replaced.

Reads:  params.yaml, reports/metrics/
Writes: reports/results/NAME/metrics.csv      by seed, model, convention, bucket and metric, with 95% intervals
        reports/results/NAME/differences.csv  LLMGR's differences, paired, with p
        reports/results/NAME/run.json         facts by stage, cost and hardware
        reports/results/NAME/params.yaml      the parameters, as they are
Params: the whole file
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console
from llmgr.runtime.errors import UserError

READS = ("seed", "data.dataset")


def main(params, name: str | None = None) -> None:
    from llmgr.experiments import records
    from llmgr.reporting import evidence
    from llmgr.runtime.artifacts import write_bytes

    if not Path("reports/metrics/evaluate.json").exists():
        raise UserError("reports/metrics/evaluate.json is missing: run `dvc repro` so that there are results to record")
    folder = Path("reports/results") / (name or params.data.dataset).replace(":", "-")
    records.write(folder, evidence.evidence(Path("reports")), params.seed)
    write_bytes(folder / "params.yaml", Path("params.yaml").read_bytes())
    console.say(f"recorded in {folder}; `make tables` writes the pages' tables anew")


if __name__ == "__main__":
    stage.run(main, __doc__, READS, optional={"name": "the record's folder under reports/results/"})
