"""Ablations of LLMGR, the same experiment with one thing taken away, and the same experiment at other seeds."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmgr.experiments.search import LATER, LISTS, TUNED, digests, file_of, finished, is_means, trained
from llmgr.params.loading import build, changed, flat, whole
from llmgr.params.schema import Params
from llmgr.reporting.buckets import COMPARED
from llmgr.reporting.seeds import Figures
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError

PRESETS = Path(__file__).resolve().parent.parent.parent / "presets" / "ablations"
UNCOMMITTED = ("what params.yaml asks for is itself no commit and no experiment, so the report will not show these: "
               "`dvc exp run`, or commit what `dvc repro` left")
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
    """The parameters that decide LLMGR's figures, by dotted key; of a tower that is not enabled no others."""
    every = flat(whole(dict(content)).params)
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


def collected(states: Iterable[Mapping[str, Any]], content: Mapping[str, Any], asked: Mapping[str, Ablation],
              lock: Callable[[str], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of the `possible` ablations of the experiment `content` that have been run, with LLMGR's figures.

    `{name: {"changed": {key: value}, "figures": {convention: {bucket: {metric: value}}}}}`; `states` are those of
    `dvc exp show`, `lock` gives a revision's dvc.lock: figures of other parameters or inputs do not count.
    """
    found: dict[str, dict[str, Any]] = {}
    for state in _comparable(states, content, lock):
        own = state["data"]["params"].get("params.yaml", {}).get("data")
        figures = file_of(state["rev"], "reports/metrics/buckets.json").get(TUNED)
        if not own or not figures:
            continue
        parameters = decisive(own)
        for name, ablation in asked.items():
            if parameters == ablation.decisive and name not in found and trained(lock(state["rev"]), "bucket", own):
                found[name] = {"changed": ablation.changed, "figures": {
                    convention: {bucket: by[bucket] for bucket in COMPARED if bucket in by}
                    for convention, by in figures.items()}}
    return {name: found[name] for name in asked if name in found}


def at_seeds(states: Iterable[Mapping[str, Any]], content: Mapping[str, Any],
             lock: Callable[[str], Mapping[str, Any]]) -> dict[str, tuple[str, Figures]]:
    """Revision and figures of every model by seed, of the experiments that differ from `content` in the seed alone.

    Which encoders an experiment trained does not matter; `states` and `lock` as in `collected`. A gate
    counts only where it fuses what it fuses here.
    """
    states = list(states)
    first = next(finished(states), None)
    start = lock(first["rev"]) if first else {}
    expected, found = _fixed(content), {}
    for state in _comparable(states, content, lock):
        own = state["data"]["params"].get("params.yaml", {}).get("data")
        figures = file_of(state["rev"], "reports/metrics/buckets.json")
        if not own or not figures or _fixed(own) != expected or not trained(lock(state["rev"]), "bucket", own):
            continue
        if _encoders_since(lock(state["rev"]), start):
            continue
        here, there = content["gate"], own["gate"]
        other = {name for name in there["fuse"] if there["fuse"][name] != here["fuse"].get(name) or any(
            there[key] != here[key] for key in ("edges", "sessions"))}
        found.setdefault(str(own["seed"]), (state["rev"], {
            model: {convention: {bucket: by[bucket] for bucket in COMPARED if bucket in by}
                    for convention, by in conventions.items() if convention in ("test", "test_unseen")}
            for model, conventions in figures.items() if model not in other}))
    return {seed: found[seed] for seed in sorted(found, key=int)}


def _comparable(states: Iterable[Mapping[str, Any]], content: Mapping[str, Any],
                lock: Callable[[str], Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The states whose data are those of the first with the parameters of `content`, where there is one."""
    done = list(finished(states))
    own = [state for state in done if (found := state["data"]["params"].get("params.yaml", {}).get("data"))
           and decisive(found) == decisive(content)]
    return [state for state in done if digests(lock(state["rev"])) == digests(lock(own[0]["rev"]))] if own else done


def _encoders_since(lock: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Whether an encoder was trained anew after the start, but evaluate, which reads them all, did not run."""
    def outs(of: Mapping[str, Any]) -> dict[str, Any]:
        return {out["path"]: out.get("md5") for entry in of.get("stages", {}).values() for out in entry.get("outs", ())
                if out["path"].startswith("models/encoders/")}

    same = lock.get("stages", {}).get("evaluate") == start.get("stages", {}).get("evaluate")
    return same and outs(lock) != outs(start)


def _fixed(content: Mapping[str, Any]) -> dict[str, Any]:
    scored = {key: value for key, value in flat(whole(dict(content)).params).items()
              if key.startswith("evaluate.") and key != "evaluate.batch_size"}
    return scored | {key: value for key, value in decisive(content).items() if key not in ("seed", *LISTS)}
