"""Models, buckets and numbers as the page and the tables name them."""
from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmgr.params.derived import base_scores
from llmgr.params.names import PRIOR, SERVED, TOWER
from llmgr.ranking.metrics import names
from llmgr.reporting.evidence import MAIN
from llmgr.reporting.figures import count, pretty
from llmgr.runtime.masking import masked

ABOUT = {"pop": "the most popular items", "item-knn": "items that the same sessions clicked, untrained",
         "session-knn": "what similar sessions clicked, untrained",
         "text-knn": "items with the most similar texts to the language model, untrained",
         "word-knn": "items that share rare words of title and brand, untrained",
         "slit": "linear item-item model of clicks, closed form",
         "slit-text": "the same, shrunk to the likeness of the items' words",
         SERVED: "what the package for production answers: no language model, no knowledge of the user"}
TOWERS = {"tokens": "items with the most similar texts to a mean of token vectors, tuned on which texts follow which; "
                    "no language model",
          "language-model": "items with the most similar texts to the language model, tuned on which texts follow "
                            "which"}
CONTROLS = {"text": "item texts: the control", "shuffled": "other items' texts",
            "linear": "item texts, over the linear model of clicks and words: no language model tuned"}


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


def tuned_tower(params: Any) -> bool:
    """Whether a language model has been tuned for LLMGR's prior alone."""
    return params.tower.enabled and params.tower.encoder == "language-model"


def control(params: Any, reads: str = "text") -> str:
    return f"{params.model.base.split('-')[0]}-{reads}"


def title_of(model: str) -> str:
    """A model as prose names it."""
    return "LLMGR" if model == MAIN else model


TIES = {"tied": "last two clicks at one time", "untied": "last two clicks at different times"}


def bucket_label(bucket: str, settings: Any) -> str:
    """A bucket's name for people: `count_10_49` as `10–49`, `cold` as `cold (5–10)`."""
    if bucket == "cold":
        return f"cold ({settings.cold[0]}–{settings.cold[1]})"
    if bucket == "warm":
        return f"warm ({settings.warm}+)"
    if bucket in ("all", *TIES):
        return TIES.get(bucket, bucket)
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
    if bucket in TIES:
        return label
    return f"targets with {label} interactions in {'training' if bucket.startswith('trained') else 'the 5-core data'}"


def best(found: Mapping[str, Any], convention: str, bucket: str) -> dict[str, float]:
    """The highest value of every metric among the models, by metric."""
    rows = [by[convention][bucket] for by in found["buckets"].values()]
    return {metric: max(row[metric] for row in rows) for metric in names() if metric in rows[0]}


def bucket_names(found: Mapping[str, Any]) -> list[str]:
    return list(next(iter(found["buckets"].values()))["test"])


def sessions(found: Mapping[str, Any], convention: str, bucket: str) -> int:
    return next(iter(found["buckets"].values()))[convention][bucket]["n"]


def four(value: float | None) -> str:
    """A metric; a dash where its bucket has no session."""
    return "–" if value is None else f"{value:.4f}"


def changes(ablation: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in ablation["changed"].items()) or "–"


def grid(facts: Mapping[str, Any]) -> dict[str, Any]:
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


def number(value: float | None) -> str:
    """4.20 M, 131,413, 12.35, 0.102, or a dash."""
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
