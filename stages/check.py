"""Refuse names of encoders that do not exist, or of a base that is not trained, before any work.

Every stage refuses a wrong params.yaml when it runs, but DVC looks for an encoder's file and section before it runs
anything of that encoder: this stage comes first, so that the user reads which name is meant.

Reads:  params.yaml
Writes: data/checked (always the same)
Params: model.base, encoder.names, encoder.controls, encoder.control_texts, encoder.linear_controls
"""
from llmgr.pipeline.stage import run

READS = ("model.base", "encoder.names", "encoder.controls", "encoder.control_texts", "encoder.linear_controls")


def main(params) -> None:
    from llmgr.runtime.artifacts import write_text

    write_text("data/checked", "params.yaml was read\n")


if __name__ == "__main__":
    run(main, __doc__, READS)
