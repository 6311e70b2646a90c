"""README and reports/RESULTS.md say what is recorded, to the last digit; what they link is there; the tree."""
from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from machine import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "reports/RESULTS.md").read_text()
HEADS = {"Beauty": "beauty", "Office Products": "office"}
COLUMNS = [(split, "all", metric) for split in ("test", "test_unseen")
           for metric in ("hr_at_20", "ndcg_at_20", "mrr_at_20")]
COLUMNS += [("test_unseen", bucket, "hr_at_20") for bucket in ("cold", "warm")]


def recorded(folder: str) -> dict:
    """The metrics of a recorded run."""
    return json.loads((ROOT / "reports/results" / folder / "metrics.json").read_text())


def rows(text: str) -> list[list[str]]:
    """The cells of the first Markdown table of a text, without head and rule, bold taken away."""
    table = re.search(r"(?:^[ ]*\|.*\n)+", text, re.M)
    assert table, "no table"
    return [[cell.strip().replace("*", "") for cell in line.strip().strip("|").split("|")]
            for line in table[0].splitlines()[2:]]


@pytest.mark.parametrize("head", HEADS)
def test_the_tables_hold_the_recorded_figures(head: str) -> None:
    table = rows(RESULTS[RESULTS.index(f"**{head}**, "):])
    without, now = (recorded(HEADS[head] + run)["buckets"] for run in ("-without-linear", ""))
    seen = set()
    for name, *cells in table:
        model, _, lacks = name.partition(", ")
        assert lacks in ("", "`tune.linear=false`")
        figures = without[model] if lacks else now[model]
        assert cells == [f"{figures[split][bucket][metric]:.4f}" for split, bucket, metric in COLUMNS], name
        seen |= {model} if not lacks else set()
    assert seen == {*now}


def test_the_best_of_a_column_is_bold() -> None:
    for head in HEADS:
        lines = RESULTS[RESULTS.index(f"**{head}**, "):].split("\n\n")[1].splitlines()[2:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]
        for column in zip(*cells):
            best = max(cell.strip("*") for cell in column)
            assert [cell.startswith("**") for cell in column] == [cell.strip("*") == best for cell in column]


def means(folder: str, model: str) -> str:
    """HR@20 / NDCG@20, seen items excluded, of a record's seeds, or of its one."""
    record = recorded(folder)
    runs = record["seeds"]["figures"] if record["seeds"] else {"": record["buckets"]}
    assert len(runs) in (1, 3)
    return " / ".join(f"{np.mean([run[model]['test_unseen']['all'][metric] for run in runs.values()]):.4f}"
                      for metric in ("hr_at_20", "ndcg_at_20"))


def test_what_came_out_is_as_recorded() -> None:
    kinds = {"GC-SAN": ("folds", "gcsan"), "control": ("folds", "gcsan-text"), "our reading": ("paper", "llmgr"),
             "a ridge": ("folds", "slit-text"), "the control whose": ("folds", "gcsan-linear"),
             "LLMGR, the preset": ("folds", "llmgr"), "gate of": ("folds", "gated-gcsan-text-floors"),
             "the same gate with": ("token-tower", "gated-gcsan-text-tower"),
             "LLMGR with a text tower of token": ("token-tower", "llmgr"),
             "LLMGR with a text tower of MiniLM": ("tower", "llmgr")}
    table = rows(README[README.index("**What came out**"):])
    assert len(table) == len(kinds)
    for name, *cells in table:
        run, model = next(kinds[start] for start in kinds if name.startswith(start))
        folders = [folder and f"{folder}-{run}" for folder in ("" if run == "paper" else "beauty", "office")]
        assert cells == [folder and means(folder, model) for folder in folders], name
        assert ("one seed" in name) == (not recorded(folders[1])["seeds"]), name


