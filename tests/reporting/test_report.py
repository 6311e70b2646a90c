"""The page says what the metrics say, loads nothing, and survives what is absent or new; the README tables agree."""
from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine import DEFAULTS
from tiny_reports import MODELS, PARAMS, VIEW, write_reports

import record
import report as stage
from llmgr.experiments.records import Record
from llmgr.params import names
from llmgr.reporting import cost, evidence, figures, naming, page, verdicts
from llmgr.runtime.errors import UserError


class Page(html.parser.HTMLParser):
    """Collects text, ids, and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.ids, self.loaded, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.loaded += [values[name] for name in ("src", "srcset", "data") if name in values]
        self.loaded += [values["href"]] if tag == "link" else []
        self.open += [tag] if tag not in ("meta", "br", "link") else []
        if tag == "script":
            self.loaded.append("script")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.ids += [dict(attributes)["id"]] if "id" in dict(attributes) else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_reports(folder)
    return folder


@pytest.fixture
def project(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_stands_alone_and_is_the_same_twice(project: Path) -> None:
    stage.main(VIEW)
    content = Path("reports/index.html").read_text()
    page = Page(content)
    assert page.loaded == [] and page.open == []
    assert "@import" not in content and not re.search(r"url\((?!#)", content)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', content))
    assert used and used <= set(page.ids)
    assert str(project) not in content
    figures = {path.name: path.read_bytes() for path in Path("reports/figures").iterdir()}
    assert sorted(figures) == ["answer.svg", "buckets.svg", "cost.svg", "curves.svg", "differences.svg"]
    stage.main(VIEW)
    assert Path("reports/index.html").read_text() == content
    assert {path.name: path.read_bytes() for path in Path("reports/figures").iterdir()} == figures


def test_the_page_shows_the_figures_of_the_metrics(project: Path) -> None:
    stage.main(VIEW)
    text = Page(Path("reports/index.html").read_text()).text()
    found = json.loads(Path("reports/metrics/buckets.json").read_text())
    bounds = json.loads(Path("reports/metrics/intervals.json").read_text())
    for model in MODELS:
        for convention in ("test", "test_unseen"):
            for metric, value in found[model][convention]["all"].items():
                assert metric == "n" or f"{value:.4f}" in text
                assert metric == "n" or f"{bounds[model][convention]['all'][metric][0]:.4f}–" in text
            assert f"{found[model][convention]['cold']['ndcg_at_20']:.4f}" in text
    assert "12,345" in text and "11,890" in text and "1,500 test sessions" in text
    sections = ["Synthetic data.", "LLMGR ranks the next item", "what it is HR@20", f"All {len(MODELS)} models",
                "Data sample: 1,500 users, 640 items", "Does LLMGR beat the text control?",
                "Cold and warm items", "Differences from every model", "Training", "Cost",
                "All cutoffs, with intervals"]
    assert sorted(sections, key=text.index) == sections, "the answer comes first"
    assert "Synthetic data." in text and "2 CPU threads, X" in text and "21.35" in text


@pytest.mark.parametrize(("gain", "words"), [(4.0, "LLMGR ranks better"), (0.2, "LLMGR ranks worse")])
def test_the_headline_follows_the_numbers(tmp_path: Path, gain: float, words: str) -> None:
    write_reports(tmp_path, gain=gain)
    found = evidence.evidence(tmp_path / "reports")
    text = Page(page.render(found, VIEW, {"buckets": "", "differences": ""})).text()
    assert {v["model"] for v in verdicts.verdicts(found, VIEW)} >= {"gcsan", "gcsan-text"}
    assert words in text and "No clear difference" not in text


@pytest.mark.parametrize(("gain", "word"), [(4.0, "Yes. "), (0.2, "No. ")])
def test_the_page_says_whether_the_control_is_beaten(tmp_path: Path, gain: float, word: str) -> None:
    write_reports(tmp_path, gain=gain)
    found = evidence.evidence(tmp_path / "reports")
    for base in ("gcsan", "gcsan-text"):
        view = PARAMS.view(stage.READS)
        view.model = dataclasses.replace(PARAMS.model, base=base)
        first, *_ = said = verdicts.verdicts(found, view)
        assert first["model"] == "gcsan-text" and {v["model"] for v in said} >= {"gcsan", "gcsan-text"}
        text = Page(page.render(found, view, {"buckets": "", "differences": ""})).text()
        assert f"Does LLMGR beat the text control? {word}LLMGR ranks the next item" in text
    assert "no difference can be called one" not in text
    assert "which the control lacks" not in text
    (gap,) = (v["unseen"]["gaps"]["all"]["ndcg_at_20"] for v in said if v["model"] == "gcsan-text")
    assert f"NDCG@20 {figures.signed(100 * gap['relative'], '.1f')}%, Holm p" in text
    turned = dict(said[0], unseen={**said[0]["unseen"], "word": "no clear difference"})
    assert verdicts.answer([turned], view) == (
        f"With seen items kept {word.lower()[:-2]}, with them excluded not clearly")
    view.tune = dataclasses.replace(PARAMS.tune, linear=True)
    text = Page(page.render(found, view, {"buckets": "", "differences": ""})).text()
    assert "which the control lacks. A control over the same linear model tells the two apart" in text
    view.tune = dataclasses.replace(view.tune, folds=2)
    text = Page(page.render(found, view, {"buckets": "", "differences": ""})).text()
    assert "what LLMGR gains on top of all that, alone in the tables as prior" in text
    assert "over the same linear model" not in text
    view.bucket = dataclasses.replace(PARAMS.bucket, resamples=100)
    text = Page(page.render(found, view, {"buckets": "", "differences": ""})).text()
    assert "With bucket.resamples=100 no difference can be called one" in text, "a verdict that could not be another"


def test_gates_stand_behind_what_they_fuse_and_count_its_ranking_time() -> None:
    models = ["pop", "text-knn", "gated-gcsan-text", "gated-llmgr", "gcsan", "gcsan-text", "llmgr"]
    of = {model: {} for model in models}
    found = evidence.arranged({"buckets": of, "intervals": of, "differences": {}, "cost": {}}, VIEW)
    assert list(found["buckets"]) == list(found["intervals"]) == [
        "pop", "text-knn", "gcsan", "gcsan-text", "gated-gcsan-text", "gated-llmgr", "llmgr"]
    took = {"text-knn": 1.0, "gcsan-text": 2.0, "llmgr": 4.0, "gated-llmgr": 0.5}
    spent = cost.ranking_seconds({"cost": {"evaluate": {"seconds_by_model": took}}}, VIEW)
    assert spent == took | {"gated-llmgr": 5.5}
    assert {model: naming.describe(model, VIEW) for model in models[2:4]} == {
        "gated-gcsan-text": "gate over gcsan-text, text-knn", "gated-llmgr": "gate over llmgr, text-knn"}
    with_term = dataclasses.replace(VIEW.tune, linear=True)
    folder = dataclasses.replace(VIEW.llm, name="/somewhere/all-MiniLM-L6-v2")
    other = SimpleNamespace(**vars(VIEW) | {"tune": with_term, "llm": folder})
    assert naming.describe("llmgr", other) == (
        "language model (all-MiniLM-L6-v2) over gcsan's item vectors and a linear model of clicks and words")
    assert naming.describe("prior", other) == (
        "LLMGR's prior alone: a linear model of clicks and words, no language model tuned")
    other.tune = dataclasses.replace(with_term, folds=4)
    assert naming.describe("llmgr", other) == (
        "language model (all-MiniLM-L6-v2) over gcsan's item vectors, its scores and a linear model of clicks and "
        "words")
    assert naming.describe("prior", other) == (
        "LLMGR's prior alone: a linear model of clicks and words and gcsan, no language model tuned")
    other.tower = dataclasses.replace(VIEW.tower, enabled=True, encoder="tokens")
    start = "LLMGR's prior alone: a linear model of clicks and words and gcsan and tower"
    assert naming.describe("prior", other) == start + ", no language model tuned"
    assert naming.describe("tower", other).endswith("no language model")
    other.tower = dataclasses.replace(VIEW.tower, enabled=True, encoder="language-model")
    assert naming.describe("prior", other) == start
    assert "language model, tuned" in naming.describe("tower", other)
    assert naming.describe("llmgr", other).endswith("its scores and a linear model of clicks and words and the tower's "
                                                    "scores")
    hub = dataclasses.replace(VIEW.llm, name="sentence-transformers/all-MiniLM-L6-v2")
    assert [naming.llm_name(SimpleNamespace(llm=llm)) for llm in (folder, hub)] == [
        "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"]
    assert naming.describe("gcsan-text", VIEW) == "gcsan with item texts: the control"
    assert naming.describe("gcsan-shuffled", VIEW) == "gcsan with other items' texts"
    assert naming.describe("gcsan-linear", VIEW) == (
        "gcsan with item texts, over the linear model of clicks and words: no language model tuned")


def test_a_difference_is_one_only_where_the_corrected_p_is_small() -> None:
    assert verdicts.call({"difference": 0.002, "p": 0.001, "p_holm": 0.02}) == "better"
    assert verdicts.call({"difference": -0.002, "p": 0.001, "p_holm": 0.02}) == "worse"
    assert verdicts.call({"difference": 0.002, "p": 0.01, "p_holm": 0.05}) == "no clear difference"
    assert verdicts.call({"difference": 0.0, "p": 1.0, "p_holm": 1.0}) == "no clear difference"


def test_p_that_the_resamples_cannot_resolve_is_a_bound() -> None:
    least = 2 / 5001
    assert verdicts.p_text({"p": float(f"{least:.6g}"), "p_holm": 9 * least}, 5000) == ("≤ 0.0004", "≤ 0.0036")
    assert verdicts.p_text({"p": 2 * least, "p_holm": 0.0234}, 5000) == ("0.0008", "0.023")
    assert verdicts.p_text({"p": 0.61, "p_holm": 1.0}, 5000) == ("0.61", "1")


def test_the_page_holds_with_many_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = [f"net{letter}" for letter in "abcdefgh"]
    models = (*names.BASELINES, *(name for e in [*encoders, "gcsan"] for name in (e, f"{e}-text")), "llmgr")
    write_reports(tmp_path, models=models, sessions=400)
    found = evidence.evidence(tmp_path / "reports")
    chosen = page.highlights(found, VIEW)
    others = {m: by["test"]["all"]["ndcg_at_20"] for m, by in found["buckets"].items() if m.startswith("net")}
    strongest = sorted(others, key=others.get)[-3:]
    assert set(chosen) == {*names.BASELINES, "gcsan", "gcsan-text", "llmgr", *strongest} and len(chosen) == page.DRAWN
    assert chosen == [m for m in models if m in chosen]
    drawn = page.draw(found, VIEW)
    weakest = min(others, key=others.get)
    assert all(f">{m}<" in drawn["buckets"] for m in chosen) and f">{weakest}<" not in drawn["buckets"]
    assert f"{weakest}: training" not in drawn["curves"] and "tune: training" in drawn["curves"]
    assert all(f">{m}<" in drawn["cost"] and f"against {m}<" in drawn["differences"] for m in models[:-1])
    text = Page(page.render(found, VIEW, drawn)).text()
    for convention, bucket in (("test", "all"), ("test", "cold"), ("test_unseen", "trained_5_9")):
        for metric, value in found["buckets"][weakest][convention][bucket].items():
            low, high = found["intervals"][weakest][convention][bucket].get(metric, (0, 0))
            assert metric == "n" or f"{value:.4f} {low:.4f}–{high:.4f}" in text
    assert len(verdicts.verdicts(found, VIEW)) == len({"gcsan", "gcsan-text", max(others, key=others.get)})


def test_real_data_bear_no_banner(project: Path) -> None:
    view = PARAMS.view(stage.READS)
    view.data = SimpleNamespace(dataset="beauty", max_session=50)
    stage.main(view)
    text = Page(Path("reports/index.html").read_text()).text()
    assert "Synthetic" not in text and "LLMGR on beauty" in text


def test_new_encoders_appear_and_a_missing_llmgr_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(tmp_path, models=(*MODELS[:-1], "sasrec", "sasrec-text", "<new> & odd"))
    for name in ("cost", "encoders"):
        shutil.rmtree(tmp_path / "reports/metrics" / name)
    shutil.rmtree(tmp_path / "reports/curves")
    monkeypatch.chdir(tmp_path)
    stage.main(VIEW)
    text = Page(Path("reports/index.html").read_text()).text()
    assert "LLMGR has not been evaluated" in text and "sasrec-text" in text and "<new> & odd" in text
    assert sorted(path.name for path in Path("reports/figures").iterdir()) == ["answer.svg", "buckets.svg"]


def test_missing_metrics_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"reports/metrics/buckets\.json is missing"):
        stage.main(VIEW)


def test_training_time_counts_all_that_a_model_needs(written: Path) -> None:
    found = evidence.evidence(written / "reports")
    took = {name: cost["seconds"] for name, cost in found["cost"].items()}
    spent = cost.training_seconds(found, VIEW)
    assert spent["gcsan"] == took["gcsan"] and spent["gcsan-text"] == took["gcsan-text"] + took["backbone"]
    assert spent["llmgr"] == pytest.approx(sum(took[part] for part in ("gcsan", "backbone", "align", "tune")))
    assert "pop" not in spent
    gate = {"seconds": 9.0, "seconds_by_model": {"gated-llmgr": 1.5, "llmgr": 4.0}}
    more = {**found, "cost": {**found["cost"], "gate": gate},
            "buckets": {**found["buckets"], "gated-llmgr": found["buckets"]["llmgr"]}}
    took_both = {"seconds": took["tune"], "prepared_seconds": 3.0}
    started = {**found, "cost": {**found["cost"], "folds": {"seconds": 40.0}, "tune": took_both},
               "buckets": {**found["buckets"], "prior": found["buckets"]["llmgr"]}}
    folded = SimpleNamespace(**vars(VIEW) | {"tune": dataclasses.replace(VIEW.tune, linear=True, folds=2)})
    assert cost.training_seconds(started, folded)["prior"] == pytest.approx(spent["gcsan"] + 43)
    assert cost.training_seconds(started, folded)["llmgr"] == pytest.approx(spent["llmgr"] + 40)
    assert cost.training_seconds({**started, "cost": found["cost"] | {"tune": took_both}}, VIEW)["prior"] == 3
    fitted = cost.training_seconds(more, VIEW)
    assert fitted["gated-llmgr"] == pytest.approx(spent["llmgr"] + 1.5) and fitted["llmgr"] == spent["llmgr"]


def test_recorded_results_are_the_reports_numbers(project: Path) -> None:
    shutil.copy(DEFAULTS, "params.yaml")
    view = PARAMS.view(record.READS)
    record.main(view)
    folder = Path("reports/results/sample")
    record.main(view, name="another")
    assert (folder.parent / "another/metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"differences.csv", "metrics.csv", "params.yaml", "run.json"}
    assert (folder / "params.yaml").read_bytes() == Path("params.yaml").read_bytes()
    written, found = Record(folder), json.loads(Path("reports/metrics/buckets.json").read_text())
    for model in MODELS:
        for split, convention in (("test", "kept"), ("test_unseen", "excluded")):
            for bucket, by in found[model][split].items():
                if by["n"]:
                    assert written.mean(model, "ndcg_at_20", bucket, convention) == pytest.approx(
                        by["ndcg_at_20"], abs=1e-6)
    assert written.costs["tune"]["hardware"] == "2 CPU threads, X"
    assert json.loads((folder / "run.json").read_text())["facts"]["filter"]["after"]["users"] == 1500
    assert str(project) not in "".join(path.read_text() for path in folder.iterdir())


def test_recording_without_results_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="evaluate"):
        record.main(PARAMS.view(record.READS))
    assert not Path("reports").exists()


def test_the_page_opens_with_a_sentence_a_figure_and_few_rows(written: Path) -> None:
    found = evidence.evidence(written / "reports")
    chosen = {"lr": 0.003, "search": {"rates": [0.001, 0.003, 0.01], "ndcg_at_20": [0.1, 0.3, 0.2]}}
    found["facts"]["encoders"] = {"gcsan": chosen, "gcsan-text": {"lr": 0.003}}
    few = page.first_rows(found, VIEW)
    untrained = max(names.BASELINES, key=lambda model: found["buckets"][model]["test"]["all"]["ndcg_at_20"])
    assert few == [untrained, "gcsan", "gcsan-text", "llmgr"]
    drawn = page.draw(found, VIEW)
    assert all(f">{model}<" in drawn["answer"] for model in few) and ">gcsan-shuffled<" not in drawn["answer"]
    text = Page(page.render(found, VIEW, drawn)).text()
    top = text[:text.index(f"All {len(MODELS)} models")]
    assert all(f"{found['buckets'][model]['test']['cold']['hr_at_20']:.4f}" in top for model in few)
    assert "built-in" not in text and "gcsan-shuffled" not in top, "the rest is behind the fold"
    assert "learning rate 0.003, chosen among 0.001, 0.003, 0.01" in top
    assert len(page.render(found, VIEW, drawn).encode()) < 1_000_000
