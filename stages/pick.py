"""Pick the best of a search and write it back: experiments of one model that differ in its parameters (no DAG stage).

    make grid MODEL=gcsan DATASET=office     # queue what stages/presets/grid/gcsan.txt lists, run it one by one
    python stages/pick.py --model gcsan --dataset office

Validation NDCG@20 decides. The chosen values go into params.yaml; its comments and layout stay. A control such as
gcsan-text shares its encoder's section. With --model llmgr the search is over llm, model, align and tune.

Reads:  the experiments of the current commit, through `dvc exp show`; params.yaml
Writes: params.yaml, reports/results/<dataset>/search-<model>.csv; an MLflow run a trial, tagged llmgr.search
Params: track; the keys in which the experiments differ
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("track",)
OPTIONS = {"model": "the encoder, control or llmgr whose experiments are compared", "dataset": "their data.dataset"}


def main(params: Any, model: str, dataset: str) -> None:
    import csv
    import io

    import yaml

    from llmgr.encoders.registry import family
    from llmgr.experiments import search
    from llmgr.params.loading import flat, whole
    from llmgr.reporting import tracking
    from llmgr.runtime.artifacts import write_text

    if model != search.TUNED:
        family(model)
    result = search.search(search.trials(search.shown(), model, dataset, search.lock_of), model)
    head, rows = search.table(result)
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    text, best = Path("params.yaml").read_text(), result.trials[0].parameters
    chosen = {key: best[key] for key in result.keys}
    for key, value in flat(whole(yaml.safe_load(text)).params).items():
        if key not in chosen and not key.startswith("data.") and best.get(key, value) != value and search.role(
                key, model, [best["model.base"]]) != "ignored":
            console.say(f"warning: the trials had {key}={best[key]}, which was not searched; params.yaml keeps {value}")
    changed = search.rewritten(text, chosen)
    whole(yaml.safe_load(changed))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([head, *rows])
    record = f"reports/results/{dataset.replace(':', '-')}/search-{model}.csv"
    write_text(record, buffer.getvalue())
    write_text("params.yaml", changed)
    console.say(f"params.yaml has the best of {len(rows)}: " + ", ".join(
        f"{key}={value}" for key, value in zip(head, rows[0][:len(chosen)])) + f"; the search is in {record}")
    tracking.publish_trials(model, result.trials, params.track.experiment, params.track.uri)


if __name__ == "__main__":
    stage.run(main, __doc__, READS, OPTIONS)
