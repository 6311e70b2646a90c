"""Training of the student: it learns LLMGR's queries of training prefixes (Hinton et al. 2015, arXiv 1503.02531).

Shapes: I = 3 K inputs of the student.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmgr.model.behaviour import spans
from llmgr.model.outputs import Factors
from llmgr.runtime.console import Bar
from llmgr.serving.student import Student, inputs
from llmgr.sessions.batching import bucketed

if TYPE_CHECKING:
    from llmgr.model.ranker import Ranker
    from llmgr.sessions.tensors import Sessions

TAUGHT = 20_000  # prompts that LLMGR reads at most
PROMPTS, EPOCHS, BATCH, LR = 16, 30, 512, 2e-3


@torch.no_grad()
def taught(ranker: Ranker, train: Sessions, seed: int) -> tuple[Sessions, Tensor, Factors]:
    """LLMGR's own logits of training prefixes, without its prior: the sessions, their samples [R], and the factors with
    queries [R, K], on the CPU."""
    train, _ = ranker.shortened(train, "training")
    first, last, sample = spans(train, ranker.llmgr.causal)
    chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:TAUGHT]
    batches = bucketed(last[chosen], PROMPTS, torch.Generator().manual_seed(seed))
    bar, rows, queries = Bar(len(batches), 0, "package: what LLMGR says of training sessions"), [], []
    for number, batch in enumerate(batches, 1):
        at = chosen[batch]
        count = last[at] - first[at] + 1
        within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        rows.append(sample[at].repeat_interleave(count) + within)
        factors, _ = ranker.factors(train, rows[-1], count)
        queries.append(factors.query_RK.cpu())
        bar.show(number)
    bar.close()
    table, bias = factors.table_VK.float().cpu(), factors.bias_V
    return train, torch.cat(rows), Factors(torch.cat(queries), table, None if bias is None else bias.float().cpu())


def trained_student(train: Sessions, samples_R: Tensor, factors: Factors, seed: int) -> Student:
    """The student whose logits are closest to those of the factors: least squares over all items, up to a constant.

    The squared error of the logits is the squared error of the queries under the covariance of the table's rows.
    """
    query_RK, table_VK = factors.query_RK, factors.table_VK
    torch.manual_seed(seed)
    student = Student(table_VK.shape[1])
    centred = (table_VK[1:] - table_VK[1:].mean(0)).double()
    values, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    root_KK = (axes * values.clamp(min=0).sqrt()).float()
    order = torch.argsort(train.length[samples_R], stable=True)
    read_RI = torch.empty(len(samples_R), 3 * table_VK.shape[1])
    for at in order.split(2048):
        read_RI[at] = inputs(train.graphs(samples_R[at]), table_VK)
    optimizer = torch.optim.AdamW(student.parameters(), LR, weight_decay=0.01)
    steps = EPOCHS * -(-len(samples_R) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for at in torch.randperm(len(samples_R), generator=generator).split(BATCH):
            optimizer.zero_grad()
            gap_BK = (student.queries(read_RI[at]) - query_RK[at]) @ root_KK
            gap_BK.square().sum(1).mean().backward()
            optimizer.step()
            schedule.step()
    return student.eval().requires_grad_(False)
