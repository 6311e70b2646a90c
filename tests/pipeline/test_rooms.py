"""The rooms of the library: imports run one way, and what a room may import is what its docstring says."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

from llmgr.runtime.reach import FRAME, LIBRARY, imported

ORDER = ("runtime", "params", "data", "sessions", "text", "ranking", "training", "language_model", "encoders", "prior",
         "model", "serving", "evaluation", "reporting", "experiments", "pipeline")
FILES = sorted(LIBRARY.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0]


def test_every_folder_is_a_room_with_two_lines_about_itself() -> None:
    assert {p.name for p in LIBRARY.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(ORDER)
    for name in ORDER:
        what, _, may = ast.get_docstring(ast.parse((LIBRARY / name / "__init__.py").read_text())).partition("\n\n")
        assert what.endswith(".") and may.startswith("May import ")
        assert len(ast.parse((LIBRARY / name / "__init__.py").read_text()).body) == 1, "words alone: see reach.py"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(LIBRARY).as_posix())
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    """Imports inside functions and for type checking count."""
    if path.parent == LIBRARY:
        return
    later = [str(other) for other in imported(path) if ORDER.index(room(other)) > ORDER.index(room(path))]
    assert not later


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    open_, done = set(), set()

    def visit(path: Path) -> None:
        assert path not in open_, f"{path} is part of a circle"
        if path not in done:
            open_.add(path)
            for other in imported(path):
                visit(other)
            open_.discard(path)
            done.add(path)

    for path in FILES:
        visit(path)


def test_the_frame_computes_nothing() -> None:
    """Stages do not declare these rooms as dependencies, so that no result may come from them."""
    for path in FILES:
        if room(path) in FRAME:
            names = {alias.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)
                     for alias in node.names}
            assert not names & {"torch", "numpy", "scipy"}, path
