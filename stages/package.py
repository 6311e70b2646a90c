"""Make the package that recommendations come from: all that a request needs, and no language model.

Reads:  models/embeddings/, models/folds/, models/tower/, models/tuned/, models/backbone/backbone.json, data/sessions/,
        data/core/items.parquet
Writes: models/recommender/ (see llmgr.serving.package), reports/metrics/package.json (what pruning the item-item matrix
        costs on validation, size), reports/metrics/cost/package.json
Params: seed, model, tune, tower.enabled, tower.encoder, tower.decay, slit, data.max_session
"""
from llmgr.pipeline.stage import run

READS = ("seed", "model", "tune", "tower.enabled", "tower.encoder", "tower.decay", "slit", "data.max_session")


def main(params) -> None:
    import time
    from pathlib import Path

    from llmgr.runtime.artifacts import write_json
    from llmgr.runtime.console import say
    from llmgr.runtime.layout import Layout
    from llmgr.serving.building import built, tuned_from
    from llmgr.serving.package import FOLDER, write_package
    from llmgr.sessions.reading import read_split
    from llmgr.training.cost import scoring_cost

    start, files = time.monotonic(), Layout("data", "models", "reports")
    train, valid = (read_split(files, split, params.data.max_session)[0] for split in ("train", "valid"))
    prior = tuned_from(params, files, train) if params.tune.linear else None
    package, found = built(params, prior, valid)
    write_package(FOLDER, package)
    size = sum(path.stat().st_size for path in Path(FOLDER).iterdir()) / 1e6
    write_json("reports/metrics/package.json", {**found, "megabytes": size})
    write_json("reports/metrics/cost/package.json",
               scoring_cost(start, {}, len(valid), sum(tensor.numel() for tensor in package.tensors.values())))
    say(f"{FOLDER}: {len(package.items):,} items, {size:.1f} MB")


if __name__ == "__main__":
    run(main, __doc__, READS)
