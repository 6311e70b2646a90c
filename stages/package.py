"""Make the package that recommendations come from: all that a request needs, and no language model.

A student learns what LLMGR's language model adds to its prior; where it is worse than the prior on validation sessions,
the package goes without it.

Reads:  models/embeddings/, models/folds/, models/tower/, models/tuned/, models/backbone/, models/text_encoder/,
        data/sessions/, data/core/items.parquet
Writes: models/recommender/ (see llmgr.serving.package), reports/metrics/package.json (validation: what pruning the
        item-item matrix costs, prior and student), reports/metrics/cost/package.json
Params: seed, model, tune, tower.enabled, tower.encoder, tower.decay, tower.max_text_tokens, slit,
        data.max_session
"""
from llmgr.pipeline.stage import run

READS = ("seed", "model", "tune", "tower.enabled", "tower.encoder", "tower.decay", "tower.max_text_tokens", "slit",
         "data.max_session")


def main(params) -> None:
    import time

    from llmgr.model.building import build_ranker
    from llmgr.prior.weighted_sum import build_prior
    from llmgr.runtime.artifacts import read_json, write_json
    from llmgr.runtime.console import say
    from llmgr.runtime.layout import PIPELINE
    from llmgr.serving.building import build_package, ranked, tuned_from, with_reader, with_student
    from llmgr.serving.distillation import taught, trained_student
    from llmgr.serving.package import write_package
    from llmgr.sessions.reading import read_split
    from llmgr.training.cost import scoring_cost
    from llmgr.training.precision import arithmetic, device_of

    start, files = time.monotonic(), PIPELINE
    train, valid = (read_split(files, split, params.data.max_session)[0] for split in ("train", "valid"))
    prior = tuned_from(params, files, train) if params.tune.linear else None
    package, figures = build_package(params, files, prior, valid)
    device = device_of()
    tuned = build_prior(params, files, None, device, prior.model) if params.tune.linear else None
    dtype = arithmetic(read_json(files.tuned / "config.json")["precision"])
    teacher = build_ranker(params, files, dtype, device, tuned, weights=files.tuned).eval()
    lessons, samples, factors = taught(teacher, train.to(device), params.seed)
    student = trained_student(lessons.to("cpu"), samples, factors, params.seed)
    other = with_student(package, {} if tuned is None else tuned.state_dict(), student, factors)
    figures |= {"prior": ranked(package, valid), "student": ranked(other, valid)}
    if figures["student"]["ndcg_at_20"] >= figures["prior"]["ndcg_at_20"]:
        package = other
    write_package(files.recommender, with_reader(package, params, files, prior))
    size = sum(path.stat().st_size for path in files.recommender.iterdir()) / 1e6
    write_json("reports/metrics/package.json", {**figures, "with_student": package is other, "megabytes": size})
    write_json("reports/metrics/cost/package.json",
               scoring_cost(start, {}, len(samples), sum(weight.numel() for weight in student.parameters())))
    say(f"{files.recommender}: {len(package.items):,} items, {size:.1f} MB, validation NDCG@20 "
        f"{figures['prior']['ndcg_at_20']:.4f} without and {figures['student']['ndcg_at_20']:.4f} with a student, "
        f"packed {'with' if package is other else 'without'}")


if __name__ == "__main__":
    run(main, __doc__, READS)
