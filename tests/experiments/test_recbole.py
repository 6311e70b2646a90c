"""RecBole's side: it reads the same split, its lean fits compute the same, and the table shows the right pair."""
from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from machine import stage
from small_split import run, set_up, write_data

from llmgr.data.interactions import leave_one_out
from llmgr.experiments import recbole
from llmgr.runtime.artifacts import read_json, write_json
from llmgr.runtime.errors import UserError


@pytest.mark.parametrize("window", [2, 50])
def test_what_is_written_is_every_users_whole_sequence_in_order(window: int) -> None:
    rows = [("b", 5), ("b", 4), ("b", 3), ("b", 2), ("b", 1), ("a", 1), ("a", 2), ("a", 1), ("a", 4), ("a", 1),
            ("a", 5), ("a", 7)]
    frame = pl.DataFrame(rows, {"user": pl.String, "item_id": pl.Int32}, orient="row")
    found = recbole.interactions(*leave_one_out(frame, window).values())
    assert found.columns == ["user_id:token", "item_id:token", "timestamp:float"]
    for user in "ab":
        own = [item for who, item in rows if who == user]
        mine = found.filter(pl.col("user_id:token") == user)
        assert mine.rows() == [(user, item, place) for place, item in enumerate(own)]


class Summing(torch.nn.Module):
    """A model as RecBole's: reads padded items and lengths; `widths` are those it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def forward(self, items_BS: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        self.widths.append(items_BS.shape[1])
        place = torch.arange(1, items_BS.shape[1] + 1)
        return torch.stack(((items_BS * place * (items_BS > 0)).sum(1), length_B), 1).double()


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_trimming_changes_the_padding_alone(batch: int) -> None:
    torch.manual_seed(0)
    length = torch.randint(1, 21, (batch,))
    items = torch.randint(1, 60, (batch, 20)) * (torch.arange(20) < length[:, None])
    model = Summing()
    whole = model(items, length)
    model.widths.clear()
    assert torch.equal(recbole.trimmed(model.forward)(items, length), whole)
    assert len(model.widths) <= 8 and max(model.widths) == int(length.max())
    assert batch < 100 or sum(model.widths) < 0.7 * 20 * len(model.widths)


def recboles_slice(items_BS: np.ndarray) -> list[tuple[list[int], np.ndarray, list[int]]]:
    """RecBole's SRGNN._get_slice, one session after the other: node of every click, adjacency, node items."""
    found = []
    for clicks in items_BS:
        node = np.unique(clicks)
        edges = np.zeros((len(clicks), len(clicks)))
        for now, following in itertools.pairwise(clicks):
            if following == 0:
                break
            edges[np.where(node == now)[0][0], np.where(node == following)[0][0]] = 1
        into, out = edges.sum(0), edges.sum(1)
        into[into == 0], out[out == 0] = 1, 1
        adjacency = np.concatenate([edges / into, edges.T / out]).T
        found.append(([int(np.where(node == item)[0][0]) for item in clicks], adjacency,
                      node.tolist() + [0] * (len(clicks) - len(node))))
    return found


def test_graphs_are_recboles_in_another_order_of_nodes() -> None:
    torch.manual_seed(0)
    length = torch.tensor([1, 2, 9, 5, 9, 7])
    items_BS = torch.randint(1, 5, (6, 9)) * (torch.arange(9) < length[:, None])
    alias, adjacency, nodes, mask = recbole.graphs(items_BS)
    assert torch.equal(mask, items_BS > 0)
    assert torch.equal(nodes.gather(1, alias) * mask, items_BS)
    values = torch.randn(5, 3)
    for b, (their_alias, theirs, their_nodes) in enumerate(recboles_slice(items_BS.numpy())):
        for half in (slice(0, 9), slice(9, 18)):
            ours = (adjacency[b, :, half] @ values[nodes[b]])[alias[b]][mask[b]]
            expected = torch.from_numpy(theirs[:, half]).float() @ values[torch.tensor(their_nodes)]
            torch.testing.assert_close(ours, expected[their_alias][mask[b]])
    assert adjacency.abs().sum() > 10


def fit(model: str, lr: float, ndcg: float, hr: float, lean: bool = True, stopped: str = "itself") -> dict:
    figures = {"hr_at_20": hr, "ndcg_at_20": ndcg}
    return {"model": model, "dataset": "office", "settings": {"learning_rate": lr}, "lean": lean, "epochs": 10,
            "stopped": stopped, "samples_per_cpu_second": 100.0 if not lean else 9e9, "peak_memory_mb": 1234.0,
            "hardware": "1 CPU threads, a machine", "date": "2026-01-02", "test": figures, "valid": figures}


