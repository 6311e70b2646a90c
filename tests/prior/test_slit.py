"""SLIT against its closed form, formed and solved in double precision."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from histories import ITEMS, histories, project, weights
from scipy.sparse import csr_array
from tiny import FILES, encoder_section
from torch.nn import functional as F

from llmgr.encoders import pretraining
from llmgr.encoders.pretraining import EncoderJob
from llmgr.encoders.registry import build_with_items, save_with_items
from llmgr.evaluation import baselines, models
from llmgr.prior import left_out, slit, weighted_sum
from llmgr.runtime.errors import UserError
from llmgr.sessions.reading import read_sessions
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import item_texts
from llmgr.text.words import catalogue_words, word_matrix

CPU = torch.device("cpu")


def dense(clicks: list[list[int]], decay: float) -> np.ndarray:
    table = np.zeros((len(clicks), ITEMS + 1))
    for row, items in zip(table, clicks):
        for item, weight in weights(items, decay).items():
            row[item] = weight
    return table


def catalogue() -> None:
    words = ["red", "lip", "balm", "nail", "gel", "OPI"]
    pl.DataFrame({"item_id": range(1, ITEMS + 1), "title": [f"{words[i % 5]} {words[i * i % 6]}" for i in range(ITEMS)],
                  "brand": [None] * ITEMS}, schema_overrides={"brand": pl.String}).write_parquet(
        "data/core/items.parquet")


@pytest.mark.parametrize(("ridge", "decay", "share"), [(3.0, 0.7, 0.4), (3.0, 0.7, 0.0), (0.5, 1.0, 0.1),
                                                         (40.0, 0.0, 2.0)])
def test_scores_equal_the_closed_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ridge: float, decay: float,
                                      share: float) -> None:
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slit, "CLOSE", 1e-6)
    catalogue()
    train = pl.read_parquet("data/sessions/train.parquet")
    clicks = dense(train["items"].to_list(), decay)
    target = np.eye(ITEMS + 1)[train["target"].to_numpy()]
    words = word_matrix(item_texts("data/core/items.parquet", "words")).toarray()
    similarity = words @ words.T
    B = np.linalg.solve(clicks.T @ clicks + ridge * np.eye(ITEMS + 1), clicks.T @ target + ridge * share * similarity)

    def loss(at: np.ndarray) -> float:
        return ((clicks @ at - target) ** 2).sum() + ridge * ((at - share * similarity) ** 2).sum()

    step = np.random.default_rng(0).normal(size=B.shape)
    assert loss(B) < min(loss(B + 1e-3 * step), loss(B - 1e-3 * step))
    params = SimpleNamespace(data=SimpleNamespace(max_session=50), slit=SimpleNamespace(
        ridge=ridge, decay=decay))
    sessions, frame = read_sessions("data/sessions/test.parquet", 50)
    score = baselines.slit(FILES, baselines.linear_model(params, FILES, CPU), share)(sessions)
    expected = torch.from_numpy(dense(frame["items"].to_list(), decay) @ B).float()
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(score(torch.arange(len(sessions))), expected, atol=2e-5, rtol=1e-4)
    some = torch.tensor([17, 3, 25])
    torch.testing.assert_close(score(some), expected[some], atol=2e-5, rtol=1e-4)
    formed = left_out.LeftOut(read_sessions("data/sessions/train.parquet", 50)[0], ridge, decay, None, 0.0, ITEMS)
    monkeypatch.setattr(slit.Slit, "solved", None)  # the inverse that others need is used as it is
    score = baselines.slit(FILES, baselines.linear_model(params, FILES, CPU, formed), share)(sessions)
    torch.testing.assert_close(score(some), expected[some], atol=2e-5, rtol=1e-4)


def test_the_solver_meets_its_tolerance() -> None:
    draw = np.random.default_rng(1)
    clicks = csr_array((draw.random((300, 40)) < 0.2) * draw.random((300, 40)) * draw.gamma(0.3, 5, 40))
    model = slit.Slit(clicks, draw.integers(1, 40, 300), 0.5)
    asked = csr_array(np.vstack([clicks.toarray()[:20], np.zeros(40)]))
    residual = (clicks.T @ clicks + 0.5 * np.eye(40)) @ model.solved(asked).double().numpy() - asked.toarray().T
    bound = slit.CLOSE * np.linalg.norm(asked.toarray(), axis=1)
    assert (np.linalg.norm(residual, axis=0) <= 1.1 * bound + 1e-6).all()
    assert not model.solved(asked)[:, -1].any()  # no clicks, no scores


def test_a_ridge_too_small_to_solve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    model = slit.Slit(csr_array(draw.random((300, 40))), draw.integers(1, 40, 300), 1e-3)
    monkeypatch.setattr(slit, "MOST", 2)
    with pytest.raises(UserError, match=r"2 iterations: set slit\.ridge above 0\.001"):
        model.solved(csr_array(draw.random((5, 40))))


def test_held_out_targets_change_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    params = SimpleNamespace(data=SimpleNamespace(max_session=50), slit=SimpleNamespace(
        ridge=2.0, decay=0.7))
    for shift in (0, 1):
        root = tmp_path / str(shift)
        project(root, lists=[[*x[:-2], *((i + shift - 1) % ITEMS + 1 for i in x[-2:])] for x in histories()])
        monkeypatch.chdir(root)
        catalogue()
        sessions, _ = read_sessions("data/sessions/valid.parquet", 50)
        score = baselines.slit(FILES, baselines.linear_model(params, FILES, CPU), 0.1)(sessions)
        found.append(score(torch.arange(len(sessions))))
    assert found[0].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("ridge", "share"), [(3.0, 0.4), (20.0, 0.0)])
def test_what_a_user_clicked_is_left_out_of_what_scores_that_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  ridge: float, share: float) -> None:
    """Against the closed form fitted anew without the user's training prefixes, for every split."""
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    catalogue()
    train, frame = read_sessions("data/sessions/train.parquet", 50)
    words = catalogue_words(FILES.items)
    similarity = (words @ words.T).toarray()
    clicks = dense(frame["items"].to_list(), 0.7)
    target, user = np.eye(ITEMS + 1)[frame["target"].to_numpy()], frame["user"].to_numpy()
    monkeypatch.setattr(left_out, "BLOCK", 20)
    model = left_out.LeftOut(train, ridge, 0.7, words, share, ITEMS)
    for split in ("train", "test"):
        sessions, asked = read_sessions(f"data/sessions/{split}.parquet", 50)
        samples = torch.arange(len(sessions)).flip(0)
        scores, own = model(sessions, samples)
        assert own.toarray().any()
        clicks_MV = model.prepared[sessions][0]
        np.testing.assert_allclose(model._product(clicks_MV, CPU), clicks_MV @ model.matrix, atol=1e-6, rtol=1e-5)
        for row, sample in enumerate(samples.tolist()):
            kept = user != asked["user"][sample]
            S, T = clicks[kept], target[kept]
            B = np.linalg.solve(S.T @ S + ridge * np.eye(ITEMS + 1), S.T @ T + ridge * share * similarity)
            expected = dense([asked["items"][sample].to_list()], 0.7)[0] @ B
            np.testing.assert_allclose(scores[row].numpy(), expected, atol=2e-5, rtol=1e-3)
            np.testing.assert_array_equal(own.toarray()[row], target[~kept].sum(0))
    train.user[:] = 0  # nobody in particular: all were fitted
    train = train.subset(torch.arange(len(train)))
    S = clicks
    B = np.linalg.solve(S.T @ S + ridge * np.eye(ITEMS + 1), S.T @ target + ridge * share * similarity)
    np.testing.assert_allclose(model(train, torch.arange(len(train)))[0].numpy(), clicks @ B, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("larger", [1, 10])
def test_the_prior_weighs_scores_by_how_often_others_chose_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                       larger: float) -> None:
    """`larger`: in a large catalogue most entries are nearly 0, so that what is scored stands out of their mean."""
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    catalogue()
    train, frame = read_sessions("data/sessions/train.parquet", 50)
    model = left_out.LeftOut(train, 3.0, 0.7, catalogue_words(FILES.items), 0.1, ITEMS)
    count = torch.bincount(train.target, minlength=ITEMS + 1).float()
    prior = weighted_sum.Prior(model)
    prior.scale *= larger
    samples = torch.arange(len(train))

    def loss() -> float:
        with torch.no_grad():
            return F.cross_entropy(prior(train, samples)[:, 1:], train.target - 1).item()

    flat = loss()
    prior.fit(train, 5)
    best = loss()
    assert best < flat - 0.1
    F.cross_entropy(prior(train, samples)[:, 1:], train.target - 1).backward()
    prior.weight.grad /= larger
    assert max(parameter.grad.abs().max() for parameter in prior.parameters()) < 2e-3, "it is the optimum"
    for parameter in prior.parameters():
        step = 0.5 * (torch.arange(parameter.numel()) % 2 == 0).float().view_as(parameter)
        for sign in (1, -1):
            parameter.data += sign * step
            assert loss() > best - 1e-6
            parameter.data -= sign * step
    prior.fit(train, 5, 0.5)
    drawn = torch.multinomial(train.recency(0.5), weighted_sum.FITTED, replacement=True,
                              generator=torch.Generator().manual_seed(5))
    prior.zero_grad()
    F.cross_entropy(prior(train, drawn)[:, 1:], train.target[drawn] - 1).backward()
    prior.weight.grad /= larger
    assert max(parameter.grad.abs().max() for parameter in prior.parameters()) < 2e-3 and loss() > best + 1e-4
    scores, own = model(train, samples)
    found, held, scale = prior(train, samples).detach(), own.toarray(), prior.scale
    for row in (0, 7, len(train) - 1):
        for item in range(1, ITEMS + 1):
            band = sum(int(count[item]) - held[row, item] >= edge for edge in weighted_sum.BANDS)
            expected = prior.weight[band] * scores[row, item] * scale + prior.bias[band]
            expected = expected + prior.clicked * (item in frame["items"][row])
            assert found[row, item].item() == pytest.approx(expected.item(), abs=1e-3)


