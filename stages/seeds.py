"""Collect the same experiment at other seeds for the report (no stage of the DAG).

    make seeds SEEDS="1 2"     # queue it at these seeds and run them, one by one
    python stages/seeds.py     # when `dvc queue status` says that all is done; then `dvc repro report`

Reads:  the experiments that `track` published to MLflow, and their ranks there; params.yaml
Writes: reports/seeds.json (every model's figures by seed; the paired differences of bucket.ours from the others, of
        each session's mean over the seeds)
Params: seed, bucket, track, and all that decide a model's figures, to tell whether experiments differ in the seed alone
"""
from llmgr.pipeline.stage import run

READS = ("seed", "bucket", "track")


def main(params) -> None:
    from pathlib import Path

    import yaml

    from llmgr.experiments import ablations
    from llmgr.experiments.published import Published
    from llmgr.reporting import buckets, seeds
    from llmgr.runtime.artifacts import write_json
    from llmgr.runtime.console import say
    from llmgr.runtime.errors import UserError

    published = Published(params.track.experiment, params.track.uri)
    known = ablations.at_seeds(published, yaml.safe_load(Path("params.yaml").read_text()))
    found, ours = {seed: figures for seed, (_, figures) in known.items()}, params.bucket.ours
    models, gaps = seeds.models(found), {}
    try:
        ranks = {seed: published.ranks(run, models) for seed, (run, _) in known.items()}
        gaps = buckets.pooled(ranks, ours, params.bucket.resamples, params.seed) if len(ranks) > 1 else {}
    except UserError as error:
        say(f"warning: no paired differences: {error}")
    write_json("reports/seeds.json", {"figures": found, "ours": ours, "resamples": params.bucket.resamples,
                                      "differences": gaps})
    for model in models:
        mean, deviation, *_ = seeds.spread(found, model, seeds.COLUMNS[0])
        say(f"{model}: HR@20 {mean:.4f}, deviation {deviation:.4f}" + (
            f"; {ours} minus it {gaps[model]['test']['hr_at_20']['difference']:+.4f}, p "
            f"{gaps[model]['test']['hr_at_20']['p']:.2g}" if model in gaps else ""))
    if str(params.seed) not in found:
        say(f"warning: {ablations.UNPUBLISHED}")
    say(f"reports/seeds.json has seeds {', '.join(found) or 'none'}" + (
        "" if len(found) > 1 else ': make seeds SEEDS="1 2"'))


if __name__ == "__main__":
    run(main, __doc__, READS)
