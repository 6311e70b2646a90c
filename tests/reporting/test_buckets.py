"""Buckets, intervals and differences against definitions written out row by row; the stage from files to files."""
from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from machine import DEFAULTS, ROOT

import bucket as stage
from llmgr.data.interactions import ends_in_a_tie, training_counts
from llmgr.params.names import BASELINES
from llmgr.ranking import metrics
from llmgr.reporting import buckets, significance
from llmgr.runtime.errors import UserError

BUCKET = SimpleNamespace(ours="llmgr", resamples=200, cold=[5, 10], warm=50, practice=[10, 50], trained=[1, 5, 10, 50])
MODELS = ("llmgr", "gcsan", "pop", "text-knn")


def project(folder: Path, users: int = 300, items: int = 60, seed: int = 1) -> dict[str, list[int]]:
    """A small project's core, sessions and ranks below `folder`; returns every user's items in order."""
    random = np.random.default_rng(seed)
    share = random.permutation(1 / np.arange(1, items + 1) ** 1.2)
    lengths = random.integers(5, 12, users)
    histories = {f"u{n:04}": random.choice(items, size, p=share / share.sum()) + 1 for n, size in enumerate(lengths)}
    histories = {user: history.tolist() for user, history in histories.items()}
    counts = Counter(item for history in histories.values() for item in history)
    for name in ("data/core", "data/sessions", "reports/ranks"):
        (folder / name).mkdir(parents=True)
    pl.DataFrame(
        {"item_id": range(1, items + 1), "count": [counts[item] for item in range(1, items + 1)]},
        {"item_id": pl.Int32, "count": pl.Int32},
    ).write_parquet(folder / "data/core/items.parquet")
    rows = [(u, h[:end], h[end]) for u, h in histories.items() for end in range(1, len(h) - 2)]
    kinds = {"user": pl.String, "items": pl.List(pl.Int32), "target": pl.Int32}
    pl.DataFrame(rows, kinds, orient="row").write_parquet(folder / "data/sessions/train.parquet")
    held_out = [(u, h[:-2], h[-2]) for u, h in histories.items()]
    pl.DataFrame(held_out, kinds, orient="row").write_parquet(folder / "data/sessions/valid.parquet")
    tests = [(u, h[:-1], h[-1]) for u, h in histories.items()]
    pl.DataFrame(tests, kinds, orient="row").write_parquet(folder / "data/sessions/test.parquet")
    clicks = [(user, day) for user, h in histories.items() for day in range(len(h) - 1)]
    clicks += [(user, len(h) - 1 - (int(user[1:]) % 3 == 0)) for user, h in histories.items()]  # a third end in a tie
    pl.DataFrame(clicks, {"user": pl.String, "timestamp": pl.Int64}, orient="row").write_parquet(
        folder / "data/core/interactions.parquet")
    for number, model in enumerate(MODELS):
        rank = random.geometric(0.02 * (1 + (number == 0)), users).clip(1, items)
        pl.DataFrame(
            {"target": [t for *_, t in tests], "rank": rank, "rank_unseen": np.maximum(rank - 2, 1)},
            dict.fromkeys(("target", "rank", "rank_unseen"), pl.Int32),
        ).write_parquet(folder / f"reports/ranks/{model}.parquet")
    return histories


def test_training_counts_are_each_users_items_before_the_last_two(tmp_path: Path) -> None:
    histories = project(tmp_path)
    expected = Counter(item for history in histories.values() for item in history[:-2])
    found = training_counts(pl.read_parquet(tmp_path / "data/sessions/train.parquet"), 60)
    assert found.tolist() == [expected[item] for item in range(61)]


def test_buckets_hold_the_counts_that_their_names_say() -> None:
    counts, trained = np.arange(3, 80), np.arange(77)
    masks = buckets.masks(counts, trained, np.zeros(77, bool), BUCKET)
    held = {name: counts[mask] for name, mask in masks.items() if not name.startswith("trained")}
    assert {name: (found[0], found[-1]) for name, found in held.items()} == {
        "all": (3, 79), "cold": (5, 10), "warm": (50, 79),
        "count_lt10": (3, 9), "count_10_49": (10, 49), "count_ge50": (50, 79)}
    held = {name: trained[mask] for name, mask in masks.items() if name.startswith("trained")}
    assert {name: (found[0], found[-1]) for name, found in held.items()} == {
        "trained_0": (0, 0), "trained_1_4": (1, 4), "trained_5_9": (5, 9), "trained_10_49": (10, 49),
        "trained_ge50": (50, 76)}
    assert sum(len(found) for found in held.values()) == 77


