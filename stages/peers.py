"""The encoders beside RecBole 1.2.1's models on the same split: quality, speed and memory (no stage of the DAG).

RecBole's pins clash with the project's, so it has an environment of its own:

    python3.11 -m venv peer
    peer/bin/pip install torch==2.13.0 recbole==1.2.1 'numpy<2' 'pandas<2.3' scipy kmeans-pytorch lightgbm pyyaml
    python stages/peers.py --do write                                  # after the stages download, filter and split
    peer/bin/python stages/peers.py --do 'fit SRGNN 30 25 learning_rate=0.003'   # epochs and CPU minutes at most
    python stages/pretrain.py --encoder srgnn
    python stages/peers.py --do table

Of several fits of a model the table shows the best on validation. Dimension, longest session, batch and patience are
those of params.yaml, everything else of RecBole's models its default. Run one at a time, both sides with the same
threads (`taskset -c 1 env OMP_NUM_THREADS=1`), so that the seconds compare.

Reads:  data/sessions/, data/core/items.parquet, models/encoders/, reports/metrics/, data/peers/
Writes: data/peers/DATASET/ (RecBole's input, a JSON file a fit), reports/results/DATASET/recbole.md
Params: seed, data, encoder, evaluate.batch_size, split.selection
"""
from __future__ import annotations

import difflib
from pathlib import Path

from llmgr.pipeline import stage
from llmgr.runtime import console
from llmgr.runtime.errors import UserError

READS = ("seed", "data", "encoder", "evaluate.batch_size", "split.selection")
OPTIONS = {"do": "write | 'fit MODEL EPOCHS MINUTES [lean=true] [key=value ...]' | 'speed ENCODER' | table"}


def main(params, do: str) -> None:
    what, *words = do.split() or [""]
    jobs = {"write": (write, 0, 0), "fit": (fit, 3, None), "speed": (speed, 1, 1), "table": (table, 0, 0)}
    job, least, most = jobs.get(what, (None, 0, 0))
    if job is None or len(words) < least or (most is not None and len(words) > most):
        raise UserError(f"--do '{do}' is no job of this script: it is {OPTIONS['do']}")
    job(params, Path("data/peers"), params.data.dataset.replace(":", "-"), *words)


def write(params, folder: Path, dataset: str) -> None:
    from llmgr.experiments.recbole import interactions
    from llmgr.runtime.artifacts import read_table, write_text

    splits = [read_table(f"data/sessions/{split}.parquet") for split in ("train", "valid", "test")]
    rows = interactions(*splits)
    write_text(folder / dataset / f"{dataset}.inter", rows.write_csv(separator="\t"))
    console.say(f"{len(rows)} interactions in {folder / dataset / dataset}.inter")


def fit(params, folder: Path, dataset: str, model: str, epochs: str, minutes: str, *settings: str) -> None:
    import yaml

    from llmgr.experiments import recbole
    from llmgr.runtime.artifacts import write_json

    if model not in recbole.NAMES.values():
        near = difflib.get_close_matches(model, recbole.NAMES.values(), 1, 0.0)[0]
        raise UserError(f"{model} is none of RecBole's models that stand here: the nearest is {near}")
    if not (epochs.isdecimal() and int(epochs) and minutes.replace(".", "", 1).isdecimal() and float(minutes)):
        raise UserError(f"--do 'fit {model} {epochs} {minutes}': give a number of epochs and one of CPU minutes, both "
                        "above 0")
    changed = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        try:
            changed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            sign = ""
        if not (key and sign and value):
            raise UserError(f"--do 'fit {model}': {setting} is no key=value")
    if not (folder / dataset / f"{dataset}.inter").exists():
        raise UserError(f"{folder / dataset} has no sessions for RecBole: run `python stages/peers.py --do write`")
    training = params.encoder.training
    lean = changed.pop("lean", False)
    results = recbole.fit(folder, dataset, model, int(epochs), float(minutes), changed, dim=params.encoder.dim,
                      max_session=params.data.max_session, batch_size=training.batch_size, patience=training.patience,
                      seed=params.seed, lean=lean)
    name = "-".join([model, *settings]).replace("/", "_")
    write_json(folder / dataset / "fits" / f"{name}.json", results)
    console.say(f"{name}: {results}")


def speed(params, folder: Path, dataset: str, encoder: str) -> None:
    from llmgr.encoders.registry import family
    from llmgr.experiments import recbole
    from llmgr.runtime.artifacts import write_json
    from llmgr.runtime.layout import PIPELINE
    from llmgr.sessions.reading import catalogue_size, read_split

    base, _ = family(encoder)
    files = PIPELINE
    train, _ = read_split(files, "train", params.data.max_session)
    results = recbole.speed(params, base, train, catalogue_size(files.items))
    write_json(folder / dataset / "speed" / f"{base}.json", results)
    console.say(f"{base}: {results}")


def table(params, folder: Path, dataset: str) -> None:
    import torch

    from llmgr.encoders.registry import REGISTRY
    from llmgr.evaluation.models import encoder
    from llmgr.experiments import recbole
    from llmgr.ranking.loop import rank_sessions
    from llmgr.ranking.metrics import metrics
    from llmgr.runtime.artifacts import read_json, write_text
    from llmgr.runtime.layout import PIPELINE
    from llmgr.sessions.reading import catalogue_size, read_split

    if params.split.selection:
        raise UserError("split.selection=true is for choosing on validation, and test is not scored: set it to false")
    files = PIPELINE
    items = catalogue_size(files.items)
    train, test = (read_split(files, split, params.data.max_session)[0] for split in ("train", "test"))
    fits = [read_json(path) for path in sorted((folder / dataset / "fits").glob("*.json"))]
    results = []
    for name in REGISTRY:
        trained, timed = Path(f"reports/metrics/encoders/{name}.json"), folder / dataset / "speed" / f"{name}.json"
        if not (trained.exists() and timed.exists() and Path("models/encoders", name).exists()):
            continue
        score = encoder(files.encoder(name), items, torch.device("cpu"))(test)
        ranks = rank_sessions(score, test, params.evaluate.batch_size)
        settings = read_json(Path("models/encoders", name, "config.json"))["settings"]
        settings = {key: settings[key] for key in ("lr", "gnn_layers", "length") if key in settings}
        results.append(recbole.Ours(name, read_json(trained)["valid"], metrics(ranks), recbole.standard_errors(ranks),
                                settings, read_json(trained)["epochs"], read_json(timed)))
    if not results:
        raise UserError("no encoder was both trained and timed: run `python stages/pretrain.py --encoder NAME` and "
                        "`python stages/peers.py --do 'speed NAME'`")
    path = f"reports/results/{dataset}/recbole.md"
    write_text(path, recbole.markdown(results, fits, len(train), len(test)))
    console.say(f"{len(results)} encoders beside {len(fits)} fits of RecBole's in {path}")


if __name__ == "__main__":
    stage.run(main, __doc__, READS, OPTIONS)
