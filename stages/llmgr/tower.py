"""The text tower: a text encoder tuned so that an item's text lies near the texts of what is clicked before it.

Its item vectors score sessions by themselves (`Tower`), and LLMGR's logits start from those scores. As with the base
(llmgr.folds), a training session is scored by a tower that was tuned without its user.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmgr.artifacts import (
    load_tensors,
    read_json,
    replacing_folder,
    resume_folder,
    rounded,
    save_tensors,
    write_json,
)
from llmgr.backbone import is_causal, load_language_model, load_tokenizer
from llmgr.errors import UserError
from llmgr.folds import fold_of
from llmgr.neighbours import click_weights, likeness
from llmgr.params import flat, texts_shuffled
from llmgr.pretraining import rank_sessions, sessions_here
from llmgr.ranking import metrics
from llmgr.text_vectors import item_texts, position_offset, token_table, whitening
from llmgr.training import Loss, Progress, arithmetic, finish, fit

if TYPE_CHECKING:
    from llmgr.graph import Sessions

FOLDER = "models/tower"
INPUTS = ("models/backbone", "data/core/items.parquet", "data/sessions/train.parquet", "data/sessions/valid.parquet")
TEMPERATURE = 0.1  # that training starts from
QUICK = 50.0  # times the learning rate that the temperature's logarithm learns at
CELLS = {"cpu": 8192, "cuda": 65536}  # tokens of a batch of texts, with padding
RANKED = 512  # validation sessions scored at a time


class LanguageModelMeans(nn.Module):
    """Unit vectors of texts: the mean of the language model's last hidden states over a text's tokens (Sentence-BERT).

    `token_VL` has the texts' token ids and `count_V` how many each has; row 0 is padding.
    """

    def __init__(self, language_model: nn.Module, token_VL: Tensor, count_V: Tensor) -> None:
        super().__init__()
        self.language_model = language_model
        self.register_buffer("token", token_VL, persistent=False)
        self.count = count_V  # on the CPU, where batches are laid out
        self.causal, self.offset = is_causal(language_model.config), position_offset(language_model)
        self.width = language_model.config.hidden_size

    def forward(self, items: Tensor) -> Tensor:
        """Those [N, H] of the texts of items [N] (on the CPU)."""
        place, states, start = self.token.device, [], 0
        count_N, order = torch.sort(self.count[items], descending=True, stable=True)
        while start < len(items):
            longest = max(1, int(count_N[start]))
            part = slice(start, start + max(1, CELLS[place.type] // longest))
            states.append(self._states(items[order[part]].to(place), count_N[part].to(place), longest))
            start = part.stop
        return torch.cat(states)[torch.argsort(order).to(place)]

    def _states(self, items: Tensor, count_N: Tensor, longest: int) -> Tensor:
        real_NL = torch.arange(longest, device=items.device) < count_N[:, None]
        seen_N1LL = real_NL[:, None, None].expand(-1, 1, longest, -1)
        if self.causal:
            seen_N1LL = seen_N1LL.tril()
        position_NL = torch.arange(longest, device=items.device).expand(len(items), -1) + self.offset
        h_NLH = self.language_model(input_ids=self.token[items, :longest], position_ids=position_NL,
                                    attention_mask=seen_N1LL).last_hidden_state.float()
        return F.normalize((h_NLH * real_NL[..., None]).sum(1) / count_N[:, None].clamp(min=1), dim=-1)


class TokenMeans(nn.Module):
    """Unit vectors of texts: the mean of vectors of their tokens, each normed (LayerNorm without weights), in no order.

    What a text encoder learns without a language model: the tokens' vectors [T, `width`] are drawn at random, for those
    tokens alone that some text has. By the norm all tokens of a text count alike.
    """

    def __init__(self, token_VL: Tensor, count_V: Tensor, width: int) -> None:
        super().__init__()
        used_T, flat_N = torch.unique(token_VL[torch.arange(token_VL.shape[1]) < count_V[:, None]], return_inverse=True)
        self.weight = nn.Parameter(torch.randn(max(1, len(used_T)), width) * 0.02)
        self.register_buffer("token", flat_N, persistent=False)  # those of all texts, one after another
        self.count, self.first, self.width = count_V, torch.cumsum(count_V, 0) - count_V, width

    def forward(self, items: Tensor) -> Tensor:
        """Those [N, width] of the texts of items [N] (on the CPU)."""
        place, count_N = self.token.device, self.count[items]
        start_N = torch.cumsum(count_N, 0) - count_N
        at = torch.arange(int(count_N.sum())) + (self.first[items] - start_N).repeat_interleave(count_N)
        with torch.autocast(place.type, enabled=False):
            normed_TH = F.layer_norm(self.weight, (self.width,))
            return F.normalize(F.embedding_bag(self.token[at.to(place)], normed_TH, start_N.to(place), mode="mean"),
                               dim=-1)


class TextTower(nn.Module):
    """Unit vectors of item texts: a linear map of the unit vectors [N, H] that `means` makes of the texts of items [N].

    The map starts as the whitening of those before tuning, so that a language model's tuning starts from text-kNN.
    """

    def __init__(self, means: LanguageModelMeans | TokenMeans) -> None:
        super().__init__()
        self.means, self.count = means, means.count
        self.head = nn.Linear(means.width, means.width)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE) / QUICK))

    @property
    def place(self) -> torch.device:
        return self.head.weight.device

    def whiten(self) -> None:
        """Let the map whiten the vectors of the texts as they are made now."""
        with torch.no_grad():
            mean_VH = torch.cat([self.means(items) for items in torch.arange(1, len(self.count)).split(4096)])
            mean_H, axes_HH = whitening(mean_VH)
            self.head.weight.copy_(axes_HH.T)
            self.head.bias.copy_(-mean_H @ axes_HH)

    def forward(self, items: Tensor) -> Tensor:
        """Unit vectors [N, H] of the texts of items [N] (on the CPU); the map is float32 under autocast, too."""
        mean_NH = self.means(items)
        with torch.autocast(self.place.type, enabled=False):
            return F.normalize(self.head(mean_NH), dim=-1)

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Those of all items [V+1, H], row 0 zeros."""
        every = torch.arange(1, len(self.count))
        return F.pad(torch.cat([self(items) for items in every.split(4096)]), (0, 0, 1, 0))


