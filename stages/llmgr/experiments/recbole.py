"""RecBole's session recommenders on this project's split, trained by RecBole itself, as a side-by-side reference.

RecBole's pins clash with the project's, so `fit` runs in an environment of its own, where polars is missing: what needs
it is imported where it is used.
"""
from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr.ranking.metrics import gains, names
from llmgr.runtime.errors import UserError
from llmgr.training.cost import hardware

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import ArrayLike
    from torch import Tensor

    from llmgr.params.schema import Params
    from llmgr.sessions.tensors import Sessions


NAMES = {"fpmc": "FPMC", "caser": "Caser", "gru4rec": "GRU4Rec", "narm": "NARM", "stamp": "STAMP", "sasrec": "SASRec",
         "srgnn": "SRGNN", "gcsan": "GCSAN"}
"""RecBole's name of an encoder."""
FPMC = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}, "loss_type": "BPR"}
"""RecBole's FPMC has no softmax loss."""
GRAPHS = ("SRGNN", "GCSAN")
MASKED = ("GRU4Rec", "NARM", "SASRec", *GRAPHS)
"""Models whose session vector does not depend on padding. STAMP's does: its first values overwrite the padding row."""
SELECTS = "ndcg_at_20"
NOTES = """Both sides were selected on validation NDCG@20 and ranked alike: all items, seen ones kept, ties against
the model. `in s.e.`: the difference in standard errors of this project's figure. Seconds are CPU seconds of one
thread, which other work on the machine does not lengthen. RecBole's rate and memory are those of an epoch as it
ships; its quality may come from fits that are spared padding, loops and checks and compute the same. `limit`: ended
by the limit of epochs or CPU time, not by patience. CPU s of training: epochs x samples / rate. Commands: `python
stages/peers.py --help`.
"""


def interactions(train: pl.DataFrame, valid: pl.DataFrame, test: pl.DataFrame) -> pl.DataFrame:
    """Every user's items in order, as RecBole reads them: the place in the sequence is the timestamp.

    The first click, the targets of all training prefixes, then the two held-out targets, so that RecBole's own
    leave-one-out makes the same training samples and the same two targets.
    """
    import polars as pl

    first = train.group_by("user", maintain_order=True).agg(pl.col("items").first().list.first().alias("item"))
    parts = [first, *(split.select("user", pl.col("target").alias("item")) for split in (train, valid, test))]
    known = first["user"]
    parts = [part.filter(pl.col("user").is_in(known.implode())) for part in parts]
    rows = pl.concat([part.with_columns(part=pl.lit(number)) for number, part in enumerate(parts)])
    rows = rows.sort("user", "part", maintain_order=True).with_columns(place=pl.int_range(pl.len()).over("user"))
    return rows.select(pl.col("user").alias("user_id:token"), pl.col("item").alias("item_id:token"),
                       pl.col("place").alias("timestamp:float"))


def fit(folder: Path, dataset: str, model: str, epochs: int, minutes: float, settings: Mapping[str, Any], *,
        dim: int, max_session: int, batch_size: int, patience: int, seed: int, lean: bool = False) -> dict[str, Any]:
    """Train and rank one of RecBole's models; everything that `settings` does not name is RecBole's default.

    Training ends early after `patience` epochs without a better validation NDCG@20, or before the epoch that would
    begin after so many CPU `minutes`. Ranks are this project's (seen items kept, ties against the model), on validation
    and test.
    `lean` spares the model padding (`trimmed`), loops over graphs (`graphs`) and autograd's checks, which changes its
    speed and memory and not what it computes: for searches, not for timings.
    """
    import torch

    try:
        from recbole.config import Config
    except ImportError:
        raise UserError("RecBole is not installed here: it wants an environment of its own (python stages/peers.py "
                        "--help)") from None
    load = torch.load
    torch.load = lambda *a, **k: load(*a, **{**k, "weights_only": False})  # RecBole predates torch 2.6's default
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    config = Config(model=model, dataset=dataset, config_dict={
        "data_path": str(folder), "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "metrics": ["Hit", "NDCG", "MRR"], "topk": [5, 10, 20], "valid_metric": "NDCG@20",
        "MAX_ITEM_LIST_LENGTH": max_session, "train_batch_size": batch_size, "eval_batch_size": batch_size,
        "epochs": epochs, "stopping_step": patience, "train_neg_sample_args": None, "loss_type": "CE",
        "embedding_size": dim, "use_gpu": torch.cuda.is_available(),
        "show_progress": False, "checkpoint_dir": str(folder / "checkpoints"), "reproducibility": True, "seed": seed,
        **(FPMC if model == "FPMC" else {}), **settings})
    init_seed(config["seed"], True)
    train, valid, test = data_preparation(config, create_dataset(config))
    net = get_model(model)(config, train._dataset).to(config["device"])
    if lean:
        torch.autograd.set_detect_anomaly(False)  # one of its models switches it on for all
        net.forward = trimmed(net.forward) if model in MASKED else net.forward
        if model in GRAPHS:
            net._get_slice = lambda items_BS: graphs(items_BS)[:4 if model == "SRGNN" else 3]
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, net)
    prepared, used = time.monotonic(), time.process_time()
    seconds: list[float] = []
    plain = trainer._train_epoch

    def timed(*arguments: Any, **options: Any) -> Any:
        begun = time.process_time()
        if begun - used > 60 * minutes:
            raise _Spent
        value = plain(*arguments, **options)
        seconds.append(time.process_time() - begun)
        return value

    trainer._train_epoch = timed
    stopped = "limit"
    with contextlib.suppress(_Spent):
        trainer.fit(train, valid, saved=True, show_progress=False, verbose=True)
        stopped = "limit" if len(seconds) == epochs else "itself"
    fitted = time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trainer.model.load_state_dict(torch.load(trainer.saved_model_file)["state_dict"])
    results = {name: _ranked(trainer, data) for name, data in (("valid", valid), ("test", test))}
    return {"model": model, "dataset": dataset, "settings": dict(settings), "lean": lean, "epochs": len(seconds),
            "stopped": stopped,
            "fit_seconds": fitted - prepared, "training_cpu_seconds": sum(seconds),
            "samples_per_cpu_second": len(train._dataset) * len(seconds) / sum(seconds), "peak_memory_mb": memory,
            "hardware": hardware(), "date": time.strftime("%Y-%m-%d"), **results}