def test_what_cannot_be_formed_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    train, _ = read_sessions("data/sessions/train.parquet", 50)
    with pytest.raises(UserError, match=r"set slit\.ridge above -1"):
        left_out.LeftOut(train, -1.0, 0.7, None, 0.0, ITEMS)
    monkeypatch.setattr(left_out, "available", lambda: 16 * ITEMS ** 2 - 1)
    with pytest.raises(UserError, match=rf"all pairs of {ITEMS} items: it needs 0.0 GB .* tune\.linear=false"):
        left_out.LeftOut(train, 3.0, 0.7, None, 0.0, ITEMS)
    monkeypatch.setattr(left_out, "available", lambda: 2 * 16 * ITEMS ** 2)
    left_out.LeftOut(train, 3.0, 0.7, None, 0.0, ITEMS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="all pairs"):
        left_out.LeftOut(train, 3.0, 0.7, None, 0.0, ITEMS)


@pytest.mark.parametrize("base", ["gcsan", "hcgr", "fpmc"])
def test_a_control_over_the_linear_model_learns_scores_and_is_saved_with_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    catalogue()
    (train, _), (test, _) = (read_sessions(f"data/sessions/{split}.parquet", 50) for split in ("train", "test"))
    slit = SimpleNamespace(ridge=3.0, decay=0.7, text=0.1)
    section, name = encoder_section(8, 0.0), f"{base}-linear"
    torch.manual_seed(0)
    model = build_with_items(name, ITEMS, section, F.pad(torch.randn(ITEMS, 3), (0, 0, 1, 0)),
                             users=int(train.user.max()), max_session=50)
    model.offset = weighted_sum.Prior(left_out.left_out(slit, FILES, train))
    model.offset.fit(train, 1)
    job = EncoderJob(model, train, test, section.training, torch.float32)
    monkeypatch.setattr(pretraining, "CHUNK", 7)
    samples = torch.randperm(len(train))[:40]
    total, targets, _ = job.loss(samples)
    total.backward()

    def logits(sessions: Sessions, samples: torch.Tensor) -> torch.Tensor:
        session, vectors = model(sessions.graphs(samples))
        own = session @ vectors.T if base != "hcgr" else -4 * torch.acosh((-session @ vectors.T).clamp(min=1 + 1e-6))
        return own + model.offset(sessions, samples)

    with torch.no_grad():
        expected = F.cross_entropy(logits(train, samples)[:, 1:], train.target[samples] - 1, reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-4) and targets == 40
    assert model.offset.weight.grad.any() and model.items.text.weight.grad.any()
    with torch.no_grad():
        wanted = logits(test, torch.arange(len(test)))
        save_with_items(f"models/encoders/{name}", name, model)
        params = SimpleNamespace(
            slit=slit, tune=SimpleNamespace(linear=False),
            tower=SimpleNamespace(enabled=False), data=SimpleNamespace(max_session=50),
            encoder=SimpleNamespace(names=[], controls=[], control_texts=[], linear_controls=[base]))
        found = models.scorers(params, FILES, CPU)[name]()(test)(torch.arange(len(test)))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        rank = (wanted[:, 1:] >= wanted.gather(1, test.target[:, None])).sum(1)
    assert job.validate()["valid_mrr_at_20"] == pytest.approx(((rank <= 20) / rank).mean().item(), rel=1e-4)
