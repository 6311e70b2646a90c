"""From the pipeline's metrics to one page, and to tables for a README: every number is read, none is computed anew."""
from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from llmgr import figures
from llmgr.artifacts import left_behind, read_json
from llmgr.buckets import OURS
from llmgr.figures import duration, pretty, signed
from llmgr.params import flat
from llmgr.ranking import names

CONVENTIONS = {"test": "Seen items kept", "test_unseen": "Seen items excluded"}
HEADLINE = ("hr_at_20", "ndcg_at_20", "mrr_at_20")
REQUIRED = ("buckets", "intervals", "differences")
FACTS = ("filter", "split", "backbone", "align", "tune")


def evidence(reports: Path) -> dict[str, Any]:
    """All that the report shows, from `reports/`: metrics, facts by stage, costs, and curves as frames.

    UserError where what the bucket stage writes is missing; everything else may be absent.
    """
    metrics, curves = reports / "metrics", reports / "curves"
    order = [*FACTS, "evaluate"]
    facts = {name: read_json(metrics / f"{name}.json") for name in FACTS if (metrics / f"{name}.json").exists()}
    ignored = left_behind(reports)
    encoders = sorted({*metrics.glob("encoders/*.json")} - ignored, key=lambda path: path.stem)
    costs = {path.stem: read_json(path) for path in sorted(
        {*metrics.glob("cost/*.json")} - ignored,
        key=lambda path: (path.stem in order and 1 + order.index(path.stem), path.stem))}
    return {name: read_json(metrics / f"{name}.json") for name in REQUIRED} | {
        "facts": facts | ({"encoders": {path.stem: read_json(path) for path in encoders}} if encoders else {}),
        "cost": costs,
        "steps": _curves({*curves.glob("*_steps.csv")} - ignored, costs),
        "epochs": _curves({*curves.glob("*_epochs.csv")} - ignored, costs),
    }


def _curves(paths: set[Path], order: Mapping) -> dict[str, pl.DataFrame]:
    place = {name: number for number, name in enumerate(order)}
    found = {path.stem.rpartition("_")[0]: path for path in paths}
    frames = {name: pl.read_csv(found[name], infer_schema_length=None)
              for name in sorted(found, key=lambda name: (place.get(name, len(place)), name))}
    return {name: frame for name, frame in frames.items() if frame.height}


def draw(found: Mapping[str, Any], params: Any) -> dict[str, str]:
    """The figures that the evidence allows, name to SVG."""
    label = {bucket: bucket_label(bucket, params.bucket) for bucket in _buckets(found)}
    sizes = {bucket: figures_["n"] for bucket, figures_ in next(iter(found["buckets"].values()))["test"].items()}
    ticks = {bucket: f"{text}\nn = {sizes[bucket]:,}" for bucket, text in label.items()}
    panels = {"by interactions in the 5-core data": "count_", "by interactions in training": "trained_"}
    drawn = {"buckets": figures.buckets(found["buckets"], found["intervals"], {
        title: {b: text for b, text in ticks.items() if b.startswith(prefix)} for title, prefix in panels.items()})}
    if found["differences"]:
        drawn["differences"] = figures.differences(found["differences"])
    if found["steps"] or found["epochs"]:
        drawn["curves"] = figures.curves(found["steps"], found["epochs"])
    spent = training_seconds(found, params)
    if any(spent.values()):
        quality = {model: by["test"]["all"]["ndcg_at_20"] for model, by in found["buckets"].items()}
        drawn["cost"] = figures.cost(quality, spent, "ndcg_at_20")
    return drawn


def training_seconds(found: Mapping[str, Any], params: Any) -> dict[str, float]:
    """Training time by model, with everything that it needs: a control its text vectors, LLMGR its base and stages."""
    took = {name: cost["seconds"] for name, cost in found["cost"].items()}
    needs = {model: [model, *(["backbone"] if "-" in model else [])] for model in found["buckets"] if model in took}
    if OURS in found["buckets"]:
        needs[OURS] = [*needs.get(params.model.base, []), "backbone", "align", "tune"]
    return {model: sum(took.get(part, 0.0) for part in set(parts)) for model, parts in needs.items()}


