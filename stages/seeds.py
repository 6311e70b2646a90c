"""Collect the same experiment at other seeds for the report (no stage of the DAG).

    make seeds SEEDS="1 2"     # queue it at these seeds and run them, one by one
    python stages/seeds.py     # when `dvc queue status` says that all is done; then `dvc repro report`

Reads:  the experiments of the current commit, through `dvc exp show`; params.yaml
Writes: reports/seeds.json (every model's figures by seed)
Params: all that decide a model's figures, to tell whether experiments differ in the seed alone
"""
from llmgr.stage import run

READS = ()


def main(params) -> None:
    from pathlib import Path

    import yaml

    from llmgr import search, seeds, twins
    from llmgr.artifacts import write_json
    from llmgr.stage import say

    found = twins.at_seeds(search.shown(), yaml.safe_load(Path("params.yaml").read_text()), search.lock_of)
    write_json("reports/seeds.json", found)
    for model in seeds.models(found):
        mean, deviation, *_ = seeds.spread(found, model, seeds.COLUMNS[0])
        say(f"{model}: HR@20 {mean:.4f}, deviation {deviation:.4f}")
    say(f"reports/seeds.json has seeds {', '.join(found) or 'none'}" + (
        "" if len(found) > 1 else ': make seeds SEEDS="1 2"'))


if __name__ == "__main__":
    run(main, __doc__, READS)