def test_the_table_of_means_holds_the_recorded_seeds() -> None:
    models = {"GC-SAN": "gcsan", "control": "gcsan-text", "control with": "gcsan-linear", "LLMGR with": "llmgr",
              "the linear start alone": "slit-text",
              "gate": "gated-gcsan-text-floors", "the same gate": "gated-both-floors"}
    elsewhere = {"our reading": ("", "office-paper"), "LLMGR over": ("beauty-without-linear", "office-without-linear"),
              **dict.fromkeys(("MiniLM tuned", "what LLMGR starts from with the tower", "LLMGR with the tower"),
                              ("beauty-tower", "office-tower")),
              **dict.fromkeys(("with a token tower", "that in a gate"), ("beauty-token-tower", "office-token-tower")),
              **dict.fromkeys(("LLMGR out of fold", "the same in a gate", "what LLMGR starts from"),
                              ("beauty-folds", "office-folds"))}
    table = rows(RESULTS[RESULTS.index("## In short"):])
    assert len(table) == len(models) + len(elsewhere)
    for name, *cells in table:
        if folders := next((elsewhere[start] for start in elsewhere if name.startswith(start)), None):
            model = next((kind for words, kind in (("starts from", "llmgr-start"), ("in a gate", "gated-both"),
                                                   ("(`tower`", "tower")) if words in name), "llmgr")
        else:
            folders = "beauty", "office"
            model = next(models[start] for start in sorted(models, key=len, reverse=True) if name.startswith(start))
        assert cells == [folder and means(folder, model) for folder in folders], name


def test_what_a_run_costs_is_as_recorded() -> None:
    names = {"item texts": "backbone", "GC-SAN": "gcsan", "control": "gcsan-text", "`gcsan-linear`": "gcsan-linear",
             "the control without": "folds", "five towers of token": "tower", "stage 1": "align", "stage 2": "tune",
             "gates": "gate", "scoring": "evaluate"}
    costs = [recorded(f"{dataset}-token-tower")["cost"] for dataset in ("beauty", "office")]
    table = rows(README[README.index("### What a run costs"):])
    found = {names[start]: cells for name, *cells in table for start in sorted(names, key=len)[::-1]
             if name.startswith(start)}
    assert set(found) == set(names.values())
    for stage, (*minutes, _) in found.items():
        assert minutes == [f"{cost[stage]['seconds'] / 60:.1f}" for cost in costs], stage
    peak = next(cells for name, *cells in table if name.startswith("memory"))
    assert peak[:2] == [f"{max(stage['peak_memory_mb'] for stage in cost.values()) / 1000:.1f}" for cost in costs]


def test_the_table_of_one_seed_out_of_fold_holds_the_recorded_figures() -> None:
    table, record = rows(RESULTS[RESULTS.index("## Out of fold"):]), recorded("beauty-folds")
    assert {"llmgr", "llmgr-start", "gcsan-linear"} < {name for name, *_ in table}
    for name, *cells in table:
        figures = record["buckets"][name]["test_unseen"]
        assert cells == [f"{figures[bucket][metric]:.4f}" for bucket, metric in (
            *(("all", m) for m in ("hr_at_20", "ndcg_at_20", "mrr_at_20")), ("cold", "hr_at_20"), ("warm", "hr_at_20"))]


@pytest.mark.parametrize("head, folder", [
    ("Beauty, seed 1,", "beauty-tower"), ("Office, seed 2026, [all", "office-tower")])
def test_the_tables_with_the_tower_hold_the_recorded_figures(head: str, folder: str) -> None:
    text = RESULTS[RESULTS.index("## With the text tower"):]
    record = recorded(folder)
    for name, *cells in rows(text[text.index(head):]):
        figures = record["buckets"][name]["test_unseen"]
        assert cells == [f"{figures[bucket][metric]:.4f}" for bucket, metric in (
            *(("all", m) for m in ("hr_at_20", "ndcg_at_20", "mrr_at_20")), ("cold", "hr_at_20"), ("warm", "hr_at_20"))]


