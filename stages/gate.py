"""Fit the gates: scorers fused with weights that depend on how often the candidate item was trained on.

Reads:  models/encoders/, models/tuned/, models/embeddings/, models/folds/, models/tower/, models/backbone/,
        models/text_encoder/, data/sessions/, data/core/items.parquet
Writes: models/gates/NAME.json for every NAME of gate.fuse (weights and biases by band of training interactions),
        reports/metrics/gate.json (validation metrics, each half of the sessions scored by a gate fitted on the other),
        reports/metrics/cost/gate.json
Params: seed, gate, evaluate, model, tune, tower.enabled, tower.encoder, tower.decay, slit, data.max_session,
        encoder.names, encoder.controls, encoder.control_texts, encoder.linear_controls
"""
from llmgr.pipeline.stage import run

READS = ("seed", "gate", "evaluate", "model", "tune", "tower.enabled", "tower.encoder", "tower.decay", "slit",
         "data.max_session", "encoder.names", "encoder.controls", "encoder.control_texts", "encoder.linear_controls")


def main(params) -> None:
    import time

    from llmgr.evaluation.baselines import training_interactions
    from llmgr.evaluation.gate import bands, cross_fitted, draw, fit_gate, score_tables
    from llmgr.evaluation.models import parts
    from llmgr.runtime.artifacts import replacing_folder, write_json
    from llmgr.runtime.console import say
    from llmgr.runtime.layout import PIPELINE
    from llmgr.sessions.reading import read_split, seen_items
    from llmgr.training.cost import scoring_cost
    from llmgr.training.precision import device_of

    device, settings, files = device_of(), params.gate, PIPELINE
    start = time.monotonic()
    valid, frame = read_split(files, "valid", params.data.max_session)
    chosen = draw(len(valid), settings.sessions, params.seed)
    valid, seen = valid.subset(chosen), seen_items(frame)[chosen]
    known = parts(params, files, device)
    makers = {name: known[name] for names in settings.fuse.values() for name in names}
    tables, seconds = score_tables(makers, valid.to(device), params.evaluate.batch_size)
    band_V = bands(training_interactions(files), settings.edges)
    band_V, target, seen = (t.to(device) for t in (band_V, valid.target, seen))
    figures = {}
    with replacing_folder("models/gates") as folder:
        for name, fused in settings.fuse.items():
            begun = time.monotonic()
            data = ([tables[part] for part in fused], target, seen, band_V)
            gate = fit_gate(fused, *data, settings.edges)
            gate.save(folder / f"{name}.json")
            figures[name] = cross_fitted(fused, *data, settings.edges, params.seed, gate)
            seconds[name] = time.monotonic() - begun
            say(f"{name}: validation, cross-fitted, " + "  ".join(
                f"{metric} {figures[name]['valid'][metric]:.4f}" for metric in ("hr_at_20", "ndcg_at_20", "mrr_at_20")))
    write_json("reports/metrics/gate.json", figures)
    numbers = sum(len(fused) + 1 for fused in settings.fuse.values()) * (len(settings.edges) + 1)
    write_json("reports/metrics/cost/gate.json", scoring_cost(start, seconds, len(valid) * len(makers), numbers))


if __name__ == "__main__":
    run(main, __doc__, READS)
