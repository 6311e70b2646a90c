"""From the pipeline's metrics to one page, and to tables for a README: every number is read, none is computed anew."""
from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmgr.params.loading import flat
from llmgr.params.names import FLOORS, HEADLINE, START, TOWER
from llmgr.ranking.metrics import names
from llmgr.reporting import figures, seeds
from llmgr.reporting.buckets import LEVEL
from llmgr.reporting.evidence import CONVENTIONS, MAIN, arranged
from llmgr.reporting.figures import count, duration, pretty, signed
from llmgr.reporting.significance import least_p
from llmgr.runtime.masking import masked, masked_all

HEADLINE_COLUMNS = [*(("all", metric) for metric in HEADLINE), ("cold", "hr_at_20"), ("warm", "hr_at_20")]
TWIN_COLUMNS = [*(("test", "all", metric) for metric in HEADLINE), ("test_unseen", "all", "hr_at_20"),
                ("test_unseen", "all", "ndcg_at_20"), ("test", "cold", "hr_at_20"), ("test", "warm", "hr_at_20")]
DRAWN = 13  # models of a figure that compares them side by side; the tables have all
ABOUT = {"pop": "the most popular items", "item-knn": "items that the same sessions clicked, untrained",
         "session-knn": "what similar sessions clicked, untrained",
         "text-knn": "items with the most similar texts to the language model, untrained",
         "word-knn": "items that share rare words of title and brand, untrained",
         "slit": "linear item-item model of clicks, closed form",
         "slit-text": "the same, shrunk to the likeness of the items' words"}
TOWERS = {"tokens": "items with the most similar texts to a mean of token vectors, tuned on which texts follow which; "
                    "no language model",
          "language-model": "items with the most similar texts to the language model, tuned on which texts follow "
                            "which"}
CONTROLS = {"text": "item texts: the control", "shuffled": "other items' texts",
            "linear": "item texts, over the linear model of clicks and words: no language model tuned"}
ANSWERS = {"better": "Yes", "worse": "No", "mixed": "It depends on the metric", "no clear difference": "Not clearly"}


def draw(found: Mapping[str, Any], params: Any) -> dict[str, str]:
    """The figures that the evidence allows, name to SVG."""
    found = arranged(found, params)
    label = {bucket: bucket_label(bucket, params.bucket) for bucket in _buckets(found)}
    sizes = {bucket: figures_["n"] for bucket, figures_ in next(iter(found["buckets"].values()))["test"].items()}
    ticks = {bucket: f"{text}\nn = {sizes[bucket]:,}" for bucket, text in label.items()}
    panels = {"by interactions in the 5-core data": "count_", "by interactions in training": "trained_"}
    chosen = highlights(found, params)
    looks = figures.palette(list(dict.fromkeys([*chosen, *found["buckets"]])), params.bucket.ours)
    drawn = {"buckets": figures.buckets(found["buckets"], found["intervals"], {
        title: {b: text for b, text in ticks.items() if b.startswith(prefix)} for title, prefix in panels.items()},
        {model: looks[model] for model in chosen})}
    if found["differences"]:
        drawn["differences"] = figures.differences(found["differences"], params.bucket.ours)
    steps, epochs = ({part: frame for part, frame in found[kind].items() if part in chosen or part not in looks}
                     for kind in ("steps", "epochs"))
    if steps or epochs:
        drawn["curves"] = figures.curves(steps, epochs)
    spent = training_seconds(found, params)
    if any(spent.values()):
        drawn["cost"] = figures.cost(*({model: by["test"]["all"] for model, by in found[kind].items()}
                                       for kind in ("buckets", "intervals")), spent, parameters(found), looks)
    return drawn


def highlights(found: Mapping[str, Any], params: Any) -> list[str]:
    """The models of a figure with room for `DRAWN`: floors, LLMGR, its base and start, the control, the
    strongest others."""
    models = list(found["buckets"])
    kept = [model for model in models if model in (
        *FLOORS, START, MAIN, params.bucket.ours, params.model.base, _control(params), _control(params, "linear"))]
    rest = sorted((model for model in models if model not in kept),
                  key=lambda model: -found["buckets"][model]["test"]["all"]["ndcg_at_20"])
    kept += rest[:max(0, DRAWN - len(kept))]
    return [model for model in models if model in kept]