def test_llmgr_over_each_tower_is_as_recorded() -> None:
    text = RESULTS[RESULTS.index("- **Is it the language model?**"):]
    table = rows(text)
    assert len(table) == 6
    for name, *cells in table:
        dataset, tower = name.split(", ")
        folder = {"no tower": {"Beauty": "beauty-seed1", "Office": "office-folds"}[dataset],
                  "token tower": f"{dataset.lower()}-token-tower", "MiniLM's tower": f"{dataset.lower()}-tower"}[tower]
        figures = recorded(folder)["buckets"]["llmgr"]["test_unseen"]
        assert cells == [f"{figures[bucket][metric]:.4f}" for bucket, metric in (
            *(("all", m) for m in ("hr_at_20", "ndcg_at_20", "mrr_at_20")), ("cold", "hr_at_20"), ("warm", "hr_at_20"))]


@pytest.mark.parametrize("head, folder", [
    ("Beauty, [all", "beauty-token-tower"), ("Office, [all", "office-token-tower")])
def test_three_seeds_of_the_token_tower_are_as_recorded(head: str, folder: str) -> None:
    text = RESULTS[RESULTS.index("### Three seeds of the token tower"):]
    record = recorded(folder)["seeds"]
    runs = record["figures"]
    assert set(runs) == {"1", "2", "2026"} and record["ours"] == "llmgr"
    for name, *cells in rows(text[text.index(head):]):
        assert cells == [f"{np.mean([run[name]['test_unseen'][bucket][metric] for run in runs.values()]):.4f}"
                         for bucket, metric in (("all", "hr_at_20"), ("all", "ndcg_at_20"), ("all", "mrr_at_20"),
                                                ("cold", "hr_at_20"), ("warm", "hr_at_20"))], name
    said = " ".join(text[text.index(f"- **{head.partition(',')[0]}**"):].split())[:1100]
    for model, words in (("gcsan", "over GC-SAN"), ("gcsan-text", "over the control"),
                         ("gcsan-linear", "over gcsan-linear"),
                         ("gated-gcsan-text-floors", "over the control's gate with all floors")):
        gaps = [record["differences"][model]["test_unseen"][metric] for metric in ("hr_at_20", "ndcg_at_20")]
        after = said[said.index(words):][:100]
        assert all(f"{gap['relative']:+.1%}" in after for gap in gaps), model
        sure = not (model.startswith("gated") and folder.startswith("office"))
        assert all((gap["p_holm"] < 0.0081) == sure for gap in gaps), model


@pytest.mark.parametrize("folder, head", [
    ("beauty-tower", "- **LLMGR alone is the best"), ("office-tower", "- **Office**, over")])
def test_what_is_said_of_the_tower_is_as_recorded(folder: str, head: str) -> None:
    text = " ".join(RESULTS[RESULTS.index("## With the text tower"):].split())
    text = text[text.index(head):]
    record = recorded(folder)
    gaps = {model: by["test_unseen"]["all"] for model, by in record["differences"].items()}
    for model in ("gcsan", "gcsan-text", "gcsan-linear", "gated-gcsan-text-floors", "gated-gcsan-text-tower"):
        found = [f"{gaps[model][metric]['relative']:+.1%}".replace("-", "−") for metric in ("hr_at_20", "ndcg_at_20")]
        assert all(word in text[:1100] for word in found), (model, found)
        if model in ("gcsan", "gcsan-text", "gcsan-linear"):
            assert max(gaps[model][metric]["p_holm"] for metric in ("hr_at_20", "ndcg_at_20")) < 0.009
    assert f"over {len(gaps)} models" in text[:1100]


