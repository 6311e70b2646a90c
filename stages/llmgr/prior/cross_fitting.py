"""Cross-fitting: the base is trained without each part of the users, and scores the training sessions of that part.

A model's scores of its own training sessions are too good, and a model that is fitted to them would trust them too
much. Cross-fitted scores (stacked generalisation, Wolpert 1992) avoid that.

Shapes: U users, N training samples.
"""
from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmgr.encoders.pretraining import EncoderJob, inputs, load_sessions, new_encoder, outcome, with_rate
from llmgr.encoders.registry import family, load_encoder
from llmgr.params.derived import cross_fits
from llmgr.params.loading import flat
from llmgr.params.schema import Params
from llmgr.runtime.artifacts import load_tensors, read_json, replacing_folder, save_tensors, write_json
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.runtime.resume import resume_folder
from llmgr.training.cost import cost
from llmgr.training.engine import fit
from llmgr.training.job import Progress
from llmgr.training.precision import arithmetic

if TYPE_CHECKING:
    from llmgr.encoders.layers import SessionEncoder
    from llmgr.sessions.tensors import Sessions

READ = 1024  # sessions that an encoder reads at a time


def fold_of(users: int, folds: int, seed: int) -> Tensor:
    """The fold, from 0, that each user belongs to [users + 1]; -1 for user 0, who is not in the training data."""
    fold = torch.randperm(users, generator=torch.Generator().manual_seed(seed)) % folds
    return torch.cat((torch.tensor([-1]), fold))


def train_folds(params: Params, files: Layout) -> None:
    """Train the base of `files.embeddings` without each of `tune.folds` parts of the users; write them to
    `files.folds`.

    Without folds, or with a base that cannot be cross-fitted, the folder holds only a config.json that says so. The
    learning rate is the base's, and the best epoch is chosen on all validation sessions, as the base's. UserError as
    `fit`, and where there are more folds than users.
    """
    path = files.embeddings / "config.json"
    config = read_json(path)
    name, models, ends = config["name"], [], []
    folds = params.tune.folds if cross_fits(name) else 0
    if folds:
        base, text = family(name)
        setattr(params.encoder, base, SimpleNamespace(**config["settings"]))
        resume = resume_folder("folds", flat(params), [path, *inputs(files, text)])
        train, valid = load_sessions(params, files)
        settings = with_rate(params.encoder.training, config["settings"]["lr"])
        users = int(train.user.max())
        if folds > users:
            raise UserError(f"tune.folds={folds} are more than the {users} users: lower it")
        fold_U = fold_of(users, folds, params.seed)
    for fold in range(folds):
        say(f"fold {fold + 1} of {folds}")
        model = new_encoder(params, files, name, train)
        rows = (fold_U[train.user[train.row].cpu()] != fold).nonzero()[:, 0].to(train.row.device)
        job = EncoderJob(model, train.subset(rows), valid, settings, arithmetic(settings.precision))
        ends.append(fit(job, settings, seed=params.seed, resume=resume / str(fold + 1),
                        name=f"{name} without fold {fold + 1}"))
        models.append(model)
    with replacing_folder(files.folds) as folder, torch.no_grad():
        for fold, model in enumerate(models):
            save_tensors(folder / f"{fold + 1}.safetensors", {
                "vectors": model.vectors(), **{f"encoder.{k}": v for k, v in model.encoder.state_dict().items()}})
        write_json(folder / "config.json", {"base": config, "folds": folds, "seed": params.seed})
    write_json(files.metrics("folds"), {f"fold {fold + 1}": outcome(end) for fold, end in enumerate(ends)})
    whole = Progress(**{key: sum(getattr(end, key) for end in ends) for key in ("seconds", "training_seconds",
                                                                                 "samples")})
    write_json(files.metrics("cost/folds"), cost(whole, nn.ModuleList(models)))
    if folds:
        shutil.rmtree(resume, ignore_errors=True)


