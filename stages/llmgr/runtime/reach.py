"""The modules of the library that a script can reach: its results depend on them, beside parameters and inputs."""
from __future__ import annotations

import ast
import functools
from pathlib import Path

FRAME = ("runtime", "params", "pipeline")
"""Rooms that decide how a stage starts, reads its parameters and fails, but not what it computes."""
LIBRARY = Path(__file__).resolve().parent.parent
DISPATCH = {"encoders/registry.py": "encoders"}
"""Modules that import the files of a room by name while they run."""


def reached(script: str | Path) -> list[Path]:
    """Files of llmgr that a script imports, directly or through others, without those of FRAME.

    All of them where there is no such file: code typed at a prompt may reach anything.
    """
    if not Path(script).is_file():
        return sorted(path for path in LIBRARY.glob("*/*.py") if path.parent.name not in FRAME)
    seen: set[Path] = set()
    todo = set(imported(Path(script).resolve()))
    while todo:
        file = todo.pop()
        name = file.relative_to(LIBRARY).as_posix()
        if file in seen or name.split("/")[0] in FRAME:
            continue
        seen.add(file)
        todo |= imported(file) - seen
        if name in DISPATCH:
            todo |= {*(LIBRARY / DISPATCH[name]).glob("[!_]*.py")} - seen
    return sorted(seen)


def rooms(script: str | Path) -> list[str]:
    """The rooms of those files; a module beside the rooms stands for itself."""
    return sorted({file.relative_to(LIBRARY).parts[0] for file in reached(script)})


@functools.cache
def imported(file: Path) -> frozenset[Path]:
    """The modules of llmgr that one file imports, also for type checking only. A room's `__init__` has no code."""
    files: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmgr":
            below = node.module.split(".")[1:]
            for parts in (below, *([*below, alias.name] for alias in node.names)):
                path = LIBRARY.joinpath(*parts).with_suffix(".py")
                if parts and path.is_file():
                    files.add(path)
    return frozenset(files)
