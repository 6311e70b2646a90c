"""Keep the current results: copy them to reports/results/<dataset>/, small enough for git (no stage of the DAG).

Reads:  params.yaml, reports/metrics/
Writes: reports/results/<dataset>/params.yaml   the parameters, as they are
        reports/results/<dataset>/metrics.json  by bucket, intervals, differences, cost and hardware, counts of the data
        reports/results/<dataset>/results.md    tables for a README
Params: the whole file
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from llmgr.pipeline import stage
from llmgr.runtime import console
from llmgr.runtime.errors import UserError

READS = ("data.dataset", "bucket", "gate", "model.base", "tune", "tower")


def main(params: Any) -> None:
    from llmgr.reporting import evidence, report
    from llmgr.runtime.artifacts import write_bytes, write_json, write_text

    if not Path("reports/metrics/evaluate.json").exists():
        raise UserError("reports/metrics/evaluate.json is missing: run `dvc repro` so that there are results to record")
    found = evidence.evidence(Path("reports"))
    folder = Path("reports/results") / params.data.dataset.replace(":", "-")
    kept = {name: value for name, value in found.items() if name not in ("steps", "epochs")}
    write_bytes(folder / "params.yaml", Path("params.yaml").read_bytes())
    write_json(folder / "metrics.json", kept)
    write_text(folder / "results.md", report.markdown(found, params))
    console.say(f"recorded in {folder}")


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
