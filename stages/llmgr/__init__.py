"""LLMGR (arXiv 2402.16539): a language model plugged into graph-based session recommendation.

Shape legend used as suffix of tensor names throughout the package:
B batch, L prompt tokens, S session length, N graph nodes, E edges, R readouts (targets) of a batch, M nodes and C
clicks of all graphs of a batch end to end, D encoder width, H language-model width, T text-feature width, V items, F a
fixed number of prompt pieces.
Item ids are 1-based; 0 pads.
"""
from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`Recommender`, read when it is first named: the stages import this package for its rooms."""
    if name != "Recommender":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmgr.serving.recommender import Recommender

    return Recommender
