"""The library without a pipeline: no path of its own, and LLMGR from tensors in an empty folder."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import language_model, tokenizer
from torch.nn import functional as F

import llmgr
from llmgr.runtime.reach import LIBRARY

ROOT = LIBRARY.parent.parent
ITEMS = 9


def test_llmgr_is_built_trained_and_scored_from_tensors_in_an_empty_folder(tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    params, backbone, empty = llmgr.load_params(ROOT / "params.yaml"), tmp_path / "backbone", tmp_path / "empty"
    params = replace(params, model=replace(params.model, dropout=0.0, lora_dropout=0.0))
    language_model().save_pretrained(backbone)
    tokenizer().save_pretrained(backbone)
    empty.mkdir()
    monkeypatch.chdir(empty)
    torch.manual_seed(0)
    vectors, texts = (F.pad(torch.randn(ITEMS, width), (0, 0, 1, 0)) for width in (8, 5))
    ranker = llmgr.build(params, backbone, vectors, texts)
    train = llmgr.Sessions.of([[1, 2, 3, 4], [5, 6, 7, 8, 9], [2, 3, 4]])
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=0.01)
    samples, losses = torch.arange(len(train)), []
    for _ in range(3):
        loss = ranker.loss(train, samples)
        (loss.total / loss.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.total.item())
    assert losses[2] < losses[1] < losses[0]
    scores = ranker.eval().over(train)(samples)
    assert scores.shape == (len(train), ITEMS + 1)
    with torch.no_grad():
        left = ranker.loss(train, samples).total
    total = F.cross_entropy(scores[:, 1:], train.target - 1, reduction="sum")
    assert total.item() == pytest.approx(left.item(), rel=1e-4)
    assert not list(empty.iterdir())


def test_the_package_imports_without_torch_and_each_of_its_names_on_first_use() -> None:
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(LIBRARY.parent)!r})
        import llmgr
        assert "torch" not in sys.modules
        from llmgr import load_params
        assert "torch" not in sys.modules
        print(*(getattr(llmgr, name).__name__ for name in llmgr.__all__))"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["Ranker", "Recommender", "Sessions", "from_tensors", "load"]
    with pytest.raises(AttributeError, match="no attribute 'Ranger'"):
        _ = llmgr.Ranger


def test_sessions_of_lists_are_their_prefixes_and_what_follows() -> None:
    sessions = llmgr.Sessions.of([[1, 2, 3], [4, 5]])
    prefixes = [[i for i in row if i] for row in sessions.graphs(torch.arange(3)).items_BS.tolist()]
    assert prefixes == [[1], [1, 2], [4]] and sessions.target.tolist() == [2, 3, 5]
    assert sessions.user[sessions.row].tolist() == [1, 1, 2]


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_no_room_knows_a_path_of_the_pipeline(path: Path) -> None:
    """Docstrings may name them; a constant that a function uses may not."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    paths = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
             and id(node) not in prose and re.search(r"(^|[\s'\"(])(data|models|reports)/", node.value)]
    assert not paths
