"""Write the tables of README.md and reports/*.md anew from the records (no stage of the DAG).

Reads:  reports/results/: tables.yaml (what each table holds), comparisons.csv, the records
Writes: README.md, reports/RESULTS.md, reports/PERFORMANCE.md, between <!-- table: NAME --> and <!-- end -->
Params: none
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console


def main(params) -> None:
    from llmgr.experiments.pages import Tables, pages
    from llmgr.runtime.artifacts import write_text

    tables = Tables(Path("reports/results"))
    for page in pages(Path(".")):
        before = page.read_text()
        after = tables.fill(before)
        if after != before:
            write_text(page, after)
        console.say(f"{page}: {'written anew' if after != before else 'unchanged'}")


if __name__ == "__main__":
    stage.run(main, __doc__, ())
