"""Train LLMGR's base once without each of tune.folds parts of the users, for scores of sessions it has not met.

Reads:  models/embeddings/config.json (which base, its own settings), data/sessions/{train,valid}.parquet,
        data/core/items.parquet (their number); models/text_encoder/item_text.safetensors where the base is a control
Writes: models/folds/ (K.safetensors: encoder and item vectors of the base trained without fold K; config.json; nothing
        else where tune.folds is 0), reports/metrics/folds.json, reports/metrics/cost/folds.json
Params: seed, data.max_session, tune.folds, tune.linear, encoder.dim, encoder.text_dim, encoder.training
"""
from llmgr.pipeline.stage import run

READS = ("seed", "data.max_session", "tune.folds", "tune.linear", "encoder.dim", "encoder.text_dim", "encoder.training")


def main(params) -> None:
    from llmgr.prior.cross_fitting import train_folds
    from llmgr.runtime.layout import PIPELINE

    train_folds(params, PIPELINE)


if __name__ == "__main__":
    run(main, __doc__, READS)
