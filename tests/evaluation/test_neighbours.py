"""item-kNN and session-kNN against loops over dictionaries; nothing of a held-out target reaches them."""
from __future__ import annotations

import math
import random
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from histories import ITEMS, histories, project, weights
from scipy.sparse import csr_array
from tiny import FILES

from llmgr.evaluation import baselines, neighbours
from llmgr.sessions.clicks import last_clicks
from llmgr.sessions.reading import read_sessions
from llmgr.sessions.tensors import Sessions
from llmgr.text import words

CPU = torch.device("cpu")


def training() -> list[set[int]]:
    """Training sessions of more than one click."""
    return [set(x[:-2]) for x in histories() if len(x) > 3]


def item_reference(clicks: list[int], shrinkage: float, decay: float) -> list[float]:
    held = [sum(i in s for s in training()) for i in range(ITEMS + 1)]
    scores = [0.0] * (ITEMS + 1)
    for j in range(1, ITEMS + 1):
        for i, weight in weights(clicks, decay).items():
            both = sum(i in s and j in s for s in training())
            if i != j and both:
                scores[j] += weight * both / (math.sqrt(held[i] * held[j]) + shrinkage)
    return scores


def session_reference(clicks: list[int], most: int, decay: float) -> list[float]:
    weight = weights(clicks, decay)
    found = []
    for number, s in enumerate(training()):
        shared = s & set(clicks)
        if shared and s - set(clicks):
            length = math.sqrt(sum(w * w for w in weight.values()))
            found.append((-sum(weight[i] for i in shared) / length / math.sqrt(len(s)), number, s))
    nearest = sorted(found, key=lambda f: (round(f[0], 12), f[1]))[:most]
    return [sum(-negative for negative, _, s in nearest if j in s) for j in range(ITEMS + 1)]


@pytest.mark.parametrize("window", [2, 50])
def test_the_training_matrix_holds_every_click_before_the_held_out_ones(tmp_path: Path, window: int) -> None:
    project(tmp_path, window)
    matrix = neighbours.training_matrix(pl.read_parquet(tmp_path / "data/sessions/train.parquet"), ITEMS)
    assert [set(np.flatnonzero(row).tolist()) for row in matrix.toarray()] == training()
    assert set(matrix.data.tolist()) == {1.0}


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize(("kind", "size", "decay"), [
    ("item", 0.0, 1.0), ("item", 3.0, 0.6), ("item", 3.0, 0.0),
    ("session", 4, 1.0), ("session", 3, 0.6), ("session", 99, 0.6), ("session", 5, 0.0)])
def test_scores_equal_a_loop_over_the_training_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str,
                                                        kind: str, size: float, decay: float) -> None:
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    sessions, frame = read_sessions(f"data/sessions/{split}.parquet", 50)
    assert any(len(set(x)) < len(x) for x in frame["items"].to_list())  # clicks that come back
    make, reference = ((baselines.item_knn, item_reference) if kind == "item" else
                       (baselines.session_knn, session_reference))
    score = make(FILES, size, decay, CPU)(sessions)
    whole = score(torch.arange(len(sessions)))
    assert whole.shape == (len(sessions), ITEMS + 1) and not whole[:, 0].any() and whole.any()
    for row, clicks in zip(whole.tolist(), frame["items"].to_list()):
        assert row == pytest.approx(reference(clicks, size, decay), abs=1e-6)
    some = torch.tensor([17, 3, 25])
    torch.testing.assert_close(score(some), whole[some])


def test_held_out_targets_change_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, shift in (("as they are", 0), ("others", 1)):
        lists = [[*x[:-2], *((i + shift - 1) % ITEMS + 1 for i in x[-2:])] for x in histories()]
        project(tmp_path / name, lists=lists)
        monkeypatch.chdir(tmp_path / name)
        sessions, _ = read_sessions("data/sessions/valid.parquet", 50)
        found[name] = [make(FILES, 5, 0.7, CPU)(sessions)(torch.arange(len(sessions)))
                       for make in (baselines.item_knn, baselines.session_knn)]
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b)


def test_a_session_without_neighbours_earns_nothing() -> None:
    train = csr_array(np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]], dtype=float))
    alone, own = csr_array(np.array([[0, 0, 0, 0, 1.0]])), csr_array(np.array([[0, 1.0, 1.0, 0, 0]]))
    assert neighbours.neighbours(alone, train, 5).nnz == 0
    assert neighbours.neighbours(csr_array((1, 5)), train, 5).nnz == 0
    assert neighbours.neighbours(own, train, 5).toarray()[0].tolist() == pytest.approx([0, 0.5])  # not itself
    assert not (alone @ neighbours.item_similarity(train, 1.0)).toarray().any()


