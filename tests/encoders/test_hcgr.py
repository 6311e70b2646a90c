"""HCGR against its equations in float64, its manifold before and after training, its optimiser and its loss."""
from __future__ import annotations

import itertools
import math
import types

import geoopt
import pytest
import torch
from tiny import chain, encoder_section, readout_by_hand
from torch.nn import functional as F

from llmgr.encoders.hcgr import RADIUS, Hcgr
from llmgr.encoders.pretraining import EncoderJob
from llmgr.encoders.registry import EncoderWithItems, build_with_items
from llmgr.runtime.errors import UserError
from llmgr.sessions.tensors import Sessions
from llmgr.training.engine import fit
from llmgr.training.optimizer import _groups, adamw

ITEMS, DIM = 12, 8
LISTS = [[3, 5, 3, 7, 7, 2], [4], [1, 2], [9, 9, 9], [6, 1, 6, 1, 8]]


def graphs():
    items = torch.zeros(len(LISTS), 6, dtype=torch.int32)
    for row, clicks in enumerate(LISTS):
        items[row, :len(clicks)] = torch.tensor(clicks)
    every = torch.arange(len(LISTS))
    return Sessions(items, every, torch.tensor([len(x) for x in LISTS]), every + 1).graphs(every)


def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -x[..., 0] * y[..., 0] + (x[..., 1:] * y[..., 1:]).sum(-1)


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.acosh((-inner(x, y)).clamp(min=1))


def exp(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    length = inner(v, v).clamp(min=0).sqrt()
    return x if length < 1e-9 else length.cosh() * x + length.sinh() * v / length


def log(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = -inner(x, y)
    return torch.zeros_like(x) if z < 1 + 1e-12 else torch.acosh(z) / (z * z - 1).sqrt() * (y - z * x)


ORIGIN = torch.eye(DIM + 1, dtype=torch.float64)[0]


def tangent(u: torch.Tensor) -> torch.Tensor:
    return F.pad(u, (1, 0))


def by_hand(model: Hcgr, points: torch.Tensor, items: list[int]) -> torch.Tensor:
    nodes = list(dict.fromkeys(items))
    edges = {(nodes.index(a), nodes.index(b)) for a, b in itertools.pairwise(items)}
    u = [log(ORIGIN, points[i])[1:] for i in nodes]
    for layer in model.graph:
        u = [layer.linear.weight @ x for x in u]
        x, after = [exp(ORIGIN, tangent(v)) for v in u], []
        for i in range(len(nodes)):
            score = {}
            for j in range(len(nodes)):
                relations = [(j, i) in edges, (i, j) in edges, i == j]
                pair = layer.query.weight @ u[i] + layer.query.bias + layer.key.weight @ u[j]
                if any(relations):
                    score[j] = sum(F.leaky_relu(p, 0.2) for p, there in zip(pair, relations) if there)
            whole = sum(s.exp() for s in score.values())
            after.append(log(ORIGIN, exp(x[i], sum(s.exp() / whole * log(x[i], x[j]) for j, s in score.items())))[1:])
        u = after
    return exp(ORIGIN, tangent(readout_by_hand(model.readout, [u[nodes.index(i)] for i in items])))


def made(layers: int = 1, **changes) -> tuple[Hcgr, EncoderWithItems]:
    torch.manual_seed(0)
    settings = types.SimpleNamespace(**{"gnn_layers": layers, "scale": 3.0, "contrast": 0.5, "margin": 0.7,
                                        "negatives": 4} | changes)
    model = EncoderWithItems(ITEMS, Hcgr(DIM, 0.0, settings))
    return model.encoder, model


@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_forward_is_its_equations(layers):
    encoder, model = made(layers)
    points = model.vectors()
    found = encoder(graphs(), points)
    torch.set_default_dtype(torch.float64)
    try:
        slow = Hcgr(DIM, 0.0, types.SimpleNamespace(gnn_layers=layers, scale=1.0, contrast=0, margin=0, negatives=1))
        slow.load_state_dict(encoder.state_dict())
        expected = torch.stack([by_hand(slow, points.double(), items) for items in LISTS])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found[:, 0], -expected[:, 0].float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:].float(), atol=1e-4, rtol=1e-4)
    assert expected.std(0).min() > 1e-3


@torch.no_grad()
def test_products_rank_as_geodesic_distances():
    encoder, model = made()
    points = model.vectors()
    session = encoder(graphs(), points)
    lorentz = torch.cat((-session[:, :1], session[:, 1:]), 1).double()
    far = distance(lorentz[:, None], points.double()[None])
    assert torch.equal((session @ points.T).argsort(1, descending=True), far.argsort(1))
    torch.testing.assert_close(far.float(), geoopt.Lorentz().dist(lorentz[:, None], points.double()[None]).float(),
                               atol=1e-4, rtol=1e-4)


