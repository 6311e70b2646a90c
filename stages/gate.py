"""Fit the gates: scorers fused with weights that depend on how often the candidate item was trained on.

Reads:  models/encoders/, models/tuned/, models/embeddings/, models/backbone/, data/sessions/, data/core/items.parquet
Writes: models/gates/NAME.json for every NAME of gate.fuse (weights and biases by band of training interactions),
        reports/metrics/gate.json (validation metrics, each half of the sessions scored by a gate fitted on the other)
Params: seed, gate, evaluate, model, tune, slit, data.max_session, encoder.names, encoder.controls,
        encoder.control_texts, encoder.linear_controls
"""
from llmgr.stage import run

READS = ("seed", "gate", "evaluate", "model", "tune", "slit", "data.max_session", "encoder.names", "encoder.controls",
         "encoder.control_texts", "encoder.linear_controls")


def main(params) -> None:
    from llmgr.artifacts import replacing_folder, write_json
    from llmgr.evaluation import part, seen_items, training_interactions
    from llmgr.gate import bands, cross_fitted, draw, fit_gate, score_tables
    from llmgr.graph import read_sessions
    from llmgr.stage import say
    from llmgr.training import device_of

    device, settings = device_of(), params.gate
    makers = {name: part(name, params, device) for parts in settings.fuse.values() for name in parts}
    valid, frame = read_sessions("data/sessions/valid.parquet", params.data.max_session)
    chosen = draw(len(valid), settings.sessions, params.seed)
    valid, seen = valid.subset(chosen), seen_items(frame)[chosen]
    tables = score_tables(makers, valid.to(device), params.evaluate.batch_size)
    band_V = bands(training_interactions(), settings.edges)
    found = {}
    with replacing_folder("models/gates") as folder:
        for name, parts in settings.fuse.items():
            data = ([tables[part] for part in parts], valid.target, seen, band_V)
            gate = fit_gate(parts, *data, settings.edges)
            gate.save(folder / f"{name}.json")
            found[name] = cross_fitted(parts, *data, settings.edges, params.seed, gate)
            say(f"{name}: validation, cross-fitted, " + "  ".join(
                f"{metric} {found[name]['valid'][metric]:.4f}" for metric in ("hr_at_20", "ndcg_at_20", "mrr_at_20")))
    write_json("reports/metrics/gate.json", found)


if __name__ == "__main__":
    run(main, __doc__, READS)
