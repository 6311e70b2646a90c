"""Write the report: one page that opens from the file system, without a network.

Reads:  reports/metrics/, reports/curves/, reports/{twins,seeds}.json (what
        stages/{twins,seeds}.py collected)
Writes: reports/index.html, and its figures as reports/figures/{buckets,differences,curves,cost}.svg
Params: all that decides a result (shown on the page)
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("seed", "data.dataset", "data.max_session", "filter", "split", "encoder", "llm", "model", "align", "tune",
         "tower", "slit", "gate", "evaluate", "bucket")


def main(params: Any) -> None:
    from llmgr.reporting import evidence, report
    from llmgr.runtime.artifacts import replacing_folder, write_text

    found = evidence.evidence(Path("reports"))
    drawn = report.draw(found, params)
    with replacing_folder("reports/figures") as folder:
        for name, svg in drawn.items():
            write_text(folder / f"{name}.svg", svg)
    write_text("reports/index.html", report.render(found, params, drawn))
    console.say("reports/index.html is ready")


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
