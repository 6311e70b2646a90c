"""Rank every item for every validation and test session, with every model. The only stage that scores test.

Reads:  models/encoders/, models/tuned/, models/embeddings/, models/folds/, models/tower/, models/backbone/,
        models/text_encoder/, models/gates/, models/recommender/, data/sessions/, data/core/items.parquet
Writes: reports/ranks/MODEL.parquet (a row a test session: target, rank, rank_unseen), reports/ranks/valid/ likewise,
        reports/metrics/evaluate.json (from those ranks), reports/metrics/cost/evaluate.json; with filter.unseen_share
        also reports/ranks/unseen/ and reports/metrics/unseen.json, of sessions that end in an item held out of training
        and added by its text: among all items, and among the items held out (empty without)
Params: split.selection, seed, evaluate, gate, text_encoder.max_text_tokens, model, tune, tower.enabled, tower.encoder,
        tower.decay, slit, data.max_session, encoder.names, encoder.controls, encoder.control_texts,
        encoder.linear_controls
"""
from llmgr.pipeline.stage import run

READS = ("split.selection", "seed", "evaluate", "gate", "text_encoder.max_text_tokens", "model", "tune",
         "tower.enabled", "tower.encoder", "tower.decay", "slit", "data.max_session", "encoder.names",
         "encoder.controls", "encoder.control_texts", "encoder.linear_controls")


def main(params) -> None:
    import time

    import polars as pl

    from llmgr.evaluation.models import loaded
    from llmgr.evaluation.unseen import rank_unseen
    from llmgr.ranking.loop import rank_models
    from llmgr.ranking.metrics import metrics
    from llmgr.runtime.artifacts import replacing_folder, write_json, write_table
    from llmgr.runtime.console import Bar, say
    from llmgr.runtime.errors import UserError
    from llmgr.runtime.layout import PIPELINE
    from llmgr.sessions.reading import read_split, seen_items
    from llmgr.training.cost import scoring_cost
    from llmgr.training.precision import device_of

    if params.split.selection:
        raise UserError("split.selection=true is for choosing on validation, and test is not scored: name gate as the "
                        "last stage (`dvc exp run -S split.selection=true gate`), or set it to false")
    device, files = device_of(), PIPELINE
    start = time.monotonic()
    tables = {split: read_split(files, split, params.data.max_session) for split in ("valid", "test")}
    models = loaded(params, files, device)
    figures = {name: {} for name in models}
    seconds = dict.fromkeys(models, 0.0)
    with replacing_folder("reports/ranks") as folder:
        for split, (sessions, frame) in tables.items():
            here = sessions.to(device)
            bar = Bar(-(-len(here) // params.evaluate.batch_size), 0, f"evaluate: {split}")
            ranks, took = rank_models({name: over(here) for name, over in models.items()}, here,
                                      params.evaluate.batch_size, seen_items(frame), bar)
            bar.close()
            for name, (rank, unseen) in ranks.items():
                write_table(folder / ("valid" if split == "valid" else "") / f"{name}.parquet", pl.DataFrame({
                    "target": sessions.target.int().numpy(), "rank": rank.int().numpy(),
                    "rank_unseen": unseen.int().numpy()}))
                seconds[name] += took[name]
                if split == "valid" and name in params.gate.fuse:
                    continue  # it was fitted on these sessions: reports/metrics/gate.json has the cross-fitted figures
                figures[name] |= {split: {"all": metrics(rank)}, f"{split}_unseen": {"all": metrics(unseen)}}
        unseen = rank_unseen(params, files) if files.unseen_items.exists() else None
        for name, by in unseen.among.items() if unseen else ():
            write_table(folder / "unseen" / f"{name}.parquet", pl.DataFrame({
                "target": unseen.targets.int().numpy(), "rank": by["all"].int().numpy(),
                "rank_unseen": by["all_unseen"].int().numpy(), "rank_new": by["new"].int().numpy()}))
    write_json("reports/metrics/unseen.json", unseen.figures() if unseen else {})
    for name, by in figures.items():
        say(f"{name}: HR@20 {by['test']['all']['hr_at_20']:.4f}  NDCG@20 {by['test']['all']['ndcg_at_20']:.4f}  "
            f"({seconds[name]:.1f} s)")
    for name, by in unseen.figures()["models"].items() if unseen else ():
        say(f"{name}, items added by their texts: HR@20 {by['all']['hr_at_20']:.4f} among all items, "
            f"{by['new']['hr_at_20']:.4f} among {unseen.items:,} added ones")
    write_json("reports/metrics/evaluate.json", figures)
    scored = sum(len(sessions) for sessions, _ in tables.values()) * len(seconds)
    write_json("reports/metrics/cost/evaluate.json", scoring_cost(start, seconds, scored))


if __name__ == "__main__":
    run(main, __doc__, READS)
