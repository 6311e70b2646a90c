"""Wrong input to the training of encoders and to what reads them, through the command line: one sentence, status 2."""
from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
import torch
from machine import DEFAULTS, stage
from small_split import ITEMS, run, set_up, write_data
from toy import checkpoint_of

from llmgr.params.loading import load
from llmgr.runtime.artifacts import save_tensors
from llmgr.runtime.errors import UserError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_data(tmp_path)
    set_up(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "peak"), [("stamp", 0.02), ("stamp-text", 0.004)])
def test_a_control_learns_at_its_own_rate(place: Path, name: str, peak: float) -> None:
    set_up(place, encoder__text_lr=0.004, encoder__stamp__lr=0.02)
    save_tensors(place / "models/text_encoder/item_text.safetensors", {"vectors": torch.randn(ITEMS + 1, 12)})
    run(place, "pretrain.py", "--encoder", name)
    rates = pl.read_csv(place / f"reports/curves/{name}_steps.csv")["lr"]
    assert rates[0] == pytest.approx(peak, rel=0.2) and rates.max() <= peak


def test_an_unknown_name_is_refused_with_the_nearest(place: Path) -> None:
    said = run(place, "pretrain.py", "--encoder", "grurec", status=2)
    assert said == "error: params.yaml has no section encoder.grurec; the nearest is encoder.gru4rec\n"


@pytest.mark.parametrize(("key", "nearest"), [
    ("encoder.stamp.x", "encoder.stamp.lr"), ("encoder.stamp.lr.x", "encoder.stamp.lr"), ("encodr.stamp", "encoder")])
def test_a_view_of_what_does_not_exist_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"no section {re.escape(key)}; the nearest is {re.escape(nearest)}$"):
        load(DEFAULTS).view([key])


def test_an_encoder_that_was_not_trained_is_named_by_the_stage_that_reads_it(place: Path) -> None:
    run(place, "pretrain.py", "--encoder", "stamp")
    said = run(place, "export.py", status=2)
    assert "error: models/encoders/gcsan is missing: run `dvc repro`" in said


def test_a_loss_that_is_no_number_stops_names_the_step_and_keeps_the_last_good_checkpoint(place: Path) -> None:
    set_up(place, encoder__stamp__lr=1e9, encoder__training__clip=1e9)
    said = run(place, "pretrain.py", "--encoder", "stamp", status=2)
    assert "error: stamp: the loss or its gradient is not finite at step " in said and "lower encoder.stamp.lr" in said
    assert not (place / "models/encoders/stamp").exists()
    step = int(said.split(" at step ")[1].split(";")[0])
    (kept,) = (place / ".resume").rglob("state.pt")
    state = checkpoint_of(kept)
    assert state["progress"]["step"] == step - 1
    assert all(bool(weight.isfinite().all()) for weight in state["weights"].values())


def test_diverged_vectors_of_a_control_name_the_rate_that_it_learned_at(place: Path, capfd: pytest.CaptureFixture
                                                                         ) -> None:
    set_up(place, model__base="gcsan-text")
    save_tensors(place / "models/encoders/gcsan-text/items.safetensors", {"vectors": torch.tensor([torch.nan])})
    assert stage("export", root=place) == 2
    assert "not finite: lower encoder.text_lr" in capfd.readouterr().err


def test_sessions_of_another_catalogue_are_refused_by_training_and_by_evaluation(place: Path) -> None:
    items = place / "data/core/items.parquet"
    run(place, "pretrain.py", "--encoder", "stamp")
    whole = pl.read_parquet(items)
    whole.head(ITEMS - 1).write_parquet(items)
    said = run(place, "pretrain.py", "--encoder", "gcsan", status=2)
    assert f"data/sessions/train.parquet holds item {ITEMS}, but data/core/items.parquet has {ITEMS - 1} items" in said
    set_up(place, encoder__names=["stamp"], encoder__controls=[], model__base="stamp",
           **{"gate__fuse__gated-gcsan-text": ["stamp"], "gate__fuse__gated-both": ["llmgr"]})
    pl.concat([whole, whole.head(1).with_columns(item_id=pl.lit(ITEMS + 1, pl.Int32))]).write_parquet(items)
    run(place, "peers.py", "--do", "speed stamp")
    said = run(place, "peers.py", "--do", "table", status=2)
    assert f"models/encoders/stamp was trained for {ITEMS} items, the catalogue has {ITEMS + 1}" in said


@pytest.mark.parametrize(("name", "split"), [("evaluate", "valid"), ("gate", "valid"), ("tune", "train"),
                                             ("bench", "train"), ("linear", "train")])
def test_every_reader_of_sessions_refuses_those_of_another_catalogue(
        place: Path, name: str, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("aligned", "embeddings", "folds", "tower", "backbone", "text_encoder"):
        (place / "models" / folder).mkdir(parents=True)
    save_tensors(place / "models/text_encoder/item_text.safetensors", {"vectors": torch.randn(ITEMS + 1, 130)})
    items = place / "data/core/items.parquet"
    pl.read_parquet(items).head(ITEMS - 1).write_parquet(items)
    options = ("--encoder", "gcsan") if name == "linear" else ()
    assert stage(name, *options, root=place) == 2
    expected = f"data/sessions/{split}.parquet holds item {ITEMS}, but data/core/items.parquet has {ITEMS - 1} items"
    assert expected in capsys.readouterr().err


def test_a_damaged_file_of_weights_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "models/text_encoder").mkdir(parents=True)
    (place / "models/text_encoder/item_text.safetensors").write_bytes(b"\x08cut off")
    assert stage("pretrain", "--encoder", "stamp-text", root=place) == 2
    assert "models/text_encoder/item_text.safetensors is damaged" in capsys.readouterr().err
