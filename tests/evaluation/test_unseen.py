"""Items held out of training, added by their texts and ranked among all items."""
from __future__ import annotations

import types
from pathlib import Path

import polars as pl
import pytest
import torch
from tiny import FILES, ITEMS, LISTS, language_model, tokenizer
from tiny_package import IDS, TEXTS, readable_package
from torch.nn import functional as F

from llmgr.evaluation.unseen import rank_unseen
from llmgr.runtime.artifacts import save_tensors
from llmgr.runtime.layout import PIPELINE
from llmgr.serving.package import write_package
from llmgr.serving.recommender import Recommender
from llmgr.text.items import item_texts
from llmgr.text.vectors import encode_texts

NEW = {"item": ["N1", "N2"], "title": ["red rose cream", "blue oat soap"]}
SESSIONS = [([5, 1], ITEMS + 1), ([9, ITEMS + 1, 3], ITEMS + 2), ([2], ITEMS + 1)]
PARAMS = types.SimpleNamespace(data=types.SimpleNamespace(max_session=6), tower=types.SimpleNamespace(decay=0.7),
                               evaluate=types.SimpleNamespace(decay=0.7, text_dim=4),
                               text_encoder=types.SimpleNamespace(max_text_tokens=24))


def catalogue(names: list[str], titles: list[str], first: int) -> pl.DataFrame:
    return pl.DataFrame({"item_id": range(first, first + len(names)), "item": names, "title": titles, "brand": "",
                         "text": titles}, {"item_id": pl.Int32, "item": pl.String, "title": pl.String,
                                           "brand": pl.String, "text": pl.String})


def sessions(rows: list[tuple[list[int], int]]) -> pl.DataFrame:
    return pl.DataFrame([(f"u{number}", items, target, []) for number, (items, target) in enumerate(rows)], {
        "user": pl.String, "items": pl.List(pl.Int32), "target": pl.Int32, "earlier": pl.List(pl.Int32)}, orient="row")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a package, a language model, a catalogue, two items held out, and sessions that end in them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/core", "data/sessions", "models/text_encoder"):
        Path(folder).mkdir(parents=True)
    write_package(PIPELINE.recommender, readable_package())
    catalogue(IDS, TEXTS, 1).write_parquet(FILES.items)
    catalogue(NEW["item"], NEW["title"], ITEMS + 1).write_parquet(FILES.unseen_items)
    sessions(SESSIONS).write_parquet(FILES.sessions("unseen"))
    known = sessions([(clicks[:-1], clicks[-1]) for clicks in LISTS if 1 < len(clicks) < 8])
    known.write_parquet(FILES.sessions("test"))
    known.drop("earlier").write_parquet(FILES.sessions("train"))
    language_model("bert").save_pretrained(FILES.text_encoder)
    tokenizer("bert").save_pretrained(FILES.text_encoder)
    vectors = encode_texts(language_model("bert").eval(), tokenizer("bert"), item_texts(FILES.items, "text"), 24)
    save_tensors(FILES.item_vectors, {"vectors": F.pad(vectors, (0, 0, 1, 0))})


def test_ranks_are_those_of_the_package_with_the_items_added(project: None) -> None:
    found = rank_unseen(PARAMS, FILES)
    added = Recommender.load(PIPELINE.recommender).add_items(pl.DataFrame(NEW))
    for place, (clicks, target) in enumerate(SESSIONS):
        answer = added.recommend([[added.ids[n - 1] for n in clicks]], k=99, exclude_seen=False)["items"][0].to_list()
        assert found.targets[place] == target
        assert found.among["served"]["all"][place] == answer.index(added.ids[target - 1]) + 1
        others = [item for item in answer if item not in {added.ids[n - 1] for n in clicks}]
        assert found.among["served"]["all_unseen"][place] == others.index(added.ids[target - 1]) + 1
        new = [item for item in answer if item in NEW["item"]]
        assert found.among["served"]["new"][place] == new.index(added.ids[target - 1]) + 1


def test_the_tower_and_text_knn_stand_beside_it(project: None) -> None:
    found = rank_unseen(PARAMS, FILES)
    assert found.among.keys() == {"served", "tower", "text-knn"}
    tower = Recommender.load(PIPELINE.recommender).add_items(pl.DataFrame(NEW)).package.tensors["tower"]
    scores = (0.7 * tower[5] + tower[1]) @ tower.T
    assert found.among["tower"]["all"][0] == (scores[1:] >= scores[ITEMS + 1]).sum()
    figures = found.figures()
    assert figures["items"] == 2 and figures["sessions"] == 3
    assert figures["models"]["text-knn"]["new"]["hr_at_5"] == 1, "there are two of them"


def test_other_items_keep_their_ranks(project: None) -> None:
    assert rank_unseen(PARAMS, FILES).changed == 0


def test_one_text_of_a_known_item_ranks_with_it_by_text(project: None) -> None:
    catalogue(["N1", "N2"], [TEXTS[0], "blue oat soap"], ITEMS + 1).write_parquet(FILES.unseen_items)
    sessions([([1], ITEMS + 1)]).write_parquet(FILES.sessions("unseen"))
    ranks = rank_unseen(PARAMS, FILES).among
    assert ranks["tower"]["all"].item() <= 2 and ranks["text-knn"]["all"].item() <= 2
    assert torch.equal(ranks["tower"]["new"], torch.tensor([1]))