def test_what_llmgr_adds_out_of_fold_is_as_recorded() -> None:
    text = " ".join(RESULTS[RESULTS.index("## Out of fold"):].split())
    gaps = {model: by["test_unseen"] for model, by in recorded("beauty-folds")["differences"].items()}
    start, linear = gaps["llmgr-start"], gaps["gcsan-linear"]
    for words, by, bucket, p in (
            ("over gcsan-linear: HR@20 {:+.1%} (Holm p {:.2g} over 18 models)", linear, "all", "p_holm"),
            ("over its start: HR@20 {:+.1%} (Holm p {:.2g} over 18 models)", start, "all", "p_holm"),
            ("cold items {:+.1%} HR@20 (Holm {:.1g})", start, "cold", "p_holm")):
        gap = by[bucket]["hr_at_20"]
        assert words.format(gap["relative"], gap[p]) in text, words
    for bucket, metric, words in (("cold", "hr_at_20", "cold items {}"), ("all", "ndcg_at_20", "NDCG@20 {}"),
                                  ("all", "mrr_at_20", "MRR@20 {}"),
                                  ("warm", "hr_at_20", "warm {} HR@20 (Holm p ≤ 0.0072")):
        assert words.format(f"{linear[bucket][metric]['relative']:+.1%}") in text
    before = recorded("beauty-without-recency")
    figures = [before["buckets"][model]["test_unseen"]["all"] for model in ("llmgr-start", "llmgr")]
    gap = before["differences"]["llmgr-start"]["test_unseen"]
    assert "start had {} and LLMGR {}, {:.1%} above it (Holm {:.2g}) and {:.0%} on cold".format(
        *(f"{f['hr_at_20']:.4f} / {f['ndcg_at_20']:.4f}" for f in figures), gap["all"]["hr_at_20"]["relative"],
        gap["all"]["hr_at_20"]["p_holm"], gap["cold"]["hr_at_20"]["relative"]) in text
    assert max(linear[bucket][metric]["p_holm"] for bucket, metric in (
        ("all", "ndcg_at_20"), ("all", "mrr_at_20"), ("cold", "hr_at_20"), ("warm", "hr_at_20"))) < 0.0073


TWINS = {"LLMGR": "llmgr", "tuned language model of random weights": "random-weights",
         "without stage 1": "without-stage-1", "all targets alike (`tune.recency=1`)": "without-recency",
         "without LoRA (language model frozen)": "without-lora",
         "item vectors alone at the node slots": "without-node-texts",
         "texts and base shuffled among items": "shuffled-texts",
         "the base not out of fold (`tune.folds=0`)": "without-folds",
         "without the linear start, not out of fold": "without-linear"}


@pytest.mark.parametrize(("folder", "seeds_at", "twins_at", "over"), [
    ("beauty-folds", "**Three seeds**", "**Twins**", (
        "LLMGR over gcsan-linear: HR@20 {gcsan-linear hr_at_20}, NDCG@20 {gcsan-linear ndcg_at_20}, MRR@20 "
        "{gcsan-linear mrr_at_20}",
        "Over its start: HR@20 {llmgr-start hr_at_20}, NDCG@20 {llmgr-start ndcg_at_20}, MRR@20 "
        "{llmgr-start mrr_at_20}")),
    ("office-folds", "**Office**, the same", "**Office's twins**", (
        "LLMGR over gcsan-linear: HR@20 {gcsan-linear hr_at_20} (Holm p {holm gcsan-linear hr_at_20}), NDCG@20 "
        "{gcsan-linear ndcg_at_20} ({holm gcsan-linear ndcg_at_20}), MRR@20 {gcsan-linear mrr_at_20} "
        "({holm gcsan-linear mrr_at_20})",
        "over the control {gcsan-text hr_at_20}, {gcsan-text ndcg_at_20}, {gcsan-text mrr_at_20} and over GC-SAN "
        "{gcsan hr_at_20} HR@20 ({holm gcsan hr_at_20} each",
        "Over its start: HR@20 {llmgr-start hr_at_20} (Holm p {holm llmgr-start hr_at_20}), NDCG@20 "
        "{llmgr-start ndcg_at_20} ({holm llmgr-start ndcg_at_20}), MRR@20 {llmgr-start mrr_at_20} "
        "({holm llmgr-start mrr_at_20})"))])
