"""The report page from the pipeline's metrics: every number is read, none is computed."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmgr.params.loading import flat
from llmgr.params.names import BASELINES, HEADLINE, PRIOR
from llmgr.params.schema import Params
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
    text_encoder_name,
    title_of,
)
from llmgr.reporting.significance import least_p
from llmgr.reporting.summary import main_models
from llmgr.reporting.tables import ABLATION_COLUMNS, seed_tables
from llmgr.reporting.verdicts import answer, call, p_text, sentence, verdicts
from llmgr.runtime.masking import masked_all

HEADLINE_COLUMNS = [*(("all", metric) for metric in HEADLINE), ("cold", "hr_at_20"), ("warm", "hr_at_20")]
DRAWN = 13  # models of a figure that compares them side by side; the tables have all


def draw(evidence: Mapping[str, Any], params: Params) -> dict[str, str]:
    """The figures that the evidence is enough for, as SVG by name."""
    evidence = arranged(evidence, params)
    label = {bucket: bucket_label(bucket, params.bucket) for bucket in bucket_names(evidence)}
    sizes = {bucket: figures_["n"] for bucket, figures_ in next(iter(evidence["buckets"].values()))["test"].items()}
    ticks = {bucket: f"{text}\nn = {sizes[bucket]:,}" for bucket, text in label.items()}
    panels = {"by interactions in the 5-core data": "count_", "by interactions in training": "trained_"}
    chosen = highlights(evidence, params)
    looks = figures.palette(list(dict.fromkeys([*chosen, *evidence["buckets"]])), params.bucket.ours)
    drawn = {"buckets": figures.buckets(evidence["buckets"], evidence["intervals"], {
        title: {b: text for b, text in ticks.items() if b.startswith(prefix)} for title, prefix in panels.items()},
        {model: looks[model] for model in chosen})}
    few = first_rows(evidence, params)
    drawn["answer"] = figures.answer({model: evidence["buckets"][model]["test"] for model in few},
                                     {model: evidence["intervals"][model]["test"] for model in few},
                                     {bucket: ticks[bucket] for bucket in ("all", "cold", "warm")}, looks)
    if evidence["differences"]:
        drawn["differences"] = figures.differences(evidence["differences"], params.bucket.ours)
    steps, epochs = ({part: frame for part, frame in evidence[kind].items() if part in chosen or part not in looks}
                     for kind in ("steps", "epochs"))
    if steps or epochs:
        drawn["curves"] = figures.curves(steps, epochs)
    spent = training_seconds(evidence, params)
    if any(spent.values()):
        drawn["cost"] = figures.cost(*({model: by["test"]["all"] for model, by in evidence[kind].items()}
                                       for kind in ("buckets", "intervals")), spent, parameters(evidence), looks)
    return drawn


def first_rows(evidence: Mapping[str, Any], params: Params) -> list[str]:
    """The models of the page's first table: the main ones, and the strongest baseline."""
    untrained = [model for model in evidence["buckets"] if model in BASELINES]
    strongest = max(untrained, key=lambda model: evidence["buckets"][model]["test"]["all"]["ndcg_at_20"], default=None)
    return [*filter(None, [strongest]), *(model for model in main_models(evidence, params) if model != strongest)]


def rates(evidence: Mapping[str, Any]) -> dict[str, str]:
    """The learning rate of every encoder in words, and the rates that it was chosen among on validation sessions."""
    def choice(facts: Mapping[str, Any]) -> str:
        among = facts.get("search", {}).get("rates", ())
        return f", chosen among {', '.join(f'{rate:g}' for rate in among)}" if among else ""

    return {model: f"learning rate {facts['lr']:g}{choice(facts)}"
            for model, facts in evidence["facts"].get("encoders", {}).items() if "lr" in facts}


def highlights(evidence: Mapping[str, Any], params: Params) -> list[str]:
    """The models of a figure, at most `DRAWN`: baselines, LLMGR, its base and prior, the controls, then the strongest
    others."""
    models = list(evidence["buckets"])
    shown = [model for model in models if model in (
        *BASELINES, PRIOR, MAIN, params.bucket.ours, params.model.base, control(params), control(params, "linear"))]
    rest = sorted((model for model in models if model not in shown),
                  key=lambda model: -evidence["buckets"][model]["test"]["all"]["ndcg_at_20"])
    shown += rest[:max(0, DRAWN - len(shown))]
    return [model for model in models if model in shown]


def render(evidence: Mapping[str, Any], params: Params, drawn: Mapping[str, str]) -> str:
    """The page as HTML: inline style and figures, no script, nothing loaded from elsewhere."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    evidence = arranged(evidence, params)
    said, ours, few = verdicts(evidence, params), params.bucket.ours, first_rows(evidence, params)
    environment.filters |= {"pretty": pretty, "duration": duration, "signed": signed, "number": number, "value": shown,
                            "four": four}
    return environment.get_template("report.html.j2").render(
        evidence=evidence, params=params, drawn=drawn, verdicts=said, sentence=sentence(said, ours),
        blind=least_p(params.bucket.resamples) * len(evidence["differences"]) >= LEVEL,
        answer=answer(said, params), control=control(params),
        linear_control=control(params, "linear"), conventions=CONVENTIONS, headline=HEADLINE,
        headline_columns=HEADLINE_COLUMNS, describe=lambda model: describe(model, params), llm_name=llm_name(params),
        text_encoder_name=text_encoder_name(params),
        metrics=names(), ours=ours, ours_title=title_of(ours), buckets=bucket_names(evidence), call=call,
        level=LEVEL,
        highlights=highlights(evidence, params), label=lambda bucket: bucket_label(bucket, params.bucket),
        title=lambda bucket: bucket_title(bucket, params.bucket), best=lambda c, b: best(evidence, c, b),
        p=lambda gap: p_text(gap, params.bucket.resamples), seconds=training_seconds(evidence, params),
        ranking_seconds=ranking_seconds(evidence, params), parameters=parameters(evidence),
        hardware=sorted({cost["hardware"] for cost in evidence["cost"].values()}),
        ablation_columns=ABLATION_COLUMNS, changes=changes,
        seed_tables=seed_tables(evidence["seeds"], params) if evidence["seeds"] else [],
        short=sentence([v for v in said if v["model"] in few], ours), few=few, rates=rates(evidence),
        best_of=lambda models, bucket, metric: max(
            evidence["buckets"][model]["test"][bucket].get(metric, 0.0) for model in models),
        facts={name: grid(facts) for name, facts in evidence["facts"].items()}, settings=masked_all(flat(params)))