def test_shrinkage_prefers_the_similarity_that_more_sessions_support() -> None:
    train = csr_array(np.array([[0, 1, 1, 0, 0], *[[0, 0, 0, 1, 1]] * 9, [0, 0, 0, 1, 0]], dtype=float))
    exact, shrunk = (neighbours.item_similarity(train, shrinkage).toarray() for shrinkage in (0.0, 5.0))
    assert (exact[1, 2], exact[3, 4]) == pytest.approx((1, 9 / math.sqrt(90)))
    assert (shrunk[1, 2], shrunk[3, 4]) == pytest.approx((1 / 6, 9 / (math.sqrt(90) + 5)))
    assert exact[1, 2] > exact[3, 4] and shrunk[1, 2] < shrunk[3, 4]
    assert not exact.diagonal().any() and (exact == exact.T).all()


def test_word_knn_is_a_decayed_sum_of_the_cosines_of_rare_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    titles = [" ".join(draw.choices(["Red", "lip", "balm", "balm,", "nail", "OPI", "gel"], k=4)) + f" no{i}"
              for i in range(ITEMS)]
    brands = [draw.choice(["OPI", "Nivea", "", None]) for _ in range(ITEMS)]
    items = pl.DataFrame({"item_id": range(1, ITEMS + 1), "title": titles, "brand": brands},
                         schema_overrides={"brand": pl.String})
    items.sample(fraction=1, shuffle=True, seed=3).write_parquet("data/core/items.parquet")
    held = [set(f"{t} {b or ''}".lower().replace(",", " ").split()) for t, b in zip(titles, brands)]
    weight = {w: math.log(ITEMS / n) for w in set().union(*held) if (n := sum(w in h for h in held)) > 1}

    def dot(a: set[str], b: set[str]) -> float:
        return sum(weight.get(w, 0) ** 2 for w in a & b)

    sessions, frame = read_sessions("data/sessions/test.parquet", 50)
    scores = baselines.word_knn(FILES, 0.7, CPU)(sessions)(torch.arange(len(sessions)))
    assert scores.shape == (len(sessions), ITEMS + 1) and not scores[:, 0].any()
    for row, clicks in zip(scores.tolist(), frame["items"].to_list()):
        for candidate in range(1, ITEMS + 1):
            expected = sum(w * dot(held[i - 1], held[candidate - 1]) / math.sqrt(
                dot(held[i - 1], held[i - 1]) * dot(held[candidate - 1], held[candidate - 1]))
                for i, w in weights(clicks, 0.7).items())
            assert row[candidate] == pytest.approx(expected, abs=1e-5)


def test_the_similarity_of_all_pairs_of_items_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    items, two = 2000, torch.arange(2)
    clicks = torch.tensor([[3, 5], [7, 0]], dtype=torch.int32)
    sessions = Sessions(clicks, two, torch.tensor([2, 1]), torch.tensor([1, 1]))
    matrix = words.word_matrix([f"word{i % 3} other{i % 7}" for i in range(items)])
    monkeypatch.setattr(baselines, "catalogue_words", lambda *_: matrix)
    tracemalloc.start()
    scores = baselines.word_knn(FILES, 0.7, CPU)(sessions)(two)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scores.shape == (2, items + 1) and scores.count_nonzero() > items
    assert peak < items * items, "a byte a pair"


def test_items_without_a_shared_word_are_like_none() -> None:
    matrix = words.word_matrix(["red lipstick", "", "red balm", "unique"])
    assert matrix.shape[0] == 5 and (matrix @ matrix.T).toarray().tolist() == pytest.approx(
        np.array([[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0] * 5, [0, 1, 0, 1, 0], [0] * 5]))


def test_the_most_similar_items_have_the_largest_products() -> None:
    generator = np.random.default_rng(3)
    dense = np.where(generator.random((700, 30)) < 0.2, generator.random((700, 30)), 0)
    dense[0] = 0
    nearest, weight = words.most_similar(neighbours.csr_array(dense), 4, 0.5)
    product = dense @ dense.T
    for item in (1, 2, 511, 512, 699):
        others = sorted((j for j in range(1, 700) if j != item), key=lambda j: -product[item, j])[:4]
        assert nearest[item].tolist() == others
        share = np.exp(product[item, others] / 0.5)
        assert weight[item].tolist() == pytest.approx(share / share.sum(), rel=1e-5)
    few, _ = words.most_similar(neighbours.csr_array(dense[:4]), 10, 0.5)
    assert [sorted(row) for row in few.tolist()[1:]] == [[2, 3], [1, 3], [1, 2]]


def test_a_repeated_click_counts_by_its_last() -> None:
    from tiny import LISTS, prefixes

    sessions = prefixes()
    chosen = torch.tensor(random.Random(0).sample(range(len(sessions)), 10))
    found = last_clicks(sessions.graphs(chosen), 0.5, 12).toarray()
    for row, sample in zip(found, chosen.tolist()):
        clicks = LISTS[int(sessions.row[sample])][:int(sessions.length[sample])]
        assert {i: w for i, w in enumerate(row.tolist()) if w} == weights(clicks, 0.5)
