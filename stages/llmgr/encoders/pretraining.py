"""Pretraining of an encoder or control: next-item prediction over all prefixes, at the best learning rate."""
from __future__ import annotations

import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmgr.encoders.layers import cross_entropy
from llmgr.encoders.registry import EncoderWithItems, build_with_items, family, save_with_items
from llmgr.params.encoders import EncoderTraining
from llmgr.params.loading import flat
from llmgr.params.schema import Params
from llmgr.ranking.loop import Score, rank_sessions
from llmgr.ranking.metrics import metrics
from llmgr.runtime.artifacts import load_tensors, write_json
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.runtime.resume import resume_folder
from llmgr.sessions.batching import by_length
from llmgr.sessions.reading import catalogue_size, read_split
from llmgr.sessions.tensors import Sessions
from llmgr.text.vectors import principal_components, shuffled
from llmgr.training.engine import finish
from llmgr.training.job import Loss, Progress, Settings
from llmgr.training.precision import arithmetic, device_of
from llmgr.training.rates import fit_best_rate

if TYPE_CHECKING:
    from llmgr.encoders.layers import SessionEncoder


def with_rate(training: EncoderTraining, lr: float | str) -> Settings:
    """The encoder.training section with a rate; its `rates` are those to choose from: `lr`, or all for `auto`."""
    rates = training.rates if lr == "auto" else [lr]
    return types.SimpleNamespace(**vars(training) | {"rates": rates, "lr": rates[0]})


PIECE = 512  # sessions that an encoder without padding reads at a time, so that their states stay in cache
CHUNK = 128  # rows of logits formed at a time, so that they stay in cache


def pretrain(params: Params, files: Layout, name: str, offset: Callable[[Sessions], nn.Module] | None = None) -> None:
    """Train the encoder or control `name`, and write it, its metrics, curves and cost to their places in `files`.

    `offset` makes, from the training sessions, the module `EncoderWithItems.offset`. UserError as `fit`, and where the
    sessions are of another catalogue.
    """
    base, text = family(name)
    if (text == "linear") != (offset is not None):
        raise UserError(f"{name} is not trained here: run stages/linear.py --encoder {base}")
    resume = resume_folder(f"pretrain-{name}", flat(params), [*inputs(files, text),
                                                              *([files.items] if offset else [])])
    train, valid = load_sessions(params, files)
    model = new_encoder(params, files, name, train)
    settings = with_rate(params.encoder.training,
                         getattr(params.encoder, base).lr if text == "none" else params.encoder.text_lr)
    started = time.monotonic()
    if offset is not None:
        model.offset = offset(train)
    formed = time.monotonic() - started
    job = EncoderJob(model, train, valid, settings, arithmetic(settings.precision))
    best = fit_best_rate(job, settings, seed=params.seed, resume=resume, name=name)
    model.encoder.config["settings"]["lr"] = best.rate
    save_with_items(files.encoder(name), name, model)
    write_json(files.metrics(f"encoders/{name}"), outcome(best.progress) | {"lr": best.rate} | (
        {"search": best.record} if len(settings.rates) > 1 else {}))
    finish(best.progress, model, name=name, resume=resume, reports=Path(files.reports), prepared=formed + best.seconds)


def inputs(files: Layout, text: str) -> list[Path]:
    """The files that a training reads; `text` as in `family`."""
    return [files.sessions("train"), files.sessions("valid"), *([files.item_vectors] if text != "none" else [])]


def load_sessions(params: Params, files: Layout) -> tuple[Sessions, Sessions]:
    """The training and the validation sessions, on the GPU where there is one."""
    return tuple(read_split(files, split, params.data.max_session)[0].to(device_of()) for split in ("train", "valid"))


