"""The shape legend is true: each letter at the end of a tensor's name is in the package's legend or in its module's."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llmgr
from llmgr.runtime.reach import LIBRARY

LETTER = re.compile(r"\b([A-Z])\b(?= [a-z]| = | and )")
SHAPED = re.compile(r"\w*[a-z0-9]_([A-Z0-9]+)")


def legend(text: str) -> set[str]:
    return set(LETTER.findall(text))


def suffixes(tree: ast.Module) -> dict[str, str]:
    """The capital letters behind the underscore of every name, attribute, parameter and field, by name."""
    names = {node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else node.attr
             for node in ast.walk(tree) if isinstance(node, ast.Name | ast.arg | ast.Attribute)}
    return {name: match[1] for name in names if (match := SHAPED.fullmatch(name))}


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_every_letter_of_a_shape_is_in_a_legend(path: Path) -> None:
    tree = ast.parse(path.read_text())
    own = (ast.get_docstring(tree) or "").partition("Shapes:")[2]
    known = legend(llmgr.__doc__.partition("Shape legend:")[2].partition("A module that")[0]) | legend(own)
    unknown = {name: letters for name, letters in suffixes(tree).items() if set(letters) - known - set("0123456789")}
    assert not unknown
    used = {letter for letters in suffixes(tree).values() for letter in letters}
    assert not legend(own) - used, "the module's legend names letters that no tensor of it has"


def test_the_legend_is_read() -> None:
    assert legend("B sessions of a batch, E = D + 1 coordinates, M nodes and C clicks") == {"B", "E", "M", "C"}
    assert suffixes(ast.parse("x_BSD = self.read_RI[at]; f(query_RK, ITEM_ID)")) == {
        "x_BSD": "BSD", "read_RI": "RI", "query_RK": "RK"}
