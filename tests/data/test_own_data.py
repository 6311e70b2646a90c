"""Files of one's own: formats, columns, times, items, and what is refused, down to the stages as a user runs them."""
from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import polars as pl
import pytest
from data_stages import STAGES, refused, run
from machine import ROOT

from llmgr.data import files, own, times
from llmgr.runtime import artifacts
from llmgr.runtime.errors import UserError

NONE = dict.fromkeys(("user", "item", "time", "title", "brand", "category", "description"))
START = 1_388_534_400  # 2014-01-01
CLICKS = [(f"U{u}", f"I{i}", START + 86_400 * i + u) for u in range(6) for i in range(6)]


def written(path: Path, text: str | bytes) -> Path:
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def clicks(path: Path, rows: list = CLICKS, names: tuple = ("user_id", "item_id", "timestamp")) -> Path:
    """Interactions in the format that the ending says."""
    kind = files.ending(path)
    if kind == ".parquet":
        pl.DataFrame(rows, schema=list(names), orient="row").write_parquet(path)
        return path
    if kind == ".jsonl":
        return written(path, "".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))
    separator = "," if kind == ".csv" else "\t"
    header = [f"{name}:token" for name in names] if kind == ".inter" else names
    return written(path, "".join(separator.join(map(str, row)) + "\n" for row in [header, *rows]))


def read(path: Path, max_bad_share: float = 0.0, session: str | None = None, **given: str):
    return own.read_interactions(path, NONE | given, session, max_bad_share)


