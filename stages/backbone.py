"""Resolve the language model of the prompts and the text encoder, which turns every item's text into a vector, frozen.

Reads:  data/core/items.parquet; llm.name and text_encoder.name: a hub id, a local folder, or `scratch`
Writes: models/backbone/ (config, weights as safetensors, tokenizer, backbone.json), models/text_encoder/ (the same,
        text_encoder.json, item_text.safetensors: vectors [V+1, H]; where text_encoder.name is null its model is that
        of the prompts), reports/metrics/backbone.json, reports/metrics/cost/backbone.json,
        reports/curves/backbone_{steps,epochs}.csv (without rows unless a model was trained here)
Params: seed, llm, text_encoder, data.max_session
"""
from llmgr.pipeline.stage import run

READS = ("seed", "llm", "text_encoder", "data.max_session")


def main(params) -> None:
    import time
    from pathlib import Path

    import torch

    from llmgr.language_model.loading import check_prompts, check_weights, load_language_model, load_tokenizer
    from llmgr.language_model.resolve import describe, link_model, resolve
    from llmgr.language_model.scratch import train_scratch
    from llmgr.params.loading import flat
    from llmgr.runtime.artifacts import replacing_folder, save_tensors, write_json
    from llmgr.runtime.layout import Layout
    from llmgr.runtime.resume import resume_folder
    from llmgr.text.items import item_texts
    from llmgr.text.vectors import encode_texts
    from llmgr.training.engine import finish
    from llmgr.training.job import Progress
    from llmgr.training.precision import device_of

    files, trained = Layout("data", "models", "reports"), None
    texts = item_texts(files.items, "text")
    resume = resume_folder("backbone", flat(params), [files.items])

    def obtained(section: str, folder: Path) -> tuple:
        """Put the model that a section names into `folder`: what is known of it, the model, its tokenizer."""
        nonlocal trained
        name, revision = getattr(params, section).name, getattr(params, section).revision
        if name == "scratch":
            trained = train_scratch(texts, params.llm.scratch, folder, resume, params.seed,
                                    max_positions=32 + 12 * params.data.max_session)
            origin = {"name": name, "revision": "trained on this catalogue's texts"}
        else:
            origin = resolve(name, revision, folder, section)
        called = f"{section}.name={name}"
        model, tokenizer = load_language_model(folder, called=called), load_tokenizer(folder, called)
        check_weights(model, tokenizer, called)
        return origin, model, tokenizer

    def recorded(origin: dict, model: torch.nn.Module, path: Path) -> dict:
        """Write what is known of a model beside it; what of that the metrics hold."""
        record = {**origin, **describe(path.parent)}
        write_json(path, record)
        return {**{key: record[key] for key in ("name", "revision", "architecture", "attention")},
                "parameters": sum(p.numel() for p in model.parameters())}

    with replacing_folder(files.backbone) as folder, replacing_folder(files.text_encoder) as encoder:
        origin, model, tokenizer = obtained("llm", folder)
        check_prompts(model, f"llm.name={params.llm.name}")
        one = one_model(params)
        if one:
            link_model(folder, encoder)
        metrics = recorded(origin, model, folder / "backbone.json")
        if not one:
            del model  # one at a time in memory
            origin, model, tokenizer = obtained("text_encoder", encoder)
        start = time.monotonic()
        vectors = encode_texts(model.to(device_of()), tokenizer, texts, params.text_encoder.max_text_tokens)
        padded = torch.cat((torch.zeros_like(vectors[:1]), vectors))
        save_tensors(encoder / "item_text.safetensors", {"vectors": padded})
        own = recorded(origin, model, encoder / "text_encoder.json")
    metrics |= {} if one else {"text_encoder": own}
    write_json(files.metrics("backbone"), metrics | {"items_encoded": len(texts)})
    if trained is None:
        seconds = time.monotonic() - start
        trained = Progress(seconds=seconds, training_seconds=seconds, samples=len(texts)), model
    finish(*trained, name="backbone", resume=resume, reports=Path(files.reports))


def one_model(params) -> bool:
    """Whether the language model of the prompts encodes the item texts, too."""
    prompts, reader = params.llm, params.text_encoder
    same = reader.name == prompts.name and (reader.name == "scratch" or reader.revision == prompts.revision)
    return reader.name is None or same


if __name__ == "__main__":
    run(main, __doc__, READS)
