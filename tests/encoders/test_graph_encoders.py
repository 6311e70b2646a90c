"""SR-GNN, NISER and FPMC against their papers' equations, written out click by click."""
from __future__ import annotations

import itertools
import types

import pytest
import torch
from tiny import gated_by_hand, readout_by_hand
from torch.nn import functional as F

from llmgr.encoders.fpmc import Fpmc
from llmgr.encoders.layers import item_cross_entropy
from llmgr.encoders.niser import Niser
from llmgr.encoders.srgnn import Srgnn
from llmgr.sessions.tensors import Sessions

ITEMS, DIM, USERS = 12, 8, 3
LISTS = [[3, 5, 3, 7, 7, 2], [4], [1, 2], [9, 9, 9], [6, 1, 6, 1, 8]]
OWNERS = [1, 3, 0, 2, 2]


def graphs():
    items = torch.zeros(len(LISTS), 6, dtype=torch.int32)
    for row, clicks in enumerate(LISTS):
        items[row, :len(clicks)] = torch.tensor(clicks)
    every = torch.arange(len(LISTS))
    return Sessions(items, every, torch.tensor([len(x) for x in LISTS]), every + 1, torch.tensor(OWNERS)).graphs(every)


def settings(**values) -> types.SimpleNamespace:
    return types.SimpleNamespace(users=USERS, max_session=6, **values)


def propagated(model: torch.nn.Module, vectors: torch.Tensor, items: list[int]) -> list[torch.Tensor]:
    """The state of every click after the gated graph network."""
    nodes = list(dict.fromkeys(items))
    edges = {(nodes.index(a), nodes.index(b)) for a, b in itertools.pairwise(items)}
    h = [vectors[i] for i in nodes]
    for layer in model.graph:
        h = gated_by_hand(layer, h, edges)
    return [h[nodes.index(i)] for i in items]


@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_srgnn_is_its_equations(layers):
    torch.manual_seed(layers)
    model, vectors = Srgnn(DIM, 0.3, settings(gnn_layers=layers)).eval(), torch.randn(ITEMS + 1, DIM)
    expected = [readout_by_hand(model.readout, propagated(model, vectors, items)) for items in LISTS]
    torch.testing.assert_close(model(graphs(), vectors), torch.stack(expected), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", [True, False])
@torch.no_grad()
def test_niser_is_its_equations(positions):
    torch.manual_seed(0)
    model = Niser(DIM, 0.3, settings(gnn_layers=2, sigma=12.0, positions=positions)).eval()
    table, text = torch.randn(2, ITEMS + 1, DIM)
    table[0] = text[0] = 0
    vectors = model.item_vectors(table, text)
    for item in range(1, ITEMS + 1):
        whole = table[item] + text[item]
        torch.testing.assert_close(vectors[item], whole / whole.square().sum().sqrt())
    assert vectors[0].abs().sum() == 0
    expected = []
    for items in LISTS:
        x = propagated(model, vectors, items)
        if positions:
            x = [state + model.positions.weight[step] for step, state in enumerate(x)]
        session = readout_by_hand(model.readout, x)
        expected.append(12.0 * session / session.square().sum().sqrt())
    found = model(graphs(), vectors)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert (found @ vectors.T).abs().max() <= 12.0 + 1e-4


@torch.no_grad()
def test_niser_drops_out_items_before_it_normalises_them():
    torch.manual_seed(0)
    model = Niser(DIM, 0.5, settings(gnn_layers=1, sigma=1.0, positions=False)).train()
    seen = []
    model.graph[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(graphs(), F.normalize(torch.randn(ITEMS + 1, DIM), dim=1))
    assert len(seen[0]) == int((graphs().nodes_BN > 0).sum()) and (seen[0] == 0).any()
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(len(seen[0])))


def fpmc(dropout: float = 0.0) -> tuple[Fpmc, torch.Tensor]:
    torch.manual_seed(0)
    model = Fpmc(DIM, dropout, settings())
    return model, F.pad(torch.randn(ITEMS, 3 * DIM), (0, 0, 1, 0))


@torch.no_grad()
def test_fpmc_is_user_times_item_plus_last_times_next():
    model, factors = fpmc(dropout=0.3)
    model.eval()
    of_user, of_next, as_last = factors.split(DIM, 1)
    found = model(graphs(), factors) @ factors.T
    for row, (items, user) in enumerate(zip(LISTS, OWNERS)):
        for item in range(1, ITEMS + 1):
            expected = as_last[items[-1]] @ of_next[item] + (model.users.weight[user] @ of_user[item] if user else 0)
            torch.testing.assert_close(found[row, item], expected, atol=1e-5, rtol=1e-5)


def test_fpmcs_loss_is_the_softmax_over_all_items():
    model, factors = fpmc()
    session, target = model(graphs(), factors), torch.tensor([1, 2, 3, 4, 5])
    found = model.loss(session, factors, target)
    torch.testing.assert_close(found, item_cross_entropy(session, factors, target))
    found.backward()
    assert model.users.weight.grad[0].abs().sum() == 0, "a user that training does not know has no factor"
