"""Reduce the raw files to their k-core and clean the items' texts.

Reads:  data/raw/ (found through data/raw/source.json)
Writes: data/core/interactions.parquet (user, item, timestamp as the release has it, rating, line; by user, time, line),
        data/core/items.parquet (item_id from 1 in the order of the item strings, item, title, brand, category,
        description, text, count); with filter.unseen_share the same of the items that are held out, in
        data/core/unseen_{interactions,items}.parquet, with ids that go on; reports/metrics/filter.json
Params: filter, data.columns, data.session

Malformed lines are counted by reason and skipped, up to filter.max_bad_share of a file. The summary that it prints, of
rows, users, items, days, texts, what was dropped and ten examples, is there to be read before anything is trained.
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("filter", "data.columns", "data.session")


def main(params) -> None:
    """Read, drop duplicates, take the core to its fixed point, attach texts, describe the result."""
    import polars as pl

    from llmgr.data import cleaning, interactions, summary
    from llmgr.data.times import remarks
    from llmgr.runtime.artifacts import read_json, require, write_json
    from llmgr.runtime.errors import UserError

    options = params.filter
    source = read_json("data/raw/source.json")
    reviews_file, meta_file = (require(Path("data/raw", source["files"][role]["name"])) for role in ("reviews", "meta"))
    read_reviews, read_metadata = readers(source, params.data, options.max_bad_share)
    raw, read = read_reviews(reviews_file)
    for remark in remarks(reviews_file.name, read["times"]):
        console.say(remark)
    unique = interactions.without_duplicates(raw, options.duplicates)
    core, rounds = interactions.k_core(unique, options.core)
    metadata, meta_read = read_metadata(meta_file, set(core["item"])) if len(core) else ({}, {})
    items = cleaning.item_texts(core["item"].unique().sort().to_list(), metadata, options.template_items,
                                options.max_chars)
    summary.check_texts(items, set(metadata), meta_read.pop("other_item", ""), meta_file.name,
                        options.max_textless_share)
    textless = [row["item"] for row in items if not row["text"]]
    if options.textless == "drop" and textless:
        # The core of a subset lies inside the core of the whole, so that dropping afterwards is the same as before.
        core, more = interactions.k_core(core.filter(~pl.col("item").is_in(textless)), options.core)
        rounds += more
    if core.is_empty():
        raise UserError(f"no user and item of {source['dataset']} has {options.core} interactions with the others: "
                        f"lower filter.core={options.core}")
    core, unseen = interactions.without_unseen(core, options.unseen_share)
    table = write_core(core, unseen, items)

    after = size(core)
    repeated = raw.height - unique.height
    left_textless = int(table["item"].is_in(textless).sum())
    overview = summary.summary(raw, core, table, read, repeated, left_textless)
    write_json("reports/metrics/filter.json", {
        "dataset": source["dataset"],
        "before": size(raw),
        "after": after,
        "published": source["published"],
        "rounds": rounds,
        "duplicates_dropped": repeated,
        "reviews": read,
        "metadata": meta_read,
        "items_without_metadata": sum(row["item"] not in metadata for row in items),
        "items_without_text": len(textless),
        "share_with": {name: table[name].fill_null("").ne("").mean() for name in cleaning.FIELDS[1:5]},
        "mean_text_chars": table["text"].str.len_chars().mean(),
        "mean_session_length": core.height / after["users"],
        "sparsity": 1 - core.height / (after["users"] * after["items"]),
        "summary": overview | {"examples": [{name: text for name, text in row.items() if name != "user"}
                                            for row in overview["examples"]]},  # who it was does not leave the machine
    })
    for line in summary.as_lines(reviews_file.name, overview):
        console.say(line)
    console.say(f"{after['users']} users, {after['items']} items, {after['interactions']} interactions "
              f"after {rounds} rounds")


def write_core(core, unseen, items):
    """Write data/core/: the core's interactions and items, and those held out. Returns the core's table of items."""
    import polars as pl

    from llmgr.data import cleaning
    from llmgr.runtime.artifacts import write_table

    counts = pl.concat([core, unseen]).group_by("item").agg(count=pl.len().cast(pl.Int32))
    table = (
        pl.DataFrame(items, schema=dict.fromkeys(cleaning.FIELDS, pl.String)).join(counts, on="item").sort("item")
        .with_columns(pl.col("text").replace("", cleaning.UNKNOWN),
                      unseen=pl.col("item").is_in(unseen["item"].unique().to_list()))
        .sort("unseen", maintain_order=True).with_columns(item_id=pl.int_range(1, pl.len() + 1, dtype=pl.Int32))
        .select("item_id", *cleaning.FIELDS, "count", "unseen")
    )
    known = table.filter(~pl.col("unseen"))
    for name, rows, of in (("", core, known), ("unseen_", unseen, table.filter("unseen"))):
        for kind, frame in (("interactions", rows), ("items", of.drop("unseen"))):
            path = Path(f"data/core/{name}{kind}.parquet")
            if name and unseen.is_empty():
                path.unlink(missing_ok=True)
            else:
                write_table(path, frame)
    return known


def readers(source, data, max_bad_share):
    """What reads the reviews, and what reads the texts of given items: for a release of Amazon, or files of one's own.
    """
    from functools import partial

    from llmgr.data import amazon, own

    if source["release"] is None:
        columns = vars(data.columns)
        beside = source["files"]["meta"] == source["files"]["reviews"]
        return (partial(own.read_interactions, given=columns, session=data.session, max_bad_share=max_bad_share),
                lambda path, wanted: own.read_items(path, columns, wanted, max_bad_share, beside))
    return (partial(amazon.read_reviews, release=source["release"], max_bad_share=max_bad_share),
            lambda path, wanted: amazon.read_metadata(path, source["release"], wanted, max_bad_share))


def size(frame) -> dict[str, int]:
    return {"users": frame["user"].n_unique(), "items": frame["item"].n_unique(), "interactions": frame.height}


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
