"""Refuse names that do not exist, and say what these parameters leave out, before any work.

Every stage refuses a wrong params.yaml when it runs, but DVC looks for an encoder's file and section before it runs
anything of that encoder: this stage comes first, so that the user reads which name is meant. What cannot be made, since
other parameters train no part of it, is left out by every stage alike; this one says so, a line each.

Reads:  params.yaml
Writes: data/checked (always the same)
Params: model.base, encoder.names, encoder.controls, encoder.control_texts, encoder.linear_controls, tune.linear,
        tune.folds, tower.enabled, gate.fuse, bucket.ours
"""
from llmgr.pipeline.stage import run

READS = ("model.base", "encoder.names", "encoder.controls", "encoder.control_texts", "encoder.linear_controls",
         "tune.linear", "tune.folds", "tower.enabled", "gate.fuse", "bucket.ours")


def main(params) -> None:
    from llmgr.params.loading import read
    from llmgr.runtime.artifacts import write_text
    from llmgr.runtime.console import say

    for line in read("params.yaml").lines:
        say(line)
    write_text("data/checked", "params.yaml was read\n")


if __name__ == "__main__":
    run(main, __doc__, READS)