def test_seeds_and_twins_out_of_fold_hold_the_recorded_figures(folder, seeds_at, twins_at, over) -> None:
    record = recorded(folder)
    columns = [("all", "hr_at_20"), ("all", "ndcg_at_20"), ("all", "mrr_at_20"), ("cold", "hr_at_20"),
               ("warm", "hr_at_20")]
    seeds = record["seeds"]["figures"]
    assert set(seeds) == {"1", "2", "2026"}
    text = RESULTS[RESULTS.index(seeds_at):]
    for name, *cells in rows(text):
        assert cells == [f"{np.mean([run[name]['test_unseen'][bucket][metric] for run in seeds.values()]):.4f}"
                         for bucket, metric in columns], name
    said = {}
    for model, by in record["seeds"]["differences"].items():
        for metric, gap in by["test_unseen"].items():
            said |= {f"{model} {metric}": f"{gap['relative']:+.1%}", f"holm {model} {metric}": f"{gap['p_holm']:.2g}"}
    for words in over:
        assert re.sub(r"{(.*?)}", lambda found: said[found[1]], words) in " ".join(text.split())
    table = rows(text[text.index(twins_at):])
    assert {TWINS[name] for name, *_ in table} == set(record["twins"])
    for name, *cells in table:
        figures = record["twins"][TWINS[name]]["figures"]["test_unseen"]
        assert cells == [f"{figures[bucket][metric]:.4f}" for bucket, metric in columns], name


def test_the_twins_of_another_seed_hold_the_recorded_figures() -> None:
    record = recorded("beauty-seed1")
    table = rows(RESULTS[RESULTS.index("(results/beauty-seed1/results.md)"):])
    assert {TWINS[name] for name, *_ in table} == set(record["twins"])
    for name, *cells in table:
        figures = record["twins"][TWINS[name]]["figures"]["test_unseen"]
        assert cells == [f"{figures[bucket][metric]:.4f}" for bucket, metric in (
            ("all", "hr_at_20"), ("all", "ndcg_at_20"), ("all", "mrr_at_20"), ("cold", "hr_at_20"),
            ("warm", "hr_at_20"))], name
    metrics = ("hr_at_20", "ndcg_at_20", "mrr_at_20")
    start = record["buckets"]["llmgr-start"]["test_unseen"]["all"]
    gaps = record["differences"]["llmgr-start"]["test_unseen"]["all"]
    assert "The start has {} / {} / {} there; LLMGR is {}, {} and {} above it (Holm p 0.0072 each)".format(
        *(f"{start[name]:.4f}" for name in metrics), *(f"{gaps[name]['relative']:.1%}" for name in metrics)
    ) in " ".join(RESULTS.split())
    assert max(gaps[name]["p_holm"] for name in metrics) < 0.0073


def test_the_twins_hold_the_recorded_figures() -> None:
    twins = recorded("office-twins")["twins"]
    names = {"LLMGR": "llmgr", "tuned language model of random weights": "random-weights",
             "without LoRA (language model frozen)": "without-lora", "without stage 1": "without-stage-1",
             "item vectors alone at the node slots": "without-node-texts",
             "texts and base shuffled among items": "shuffled-texts", "without the linear start": "without-linear"}
    table = rows(RESULTS[RESULTS.index("Pretraining matters little"):])
    assert {name for name, *_ in table} == set(names)
    for name, both, cold, _ in table:
        figures = twins[names[name]]["figures"]["test_unseen"]
        assert both == f"{figures['all']['hr_at_20']:.4f} / {figures['all']['ndcg_at_20']:.4f}", name
        assert cold == f"{figures['cold']['hr_at_20']:.4f}", name


