"""Bounds that the dataclasses of `schema` check."""
from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

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


def positive(section: Any, prefix: str, *names: str) -> None:
    """Refuse values that are not above zero."""
    for name in names:
        if getattr(section, name) <= 0:
            raise UserError(f"{prefix}.{name}={getattr(section, name)} must be above 0")


def rate(section: Any, key: str) -> None:
    """Refuse a learning rate that is neither `auto` nor above zero; `key` is its whole name."""
    value = getattr(section, key.rpartition(".")[2])
    if value != "auto" and value <= 0:
        raise UserError(f"{key}={value} must be above 0, or auto")


def at_least(section: Any, prefix: str, name: str, low: float) -> None:
    """Refuse a value below `low`."""
    if getattr(section, name) < low:
        raise UserError(f"{prefix}.{name}={getattr(section, name)} must be at least {low}")


def between(section: Any, prefix: str, name: str, low: float, high: float) -> None:
    """Refuse a value outside [low, high]."""
    if not low <= getattr(section, name) <= high:
        key = f"{prefix}.{name}".lstrip(".")
        raise UserError(f"{key}={getattr(section, name)} must lie between {low} and {high}")


def seeds(section: Any, prefix: str, *names: str) -> None:
    """Refuse what is no seed of all random generators."""
    for name in names:
        between(section, prefix, name, 0, 2**63 - 1)


def share(section: Any, prefix: str, *names: str) -> None:
    """Refuse values outside [0, 1]."""
    for name in names:
        between(section, prefix, name, 0, 1)
