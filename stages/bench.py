"""Measure the tuning step: its share of the machine's rate of matrix products, and a plain loop beside it.

Reads:  models/aligned/, models/embeddings/, models/folds/, models/tower/, models/backbone/,
        models/text_encoder/, data/sessions/{train,valid}.parquet, data/core/items.parquet: what `dvc repro align
        folds tower split` leaves
Writes: nothing; prints tokens and sessions a second, operations a second as a share of the machine's, and what the
        rest of the time goes to
Params: seed, model, tune, tower.enabled, tower.encoder, tower.decay, slit, data.max_session, launch
--shape CONFIG.json takes a language model of that shape with random weights instead of models/backbone's, from whose
tokenizer the prompts are: what a step of the paper's LLaMA-2-7B costs, with its parameters (stages/presets/paper.txt)
in params.yaml, needs none of its weights: python stages/bench.py --shape stages/presets/llama-2-7b.json
The plain loop is what one writes first: a prompt a prefix, in random order, padded to its batch's longest.
"""
from llmgr.pipeline.stage import run

READS = ("seed", "model", "tune", "tower.enabled", "tower.encoder", "tower.decay", "slit", "data.max_session", "launch")
WARM, STEPS = 3, 12
PLAIN_STEPS = 6


def main(params, shape: str | None) -> None:
    import dataclasses

    import torch

    from llmgr.experiments.step_speed import operations, product_rate, shares, steps, trained
    from llmgr.model.behaviour import BehaviourJob
    from llmgr.model.building import build_ranker, text_smoothing
    from llmgr.prior.weighted_sum import build_prior
    from llmgr.runtime.console import say
    from llmgr.runtime.errors import UserError
    from llmgr.runtime.layout import PIPELINE
    from llmgr.sessions.reading import read_split
    from llmgr.training.cost import hardware, peak_memory_mb
    from llmgr.training.launcher import device as device_of
    from llmgr.training.precision import arithmetic

    device, files = device_of(params.launch), PIPELINE
    dtype = arithmetic(params.tune.precision)
    sessions = [read_split(files, split, params.data.max_session)[0].to(device) for split in ("train", "valid")]
    prior = build_prior(params, files, sessions[0], device) if params.tune.linear else None
    model = build_ranker(params, files, dtype, device, prior, weights=None if shape else files.aligned, shape=shape)
    model.llmgr.unfreeze_encoder(params.tune.train_encoder)
    model.train()
    optimizer, smoothing, execution = trained(model), text_smoothing(params, files), model.llmgr.execution

    def job(**changes) -> BehaviourJob:
        settings = dataclasses.replace(params.tune, **changes)
        return BehaviourJob(model, *sessions, settings, params.seed, smoothing)

    ours, plain = job(), job(targets="prefix")
    generator = torch.Generator().manual_seed(params.seed)
    batches = [micro for micros in ours.steps(0, generator)[:WARM + STEPS] for micro in micros][:WARM + STEPS]
    warm = min(WARM, len(batches) - 1)
    if warm < 1:
        raise UserError("an epoch of stage 2 is one step, too few to time: lower tune.batch_size or set tune.samples=0")
    prompts = [micro for micros in plain.steps(0, generator) for micro in micros][:WARM + PLAIN_STEPS]
    packs, execution.packs = execution.packs, False
    loop = steps(plain, prompts, optimizer, warm)
    execution.packs = packs
    execution.prepare(params.tune, params.launch, device)
    before = product_rate(device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = steps(ours, batches, optimizer, warm)
    memory = peak_memory_mb()
    peak = max(before, product_rate(device, dtype))
    rate = operations(model.llmgr, taken["tokens"], taken["targets"]) / taken["seconds"]
    each = len(sessions[0]) / len(ours.first)
    say(f"machine: {peak / 1e9:.1f} GFLOP/s of {str(dtype).removeprefix('torch.')} matrix products ({hardware()})")
    second, plainly = ({k: v / by["seconds"] for k, v in by.items()} for by in (taken, loop))
    say(f"tuning step: {second['tokens']:,.0f} useful tokens/s, {second['targets']:,.0f} targets/s, {rate / 1e9:.1f} "
        f"GFLOP/s of useful work: {rate / peak:.0%} of the machine")
    ratio = second["prompts"] * each / plainly["prompts"]
    say(f"sessions/s: {second['prompts']:.1f}; plain loop {plainly['prompts'] / each:.1f} "
        f"({plainly['prompts']:.1f} prefixes/s): {ratio:.1f} times")
    say(f"peak memory: {memory / 1024:.1f} GB {'of the process' if device.type == 'cpu' else 'of the GPU'}")
    say("a step's time: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares(ours, batches[:3])
                                      if share >= 0.005))


if __name__ == "__main__":
    run(main, __doc__, READS, optional={"shape": "config.json of the language model to measure (default: "
                                                 "models/backbone)"})
