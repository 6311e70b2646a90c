"""Vectors for a store of one's own: their inner products are the scores without the two sparse parts."""
from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from tiny import LISTS
from tiny_package import IDS, graphs, package, readable_package

from llmgr.runtime.errors import UserError
from llmgr.serving.recommender import Recommender
from llmgr.serving.scoring import Scorer
from llmgr.serving.vectors import write_vectors

SESSIONS = [[IDS[item - 1] for item in clicks] for clicks in LISTS[:3]]


@pytest.mark.parametrize("made", [package, readable_package], ids=["prior", "with a student"])
def test_inner_products_are_the_scores_without_matrix_and_clicks(made) -> None:
    scorer, batch = Scorer(made()), graphs(LISTS)
    clicked = torch.zeros(len(LISTS), scorer.size).scatter_add_(
        1, batch.nodes_BN, scorer.weights["clicked"].expand(batch.nodes_BN.shape))
    expected = scorer(batch) - scorer.transitions(batch) - clicked
    scores = scorer.session_vectors(batch) @ scorer.item_vectors().T
    assert torch.allclose(scores[:, 1:], expected[:, 1:], atol=1e-4)
    assert scores[:, 1:].std() > 0.1


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_files_hold_the_vectors_of_items_and_of_a_file_of_sessions(tmp_path: Path, suffix: str) -> None:
    recommender = Recommender(readable_package())
    frame = pl.DataFrame({"session": ["a", "b", "c", "d"], "items": [*SESSIONS, ["nobody knows"]]})
    file = tmp_path / f"sessions.{suffix}"
    frame.write_parquet(file) if suffix == "parquet" else frame.write_ndjson(file)
    write_vectors(recommender, tmp_path / "vectors", file)
    items, sessions = (pl.read_parquet(tmp_path / f"vectors/{name}.parquet") for name in ("items", "sessions"))
    assert items["item"].to_list() == IDS and sessions["session"].to_list() == ["a", "b", "c", "d"]
    assert torch.equal(torch.tensor(items["vector"].to_list()), recommender.scorer.item_vectors()[1:])
    assert torch.allclose(torch.tensor(sessions["vector"].to_list()[:3]),
                          recommender.scorer.session_vectors(graphs(LISTS[:3])), atol=1e-6)
    assert sessions["vector"].to_list()[3] == []


def test_a_file_without_sessions_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    recommender = Recommender(package())
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no session"):
        write_vectors(recommender, tmp_path / "vectors", tmp_path / "none.jsonl")
    assert not (tmp_path / "vectors/sessions.parquet").exists()
    with pytest.raises(UserError, match="file of sessions"):
        write_vectors(recommender, tmp_path / "vectors", tmp_path / "missing.parquet")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        write_vectors(recommender, tmp_path / "file")
