"""Items that come, change and go in a package without training."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from machine import stage
from tiny import ITEMS, LISTS, ROOT
from tiny_package import IDS, TEXTS, graphs, package, readable_package

from llmgr.runtime.errors import UserError
from llmgr.serving.new_items import sparse, unit_words
from llmgr.serving.package import Package, load_package, write_package
from llmgr.serving.recommender import Recommender
from llmgr.serving.scoring import Scorer
from llmgr.text.words import word_matrix


@pytest.fixture(scope="module")
def readable() -> Package:
    return readable_package()


NEW = pl.DataFrame({"item": ["N1", "N2"], "title": ["red rose cream", "blue oat soap"]})


def test_a_text_is_read_as_the_tower_reads_it(readable: Package) -> None:
    copy = pl.DataFrame({"item": ["copy"], "title": [TEXTS[4]]})
    added = Recommender(readable).add_items(copy).package
    assert torch.allclose(added.tensors["tower"][-1], readable.tensors["tower"][5], atol=1e-5)


def test_new_items_leave_the_scores_of_all_others(readable: Package) -> None:
    added = Recommender(readable).add_items(NEW)
    before, after = Scorer(readable)(graphs(LISTS)), added.scorer(graphs(LISTS))
    assert torch.allclose(after[:, :ITEMS + 1], before, atol=1e-5) and after.shape[1] == ITEMS + 3
    assert added.ids[-2:] == ["N1", "N2"] and added.package.items["count"][-2:].to_list() == [0, 0]


def test_a_new_item_is_recommended_by_its_text_and_its_clicks_count(readable: Package) -> None:
    added = Recommender(readable).add_items(NEW)
    row = added.recommend([["N2"]], k=ITEMS + 2, explain=True).row(0, named=True)
    assert not row["popular"] and set(row["items"]) == {*IDS, "N1"}
    near, far = IDS[TEXTS.index("blue oat soap")], IDS[TEXTS.index("red rose soap")]
    for part in ("text", "transitions"):
        weights = added.scorer.weights["tower_weight" if part == "text" else "weight"][added.scorer.band_V]
        score = {item: row[part][row["items"].index(item)] / weights[added.number[item]].item() for item in (near, far)}
        assert score[near] > score[far], part


def test_the_row_of_a_new_item_is_its_similarity_and_its_column_what_a_click_adds(readable: Package) -> None:
    added = Recommender(readable).add_items(NEW).package
    matrix = sparse(added, "transitions").toarray()
    known = readable.tensors["words.share"].numpy()
    own = unit_words(["", *TEXTS, *NEW["title"]], bytes(readable.tensors["words.known"].numpy()).decode().split("\n"),
                     readable.tensors["words.idf"].numpy())
    similarity = (own @ own.T).toarray()
    assert np.allclose(matrix[1:ITEMS + 1, ITEMS + 2], similarity[1:ITEMS + 1, ITEMS + 2] * known[1:], atol=1e-6)
    strongest = np.sort(similarity[ITEMS + 2, :ITEMS + 1])[-6:] * known.max()
    assert np.allclose(np.sort(matrix[ITEMS + 2, :ITEMS + 1])[-6:], strongest, atol=1e-6)
    assert np.count_nonzero(matrix[ITEMS + 2, :ITEMS + 1]) <= 7


def test_words_are_weighed_as_the_linear_model_weighs_them(readable: Package) -> None:
    words = sparse(readable, "words")
    assert np.allclose((words @ words.T).toarray(), (word_matrix(TEXTS) @ word_matrix(TEXTS).T).toarray(), atol=1e-6)


def test_adding_twice_is_adding_together(readable: Package) -> None:
    once = Recommender(readable).add_items(NEW)
    twice = Recommender(readable).add_items(NEW[:1]).add_items(NEW[1:])
    assert torch.allclose(once.scorer(graphs(LISTS)), twice.scorer(graphs(LISTS)), atol=1e-5)


def test_a_changed_text_is_read_anew_alone(readable: Package) -> None:
    changed = pl.DataFrame({"item": ["B0003"], "title": ["pale mint"], "text": ["pale mint cream"]})
    after = Recommender(readable).add_items(changed).package
    others = [n for n in range(ITEMS + 1) if n != 3]
    for name in ("tower", "base", "student.table"):
        assert torch.equal(after.tensors[name][others], readable.tensors[name][others]), name
        assert not torch.allclose(after.tensors[name][3], readable.tensors[name][3]), name
    assert after.items["title"][2] == "pale mint" and after.items.height == ITEMS
    untitled = Recommender(after).add_items(changed.with_columns(title=pl.lit(None, pl.String))).package
    assert untitled.items.equals(after.items), "a title stays where none is given"
    again = Recommender(after).add_items(pl.DataFrame({"item": ["B0003"], "title": [TEXTS[2]]})).package
    assert torch.allclose(again.tensors["base"], readable.tensors["base"], atol=1e-4)


def test_items_that_are_gone_are_unknown_and_blocked_ones_only_hidden(readable: Package) -> None:
    recommender = Recommender(readable)
    gone, hidden = recommender.remove_items(["B0004", "B0005"]), recommender.block_items(["B0004"])
    everything = gone.recommend([["B0001", "B0004"]], k=ITEMS).row(0, named=True)
    assert everything["unknown"] == ["B0004"] and not {"B0004", "B0005", ""} & {*everything["items"]}
    scores = hidden.recommend([["B0001", "B0004"]], k=ITEMS).row(0, named=True)
    expected = recommender.recommend([["B0001", "B0004"]], k=ITEMS).row(0, named=True)
    assert scores["unknown"] == [] and scores["items"] == [i for i in expected["items"] if i != "B0004"]
    assert "B0004" not in hidden.recommend([[]], k=ITEMS)["items"][0]
    assert "B0004" in hidden.block_items(["B0004"], False).recommend([["B0001"]], k=ITEMS)["items"][0]
    assert recommender.recommend([["B0001", "B0004"]], k=ITEMS).row(0, named=True) == expected


@pytest.mark.parametrize("items", [{"item": ["N1"]}, {"title": ["soap"]}, {"item": ["N1"], "title": [" "]},
                                   {"item": ["N1", "N1"], "title": ["a", "b"]}, {"item": [None], "title": ["a"]},
                                   {"item": [""], "title": ["a"]}, {"item": [" "], "title": ["a"]},
                                   {"item": [], "title": []}])
def test_items_without_an_id_or_a_text_are_refused(readable: Package, items: dict) -> None:
    with pytest.raises(UserError, match="item"):
        Recommender(readable).add_items(pl.DataFrame(items))


@pytest.mark.parametrize(("title", "text"), [(None, TEXTS[4]), (" ", TEXTS[4]), (TEXTS[4], None), (TEXTS[4], "")])
def test_an_item_with_a_title_or_a_text_alone_has_it_as_both(readable: Package, title: str | None, text: str | None
                                                             ) -> None:
    items = pl.DataFrame({"item": ["N1"], "title": [title], "text": [text]}, {name: pl.String for name in (
        "item", "title", "text")})
    added = Recommender(readable).add_items(items).package
    expected = Recommender(readable).add_items(pl.DataFrame({"item": ["N1"], "title": [TEXTS[4]]})).package
    assert added.items.equals(expected.items)
    assert all(torch.equal(added.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_what_a_package_cannot_do_is_said(readable: Package) -> None:
    with pytest.raises(UserError, match="cannot read new texts"):
        Recommender(package()).add_items(NEW)
    for change in ("remove_items", "block_items"):
        with pytest.raises(UserError, match="nowhere"):
            getattr(Recommender(readable), change)(["B0001", "nowhere"])


def test_the_command_line_changes_the_package(readable: Package, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, new = tmp_path / "recommender", tmp_path / "new.csv"
    write_package(folder, readable)
    NEW.write_csv(new)
    assert stage("recommend", "--add", str(new), "--package", str(folder), root=ROOT) == 0
    assert load_package(folder).items["item"].to_list() == [*IDS, "N1", "N2"]
    assert stage("recommend", "N1", "--block", "--package", str(folder), root=ROOT) == 0
    assert load_package(folder).items["blocked"].to_list() == [False] * ITEMS + [True, False]
    assert stage("recommend", "N1", "--unblock", "--package", str(folder), root=ROOT) == 0
    assert stage("recommend", "N2", "--remove", "--package", str(folder), root=ROOT) == 0
    kept = load_package(folder).items
    assert kept["item"].to_list() == [*IDS, "N1", ""] and kept["blocked"].to_list() == [False] * (ITEMS + 1) + [True]
    assert stage("recommend", "N2", "--remove", "--package", str(folder), root=ROOT) == 2
    assert stage("recommend", "--add", "nowhere.csv", "--package", str(folder), root=ROOT) == 2
    assert stage("recommend", "--add", str(new), "--block", "--package", str(folder), root=ROOT) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