def verdicts(found: Mapping[str, Any], params: Any) -> list[dict[str, Any]]:
    """What came out in words: LLMGR against its base encoder, the text control and the strongest other model.

    A difference is called one only where its paired 95% interval excludes 0.
    """
    gaps = found["differences"]
    if not gaps:
        return []
    strongest = max(gaps, key=lambda model: found["buckets"][model]["test"]["all"]["ndcg_at_20"])
    roles = {params.model.base: "its base encoder"}
    for model in gaps:
        if model.endswith("-text"):
            roles.setdefault(model, "the text + GNN control")
    roles.setdefault(strongest, "the strongest other model")
    return [_verdict(found, model, role) for model, role in roles.items() if model in gaps]


def _verdict(found: Mapping[str, Any], model: str, role: str) -> dict[str, Any]:
    gaps = found["differences"][model]["test"]
    calls = {metric: call(gaps["all"][metric]) for metric in HEADLINE}
    kinds = set(calls.values())
    word = kinds.pop() if len(kinds) == 1 else "mixed"
    return {"model": model, "role": role, "word": word, "calls": calls,
            "ours": found["buckets"][OURS]["test"]["all"], "theirs": found["buckets"][model]["test"]["all"],
            "gaps": gaps, "cold": call(gaps["cold"]["hr_at_20"]) if "cold" in gaps else None}


def sentence(said: list[dict[str, Any]]) -> str:
    """The verdicts in one sentence."""
    words = {"mixed": "better or worse, depending on the metric, than",
             "no clear difference": "neither clearly better nor clearly worse than"}
    parts = [f"{words.get(v['word'], v['word'] + ' than')} {v['model']} (HR@20 {v['ours']['hr_at_20']:.4f} against "
             f"{v['theirs']['hr_at_20']:.4f})" for v in said]
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
    return f"LLMGR ranks the next item {listed}." if parts else ""


def call(gap: Mapping[str, float]) -> str:
    """`better`, `worse`, or `no clear difference` where the interval holds 0."""
    return "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else "no clear difference"


def bucket_label(bucket: str, settings: Any) -> str:
    """A bucket's name for people: `count_10_49` as `10–49`, `cold` as `cold (5–10)`."""
    if bucket == "cold":
        return f"cold ({settings.cold[0]}–{settings.cold[1]})"
    if bucket == "warm":
        return f"warm ({settings.warm}+)"
    if bucket == "all":
        return "all"
    _, *ends = bucket.split("_")
    if ends[0].startswith("lt"):
        return f"< {ends[0][2:]}"
    return f"{ends[0][2:]}+" if ends[0].startswith("ge") else "–".join(ends)


def best(found: Mapping[str, Any], convention: str, bucket: str) -> dict[str, float]:
    """The highest value of every metric among the models, by metric."""
    rows = [by[convention][bucket] for by in found["buckets"].values()]
    return {metric: max(row[metric] for row in rows) for metric in names() if metric in rows[0]}


