"""Write the report: one page that opens from the file system, and the figures that DVC compares.

Reads:  reports/metrics/, reports/curves/, reports/{ablations,seeds}.json (what
        stages/{ablations,seeds}.py collected)
Writes: reports/index.html, and its figures as reports/figures/{buckets,differences,curves,cost}.svg
        reports/metrics.json            LLMGR and the main baselines, what `dvc metrics` and `dvc exp show` read
        reports/plots/losses.csv        training losses by part and step, for `dvc plots`
        reports/plots/validation.csv    what chose each part's epoch, for `dvc plots`
Params: all that decides a result (shown on the page)
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("seed", "data.dataset", "data.max_session", "filter", "split", "encoder", "llm", "text_encoder",
         "model", "align", "tune", "tower", "slit", "gate", "evaluate", "bucket")


def main(params) -> None:
    from llmgr.reporting import evidence, page, summary
    from llmgr.runtime.artifacts import replacing_folder, write_json, write_table, write_text

    content = evidence.evidence(Path("reports"))
    drawn = page.draw(content, params)
    write_json("reports/metrics.json", summary.summary(content, params))
    write_table("reports/plots/losses.csv", summary.losses(content["steps"]))
    write_table("reports/plots/validation.csv", summary.validation(content["epochs"]))
    with replacing_folder("reports/figures") as folder:
        for name, svg in drawn.items():
            write_text(folder / f"{name}.svg", svg)
    write_text("reports/index.html", page.render(content, params, drawn))
    console.say("reports/index.html is ready")


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
