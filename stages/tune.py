"""Stage 2: tune LLMGR on behaviour, the next item of session graphs, from stage 1's weights.

Reads:  models/aligned/, models/embeddings/, models/folds/, models/tower/, models/backbone/,
        data/sessions/{train,valid}.parquet, data/core/items.parquet
Writes: models/tuned/ (bridge, output layer, adapters, graph encoder, no frozen weight; start.safetensors: what the
        logits started from, where tune.linear lets them), reports/metrics/tune.json,
        reports/curves/tune_{steps,epochs}.csv, reports/metrics/cost/tune.json
Params: seed, model, tune, tower.enabled, tower.encoder, tower.decay, slit, data.max_session, launch
"""
from llmgr.pipeline.stage import run

READS = ("seed", "model", "tune", "tower.enabled", "tower.encoder", "tower.decay", "slit", "data.max_session", "launch")
INPUTS = ("models/aligned", "models/embeddings", "models/folds", "models/tower", "models/backbone",
          "data/sessions/train.parquet", "data/sessions/valid.parquet", "data/core/items.parquet")


def main(params) -> None:
    import copy
    import time
    from pathlib import Path

    import torch

    from llmgr.model.behaviour import BehaviourJob, alike_items
    from llmgr.model.checkpoint import build_llmgr, load_llmgr, save_llmgr
    from llmgr.model.scorer import behaviour_prompts
    from llmgr.params.loading import flat
    from llmgr.prior.weighted_sum import linear_term
    from llmgr.runtime.artifacts import replacing_folder, save_tensors, write_json
    from llmgr.runtime.resume import resume_folder
    from llmgr.sessions.reading import read_split
    from llmgr.training.distributed import rank
    from llmgr.training.engine import finish, fit
    from llmgr.training.launcher import device
    from llmgr.training.precision import arithmetic

    settings = params.tune
    resume = resume_folder("tune", flat(params), INPUTS)
    train, valid = (read_split(split, params.data.max_session)[0] for split in ("train", "valid"))
    dtype, place = arithmetic(settings.precision), device(params.launch)
    train, valid = train.to(place), valid.to(place)
    torch.manual_seed(params.seed)
    model = build_llmgr(params.model, dtype, params.seed)
    load_llmgr(Path(INPUTS[0]), model, params.model)
    model.unfreeze_encoder(settings.train_encoder)
    started = time.monotonic()
    if settings.linear:
        model.linear_term = linear_term(params, train, place)
        model.linear_term.start(train, params.seed, settings.recency)
        start = copy.deepcopy(model.linear_term.state_dict())
    formed = time.monotonic() - started
    model.prepare(settings, params.launch, place)
    job = BehaviourJob(model.to(place), behaviour_prompts(params, settings), train, valid, settings, params.seed, dtype,
                       alike_items(params))
    progress = fit(job, settings, seed=params.seed, resume=resume, name="tune", strategy=params.launch.strategy)
    if rank():
        return
    with replacing_folder("models/tuned") as folder:
        save_llmgr(folder, model, params.model, encoder=True)
        if settings.linear:
            save_tensors(folder / "start.safetensors", start)
    last = progress.epoch_rows[-1]
    write_json("reports/metrics/tune.json", {
        "epochs": progress.epoch, "prompts": len(job.first), "targets": len(train), "prompts_cut": job.cut,
        "train_loss": last["train_loss"], "valid_loss": last["valid_loss"],
        "valid": {k.removeprefix("valid_"): last[k] for k in last if k.startswith("valid_") and k != "valid_loss"}})
    finish(progress, model, name="tune", resume=resume, reports=Path("reports"), prepared=formed)


if __name__ == "__main__":
    run(main, __doc__, READS, workers=True)
