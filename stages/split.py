"""Split the core into leave-one-out sessions.

Reads:  data/core/
Writes: data/sessions/{train,valid,test}.parquet (user, items oldest first, target; valid and test also the `earlier`
        items beyond the window); with filter.unseen_share also unseen.parquet: as test has them, the sessions that end
        in an item that training does not know; reports/metrics/split.json
Params: data.max_session, split, tune.linear, encoder.linear_controls (the last two refuse too large a catalogue)

A user's last item is the test target, the second-last the validation target, the rest is training, where every
position from the second on is a target (under split.selection all but the last of them). A user with fewer than three
interactions stays in training whole.
"""
from __future__ import annotations

from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console

READS = ("data.max_session", "split", "tune.linear", "encoder.linear_controls")


def main(params) -> None:
    """Order every user's interactions, cut the three parts, describe them."""
    import polars as pl

    from llmgr.data import interactions
    from llmgr.params.checks import check_pairs
    from llmgr.runtime.artifacts import read_table, write_json, write_table
    from llmgr.runtime.memory import capacity

    items = read_table("data/core/items.parquet", ["item", "item_id"])
    if params.tune.linear or params.encoder.linear_controls:
        check_pairs(len(items), capacity())
    core = read_table("data/core/interactions.parquet")
    rows = interactions.ordered(core, params.split.ties, params.split.seed).join(
        items, on="item", how="left", maintain_order="left"
    )
    parts = interactions.leave_one_out(rows, params.data.max_session, params.split.selection)
    for name, part in parts.items():
        write_table(f"data/sessions/{name}.parquet", part)

    unseen_items, unseen_table = Path("data/core/unseen_items.parquet"), Path("data/sessions/unseen.parquet")
    unseen_table.unlink(missing_ok=True)
    if unseen_items.exists():
        every = interactions.ordered(
            pl.concat([core, read_table("data/core/unseen_interactions.parquet")]), params.split.ties, params.split.seed
        ).join(pl.concat([items, read_table(unseen_items, ["item", "item_id"])]), on="item", maintain_order="left")
        write_table(unseen_table, interactions.unseen_sessions(every, len(items), params.data.max_session))

    lengths = rows.group_by("user").len()["len"]
    trained = pl.concat([parts["train"]["target"], parts["train"]["items"].explode()]).unique()
    unseen = {name: int((~parts[name]["target"].is_in(trained.implode())).sum()) for name in ("valid", "test")}
    write_json("reports/metrics/split.json", {
        "users": len(lengths),
        "train_prefixes": parts["train"].height,
        "valid_sessions": parts["valid"].height,
        "test_sessions": parts["test"].height,
        "users_in_training_only": int((lengths < interactions.LEAST).sum()),
        "users_with_one_interaction": int((lengths == 1).sum()),
        "session_length": {"mean": lengths.mean(), "max": lengths.max()},
        "sessions_cut_to_window": int((parts["test"]["earlier"].list.len() > 0).sum()),
        "targets_unseen_in_training": unseen,
        "tied_timestamps_share": core.select(interactions.tied().mean()).item(),
        "ties": params.split.ties,
    })
    console.say(f"{parts['train'].height} training prefixes, {parts['test'].height} test sessions")


if __name__ == "__main__":
    stage.run(main, __doc__, READS)