def new_encoder(params: Params, files: Layout, name: str, train: Sessions) -> EncoderWithItems:
    """The untrained encoder `name` with its items, drawn by the seed, on the device of `train`."""
    _, text = family(name)
    features = None
    if text != "none":
        vectors = load_tensors(files.item_vectors)["vectors"]
        features = principal_components(shuffled(vectors, params.seed) if text == "shuffled" else vectors,
                                        params.encoder.text_dim)
    torch.manual_seed(params.seed)
    model = build_with_items(name, catalogue_size(files.items), params.encoder, features,
                             users=int(train.user.max()), max_session=params.data.max_session)
    return model.to(train.row.device)


def outcome(progress: Progress) -> dict[str, Any]:
    """The figures of a finished training: its epochs, and the loss and validation metrics of the best one."""
    best = progress.epoch_rows[progress.best_epoch]
    return {"best_epoch": progress.best_epoch, "epochs": progress.epoch, "train_loss": best["train_loss"],
            "valid": {key.removeprefix("valid_"): best[key] for key in best if key.startswith("valid_")}}


class EncoderJob:
    """Cross-entropy over all items of every prefix's next item, or the encoder's own loss; NDCG@20 selects.

    A batch mixes sessions of all lengths. Batches of similar length would need no padding, but their gradients would be
    of short or of long sessions alone: on Office, with 38 batches an epoch, GRU4Rec ended 18% lower in NDCG@20.
    """

    selects = "valid_ndcg_at_20"

    def __init__(self, model: EncoderWithItems, train: Sessions, valid: Sessions, settings: EncoderTraining,
                 dtype: torch.dtype) -> None:
        self.model, self.train, self.valid, self.settings, self.dtype = model, train, valid, settings, dtype
        self.length = train.length.cpu()

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        return [[samples] for samples in
                torch.randperm(len(self.train), generator=generator).split(self.settings.batch_size)]

    def targets(self, micro: Tensor) -> int:
        return len(micro)

    def loss(self, micro: Tensor) -> Loss:
        device = self.train.row.device
        if self.model.encoder.pads:
            groups = by_length(micro, self.length, device=device)
        else:
            groups = micro.split(len(micro) if device.type == "cuda" else PIECE)
        groups = [group.to(device) for group in groups]
        with torch.autocast(groups[0].device.type, self.dtype, enabled=self.dtype is not torch.float32):
            vectors_VD = self.model.vectors()
            session_BD = torch.cat([self.model.encoder(self.train.graphs(group), vectors_VD) for group in groups])
            if self.model.offset is None:
                total = self.model.encoder.loss(session_BD, vectors_VD, self.train.target[torch.cat(groups)])
            else:
                total = self._loss_with_offset(session_BD, vectors_VD, torch.cat(groups))
        return Loss(total, len(micro), 0)

    def _loss_with_offset(self, session_BD: Tensor, vectors_VD: Tensor, samples_B: Tensor) -> Tensor:
        """Summed cross-entropy of the logits plus the offset, CHUNK rows at a time."""
        total = session_BD.new_zeros(())
        for session_CD, samples_C in zip(session_BD.split(CHUNK), samples_B.split(CHUNK)):
            logits_CV = self.model.encoder.logits(session_CD, vectors_VD)
            logits_CV = logits_CV + self.model.offset(self.train, samples_C, True)
            total = total + cross_entropy(logits_CV, self.train.target[samples_C])
        return total

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        vectors_VD = self.model.vectors()
        ranks = rank_sessions(scoring(self.model.encoder, vectors_VD, self.valid, self.model.offset), self.valid,
                             self.settings.batch_size)
        figures = metrics(ranks)
        return {f"valid_{name}": figures[name] for name in ("hr_at_20", "ndcg_at_20", "mrr_at_20")}


def scoring(encoder: SessionEncoder, vectors_VD: Tensor, sessions: Sessions, offset: nn.Module | None = None
            ) -> Score:
    """The encoder as a score: samples [B] to scores [B, V+1], plus the offset where there is one."""
    if offset is None:
        return lambda samples: encoder(sessions.graphs(samples), vectors_VD) @ vectors_VD.T
    return lambda samples: encoder.logits(encoder(sessions.graphs(samples), vectors_VD), vectors_VD) + offset(
        sessions, samples)