class TowerJob:
    """Tells the text of a prefix's next item from those of the other targets of its batch.

    Softmax over the batch's distinct targets (InfoNCE, van den Oord et al. 2018) of the cosine, over a temperature that
    learns, between a target and the sum of the clicks' vectors, an earlier click weighing `decay` less a step. What the
    session has clicked, or clicks later in the batch, is no negative of it. `rows` are the training samples learned
    from; those of a session come together, so that a text is read once for all of them. Windows of a user with more
    than `data.max_session` clicks are sessions of their own here. Without `valid` nothing is validated.
    """

    selects = None

    def __init__(self, model: TextTower, train: Sessions, valid: Sessions | None, settings: Any, dtype: torch.dtype,
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
        place, width, batch = self.model.place, graphs.items_BS.shape[1], torch.arange(len(micro))
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
        with torch.autocast(place.type, self.dtype, enabled=self.dtype is not torch.float32):
            vectors_UH = self.model(items)
        query_BH = F.normalize(F.embedding_bag(click_N.to(place), vectors_UH, start_B.to(place), mode="sum",
                                               per_sample_weights=weight_N.to(place)), dim=-1)
        logits_BP = query_BH @ vectors_UH[pool_P.to(place)].T * (-QUICK * self.model.log_temperature).exp()
        total = F.cross_entropy(logits_BP.masked_fill(no_negative_BP.to(place), float("-inf")), own_B.to(place),
                                reduction="sum")
        return Loss(total, len(micro), int(self.model.count[items].sum()))

    def validate(self) -> dict[str, float]:
        if self.valid is None:
            return {}
        found = validated(self.vectors(), self.valid, self.settings.decay)
        return {f"valid_{name}": value for name, value in found.items()}

    def vectors(self) -> Tensor:
        """Item vectors [V+1, H] as they are tuned now."""
        with torch.autocast(self.model.place.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.model.vectors()


@torch.no_grad()
def validated(vectors_VH: Tensor, sessions: Sessions, decay: float) -> dict[str, float]:
    """How the vectors rank the targets of sessions, seen items kept."""
    found = metrics(rank_sessions(lambda samples: likeness(sessions, samples, vectors_VH, decay), sessions, RANKED))
    return {name: found[name] for name in ("hr_at_20", "ndcg_at_20", "mrr_at_20")}


def train_tower(params: Any) -> None:
    """Tune a tower over all training users, and one without each fold of them, into models/tower/, with the records.

    The folder says so and no more where `tower.enabled` is false. UserError as `fit`, where there are more folds than
    users, and where a language model is to read texts longer than its positions.
    """
    settings, folds = params.tower, params.tune.folds
    config = asked(params)
    resume = resume_folder("tower", flat(params), INPUTS)
    if not settings.enabled:
        with replacing_folder(FOLDER) as folder:
            write_json(folder / "config.json", config)
        write_json("reports/metrics/tower.json", {})
        finish(Progress(), nn.Module(), name="tower", resume=resume, reports=Path("reports"))
        return
    train, valid = sessions_here(params)
    users = int(train.user.max())
    if folds > users:
        raise UserError(f"tune.folds={folds} are more than the {users} users: lower it")
    fold_N = fold_of(users, folds, params.seed)[train.user[train.row].cpu()] if folds else None
    dtype = arithmetic(settings.precision) if settings.encoder == "language-model" else torch.float32
    vectors, ends, found = [], [], {}
    model = built(params, train.row.device)
    untuned, whole = apart(model.state_dict()), {}
    for fold in range(folds + 1):
        name = f"tower without fold {fold}" if fold else "tower"
        rows = torch.arange(len(train)) if fold == 0 else (fold_N != fold - 1).nonzero()[:, 0]
        model.load_state_dict(untuned)
        job = TowerJob(model, train, None if fold else valid, settings, dtype, rows)
        ends.append(fit(job, settings, seed=params.seed, resume=resume / str(fold), name=name))
        vectors_VH = job.vectors()
        found[f"fold {fold}" if fold else "whole"] = validated(vectors_VH, valid, settings.decay)
        vectors.append(vectors_VH.cpu())
        if fold == 0:
            whole = apart({key: p for key, p in model.named_parameters() if p.requires_grad})
    with replacing_folder(FOLDER) as folder:
        for fold, vectors_VH in enumerate(vectors):
            save_tensors(folder / (f"{fold}.safetensors" if fold else "whole.safetensors"), {"vectors": vectors_VH})
        save_tensors(folder / "tower.safetensors", whole)
        write_json(folder / "config.json", config | {"users": users})
    write_json("reports/metrics/tower.json", found)
    together = Progress(**{key: sum(getattr(end, key) for end in ends)
                           for key in ("seconds", "training_seconds", "samples", "tokens")},
                        step_rows=ends[0].step_rows, epoch_rows=ends[0].epoch_rows)
    finish(together, model, name="tower", resume=resume, reports=Path("reports"))


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of them on the CPU, that training does not change."""
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}


def asked(params: Any) -> dict[str, Any]:
    """What a tower's folder must have been made with, as its config.json keeps it."""
    return rounded({"enabled": params.tower.enabled, "encoder": params.tower.encoder, "folds": params.tune.folds,
                    "seed": params.seed, "decay": params.tower.decay, "texts": params.model.texts,
                    "weights": params.model.weights,
                    "backbone": read_json("models/backbone/backbone.json")["sha256"]})


def built(params: Any, place: torch.device) -> TextTower:
    """The tower before tuning, at `place`: all its weights are to learn."""
    torch.manual_seed(params.seed)
    settings, longest = params.tower, params.tower.max_text_tokens
    texts = item_texts("data/core/items.parquet", params.llm.item_text, texts_shuffled(params))
    token_VL, count_V = token_table(
        load_tokenizer("models/backbone")(texts, truncation=True, max_length=longest)["input_ids"], longest)
    if settings.encoder == "tokens":
        width = read_json("models/backbone/backbone.json")["width"]
        means: LanguageModelMeans | TokenMeans = TokenMeans(token_VL, count_V, width)
    else:
        random = params.seed if params.model.weights == "random" else None
        language_model = load_language_model("models/backbone", random=random).requires_grad_(True)
        positions = language_model.config.max_position_embeddings - position_offset(language_model)
        if longest > positions:
            raise UserError(f"tower.max_text_tokens={longest} exceeds the backbone's {positions} positions: lower it")
        if settings.gradient_checkpointing:
            language_model.gradient_checkpointing_enable({"use_reentrant": False})
        means = LanguageModelMeans(language_model, token_VL, count_V)
    model = TextTower(means).to(place)
    model.whiten()
    return model


class Tower:
    """The tower's scores of all items: of a training session by the one that was tuned without its user."""

    def __init__(self, params: Any, items: int, place: torch.device) -> None:
        """Load models/tower; UserError where it is of other folds, texts, weights, seed or another catalogue."""
        config = read_json(f"{FOLDER}/config.json")
        for key, value in asked(params).items():
            if config.get(key) != value:
                was = "another backbone" if key == "backbone" else f"{key}={config.get(key)}, not {value}"
                raise UserError(f"{FOLDER} was made with {was}: run `dvc repro` to make it anew")
        names = ["whole", *map(str, range(1, config["folds"] + 1))]
        self.vectors = [load_tensors(f"{FOLDER}/{name}.safetensors")["vectors"].to(place) for name in names]
        if len(self.vectors[0]) != items + 1:
            raise UserError(f"{FOLDER} has {len(self.vectors[0]) - 1} items, the catalogue {items}: run `dvc repro` to "
                            "make it anew")
        self.decay, self.users = params.tower.decay, config["users"]
        self.scale = len(self.vectors[0]) / float((self.vectors[0].T @ self.vectors[0]).norm())
        self.fold_U = fold_of(self.users, config["folds"], config["seed"]) if config["folds"] else None

    def __call__(self, sessions: Sessions, samples: Tensor, trained: bool) -> Tensor:
        """Scores [R, V+1] of samples [R], of unit scale; `trained` where the tower was tuned on these sessions.

        UserError where they have other users than those that it was tuned on.
        """
        if not trained:
            return likeness(sessions, samples, self.vectors[0], self.decay) * self.scale
        if int(sessions.user.max()) != self.users:
            raise UserError(f"{FOLDER} was tuned on other users than the sessions have: run `dvc repro` to make it "
                            "anew")
        fold_R = self.fold_U[sessions.user[sessions.row[samples]].cpu()]
        scores = self.vectors[0].new_empty(len(samples), len(self.vectors[0]))
        for fold in fold_R.unique().tolist():
            at = (fold_R == fold).nonzero()[:, 0].to(samples.device)
            scores[at] = likeness(sessions, samples[at], self.vectors[1 + fold], self.decay) * self.scale
        return scores