def ours(name: str, hr: float, ndcg: float) -> recbole.Ours:
    figures = {"hr_at_20": hr, "ndcg_at_20": ndcg}
    return recbole.Ours(name, figures, figures, {"hr_at_20": 0.01, "ndcg_at_20": 0.002}, {"lr": 0.003}, 15,
                      {"samples_per_cpu_second": 2500.0, "products_share": 0.25, "peak_memory_mb": 567.0,
                       "hardware": "1 CPU threads, a machine", "date": "2026-01-03"})


def test_the_table_has_recboles_best_on_validation_and_its_cost_as_it_ships() -> None:
    fits = [fit("SRGNN", 0.001, 0.05, 0.2, lean=False), fit("SRGNN", 0.003, 0.06, 0.1, stopped="limit"),
            fit("GCSAN", 0.003, 0.9, 0.9, lean=False)]
    found = recbole.markdown([ours("srgnn", 0.12, 0.058), ours("niser", 0.2, 0.1)], fits, 1000, 50)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines() if line.startswith("| ")]
    rows = {(row[0], number // 3): row for number, row in enumerate(cells)}
    assert len(cells) == 6
    assert rows["srgnn", 0] == ["srgnn", "0.1200", "0.1000", "+2.00", "0.0580", "0.0600", "-1.00", "0.0580", "0.0600",
                                "lr 0.003", "learning_rate 0.003"]
    assert rows["srgnn", 1] == ["srgnn", "2,500", "100", "25.0", "567", "1234", "15", "10 (limit)", "6", "100",
                                "25%"]
    assert rows["niser", 0][2:4] == ["–", "–"] and rows["niser", 0][1] == "0.2000"
    assert "1 CPU threads, a machine" in found and "2026-01-02, 2026-01-03" in found and "50 test sessions" in found


def test_a_cost_needs_a_fit_as_recbole_ships_it() -> None:
    with pytest.raises(UserError, match=r"all fits of SRGNN were lean.*--do 'fit SRGNN 1 30'"):
        recbole.best([fit("SRGNN", 0.003, 0.06, 0.1)], "SRGNN")
    assert recbole.best([], "SRGNN") is None


def test_standard_errors_are_those_of_a_mean() -> None:
    ranks = np.array([1, 50, 50, 3])
    found = recbole.standard_errors(ranks)
    assert found["hr_at_20"] == pytest.approx(0.5 / 4 ** 0.5)
    assert found["ndcg_at_20"] == pytest.approx(np.std([1.0, 0.0, 0.0, 0.5]) / 2)


@pytest.mark.slow
def test_the_command_line_writes_times_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path)
    set_up(tmp_path, encoder__narm__lr=0.02, encoder__training__epochs=3)
    for wrong, words in [("draw", "no job"), ("", "no job"), ("fit SRGNN", "no job"), ("speed", "no job"),
                         ("fit SRGN 1 1", "the nearest is SRGNN"), ("fit SRGNN one 1", "a number of epochs"),
                         ("fit SRGNN 0 1", "both above 0"), ("fit SRGNN 1 0.0", "both above 0"),
                         ("fit SRGNN 1 1 learning_rate", "learning_rate is no key=value"),
                         ("fit SRGNN 1 1 learning_rate=[1", r"learning_rate=[1 is no key=value"),
                         ("fit SRGNN 1 1", "no sessions for RecBole: run `python stages/peers.py --do write`")]:
        assert stage("peers", "--do", wrong, root=tmp_path) == 2, wrong
        assert words in capsys.readouterr().err, wrong
    set_up(tmp_path, split__selection=True)
    assert stage("peers", "--do", "table", root=tmp_path) == 2
    assert "split.selection=true" in capsys.readouterr().err
    set_up(tmp_path, encoder__narm__lr=0.02, encoder__training__epochs=3)
    assert "no encoder was both trained and timed" in run(tmp_path, "peers.py", "--do", "table", status=2)
    run(tmp_path, "peers.py", "--do", "write")
    lines = (tmp_path / "data/peers/sample/sample.inter").read_text().splitlines()
    assert lines[:3] == ["user_id:token\titem_id:token\ttimestamp:float", "u00\t1\t0", "u00\t2\t1"]
    assert len(lines) == 1 + 40 * 5
    assert "RecBole is not installed" in run(tmp_path, "peers.py", "--do", "fit SRGNN 1 1", status=2)
    run(tmp_path, "pretrain.py", "--encoder", "narm")
    run(tmp_path, "peers.py", "--do", "speed narm")
    timed = read_json(tmp_path / "data/peers/sample/speed/narm.json")
    assert timed["samples_per_cpu_second"] > 1 and 0 < timed["products_share"] < 1
    write_json(tmp_path / "data/peers/sample/fits/NARM.json", fit("NARM", 0.001, 0.05, 0.2, lean=False))
    run(tmp_path, "peers.py", "--do", "table")
    table = (tmp_path / "reports/results/sample/recbole.md").read_text()
    assert "| narm |" in table and "lr 0.02" in table and "40 test sessions" in table
