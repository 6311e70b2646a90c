"""What the stages before the report leave, drawn from a seed."""
from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
from machine import DEFAULTS

import report as stage
from llmgr.params import names
from llmgr.params.loading import load
from llmgr.reporting import buckets
from llmgr.runtime.artifacts import write_json, write_table

MODELS = (*names.BASELINES, "gcsan", "gcsan-shuffled", "gcsan-text", "llmgr")
PARAMS = load(DEFAULTS)
PARAMS = dataclasses.replace(PARAMS, bucket=dataclasses.replace(PARAMS.bucket, resamples=400))
VIEW = PARAMS.view(stage.READS)


def write_reports(folder: Path, models: tuple[str, ...] = MODELS, sessions: int = 1500, gain: float = 1.6) -> None:
    """reports/ as the stages before the report leave it: seeded ranks, their metrics, curves, costs and facts.

    `gain` multiplies the chance of a hit that LLMGR has over GCSAN.
    """
    random = np.random.default_rng(3)
    counts, trained = random.integers(5, 90, sessions), random.integers(0, 80, sessions)
    ranks = {}
    for number, model in enumerate(models):
        chance = 0.002 + 0.003 * (1 if model == "pop" else gain * 2 if model == "llmgr" else 2 + number % 3)
        rank = random.geometric(chance * (0.6 + counts / 90)).clip(1, 700)
        ranks[model] = {"test": rank, "test_unseen": np.maximum(rank - random.integers(0, 4, sessions), 1)}
    settings = PARAMS.bucket
    masks = buckets.masks(counts, trained, counts % 3 == 0, settings)
    found, bounds, gaps = buckets.measure(ranks, masks, settings.ours, settings.resamples, 1)
    metrics, curves = folder / "reports/metrics", folder / "reports/curves"
    for name, content in (("buckets", found), ("intervals", bounds), ("differences", gaps)):
        write_json(metrics / f"{name}.json", content)
    write_json(metrics / "evaluate.json", {
        model: {split: {"all": by[split.replace("valid", "test")]["all"]} for split in
                ("valid", "valid_unseen", "test", "test_unseen")} for model, by in found.items()})
    write_table(folder / "reports/plots/buckets.csv", buckets.plot_rows(found, bounds))
    write_json(metrics / "filter.json", {
        "dataset": "sample", "before": {"users": 1800, "items": 700, "interactions": 12345},
        "after": {"users": 1500, "items": 640, "interactions": 11890}, "published": None, "rounds": 3,
        "reviews": {"lines": 12400, "malformed": {"not JSON": 4}}, "metadata": {"lines": 700, "malformed": {}},
        "share_with": {"title": 0.998, "brand": 0.61}, "sparsity": 0.9876})
    write_json(metrics / "backbone.json", {"name": "scratch", "revision": None, "perplexity": 21.35})
    write_json(metrics / "align.json", {"accuracy": 0.31})
    curves.mkdir(parents=True)
    trained_parts = [m for m in models if m not in (*names.BASELINES, "llmgr")] + ["backbone", "align", "tune"]
    for number, name in enumerate(trained_parts):
        epochs = 1 if name == "align" else 6
        with (curves / f"{name}_steps.csv").open("w", newline="") as handle:
            table = csv.writer(handle)
            table.writerow(["step", "epoch", "loss", "lr"])
            for step in range(1, 50 * epochs + 1):
                table.writerow([step, step / 50, round(3 + 4 / (1 + step / 40) + random.normal(0, 0.05), 4), 1e-3])
        with (curves / f"{name}_epochs.csv").open("w", newline="") as handle:
            table = csv.writer(handle)
            if name == "align":
                table.writerows([["epoch", "step", "train_loss", "accuracy"], [0, 0, "", 0.1], [1, 50, 4.2, 0.31]])
            else:
                table.writerow(["epoch", "step", "train_loss", "valid_hr_at_20", "valid_ndcg_at_20", "valid_mrr_at_20"])
                for epoch in range(1, epochs + 1):
                    level = 0.1 - 0.06 / epoch
                    table.writerow([epoch, 50 * epoch, round(3 + 1 / epoch, 4), level, level / 2, level / 3])
        write_json(metrics / f"cost/{name}.json", {
            "seconds": 12.5 * 1.9 ** (number % 7), "samples_per_second": 4321.0 / (1 + number),
            "tokens_per_second": 2800.0 if number > 2 else None, "peak_memory_mb": 900.0 + number,
            "trainable_parameters": 51_000 * (1 + number), "total_parameters": 250_000 * (1 + number % 9),
            "hardware": "2 CPU threads, X"})
        if name not in ("backbone", "align", "tune"):
            write_json(metrics / f"encoders/{name}.json", {"best_epoch": 5, "valid": {"ndcg_at_20": 0.047}})
    write_json(metrics / "cost/evaluate.json", {
        "seconds": 9.5, "seconds_by_model": dict.fromkeys(models, 1.25), "samples_per_second": 2400.0,
        "tokens_per_second": None, "peak_memory_mb": 700.0, "trainable_parameters": 0, "total_parameters": 0,
        "hardware": "2 CPU threads, X"})
