"""Training of the text tower, over all users and without each fold of them.

Shapes: U distinct items of a batch, P distinct targets, N clicks or training samples, S sessions.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.encoders.pretraining import load_sessions
from llmgr.language_model.loading import load_language_model, load_tokenizer
from llmgr.params.loading import flat
from llmgr.params.schema import Params
from llmgr.params.training import Tower
from llmgr.prior.cross_fitting import fold_of
from llmgr.prior.text_tower import QUICK, LanguageModelMeans, TextTower, TokenMeans
from llmgr.prior.tower import made_of
from llmgr.ranking.loop import rank_sessions
from llmgr.ranking.metrics import metrics
from llmgr.runtime.artifacts import read_json, replacing_folder, save_tensors, write_json
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.runtime.resume import resume_folder
from llmgr.sessions.clicks import click_weights
from llmgr.text.items import item_texts, texts_shuffled, token_ids, token_table
from llmgr.text.vectors import click_similarity, position_offset
from llmgr.training.engine import finish, fit
from llmgr.training.job import Loss, Progress
from llmgr.training.precision import arithmetic

if TYPE_CHECKING:
    from llmgr.sessions.tensors import Sessions


RANKED = 512  # validation sessions scored at a time


class TowerJob:
    """Training of the tower: a prefix's next item against the other targets of the batch.

    The loss is a softmax over the batch's distinct targets (InfoNCE, van den Oord et al. 2018). The logit of a target
    is its cosine to the sum of the clicks' vectors, weighted as in `click_weights`, over a learned temperature. Items
    that the session has clicked, or clicks later in the batch, are no negatives. `rows` are the training samples to
    learn from. The samples of a session stay together, so that each text is read once for all of them; windows of a
    user with more than `data.max_session` clicks count as sessions of their own. Without `valid` there is no
    validation.
    """

    selects = None

    def __init__(self, model: TextTower, train: Sessions, valid: Sessions | None, settings: Tower, dtype: torch.dtype,
                 rows: Tensor) -> None:
        self.model, self.settings, self.dtype, self.rows = model, settings, dtype, rows
        self.train, self.valid = train.to("cpu"), valid

    def steps(self, epoch: int, generator: torch.Generator) -> list[list[Tensor]]:
        size, row_N = self.settings.batch_size, self.train.row[self.rows]
        turn_S = torch.randperm(int(row_N.max()) + 1, generator=generator)
        order = self.rows[torch.argsort(turn_S[row_N], stable=True)]
        return [list(step.split(size)) for step in order.split(size * self.settings.accumulate)]

    def targets(self, micro: Tensor) -> int:
        return len(micro)

    def loss(self, micro: Tensor) -> Loss:
        graphs, target_B = self.train.graphs(micro), self.train.target[micro]
        device, width, batch = self.model.device, graphs.items_BS.shape[1], torch.arange(len(micro))
        met_U, at = torch.unique(torch.cat((graphs.items_BS, target_B[:, None]), 1), return_inverse=True)
        items, padding = (met_U[1:], 1) if met_U[0] == 0 else (met_U, 0)
        mask_BS, own_B = graphs.mask_BS(), at[:, width] - padding
        click_N = at[:, :width][mask_BS] - padding
        weight_N = click_weights(graphs, self.settings.decay)[mask_BS]
        start_B = torch.cumsum(graphs.length_B, 0) - graphs.length_B
        clicked_BU = torch.zeros(len(micro), len(items), dtype=torch.bool)
        clicked_BU[mask_BS.nonzero()[:, 0], click_N] = True
        pool_P, own_B = torch.unique(own_B, return_inverse=True)
        _, session_B = torch.unique(self.train.row[micro], return_inverse=True)
        targets_SP = torch.zeros(int(session_B.max()) + 1, len(pool_P), dtype=torch.bool)
        targets_SP[session_B, own_B] = True
        no_negative_BP = targets_SP[session_B] | clicked_BU[:, pool_P]
        no_negative_BP[batch, own_B] = False
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not torch.float32):
            vectors_UH = self.model(items)
        query_BH = F.normalize(F.embedding_bag(click_N.to(device), vectors_UH, start_B.to(device), mode="sum",
                                               per_sample_weights=weight_N.to(device)), dim=-1)
        logits_BP = query_BH @ vectors_UH[pool_P.to(device)].T * (-QUICK * self.model.log_temperature).exp()
        total = F.cross_entropy(logits_BP.masked_fill(no_negative_BP.to(device), float("-inf")), own_B.to(device),
                                reduction="sum")
        return Loss(total, len(micro), int(self.model.count[items].sum()))

    def validate(self) -> dict[str, float]:
        if self.valid is None:
            return {}
        figures = validated(self.vectors(), self.valid, self.settings.decay)
        return {f"valid_{name}": value for name, value in figures.items()}

    def vectors(self) -> Tensor:
        """The current item vectors [V+1, H]."""
        with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.model.vectors()


@torch.no_grad()
def validated(vectors_VH: Tensor, sessions: Sessions, decay: float) -> dict[str, float]:
    """Metrics at 20 of the vectors' ranking of the sessions' targets among all items."""
    figures = metrics(rank_sessions(lambda samples: click_similarity(sessions, samples, vectors_VH, decay), sessions,
                                    RANKED))
    return {name: figures[name] for name in ("hr_at_20", "ndcg_at_20", "mrr_at_20")}


def train_tower(params: Params, files: Layout) -> None:
    """Tune a tower on all training users, and one without each fold of them; write them, their metrics and cost.

    With `tower.enabled=false` the folder holds only a config.json that says so. UserError as `fit`, where there are
    more folds than users, and where texts are longer than the language model's positions.
    """
    settings, folds = params.tower, params.tune.folds
    config = made_of(params, files)
    resume = resume_folder("tower", flat(params), (files.text_encoder, files.items, files.sessions("train"),
                                                    files.sessions("valid")))
    if not settings.enabled:
        with replacing_folder(files.tower) as folder:
            write_json(folder / "config.json", config)
        write_json(files.metrics("tower"), {})
        finish(Progress(), nn.Module(), name="tower", resume=resume, reports=Path(files.reports))
        return
    train, valid = load_sessions(params, files)
    users = int(train.user.max())
    if folds > users:
        raise UserError(f"tune.folds={folds} are more than the {users} users: lower it")
    fold_N = fold_of(users, folds, params.seed)[train.user[train.row].cpu()] if folds else None
    dtype = arithmetic(settings.precision) if settings.encoder == "language-model" else torch.float32
    vectors, ends, figures = [], [], {}
    model = build_tower(params, files, train.row.device)
    untuned, whole = copied(model.state_dict()), {}
    for fold in range(folds + 1):
        name = f"tower without fold {fold}" if fold else "tower"
        say(f"tower {fold + 1} of {folds + 1}")
        rows = torch.arange(len(train)) if fold == 0 else (fold_N != fold - 1).nonzero()[:, 0]
        model.load_state_dict(untuned)
        job = TowerJob(model, train, None if fold else valid, settings, dtype, rows)
        ends.append(fit(job, settings, seed=params.seed, resume=resume / str(fold), name=name))
        vectors_VH = job.vectors()
        figures[f"fold {fold}" if fold else "whole"] = validated(vectors_VH, valid, settings.decay)
        vectors.append(vectors_VH.cpu())
        if fold == 0:
            whole = copied({key: p for key, p in model.named_parameters() if p.requires_grad})
    with replacing_folder(files.tower) as folder:
        for fold, vectors_VH in enumerate(vectors):
            save_tensors(folder / (f"{fold}.safetensors" if fold else "whole.safetensors"), {"vectors": vectors_VH})
        save_tensors(folder / "tower.safetensors", whole)
        write_json(folder / "config.json", config | {"users": users})
    write_json(files.metrics("tower"), figures)
    together = Progress(**{key: sum(getattr(end, key) for end in ends)
                           for key in ("seconds", "training_seconds", "samples", "tokens")},
                        step_rows=ends[0].step_rows, epoch_rows=ends[0].epoch_rows)
    finish(together, model, name="tower", resume=resume, reports=Path(files.reports))


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which further training does not change."""
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}


def build_tower(params: Params, files: Layout, device: torch.device) -> TextTower:
    """The tower before tuning, on `device`; all its weights will be trained."""
    torch.manual_seed(params.seed)
    settings, longest = params.tower, params.tower.max_text_tokens
    texts = item_texts(files.items, "text", texts_shuffled(params))
    token_VL, count_V = token_table(token_ids(load_tokenizer(files.text_encoder), texts, longest, special=True),
                                    longest)
    if settings.encoder == "tokens":
        width = read_json(files.text_encoder / "text_encoder.json")["width"]
        means: LanguageModelMeans | TokenMeans = TokenMeans(token_VL, count_V, width)
    else:
        random = params.seed if params.model.weights == "random" else None
        language_model = load_language_model(files.text_encoder, random=random).requires_grad_(True)
        positions = language_model.config.max_position_embeddings - position_offset(language_model)
        if longest > positions:
            raise UserError(f"tower.max_text_tokens={longest} exceeds the text encoder's {positions} positions: lower "
                            "it")
        if settings.gradient_checkpointing:
            language_model.gradient_checkpointing_enable({"use_reentrant": False})
        means = LanguageModelMeans(language_model, token_VL, count_V)
    model = TextTower(means).to(device)
    model.whiten()
    return model
