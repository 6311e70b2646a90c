"""From the pipeline's metrics to one page: every number is read, none is computed anew."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmgr.params.loading import flat
from llmgr.params.names import BASELINES, HEADLINE, PRIOR
from llmgr.ranking.metrics import names
from llmgr.reporting import figures
from llmgr.reporting.buckets import LEVEL
from llmgr.reporting.cost import parameters, ranking_seconds, training_seconds
from llmgr.reporting.evidence import CONVENTIONS, MAIN, arranged
from llmgr.reporting.figures import duration, pretty, signed
from llmgr.reporting.naming import (
    best,
    bucket_label,
    bucket_names,
    bucket_title,
    changes,
    control,
    describe,
    four,
    grid,
    llm_name,
    number,
    shown,
    title_of,
)
from llmgr.reporting.significance import least_p
from llmgr.reporting.summary import main_models
from llmgr.reporting.tables import ABLATION_COLUMNS, seed_tables
from llmgr.reporting.verdicts import answer, call, p_text, sentence, verdicts
from llmgr.runtime.masking import masked_all

HEADLINE_COLUMNS = [*(("all", metric) for metric in HEADLINE), ("cold", "hr_at_20"), ("warm", "hr_at_20")]
DRAWN = 13  # models of a figure that compares them side by side; the tables have all


def draw(found: Mapping[str, Any], params: Any) -> dict[str, str]:
    """The figures that the evidence allows, name to SVG."""
    found = arranged(found, params)
    label = {bucket: bucket_label(bucket, params.bucket) for bucket in bucket_names(found)}
    sizes = {bucket: figures_["n"] for bucket, figures_ in next(iter(found["buckets"].values()))["test"].items()}
    ticks = {bucket: f"{text}\nn = {sizes[bucket]:,}" for bucket, text in label.items()}
    panels = {"by interactions in the 5-core data": "count_", "by interactions in training": "trained_"}
    chosen = highlights(found, params)
    looks = figures.palette(list(dict.fromkeys([*chosen, *found["buckets"]])), params.bucket.ours)
    drawn = {"buckets": figures.buckets(found["buckets"], found["intervals"], {
        title: {b: text for b, text in ticks.items() if b.startswith(prefix)} for title, prefix in panels.items()},
        {model: looks[model] for model in chosen})}
    few = first_rows(found, params)
    drawn["answer"] = figures.answer({model: found["buckets"][model]["test"] for model in few},
                                     {model: found["intervals"][model]["test"] for model in few},
                                     {bucket: ticks[bucket] for bucket in ("all", "cold", "warm")}, looks)
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


def first_rows(found: Mapping[str, Any], params: Any) -> list[str]:
    """The page's first table: the main models, and the strongest baseline that is not trained."""
    untrained = [model for model in found["buckets"] if model in BASELINES]
    strongest = max(untrained, key=lambda model: found["buckets"][model]["test"]["all"]["ndcg_at_20"], default=None)
    return [*filter(None, [strongest]), *(model for model in main_models(found, params) if model != strongest)]


def rates(found: Mapping[str, Any]) -> dict[str, str]:
    """The learning rate of every encoder, and the rates among which validation sessions chose it."""
    def choice(facts: Mapping[str, Any]) -> str:
        among = facts.get("search", {}).get("rates", ())
        return f", chosen among {', '.join(f'{rate:g}' for rate in among)}" if among else ""

    return {model: f"learning rate {facts['lr']:g}{choice(facts)}"
            for model, facts in found["facts"].get("encoders", {}).items() if "lr" in facts}


def highlights(found: Mapping[str, Any], params: Any) -> list[str]:
    """The models of a figure with room for `DRAWN`: baselines, LLMGR, its base and prior, the control, the
    strongest others."""
    models = list(found["buckets"])
    kept = [model for model in models if model in (
        *BASELINES, PRIOR, MAIN, params.bucket.ours, params.model.base, control(params), control(params, "linear"))]
    rest = sorted((model for model in models if model not in kept),
                  key=lambda model: -found["buckets"][model]["test"]["all"]["ndcg_at_20"])
    kept += rest[:max(0, DRAWN - len(kept))]
    return [model for model in models if model in kept]


def render(found: Mapping[str, Any], params: Any, drawn: Mapping[str, str]) -> str:
    """The page as HTML: inline style and figures, no script, nothing loaded from elsewhere."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    found = arranged(found, params)
    said, ours, few = verdicts(found, params), params.bucket.ours, first_rows(found, params)
    environment.filters |= {"pretty": pretty, "duration": duration, "signed": signed, "number": number, "value": shown,
                            "four": four}
    return environment.get_template("report.html.j2").render(
        found=found, params=params, drawn=drawn, verdicts=said, sentence=sentence(said, ours),
        blind=least_p(params.bucket.resamples) * len(found["differences"]) >= LEVEL,
        answer=answer(said, params), control=control(params),
        linear_control=control(params, "linear"), conventions=CONVENTIONS, headline=HEADLINE,
        headline_columns=HEADLINE_COLUMNS, describe=lambda model: describe(model, params), llm_name=llm_name(params),
        metrics=names(), ours=ours, ours_title=title_of(ours), buckets=bucket_names(found), call=call,
        level=LEVEL,
        highlights=highlights(found, params), label=lambda bucket: bucket_label(bucket, params.bucket),
        title=lambda bucket: bucket_title(bucket, params.bucket), best=lambda c, b: best(found, c, b),
        p=lambda gap: p_text(gap, params.bucket.resamples), seconds=training_seconds(found, params),
        ranking_seconds=ranking_seconds(found, params), parameters=parameters(found),
        hardware=sorted({cost["hardware"] for cost in found["cost"].values()}),
        ablation_columns=ABLATION_COLUMNS, changes=changes,
        seed_tables=seed_tables(found["seeds"], params) if found["seeds"] else [],
        short=sentence([v for v in said if v["model"] in few], ours), few=few, rates=rates(found),
        best_of=lambda models, bucket, metric: max(
            found["buckets"][model]["test"][bucket].get(metric, 0.0) for model in models),
        facts={name: grid(facts) for name, facts in found["facts"].items()}, settings=masked_all(flat(params)))
