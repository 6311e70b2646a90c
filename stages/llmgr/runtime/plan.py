"""A stage's position in the pipeline, and how long it and the following stages took the last time."""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from llmgr.runtime.artifacts import write_json
from llmgr.runtime.console import WORKERS, first, say


def stages(root: Path) -> list[str]:
    """The names of all stages of dvc.yaml in `root`, in order, with the matrices that params.yaml fills."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content, params = (yaml.load((root / name).read_bytes(), loader) for name in ("dvc.yaml", "params.yaml"))
    names = []
    for name, stage in content["stages"].items():
        lists = [_filled(values, params) for values in stage.get("matrix", {}).values()]
        names += [f"{name}@{'-'.join(map(str, chosen))}" if chosen else name for chosen in itertools.product(*lists)]
    return names


def _filled(values: Any, params: Any) -> list[Any]:
    """The list of a matrix, which stands there or in the parameter that it names."""
    if isinstance(values, list):
        return values
    for part in values.removeprefix("${").removesuffix("}").split("."):
        params = params[part]
    return params


class Timed:
    """Says where the stage that DVC runs stands, and remembers below `root` how long it took."""

    def __init__(self, root: Path) -> None:
        self.path, self.begun = root / ".resume/seconds.json", time.monotonic()
        speaks = first() and WORKERS not in os.environ  # what started the workers does
        self.name = os.environ.get("DVC_STAGE", "").rpartition(":")[2] if speaks else ""

    def announce(self) -> None:
        """One line: the stage's number, its name, and what it and those after it took the last time, where known."""
        try:
            every = stages(Path()) if self.name else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        if self.name not in every:
            return
        at, known = every.index(self.name), self._known()
        own, rest = known.get(self.name), [known.get(name) for name in every[at:]]
        say(f"stage {at + 1} of {len(every)}: {self.name}" + (f", about {_words(own)}" if own is not None else "") + (
            f"; {_words(sum(rest))} left if all that follow run" if None not in rest else ""))

    def done(self) -> None:
        """Remember how long it took."""
        with contextlib.suppress(OSError):  # no reason for a finished stage to fail
            if self.name:
                write_json(self.path, self._known() | {self.name: round(time.monotonic() - self.begun, 1)})

    def _known(self) -> dict[str, float]:
        try:
            content = json.loads(self.path.read_text())
            return {name: float(seconds) for name, seconds in content.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