def test_beauty_is_compared_as_the_recorded_seeds_say() -> None:
    text = " ".join(RESULTS[RESULTS.index("## What the figures say"):].split())
    record = recorded("beauty")
    gaps = {model: by["test_unseen"] for model, by in record["seeds"]["differences"].items()}
    assert f"and {len(gaps)} (Beauty) models that LLMGR is compared with" in text and record["seeds"]["ours"] == "llmgr"
    assert f"{gaps['gcsan']['hr_at_20']['relative']:.0%} (Beauty)" in text
    control, linear = gaps["gcsan-text"], gaps["gcsan-linear"]
    assert (f"{control['hr_at_20']['relative']:.1%} on Beauty (p < 0.01; NDCG@20 "
            f"{control['ndcg_at_20']['relative']:+.1%}, p < 0.01)") in text
    assert max(control[metric]["p_holm"] for metric in ("hr_at_20", "ndcg_at_20")) < 0.01
    assert (f"Beauty HR@20 {linear['hr_at_20']['relative']:+.1%} (p {linear['hr_at_20']['p_holm']:.2g}), NDCG@20 "
            f"{linear['ndcg_at_20']['relative']:+.1%} and MRR@20 {linear['mrr_at_20']['relative']:+.1%} (p < 0.01)"
            ).replace("-", "−") in text
    assert max(linear[metric]["p_holm"] for metric in ("ndcg_at_20", "mrr_at_20")) < 0.01
    zen4 = recorded("beauty-zen4")
    assert zen4["buckets"].keys() < record["buckets"].keys()


def test_office_is_compared_as_the_recorded_seeds_say() -> None:
    text = " ".join(RESULTS[RESULTS.index("## What the figures say"):].split())
    record = recorded("office")
    gaps = {model: by["test_unseen"] for model, by in record["seeds"]["differences"].items()}
    assert f"Holm for the {len(gaps)} (Office)" in text and record["seeds"]["ours"] == "llmgr"
    control, linear = gaps["gcsan-text"], gaps["gcsan-linear"]
    assert (f"{control['hr_at_20']['relative']:.1%} on Office (p {control['hr_at_20']['p_holm']:.2f}; NDCG@20 "
            f"{control['ndcg_at_20']['relative']:+.1%}, p < 0.01)") in text and control["ndcg_at_20"]["p_holm"] < 0.01
    assert (f"Office HR@20 {linear['hr_at_20']['relative']:+.1%} (p {linear['hr_at_20']['p']:.2g} before correction), "
            f"NDCG@20 {linear['ndcg_at_20']['relative']:+.1%} (p {linear['ndcg_at_20']['p']:.1g})") in text
    paper, other = (recorded("office-paper")["buckets"][model]["test_unseen"]["all"] for model in ("llmgr", "gcsan"))
    for figures in (paper, other):
        assert f"{figures['hr_at_20']:.4f} / {figures['ndcg_at_20']:.4f}" in text.replace("[", "").replace("]", "")


@pytest.mark.parametrize(("page", "folder"), [(README, "."), (RESULTS, "reports")])
def test_links_lead_to_files_and_headings(page: str, folder: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page)
    assert len(links) > 5
    for link, anchor in links:
        target = Path(ROOT, folder, link)
        assert not link or target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text() if link else page, re.M)
            assert anchor[1:] in {head.lower().replace(" ", "-") for head in heads}, anchor


def test_the_tree_lists_what_there_is() -> None:
    tree = README[README.index("## The tree"):]
    for indent, folder in ((2, "stages"), (4, "stages/llmgr")):
        listed = re.findall(rf"^ {{{indent}}}((?:\w+\.py +)+)", tree, re.M)
        assert {name for names in listed for name in names.split()} == {
            path.name for path in Path(ROOT, folder).glob("*.py")} - {"__init__.py"}


def test_recboles_side_is_the_recorded_comparison() -> None:
    table = {name: cells for name, *cells in rows((ROOT / "reports/results/office/recbole.md").read_text())}
    found = {name.strip("`"): cells for name, *cells in rows(README[README.index("### Baselines"):])}
    assert {name for name in found if re.match("0", found[name][2])} == set(table)
    for name, (ours, theirs, _, ndcg, their_ndcg, *_) in table.items():
        assert found[name][2:] == [f"{ours} / {ndcg}", f"{theirs} / {their_ndcg}"], name


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"\b(?:[A-Z]{2,}_TABLE|SCORED|TODO|TBD|FIXME)\b", README + RESULTS)