def test_the_loss_is_cross_entropy_and_ranking_of_distances():
    encoder, model = made()
    session, points = model(graphs())
    target = torch.tensor([3, 1, 12, 5, 5])
    lorentz = torch.cat((-session[:, :1], session[:, 1:]), 1).double().detach()
    far = distance(lorentz[:, None], points.double().detach()[None])[:, 1:]
    torch.manual_seed(3)
    found = encoder.loss(session, points, target)
    torch.manual_seed(3)
    others = torch.randint(ITEMS, (5, 4))
    expected = 0.0
    for row, own in enumerate((target - 1).tolist()):
        expected -= float(torch.log_softmax(-3.0 * far[row], 0)[own])
        expected += 0.5 * sum(max(0.0, 0.7 + float(far[row, own] - far[row, o])) * (o != own)
                              for o in others[row].tolist()) / 4
    assert found.item() == pytest.approx(expected, rel=1e-4)
    gradient = torch.autograd.grad(found, [session, points])
    assert all(bool(g.isfinite().all()) for g in gradient)
    plain, _ = made(contrast=0.0)
    assert plain.loss(session, points, target).item() < found.item()


def test_first_points_and_texts_lie_on_the_hyperboloid_within_the_radius():
    encoder, model = made()
    assert isinstance(model.items.table.weight, geoopt.ManifoldParameter)
    raw = model.items.table.weight.detach()
    text = torch.randn(ITEMS + 1, DIM)
    text[0] = 0
    points = encoder.item_vectors(raw, text).double()
    torch.testing.assert_close(inner(points, points), -torch.ones(ITEMS + 1).double(), atol=1e-4, rtol=0)
    for item in range(1, ITEMS + 1):
        u = (log(ORIGIN, raw[item]) + tangent(text[item]))[1:]
        expected = exp(ORIGIN, tangent(u * min(1.0, RADIUS / float(u.norm()))))
        torch.testing.assert_close(points[item], expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(points[0], ORIGIN)
    far = encoder.item_vectors(raw, 100 * text)[1:]
    assert torch.allclose(distance(far.double(), ORIGIN), torch.tensor(RADIUS).double(), atol=1e-3)


def trained(folder, epochs: int, rate: float = 0.2, interrupt: bool = False) -> EncoderWithItems:
    torch.manual_seed(0)
    model = build_with_items("hcgr", 30, encoder_section(DIM, 0.1), None, users=0, max_session=4)
    settings = encoder_section(DIM, 0.1, lr=rate).training
    settings.epochs, settings.checkpoint_seconds = epochs, 0
    job = EncoderJob(model, chain(300, 1, False), chain(60, 2, False), settings, torch.float32)
    loss, steps = job.loss, []

    def stop_once(micro):
        steps.append(micro)
        if interrupt and len(steps) == 8:
            raise KeyboardInterrupt
        return loss(micro)

    job.loss = stop_once
    try:
        fit(job, settings, seed=1, resume=folder, name="hcgr")
    except KeyboardInterrupt:
        return trained(folder, epochs, rate)
    return model


def test_training_moves_along_the_hyperboloid_and_stays_on_it(tmp_path):
    model = trained(tmp_path, epochs=6, rate=0.5)  # a large rate: far from the origin and many turns
    raw = model.items.table.weight.detach()
    torch.testing.assert_close(inner(raw, raw), -torch.ones(31).double(), atol=1e-4, rtol=0)
    points = model.vectors().detach().double()
    torch.testing.assert_close(inner(points, points), -torch.ones(31).double(), atol=1e-4, rtol=0)
    assert 1.5 < distance(points[1:], ORIGIN).max() < RADIUS + 1e-3 and torch.equal(points[0], ORIGIN)


def test_a_resumed_training_ends_as_an_undisturbed_one(tmp_path):
    whole, resumed = trained(tmp_path / "a", 3), trained(tmp_path / "b", 3, interrupt=True)
    for (name, ours), theirs in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(ours, theirs), name


def test_the_first_step_follows_the_riemannian_gradient():
    _, model = made()
    point = model.items.table.weight
    (optimizer,) = [adamw({"table": point}, types.SimpleNamespace(lr=0.01, weight_decay=0.0))]
    assert isinstance(optimizer, geoopt.optim.RiemannianAdam)
    before = point.detach().clone()
    (point[3] * torch.arange(DIM + 1)).sum().backward()
    ambient = torch.arange(DIM + 1).double()
    ambient[0] = -ambient[0]
    downhill = -(ambient + inner(before[3], ambient) * before[3])
    optimizer.step()
    expected = exp(before[3], 0.01 * downhill / inner(downhill, downhill).sqrt())  # Adam's first step has length lr
    torch.testing.assert_close(point[3].detach(), expected, atol=1e-6, rtol=1e-5)
    assert math.isclose(float(distance(before[3], point[3].detach())), 0.01, rel_tol=1e-3)
    torch.testing.assert_close(point[4].detach(), before[4])


def test_points_do_not_decay():
    _, model = made()
    trained = dict(model.named_parameters())
    decays = {id(p): g["weight_decay"] for g in _groups(trained, 0.5, 0.7) for p in g["params"]}
    assert decays[id(model.items.table.weight)] == 0 and decays[id(model.encoder.readout.out.weight)] == 0.5
    with pytest.raises(UserError, match=r"encoder.training.weight_decay must be 0 for hcgr"):
        adamw(trained, types.SimpleNamespace(lr=0.1, weight_decay=0.5))
