"""Checks that more than one section needs."""
from __future__ import annotations

import difflib
from collections.abc import Sequence

from llmgr.runtime.errors import UserError
from llmgr.runtime.memory import GB

PAIRS_HELD = 4
"""Float32 matrices of all pairs of items at the peak: the inverse, the scores, and two of their making."""


def check_pairs(items: int, memory: float) -> None:
    """Raise UserError where `memory` (bytes) does not hold what `tune.linear` and `encoder.linear_controls` form."""
    need = PAIRS_HELD * 4 * items ** 2
    if need > memory:
        raise UserError(f"the linear model of LLMGR and NAME-linear forms matrices of all pairs of {items:,} items: it "
                        f"needs {need / GB:.1f} GB and there are {max(0.0, memory) / GB:.1f} GB; set "
                        "tune.linear=false, tune.folds=0 and encoder.linear_controls=[], or take a machine with more")


def one_of(known: Sequence[str], name: str, key: str, wrong: str) -> None:
    """Refuse a name that is not known, with the nearest one that is."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise UserError(f"{key} names {name}, {wrong}; the nearest is {near}")
