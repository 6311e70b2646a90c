"""Pretrain a control over the linear part of LLMGR's prior: the nearest model without a language model.

Reads:  data/sessions/{train,valid}.parquet, data/core/items.parquet, models/text_encoder/item_text.safetensors
Writes: models/encoders/NAME/ (as pretrain, and offset.safetensors: the weights of the linear prior),
        reports/metrics/encoders/NAME.json, reports/curves/NAME_{steps,epochs}.csv, reports/metrics/cost/NAME.json;
        NAME is ENCODER-linear
Params: seed, data.max_session, encoder.dim, encoder.text_dim, encoder.text_lr, encoder.training, encoder.ENCODER
        (its own section), slit
"""
from llmgr.pipeline.stage import run

READS = ("seed", "data.max_session", "encoder.dim", "encoder.text_dim", "encoder.text_lr", "encoder.training",
         "encoder.{encoder}", "slit")


def main(params, encoder: str) -> None:
    from llmgr.encoders.pretraining import pretrain
    from llmgr.prior.left_out import left_out
    from llmgr.prior.weighted_sum import Prior
    from llmgr.runtime.layout import PIPELINE

    files = PIPELINE

    def fitted(train) -> Prior:
        prior = Prior(left_out(params.slit, files, train)).to(train.row.device)
        prior.fit(train, params.seed)
        return prior

    pretrain(params, files, f"{encoder}-linear", fitted)


if __name__ == "__main__":
    run(main, __doc__, READS, {"encoder": "a name from encoder.linear_controls"})
