"""Measure every model by bucket: how cold the target item is, and whether its place in time is known.

Reads:  reports/ranks/<model>.parquet, data/core/{items,interactions}.parquet, data/sessions/{train,test}.parquet
Writes: reports/metrics/buckets.json      HR, NDCG, MRR at 5, 10, 20 by model, convention and bucket, with n
        reports/metrics/intervals.json    95% bootstrap intervals of the same
        reports/metrics/differences.json  bucket.ours minus every other model, paired: interval, p, Holm-corrected p
        reports/plots/buckets.csv         the table behind `dvc plots`
Params: seed, bucket
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console
from llmgr.runtime.errors import UserError

READS = ("seed", "bucket")


def main(params) -> None:
    import numpy as np

    from llmgr.data.interactions import ends_in_a_tie, training_counts
    from llmgr.reporting import buckets
    from llmgr.reporting.significance import least_p
    from llmgr.runtime.artifacts import read_table, require, write_json, write_table

    test = read_table("data/sessions/test.parquet", ["user", "target"])
    train = read_table("data/sessions/train.parquet")
    items = read_table("data/core/items.parquet", ["item_id", "count"])
    files = {path.stem: path for path in require("reports/ranks").glob("*.parquet")}
    if not files:
        raise UserError("reports/ranks holds no ranks: run `dvc repro evaluate`")
    ranks = {model: buckets.checked(files[model], test) for model in buckets.order(files, params.bucket.ours)}

    counts = np.zeros(items.height + 1, np.int64)
    counts[items["item_id"].to_numpy()] = items["count"].to_numpy()
    targets = test["target"].to_numpy()
    trained = training_counts(train, items.height)
    ties = ends_in_a_tie(read_table("data/core/interactions.parquet", ["user", "timestamp"]))
    tied = test.join(ties, on="user", how="left", maintain_order="left")["tied"].to_numpy()
    masks = buckets.masks(counts[targets], trained[targets], tied, params.bucket)
    figures, bounds, gaps = buckets.measure(ranks, masks, params.bucket.ours, params.bucket.resamples, params.seed)

    folder = Path("reports/metrics")
    write_json(folder / "buckets.json", figures)
    write_json(folder / "intervals.json", bounds)
    write_json(folder / "differences.json", gaps)
    write_table("reports/plots/buckets.csv", buckets.plot_rows(figures, bounds))
    if gaps and (least := least_p(params.bucket.resamples) * len(gaps)) >= buckets.LEVEL:
        console.say(f"warning: bucket.resamples={params.bucket.resamples} cannot show a difference: with {len(gaps)} "
                  f"comparisons no corrected p falls below {least:.2g}; raise it")
    console.say(f"{len(ranks)} models, {test.height:,} test sessions, {len(masks)} buckets")


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