class CrossFitted:
    """The base's scores of all items; a training session is scored by the base that was trained without its user.

    Any other session is scored by the base that was trained on all users: it knows more, and was not trained on that
    session's target.
    """

    def __init__(self, params: Params, files: Layout, items: int, device: torch.device) -> None:
        """Load the base and its folds; UserError where the folds belong to another base, catalogue or seed."""
        encoder, vectors = load_encoder(files.embeddings, items)
        self.whole = (encoder.to(device).eval(), vectors.to(device))
        self.folder = files.folds
        config, base = read_json(files.folds / "config.json"), read_json(files.embeddings / "config.json")
        if (config["base"], config["folds"], config["seed"]) != (base, params.tune.folds, params.seed):
            was = config["base"]["name"] + (" of other settings" if config["base"]["name"] == base["name"]
                                            and config["base"] != base else "")
            raise UserError(f"{files.folds} holds {config['folds']} folds of {was} at seed {config['seed']}, not "
                            f"{params.tune.folds} of {base['name']} at seed {params.seed}: run `dvc repro` to train "
                            "them anew")
        self.folds = [self._loaded(files.folds / f"{fold + 1}.safetensors") for fold in range(config["folds"])]
        self.users = base["settings"]["users"]
        self.fold_U = fold_of(self.users, config["folds"], config["seed"])
        self.read: WeakKeyDictionary[Sessions, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def _loaded(self, path: Path) -> tuple[SessionEncoder, Tensor]:
        tensors, (whole, vectors) = load_tensors(path), self.whole
        own = tensors.pop("vectors")
        if len(own) != len(vectors):
            raise UserError(f"{path} was trained for {len(own) - 1} items, the catalogue has {len(vectors) - 1}: run "
                            "`dvc repro` to train it anew")
        encoder = copy.deepcopy(whole)
        encoder.load_state_dict({key.removeprefix("encoder."): value for key, value in tensors.items()})
        return encoder.eval(), own.to(vectors.device)

    def shifts(self, count_V: Tensor) -> list[Tensor]:
        """Each fold's item vectors less the base's [V+1, E], after a rotation that aligns the fold with the base.

        Every training ends in a vector space of its own. The rotation is the orthogonal Procrustes solution
        (Schoenemann 1966); an item's weight is how often it is a target, `count_V` [V+1].
        """
        vectors = self.whole[1]
        weight = count_V[1:, None].to(vectors.device)
        shifts = []
        for _, own in self.folds:
            left, _, right = torch.linalg.svd((own[1:] * weight).T @ vectors[1:])
            shifts.append(own @ (left @ right) - vectors)
        return shifts

    @torch.no_grad()
    def __call__(self, sessions: Sessions, samples: Tensor, trained: bool) -> Tensor:
        """Scores [R, V+1] of samples [R]; `trained` where the base was trained on these sessions."""
        if not trained:
            encoder, vectors = self.whole
            return encoder.logits(encoder(sessions.graphs(samples), vectors), vectors)
        if sessions not in self.read:
            self.read[sessions] = self._read(sessions)
        session_ND, fold_N = self.read[sessions]
        fold_R = fold_N[samples.cpu()]
        scores = session_ND.new_empty(len(samples), len(self.whole[1]))
        for fold in fold_R.unique().tolist():
            (encoder, vectors), at = self.folds[fold], (fold_R == fold).nonzero()[:, 0].to(samples.device)
            scores[at] = encoder.logits(session_ND[samples[at]], vectors)
        return scores

    def _read(self, sessions: Sessions) -> tuple[Tensor, Tensor]:
        """The session vectors of all training samples by the encoders of their folds [N, E], and their folds [N]."""
        if int(sessions.user.max()) != self.users:
            raise UserError(f"{self.folder} was trained for other users than the sessions have: run `dvc repro` to "
                            "train it anew")
        fold_N = self.fold_U[sessions.user[sessions.row].cpu()]
        session_ND = self.whole[1].new_zeros(len(sessions), self.whole[1].shape[1])
        for samples in torch.argsort(sessions.length.cpu(), stable=True).split(READ):
            for fold in fold_N[samples].unique().tolist():
                encoder, vectors = self.folds[fold]
                at = samples[fold_N[samples] == fold].to(session_ND.device)
                session_ND[at] = encoder(sessions.graphs(at), vectors)
        return session_ND, fold_N
