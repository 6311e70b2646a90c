"""Models, buckets and numbers as the page and the tables name them."""
from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmgr.params.derived import base_scores
from llmgr.params.evaluation import Bucket
from llmgr.params.names import PRIOR, SERVED, TOWER
from llmgr.params.schema import Params
from llmgr.ranking.metrics import names
from llmgr.reporting.evidence import MAIN
from llmgr.reporting.figures import count, pretty
from llmgr.runtime.masking import masked

ABOUT = {"pop": "the most popular items", "item-knn": "items that the same sessions clicked, untrained",
         "session-knn": "what similar sessions clicked, untrained",
         "text-knn": "items with the most similar texts to the text encoder, untrained",
         "word-knn": "items that share rare words of title and brand, untrained",
         "slit": "linear item-item model of clicks, closed form",
         "slit-text": "the same, shrunk towards the similarity of the items' words",
         SERVED: "what the package for production answers: no language model, no knowledge of the user"}
TOWERS = {"tokens": "items with the most similar texts to a mean of token vectors, tuned on which texts follow which; "
                    "no language model",
          "language-model": "items with the most similar texts to the text encoder, a language model, tuned on which "
                            "texts follow which"}
CONTROLS = {"text": "item texts: the control", "shuffled": "other items' texts",
            "linear": "item texts, over the linear model of clicks and words: no language model tuned"}


def llm_name(params: Params) -> str:
    """The language model of the prompts as others know it: a folder of this machine by its last part."""
    return _known_as(params.llm.name)


def text_encoder_name(params: Params) -> str:
    """The text encoder likewise; without a name of its own it is the language model of the prompts."""
    return _known_as(params.text_encoder.name or params.llm.name)


def _known_as(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def describe(model: str, params: Params) -> str:
    """One line that explains a model to somebody who sees its name for the first time."""
    base, hyphen, text = model.partition("-")
    if model in ABOUT:
        return ABOUT[model]
    if model in params.gate.fuse:
        return "gate over " + ", ".join(params.gate.fuse[model])
    if model == TOWER:
        return TOWERS[params.tower.encoder]
    if model == PRIOR:
        parts = [*([params.model.base] if base_scores(params) else []), *([TOWER] if params.tower.enabled else [])]
        rest = "" if tuned_tower(params) else ", no language model tuned"
        return f"LLMGR's prior alone: {' and '.join(['a linear model of clicks and words', *parts])}{rest}"
    if model == MAIN:
        beside = " and a linear model of clicks and words" if params.tune.linear else ""
        beside = f", its scores{beside}" if base_scores(params) else beside
        beside += " and the tower's scores" if params.tower.enabled and params.tune.linear else ""
        return f"language model ({llm_name(params).rsplit('/', 1)[-1]}) over {params.model.base}'s item vectors{beside}"
    if hyphen and text in CONTROLS:
        return f"{base} with {CONTROLS[text]}"
    return "session encoder, item ids alone"


def tuned_tower(params: Params) -> bool:
    """Whether LLMGR's prior alone needs a tuned language model."""
    return params.tower.enabled and params.tower.encoder == "language-model"


def control(params: Params, reads: str = "text") -> str:
    """The name of the base encoder's control, such as `gcsan-text`."""
    return f"{params.model.base.split('-')[0]}-{reads}"


def title_of(model: str) -> str:
    """The model's name in prose."""
    return "LLMGR" if model == MAIN else model


TIES = {"tied": "last two clicks at one time", "untied": "last two clicks at different times"}


def bucket_label(bucket: str, section: Bucket) -> str:
    """A bucket's name for people: `count_10_49` as `10–49`, `cold` as `cold (5–10)`."""
    if bucket == "cold":
        return f"cold ({section.cold[0]}–{section.cold[1]})"
    if bucket == "warm":
        return f"warm ({section.warm}+)"
    if bucket in ("all", *TIES):
        return TIES.get(bucket, bucket)
    _, *ends = bucket.split("_")
    if ends[0].startswith("lt"):
        return f"< {ends[0][2:]}"
    return f"{ends[0][2:]}+" if ends[0].startswith("ge") else "–".join(ends)


def bucket_title(bucket: str, section: Bucket) -> str:
    """A bucket in a caption: `targets with 10–49 interactions in training`."""
    label = bucket_label(bucket, section)
    if bucket == "all":
        return "all targets"
    if bucket in ("cold", "warm"):
        return f"{label} targets"
    if bucket in TIES:
        return label
    return f"targets with {label} interactions in {'training' if bucket.startswith('trained') else 'the 5-core data'}"


def best(evidence: Mapping[str, Any], convention: str, bucket: str) -> dict[str, float]:
    """The highest value among the models, by metric."""
    rows = [by[convention][bucket] for by in evidence["buckets"].values()]
    return {metric: max(row[metric] for row in rows) for metric in names() if metric in rows[0]}


def bucket_names(evidence: Mapping[str, Any]) -> list[str]:
    """All buckets, in their order."""
    return list(next(iter(evidence["buckets"].values()))["test"])


def sessions(evidence: Mapping[str, Any], convention: str, bucket: str) -> int:
    """The number of sessions in a bucket."""
    return next(iter(evidence["buckets"].values()))[convention][bucket]["n"]


def four(value: float | None) -> str:
    """A metric with four digits; a dash where its bucket has no session."""
    return "–" if value is None else f"{value:.4f}"


def changes(ablation: Mapping[str, Any]) -> str:
    """The parameters that an ablation changes, in one line."""
    return ", ".join(f"{key}={shown(value)}" for key, value in ablation["changed"].items()) or "–"


def grid(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested facts for display: groups with the same keys (before, after, published) as tables, the rest as rows."""
    groups = {name: _plain(value) for name, value in facts.items() if isinstance(value, dict)}
    by_keys: dict[tuple[str, ...], list[str]] = {}
    for name, group in groups.items():
        by_keys.setdefault(tuple(sorted(group)), []).append(name)
    tables = [columns for columns in by_keys.values() if len(columns) > 1]
    shown = set(itertools.chain.from_iterable(tables))
    return {"tables": [{"columns": columns, "rows": {row: [groups[column][row] for column in columns]
                                                     for row in groups[columns[0]]}} for columns in tables],
            "rows": _plain({name: value for name, value in facts.items() if name not in shown})}


def _plain(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in facts.items():
        rows |= _plain(value, f"{prefix}{pretty(key)} · ") if isinstance(value, dict) else {prefix + pretty(key): value}
    return rows


def number(value: float | None) -> str:
    """A number as text: 4.20 M, 131,413, 12.35, 0.102, or a dash for None."""
    if value is None:
        return "–"
    return count(value) if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def shown(value: Any) -> str:
    """A fact or a parameter as text, numbers with separators."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    return ", ".join(map(shown, value)) if isinstance(value, list) else masked(str(value))
