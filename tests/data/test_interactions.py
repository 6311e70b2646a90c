from __future__ import annotations

import itertools
import random

import polars as pl
import pytest

from llmgr.data import interactions

SCHEMA = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "rating": pl.Float32, "line": pl.Int64}


def reviews(rows: list[tuple[str, str, int]]) -> pl.DataFrame:
    return pl.DataFrame([(*row, None, line) for line, row in enumerate(rows)], schema=SCHEMA, orient="row")


def drawn(seed: int, users: int = 30, items: int = 25, count: int = 260) -> pl.DataFrame:
    rng = random.Random(seed)
    return reviews([(f"u{rng.randrange(users)}", f"i{int(items * rng.random() ** 2)}", rng.randrange(12) * 86400)
                         for _ in range(count)])


@pytest.mark.parametrize("core", [1, 2, 5, 8])
def test_core_is_the_largest_subset_with_that_many_of_each(core):
    frame = interactions.without_duplicates(drawn(core), "first")
    rows = list(frame.select("user", "item").iter_rows())
    rounds = 0
    while True:  # one pass after the other by plain counting
        users, items = [u for u, _ in rows], [i for _, i in rows]
        kept = [(u, i) for u, i in rows if users.count(u) >= core and items.count(i) >= core]
        if len(kept) == len(rows):
            break
        rows, rounds = kept, rounds + 1
    result, took = interactions.k_core(frame, core)
    assert list(result.select("user", "item").iter_rows()) == rows
    assert took == rounds


def test_a_chain_needs_a_round_for_every_link():
    rows = [(f"u{i}", f"i{j}", 0) for i in range(6) for j in (i, i + 1)]
    kept, rounds = interactions.k_core(reviews(rows), 2)
    assert kept.is_empty()
    assert rounds > 2, "one pass is not a fixed point"


def test_duplicates_policies():
    frame = reviews([("u", "a", 30), ("u", "a", 10), ("u", "b", 20), ("v", "a", 5)])
    kept = {keep: list(interactions.without_duplicates(frame, keep).select("user", "item", "timestamp").iter_rows())
            for keep in ("first", "last", "keep")}
    assert kept["first"] == [("u", "a", 10), ("u", "b", 20), ("v", "a", 5)]
    assert kept["last"] == [("u", "b", 20), ("u", "a", 30), ("v", "a", 5)]
    assert kept["keep"] == [("u", "a", 10), ("u", "b", 20), ("u", "a", 30), ("v", "a", 5)]


def split_by_hand(order: dict[str, list[int]], window: int, selection: bool) -> dict[str, list[tuple]]:
    parts: dict[str, list[tuple]] = {"train": [], "valid": [], "test": []}
    for user, items in sorted(order.items()):
        training = items[:-2] if len(items) >= 3 else items
        last = len(training) - (selection and len(items) >= 3)
        parts["train"] += [(user, training[max(0, t - window):t], training[t]) for t in range(1, last)]
        for name, at in (("valid", len(items) - 2), ("test", len(items) - 1)):
            if len(items) >= 3:
                start = max(0, at - window)
                parts[name].append((user, items[start:at], items[at], items[:start]))
    return parts


@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("selection", [False, True])
def test_leave_one_out_equals_the_split_by_hand(window, selection):
    rng = random.Random(window)
    lengths = {f"u{i:02d}": rng.choice([1, 2, 3, 4, 9, 20]) for i in range(40)} | {"one": 1, "two": 2, "three": 3}
    order = {user: [rng.randrange(1, 50) for _ in range(n)] for user, n in sorted(lengths.items())}
    rows = pl.DataFrame([(u, i) for u, items in order.items() for i in items],
                        schema={"user": pl.String, "item_id": pl.Int32}, orient="row")
    parts = interactions.leave_one_out(rows, window, selection)
    expected = split_by_hand(order, window, selection)
    for name, part in parts.items():
        assert list(part.iter_rows()) == expected[name]
    assert parts["train"].schema == {"user": pl.String, "items": pl.List(pl.Int32), "target": pl.Int32}
    assert parts["test"].schema == parts["train"].schema | {"earlier": pl.List(pl.Int32)}


def test_no_target_of_validation_or_test_is_reachable_in_training():
    frame = interactions.ordered(interactions.without_duplicates(drawn(3), "first"), "hash", 1)
    ids = {item: n + 1 for n, item in enumerate(sorted(set(frame["item"])))}
    rows = frame.with_columns(item_id=pl.col("item").replace_strict(ids, return_dtype=pl.Int32))
    parts = interactions.leave_one_out(rows, 50)
    seen: dict[str, set[int]] = {}
    for user, items, target in parts["train"].iter_rows():
        seen.setdefault(user, set()).update([*items, target])
    held = 0
    for name in ("valid", "test"):
        for user, _, target, _ in parts[name].iter_rows():
            held += 1
            assert target not in seen.get(user, set())
    assert held > 20


def order_of(frame: pl.DataFrame, **options) -> list[tuple[str, str]]:
    return list(interactions.ordered(frame, **options).select("user", "item").iter_rows())


def test_order_within_a_day_ignores_the_file_and_follows_the_seed():
    rows = [(f"u{u}", f"i{i:03d}", day) for u in range(20) for day in range(3) for i in range(day * 8, day * 8 + 8)]
    shuffled = random.Random(0).sample(rows, len(rows))
    first = order_of(reviews(rows), ties="hash", seed=7)
    assert first == order_of(reviews(shuffled), ties="hash", seed=7)
    assert first != order_of(reviews(rows), ties="hash", seed=8)
    by_file = [(user, item) for user, item, _ in sorted(rows, key=lambda row: (row[0], row[2]))]
    assert order_of(reviews(rows), ties="file", seed=7) == by_file
    assert order_of(reviews(shuffled), ties="file", seed=7) != first
    days = {item: day for _, item, day in rows}
    for user in {u for u, _ in first}:
        assert [days[i] for u, i in first if u == user] == sorted([*range(3)] * 8), "time still comes before the hash"


def test_order_within_a_day_tells_nothing_of_item_ids():
    rows = [(f"u{u}", f"i{i:03d}", 0) for u in range(200) for i in range(10)]  # the file lists a day by item id
    order = order_of(reviews(rows), ties="hash", seed=2026)
    rising = sum(a[1] < b[1] for a, b in itertools.pairwise(order) if a[0] == b[0]) / (200 * 9)
    assert abs(rising - 0.5) < 0.05
    last = [order[at][1] for at in range(9, len(order), 10)]
    assert max(last.count(item) for item in set(last)) < 40, "no item is last for more users than chance has it"


def test_the_hash_is_the_same_on_every_machine():
    order = order_of(reviews([("u", item, 0) for item in "abcdef"]), ties="hash", seed=1)
    assert "".join(item for _, item in order) == "ebfcda"

