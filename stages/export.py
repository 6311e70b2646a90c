"""Export what the tuning needs of a pretrained encoder: its item vectors and its session graph network.

Reads:  models/encoders/BASE/ where BASE is model.base, or the encoder that stands in where that is not trained
Writes: models/embeddings/ (items.safetensors: vectors [V+1, d], row 0 pads; encoder.safetensors; config.json)
Params: model.base, encoder.names, encoder.controls, encoder.control_texts, encoder.linear_controls
"""
from llmgr.pipeline.stage import run

READS = ("model.base", "encoder.names", "encoder.controls", "encoder.control_texts", "encoder.linear_controls")


def main(params) -> None:
    import shutil

    from llmgr.params.encoders import rate_key
    from llmgr.runtime.artifacts import load_tensors, replacing_folder, require
    from llmgr.runtime.errors import UserError

    source = require(f"models/encoders/{params.model.base}")
    vectors = load_tensors(source / "items.safetensors")["vectors"]
    if not bool(vectors.isfinite().all()):
        raise UserError(f"{source} holds item vectors that are not finite: lower {rate_key(params.model.base)} and "
                        "train it anew")
    with replacing_folder("models/embeddings") as folder:
        for name in ("items.safetensors", "encoder.safetensors", "config.json"):
            shutil.copyfile(require(source / name), folder / name)


if __name__ == "__main__":
    run(main, __doc__, READS)
