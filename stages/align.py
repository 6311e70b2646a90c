"""Stage 1: align nodes with texts. The model is shown candidate nodes and a description and names the node described.

Reads:  models/embeddings/, models/backbone/, models/text_encoder/, data/core/items.parquet
Writes: models/aligned/ (bridge, output layer and LoRA adapters; no frozen weight), reports/metrics/align.json,
        reports/curves/align_{steps,epochs}.csv, reports/metrics/cost/align.json
With align.enabled=false the untrained bridge is written (the paper's RQ3).
Params: seed, model, align, launch
"""
from llmgr.pipeline.stage import run

READS = ("seed", "model", "align", "launch")
INPUTS = ("models/embeddings", "models/backbone", "models/text_encoder", "data/core/items.parquet")


def main(params) -> None:
    from pathlib import Path

    import torch

    from llmgr.language_model.loading import load_tokenizer
    from llmgr.model.align import AlignJob
    from llmgr.model.checkpoint import build_llmgr, save_llmgr
    from llmgr.model.prompts import AlignmentPrompts
    from llmgr.params.loading import flat
    from llmgr.runtime.artifacts import replacing_folder, write_json
    from llmgr.runtime.layout import PIPELINE
    from llmgr.runtime.resume import resume_folder
    from llmgr.text.items import item_texts
    from llmgr.training.distributed import rank
    from llmgr.training.engine import finish, fit
    from llmgr.training.job import Progress
    from llmgr.training.launcher import device as device_of
    from llmgr.training.precision import arithmetic

    settings, files = params.align, PIPELINE
    resume = resume_folder("align", flat(params), INPUTS)
    dtype, device = arithmetic(settings.precision), device_of(params.launch)
    torch.manual_seed(params.seed)
    model = build_llmgr(params.model, files, dtype, params.seed).to(device)
    progress, cut = Progress(), 0
    if settings.enabled:
        model.execution.prepare(settings, params.launch, device)
        shuffle = params.seed if params.model.texts == "shuffled" else None
        texts = item_texts(files.items, "text", shuffle)
        prompts = AlignmentPrompts(load_tokenizer(files.backbone), texts, settings.max_text_tokens)
        job = AlignJob(model, prompts, settings, params.seed, dtype)
        cut = job.cut
        progress = fit(job, settings, seed=params.seed, resume=resume, name="align", strategy=params.launch.strategy)
    if rank():
        return
    with replacing_folder(files.aligned) as folder:
        save_llmgr(folder, model, params.model, files, encoder=False)
    last = progress.epoch_rows[-1] if progress.epoch_rows else {}
    write_json("reports/metrics/align.json", {
        "enabled": settings.enabled, "items": len(model.vectors) - 1, "prompts_cut": cut,
        "chance_candidates": 1 / settings.candidates,
        **{k: last[k] for k in ("train_loss", "accuracy_candidates", "accuracy_items") if k in last}})
    finish(progress, model, name="align", resume=resume, reports=Path("reports"))


if __name__ == "__main__":
    run(main, __doc__, READS, workers=True)
