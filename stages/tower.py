"""Tune a text encoder so that an item's text lies near the texts of what is clicked before it, all users and folds.

Reads:  models/text_encoder/, data/sessions/{train,valid}.parquet, data/core/items.parquet
Writes: models/tower/ (whole.safetensors: item vectors [V+1, H] tuned over all users; K.safetensors: without fold K;
        tower.safetensors: the first one's weights; config.json; nothing else where tower.enabled is false),
        reports/metrics/tower.json, reports/metrics/cost/tower.json, reports/curves/tower_{steps,epochs}.csv
Params: seed, data.max_session, model.weights, model.texts, tower, tune.folds, tune.linear
"""
from llmgr.pipeline.stage import run

READS = ("seed", "data.max_session", "model.weights", "model.texts", "tower", "tune.folds", "tune.linear")


def main(params) -> None:
    from llmgr.prior.tower_training import train_tower
    from llmgr.runtime.layout import PIPELINE

    train_tower(params, PIPELINE)


if __name__ == "__main__":
    run(main, __doc__, READS)
