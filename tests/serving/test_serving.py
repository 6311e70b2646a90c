"""Packages and what is recommended from them: the prior's scores, explained; damaged folders; what clients send."""
from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from machine import stage
from tiny import ITEMS, LISTS, ROOT
from tiny_package import IDS, graphs, package, prior, renamed

from llmgr.runtime.errors import UserError
from llmgr.serving import bulk
from llmgr.serving.building import chosen_entries, rows_of
from llmgr.serving.live import Live
from llmgr.serving.package import CONFIG, TENSORS, load_package, write_package
from llmgr.serving.recommender import Recommender, strongest
from llmgr.serving.scoring import PARTS, Scorer
from llmgr.sessions.tensors import Sessions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package on disk. Not to be changed."""
    path = tmp_path_factory.mktemp("package") / "recommender"
    write_package(path, package())
    return path


@pytest.fixture(scope="module")
def recommender(folder: Path) -> Recommender:
    return Recommender.load(folder)


def sessions_of(lists: list[list[int]]) -> Sessions:
    items = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
    for row, clicks in enumerate(lists):
        items[row, :len(clicks)] = torch.tensor(clicks)
    row = torch.arange(len(lists))
    return Sessions(items, row, torch.tensor([len(clicks) for clicks in lists]), row + 1)


# ---------------------------------------------------------------------------------------------------------- scores

def test_a_package_scores_as_the_prior_scores_a_stranger() -> None:
    term, encoder = prior()
    scorer, strangers = Scorer(package(term, encoder)), sessions_of(LISTS)
    with torch.no_grad():
        expected = term(strangers, torch.arange(len(LISTS)))
    scores = scorer(strangers.graphs(torch.arange(len(LISTS))))
    assert torch.allclose(scores[:, 1:], expected[:, 1:], atol=1e-5)


@pytest.mark.parametrize("missing", ["base", "tower", "transitions"])
def test_a_package_works_without_a_part_of_the_prior(missing: str) -> None:
    whole = package()
    less = {name: value for name, value in whole.tensors.items() if name.split(".")[0] != missing}
    names = {"base": "graph", "tower": "text", "transitions": "transitions"}
    batch = graphs(LISTS)
    expected = [part for name, part in Scorer(whole).parts(batch).items() if name != names[missing]]
    scores = Scorer(type(whole)(whole.config, whole.items, less))(batch)
    assert torch.allclose(scores, sum(expected), atol=1e-5)


def test_a_user_that_the_encoder_knows_is_scored_as_a_stranger() -> None:
    scorer, known = Scorer(package()), sessions_of(LISTS)
    expected = scorer(known.graphs(torch.arange(len(LISTS))))
    known.user = torch.arange(1, len(LISTS) + 1)
    assert torch.equal(scorer(known.graphs(torch.arange(len(LISTS)))), expected)


def test_rows_keep_their_strongest_entries() -> None:
    matrix = torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).numpy()
    rows = rows_of(matrix, 3)
    for number in range(9):
        part = slice(rows["transitions.start"][number], rows["transitions.start"][number + 1])
        items, values = rows["transitions.item"][part].tolist(), rows["transitions.value"][part].tolist()
        assert items == sorted(sorted(range(9), key=lambda i: -abs(matrix[number, i]))[:3])
        assert values == matrix[number, items].tolist()


def test_the_fewest_entries_that_cost_little_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmgr.serving.building.ENTRIES", (1, 4, ITEMS + 1))
    term, encoder = prior()
    whole, valid = package(term, encoder), sessions_of(LISTS)
    rest = type(whole)(whole.config, whole.items, {name: value for name, value in whole.tensors.items()
                                                   if not name.startswith("transitions.")})
    entries, tried = chosen_entries(rest, term.model.matrix * term.scale, valid, 0)
    tolerated = 0.99 * tried["whole"]["ndcg_at_20"]
    assert [count for count in tried if count != "whole"][-1] == entries
    assert all(tried[count]["ndcg_at_20"] < tolerated for count in tried if count not in ("whole", entries))
    monkeypatch.setattr("llmgr.serving.building.ENTRIES", (ITEMS + 1,))
    entries, tried = chosen_entries(rest, term.model.matrix * term.scale, valid, 0)
    assert tried[ITEMS + 1] == tried["whole"]


# ---------------------------------------------------------------------------------------------------- recommending

def test_the_best_items_come_first_and_seen_ones_not_at_all(recommender: Recommender) -> None:
    scores = recommender.scorer(graphs([[3, 5, 3]]))[0]
    answer = recommender.recommend([["B0003", "B0005", "B0003"]], k=4).row(0, named=True)
    order = [n for n in torch.argsort(scores[1:], descending=True).add(1).tolist() if n not in (3, 5)][:4]
    assert answer["items"] == [IDS[n - 1] for n in order]
    assert answer["scores"] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert answer["titles"] == [f"title of {item}" for item in answer["items"]]
    everything = recommender.recommend([["B0003", "B0005"]], k=ITEMS, exclude_seen=False).row(0, named=True)
    assert sorted(everything["items"]) == IDS


def test_among_equals_the_lower_number_comes_first_so_that_a_short_list_begins_a_long_one() -> None:
    scores = torch.randint(0, 9, (40, 3000), generator=torch.Generator().manual_seed(4)).float()
    scores[:20, 7:] = -torch.inf  # fewer than k are left
    expected = torch.sort(scores, dim=1, descending=True, stable=True)
    for k in (1, 5, 10, 20, 400, 3000):
        best, item = strongest(scores, k)
        real = best > -torch.inf
        assert torch.equal(best, expected.values[:, :k]) and torch.equal(item[real], expected.indices[:, :k][real]), k
    plain = package()
    equal = Recommender(type(plain)(plain.config, plain.items.with_columns(
        count=pl.lit(3, plain.items.schema["count"])), plain.tensors))
    assert equal.recommend([[]], k=5)["items"].to_list() == [IDS[:5]]


def test_parts_add_up_to_the_score_and_name_a_click(recommender: Recommender) -> None:
    sessions = [["B0003", "B0005", "B0003"], [], ["B0001", "nowhere"]]
    table = recommender.recommend(sessions, k=5, explain=True)
    for row, session in zip(table.iter_rows(named=True), sessions):
        assert [sum(parts) for parts in zip(*(row[name] for name in PARTS))] == pytest.approx(row["scores"], abs=1e-4)
        assert set(row["because"]) <= {*session, ""}
    assert any(row["because"][0] for row in table.iter_rows(named=True))
    assert table.select("items", "scores").equals(recommender.recommend(sessions, k=5).select("items", "scores"))


def test_because_is_the_click_without_which_transitions_and_text_lose_most(recommender: Recommender) -> None:
    row = recommender.recommend([["B0003", "B0007"]], k=3, explain=True).row(0, named=True)
    for item, click in zip(row["items"], row["because"]):
        number = IDS.index(item) + 1
        parts = recommender.scorer.parts(graphs([[3, 7]]))
        alone = recommender.scorer.parts(graphs([[7]]))
        last = sum(float(alone[name][0, number]) for name in ("transitions", "text"))
        first = sum(float(parts[name][0, number]) for name in ("transitions", "text")) - last
        assert click == ("" if max(first, last) <= 0 else "B0003" if first > last else "B0007")


def test_a_batch_is_answered_as_its_sessions_are(recommender: Recommender) -> None:
    sessions = [[IDS[n - 1] for n in clicks] for clicks in LISTS] + [["x"], []]
    together = recommender.recommend(sessions, k=6)
    for number, session in enumerate(sessions):
        single = recommender.recommend([session], k=6).row(0, named=True)
        row = together.row(number, named=True)
        assert row["items"] == single["items"]
        assert row["scores"] == pytest.approx(single["scores"], abs=1e-5)


def test_large_batches_are_scored_in_pieces(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [[item] for item in IDS]
    whole = recommender.recommend(sessions, k=3)["items"].to_list()
    monkeypatch.setattr("llmgr.serving.recommender.MOST", 5)
    assert recommender.recommend(sessions, k=3)["items"].to_list() == whole


def test_threads_share_a_recommender(recommender: Recommender) -> None:
    sessions = [[IDS[n - 1] for n in clicks] for clicks in LISTS]
    expected = [recommender.recommend([session], k=5)["items"].to_list() for session in sessions]
    wrong = []

    def ask(number: int) -> None:
        for _ in range(20):
            if recommender.recommend([sessions[number]], k=5)["items"].to_list() != expected[number]:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_importing_the_library_reads_no_model_code() -> None:
    code = "import sys, llmgr; print('torch' in sys.modules); llmgr.Recommender; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "stages", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ----------------------------------------------------------------------------------------------- what clients send

def test_unknown_items_are_named_and_the_others_count(recommender: Recommender) -> None:
    table = recommender.recommend([["nowhere", "B0003", "x", "nowhere"], ["B0003"]], k=5)
    assert table["unknown"].to_list() == [["nowhere", "x"], []]
    assert table["items"][0].to_list() == table["items"][1].to_list()
    assert table["popular"].to_list() == [False, False]


@pytest.mark.parametrize("session", [[], ["x", "y"]])
def test_without_a_known_click_come_the_most_popular(recommender: Recommender, session: list[str]) -> None:
    row = recommender.recommend([session], k=3).row(0, named=True)
    count = recommender.popular[1:]
    assert row["popular"] and row["unknown"] == session
    assert row["scores"] == count.sort(descending=True).values[:3].tolist()


def test_one_click_ten_thousand_times_is_its_last_clicks(recommender: Recommender) -> None:
    many = recommender.recommend([["B0003"] * 10_000], k=5)
    assert many["items"].to_list() == recommender.recommend([["B0003"] * 6], k=5)["items"].to_list()
    old = recommender.recommend([["B0009"] + ["B0003"] * 6], k=ITEMS).row(0, named=True)
    assert "B0009" not in old["items"], "seen, though too long ago to be scored"


def test_more_items_than_there_are(recommender: Recommender) -> None:
    assert len(recommender.recommend([["B0003"]], k=10**9)["items"][0]) == ITEMS - 1
    assert recommender.recommend([IDS], k=3)["items"].to_list() == [[]]


def test_ids_that_are_numbers_are_read_as_texts() -> None:
    numbered = package()
    numbered = type(numbered)(numbered.config, numbered.items.with_columns(item=pl.Series(map(str, range(1, 13)))),
                              numbered.tensors)
    answer = Recommender(numbered).recommend([[3, "5", 99]], k=2)
    assert answer.equals(Recommender(numbered).recommend([[np.int64(3), np.str_("5"), np.int32(99)]], k=np.int64(2)))
    assert answer["items"].to_list() == Recommender(numbered).recommend([["3", "5"]], k=2)["items"].to_list()
    assert answer["unknown"].to_list() == [["99"]]


@pytest.mark.parametrize("k", [0, -1, True, np.bool_(True), np.int64(0), 2.0, "3", None])
def test_k_that_is_no_count_is_refused(recommender: Recommender, k: object) -> None:
    with pytest.raises(UserError, match="k="):
        recommender.recommend([["B0001"]], k=k)


@pytest.mark.parametrize("sessions", ["B0001", ["B0001"], [{"items": []}], [[None]], [[["B0001"]]], [[1.5]], None, 3,
                                      [[True]], [[np.bool_(True)]], [[np.float64(1)]], [b"B0001"]])
def test_what_is_no_list_of_sessions_is_refused(recommender: Recommender, sessions: object) -> None:
    with pytest.raises(UserError, match="session"):
        recommender.recommend(sessions)


def test_no_session_gives_no_row(recommender: Recommender) -> None:
    assert recommender.recommend([]).height == 0


# --------------------------------------------------------------------------------------------------------- folders

def test_a_package_comes_back_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    again = load_package(folder)
    whole = package()
    assert again.items.equals(whole.items)
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(value, whole.tensors[name]) for name, value in again.tensors.items())
    write_package(tmp_path / "copy", again)
    assert all((tmp_path / "copy" / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())


def spoil(folder: Path, how: str) -> None:
    tensors, config = folder / TENSORS, folder / CONFIG
    if how == "byte":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif how == "short":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "missing":
        tensors.unlink()
    elif how == "config":
        config.write_text("{")
    elif how == "keys":
        config.write_text(json.dumps({"format": 1}))
    elif how == "version":
        config.write_text(json.dumps({**json.loads(config.read_text()), "format": 99}))
    elif how == "gone":
        shutil.rmtree(folder)


DAMAGES = ["byte", "short", "missing", "config", "keys", "version", "gone"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_package_is_refused_in_one_sentence(folder: Path, tmp_path: Path, how: str) -> None:
    copy = tmp_path / "recommender"
    shutil.copytree(folder, copy)
    spoil(copy, how)
    with pytest.raises(UserError, match="recommender") as refused:
        Recommender.load(copy)
    assert "\n" not in str(refused.value) and "dvc repro package" in str(refused.value)


def served_soon(live: Live, item: str) -> bool:
    for _ in range(200):
        if item in live.current().number:
            return True
        time.sleep(0.02)
    return False


def test_a_new_package_replaces_the_old_one_between_requests(folder: Path, tmp_path: Path) -> None:
    copy, failed = tmp_path / "recommender", []
    shutil.copytree(folder, copy)
    live, stop = Live(copy), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                assert live.current().recommend([["B0001", "C0001"]], k=2)["popular"].to_list() == [False]
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            write_package(copy, renamed())
            assert served_soon(live, "C0001")
            write_package(copy, package())
            assert served_soon(live, "B0001")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


@pytest.mark.parametrize("how", DAMAGES)
def test_the_old_package_stays_where_the_new_one_is_damaged(folder: Path, tmp_path: Path, how: str,
                                                            capsys: pytest.CaptureFixture) -> None:
    copy, spoilt = tmp_path / "recommender", tmp_path / "new"
    shutil.copytree(folder, copy)
    live = Live(copy)
    write_package(spoilt, renamed())
    spoil(spoilt, how)
    shutil.rmtree(copy)
    if spoilt.exists():
        spoilt.rename(copy)
    said: list[str] = []  # of this folder: another test's thread may end its line here
    for _ in range(10 if how == "gone" else 200):
        assert "B0001" in live.current().number
        said += [line for line in capsys.readouterr().err.splitlines() if str(copy) in line]
        if said:
            break
        time.sleep(0.02)
    for _ in range(10):
        assert "B0001" in live.current().number
        time.sleep(0.02)
    said += [line for line in capsys.readouterr().err.splitlines() if str(copy) in line]
    assert len(said) == (how != "gone")
    write_package(copy, renamed())
    assert served_soon(live, "C0001")


# ----------------------------------------------------------------------------------------------------------- files

def write_sessions(path: Path, sessions: list[list[str]]) -> Path:
    frame = pl.DataFrame({"session": [f"s{n}" for n in range(len(sessions))], "items": sessions},
                         {"session": pl.String, "items": pl.List(pl.String)})
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".jsonl":
        frame.write_ndjson(path)
    else:
        frame.with_columns(pl.col("items").list.join(" ")).write_csv(path)
    return path


SESSIONS = [[IDS[(n * 5 + step) % ITEMS] for step in range(n % 4)] + ["x"] * (n % 2) for n in range(23)]


@pytest.mark.parametrize("form", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("out", ["out.parquet", "out.jsonl"])
def test_files_are_answered_row_by_row(folder: Path, recommender: Recommender, tmp_path: Path, form: str, out: str,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "ROWS", 4)
    number = bulk.recommend_file(folder, write_sessions(tmp_path / f"sessions{form}", SESSIONS), tmp_path / out, 3)
    table = (pl.read_parquet if out.endswith("parquet") else pl.read_ndjson)(tmp_path / out)
    assert number == len(SESSIONS) and table["session"].to_list() == [f"s{n}" for n in range(23)]
    assert table["items"].to_list() == recommender.recommend(SESSIONS, 3)["items"].to_list()
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def interrupted(folder: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list]:
    """A file of sessions, answered in whole-OUT and killed at the fourth part in OUT; the batches scored since."""
    monkeypatch.setattr(bulk, "ROWS", 4)
    sessions, scored = write_sessions(tmp_path / "sessions.parquet", SESSIONS), []
    bulk.recommend_file(folder, sessions, tmp_path / f"whole-{out}", 3)
    plain = Recommender.recommend

    def killed(self: Recommender, batch: list, *rest: object) -> pl.DataFrame:
        scored.append(batch)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return plain(self, batch, *rest)

    monkeypatch.setattr(Recommender, "recommend", killed)
    with pytest.raises(KeyboardInterrupt):
        bulk.recommend_file(folder, sessions, tmp_path / out, 3)
    return sessions, scored


@pytest.mark.parametrize("out", ["out.parquet", "out.jsonl"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(folder: Path, tmp_path: Path, out: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, scored = interrupted(folder, tmp_path, out, monkeypatch)
    assert not (tmp_path / out).exists()
    bulk.recommend_file(folder, sessions, tmp_path / out, 3)
    assert len(scored) == 4 + 3, "the three parts that were there are not scored again"
    assert (tmp_path / out).read_bytes() == (tmp_path / f"whole-{out}").read_bytes()


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


@pytest.mark.parametrize("out", ["out.parquet", "out.jsonl"])
@pytest.mark.parametrize(("harm", "again"), [
    (lambda parts, form: flip(parts / f"00000001{form}"), 5), (lambda parts, form: flip(parts / "about"), 6),
    (lambda parts, form: (parts / "about").write_bytes(b""), 6),
    (lambda parts, form: (parts / f"00000000{form}").unlink(), 6),
    (lambda parts, form: (parts / f"00000002{form}").write_bytes(b""), 4),
], ids=["byte", "about", "empty-about", "gap", "empty"])
def test_damaged_parts_are_ranked_again(folder: Path, tmp_path: Path, out: str, harm: Callable, again: int,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, scored = interrupted(folder, tmp_path, out, monkeypatch)
    harm(tmp_path / f".{out}.parts", Path(out).suffix)
    bulk.recommend_file(folder, sessions, tmp_path / out, 3)
    assert len(scored) == 4 + again
    assert (tmp_path / out).read_bytes() == (tmp_path / f"whole-{out}").read_bytes()


def test_two_runs_never_write_one_file(folder: Path, tmp_path: Path) -> None:
    sessions, out = write_sessions(tmp_path / "sessions.jsonl", SESSIONS), tmp_path / "out.jsonl"
    with (tmp_path / ".out.jsonl.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run writes"):
            bulk.recommend_file(folder, sessions, out, 2)
    bulk.recommend_file(folder, sessions, out, 2)
    assert not list(tmp_path.glob(".*"))


def test_parts_of_other_settings_are_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    sessions, out = write_sessions(tmp_path / "sessions.jsonl", SESSIONS), tmp_path / "out.jsonl"
    parts = tmp_path / ".out.jsonl.parts"
    parts.mkdir()
    (parts / "00000000.jsonl").write_text("of another run\n")
    (parts / "about.json").write_text("{}")
    bulk.recommend_file(folder, sessions, out, 2)
    assert len(out.read_text().splitlines()) == len(SESSIONS)


@pytest.mark.parametrize("content", ['{"items": ["B0001"]}\nnot json\n', '{"items": ["B0001"]}\n{"clicks": []}\n',
                                     '{"items": ["B0001"]}\n{"items": "B0001"}\n', '{"items": []}\n[]\n',
                                     '{"items": []}\n' + "[" * 100_000])
def test_a_row_that_is_no_session_is_named(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "sessions.jsonl").write_text(content)
    with pytest.raises(UserError, match="row 2"):
        bulk.recommend_file(folder, tmp_path / "sessions.jsonl", tmp_path / "out.jsonl", 3)
    assert not (tmp_path / ".out.jsonl.lock").exists()


@pytest.mark.parametrize(("name", "content"), [
    ("s.jsonl", b'\xff\xfe{"items": ["a"]}\n'), ("s.csv", b"items\n\xff\n"), ("s.parquet", b"x"),
    ("s.csv", b"items\n" + b"a" * 200_000), ("s.csv", b"clicks\na b\n")])
def test_a_file_of_another_form_is_named(folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        bulk.recommend_file(folder, tmp_path / name, tmp_path / "out.parquet", 3)


def recommend(capsys: pytest.CaptureFixture, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, output and errors of stages/recommend.py in this process."""
    status = stage("recommend", *map(str, arguments), root=ROOT)
    return status, *capsys.readouterr()


