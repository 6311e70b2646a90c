from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from machine import ROOT

from llmgr.data import amazon
from llmgr.runtime.errors import UserError

STAGES = ROOT / "stages"


def written(path: Path, *lines: object) -> Path:
    """A gzip or plain file of JSON lines; strings and bytes stand as they are."""
    raw = b"".join((line if isinstance(line, bytes) else
                    (line if isinstance(line, str) else json.dumps(line)).encode()) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)
    return path


def review(user: object = "A1", item: object = "B1", time: object = 86400, **more: object) -> dict:
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, **more}


@pytest.mark.parametrize(("name", "release", "category"), [
    ("beauty", "2014", "Beauty"), ("Office", "2014", "Office_Products"), ("office_products", "2014", "Office_Products"),
    ("MUSIC", "2018", "Musical_Instruments"), ("Musical Instruments", "2018", "Musical_Instruments"),
    ("pantry", "2018", "Prime_Pantry"), ("Luxury-Beauty", "2018", "Luxury_Beauty"), ("sample", "2018", "Sample"),
    ("2018:Toys_and_Games", "2018", "Toys_and_Games"), ("2023:All_Beauty", "2023", "All_Beauty"),
])
def test_names_of_the_catalogue(name, release, category):
    found = amazon.dataset(name)
    assert (found.release, found.category) == (release, category)


def test_release_and_category_of_a_known_dataset_is_that_dataset():
    assert amazon.dataset("2014:Beauty") is amazon.dataset("beauty")
    assert amazon.dataset("2018:Beauty").published is None, "the 2014 counts are not those of another release"


def test_official_addresses():
    host = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
    assert amazon.dataset("beauty").addresses() == {
        "reviews": host + "reviews_Beauty_5.json.gz", "meta": host + "meta_Beauty.json.gz"}
    addresses = amazon.dataset("2018:Toys_and_Games").addresses()
    assert addresses["reviews"].endswith("/categoryFilesSmall/Toys_and_Games_5.json.gz")
    assert addresses["meta"].endswith("/metaFiles2/meta_Toys_and_Games.json.gz")
    addresses = amazon.dataset("2023:All_Beauty").addresses()
    assert addresses["reviews"].endswith("/resolve/main/raw/review_categories/All_Beauty.jsonl")
    assert addresses["meta"].endswith("/resolve/main/raw/meta_categories/meta_All_Beauty.jsonl")


@pytest.mark.parametrize(("name", "says"), [
    ("beuty", "beauty"), ("ofice", "office"), ("2019:Beauty", "2014, 2018, 2023"), ("2018:../etc", "spell"),
    ("", "known")])
def test_unknown_names_are_refused_with_the_nearest(name, says):
    with pytest.raises(UserError, match=says):
        amazon.dataset(name)


def test_three_formats_give_the_same_interactions(tmp_path):
    rows = [("A1", "B1", 86400, 5.0), ("A1", "B2", 172800, 3.0), ("A2", "B1", 86400, 1.0)]
    old = written(tmp_path / "r.json.gz", *[review(u, i, t, overall=r) for u, i, t, r in rows])
    new = written(tmp_path / "r.jsonl", *[
        {"user_id": u, "parent_asin": i, "asin": "other", "timestamp": t * 1000 + 999, "rating": r}
        for u, i, t, r in rows])
    files = ((old, "2014"), (old, "2018"), (new, "2023"))
    tables = [amazon.read_reviews(path, release, 0)[0] for path, release in files]
    assert list(tables[0].iter_rows()) == [(*row, line) for line, row in enumerate(rows)]
    assert tables[0].equals(tables[1])
    assert tables[2].equals(tables[0].with_columns(pl.col("timestamp") * 1000 + 999)), "milliseconds stay"


def test_ratings_are_optional(tmp_path):
    path = written(tmp_path / "r.json.gz", review(), review("A2", overall=4), review("A3", overall="five"))
    assert amazon.read_reviews(path, "2014", 0)[0]["rating"].to_list() == [None, 4.0, None]


