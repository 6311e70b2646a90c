"""The gate: its optimum against scipy's, what bands buy, what is masked, and that halves do not see each other."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from llmgr.evaluation import gate
from llmgr.evaluation.gate import RIDGE, Gate, bands, cross_fitted, draw, fit_gate, score_tables
from llmgr.ranking.metrics import metrics, ranks
from llmgr.runtime.errors import UserError
from llmgr.sessions.tensors import Sessions

ITEMS, SESSIONS, EDGES = 40, 300, [1, 5]


def made(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two scorers, targets, seen items and bands: the first knows the often trained items, the second the others."""
    torch.manual_seed(seed)
    trained = torch.tensor([0] + [0, 2, 3, 9] * (ITEMS // 4))
    band = bands(trained, EDGES)
    truth = 2 * torch.randn(SESSIONS, ITEMS + 1)
    truth[:, 0] = float("-inf")
    target = torch.distributions.Categorical(logits=truth).sample()
    truth[:, 0] = 0
    noise = torch.randn(2, SESSIONS, ITEMS + 1)
    warm = band == 2
    scores = [torch.where(warm, truth, noise[0]), 3 * torch.where(warm, noise[1], truth)]
    seen = torch.randint(0, ITEMS + 1, (SESSIONS, 4))
    return scores, target, seen, band


@pytest.mark.parametrize("coarse", [False, True])
def test_the_fit_ends_at_the_optimum_that_scipy_finds(coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, target, seen, band = made()
    if coarse:
        monkeypatch.setattr(gate, "MANY", 100)
        monkeypatch.setattr(gate, "CACHED", 7 * (ITEMS + 1))
    fitted = fit_gate(["a", "b"], scores, target, seen, band, EDGES)
    spread = torch.tensor([float(t[:gate.CHUNK, 1:].std()) for t in scores]).double()
    x = torch.stack([*(t.double() / s for t, s in zip(scores, spread)), torch.ones_like(scores[0]).double()])
    hidden = torch.zeros(SESSIONS, ITEMS + 1, dtype=torch.bool).scatter_(1, seen, True)
    hidden.scatter_(1, target[:, None], False)[:, 0] = True

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.from_numpy(flat).view(3, 3).requires_grad_()
        z = torch.einsum("msv,mv->sv", x, theta[:, band]).masked_fill(hidden, float("-inf"))
        total = F.cross_entropy(z, target) + RIDGE / 2 * theta.square().sum()
        total.backward()
        return total.item(), theta.grad.flatten().numpy()

    best = minimize(objective, np.zeros(9), jac=True, method="BFGS", options={"gtol": 1e-7})
    reached, gradient = objective(torch.cat((fitted.weight * spread[:, None], fitted.bias[None])).flatten().numpy())
    assert reached < best.fun + 1e-6 and abs(gradient).max() < 1e-4


def test_sums_formed_in_parts_are_the_same_and_the_tables_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, *data = made()
    before = [table.clone() for table in scores]
    whole = fit_gate(["a", "b"], scores, *data, EDGES)
    monkeypatch.setattr(gate, "CACHED", 7 * (ITEMS + 1))
    divided = fit_gate(["a", "b"], scores, *data, EDGES, Gate(["a", "b"], EDGES, torch.rand(2, 3), torch.rand(3)))
    torch.testing.assert_close(divided.weight, whole.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(divided.bias, whole.bias, atol=2e-3, rtol=1e-3)
    assert all(map(torch.equal, before, scores))


def test_it_trusts_each_scorer_where_it_knows_and_beats_both():
    scores, target, seen, band = made()
    gate = fit_gate(["a", "b"], scores, target, seen, band, EDGES)
    assert gate.weight[0, 2] > 0.7 and (gate.weight[0, :2].abs() < 0.3).all()
    assert gate.weight[1, 2].abs() < 0.15 and (gate.weight[1, :2] > 0.2).all()
    fresh, target, _, _ = made(1)
    found = [metrics(ranks(s, target))["hr_at_5"] for s in (*fresh, gate(fresh, band))]
    assert found[2] > max(found[:2]) + 0.1


def test_seen_items_take_no_part_unless_repeats_are_learned():
    scores, target, seen, band = made()
    mask = torch.zeros(SESSIONS, ITEMS + 1, dtype=torch.bool).scatter_(1, seen, True)
    mask.scatter_(1, target[:, None], False)
    mask[:, 0] = False
    twice = scores[0].masked_scatter(mask, scores[0][mask].flip(0))  # other scores for seen items, of the same spread
    plain, again = (fit_gate(["a"], [t], target, seen, band, EDGES) for t in (scores[0], twice))
    torch.testing.assert_close(plain.weight, again.weight, atol=1e-3, rtol=1e-3)
    learned = fit_gate(["a", "repeat"], [scores[0], mask.float()], target, seen, band, EDGES)
    assert (learned.weight[1] < -2).all(), "no target here was seen"
    masked = fit_gate(["a", "other"], [scores[0], mask.float()], target, seen, band, EDGES)
    assert masked.weight[1].abs().max() < 1e-3


def test_cross_fitting_scores_each_half_with_the_other_halfs_gate():
    scores, target, seen, band = made()
    half = torch.zeros(SESSIONS, dtype=torch.bool)
    half[draw(SESSIONS, SESSIONS // 2, 7)] = True
    torn = [torch.where(half[:, None], scores[0], -scores[0])]  # what one half learns is wrong for the other
    honest = cross_fitted(["a"], [scores[0]], target, seen, band, EDGES, 7)
    fooled = cross_fitted(["a"], torn, target, seen, band, EDGES, 7)
    assert fooled["valid"]["hr_at_5"] < 0.5 * honest["valid"]["hr_at_5"]
    assert honest["valid_unseen"]["hr_at_5"] > honest["valid"]["hr_at_5"]


def test_a_single_session_cannot_be_halved_and_two_can() -> None:
    scores, target, seen, band = made()
    for sessions in (1, 2):
        data = [scores[0][:sessions]], target[:sessions], seen[:sessions], band, EDGES, 7
        if sessions == 2:
            assert 0 <= cross_fitted(["a"], *data)["valid"]["mrr_at_20"] <= 1
            continue
        with pytest.raises(UserError, match=r"session cannot be halved .*: lower filter\.core"):
            cross_fitted(["a"], *data)


def test_a_gate_comes_back_and_only_for_what_it_fuses(tmp_path):
    gate = Gate(["a", "b"], EDGES, torch.randn(2, 3), torch.randn(3))
    gate.save(tmp_path / "g.json")
    scores, _, _, band = made()
    torch.testing.assert_close(Gate.load(tmp_path / "g.json", ["a", "b"], EDGES)(scores, band), gate(scores, band),
                               atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="fuses other scorers or bands than the gate section asks for"):
        Gate.load(tmp_path / "g.json", ["a", "c"], EDGES)


def test_a_scorer_that_says_nothing_is_named():
    scores, target, seen, band = made()
    with pytest.raises(UserError, match=r"gate.fuse: flat scores all items alike"):
        fit_gate(["a", "flat"], [scores[0], torch.ones_like(scores[0])], target, seen, band, EDGES)


def test_bands_begin_at_their_edges():
    assert bands(torch.tensor([0, 1, 4, 5, 99]), EDGES).tolist() == [0, 1, 1, 2, 2]


def test_a_row_of_a_score_table_is_its_sessions_own() -> None:
    length = torch.tensor([3, 1, 5, 2, 1, 4, 2])
    items = torch.where(torch.arange(5) < length[:, None], torch.arange(1, 36).view(7, 5), 0).int()
    sessions = Sessions(items, torch.arange(7), length, torch.ones(7, dtype=torch.long))

    def make() -> Callable[[Sessions], Callable[[torch.Tensor], torch.Tensor]]:
        return lambda given: lambda samples: given.items[given.row[samples], :1] + torch.arange(ITEMS + 1)

    def large() -> Callable[[Sessions], Callable[[torch.Tensor], torch.Tensor]]:
        return lambda given: lambda samples: 1024.0 * make()(given)(samples)

    tables, seconds = score_tables({"first click": make, "large": large}, sessions, 3)
    assert torch.equal(tables["first click"], (items[:, :1] + torch.arange(ITEMS + 1)).half())
    assert list(seconds) == ["first click", "large"]
    assert torch.equal(tables["large"], 1024.0 * (items[:, :1] + torch.arange(ITEMS + 1))), "half ends at 65504"
