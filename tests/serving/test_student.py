"""The student: LLMGR's scores without its language model."""
from __future__ import annotations

import pytest
import torch
from tiny import ITEMS, LISTS, llmgr, prefixes, tokenizer
from tiny_package import graphs, package
from torch.nn import functional as F

from llmgr.model.outputs import Factors
from llmgr.model.prompts import BehaviourPrompts
from llmgr.model.ranker import Ranker
from llmgr.serving.building import with_student
from llmgr.serving.distillation import taught, trained_student
from llmgr.serving.scoring import Scorer
from llmgr.serving.student import Student, inputs


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_teacher_says_of_training_prefixes_what_it_answers(kind: str) -> None:
    """Whether all prefixes of a session are read from one prompt, or each from its own."""
    model, train = llmgr(kind), prefixes()
    ranker = Ranker(model, BehaviourPrompts(tokenizer(kind), "slot", None, 0, False), torch.float32)
    _, samples, said = taught(ranker, train, 0)
    assert sorted(samples.tolist()) == list(range(len(train)))
    assert torch.allclose(said.logits()[:, 1:], ranker.over(train)(samples)[:, 1:], atol=1e-4)


def test_a_package_adds_the_student_to_the_tuned_prior() -> None:
    whole = package()
    torch.manual_seed(3)
    student, table = Student(4).eval(), F.pad(torch.randn(ITEMS, 4), (0, 0, 1, 0))
    bias = torch.randn(ITEMS + 1)
    said = Factors(torch.zeros(1, 4), table, bias)
    weights = {name: value + 1 for name, value in whole.under("weights.").items()}
    tuned = type(whole)(whole.config, whole.items,
                        whole.tensors | {f"weights.{name}": value for name, value in weights.items()})
    batch = graphs(LISTS)
    expected = Scorer(tuned)(batch) + student(batch, table) @ table.T + bias
    assert torch.allclose(Scorer(with_student(whole, weights, student, said))(batch), expected, atol=1e-5)
    alone = Scorer(with_student(whole, {}, student, said))
    assert alone.base is None and alone.parts(batch).keys() >= {"student"}


def test_a_student_learns_what_its_teacher_says() -> None:
    """Logits a constant apart rank alike, and the table's mean row adds one: it is not learned."""
    train, table = prefixes(), F.pad(torch.randn(ITEMS, 4, generator=torch.Generator().manual_seed(1)), (0, 0, 1, 0))
    samples = torch.arange(len(train)).repeat(60)
    read = inputs(train.graphs(samples), table)
    query = read @ torch.randn(12, 4, generator=torch.Generator().manual_seed(2)) / 4
    student = trained_student(train, samples, Factors(query, table, None), 0)
    gap = ((student(train.graphs(samples), table) - query) @ table[1:].T)
    said = (query @ table[1:].T)
    gap, said = gap - gap.mean(1, keepdim=True), said - said.mean(1, keepdim=True)
    assert gap.square().mean() < 0.1 * said.square().mean()