def _control(params: Any, reads: str = "text") -> str:
    return f"{params.model.base.split('-')[0]}-{reads}"


def parameters(found: Mapping[str, Any]) -> dict[str, float]:
    """Parameters by model, frozen ones included; models without training have none."""
    costs = {MAIN if part == "tune" else part: cost for part, cost in found["cost"].items()}
    return {model: costs[model]["total_parameters"] for model in found["buckets"] if model in costs}


def llm_name(params: Any) -> str:
    """The language model as others know it: a folder of this machine by its last part."""
    name = params.llm.name
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def describe(model: str, params: Any) -> str:
    """What a model is, for somebody who meets its name for the first time."""
    base, hyphen, text = model.partition("-")
    if model in ABOUT:
        return ABOUT[model]
    if model in params.gate.fuse:
        return "gate over " + ", ".join(params.gate.fuse[model])
    if model == TOWER:
        return TOWERS[params.tower.encoder]
    if model == START:
        parts = [*([params.model.base] if params.tune.folds else []), *([TOWER] if params.tower.enabled else [])]
        rest = "" if _tuned_tower(params) else ", no language model tuned"
        return f"what LLMGR's logits start from: {' and '.join(['a linear model of clicks and words', *parts])}{rest}"
    if model == MAIN:
        beside = " and a linear model of clicks and words" if params.tune.linear else ""
        beside = f", its scores{beside}" if params.tune.folds else beside
        beside += " and the tower's scores" if params.tower.enabled and params.tune.linear else ""
        return f"language model ({llm_name(params).rsplit('/', 1)[-1]}) over {params.model.base}'s item vectors{beside}"
    if hyphen and text in CONTROLS:
        return f"{base} with {CONTROLS[text]}"
    return "session encoder, item ids alone"


def _tuned_tower(params: Any) -> bool:
    """Whether a language model has been tuned for what LLMGR's logits start from."""
    return params.tower.enabled and params.tower.encoder == "language-model"


def training_seconds(found: Mapping[str, Any], params: Any) -> dict[str, float]:
    """Training time by model, with everything that it needs: a control its text vectors, LLMGR its base and stages, a
    gate what it fuses and its own fit."""
    took = {name: cost["seconds"] for name, cost in found["cost"].items()}
    needs = {model: [model, *(["backbone"] if "-" in model else [])] for model in found["buckets"] if model in took}
    tower = [TOWER, "backbone"] if params.tower.enabled else []
    if TOWER in found["buckets"]:
        needs[TOWER] = tower
    if MAIN in found["buckets"]:
        needs[MAIN] = [*needs.get(params.model.base, []), "backbone", "folds", *tower, "align", "tune"]
    if START in found["buckets"]:
        needs[START] = ["start", *(needs.get(params.model.base, []) if params.tune.folds else []), "folds", *tower]
        took["start"] = found["cost"].get("tune", {}).get("prepared_seconds", 0.0)
    for gate, fused in params.gate.fuse.items():
        if gate in found["buckets"]:
            needs[gate] = ["backbone"] * ("text-knn" in fused) + [p for name in fused for p in needs.get(name, ())]
    fits = found["cost"].get("gate", {}).get("seconds_by_model", {})
    return {model: sum(took.get(part, 0.0) for part in set(parts)) + fits.get(model, 0.0) * (model in params.gate.fuse)
            for model, parts in needs.items()}


def ranking_seconds(found: Mapping[str, Any], params: Any) -> dict[str, float]:
    """Time to rank all validation and test sessions by model; a gate's has that of the models that it fuses."""
    took = found["cost"].get("evaluate", {}).get("seconds_by_model", {})
    return {model: own + sum(took.get(part, 0.0) for part in params.gate.fuse.get(model, ()))
            for model, own in took.items()}


