"""What the benchmark counts: the operations that a step needs, and where its time goes."""
from __future__ import annotations

import types

import pytest
import torch
from tiny import DIM, ITEMS, TEXT, llmgr, prefixes, tokenizer

from llmgr.experiments import step_speed
from llmgr.model.behaviour import BehaviourJob
from llmgr.model.prompts import BehaviourPrompts
from llmgr.model.ranker import Ranker

SETTINGS = types.SimpleNamespace(batch_size=2, accumulate=1, targets="positions", samples=0, valid_sessions=0,
                                 recency=1.0)


def job() -> BehaviourJob:
    prompts, sessions = BehaviourPrompts(tokenizer(), "slot", None, 4, False), prefixes()
    return BehaviourJob(Ranker(llmgr(), prompts, torch.float32), sessions, sessions, SETTINGS, 3)


def test_operations_are_those_of_frozen_matrices_adapters_and_the_output():
    model = llmgr()  # two layers of width 16: queries and outputs 16 x 16, keys and values 16 x 8, three of 16 x 32
    frozen = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    adapters = 2 * 4 * ((16 + 16) * 2 + (16 + 8) * 2)
    table = (ITEMS + 1) * (DIM + TEXT)
    assert step_speed.operations(model, 10, 0) == 10 * (4 * frozen + 6 * adapters)
    assert step_speed.operations(model, 0, 3) == 3 * 4 * table


def test_steps_count_all_batches_but_the_first_and_shares_add_up():
    made = job()
    batches = [micros[0] for micros in made.steps(0, torch.Generator().manual_seed(0))]
    found = step_speed.steps(made, batches, step_speed.trained(made.model), 1)
    assert found["prompts"] == sum(map(len, batches[1:])) and found["targets"] == sum(map(made.targets, batches[1:]))
    assert found["tokens"] > found["targets"] and found["seconds"] > 0
    shares = step_speed.shares(made, batches)
    assert shares[0][0] == "matrix products" and 0 < shares[0][1] < 1
    assert sum(share for _, share in shares) == pytest.approx(1)


def test_a_batch_takes_its_fastest_time_and_the_first_is_left_out(monkeypatch):
    made, clock, took = job(), [0.0], iter([9.0, 3.0, 2.0, 4.0, 5.0, 7.0, 6.0])

    def counter() -> float:
        counter.calls += 1
        if counter.calls % 2 == 0:
            clock[0] += next(took)
        return clock[0]

    counter.calls = 0
    batches = [micros[0] for micros in made.steps(0, torch.Generator().manual_seed(0))]
    batches = [batches[0]] * 3
    optimizer = step_speed.trained(made.model)
    monkeypatch.setattr(step_speed, "time", types.SimpleNamespace(perf_counter=counter))
    assert step_speed.steps(made, batches, optimizer, 1)["seconds"] == 2.0 + 5.0


def test_a_machine_has_a_rate():
    assert step_speed.product_rate(torch.device("cpu"), torch.float32, 0.05) > 1e8
