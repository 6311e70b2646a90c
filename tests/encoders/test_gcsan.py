"""GC-SAN against its equations, the control's item vectors, the loss and the ranks."""
from __future__ import annotations

import itertools
import math
import types

import pytest
import torch
from tiny import gated_by_hand
from torch.nn import functional as F

from llmgr.encoders.gcsan import Gcsan
from llmgr.encoders.layers import AttentionBlock, item_cross_entropy
from llmgr.encoders.registry import EncoderWithItems
from llmgr.ranking.loop import rank_sessions
from llmgr.sessions.tensors import Sessions

ITEMS, DIM = 12, 8


def settings(**changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"gnn_layers": 1, "attention_layers": 1, "attention_heads": 1, "omega": 0.6}
                                 | changes)


def sessions(lists: list[list[int]], target: list[int] | None = None) -> Sessions:
    items = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
    for row, clicks in enumerate(lists):
        items[row, :len(clicks)] = torch.tensor(clicks)
    return Sessions(items, torch.arange(len(lists)), torch.tensor([len(x) for x in lists]),
                    torch.tensor(target or [1] * len(lists)))


LISTS = [[3, 5, 3, 7, 7, 2], [4], [1, 2], [9, 9, 9], [6, 1, 6, 1, 8], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


def made(seed: int = 0, **changes) -> tuple[Gcsan, torch.Tensor]:
    torch.manual_seed(seed)
    return Gcsan(DIM, 0.3, settings(**changes)).eval(), F.pad(torch.randn(ITEMS, DIM), (0, 0, 1, 0))


def by_hand(model: Gcsan, vectors: torch.Tensor, items: list[int]) -> torch.Tensor:
    """SR-GNN's equations 1-5, GC-SAN's attention over all queries (with the layer norms that
    AttentionBlock's Deviation names), and equation 12."""
    nodes = list(dict.fromkeys(items))
    edges = {(nodes.index(a), nodes.index(b)) for a, b in itertools.pairwise(items)}
    h = [vectors[i] for i in nodes]
    for layer in model.graph:
        h = gated_by_hand(layer, h, edges)
    x = torch.stack([h[nodes.index(i)] for i in items])
    gnn_last = x[-1]
    for block in model.attention:
        key, value = block.key_value(x).chunk(2, -1)
        query = block.query(x)
        width = DIM // block.heads
        heads = []
        for n in range(block.heads):
            part = slice(n * width, (n + 1) * width)
            weight = torch.softmax(query[:, part] @ key[:, part].T / math.sqrt(width), -1)
            heads.append(weight @ value[:, part])
        norm = block.norm_attention
        x = F.layer_norm(x + block.out(torch.cat(heads, -1)), (DIM,), norm.weight, norm.bias)
        inner = block.inner[2](torch.relu(block.inner[0](x)))
        x = F.layer_norm(x + inner, (DIM,), block.norm_inner.weight, block.norm_inner.bias)
    return model.omega * x[-1] + (1 - model.omega) * gnn_last


@pytest.mark.parametrize("changes", [{}, {"gnn_layers": 2, "attention_layers": 3, "attention_heads": 4, "omega": 0.3},
                                     {"gnn_layers": 5, "attention_layers": 5, "omega": 1.0}, {"omega": 0.0}])
@torch.no_grad()
def test_forward_is_the_papers_equations(changes):
    model, vectors = made(**changes)
    for module in model.modules():  # layer norms that do something
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5), module.bias.uniform_(-0.5, 0.5)
    found = model(sessions(LISTS).graphs(torch.arange(len(LISTS))), vectors)
    expected = torch.stack([by_hand(model, vectors, items) for items in LISTS])
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_the_last_query_alone_equals_full_attention():
    torch.manual_seed(1)
    block = AttentionBlock(DIM, 2, 0.3).eval()
    x, last = torch.randn(3, 5, DIM), torch.tensor([4, 0, 2])
    mask = torch.arange(5) <= last[:, None]
    full = block(x, mask)[torch.arange(3), last]
    torch.testing.assert_close(block(x, mask, last)[:, 0], full)


def test_partial_training_is_the_attention():
    model, _ = made(attention_layers=2)
    names = {n for n, p in model.named_parameters() if any(p is q for q in model.readout_parameters())}
    assert names == {n for n, _ in model.named_parameters() if n.startswith("attention.")} != set()


def test_item_vectors_of_the_control():
    torch.manual_seed(0)
    features = F.pad(torch.randn(ITEMS, 3), (0, 0, 1, 0))
    model = EncoderWithItems(ITEMS, made()[0], features)
    torch.testing.assert_close(model.vectors(), model.items.table.weight + features @ model.items.text.weight.T)
    assert (model.vectors() - model.items.table.weight).abs().max() > 1e-3
    batch = sessions(LISTS).graphs(torch.arange(len(LISTS)))
    with torch.no_grad():
        model.items.text.weight.zero_()
    plain = EncoderWithItems(ITEMS, made()[0])
    plain.items.table.load_state_dict(model.items.table.state_dict())
    plain.encoder.load_state_dict(model.encoder.state_dict())
    model.eval(), plain.eval()
    for ours, ids in zip(model(batch), plain(batch)):
        torch.testing.assert_close(ours, ids)
    session, vectors = model(batch)
    item_cross_entropy(session, vectors, torch.tensor([1, 2, 3, 4, 5, 6])).backward()
    table = model.items.table.weight.grad
    assert model.items.text.weight.grad.abs().sum() > 0 and (table[1:].abs().sum(1) > 0).all()
    assert table[0].abs().sum() == 0 and model.vectors()[0].abs().sum() == 0, "padding stays 0"
    assert "features" not in " ".join(model.state_dict())


def test_cross_entropy_is_the_softmax_over_items():
    torch.manual_seed(0)
    query, vectors = torch.randn(300, DIM), torch.randn(ITEMS + 1, DIM)
    target = torch.randint(1, ITEMS + 1, (300,))
    expected = -torch.log_softmax(query @ vectors.T[:, 1:], 1)[torch.arange(300), target - 1].sum()
    torch.testing.assert_close(item_cross_entropy(query, vectors, target), expected, rtol=1e-5, atol=1e-4)


def test_ranks_come_in_the_order_of_the_sessions_with_seen_items_in_and_out():
    lists = [[1, 2, 3], [4], [5, 6], [1, 1]]
    these = sessions(lists, [4, 1, 2, 3])
    scores = torch.zeros(4, ITEMS + 1)
    scores[0, 4], scores[0, 1:4] = 1.0, 2.0   # three seen items above
    scores[1, 1], scores[1, 9] = 1.0, 3.0     # one unseen item above
    scores[2, 2] = 1.0                        # first
    scores[3, :] = 1.0                        # all tie
    seen = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0], [1, 1, 0]])
    kept, unseen = rank_sessions(lambda s: scores[s], these, 3, seen)
    assert kept.tolist() == [4, 2, 1, 12]
    assert unseen.tolist() == [1, 2, 1, 11]
    assert rank_sessions(lambda s: scores[s], these, 2).tolist() == kept.tolist()