def test_a_session_is_tied_where_its_last_two_clicks_share_a_timestamp() -> None:
    frame = pl.DataFrame({"user": ["a", "a", "a", "b", "b", "b", "c"], "timestamp": [5, 9, 9, 9, 4, 4, 1]})
    assert dict(ends_in_a_tie(frame).rows()) == {"a": True, "b": False, "c": False}
    tied = np.array([True, False, True])
    masks = buckets.masks(np.full(3, 7), np.full(3, 7), tied, BUCKET)
    assert masks["tied"].tolist() == [True, False, True] and masks["untied"].tolist() == [False, True, False]


def test_pooling_pairs_every_sessions_mean_over_the_seeds() -> None:
    random = np.random.default_rng(0)
    target, hard = random.integers(1, 90, 400), random.random(400) < 0.5

    def drawn(chance: float) -> np.ndarray:
        return np.where(random.random(400) < chance * (1 - hard / 2), random.integers(1, 21, 400), 99)

    ranks = {seed: {model: {c: drawn(chance) for c in buckets.COLUMNS} | {"target": target}
                    for model, chance in (("llmgr", 0.5), ("gcsan", 0.3), ("pop", 0.2))} for seed in ("1", "2", "3")}
    ranks["2"]["narm"] = ranks["2"]["pop"]  # which the other seeds lack
    gaps = buckets.pooled(ranks, "llmgr", 500, 1)
    assert list(gaps) == ["gcsan", "pop"]
    for model, by in gaps.items():
        for convention in buckets.COLUMNS:
            hits = {m: np.mean([ranks[s][m][convention] <= 20 for s in ranks]) for m in ("llmgr", model)}
            assert by[convention]["hr_at_20"]["difference"] == pytest.approx(hits["llmgr"] - hits[model])
    family = [gaps[model]["test"]["mrr_at_20"] for model in gaps]
    assert [gap["p_holm"] for gap in family] == significance.holm([gap["p"] for gap in family])
    assert buckets.pooled({"1": ranks["1"], "3": ranks["3"]}, "caser", 100, 1) == {}

    one = buckets.pooled({"1": ranks["1"]}, "llmgr", 500, 1)
    assert buckets.pooled({"1": ranks["1"], "2": ranks["1"]}, "llmgr", 500, 1) == one, "a seed said twice tells no more"
    plain = {model: {c: by[c] for c in buckets.COLUMNS} for model, by in ranks["1"].items()}
    everyone = {"all": np.ones(400, bool)}
    expected = buckets.measure(plain, everyone, "llmgr", 500, 1)[2]
    assert one == {model: {c: by[c]["all"] for c in buckets.COLUMNS} for model, by in expected.items()}
    for by in ranks.values():
        by["copy"] = by["llmgr"]
    same = buckets.pooled(ranks, "llmgr", 500, 1)["copy"]["test"]["ndcg_at_20"]
    assert same["low"] == same["high"] == 0.0, "models are paired"
    ranks["3"]["pop"] = ranks["3"]["pop"] | {"target": target[::-1]}
    with pytest.raises(UserError, match="at other seeds ranked other sessions"):
        buckets.pooled(ranks, "llmgr", 100, 1)


def test_models_stand_baselines_first_controls_by_their_encoder_llmgr_last() -> None:
    names = ["llmgr", "text-knn", "narm", "gcsan-text", "caser", "gcsan", "gcsan-shuffled", "pop", "slit-text",
             "word-knn", "session-knn", "item-knn", "slit", "gcsana", "gated-llmgr"]
    assert buckets.order(names, "gated-llmgr") == [
        *BASELINES, "caser", "gcsan", "gcsan-shuffled", "gcsan-text", "gcsana", "narm", "llmgr", "gated-llmgr"]


