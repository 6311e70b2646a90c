"""LLMGR (arXiv 2402.16539): a language model plugged into graph-based session recommendation.

Shape legend: the capital letters at the end of a tensor's name are its dimensions.
B sessions of a batch, S clicks of a session, N nodes of a session graph, L tokens of a prompt, R readouts (samples),
M nodes and C clicks of all graphs of a batch end to end, E edges, V items (V+1 rows with padding), D width of the
session encoder, H width of the language model, T width of the text features, K columns of an output's table. A digit
is an axis of that size.
A module that uses another letter, or one of these otherwise, says so in its docstring after "Shapes:".
Item ids start at 1; 0 is padding.
"""
from __future__ import annotations

import importlib

NAMES = {"Ranker": "model.ranker:Ranker", "Recommender": "serving.recommender:Recommender",
         "Sessions": "sessions.tensors:Sessions", "build": "model.building:from_tensors",
         "load_params": "params.loading:load"}
"""What to import from here, and where it stands. A module is imported when a name of it is first used."""
__all__ = sorted(NAMES)


def __getattr__(name: str) -> object:
    """One of NAMES. Stages import this package only for its rooms, and need not wait for torch."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = NAMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