@pytest.mark.parametrize("ending", ["parquet", "csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "inter", "inter.gz"])
def test_all_formats_give_the_same_interactions(tmp_path, ending):
    path = clicks(tmp_path / f"clicks.{ending}")
    files.check_format(path)
    table, counts = read(path)
    assert list(table.select("user", "item", "timestamp").iter_rows()) == CLICKS
    assert table["line"].to_list() == list(range(36)) and table["rating"].null_count() == 36
    assert counts["lines"] == 36 and counts["malformed"] == 0 and counts["times"]["unit"] == "s"


@pytest.mark.parametrize("names", [
    ("userId", "asin", "unixReviewTime"), ("visitor", "sku", "ts"), ("Reviewer-ID", "Product ID", "Date"),
    ("customer_id", "article_id", "t_dat")])
def test_usual_columns_are_recognised(tmp_path, names):
    table, counts = read(clicks(tmp_path / "c.csv", names=names))
    assert table.height == 36 and counts["columns"] == dict(zip(("user", "item", "time"), names))


def test_columns_that_are_named(tmp_path):
    path = clicks(tmp_path / "c.csv", names=("who", "what", "when"))
    assert read(path, user="who", item="what", time="when")[0].height == 36
    with pytest.raises(UserError, match=r"known as the user; it has who, what, when.*data\.columns\.user"):
        read(path)
    with pytest.raises(UserError, match=r"no column whom \(data\.columns\.user\); the nearest is who"):
        read(path, user="whom")


def test_sessions_by_a_column(tmp_path):
    rows = [("U1", "I1", START, "S1"), ("U1", "I2", START, "S2"), ("U2", "I1", START, "S2")]
    path = clicks(tmp_path / "c.csv", rows, ("user_id", "item_id", "timestamp", "visit"))
    assert read(path, session="visit")[0]["user"].to_list() == ["S1", "S2", "S2"]
    with pytest.raises(UserError, match=r"no column visits \(data\.session\); the nearest is visit"):
        read(path, session="visits")


def test_ids_are_texts_as_they_are_written(tmp_path):
    rows = [(1, 7, START), (2, 8, START)]
    for ending in ("parquet", "csv", "jsonl"):
        assert read(clicks(tmp_path / f"c.{ending}", rows))[0]["item"].to_list() == ["7", "8"]
    floats = clicks(tmp_path / "f.parquet", [(1.0, 7.0, START), (None, 8.0, START)])
    table, counts = read(floats, 0.5)
    assert table["user"].to_list() == ["1"] and counts["malformed_by_reason"] == {"user_id missing or unreadable": 1}
    assert read(written(tmp_path / "z.csv", f"user,item,ts\n007,01,{START}\n"))[0].row(0)[:2] == ("007", "01")


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    path = written(tmp_path / "c.csv",
                   f"user,item,ts\nA,B,{START}\n,B,{START}\nA, ,{START}\nA,B,soon\nA,B\nA,B,{START},x\n")
    table, counts = read(path, 1.0)
    assert table["line"].to_list() == [0, 5]
    assert counts["malformed_by_reason"] == {"item missing or unreadable": 1, "ts missing or unreadable": 2,
                                             "user missing or unreadable": 1}
    with pytest.raises(UserError, match=r"4 of 6 lines are malformed.*filter\.max_bad_share"):
        read(path, 0.5)
    lines = [json.dumps({"user": "A", "item": 3, "ts": START}), "oops", "[1]", json.dumps({"user": True, "item": "B",
             "ts": START}), json.dumps({"user": ["A"], "item": "B", "ts": 1.5e9})]
    table, counts = read(written(tmp_path / "c.jsonl", "\n".join(lines)), 1.0)
    assert table.rows() == [("A", "3", START, None, 0)]
    assert counts["malformed_by_reason"] == {"no JSON object": 2, "user missing or unreadable": 2}


@pytest.mark.parametrize("text", [
    "2014-01-01T00:00:00Z", "2014-01-01 00:00:00", "2014-01-01", "2014/01/01", "2014-01-01T02:00:00.000+02:00",
    "2013-12-31T19:00:00-0500", "2014-01-01 00:00", "2014-01-01 00:00:00 UTC", "1388534400.0", "1.3885344e9",
    "1388534400000000"])
def test_dates_and_numbers_are_the_same_moment(text):
    micro, = own.moments(pl.Series("t", [text])).to_list()
    assert micro == START * 1_000_000


def test_parquet_dates_are_read(tmp_path):
    frame = pl.DataFrame({"user": ["A"] * 2, "item": ["B", "C"], "time": [START, START + 86_400]})
    for number, kind in enumerate((pl.Datetime("ms"), pl.Datetime("ns", "UTC"), pl.Date)):
        path = tmp_path / f"{number}.parquet"
        frame.with_columns(pl.from_epoch("time").cast(kind)).write_parquet(path)
        table, counts = read(path)
        assert table["timestamp"].to_list() == [START * 1_000_000, (START + 86_400) * 1_000_000]
        assert counts["times"]["unit"] == "us"


def numbers(*values: int | None) -> pl.Series:
    return pl.Series("t", values, pl.Int64)


def test_mixed_units_end_in_the_finest_and_zero_is_no_date():
    unified, counts = times.in_one_unit(numbers(START, START * 1000 + 5, 0, None, START + 1, 77))
    assert unified.to_list() == [START * 1000, START * 1000 + 5, None, None, (START + 1) * 1000, None]
    assert counts == {"unit": "ms", "converted": {"s": 2}, "no_date": 2, "future": 0}
    assert len(times.remarks("f", counts)) == 2
    unified, counts = times.in_one_unit(numbers(START, START * 10**9 + 1999))
    assert unified.to_list() == [START * 10**6, START * 10**6 + 1]
    assert counts["converted"] == {"s": 1, "ns": 1}


def test_one_unit_stays_and_an_order_is_no_date():
    for factor, unit in ((1, "s"), (1000, "ms"), (10**6, "us")):
        plain = numbers(START * factor, (START + 5) * factor)
        assert times.in_one_unit(plain)[0].equals(plain) and times.in_one_unit(plain)[1]["unit"] == unit
    order = numbers(0, 1, 2, 86_400)
    unified, counts = times.in_one_unit(order)
    assert unified.equals(order) and counts["unit"] == "order" and counts["no_date"] == 0


def test_times_after_today_are_counted():
    day = times.DAY
    counts = times.in_one_unit(numbers(START, START + day - 1, START + 2 * day, START + 90 * day), now=START)[1]
    assert counts["future"] == 2


ITEMS = {
    "i.csv": "item_id,title,brand,category,description\nI1,Pen,Acme,Office > Pens,Blue.\n",
    "i.tsv": "sku\tname\tmanufacturer\tcategory_name\ttext\nI1\tPen\tAcme\tOffice|Pens\tBlue.\n",
    "i.item": "item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\tdescription:token_seq\n"
              "I1\tPen\tAcme\tOffice > Pens\tBlue.\n",
    "i.jsonl": json.dumps({"id": "I1", "title": "Pen", "store": "Acme", "categories": [["Office", "Pens"]],
                           "features": ["Blue."]}),
}


@pytest.mark.parametrize("name", ITEMS)
def test_all_formats_give_the_same_items(tmp_path, name):
    rows, counts = own.read_items(written(tmp_path / name, ITEMS[name]), NONE, {"I1"}, 0)
    assert rows == {"I1": {"title": "Pen", "brand": "Acme", "category": "Office > Pens", "description": ["Blue."]}}
    assert counts["lines"] == 1


def test_lists_and_numbers_in_parquet_items(tmp_path):
    path = tmp_path / "i.parquet"
    pl.DataFrame({"item_id": [1, 2], "title": ["Pen", None], "category": [["Office", "Pens"], []]}).write_parquet(path)
    rows, counts = own.read_items(path, NONE, {"1", "2"}, 0)
    assert rows["1"]["category"] == "Office > Pens" and rows["2"]["title"] == ""
    assert counts["titles_missing_or_no_text"] == 1


def test_of_an_items_rows_the_first_counts_and_others_are_not_read(tmp_path):
    path = written(tmp_path / "i.csv", "item,title\nI9,Other\nI1,Pen\nI1,Pencil\n,Nothing\n")
    rows, counts = own.read_items(path, NONE, {"I1"}, 1.0)
    assert rows["I1"]["title"] == "Pen" and len(rows) == 1
    assert (counts["repeated"], counts["malformed"], counts["other_item"]) == (1, 1, "I9")
    with pytest.raises(UserError, match=r"title, brand, category or description.*data\.columns\.title"):
        own.read_items(written(tmp_path / "n.csv", "item,price\nI1,3\n"), NONE, {"I1"}, 0)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("c.parquet", b"user,item\n", "plain text, not Parquet"), ("c.csv", b"PAR1....", "Parquet, not text"),
    ("c.csv.gz", b"user,item\n", "plain text, not gzip"), ("c.csv", gzip.compress(b"user", mtime=0), "gzip, not text"),
    ("c.csv", b"PK\x03\x04", "Excel"), ("c.csv", b"", "empty"), ("c.csv", b"\n \n", "empty"),
    ("c.jsonl", b'[{"user": 1}]', "one JSON object a line"), ("c.jsonl", b"user,item\n", "one JSON object a line"),
    ("c.csv", b'{"user": 1}\n', "looks like JSON"), ("c.inter", b"user\titem\n", "name:type"),
    ("c.xlsx", b"x", "ending"), ("c", b"x", "ending"), ("c.parquet.gz", b"x", "ending"), ("c.csv", b"<html>", "HTML"),
])
def test_a_file_that_is_not_what_its_ending_says(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        files.check_format(path)


TITLES = "item_id,title\n" + "".join(f"I{i},Pen {i}\n" for i in range(6))


def test_the_stages_read_files_of_ones_own(tmp_path):
    clicks(tmp_path / "shop.csv")
    written(tmp_path / "goods.csv", TITLES)
    own_files = {"dataset": "files", "interactions": "shop.csv", "items": str(tmp_path / "goods.csv")}
    result = run(tmp_path, *STAGES, data=own_files)
    assert result.returncode == 0, result.stderr
    source = artifacts.read_json(tmp_path / "data/raw/source.json")
    assert source["files"]["meta"]["origin"] == "goods.csv" and len(source["files"]["reviews"]["sha256"]) == 64
    assert str(tmp_path) not in (tmp_path / "data/raw/source.json").read_text()
    assert (tmp_path / "data/raw/interactions.csv").read_bytes() == (tmp_path / "shop.csv").read_bytes()
    assert pl.read_parquet(tmp_path / "data/core/items.parquet")["title"].to_list() == [f"Pen {i}" for i in range(6)]
    found = artifacts.read_json(tmp_path / "reports/metrics/filter.json")["summary"]
    assert (found["rows"], found["users"], found["items"]) == (36, 6, 6)
    assert (found["first"], found["last"], found["share_with_text"]) == ("2014-01-01", "2014-01-06", 1)
    assert found["examples"][0] == {"item": "I0", "time": "2014-01-01", "title": "Pen 0"}
    assert pl.read_parquet(tmp_path / "data/sessions/test.parquet").height == 6


def test_dvc_notices_that_a_file_changed(tmp_path):
    path = clicks(tmp_path / "shop.csv")
    link = tmp_path / "repository/data/.watched/interactions.csv"
    link.parent.parent.parent.mkdir()
    data = {"dataset": "files", "interactions": "../shop.csv"}
    assert run(tmp_path / "repository", "download", data=data).returncode == 0
    before = artifacts.digest(link.parent)
    clicks(path, CLICKS[:-1])
    assert artifacts.digest(link.parent) != before
    assert {link.name} == {p.name for p in link.parent.iterdir()}
    ignored = subprocess.run(["git", "check-ignore", "-q", "data/.watched/interactions.csv"], cwd=ROOT)
    kept = subprocess.run(["git", "check-ignore", "-q", "data/.watched/.gitignore"], cwd=ROOT)
    assert (ignored.returncode, kept.returncode) == (0, 1)


def test_what_is_wrong_with_files_of_ones_own_is_one_sentence(tmp_path):
    clicks(tmp_path / "shop.csv")
    data = {"dataset": "files", "interactions": "shop.csv", "items": "goods.csv"}
    refused(run(tmp_path, "download", data={"dataset": "files"}), "data.interactions")
    refused(run(tmp_path, "download", data=data), "data.items=goods.csv")
    written(tmp_path / "goods.csv", TITLES.replace("\nI", "\nX"))
    refused(run(tmp_path, "download", "filter", data=data), "6 of 6 items have no text", "'I0'", "'X0'",
            "filter.max_textless_share=0.5", "data.columns")
    refused(run(tmp_path, "filter", data=data | {"columns": NONE | {"time": "timestmp"}}), "data.columns.time",
            "timestamp")


def test_texts_beside_the_interactions(tmp_path):
    rows = [(*row, f"Pen {row[1]}", "I write with it every day.") for row in CLICKS]
    clicks(tmp_path / "shop.jsonl", rows, ("user_id", "item_id", "timestamp", "title", "text"))
    result = run(tmp_path, "download", "filter", data={"dataset": "files", "interactions": "shop.jsonl"})
    assert result.returncode == 0, result.stderr
    items = pl.read_parquet(tmp_path / "data/core/items.parquet")
    assert items["text"][0] == items["title"][0] == "Pen I0", "what a user said of an item does not describe it"


def test_a_damaged_file_is_one_sentence(tmp_path):
    path = clicks(tmp_path / "c.parquet")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"c\.parquet cannot be read"):
        read(path)
    path = clicks(tmp_path / "c.csv.gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"c\.csv\.gz"):
        read(path)


def test_windows_files_and_other_separators(tmp_path):
    path = written(tmp_path / "c.csv", f"\ufeffuser;item;ts\r\nA;B;{START}\r\n\"C;D\";E;{START}\r\n")
    assert [row[:2] for row in read(path)[0].iter_rows()] == [("A", "B"), ("C;D", "E")]
