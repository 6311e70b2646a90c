"""Ranks and metrics against slow definitions; what ties, padding, seen items and broken scores must do."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmgr.ranking import metrics
from llmgr.reporting import significance
from llmgr.runtime.errors import UserError


def slow_rank(scores: list[float], target: int, seen: list[int]) -> int:
    out = set(seen) - {target}
    return 1 + sum(
        scores[item] >= scores[target] for item in range(1, len(scores)) if item != target and item not in out
    )


@pytest.mark.parametrize("levels", [3, 10_000])
def test_ranks_equal_the_slow_definition(levels: int) -> None:
    torch.manual_seed(levels)
    scores = torch.randint(levels, (40, 31)).float()
    targets = torch.randint(1, 31, (40,))
    seen = torch.randint(0, 31, (40, 12))  # with repetitions, padding, and now and then the target
    assert (seen == targets[:, None]).any()
    expected = [slow_rank(row, t, []) for row, t in zip(scores.tolist(), targets.tolist())]
    without = [slow_rank(row, t, s) for row, t, s in zip(scores.tolist(), targets.tolist(), seen.tolist())]
    kept, unseen = metrics.ranks_both(scores, targets, seen)
    assert kept.tolist() == metrics.ranks(scores, targets).tolist() == expected
    assert unseen.tolist() == metrics.ranks(scores, targets, exclude=seen).tolist() == without
    assert without != expected


def test_a_constant_scorer_is_ranked_last_and_padding_never_counts() -> None:
    scores = torch.zeros(2, 8)
    assert metrics.ranks(scores, torch.tensor([1, 7])).tolist() == [7, 7]
    scores[:, 0] = 9.0
    scores[0, 1] = 1.0
    assert metrics.ranks(scores, torch.tensor([1, 7])).tolist() == [1, 7]


def test_ranks_do_not_depend_on_batching_or_on_the_numbering_of_items() -> None:
    torch.manual_seed(0)
    scores, targets, seen = torch.randn(12, 40), torch.randint(1, 40, (12,)), torch.randint(0, 40, (12, 5))
    whole = metrics.ranks_both(scores, targets, seen)
    parts = [metrics.ranks_both(scores[i:i + 5], targets[i:i + 5], seen[i:i + 5]) for i in range(0, 12, 5)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts)))
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(39)])
    place = order.argsort()
    moved = metrics.ranks_both(scores[:, order], place[targets], place[seen])
    assert all(torch.equal(a, b) for a, b in zip(whole, moved))


def test_infinite_scores_rank_and_nan_is_refused() -> None:
    scores = torch.tensor([[0.0, math.inf, -math.inf, 1.0, -math.inf]])
    assert metrics.ranks(scores, torch.tensor([3])).item() == 2
    assert metrics.ranks(scores, torch.tensor([4])).item() == 4
    scores[0, 2] = math.nan
    with pytest.raises(UserError, match=r"diverged; lower .* a control's encoder\.text_lr"):
        metrics.ranks(scores, torch.tensor([3]))
    with pytest.raises(ValueError, match="padding"):
        metrics.ranks(torch.zeros(1, 4), torch.tensor([0]))


def test_metrics_equal_their_definitions() -> None:
    ranks = [1, 3, 5, 6, 20, 21, 4000]
    found = metrics.metrics(ranks)
    for k in (5, 10, 20):
        assert found[f"hr_at_{k}"] == pytest.approx(sum(r <= k for r in ranks) / 7)
        assert found[f"ndcg_at_{k}"] == pytest.approx(sum(1 / math.log2(r + 1) for r in ranks if r <= k) / 7)
        assert found[f"mrr_at_{k}"] == pytest.approx(sum(1 / r for r in ranks if r <= k) / 7)
    assert list(found) == metrics.names()
    assert metrics.metrics(torch.tensor(ranks, dtype=torch.int32)) == found


def drawn(seed: int, sessions: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).geometric(0.02, sessions)


def test_bootstrap_equals_resampling_the_sessions() -> None:
    ranks = {"a": drawn(1), "b": drawn(2)}
    means = significance.bootstrap(ranks, 100, seed=7)
    random = np.random.default_rng(7)
    sample = np.concatenate([random.integers(400, size=(size, 400), dtype=np.int32) for size in (64, 36)])
    for model, rank in ranks.items():
        for number in range(100):
            assert means[model][number] == pytest.approx(list(metrics.metrics(rank[sample[number]]).values()))
    assert not np.array_equal(means["a"], significance.bootstrap(ranks, 100, seed=8)["a"])
    assert means["a"] == pytest.approx(significance.bootstrap({"a": ranks["a"]}, 100, seed=7)["a"])


def test_intervals_agree_with_the_normal_approximation() -> None:
    rank = drawn(3, 4000)
    rate = (rank <= 20).mean()
    low, high = significance.intervals(significance.bootstrap({"a": rank}, 2000, seed=1)["a"])["hr_at_20"]
    width = 1.96 * math.sqrt(rate * (1 - rate) / len(rank))
    assert low == pytest.approx(rate - width, abs=width / 8)
    assert high == pytest.approx(rate + width, abs=width / 8)


def test_paired_intervals_are_narrower_than_separate_ones() -> None:
    rank = drawn(4, 2000)
    better = np.where(drawn(5, 2000) < 20, np.maximum(rank - 4, 1), rank)
    resampled = significance.bootstrap({"base": rank, "better": better}, 1000, seed=1)
    ours, theirs = metrics.metrics(better), metrics.metrics(rank)
    gain = significance.paired(ours, theirs, resampled["better"], resampled["base"])["ndcg_at_20"]
    assert gain["low"] < gain["difference"] < gain["high"]
    assert gain["low"] > 0
    assert gain["difference"] == pytest.approx(ours["ndcg_at_20"] - theirs["ndcg_at_20"])
    assert gain["relative"] == pytest.approx(gain["difference"] / theirs["ndcg_at_20"])
    low, high = significance.intervals(resampled["base"])["ndcg_at_20"]
    assert gain["high"] - gain["low"] < (high - low) / 2
    same = significance.paired(theirs, theirs, resampled["base"], resampled["base"])["hr_at_20"]
    assert same == {"difference": 0, "low": 0, "high": 0, "relative": 0, "p": 1}


def test_a_difference_from_nothing_has_no_relative_figure() -> None:
    nothing, some = np.full(50, 999), np.full(50, 2)
    resampled = significance.bootstrap({"a": some, "b": nothing}, 100, seed=1)
    whole = metrics.metrics(some), metrics.metrics(nothing)
    gain = significance.paired(*whole, resampled["a"], resampled["b"])["hr_at_5"]
    assert gain == {"difference": 1, "low": 1, "high": 1, "p": pytest.approx(2 / 101)}


def test_holm_equals_a_worked_example() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; the last may not fall below 0.06
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert significance.holm([0.7, 0.6, 0.9]) == [1, 1, 1]
    assert significance.holm([0.3]) == [0.3] and significance.holm([]) == []


def test_p_counts_the_resamples_on_the_rarer_side() -> None:
    random = np.random.default_rng(0)
    shifted = random.permutation(np.linspace(-0.1, 0.9, 999))  # 100 of 999 are below 0
    columns = np.stack([shifted, -shifted, np.zeros(999), np.full(999, 0.2), np.full(999, 1e-17)], 1)
    low = int((shifted < 0).sum())
    expected = [2 * (1 + low) / 1000, 2 * (1 + low) / 1000, 1, 0.002, 1]
    assert significance.p_values(columns).tolist() == pytest.approx(expected)
    assert significance.least_p(999) == 0.002


def test_p_and_interval_agree_on_zero() -> None:
    random, seen = np.random.default_rng(5), set()
    for shift in np.linspace(-0.3, 0.3, 61):
        resampled = random.normal(shift, 0.1, (2000, 9))
        for (low, high), p in zip(significance.intervals(resampled).values(), significance.p_values(resampled)):
            if abs(p - 0.05) > 0.003:
                assert (p < 0.05) == (low > 0 or high < 0)
                seen.add(p < 0.05)
    assert seen == {True, False}


def test_p_is_uniform_where_two_models_are_equally_good() -> None:
    random, found, sessions = np.random.default_rng(11), [], 200
    for trial in range(200):
        easy = random.random(sessions) < 0.5  # what makes the pairing count
        ranks = {m: np.where(easy, random.geometric(0.1, sessions), random.geometric(0.01, sessions)) for m in "ab"}
        resampled = significance.bootstrap(ranks, 199, seed=trial)
        found.append(significance.p_values(resampled["a"] - resampled["b"])[metrics.names().index("ndcg_at_20")])
    levels = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9])
    shares = (np.array(found)[:, None] <= levels).mean(0)
    assert np.abs(shares - levels).max() < 0.08  # 200 draws: a standard error is at most 0.035
    assert 0.02 <= shares[0] <= 0.09
