"""Stage 2: tune LLMGR on behaviour, the next item of session graphs, from stage 1's weights.

Reads:  models/aligned/, models/embeddings/, models/folds/, models/tower/, models/backbone/,
        models/text_encoder/, data/sessions/{train,valid}.parquet, data/core/items.parquet
Writes: models/tuned/ (bridge, output layer, adapters, graph encoder, no frozen weight; prior.safetensors: the prior
        as it was fitted before, where tune.linear asks for one; adapter/: LoRA's weights over models/backbone, as
        `peft.PeftModel.from_pretrained` reads them), reports/metrics/tune.json,
        reports/curves/tune_{steps,epochs}.csv, reports/metrics/cost/tune.json
Params: seed, model, tune, tower.enabled, tower.encoder, tower.decay, slit, data.max_session, launch
"""
from llmgr.pipeline.stage import run

READS = ("seed", "model", "tune", "tower.enabled", "tower.encoder", "tower.decay", "slit", "data.max_session", "launch")
INPUTS = ("models/aligned", "models/embeddings", "models/folds", "models/tower", "models/backbone",
          "models/text_encoder", "data/sessions/train.parquet", "data/sessions/valid.parquet",
          "data/core/items.parquet")


def main(params) -> None:
    import time
    from pathlib import Path

    import torch

    from llmgr.language_model.lora import save_adapter
    from llmgr.model.behaviour import BehaviourJob
    from llmgr.model.building import build_ranker, text_smoothing
    from llmgr.model.checkpoint import save_llmgr
    from llmgr.params.loading import flat
    from llmgr.prior.weighted_sum import build_prior
    from llmgr.runtime.artifacts import replacing_folder, save_tensors, write_json
    from llmgr.runtime.layout import PIPELINE
    from llmgr.runtime.resume import resume_folder
    from llmgr.sessions.reading import read_split
    from llmgr.training.distributed import rank
    from llmgr.training.engine import finish, fit
    from llmgr.training.launcher import device as device_of
    from llmgr.training.precision import arithmetic

    settings, files = params.tune, PIPELINE
    resume = resume_folder("tune", flat(params), INPUTS)
    train, valid = (read_split(files, split, params.data.max_session)[0] for split in ("train", "valid"))
    dtype, device = arithmetic(settings.precision), device_of(params.launch)
    train, valid = train.to(device), valid.to(device)
    torch.manual_seed(params.seed)
    begun, prior, fitted = time.monotonic(), None, {}
    if settings.linear:
        prior = build_prior(params, files, train, device)
        prior.fit(train, params.seed, settings.recency)
        fitted = {name: weights.clone() for name, weights in prior.state_dict().items()}
    prepared = time.monotonic() - begun
    model = build_ranker(params, files, dtype, device, prior, weights=files.aligned)
    model.llmgr.unfreeze_encoder(settings.train_encoder)
    model.llmgr.execution.prepare(settings, params.launch, device)
    job = BehaviourJob(model, train, valid, settings, params.seed, text_smoothing(params, files))
    progress = fit(job, settings, seed=params.seed, resume=resume, name="tune", strategy=params.launch.strategy)
    if rank():
        return
    with replacing_folder(files.tuned) as folder:
        save_llmgr(folder, model.llmgr, params.model, files, prior, encoder=True)
        save_adapter(folder / "adapter", model.llmgr.language_model)
        if fitted:
            save_tensors(folder / "prior.safetensors", fitted)
    last = progress.epoch_rows[-1]
    write_json("reports/metrics/tune.json", {
        "epochs": progress.epoch, "prompts": len(job.first), "targets": len(train), "prompts_cut": job.cut,
        "train_loss": last["train_loss"], "valid_loss": last["valid_loss"],
        "valid": {k.removeprefix("valid_"): last[k] for k in last if k.startswith("valid_") and k != "valid_loss"}})
    finish(progress, model, name="tune", resume=resume, reports=Path("reports"), prepared=prepared)


if __name__ == "__main__":
    run(main, __doc__, READS, workers=True)
