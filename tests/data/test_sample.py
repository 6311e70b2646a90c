from __future__ import annotations

import gzip
import json
import re
import time
from collections import Counter

import numpy as np
import pytest

from llmgr.data import amazon, cleaning, interactions, sample


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """The default sample after reading, 5-core and split: items (sorted), their texts, counts, and test sessions."""
    folder = tmp_path_factory.mktemp("sample")
    for role, content in sample.generate(1800, 700, 2026).items():
        (folder / f"{role}.json.gz").write_bytes(content)
    raw, reviews = amazon.read_reviews(folder / "reviews.json.gz", "2018", 0.01)
    core, rounds = interactions.k_core(interactions.without_duplicates(raw, "first"), 5)
    metadata, meta = amazon.read_metadata(folder / "meta.json.gz", "2018", set(core["item"]), 0.01)
    items = sorted(set(core["item"]))
    counts = Counter(core["item"])
    order: dict[str, list[int]] = {}
    for user, item in interactions.ordered(core, "hash", 1).select("user", "item").iter_rows():
        order.setdefault(user, []).append(items.index(item))
    return {"raw": raw, "core": core, "rounds": rounds, "reviews": reviews, "meta": meta, "metadata": metadata,
            "texts": cleaning.item_texts(items, metadata, 8, 600), "counts": np.array([counts[i] for i in items]),
            "order": order}


def test_same_seed_same_bytes():
    first = sample.generate(120, 80, 1)
    assert first == sample.generate(120, 80, 1)
    assert first != sample.generate(120, 80, 2)


@pytest.mark.parametrize(("users", "items"), [(1, 1), (3, 50), (40, 4)])
def test_small_sizes_are_whole(users, items):
    files = sample.generate(users, items, 5)
    lines = gzip.decompress(files["reviews"]).splitlines()
    assert lines and all(json.loads(line)["unixReviewTime"] % 86400 == 0 for line in lines)


def test_generation_is_quick():
    start = time.process_time()
    sample.generate(1800, 700, 3)
    assert time.process_time() - start < 4


def test_lines_have_the_fields_of_the_2018_release():
    files = {role: gzip.decompress(content).splitlines() for role, content in sample.generate(200, 100, 1).items()}
    review, item = (json.loads(files[role][0]) for role in ("reviews", "meta"))
    assert review.keys() >= {"overall", "verified", "reviewTime", "reviewerID", "asin", "unixReviewTime", "summary"}
    assert item.keys() == {"category", "description", "title", "brand", "asin"}
    assert isinstance(item["category"], list) and isinstance(item["description"], list)


def test_size_and_long_tail_after_the_core(shop):
    counts, users = shop["counts"], len(shop["order"])
    assert users >= 1500 and len(counts) >= 450
    assert ((counts >= 5) & (counts <= 10)).mean() >= 0.3, "cold items"
    assert (counts >= 50).mean() > 0.05, "warm items"
    assert counts[np.argsort(-counts)][: len(counts) // 10].sum() > 0.3 * counts.sum(), "a long tail"
    assert 7 <= shop["core"].height / users <= 9
    assert shop["rounds"] >= 2, "the core is a fixed point, not one pass"


def test_dirt_is_there_and_within_bounds(shop):
    assert 0 < shop["reviews"]["malformed"] < 0.005 * shop["reviews"]["lines"]
    assert len(shop["reviews"]["malformed_by_reason"]) >= 3
    assert 0 < shop["meta"]["malformed"] < 0.01 * shop["meta"]["lines"]
    assert shop["meta"]["titles_missing_or_no_text"] > 0
    assert shop["raw"].height > interactions.without_duplicates(shop["raw"], "first").height, "duplicates"
    assert any(not row["text"] for row in shop["texts"]), "items without text"
    assert len(shop["metadata"]) < len(shop["texts"]), "items without metadata"
    assert 0.2 < shop["core"].select(interactions.tied().mean()).item() < 0.7, "ties"
    dirty = " ".join(" ".join(row["description"]) + row["title"] for row in shop["metadata"].values())
    for sign in ("<p>", "&nbsp;", "amp;quot;", "An Amazon Brand.", "http://", *sample.TEMPLATES):
        assert sign in dirty
        assert not any(sign in row["text"] for row in shop["texts"])


def test_text_predicts_cold_items_where_popularity_cannot(shop):
    """Cosine of TF-IDF texts to the last item against popularity, full ranking, ties count against the model."""
    words = [re.findall(r"\w+", row["text"].lower()) for row in shop["texts"]]
    frequency = Counter(word for item in words for word in set(item))
    column = {word: n for n, word in enumerate(frequency)}
    vectors = np.zeros((len(words), len(column)))
    for row, item in enumerate(words):
        for word in item:
            vectors[row, column[word]] += np.log(len(words) / frequency[word])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
    last, target = np.array([(items[-2], items[-1]) for items in shop["order"].values()]).T

    def hits(scores: np.ndarray, chosen: np.ndarray) -> float:
        ranks = (scores >= scores[np.arange(len(target)), target][:, None]).sum(axis=1)
        return (ranks[chosen] <= 20).mean()

    counts = shop["counts"]
    cold, by_text, by_count = counts[target] <= 10, (vectors @ vectors.T)[last], np.tile(counts, (len(target), 1))
    chance = 20 / len(counts)
    shuffled = by_text[:, np.random.default_rng(0).permutation(len(counts))]
    assert hits(by_count, cold) == 0
    assert hits(by_text, cold) > 3 * chance
    assert hits(shuffled, cold) < 2 * chance, "it is the text that tells"
    assert hits(by_count, ~cold) > hits(by_count, cold)
