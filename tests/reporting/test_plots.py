"""What DVC shows: few metrics, and plots that a browser draws without a network."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml
from machine import ROOT
from tiny_reports import PARAMS, write_reports

import report as stage
from llmgr.reporting import evidence, summary
from llmgr.runtime.artifacts import write_json

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
VIEW = PARAMS.view(stage.READS)


def declared(kind: str) -> dict[str, dict]:
    return {path: settings for body in STAGES.values() for entry in body.get(kind, ())
            for path, settings in entry.items()}


def numbers(content: dict | float) -> int:
    return sum(map(numbers, content.values())) if isinstance(content, dict) else 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the report stage has run."""
    folder = tmp_path_factory.mktemp("plots")
    models = ("pop", "gcsan", "gcsan-text", "gated-gcsan-text", "gated-other", "gated-llmgr", "llmgr")
    write_reports(folder, models, sessions=300)
    write_json(folder / "reports/metrics/gate.json", {
        name: {"valid": {"ndcg_at_20": value}} for name, value in (("gated-gcsan-text", 0.2), ("gated-llmgr", 0.9))})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage.main(VIEW)
    return folder


def test_metrics_are_one_small_file_of_the_figures_that_answer(written: Path) -> None:
    assert list(declared("metrics")) == ["reports/metrics.json"]
    content = json.loads((written / "reports/metrics.json").read_text())
    found = json.loads((written / "reports/metrics/buckets.json").read_text())
    assert 30 < numbers(content) <= summary.NUMBERS
    assert list(content["baselines"]) == ["gated-gcsan-text", "gcsan-text", "gcsan"], "no gate with LLMGR in it"
    for bucket in ("all", "cold", "warm"):
        for metric in ("hr_at_20", "ndcg_at_20", "mrr_at_20"):
            assert content["llmgr"][bucket][metric] == found["llmgr"]["test"][bucket][metric]
            assert content["llmgr"]["unseen"][bucket][metric] == found["llmgr"]["test_unseen"][bucket][metric]
    assert content["baselines"]["gcsan"]["cold"] == {"hr_at_20": found["gcsan"]["test"]["cold"]["hr_at_20"]}
    took = {path.stem: json.loads(path.read_text()) for path in (written / "reports/metrics/cost").glob("*.json")}
    needed = [took[part] for part in ("gcsan", "backbone", "align", "tune")]
    assert content["minutes"] == pytest.approx(sum(cost["seconds"] for cost in needed) / 60, rel=1e-5)
    assert content["peak_memory_mb"] == max(cost["peak_memory_mb"] for cost in needed)


def test_figures_that_are_missing_are_left_out(written: Path) -> None:
    found = evidence.evidence(written / "reports")
    without = {**found, "cost": {}, "facts": {}, "buckets": {
        model: by for model, by in found["buckets"].items() if model in ("pop", "gcsan")}}
    content = summary.summary(without, VIEW)
    assert list(content) == ["baselines"] and list(content["baselines"]) == ["gcsan"]
    without["buckets"]["gcsan"]["test"]["cold"] = {"n": 0}
    assert "cold" not in summary.summary(without, VIEW)["baselines"]["gcsan"]


def test_long_losses_are_averaged_and_keep_their_end(written: Path) -> None:
    steps = pl.DataFrame({"step": range(1, 10_001), "epoch": 0.0, "loss": [1.0, 3.0] * 5_000, "lr": 0.1})
    drawn = summary.losses({"tune": steps, "short": steps.head(3)})
    tune = drawn.filter(part="tune")
    assert tune.height == summary.POINTS and tune["step"][-1] == 10_000
    assert tune["value"].to_list() == pytest.approx([2.0] * summary.POINTS, abs=0.02)
    assert drawn.filter(part="short")["value"].to_list() == [1.0, 3.0, 1.0]
    valid = pl.read_csv(written / "reports/plots/validation.csv")
    assert valid.filter(part="tune: ndcg_at_20")["epoch"].to_list() == [1, 2, 3, 4, 5, 6]
    assert summary.losses({}).is_empty() and summary.validation({}).is_empty()


def test_plots_are_drawn_without_a_network(written: Path) -> None:
    plots = declared("plots")
    assert set(plots) == {f"reports/plots/{name}.csv" for name in ("buckets", "losses", "validation")}
    for name in ("config", "plots.html", "plots"):
        source, copy = ROOT / ".dvc" / name, written / ".dvc" / name
        shutil.copytree(source, copy) if source.is_dir() else (copy.parent.mkdir(exist_ok=True),
                                                               shutil.copy(source, copy))
    config = (written / ".dvc/config").read_text()
    (written / ".dvc/config").write_text(config.replace("[core]\n", "[core]\n    no_scm = true\n"))
    (written / "dvc.yaml").write_text(yaml.safe_dump({"plots": [
        {path: {key: value for key, value in settings.items() if key != "cache"}}
        for path, settings in plots.items()]}))
    done = subprocess.run([str(Path(sys.executable).parent / "dvc"), "plots", "show"], cwd=written, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    page = (written / "dvc_plots/index.html").read_text()
    assert not re.search(r"<script[^>]* src=|<link", page) and page.count("vegaEmbed(") >= 3
    specs = [json.loads(spec) for spec in re.findall(r"var spec = (\{.*?\});\n", page)]
    assert len(specs) == 3 and all(len(spec["data"]["values"]) > 10 for spec in specs)
    drawn = {spec["title"]: {row.get("model") or row["part"] for row in spec["data"]["values"]} for spec in specs}
    assert {"llmgr", "gcsan-text"} <= drawn[plots["reports/plots/buckets.csv"]["title"]]
    assert {"tune", "align"} <= drawn[plots["reports/plots/losses.csv"]["title"]]
    assert "<DVC_METRIC" not in json.dumps(specs)
