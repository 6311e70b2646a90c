"""Records give back the figures that were written, and tables what the records hold."""
from __future__ import annotations

import csv
from pathlib import Path

import pytest

from llmgr.experiments.dag import mermaid
from llmgr.experiments.pages import Tables, percent, shown_p
from llmgr.experiments.records import METRICS, Record, write
from llmgr.runtime.errors import UserError

FIGURES = {"gcsan": {1: 0.1, 2: 0.12}, "llmgr": {1: 0.14, 2: 0.16}}


def figures(value: float) -> dict:
    """One model's figures in one bucket, cold half as good, and a hit less where seen items stay."""
    def bucket(share: float) -> dict:
        return {"n": 50, **{metric: value * share * (1 + place) / 4 for place, metric in enumerate(reversed(METRICS))}}

    return {split: {"all": bucket(scale), "cold": bucket(scale / 2)}
            for split, scale in (("test", 0.5), ("test_unseen", 1.0))}


def around(by: dict) -> dict:
    return {metric: [by[metric] - 0.01, by[metric] + 0.02] for metric in METRICS}


def gaps(relative: float) -> dict:
    return {metric: {"difference": 0.04, "low": 0.02, "high": 0.06, "relative": relative, "p": 0.001, "p_holm": 0.004}
            for metric in METRICS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds of two models, with one ablation, as records/two."""
    one = {model: figures(by[1]) for model, by in FIGURES.items()}
    evidence = {
        "buckets": one,
        "intervals": {model: {split: {bucket: around(by) for bucket, by in buckets.items()}
                              for split, buckets in splits.items()} for model, splits in one.items()},
        "differences": {"gcsan": {split: {"all": gaps(0.4), "cold": gaps(0.4)} for split in ("test", "test_unseen")}},
        "seeds": {"figures": {seed: {model: figures(by[int(seed)]) for model, by in FIGURES.items()} for seed in "12"},
                  "differences": {"gcsan": {split: gaps(4 / 11) for split in ("test", "test_unseen")}}},
        "ablations": {"llmgr": {"figures": one["llmgr"]}, "frozen": {"figures": figures(0.07)}},
        "facts": {"filter": {"users": 3}}, "cost": {"tune": {"seconds": 90.0, "peak_memory_mb": 1500.0}},
    }
    write(tmp_path / "two", evidence, seed=1)
    return tmp_path


def test_a_record_gives_back_what_was_written(folder: Path) -> None:
    record = Record(folder / "two")
    assert record.models == ["gcsan", "llmgr"]
    metric = METRICS[2]
    expected = {seed: figures(FIGURES["llmgr"][seed])["test_unseen"]["cold"][metric] for seed in (1, 2)}
    assert record.mean("llmgr", metric, "cold") == pytest.approx(sum(expected.values()) / 2, abs=1e-6)
    by_seed = record.by_seed("llmgr", metric, "cold", "kept")
    assert by_seed["1"] == pytest.approx((expected[1] / 2, expected[1] / 2 - 0.01, expected[1] / 2 + 0.02), abs=1e-6)
    assert by_seed["2"] == pytest.approx((expected[2] / 2,), abs=1e-6)
    assert Record(folder / "two", "2").mean("llmgr", metric, "cold") == pytest.approx(expected[2], abs=1e-6)
    assert record.mean("llmgr.frozen", metric) == pytest.approx(figures(0.07)["test_unseen"]["all"][metric], abs=1e-6)
    assert record.costs["tune"]["seconds"] == 90
    with open(folder / "two/metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["value"] for row in rows if row["metric"] == "sessions"} == {"50"}
    keys = {tuple(row[name] for name in ("seed", "model", "convention", "bucket", "metric")) for row in rows}
    assert len(rows) == len(keys)


def test_the_test_of_the_means_goes_before_that_of_one_seed(folder: Path) -> None:
    assert Record(folder / "two").test("gcsan", "hr_at_20")["relative"] == pytest.approx(4 / 11, abs=1e-6)
    with pytest.raises(UserError, match="no test of gcsan hr_at_20 cold"):
        Record(folder / "two").test("gcsan", "hr_at_20", "cold")


def test_a_table_holds_what_its_templates_name(folder: Path) -> None:
    (folder / "tables.yaml").write_text("""
main:
  head: [model, HR@20, gain, interval, p]
  bold: true
  cells: [$1, "{two $2 hr_at_20}", "{gain two llmgr over two $3 hr_at_20}", "{interval two $3 hr_at_20}",
          "{p two $3 hr_at_20}"]
  rows: [[GC-SAN, gcsan, gcsan], [LLMGR, llmgr, null]]
said:
  text: "It is {versus two gcsan over two llmgr hr_at_20} it, in {minutes two tune} minutes ({single pair hr_at_20})."
""")
    (folder / "comparisons.csv").write_text(
        "name,first,second,metric,bucket,p\npair,two@2 llmgr,two@2 gcsan,hr_at_20,all,0.3\n")
    page = "before\n<!-- table: main -->\nold\n<!-- end -->\nbetween\n<!-- table: said -->\n<!-- end -->\nafter\n"
    low, high = (Record(folder / "two").mean(model, "hr_at_20") for model in ("gcsan", "llmgr"))
    base = 0.04 / (4 / 11)
    expected = f"""before
<!-- table: main -->
| model | HR@20 | gain | interval | p |
| --- | --- | --- | --- | --- |
| GC-SAN | {low:.4f} | {percent(high / low - 1)} | {percent(0.02 / base)} to {percent(0.06 / base)} | <0.01 |
| LLMGR | **{high:.4f}** | – | – | – |
<!-- end -->
between
<!-- table: said -->
It is {1 - low / high:.0%} below it, in 1.5 minutes (+33% (0.3)).
<!-- end -->
after
"""
    tables = Tables(folder)
    assert tables.fill(page) == expected
    assert tables.fill(expected) == expected
    with pytest.raises(UserError, match="no table is called other"):
        tables.fill("<!-- table: other -->\n<!-- end -->\n")


@pytest.mark.parametrize(("share", "words"), [(0.0523, "+5.2%"), (-0.0523, "−5.2%"), (0.0996, "+10%"), (0.5, "+50%")])
def test_percentages(share: float, words: str) -> None:
    assert percent(share) == words


@pytest.mark.parametrize(("p", "words"), [(0.0072, "<0.01"), (0.01, "0.01"), (0.174, "0.17"), (1.0, "1")])
def test_p(p: float, words: str) -> None:
    assert shown_p(p) == words


def test_a_folder_that_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no metrics\.csv"):
        Record(tmp_path)


def test_the_diagram_has_the_arrows_that_no_longer_way_implies(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("""
stages:
  first: {cmd: x, deps: [code.py], outs: [data/a]}
  each: {matrix: {of: [b]}, cmd: x, deps: [data/a/part.csv], outs: ["models/${item.of}"]}
  last: {cmd: x, deps: [data/a, models/b], metrics: [report.json: {cache: false}]}
""")
    assert mermaid(tmp_path / "dvc.yaml").splitlines()[2:-1] == ["    first --> each", "    each --> last"]
