"""download, filter and split as a user runs them: processes in a folder with a params.yaml."""
from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import polars as pl
import pytest
from data_stages import STAGES, refused, run
from machine import ROOT, within

from llmgr.runtime import artifacts

MIRROR = ROOT.parent / "shared/amazon"
OUTPUTS = ("data/core/interactions.parquet", "data/core/items.parquet", "data/sessions/train.parquet",
           "data/sessions/valid.parquet", "data/sessions/test.parquet", "data/raw/source.json",
           "reports/metrics/filter.json", "reports/metrics/split.json")


def mirror(folder: Path, reviews: list[tuple[str, str, int]], meta: list[dict], extra: tuple[str, ...] = ()) -> Path:
    """A mirror folder of the office dataset: reviews (user, item, day) and metadata as 2014 literals."""
    target = folder / "mirror"
    target.mkdir()
    lines = [json.dumps({"reviewerID": u, "asin": i, "unixReviewTime": day * 86400}) for u, i, day in reviews]
    for name, content in (("reviews_Office_Products_5.json.gz", [*lines, *extra]),
                          ("meta_Office_Products.json.gz", [repr(row) for row in meta])):
        (target / name).write_bytes(gzip.compress("\n".join(content).encode() + b"\n", mtime=0))
    return target


def square(users: int = 6, items: int = 6) -> list[tuple[str, str, int]]:
    return [(f"U{u}", f"I{i}", i) for u in range(users) for i in range(items)]