def verdicts(found: Mapping[str, Any], params: Any) -> list[dict[str, Any]]:
    """What came out in words: LLMGR against the text control, its base encoder and the strongest other model.

    A difference is called one only where its Holm-corrected p is below 0.05.
    """
    gaps = found["differences"]
    if not gaps:
        return []
    strongest = max(gaps, key=lambda model: found["buckets"][model]["test"]["all"]["ndcg_at_20"])
    control, plain = _control(params), params.model.base.split("-")[0]
    roles = {control: "the text + GNN control" + (" that it reads" if control == params.model.base else "")}
    if params.tune.linear:
        roles[_control(params, "linear")] = "the control over the same linear model"
    tower = "the tower among it" if params.tower.enabled else ""
    rest = "" if _tuned_tower(params) else "without a language model"
    roles[START] = ", ".join(filter(None, ("what LLMGR's logits start from", tower, rest)))
    roles.setdefault(params.model.base, "the encoder that it reads")
    roles.setdefault(plain, "the encoder without texts")
    roles.setdefault(strongest, "the strongest other model")
    return [_verdict(found, params.bucket.ours, model, role) for model, role in roles.items() if model in gaps]


def _verdict(found: Mapping[str, Any], ours: str, model: str, role: str) -> dict[str, Any]:
    gaps = found["differences"][model]["test"]
    word, calls = _calls(gaps)
    excluded = found["differences"][model]["test_unseen"]
    word_unseen, calls_unseen = _calls(excluded)
    return {"model": model, "role": role, "word": word, "calls": calls,
            "unseen": {"word": word_unseen, "calls": calls_unseen, "gaps": excluded},
            "ours": found["buckets"][ours]["test"]["all"], "theirs": found["buckets"][model]["test"]["all"],
            "gaps": gaps, "cold": call(gaps["cold"]["hr_at_20"]) if "cold" in gaps else None}


