"""The folder where interrupted work waits until the same stage runs again."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmgr.runtime.artifacts import digest, require
from llmgr.runtime.console import first, say
from llmgr.runtime.ownership import hold
from llmgr.runtime.reach import LIBRARY, reached

UNFINISHED = 5
"""How many interrupted trainings (or downloads) of a stage wait to be resumed; older ones are dropped."""


def home() -> Path:
    """The repository root: DVC_ROOT inside a DVC stage (the parent repository in `--temp` runs), else the folder."""
    return Path(os.environ.get("DVC_ROOT", "."))


def resume_folder(stage: str, params: dict[str, Any], inputs: Iterable[str | Path]) -> Path:
    """The folder in which a stage keeps what it needs to resume after an interruption.

    Its name is a fingerprint of everything that decides the outcome: the parameters, the content of the inputs, and the
    code that the running script can reach. Thread and process counts (`launch`) decide only rounding. They stand in the
    checkpoint: any number of processes can resume it, and a different one is reported. The folder lies outside DVC's
    outs. Of two runs of the same work at the same time, the second gets a folder of its own. A folder that nobody comes
    back to is dropped once there are `UNFINISHED` newer ones.
    """
    print_of = hashlib.sha256()
    deciding = {key: value for key, value in params.items() if not key.startswith("launch.")}
    print_of.update(json.dumps(deciding, sort_keys=True, default=str).encode())
    for path in inputs:
        print_of.update(f"{path}\0{digest(require(path))}\n".encode())
    for file in reached(sys.argv[0]):
        print_of.update(f"{file.relative_to(LIBRARY).as_posix()}\0{digest(file)}\n".encode())
    name = print_of.hexdigest()[:16]
    if first() and not hold(home() / ".resume" / stage / f"{name}.lock"):
        say("another run does the same work: this one keeps checkpoints of its own")
        name += f"-{os.getpid()}"
    return waiting(stage, name)


def waiting(stage: str, name: str) -> Path:
    """The folder `name` for unfinished work of a stage, made if missing; the stage's oldest ones are dropped."""
    folder = home() / ".resume" / stage / name
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    for path in sorted(others, key=_last_used, reverse=True)[UNFINISHED - 1:]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def _last_used(folder: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # another process has just finished it
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return 0.0