def render(found: Mapping[str, Any], params: Any, drawn: Mapping[str, str]) -> str:
    """The page as HTML: inline style and figures, no script, nothing loaded from elsewhere."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    said = verdicts(found, params)
    environment.filters |= {f.__name__.strip("_"): f for f in (pretty, duration, signed, _number, _value)}
    return environment.get_template("report.html.j2").render(
        found=found, params=params, drawn=drawn, verdicts=said, sentence=sentence(said), conventions=CONVENTIONS,
        headline=HEADLINE, metrics=names(), ours=OURS, buckets=_buckets(found), call=call,
        label=lambda bucket: bucket_label(bucket, params.bucket), best=lambda c, b: best(found, c, b),
        hardware=sorted({cost["hardware"] for cost in found["cost"].values()}), seconds=training_seconds(found, params),
        facts={name: _grid(facts) for name, facts in found["facts"].items()}, settings=flat(params))


def markdown(found: Mapping[str, Any], params: Any) -> str:
    """The results as Markdown tables for a README: kept, excluded, cold, warm, differences, cost."""
    sections = [_markdown_table(f"{title} (n = {_n(found, convention, 'all'):,})", found, convention, "all", names())
                for convention, title in CONVENTIONS.items()]
    sections += [
        _markdown_table(f"{bucket_label(bucket, params.bucket)} target items, {title.lower()} "
                        f"(n = {_n(found, convention, bucket):,})", found, convention, bucket, HEADLINE)
        for bucket, (convention, title) in itertools.product(("cold", "warm"), CONVENTIONS.items())
        if _n(found, convention, bucket)]
    if found["differences"]:
        rows = ["**LLMGR minus the other model, seen items kept** (paired 95% interval)", "",
                "| against | " + " | ".join(f"{b} {pretty(m)}" for b in ("all", "cold", "warm") for m in HEADLINE[:2])
                + " |", "|---" * 7 + "|"]
        for model, by in found["differences"].items():
            cells = [_gap(by["test"][b][m]) if b in by["test"] else "–"
                     for b in ("all", "cold", "warm") for m in HEADLINE[:2]]
            rows.append(f"| {model} | " + " | ".join(cells) + " |")
        sections.append("\n".join(rows))
    rows = ["**Cost**", "", "| part | time | samples/s | tokens/s | peak memory | trained | parameters | hardware |",
            "|---|---|---|---|---|---|---|---|"]
    for name, cost in found["cost"].items():
        rows.append(f"| {name} | {duration(cost['seconds'])} | {_number(cost['samples_per_second'])} | "
                    f"{_number(cost['tokens_per_second'])} | {_number(cost['peak_memory_mb'])} MB | "
                    f"{_number(cost['trainable_parameters'])} | {_number(cost['total_parameters'])} | "
                    f"{cost['hardware']} |")
    return "\n\n".join([*sections, "\n".join(rows)]) + "\n"


def _markdown_table(title: str, found: Mapping, convention: str, bucket: str, metrics: Any) -> str:
    top = best(found, convention, bucket)
    rows = [f"**{title}**", "", f"| model | {' | '.join(map(pretty, metrics))} |", "|---" * (1 + len(metrics)) + "|"]
    for model, by in found["buckets"].items():
        figures_ = by[convention][bucket]
        cells = [f"**{figures_[m]:.4f}**" if figures_[m] == top[m] else f"{figures_[m]:.4f}" for m in metrics]
        rows.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _gap(gap: Mapping[str, float]) -> str:
    share = f", {gap['relative']:+.1%}" if "relative" in gap else ""
    return f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]{share}"


def _buckets(found: Mapping[str, Any]) -> list[str]:
    return list(next(iter(found["buckets"].values()))["test"])


def _n(found: Mapping[str, Any], convention: str, bucket: str) -> int:
    return next(iter(found["buckets"].values()))[convention][bucket]["n"]


def _grid(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested facts for display: a table of the groups with the same keys (before, after, published), plain rows."""
    groups = {name: _plain(value) for name, value in facts.items() if isinstance(value, dict)}
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, group in groups.items():
        alike.setdefault(tuple(sorted(group)), []).append(name)
    tables = [columns for columns in alike.values() if len(columns) > 1]
    shown = set(itertools.chain.from_iterable(tables))
    return {"tables": [{"columns": columns, "rows": {row: [groups[column][row] for column in columns]
                                                     for row in groups[columns[0]]}} for columns in tables],
            "rows": _plain({name: value for name, value in facts.items() if name not in shown})}


def _plain(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in facts.items():
        rows |= _plain(value, f"{prefix}{pretty(key)} · ") if isinstance(value, dict) else {prefix + pretty(key): value}
    return rows


def _number(value: float | None) -> str:
    """4.20 M, 131,413, 12.35, 0.102, or a dash."""
    if value is None:
        return "–"
    if abs(value) >= 1e6:
        return f"{value / 1e9:.2f} B" if abs(value) >= 1e9 else f"{value / 1e6:.2f} M"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _value(value: Any) -> str:
    """A fact or a parameter as text, numbers with separators."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _number(value)
    return ", ".join(map(_value, value)) if isinstance(value, list) else str(value)