def test_stage_writes_what_the_ranks_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = project(tmp_path)
    monkeypatch.chdir(tmp_path)
    params = SimpleNamespace(seed=1, bucket=BUCKET)
    stage.main(params)
    written = ("buckets", "intervals", "differences")
    found, bounds, gaps = (json.loads(Path(f"reports/metrics/{name}.json").read_text()) for name in written)
    counts = Counter(item for history in histories.values() for item in history)
    warm = [n for n, history in enumerate(histories.values()) if counts[history[-1]] >= 50]
    ranks = pl.read_parquet("reports/ranks/gcsan.parquet")
    assert found["gcsan"]["test"]["warm"]["n"] == len(warm) > 30
    assert list(found) == list(bounds) == ["pop", "text-knn", "gcsan", "llmgr"]
    assert list(gaps) == ["pop", "text-knn", "gcsan"]
    for convention, column in (("test", "rank"), ("test_unseen", "rank_unseen")):
        expected = metrics.metrics(ranks[column].to_numpy()[warm])
        for metric, value in expected.items():
            assert found["gcsan"][convention]["warm"][metric] == pytest.approx(value, rel=1e-5, abs=1e-9)
            low, high = bounds["gcsan"][convention]["warm"][metric]
            assert low <= value <= high and (low < high or not value)
    gap = gaps["gcsan"]["test"]["all"]["hr_at_20"]
    ours, theirs = (found[m]["test"]["all"]["hr_at_20"] for m in ("llmgr", "gcsan"))
    assert gap["difference"] == pytest.approx(ours - theirs, abs=2e-6)
    assert 0 < gap["low"] < gap["difference"] < gap["high"]
    table = pl.read_csv("reports/plots/buckets.csv")
    row = table.row(by_predicate=(pl.col("model") == "llmgr") & (pl.col("bucket") == "all"), named=True)
    assert row["hr_at_20"] == pytest.approx(ours) and row["low"] < ours < row["high"] and row["n"] == 300
    assert table.height == 4 * 13
    assert found["pop"]["test"]["tied"]["n"] == 100

    before = {path: path.read_bytes() for path in Path("reports").rglob("*.*")}
    stage.main(params)
    assert {path: path.read_bytes() for path in Path("reports").rglob("*.*")} == before


def test_an_empty_bucket_has_a_count_and_no_metrics() -> None:
    ranks = {m: {"test": np.array([1, 30]), "test_unseen": np.array([1, 25])} for m in ("gcsan", "llmgr")}
    masks = {"all": np.array([True, True]), "cold": np.array([False, False])}
    found, bounds, gaps = buckets.measure(ranks, masks, "llmgr", 100, 1)
    assert found["llmgr"]["test"]["cold"] == {"n": 0}
    assert found["llmgr"]["test"]["all"]["hr_at_5"] == 0.5
    assert "cold" not in bounds["llmgr"]["test"] and "cold" not in gaps["gcsan"]["test"]
    rows = buckets.plot_rows(found, bounds).filter(pl.col("bucket") == "cold")
    assert rows["n"].to_list() == [0, 0] and rows["hr_at_20"].null_count() == 2


def test_p_is_corrected_over_the_models_within_a_metric_and_convention() -> None:
    random = np.random.default_rng(0)
    base = random.geometric(0.02, 300)
    ranks = {"llmgr": base, "a": random.geometric(0.011, 300), "b": random.geometric(0.015, 300), "c": base.copy()}
    ranks = {m: {"test": r, "test_unseen": np.maximum(r - (m > "a"), 1)} for m, r in ranks.items()}
    _, _, gaps = buckets.measure(ranks, {"all": np.ones(300, bool), "warm": base > 9}, "llmgr", 500, 1)
    for convention in ("test", "test_unseen"):
        for bucket in ("all", "warm"):
            for metric in metrics.names():
                family = [gaps[m][convention][bucket][metric] for m in "abc"]
                assert [g["p_holm"] for g in family] == significance.holm([g["p"] for g in family])
    first = {m: gaps[m]["test"]["all"]["hr_at_20"] for m in "abc"}
    assert first["c"]["p"] == first["c"]["p_holm"] == 1 and first["a"]["p"] < first["a"]["p_holm"] < 1


def test_without_llmgr_there_are_no_differences() -> None:
    ranks = {"gcsan": {"test": np.array([1, 30]), "test_unseen": np.array([1, 25])}}
    found, _, gaps = buckets.measure(ranks, {"all": np.array([True, True])}, "llmgr", 100, 1)
    assert gaps == {} and found["gcsan"]["test"]["all"]["n"] == 2


def test_ranks_of_other_sessions_are_refused(tmp_path: Path) -> None:
    project(tmp_path)
    test = pl.read_parquet(tmp_path / "data/sessions/test.parquet")
    with pytest.raises(UserError, match=r"gcsan\.parquet ranks other sessions"):
        buckets.checked(tmp_path / "reports/ranks/gcsan.parquet", test.reverse())


def test_the_script_explains_itself_and_names_a_missing_input(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "stages/bucket.py")]
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "intervals.json" in shown
    (tmp_path / "params.yaml").write_text(DEFAULTS.read_text())
    failed = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "data/sessions/test.parquet is missing" in failed.stderr