def test_malformed_reviews_are_counted_by_reason(tmp_path):
    path = written(
        tmp_path / "r.json.gz", review(), "{'reviewerID': 'A1'}", "[1]", b'{"reviewerID": "\xff"}', "", review(None),
        review("  "), review(7), review(item=""), review(time=None), review(time="1"), review(time=True),
        review(time=-1), review("A2"))
    table, counts = amazon.read_reviews(path, "2014", 1.0)
    assert table["user"].to_list() == ["A1", "A2"]
    assert table["line"].to_list() == [0, 13]
    assert counts == {"lines": 13, "malformed": 11, "malformed_by_reason": {
        "asin empty": 1, "not JSON": 2, "not an object": 1, "reviewerID empty": 1, "reviewerID missing": 1,
        "reviewerID of a wrong type or range": 1, "unixReviewTime missing": 1,
        "unixReviewTime of a wrong type or range": 3},
        "times": {"unit": "order", "converted": {}, "no_date": 0, "future": 0}}


def test_times_of_other_units_are_converted_and_zero_is_malformed(tmp_path):
    start = 1_388_534_400
    path = written(tmp_path / "r.json.gz", review(time=start), review(time=start * 1000 + 500), review(time=0),
                   review(time=start + 1))
    table, counts = amazon.read_reviews(path, "2014", 0.25)
    assert table["timestamp"].to_list() == [start * 1000, start * 1000 + 500, start * 1000 + 1000]
    assert counts["malformed_by_reason"] == {"unixReviewTime zero or no date": 1}
    assert counts["times"] == {"unit": "ms", "converted": {"s": 2}, "no_date": 1, "future": 0}
    with pytest.raises(UserError, match="zero or no date"):
        amazon.read_reviews(path, "2014", 0.2)


def test_too_many_malformed_lines_are_refused_with_their_counts(tmp_path):
    path = written(tmp_path / "r.json.gz", *[review()] * 97, *["oops"] * 2, review(""))
    assert amazon.read_reviews(path, "2014", 0.03)[1]["malformed"] == 3
    counted = r"3 of 100 lines are malformed \(2 not JSON, 1 reviewerID empty\).*filter.max_bad_share"
    with pytest.raises(UserError, match=counted):
        amazon.read_reviews(path, "2014", 0.029)


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(amazon, "MAX_LINE", 1000)
    path = written(tmp_path / "r.json.gz", review("A1"), "x" * 5500, review("A2"), "y" * 1000)
    table, counts = amazon.read_reviews(path, "2014", 1.0)
    assert table["user"].to_list() == ["A1", "A2"]
    assert counts["malformed_by_reason"] == {"too long": 2}


