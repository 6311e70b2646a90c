"""Collect LLMGR's ablations for the report: the same experiment with one thing taken away (no stage of the DAG).

    make ablations                 # queue what stages/presets/ablations/ lists and run it, one by one
    python stages/ablations.py     # when `dvc queue status` says that all is done; then `dvc repro report`

Reads:  the experiments that `track` published to MLflow; params.yaml, stages/presets/ablations/
Writes: reports/ablations.json (what each ablation changed, LLMGR's figures in it)
Params: track; all that decide LLMGR's figures, to tell whose ablation an experiment is
"""
from llmgr.pipeline.stage import run

READS = ("track",)


def main(params, options=None) -> None:
    import json
    from pathlib import Path

    import yaml

    from llmgr.experiments import ablations, search
    from llmgr.experiments.published import Published
    from llmgr.runtime.artifacts import write_json
    from llmgr.runtime.console import say

    content = yaml.safe_load(Path("params.yaml").read_text())
    if options:
        for key, value in ablations.options(Path(options), content).items():
            print("-S", f"{key}={json.dumps(value, separators=(',', ':')) if type(value) is not str else value}")
        return
    asked = ablations.possible(content)
    found = ablations.collected(Published(params.track.experiment, params.track.uri), content, asked)
    write_json("reports/ablations.json", found)
    for name, ablation in found.items():
        figures = ablation["figures"]["test"]["all"]
        say(f"{name}: HR@20 {figures['hr_at_20']:.4f}  NDCG@20 {figures['ndcg_at_20']:.4f}")
    missing = [name for name in asked if name not in found and name != search.TUNED]
    if search.TUNED not in found:
        say(f"warning: {ablations.UNPUBLISHED}")
    say(f"reports/ablations.json has {len(found)} of {len(found) + len(missing)}"
        + (f"; not run with these parameters: {', '.join(missing)} (make ablations)" if missing else ""))


if __name__ == "__main__":
    run(main, __doc__, READS, optional={"options": "a file of stages/presets/ablations/: print what it changes "
                                                   "here, for `dvc exp run`, and do nothing else"})