@dataclass(frozen=True)
class Ours:
    """One of this project's encoders: its validation and test metrics, standard errors on test, epochs, cost."""

    name: str
    valid: Mapping[str, float]
    test: Mapping[str, float]
    errors: Mapping[str, float]
    settings: Mapping[str, Any]
    epochs: int
    speed: Mapping[str, Any]


def speed(params: Params, name: str, train: Sessions, items: int) -> dict[str, Any]:
    """CPU seconds of an epoch of an encoder's training, and of its products with all items and their softmax alone.

    CPU seconds, because others may use the machine; with one thread they are the seconds of a machine of one's own.
    """
    import torch
    from torch import nn

    from llmgr.encoders.pretraining import EncoderJob, with_rate
    from llmgr.encoders.registry import build_with_items
    from llmgr.training.cost import peak_memory_mb
    from llmgr.training.precision import arithmetic

    torch.manual_seed(params.seed)
    model = build_with_items(name, items, params.encoder, None, users=int(train.user.max()),
                             max_session=params.data.max_session)
    settings = with_rate(params.encoder.training, getattr(params.encoder, name).lr)
    job = EncoderJob(model, train, train, settings, arithmetic(settings.precision))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
    steps = job.steps(0, torch.Generator().manual_seed(params.seed))
    model.train()
    begun = time.process_time()
    for (samples,) in steps:
        loss = job.loss(samples)
        (loss.total / loss.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    spent = time.process_time() - begun
    memory = peak_memory_mb()
    with torch.no_grad():
        vectors = model.vectors()
    session, vectors = torch.randn(settings.batch_size, vectors.shape[1]).requires_grad_(), vectors.requires_grad_()
    begun = time.process_time()
    for (samples,) in steps:
        model.encoder.loss(session[:len(samples)], vectors, train.target[samples]).backward()
    return {"samples_per_cpu_second": len(train) / spent, "products_share": (time.process_time() - begun) / spent,
            "peak_memory_mb": memory, "hardware": hardware(), "date": time.strftime("%Y-%m-%d")}


def standard_errors(ranks: ArrayLike) -> dict[str, float]:
    """Standard error of every metric over the sessions."""
    table = gains(ranks)
    return dict(zip(names(), (table.std(0) / len(table) ** 0.5).tolist()))


def best(fits: Iterable[Mapping[str, Any]], model: str) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """A RecBole model's fit with the best validation NDCG@20, and one as RecBole ships it, for its cost."""
    own = [fit for fit in fits if fit["model"] == model]
    if not own:
        return None
    plain = [fit for fit in own if not fit["lean"]]
    if not plain:
        raise UserError(f"all fits of {model} were lean, which is no measure of RecBole's cost: add "
                        f"`python stages/peers.py --do 'fit {model} 1 30'`")
    return max(own, key=lambda fit: fit["valid"][SELECTS]), plain[0]


def markdown(encoders: Sequence[Ours], fits: Sequence[Mapping[str, Any]], samples: int, sessions: int) -> str:
    """Two tables, quality and cost, this project's figure before RecBole's."""
    quality = [["", "HR@20", "RecBole", "in s.e.", "NDCG@20", "RecBole", "in s.e.", "valid NDCG@20", "RecBole",
                "settings", "RecBole's"]]
    cost = [["", "samples / CPU s", "RecBole", "times", "peak MB", "RecBole", "epochs", "RecBole", "CPU s of training",
             "RecBole", "share of all-item products"]]
    for ours in encoders:
        pair = best(fits, NAMES.get(ours.name, ""))
        fit, plain = pair or (None, None)
        row = [ours.name]
        for metric in ("hr_at_20", SELECTS):
            error = ours.errors[metric]
            row += [f"{ours.test[metric]:.4f}", *(["–", "–"] if fit is None else [
                f"{fit['test'][metric]:.4f}",
                f"{(ours.test[metric] - fit['test'][metric]) / error:+.2f}" if error else "–"])]
        row += [f"{ours.valid[SELECTS]:.4f}", "–" if fit is None else f"{fit['valid'][SELECTS]:.4f}",
                _settings(ours.settings), "–" if fit is None else _settings(fit["settings"])]
        quality.append(row)
        rate = ours.speed["samples_per_cpu_second"]
        theirs = None if plain is None else plain["samples_per_cpu_second"]
        cost.append([
            ours.name, f"{rate:,.0f}", *(["–", "–"] if theirs is None else [f"{theirs:,.0f}", f"{rate / theirs:.1f}"]),
            f"{ours.speed['peak_memory_mb']:.0f}", "–" if plain is None else f"{plain['peak_memory_mb']:.0f}",
            str(ours.epochs), "–" if fit is None else _epochs(fit), f"{ours.epochs * samples / rate:.0f}",
            "–" if theirs is None else f"{fit['epochs'] * samples / theirs:.0f}",
            f"{ours.speed['products_share']:.0%}"])
    machines = sorted({source["hardware"] for source in (*fits, *(ours.speed for ours in encoders))})
    dates = sorted({source["date"] for source in (*fits, *(ours.speed for ours in encoders))})
    return (f"{sessions:,} test sessions, {samples:,} training samples; {'; '.join(machines)}; {', '.join(dates)}.\n\n"
            f"{_table(quality)}\n{_table(cost)}\n{NOTES}")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "default"


def _epochs(fit: Mapping[str, Any]) -> str:
    return f"{fit['epochs']}{' (limit)' if fit['stopped'] == 'limit' else ''}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def trimmed(forward: Callable[[Tensor, Tensor], Tensor], groups: int = 8) -> Callable[[Tensor, Tensor], Tensor]:
    """The same session vectors from sequences cut to the longest of their group, a batch being split by length.

    RecBole pads every sequence to the longest allowed, after its clicks and masked; most are far shorter.
    """
    import torch

    def cut(items_BS: Tensor, length_B: Tensor) -> Tensor:
        order = length_B.argsort()
        parts = [forward(items_BS[some, :int(length_B[some].max())], length_B[some])
                 for some in order.split(-(-len(order) // groups))]
        return torch.cat(parts)[order.argsort()]

    return cut


def graphs(items_BS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RecBole's session graphs without its loops: node of every click, adjacencies in | out, node items, mask.

    A node's place is that of its first click; RecBole's is by item id. Nothing else depends on it.
    """
    import torch

    mask_BS = items_BS > 0
    node_BS = (items_BS[:, :, None] == items_BS[:, None]).int().argmax(2)
    size = items_BS.shape[1]
    first = node_BS == torch.arange(size)
    edges_BNN = torch.zeros(len(items_BS), size, size)
    row, step = mask_BS[:, 1:].nonzero(as_tuple=True)
    edges_BNN[row, node_BS[row, step], node_BS[row, step + 1]] = 1.0
    into = edges_BNN / edges_BNN.sum(1, keepdim=True).clamp(min=1)
    out = edges_BNN / edges_BNN.sum(2, keepdim=True).clamp(min=1)
    return node_BS, torch.cat((into.transpose(1, 2), out), 2), items_BS * first, mask_BS


class _Spent(Exception):
    """The minutes are over."""


def _ranked(trainer: Any, data: Any) -> dict[str, float]:
    """This project's metrics of a RecBole model on a split."""
    import torch

    from llmgr.ranking.metrics import metrics, ranks

    model, parts = trainer.model.eval(), []
    with torch.no_grad():
        for batch, *_ in data:
            batch = batch.to(trainer.device)
            parts.append(ranks(model.full_sort_predict(batch).view(len(batch), -1), batch[model.ITEM_ID]).cpu())
    return metrics(torch.cat(parts))
