"""Ablations of LLMGR, the same experiment with one thing taken away, and the same experiment at other seeds."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmgr.experiments.published import Published, Run, logged
from llmgr.experiments.search import LATER, LISTS, TUNED, is_means
from llmgr.params.loading import build, changed, flat, whole
from llmgr.params.schema import Params
from llmgr.reporting.buckets import COMPARED
from llmgr.reporting.seeds import Figures
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError

PRESETS = Path(__file__).resolve().parent.parent.parent / "presets" / "ablations"
UNPUBLISHED = ("MLflow has no run of what params.yaml asks for, so the report will not show these: `dvc repro track`")
COUNTED = ("bucket.cold", "bucket.warm")  # which sessions the buckets hold


def changes(path: Path) -> dict[str, Any]:
    """What a file of `-S key=value` options sets."""
    options = path.read_text().split()
    if options[::2] != ["-S"] * (len(options) // 2) or not options or len(options) % 2:
        raise UserError(f"{path} must hold -S key=value options and nothing else")
    pairs = (option.lstrip("+").partition("=") for option in options[1::2])
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def options(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset changes in the experiment `content`.

    Texts that are dealt to other items are so in the base as well, by its own shuffled control; a base that reads none
    stays.
    """
    values, (base, _, text) = changes(path), content["model"]["base"].partition("-")
    if not values.get("model.base", "").endswith("-shuffled"):
        return values
    if text == "text":
        return values | {"model.base": f"{base}-shuffled"}
    return {key: value for key, value in values.items() if key not in ("model.base", "encoder.control_texts")}


def decisive(content: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that decide LLMGR's figures, as a run gives them back; of a disabled tower no others."""
    return _deciding(logged(content))


def _deciding(every: Mapping[str, Any]) -> dict[str, Any]:
    idle = {key for key in every if key.startswith("tower.") and key != "tower.enabled" and not every["tower.enabled"]}
    return {key: value for key, value in every.items()
            if key in COUNTED or (key.split(".")[0] not in LATER and not is_means(key) and key not in idle)}


class Ablation(NamedTuple):
    """What an ablation changes, and the parameters that decide its figures, by dotted key."""

    changed: dict[str, Any]
    decisive: dict[str, Any]


def possible(content: Mapping[str, Any], presets: Path = PRESETS) -> dict[str, Ablation]:
    """The ablations that the experiment `content` can have, by name, itself first (as `llmgr`).

    A preset that changes nothing here, or asks for what these parameters do not have, is no ablation.
    """
    found = {TUNED: Ablation({}, decisive(content))}
    for path in sorted(presets.glob("*.txt")):
        values = options(path, content)
        try:
            params, lines = whole(changed(content, values))
            every, asked = flat(params), flat(build(Params, changed(content, values), ""))
            if any(every[key] != asked[key] for key in values):
                raise UserError("; ".join(lines))
            ablation = Ablation(values, decisive(changed(content, values)))
        except UserError as error:
            say(f"warning: {path.stem} is no ablation of these parameters: {error}")
            continue
        if ablation.decisive != found[TUNED].decisive:
            found[path.stem] = ablation
    return found


def collected(published: Published, content: Mapping[str, Any], asked: Mapping[str, Ablation]
              ) -> dict[str, dict[str, Any]]:
    """Those of the `possible` ablations of the experiment `content` that were published, with LLMGR's figures.

    `{name: {"changed": {key: value}, "figures": {convention: {bucket: {metric: value}}}}}`; of several runs of one
    ablation the newest counts.
    """
    results: dict[str, dict[str, Any]] = {}
    for run in _comparable(published, content):
        parameters = _deciding(run.parameters)
        for name, ablation in asked.items():
            if name not in results and parameters == ablation.decisive:
                results[name] = {"changed": ablation.changed, "figures": {
                    convention: {bucket: by[bucket] for bucket in COMPARED if bucket in by}
                    for convention, by in published.figures(run)[TUNED].items()}}
    return {name: results[name] for name in asked if name in results}


def at_seeds(published: Published, content: Mapping[str, Any]) -> dict[str, tuple[Run, Figures]]:
    """Run and figures of every model by seed, of the experiments that differ from `content` in the seed alone.

    Which encoders an experiment trained does not matter. A gate counts only where it fuses what it fuses here.
    """
    here, results = logged(content), {}
    gates = {key for key in here if key.startswith("gate.") and key != "gate.fuse"}
    for run in _comparable(published, content):
        seed = str(run.parameters["seed"])
        if seed in results or _fixed(run.parameters) != _fixed(here):
            continue
        fused, own = run.parameters["gate.fuse"], here["gate.fuse"]
        other = {name for name in fused if fused[name] != own.get(name) or any(
            run.parameters[key] != here[key] for key in gates)}
        results[seed] = (run, {
            model: {convention: {bucket: by[bucket] for bucket in COMPARED if bucket in by}
                    for convention, by in conventions.items() if convention in ("test", "test_unseen")}
            for model, conventions in published.figures(run).items() if model not in other})
    return {seed: results[seed] for seed in sorted(results, key=int)}


def _comparable(published: Published, content: Mapping[str, Any]) -> list[Run]:
    """The experiments on the data of the newest one with the parameters of `content`; all where there is none."""
    runs, decided = published.runs("experiment"), decisive(content)
    own = next((run for run in runs if _deciding(run.parameters) == decided), None)
    return [run for run in runs if own is None or run.data == own.data]


def _fixed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What experiments have in common that differ in the seed alone."""
    scored = {key: value for key, value in parameters.items()
              if key.startswith("evaluate.") and key != "evaluate.batch_size"}
    return scored | {key: value for key, value in _deciding(parameters).items() if key not in ("seed", *LISTS)}