def test_a_damaged_archive_and_an_empty_one_are_refused(tmp_path):
    path = written(tmp_path / "r.json.gz", *[review(f"A{n}") for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cut short"):
        amazon.read_reviews(path, "2014", 0)
    with pytest.raises(UserError, match="holds no lines"):
        amazon.read_reviews(written(tmp_path / "empty.json.gz"), "2014", 0)


PEN = {"title": "Pen", "brand": "Acme", "category": "Writing > Pens", "description": ["Blue.", "Fine."]}


@pytest.mark.parametrize(("release", "line"), [
    ("2014", "{'asin': 'B1', 'title': 'Pen', 'brand': 'Acme', 'description': 'Blue.\\nFine.', "
             "'categories': [['Office', 'Writing'], ['Office', 'Writing', 'Pens']], "
             "'related': {'also_viewed': ['B2']}}"),
    ("2018", {"category": ["Office", "Writing", "Pens"], "description": ["Blue."], "feature": ["Fine."], "title": "Pen",
              "brand": "Acme", "asin": "B1"}),
    ("2023", {"main_category": "Office", "title": "Pen", "description": ["Blue."], "features": ["Fine."],
              "store": "Acme", "categories": ["Office", "Writing", "Pens"], "parent_asin": "B1"}),
])
def test_three_formats_give_the_same_metadata(tmp_path, release, line):
    found, counts = amazon.read_metadata(written(tmp_path / "m.json.gz", line), release, {"B1"}, 0)
    expected = PEN | {"description": ["Blue.\nFine."]} if release == "2014" else PEN
    assert found == {"B1": expected}
    assert counts["lines"] == 1 and counts["malformed"] == 0


@pytest.mark.parametrize(("item", "line"), [
    ("caf\u00e9", json.dumps({"asin": "caf\u00e9", "title": "Pen"})),
    ('6" ruler', json.dumps({"asin": '6" ruler', "title": "Pen"})),
    ("Juniper's", json.dumps({"asin": "Juniper's", "title": "Pen"})),
    ("Juniper's", """{'asin': "Juniper's", 'title': 'Pen'}"""),
    ("B1", '{ "title": "Pen", "asin": "B1", "price": null }'),
])
def test_ids_and_spaces_of_any_kind_are_read(tmp_path, item, line):
    found, counts = amazon.read_metadata(written(tmp_path / "m.json.gz", line), "2014", {item}, 0)
    assert found[item]["title"] == "Pen" and counts["malformed"] == 0


def test_metadata_oddities_are_tolerated_and_counted(tmp_path):
    path = written(
        tmp_path / "m.json.gz",
        {"asin": "B1", "title": None, "category": "Office", "description": "text", "brand": 3},
        {"asin": "B2", "title": ["a"], "category": ["Office", "<b>x</b>", "y" * 90, "Pens", 5],
         "description": [1, "d"]},
        {"asin": "B3", "title": "  ", "category": []}, {"asin": "B1", "title": "second line of B1"},
        {"asin": "B4", "title": "of no interaction"}, {"title": "no id"}, "{'asin': 'B5', 'title': __import__('os')}",
        "{'asin': 'B5', 'title': " + "(" * 5000, '{"asin": "B5", "title": "cut')
    found, counts = amazon.read_metadata(path, "2018", {"B1", "B2", "B3", "B5"}, 1.0)
    assert found == {
        "B1": {"title": "", "brand": "", "category": "", "description": ["text"]},
        "B2": {"title": "", "brand": "", "category": "Pens", "description": ["d"]},
        "B3": {"title": "  ", "brand": "", "category": "", "description": []}}
    assert counts == {
        "lines": 9, "malformed": 4, "repeated": 1, "titles_missing_or_no_text": 3, "other_item": "B4",
        "malformed_by_reason": {"asin missing or no text": 1, "neither JSON nor a Python literal": 3}}
    with pytest.raises(UserError, match="4 of 9 lines are malformed"):
        amazon.read_metadata(path, "2018", {"B1", "B2", "B3", "B5"}, 0.4)


@pytest.mark.parametrize("value", ["{[1]: 2}", "{{}}", "{{1: 2}: 3}", "-" * 99_000 + "1", "(" * 99_000,
                                   "[" * 50_000 + "]" * 50_000, "9" * 90_000,
                                   "1 + 'a'", "'\\N{nothing}'", "lambda: 0", "f'{1}'", "'\ud800'"])
def test_a_literal_that_cannot_be_built_is_a_malformed_line(tmp_path, value):
    line = f"{{'asin': 'B1', 'title': {value}}}".encode("utf-8", "surrogatepass")
    path = written(tmp_path / "m.json.gz", line, "{'asin': 'B2', 'title': 'Pen'}")
    found, counts = amazon.read_metadata(path, "2014", {"B1", "B2"}, 0.5)
    assert list(found) == ["B2"]
    assert counts["malformed_by_reason"] == {"neither JSON nor a Python literal": 1}


def test_code_in_metadata_is_not_run(tmp_path):
    trap = tmp_path / "ran"
    line = f"{{'asin': 'B1', 'title': open({str(trap)!r}, 'w').write('x')}}"
    found, counts = amazon.read_metadata(written(tmp_path / "m.json.gz", line), "2014", {"B1"}, 1.0)
    assert not trap.exists() and not found and counts["malformed"] == 1


def test_reading_streams(tmp_path):
    """Peak memory stays far below the size of the decompressed file."""
    path, padding = tmp_path / "r.json.gz", "x" * 3000
    lines = b"".join(json.dumps(review(f"A{n}", reviewText=padding)).encode() + b"\n" for n in range(1000))
    with gzip.open(path, "wb", compresslevel=1) as handle:
        for _ in range(80):  # 240 MB
            handle.write(lines)
    script = ("import resource, sys; from pathlib import Path; from llmgr.data import amazon; import orjson, polars;"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
              "table, _ = amazon.read_reviews(Path(sys.argv[1]), '2014', 0); assert table.height == 80_000;"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    environment = {"PYTHONPATH": str(STAGES), "POLARS_MAX_THREADS": "1"}
    grown = subprocess.run([sys.executable, "-c", script, path], env=environment, check=True, capture_output=True,
                           text=True)
    assert int(grown.stdout) * 1024 < 90e6, f"{int(grown.stdout) // 1024} MB for a file of 240 MB"