OFFICE = {"dataset": "office", "mirror": "mirror"}
PENS = [{"asin": f"I{i}", "title": f"Pen {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    result = run(folder, *STAGES)
    assert result.returncode == 0, result.stderr
    return folder


def test_outputs_have_the_agreed_columns(sample):
    items = pl.read_parquet(sample / "data/core/items.parquet")
    interactions = pl.read_parquet(sample / "data/core/interactions.parquet")
    assert items.schema == {
        "item_id": pl.Int32, "item": pl.String, "title": pl.String, "brand": pl.String, "category": pl.String,
        "description": pl.String, "text": pl.String, "count": pl.Int32}
    assert interactions.schema == {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "rating": pl.Float32,
                                   "line": pl.Int64}
    assert items["item_id"].to_list() == list(range(1, items.height + 1))
    assert items["item"].to_list() == sorted(set(interactions["item"]))
    assert interactions.equals(interactions.sort("user", "timestamp", "line"))
    counts = dict(interactions.group_by("item").len().iter_rows())
    assert dict(items.select("item", "count").iter_rows()) == counts
    assert min(counts.values()) >= 5 and interactions.group_by("user").len()["len"].min() >= 5
    assert items["text"].str.len_chars().min() > 0 and "unknown item" in items["text"]
    assert items["text"].str.len_chars().max() <= 600


def test_sessions_tell_every_interaction_once(sample):
    interactions = pl.read_parquet(sample / "data/core/interactions.parquet")
    names = ("train", "valid", "test")
    train, valid, test = (pl.read_parquet(sample / f"data/sessions/{name}.parquet") for name in names)
    users = interactions["user"].n_unique()
    assert test.height == valid.height == users
    assert train.height == interactions.height - 3 * users
    assert test["user"].to_list() == sorted(set(interactions["user"]))
    history = test.select("user", whole=pl.concat_list("earlier", "items", pl.col("target").cast(pl.Int32)))
    ids = dict(pl.read_parquet(sample / "data/core/items.parquet", columns=["item", "item_id"]).iter_rows())
    bought = interactions.group_by("user").agg("item").sort("user")
    for items, session in zip(bought["item"], history["whole"]):
        assert sorted(ids[item] for item in items) == sorted(session)


def test_unseen_items_are_held_out_of_training_with_all_their_interactions(sample, tmp_path):
    result = run(tmp_path, *STAGES, filter={"unseen_share": 0.05}, tower={"enabled": True, "encoder": "tokens"})
    assert result.returncode == 0, result.stderr

    def table(name, folder=tmp_path):
        return pl.read_parquet(folder / f"data/{name}.parquet")

    core, unseen = table("core/items"), table("core/unseen_items")
    assert len(unseen) == round(0.05 * (len(core) + len(unseen)))
    assert core["item_id"].to_list() == list(range(1, len(core) + 1))
    assert unseen["item_id"].to_list() == list(range(len(core) + 1, len(core) + len(unseen) + 1))
    whole = table("core/items", sample).drop("item_id")
    assert pl.concat([core, unseen]).drop("item_id").sort("item").equals(whole)
    held = table("core/interactions")["item"].is_in(unseen["item"].to_list())
    assert not held.any() and table("core/unseen_interactions")["item"].is_in(unseen["item"].to_list()).all()
    for split in ("train", "valid", "test"):
        assert max(table(f"sessions/{split}")["items"].explode().max(), table(f"sessions/{split}")["target"].max()
                   ) <= len(core)
    names = dict(pl.concat([core, unseen]).select("item_id", "item").rows())
    before = dict(table("core/items", sample).select("item_id", "item").rows())
    expected = {row["user"]: ([before[n] for n in row["items"]], before[row["target"]])
                for row in table("sessions/test", sample).iter_rows(named=True)}
    ending = {row["user"]: ([names[n] for n in row["items"]], names[row["target"]])
              for row in table("sessions/unseen").iter_rows(named=True)}
    assert ending == {user: found for user, found in expected.items() if found[1] in set(unseen["item"])}
    assert ending, "some sessions end in them"
    assert run(tmp_path, "filter", "split").returncode == 0
    assert not [path for path in (tmp_path / "data").rglob("*unseen*")], "nothing of another run is left"


def test_items_are_held_out_only_where_their_texts_will_be_read(tmp_path):
    refused(run(tmp_path, "filter", filter={"unseen_share": 0.05}), "filter.unseen_share", "tower.encoder=tokens")


def test_metrics_say_what_was_done(sample):
    metrics = artifacts.read_json(sample / "reports/metrics/filter.json")
    interactions = pl.read_parquet(sample / "data/core/interactions.parquet")
    assert metrics["after"] == {"users": interactions["user"].n_unique(), "items": interactions["item"].n_unique(),
                                "interactions": interactions.height}
    assert metrics["before"]["interactions"] == metrics["reviews"]["lines"] - metrics["reviews"]["malformed"]
    assert metrics["rounds"] >= 2 and metrics["duplicates_dropped"] > 0
    assert 0.9 < metrics["share_with"]["title"] < 1
    split = artifacts.read_json(sample / "reports/metrics/split.json")
    assert split["train_prefixes"] == pl.read_parquet(sample / "data/sessions/train.parquet").height
    assert 0.2 < split["tied_timestamps_share"] < 0.7


def test_same_bytes_again_and_with_more_threads(sample, tmp_path):
    assert run(tmp_path, *STAGES, threads=2).returncode == 0
    for name in OUTPUTS:
        assert (tmp_path / name).read_bytes() == (sample / name).read_bytes(), name


def test_nothing_written_names_the_machine(sample):
    for name in OUTPUTS:
        assert str(sample).encode() not in (sample / name).read_bytes()


@pytest.mark.skipif(not MIRROR.exists(), reason="the real data are not here")
def test_beauty_gives_the_published_counts(tmp_path):
    with within(20, "5 s on two free cores of a machine of today"):
        result = run(tmp_path, *STAGES, data={"dataset": "Beauty", "mirror": str(MIRROR)})
    assert result.returncode == 0, result.stderr
    metrics = artifacts.read_json(tmp_path / "reports/metrics/filter.json")
    assert metrics["after"] == metrics["published"] == {"users": 22_363, "items": 12_101, "interactions": 198_502}
    split = artifacts.read_json(tmp_path / "reports/metrics/split.json")
    assert (split["train_prefixes"], split["test_sessions"]) == (131_413, 22_363)
    for name in ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"):
        assert (tmp_path / "data/raw" / name).read_bytes() == (MIRROR / name).read_bytes()
    assert str(MIRROR) not in (tmp_path / "data/raw/source.json").read_text()


@pytest.mark.skipif(not MIRROR.exists(), reason="the real data are not here")
def test_office_keeps_its_users_tied_days(tmp_path):
    assert run(tmp_path, *STAGES, data={"dataset": "office", "mirror": str(MIRROR)}).returncode == 0
    metrics = artifacts.read_json(tmp_path / "reports/metrics/filter.json")
    assert metrics["after"] == metrics["published"] == {"users": 4_905, "items": 2_420, "interactions": 53_258}
    rows = pl.read_parquet(tmp_path / "data/core/interactions.parquet")
    tied = rows.filter(pl.len().over("user", "timestamp") > 1)
    assert tied["user"].n_unique() == 3_381


def test_unknown_dataset(tmp_path):
    refused(run(tmp_path, "download", data={"dataset": "beuty"}), "data.dataset=beuty", "beauty")


def test_mirror_without_the_file(tmp_path):
    (tmp_path / "mirror").mkdir()
    refused(run(tmp_path, "download", data=OFFICE), "data.mirror=mirror", "reviews_Office_Products_5.json.gz")
    refused(run(tmp_path, "download", data=OFFICE | {"mirror": "nowhere"}), "data.mirror=nowhere")


def test_truncated_file(tmp_path):
    file = mirror(tmp_path, square(), PENS) / "meta_Office_Products.json.gz"
    file.write_bytes(file.read_bytes()[:-9])
    refused(run(tmp_path, "download", data=OFFICE), "meta_Office_Products.json.gz", "cut short")
    assert not (tmp_path / "data/raw/source.json").exists()


def test_wrong_checksum(tmp_path):
    name = "meta_Office_Products.json.gz"
    file = mirror(tmp_path, square(), PENS) / name
    refused(run(tmp_path, "download", data=OFFICE | {"sha256": {name: "0" * 64}}), name, "SHA-256")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert run(tmp_path, "download", data=OFFICE | {"sha256": {name: digest}}).returncode == 0
    said = run(tmp_path, "download", data=OFFICE | {"sha256": {"meta_Ofice.json.gz": digest}}).stderr
    assert "warning: data.sha256 has meta_Ofice.json.gz, which data.dataset=office does not fetch" in said


def test_html_page_in_place_of_data(tmp_path):
    name = "meta_Office_Products.json.gz"
    (mirror(tmp_path, square(), PENS) / name).write_text("\n<html><body>Sign in</body></html>")
    refused(run(tmp_path, "download", data=OFFICE), name, "HTML")


def test_malformed_lines_are_refused_or_counted(tmp_path):
    mirror(tmp_path, square(), PENS, extra=("no JSON", '{"asin": "I1"}'))
    refused(run(tmp_path, "download", "filter", data=OFFICE), "2 of 38 lines", "1 not JSON", "1 reviewerID missing",
            "filter.max_bad_share=0.01")
    assert run(tmp_path, "filter", data=OFFICE, filter={"max_bad_share": 0.1}).returncode == 0
    counts = artifacts.read_json(tmp_path / "reports/metrics/filter.json")["reviews"]
    assert counts["malformed_by_reason"] == {"not JSON": 1, "reviewerID missing": 1}


def test_titles_that_are_empty_or_no_text_and_items_without_text(tmp_path):
    titles = [{"asin": "I0", "title": ""}, {"asin": "I1", "title": 7}, {"asin": "I2"}, {"asin": "I3", "title": "<br>"},
              {"asin": "I4", "title": "Pen"}]
    mirror(tmp_path, square(), titles)
    assert run(tmp_path, "download", "filter", data=OFFICE, filter={"max_textless_share": 0.9}).returncode == 0
    table = pl.read_parquet(tmp_path / "data/core/items.parquet")
    assert table["text"].to_list() == ["unknown item"] * 4 + ["Pen", "unknown item"]
    assert table["title"].to_list() == ["", "", "", "", "Pen", ""]
    metrics = artifacts.read_json(tmp_path / "reports/metrics/filter.json")
    assert metrics["metadata"]["titles_missing_or_no_text"] == 3
    assert (metrics["items_without_text"], metrics["items_without_metadata"]) == (5, 1)


def test_metadata_of_other_items_is_refused(tmp_path):
    mirror(tmp_path, square(), [row | {"asin": f"X{n}"} for n, row in enumerate(PENS)])
    refused(run(tmp_path, "download", "filter", data=OFFICE), "6 of 6 items have no text", "'I0'", "'X0'",
            "filter.max_textless_share=0.5")
    assert run(tmp_path, "filter", data=OFFICE, filter={"max_textless_share": 1}).returncode == 0


def test_items_without_text_can_be_dropped_before_the_core(tmp_path):
    rows = square(6, 6) + [("V", f"I{i}", 1) for i in range(5)]  # V keeps four items when I0 goes
    mirror(tmp_path, rows, PENS[1:])
    assert run(tmp_path, "download", "filter", data=OFFICE, filter={"textless": "drop"}).returncode == 0
    table = pl.read_parquet(tmp_path / "data/core/interactions.parquet")
    assert set(table["item"]) == {f"I{i}" for i in range(1, 6)}
    assert set(table["user"]) == {f"U{u}" for u in range(6)}
    ids = pl.read_parquet(tmp_path / "data/core/items.parquet", columns=["item_id", "item"])
    assert ids.rows() == [(i, f"I{i}") for i in range(1, 6)]


def test_a_dataset_that_the_core_empties(tmp_path):
    mirror(tmp_path, square(4, 4), PENS)
    refused(run(tmp_path, "download", "filter", data=OFFICE), "filter.core=5", "office")
    assert not (tmp_path / "data/core").exists()


def test_sessions_of_one_item_and_two_items_stay_in_training(tmp_path):
    mirror(tmp_path, [("A", "I0", 1), ("B", "I0", 1), ("B", "I1", 2), *(("C", f"I{i}", i) for i in range(4))], PENS)
    assert run(tmp_path, *STAGES, data=OFFICE, filter={"core": 1}).returncode == 0
    train, test = (pl.read_parquet(tmp_path / f"data/sessions/{name}.parquet") for name in ("train", "test"))
    assert train.rows() == [("B", [1], 2), ("C", [1], 2)]
    assert test.rows() == [("C", [1, 2, 3], 4, [])]
    metrics = artifacts.read_json(tmp_path / "reports/metrics/split.json")
    assert metrics["users_with_one_interaction"] == 1 and metrics["users_in_training_only"] == 2
    assert metrics["targets_unseen_in_training"] == {"valid": 1, "test": 1}


def test_stages_ask_for_what_is_missing(tmp_path):
    refused(run(tmp_path, "filter"), "data/raw/source.json", "dvc repro")
    refused(run(tmp_path, "split"), "data/core/items.parquet", "dvc repro")