def _calls(gaps: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """What a difference over all targets is called, and by metric."""
    calls = {metric: call(gaps["all"][metric]) for metric in HEADLINE}
    kinds = set(calls.values())
    return kinds.pop() if len(kinds) == 1 else "mixed", calls


def sentence(said: list[dict[str, Any]], ours: str) -> str:
    """The verdicts on the model `ours` in one sentence."""
    words = {"mixed": "better, worse or neither, depending on the metric, than",
             "no clear difference": "neither clearly better nor clearly worse than"}
    parts = [f"{words.get(v['word'], v['word'] + ' than')} {v['model']} (HR@20 {v['ours']['hr_at_20']:.4f} against "
             f"{v['theirs']['hr_at_20']:.4f})" for v in said]
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
    return f"{title_of(ours)} ranks the next item {listed}." if parts else ""


def answer(said: list[dict[str, Any]], params: Any) -> str:
    """Whether the model beats the text control, under both conventions; empty where that is not known."""
    kept, excluded = next(((ANSWERS[v["word"]], ANSWERS[v["unseen"]["word"]]) for v in said
                           if v["model"] == _control(params)), ("", ""))
    return kept if kept == excluded else (
        f"With seen items kept {kept[0].lower()}{kept[1:]}, with them excluded {excluded[0].lower()}{excluded[1:]}")


def title_of(model: str) -> str:
    """A model as prose names it."""
    return "LLMGR" if model == MAIN else model


def call(gap: Mapping[str, float]) -> str:
    """`better`, `worse`, or `no clear difference` where the p corrected for all comparisons is not below 0.05."""
    if gap["p_holm"] >= LEVEL:
        return "no clear difference"
    return "better" if gap["difference"] > 0 else "worse"


def p_text(gap: Mapping[str, float], resamples: int) -> tuple[str, str]:
    """p and Holm-corrected p of a difference as text, `≤` where they are bounds: no resample crossed 0."""
    sign = "≤ " if gap["p"] <= least_p(resamples) * (1 + 1e-4) else ""  # files keep six digits
    return tuple((sign if p < 1 else "") + f"{p:.2g}" for p in (gap["p"], gap["p_holm"]))


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


def bucket_title(bucket: str, settings: Any) -> str:
    """What a bucket holds, for a caption: `targets with 10–49 interactions in training`."""
    label = bucket_label(bucket, settings)
    if bucket == "all":
        return "all targets"
    if bucket in ("cold", "warm"):
        return f"{label} targets"
    return f"targets with {label} interactions in {'training' if bucket.startswith('trained') else 'the 5-core data'}"


def best(found: Mapping[str, Any], convention: str, bucket: str) -> dict[str, float]:
    """The highest value of every metric among the models, by metric."""
    rows = [by[convention][bucket] for by in found["buckets"].values()]
    return {metric: max(row[metric] for row in rows) for metric in names() if metric in rows[0]}


def render(found: Mapping[str, Any], params: Any, drawn: Mapping[str, str]) -> str:
    """The page as HTML: inline style and figures, no script, nothing loaded from elsewhere."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    found = arranged(found, params)
    said, ours = verdicts(found, params), params.bucket.ours
    environment.filters |= {f.__name__.strip("_"): f for f in (pretty, duration, signed, _number, _value, _four)}
    return environment.get_template("report.html.j2").render(
        found=found, params=params, drawn=drawn, verdicts=said, sentence=sentence(said, ours),
        blind=least_p(params.bucket.resamples) * len(found["differences"]) >= LEVEL,
        answer=answer(said, params), control=_control(params),
        linear_control=_control(params, "linear"), conventions=CONVENTIONS, headline=HEADLINE,
        headline_columns=HEADLINE_COLUMNS, describe=lambda model: describe(model, params), llm_name=llm_name(params),
        metrics=names(), ours=ours, ours_title=title_of(ours), buckets=_buckets(found), call=call,
        level=LEVEL,
        highlights=highlights(found, params), label=lambda bucket: bucket_label(bucket, params.bucket),
        title=lambda bucket: bucket_title(bucket, params.bucket), best=lambda c, b: best(found, c, b),
        p=lambda gap: p_text(gap, params.bucket.resamples), seconds=training_seconds(found, params),
        ranking_seconds=ranking_seconds(found, params), parameters=parameters(found),
        hardware=sorted({cost["hardware"] for cost in found["cost"].values()}),
        twin_columns=TWIN_COLUMNS, changes=_changes,
        seed_tables=seed_tables(found["seeds"], params) if found["seeds"] else [],
        facts={name: _grid(facts) for name, facts in found["facts"].items()}, settings=masked_all(flat(params)))


def markdown(found: Mapping[str, Any], params: Any) -> str:
    """The results as Markdown tables for a README: overall, every bucket with intervals, differences, cost."""
    found = arranged(found, params)
    sections = [_overall(found, params, convention) for convention in CONVENTIONS]
    sections += [_bucket(found, params, convention, bucket)
                 for bucket, convention in itertools.product(_buckets(found), CONVENTIONS)
                 if _n(found, convention, bucket)]
    if found["differences"]:
        compared = itertools.product(CONVENTIONS, next(iter(found["differences"].values()))["test"])
        sections += [_differences(found, params, convention, bucket) for convention, bucket in compared]
    if found["twins"]:
        sections.append(_twins(found, params))
    if found["seeds"]:
        for title, head, table in seed_tables(found["seeds"], params):
            sections.append(_table(title, ["model", *head], [[m, *row] for m, row in table.items()]))
    rows = [[name, duration(cost["seconds"]), _number(cost["samples_per_second"]), _number(cost["tokens_per_second"]),
             _number(cost["peak_memory_mb"]) + " MB", _number(cost["trainable_parameters"]),
             _number(cost["total_parameters"]), cost["hardware"]] for name, cost in found["cost"].items()]
    head = ["part", "time", "samples/s", "tokens/s", "peak memory", "trained", "parameters", "hardware"]
    return "\n\n".join([*sections, _table("Cost", head, rows)]) + "\n"


def _overall(found: Mapping, params: Any, convention: str) -> str:
    top, spent, size = best(found, convention, "all"), training_seconds(found, params), parameters(found)
    rows = [[model, *(_bold(by[convention]["all"], metric, top) for metric in names()),
             duration(spent[model]) if model in spent else "–", _number(size.get(model))]
            for model, by in found["buckets"].items()]
    return _table(f"{CONVENTIONS[convention]} (n = {_n(found, convention, 'all'):,})",
                  ["model", *map(pretty, names()), "training", "parameters"], rows)


def _bucket(found: Mapping, params: Any, convention: str, bucket: str) -> str:
    top = best(found, convention, bucket)
    rows = [[model, *(_bold(by[convention][bucket], metric, top) + " [{:.4f}, {:.4f}]".format(
        *found["intervals"][model][convention][bucket][metric]) for metric in HEADLINE)]
        for model, by in found["buckets"].items()]
    targets = f"{bucket_title(bucket, params.bucket)}, {CONVENTIONS[convention].lower()}"
    return _table(f"{targets} (n = {_n(found, convention, bucket):,}), with 95% intervals",
                  ["model", *map(pretty, HEADLINE)], rows)


def _twins(found: Mapping, params: Any) -> str:
    rows = [[name, _changes(twin), *(_four(twin["figures"][c].get(b, {}).get(m)) for c, b, m in TWIN_COLUMNS)]
            for name, twin in found["twins"].items()]
    head = [f"{CONVENTIONS[c].split()[-1]}, {bucket_label(b, params.bucket)}: {pretty(m)}" for c, b, m in TWIN_COLUMNS]
    return _table("LLMGR's twins: the same with one thing taken away", ["twin", "changed", *head], rows)


def _four(value: float | None) -> str:
    """A metric; a dash where its bucket has no session."""
    return "–" if value is None else f"{value:.4f}"


def seed_tables(found: Mapping[str, Any], params: Any) -> list[tuple[str, list[str], dict[str, list[str]]]]:
    """Title, heads and cells by model: mean and deviation over the seeds; by how much `bucket.ours` exceeds each, mean
    [least, most]; and the paired differences of the sessions' means over the seeds, by convention."""
    figures, ours = found["figures"], params.bucket.ours
    models, number = seeds.models(figures), f"{len(figures)} seeds ({', '.join(figures)})"
    head = [f"{CONVENTIONS[c].split()[-1]}, {bucket_label(b, params.bucket)}: {pretty(m)}" for c, b, m in seeds.COLUMNS]

    def cells(model: str, minus: str | None) -> list[str]:
        every = [seeds.spread(figures, model, column, minus) for column in seeds.COLUMNS]
        return ["–" if x is None else f"{x[0]:.4f} ± {x[1]:.4f}" if minus is None else
                f"{x[0]:+.4f} [{x[2]:+.4f}, {x[3]:+.4f}]" for x in every]

    tables = [(f"Mean and standard deviation over {number}", head, {model: cells(model, None) for model in models})]
    if ours in models:
        tables.append((f"{title_of(ours)} minus the other model at the same seed, mean [least, greatest] of {number}",
                       head, {model: cells(ours, model) for model in models if model != ours}))
    for convention, words in CONVENTIONS.items() if found.get("ours") == ours and found["differences"] else ():
        tables.append((f"{title_of(ours)} minus the other model, every session's mean over {number}, {words.lower()} "
                       "(paired 95% interval, p, Holm-corrected p)", list(map(pretty, HEADLINE)),
                       {model: [_gap(by[convention][metric], found["resamples"]) for metric in HEADLINE]
                        for model, by in found["differences"].items()}))
    return tables


def _changes(twin: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_value(value)}" for key, value in twin["changed"].items()) or "–"


def _differences(found: Mapping, params: Any, convention: str, bucket: str) -> str:
    rows = [[model, *(_gap(by[convention][bucket][metric], params.bucket.resamples) for metric in HEADLINE)]
            for model, by in found["differences"].items()]
    return _table(f"{title_of(params.bucket.ours)} minus the other model, {bucket_title(bucket, params.bucket)}, "
                  f"{CONVENTIONS[convention].lower()} (paired 95% interval, p, Holm-corrected p)",
                  ["against", *map(pretty, HEADLINE)], rows)


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))])


def _bold(row: Mapping[str, float], metric: str, top: Mapping[str, float]) -> str:
    return f"**{row[metric]:.4f}**" if row[metric] == top[metric] else f"{row[metric]:.4f}"


def _gap(gap: Mapping[str, float], resamples: int) -> str:
    share = f", {gap['relative']:+.1%}" if "relative" in gap else ""
    raw, corrected = p_text(gap, resamples)
    return f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]{share}, p {raw}, Holm {corrected}"


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
    return count(value) if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _value(value: Any) -> str:
    """A fact or a parameter as text, numbers with separators."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _number(value)
    return ", ".join(map(_value, value)) if isinstance(value, list) else masked(str(value))
