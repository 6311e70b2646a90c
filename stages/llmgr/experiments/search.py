"""A hyperparameter search made of published runs: which trained a model, on what, how well, and the best of them."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmgr.experiments.published import Published
from llmgr.runtime.errors import UserError

VALIDATION = "valid.all/"
SELECTS = "ndcg_at_20"  # on validation sessions, as for an encoder's epochs
LISTS = ("encoder.names", "encoder.controls", "encoder.control_texts",
         "encoder.linear_controls")  # which models there are
TUNED = "llmgr"  # its search is over stage 1 and stage 2; every other name is an encoder or a control
LATER = ("gate", "evaluate", "bucket", "track")  # sections that no training reads
MEANS = ("launch.", "data.mirror", "data.retries", "data.timeout")  # how something is done or fetched, not what


class Trial(NamedTuple):
    """A run that trained the model: its name in DVC, all parameters by dotted key, the model's validation metrics, and
    digests of what it was trained on."""

    name: str
    parameters: dict[str, Any]
    metrics: dict[str, Any]
    data: dict[str, str]


class Search(NamedTuple):
    """The keys in which trials differ, and the trials, best first, one for each set of their values."""

    keys: list[str]
    trials: list[Trial]


def trials(published: Published, model: str, dataset: str, commit: str) -> list[Trial]:
    """The runs of experiments of `commit` that trained `model` on `dataset`, with its validation metrics.

    An encoder's are those of the stage `trial`, LLMGR's are those of `track`.
    """
    tags = {"kind": "experiment"} if model == TUNED else {"kind": "trial", "model": model}
    return [Trial(run.name, run.parameters, {
        name.removeprefix(VALIDATION): value for name, value in run.metrics.items()
        if name.startswith(VALIDATION) or name in ("best_epoch", "seconds")}, run.data)
        for run in published.runs(**tags, dataset=dataset) if run.commit == commit]


def search(found: Sequence[Trial], model: str) -> Search:
    """What was searched and how it went; UserError where the trials are no search of this model's parameters."""
    values = {key: sorted({json.dumps(trial.parameters[key]) for trial in found}) for key in
              (found[0].parameters if found else ())}
    differing = [key for key, seen in values.items() if len(seen) > 1]
    bases = {trial.parameters["model.base"] for trial in found}
    roles = {key: role(key, model, bases) for key in differing}
    searched = [key for key in differing if roles[key] == "searched"]
    for key in differing:
        if roles[key] == "fixed":
            raise UserError(f"the experiments that trained {model} differ in {key} ({', '.join(values[key])}), so "
                            "their figures do not compare: delete those of other values in MLflow")
    if any(trial.data != found[0].data for trial in found):
        raise UserError(f"the experiments that trained {model} did so on other data, so their figures do not compare: "
                        "delete those on other data in MLflow")
    if not searched:
        grid = Path(__file__).resolve().parent.parent.parent / "presets" / "grid" / f"{model}.txt"
        how = f"queue stages/presets/grid/{model}.txt" if grid.exists() else (
            f"queue some with `dvc exp run --queue trial -S track.trials=[{model}] -S key=a,b`" if model != TUNED else
            "queue some with `dvc exp run --queue track -S key=a,b`")
        raise UserError(f"{len(found)} experiments of this commit trained {model} on this dataset, and no two differ "
                        f"in its parameters: {how} and run `dvc queue start -j 1`")
    best: dict[str, Trial] = {}
    for trial in sorted(found, key=lambda trial: -trial.metrics[SELECTS]):
        best.setdefault(json.dumps([trial.parameters[key] for key in searched]), trial)
    return Search(searched, list(best.values()))


def is_means(key: str) -> bool:
    """Whether a parameter says how something is done or fetched, and not what."""
    return key.startswith(MEANS) or key.endswith((".checkpoint_seconds", ".gradient_checkpointing"))


def role(key: str, model: str, bases: Iterable[str] = ()) -> str:
    """`searched` for the model's own parameters, `fixed` for what makes figures comparable, else `ignored`.

    `bases` are the encoders that LLMGR reads: what they are trained with is fixed for it.
    """
    section, *rest = key.split(".")
    base, _, text = model.partition("-")
    if section in LATER or key in LISTS or is_means(key):
        return "ignored"
    if model == TUNED and section == "encoder":
        return "fixed" if any(role(key, base) == "searched" for base in bases) else "ignored"
    if model == TUNED:
        own = section in ("llm", "model", "align", "tune", "tower", "slit")
        return "searched" if own and key != "tune.valid_sessions" else "fixed"  # which it is judged by
    if section == "slit":
        return "searched" if text == "linear" else "ignored"
    if key in (("encoder.text_dim", "encoder.text_lr") if not text else (f"encoder.{base}.lr",)):
        return "ignored"  # a control learns at encoder.text_lr
    if section == "encoder":
        return "ignored" if len(rest) > 1 and rest[0] not in ("training", base) else "searched"
    texts = ("llm", "text_encoder") if not text else ()
    return "ignored" if section in ("model", "align", "tune", "tower", *texts) else "fixed"


def table(result: Search) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the search, best first: searched values, validation metrics, best epoch, seconds, experiment."""
    metrics = [f"{name}_at_20" for name in ("hr", "ndcg", "mrr")]
    rows = [[*(_text(trial.parameters[key]) for key in result.keys),
             *(f"{trial.metrics[name]:.6f}" for name in metrics),
             *(f"{trial.metrics[name]:{form}}" if name in trial.metrics else ""
               for name, form in (("best_epoch", ".0f"), ("seconds", ".1f"))), trial.name]
            for trial in result.trials]
    return [*result.keys, *(f"valid.{name}" for name in metrics), "best_epoch", "seconds", "experiment"], rows


def rewritten(text: str, changes: Mapping[str, Any]) -> str:
    """A parameter file with new values at dotted keys; everything else, comments and layout, stays to the byte."""
    places = []
    for key, value in changes.items():
        node = yaml.compose(text, yaml.SafeLoader)
        for part in key.split("."):
            node = next((inner for name, inner in node.value if name.value == part), None) if isinstance(
                node, yaml.MappingNode) else None
        if node is None:
            raise UserError(f"params.yaml: {key} is missing; add it (the committed file has every key)")
        places.append((node.start_mark.index, _end(node), _text(value)))
    for start, end, value in sorted(places, reverse=True):
        text = text[:start] + value + text[end:]
    return text


def _end(node: yaml.Node) -> int:
    """Where a node's last value ends; a block's own mark stands before what follows it."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return node.end_mark.index


def _text(value: Any) -> str:
    """A value as YAML in one line, which YAML 1.1 reads back as the same: 1.0e-05, not 1e-05."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
