"""Pick the best of a search and write it back: experiments of one model that differ in its parameters (no DAG stage).

    make grid MODEL=gcsan DATASET=office     # queue what stages/presets/grid/gcsan.txt lists, run it one by one
    python stages/pick.py --model gcsan --dataset office

Validation NDCG@20 decides. The chosen values go into params.yaml; its comments and layout stay. A control such as
gcsan-text shares its encoder's section. With --model llmgr the search is over llm, model, align and tune.

Reads:  the runs that `trial`, or `track` for llmgr, published to MLflow from this commit; params.yaml
Writes: params.yaml, reports/results/<dataset>/search-<model>.csv
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
    from llmgr.experiments.published import Published, head, logged
    from llmgr.params.loading import whole
    from llmgr.runtime.artifacts import write_text
    from llmgr.runtime.masking import HIDDEN

    if model != search.TUNED:
        family(model)
    published = Published(params.track.experiment, params.track.uri)
    result = search.search(search.trials(published, model, dataset, head()), model)
    columns, rows = search.table(result)
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    text, best = Path("params.yaml").read_text(), result.trials[0].parameters
    hidden = [key for key in result.keys if any(mark in str(best[key]) for mark in ("…/", HIDDEN))]
    for key in hidden:
        console.say(f"warning: MLflow holds {key}={best[key]} without its folder or secret: set it in params.yaml")
    chosen = {key: best[key] for key in result.keys if key not in hidden}
    for key, value in logged(yaml.safe_load(text)).items():
        if key not in result.keys and not key.startswith("data.") and best.get(key, value) != value and search.role(
                key, model, [best["model.base"]]) != "ignored":
            console.say(f"warning: the trials had {key}={best[key]}, which was not searched; params.yaml keeps {value}")
    changed = search.rewritten(text, chosen)
    whole(yaml.safe_load(changed))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([columns, *rows])
    record = f"reports/results/{dataset.replace(':', '-')}/search-{model}.csv"
    write_text(record, buffer.getvalue())
    write_text("params.yaml", changed)
    console.say(f"params.yaml has the best of {len(rows)}: " + ", ".join(
        f"{key}={value}" for key, value in zip(result.keys, rows[0])) + f"; the search is in {record}")


if __name__ == "__main__":
    stage.run(main, __doc__, READS, OPTIONS)
