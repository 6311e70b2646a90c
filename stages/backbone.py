"""Resolve the language model and turn every item's text into a vector with it, frozen.

Reads:  data/core/items.parquet; llm.name: a hub id, a local folder, or `scratch`
Writes: models/backbone/ (config, weights as safetensors, tokenizer, backbone.json, item_text.safetensors),
        reports/metrics/backbone.json, reports/metrics/cost/backbone.json, reports/curves/backbone_{steps,epochs}.csv
        (without rows unless the model was trained here)
Params: seed, llm, data.max_session
"""
from llmgr.pipeline.stage import run

READS = ("seed", "llm", "data.max_session")


def main(params) -> None:
    import time
    from pathlib import Path

    import torch

    from llmgr.language_model.loading import check_backbone, load_language_model, load_tokenizer
    from llmgr.language_model.resolve import describe, resolve
    from llmgr.language_model.scratch import train_scratch
    from llmgr.params.loading import flat
    from llmgr.runtime.artifacts import replacing_folder, save_tensors, write_json
    from llmgr.runtime.resume import resume_folder
    from llmgr.text.items import item_texts
    from llmgr.text.vectors import encode_texts
    from llmgr.training.engine import finish
    from llmgr.training.job import Progress
    from llmgr.training.precision import device_of

    texts = item_texts("data/core/items.parquet", "text")
    resume = resume_folder("backbone", flat(params), ["data/core/items.parquet"])
    scratch = None
    with replacing_folder("models/backbone") as folder:
        if params.llm.name == "scratch":
            settings = params.llm.scratch
            scratch = train_scratch(item_texts("data/core/items.parquet", "text"), settings, folder, resume,
                                    params.seed, max_positions=32 + 12 * params.data.max_session)
            origin = {"name": "scratch", "revision": "trained on this catalogue's texts"}
        else:
            origin = resolve(params.llm.name, params.llm.revision, folder)
        start = time.monotonic()
        called = f"llm.name={params.llm.name}"
        model, tokenizer = load_language_model(folder, called=called), load_tokenizer(folder, called)
        check_backbone(model, tokenizer, called)
        vectors = encode_texts(model.to(device_of()), tokenizer, texts, params.llm.max_text_tokens)
        save_tensors(folder / "item_text.safetensors", {"vectors": torch.cat((torch.zeros_like(vectors[:1]), vectors))})
        record = {**origin, **describe(folder)}
        write_json(folder / "backbone.json", record)
    write_json("reports/metrics/backbone.json", {
        "name": record["name"], "revision": record["revision"], "architecture": record["architecture"],
        "attention": record["attention"], "parameters": sum(p.numel() for p in model.parameters()),
        "items_encoded": len(texts)})
    if scratch is None:
        seconds = time.monotonic() - start
        scratch = Progress(seconds=seconds, training_seconds=seconds, samples=len(texts)), model
    finish(*scratch, name="backbone", resume=resume, reports=Path("reports"))


if __name__ == "__main__":
    run(main, __doc__, READS)
