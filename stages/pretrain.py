"""Pretrain one session encoder on next-item prediction over all training prefixes.

Reads:  data/sessions/{train,valid}.parquet, data/core/items.parquet (their number);
        models/text_encoder/item_text.safetensors for a control (an encoder whose name ends in -text or -shuffled)
Writes: models/encoders/NAME/ (weights, item vectors, config), reports/metrics/encoders/NAME.json,
        reports/curves/NAME_{steps,epochs}.csv, reports/metrics/cost/NAME.json
Params: seed, data.max_session, encoder.dim, encoder.text_dim, encoder.text_lr, encoder.training, encoder.ENCODER
        (its own section)
"""
from llmgr.pipeline.stage import run

READS = ("seed", "data.max_session", "encoder.dim", "encoder.text_dim", "encoder.text_lr", "encoder.training",
         "encoder.{encoder}")


def main(params, encoder: str) -> None:
    from llmgr.encoders.pretraining import pretrain
    from llmgr.runtime.layout import PIPELINE

    pretrain(params, PIPELINE, encoder)


if __name__ == "__main__":
    run(main, __doc__, READS, {"encoder": "a name from encoder.names, or NAME-text or NAME-shuffled for a control"})
