"""Pretrain one session encoder on next-item prediction over all training prefixes.

Reads:  data/sessions/{train,valid}.parquet, data/core/items.parquet (their number);
        models/backbone/item_text.safetensors for a control (an encoder whose name ends in -text or -shuffled)
Writes: models/encoders/NAME/ (weights, item vectors, config), reports/metrics/encoders/NAME.json,
        reports/curves/NAME_{steps,epochs}.csv, reports/metrics/cost/NAME.json
Params: seed, data.max_session, encoder.dim, encoder.text_dim, encoder.text_lr, encoder.training, encoder.ENCODER
        (its own section)
"""
from llmgr.stage import run

READS = ("seed", "data.max_session", "encoder.dim", "encoder.text_dim", "encoder.text_lr", "encoder.training",
         "encoder.{encoder}")


def main(params, encoder: str) -> None:
    from pathlib import Path

    import torch

    from llmgr.artifacts import load_tensors, resume_folder, write_json
    from llmgr.encoders import build_recommender, family, save_recommender
    from llmgr.graph import catalogue_size, fitting, read_sessions
    from llmgr.params import flat, with_rate
    from llmgr.pretraining import EncoderJob
    from llmgr.text_vectors import principal_components, shuffled
    from llmgr.training import arithmetic, device_of, finish, fit

    base, text = family(encoder)
    inputs = ["data/sessions/train.parquet", "data/sessions/valid.parquet"]
    features = None
    if text != "none":
        inputs.append("models/backbone/item_text.safetensors")
        vectors = load_tensors(inputs[-1])["vectors"]
        features = principal_components(shuffled(vectors, params.seed) if text == "shuffled" else vectors,
                                        params.encoder.text_dim)
    resume = resume_folder(f"pretrain-{encoder}", flat(params), inputs)
    items = catalogue_size("data/core/items.parquet")
    train, valid = (fitting(read_sessions(path, params.data.max_session)[0], items, path) for path in inputs[:2])
    device = device_of()
    torch.manual_seed(params.seed)
    model = build_recommender(encoder, items, params.encoder, features, users=int(train.user.max()),
                              max_session=params.data.max_session).to(device)
    settings = with_rate(params.encoder.training, getattr(params.encoder, base),
                         params.encoder.text_lr if text != "none" else None)
    job = EncoderJob(model, train.to(device), valid.to(device), settings, arithmetic(settings.precision))
    progress = fit(job, settings, seed=params.seed, resume=resume, name=encoder)
    save_recommender(f"models/encoders/{encoder}", encoder, model)
    best = progress.epoch_rows[progress.best_epoch]
    write_json(f"reports/metrics/encoders/{encoder}.json", {
        "best_epoch": progress.best_epoch, "epochs": progress.epoch, "train_loss": best["train_loss"],
        "valid": {name.removeprefix("valid_"): best[name] for name in best if name.startswith("valid_")}})
    finish(progress, model, name=encoder, resume=resume, reports=Path("reports"))


if __name__ == "__main__":
    run(main, __doc__, READS, {"encoder": "a name from encoder.names, or NAME-text or NAME-shuffled for a control"})
