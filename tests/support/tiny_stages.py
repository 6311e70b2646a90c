"""Alignment and behaviour tuning of the tiny model, ready to train."""
from __future__ import annotations

import types

import torch
from tiny import TITLES, prefixes, tokenizer

from llmgr.model.align import AlignJob
from llmgr.model.behaviour import BehaviourJob
from llmgr.model.llmgr import Llmgr
from llmgr.model.loss import TextSmoothing
from llmgr.model.prompts import AlignmentPrompts, BehaviourPrompts
from llmgr.model.ranker import Ranker
from llmgr.prior.weighted_sum import Prior
from llmgr.sessions.tensors import Sessions


def settings(**changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{
        "epochs": 25, "batch_size": 4, "accumulate": 1, "lr": 0.02, "weight_decay": 0.0, "warmup_share": 0.1,
        "clip": 1.0, "checkpoint_seconds": 1e9, "candidates": 4, "targets": "positions",
        "samples": 0, "valid_sessions": 0, "text_smoothing": 0.0, "recency": 1.0} | changes)


def align(model: Llmgr, **changes) -> AlignJob:
    return AlignJob(model, AlignmentPrompts(tokenizer(), TITLES, 8), settings(**changes), 3, torch.float32)


def ranker(model: Llmgr, titles: bool = False, prior: Prior | None = None) -> Ranker:
    return Ranker(model, BehaviourPrompts(tokenizer(), "slot", TITLES if titles else None, 4, False), torch.float32,
                  prior)


def behave(model: Llmgr, train: Sessions | None = None, valid: Sessions | None = None, titles: bool = False,
           prior: Prior | None = None, smoothing: TextSmoothing | None = None, **changes) -> BehaviourJob:
    train = train if train is not None else prefixes()
    return BehaviourJob(ranker(model, titles, prior), train, train if valid is None else valid, settings(**changes), 3,
                        smoothing)