def test_the_command_line_prints_a_table(folder: Path, recommender: Recommender, capsys: pytest.CaptureFixture) -> None:
    status, out, err = recommend(capsys, "B0003", "x", "--k", 3, "--package", folder, "--explain")
    best = recommender.recommend([["B0003"]], 3)["items"][0].to_list()
    assert status == 0 and [line.split()[1] for line in out.splitlines()[1:]] == best
    assert err == "not in the catalogue: x\n"


@pytest.mark.parametrize("wrong", [["B0003", "--k", "0"], [], ["B0003", "--package", "nowhere"],
                                   ["--sessions", "nowhere.csv", "--out", "o.jsonl"], ["--sessions", "a.csv"],
                                   ["--sessions", "nowhere.txt", "--out", "o.jsonl"],
                                   ["--sessions", "@", "--out", "/proc/none/o.jsonl"],
                                   ["--sessions", "@", "--out", "tests/.."], ["--sessions", "@", "--out", "@d.jsonl"]])
def test_the_command_line_refuses_in_one_line(folder: Path, tmp_path: Path, wrong: list[str],
                                              capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "d.jsonl").mkdir()
    sessions = write_sessions(tmp_path / "s.jsonl", SESSIONS)
    wrong = [str(sessions) if word == "@" else word.replace("@", f"{tmp_path}/") for word in wrong]
    package = [] if "--package" in wrong else ["--package", folder]
    status, out, err = recommend(capsys, *wrong, *package)
    assert status == 2 and not out and err.startswith("error: ") and len(err.splitlines()) == 1
