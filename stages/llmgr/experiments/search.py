"""A hyperparameter search made of DVC experiments: which trained a model, on what, how well, and the best of them."""
from __future__ import annotations

import functools
import io
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmgr.params.loading import flat, whole
from llmgr.runtime.errors import UserError

SELECTS = "ndcg_at_20"  # on validation sessions, as for an encoder's epochs
LISTS = ("encoder.names", "encoder.controls", "encoder.control_texts",
         "encoder.linear_controls")  # which models there are
TUNED = "llmgr"  # its search is over stage 1 and stage 2; every other name is an encoder or a control
LATER = ("gate", "evaluate", "bucket", "track")  # sections that no training reads
MEANS = ("launch.", "data.mirror", "data.retries", "data.timeout")  # how something is done or fetched, not what


class Trial(NamedTuple):
    """An experiment that trained the model: its name in DVC, all parameters by dotted key, the model's metrics, and
    digests of what it was trained on."""

    name: str
    parameters: dict[str, Any]
    metrics: dict[str, Any]
    data: tuple[str | None, ...] = ()


class Search(NamedTuple):
    """The keys in which trials differ, and the trials, best first, one for each set of their values."""

    keys: list[str]
    trials: list[Trial]


def shown() -> list[dict[str, Any]]:
    """What `dvc exp show --json` says: the workspace and the current commit, each with its experiments."""
    done = _said("dvc", "exp", "show", "--json")
    if done.returncode:
        said = " ".join(done.stderr.split())[-200:]
        raise UserError(f"`dvc exp show` failed ({said}): run this in the repository root")
    return json.loads(done.stdout)


@functools.cache
def lock_of(revision: str) -> dict[str, Any]:
    """dvc.lock as an experiment left it."""
    done = _said("git", "show", f"{revision}:dvc.lock")
    return yaml.safe_load(done.stdout) if done.returncode == 0 else {}


@functools.cache
def file_of(revision: str, path: str) -> dict[str, Any]:
    """A JSON file of an experiment, from git or DVC's cache; empty where it has none."""
    from dvc.api import DVCFileSystem

    try:
        return json.loads(DVCFileSystem(rev=revision).read_bytes(path))
    except FileNotFoundError:
        return {}


def ranks_of(revision: str, models: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Test targets and their ranks by model and convention, as an experiment left them in DVC's cache."""
    import polars as pl
    from dvc.api import DVCFileSystem

    from llmgr.reporting.buckets import COLUMNS

    files, found = DVCFileSystem(rev=revision), {}
    for model in models:
        path = f"reports/ranks/{model}.parquet"
        try:
            frame = pl.read_parquet(io.BytesIO(files.read_bytes(path)))
        except FileNotFoundError:
            raise UserError(f"{path} of {revision[:7]} is not in DVC's cache: run the experiment anew, or `dvc exp "
                            "pull` it") from None
        found[model] = {convention: frame[column].to_numpy() for convention, column in COLUMNS.items()}
        found[model]["target"] = frame["target"].to_numpy()
    return found


def _said(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError:
        raise UserError(f"{command[0]} is not on the path: `source .venv/bin/activate` puts it there") from None


def trials(states: Iterable[Mapping[str, Any]], model: str, dataset: str, lock: Callable[[str], Mapping]
           ) -> list[Trial]:
    """The experiments of `shown` that trained `model` on `dataset`, the commit that they started from among them.

    One whose figures of the model come from other parameters or inputs than its own, because it ran other stages, is
    left out: `lock` gives the dvc.lock of a revision.
    """
    part = "tune" if model == TUNED else f"encoders/{model}"
    found = []
    for state in finished(states):
        data = state["data"]
        content = data["params"].get("params.yaml", {}).get("data")
        if not content or content["data"]["dataset"] != dataset:
            continue
        metrics = file_of(state["rev"], f"reports/metrics/{part}.json")
        if "valid" not in metrics:
            continue
        if trained(lock(state["rev"]), stage_of(model), content):
            data_of = digests(lock(state["rev"]))
            cost = file_of(state["rev"], f"reports/metrics/cost/{Path(part).name}.json")
            found.append(Trial(state.get("name") or state["rev"][:7], flat(whole(content).params),
                               {**metrics["valid"], "best_epoch": metrics.get("best_epoch", metrics["epochs"]),
                                "seconds": cost.get("seconds")}, data_of))
    return found


def digests(lock: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Digests of the catalogue and the sessions that a lock's stages worked on."""
    outs = {out["path"]: out.get("md5") for stage in lock.get("stages", {}).values() for out in stage.get("outs", ())}
    return outs.get("data/core"), outs.get("data/sessions")


def finished(states: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The commits and experiments of `shown` that have figures, one by one.

    DVC shows what waits, runs or failed with its own parameters and the figures of the commit it started from.
    """
    for state in states:
        inner = [revision for group in state.get("experiments") or () for revision in group["revs"]
                 if (group.get("executor") or {}).get("state") not in ("queued", "running", "failed")]
        yield from (s for s in (state, *inner) if s["rev"] != "workspace" and s.get("data") and not s.get("error"))


def stage_of(model: str) -> str:
    """The stage of dvc.yaml that trains a model."""
    base, _, text = model.partition("-")
    if model == TUNED:
        return "tune"
    return f"linear@{base}" if text == "linear" else f"{'control' if text else 'pretrain'}@{model}"


def trained(lock: Mapping[str, Any], stage: str, content: Mapping[str, Any]) -> bool:
    """Whether the lock holds `stage` and all before it as run with the parameters of `content`, one on the other."""
    stages = lock.get("stages", {})
    makers = {out["path"]: (name, out.get("md5")) for name, entry in stages.items() for out in entry.get("outs", ())}
    todo = [stage]
    consistent = stage in stages
    while todo and consistent:
        entry = stages[todo.pop()]
        consistent = all(_at(content, key) == value
                         for key, value in entry.get("params", {}).get("params.yaml", {}).items())
        for dep in entry.get("deps", ()):
            maker, md5 = makers.get(dep["path"], (None, dep.get("md5")))
            consistent &= md5 == dep.get("md5")
            todo += [maker] if maker else []
    return consistent


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


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
                            "their figures do not compare: take those of one value away with `dvc exp remove`")
    if len({trial.data for trial in found}) > 1:
        raise UserError(f"the experiments that trained {model} did so on other data, so their figures do not compare: "
                        "take those of one data/sessions away with `dvc exp remove`")
    if not searched:
        grid = Path(__file__).resolve().parent.parent.parent / "presets" / "grid" / f"{model}.txt"
        how = f"queue stages/presets/grid/{model}.txt" if grid.exists() else (
            "queue some with `dvc exp run --queue -S key=a,b`")
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
    metrics = [name for name in result.trials[0].metrics if name not in ("best_epoch", "seconds")]
    rows = [[*(_text(trial.parameters[key]) for key in result.keys),
             *(f"{trial.metrics[name]:.6f}" for name in metrics), str(trial.metrics["best_epoch"]),
             "" if trial.metrics["seconds"] is None else f"{trial.metrics['seconds']:.1f}", trial.name]
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
