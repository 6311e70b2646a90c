"""The cross-fitted base: who is left out, what that changes, and which fold scores a session."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from machine import DEFAULTS, stage
from small_split import ITEMS, USERS, set_up, write_data
from tiny import FILES
from torch.nn import functional as F

from llmgr.encoders.registry import REGISTRY, build_encoder, load_encoder
from llmgr.params.loading import load
from llmgr.params.names import WHOLE
from llmgr.prior import cross_fitting
from llmgr.prior.cross_fitting import CrossFitted, fold_of
from llmgr.prior.left_out import LeftOut
from llmgr.prior.weighted_sum import BANDS, Prior
from llmgr.runtime.artifacts import digest, load_tensors, read_json, save_tensors, write_json
from llmgr.runtime.errors import UserError
from llmgr.sessions.reading import read_split
from llmgr.training import engine

FOLDS = 3
PARAMS = SimpleNamespace(seed=2026, tune=SimpleNamespace(folds=FOLDS))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_data(tmp_path)
    set_up(tmp_path, tune__linear=True, tune__folds=FOLDS)
    assert stage("pretrain", "--encoder", "gcsan", root=tmp_path) == 0
    assert stage("export", root=tmp_path) == 0
    return tmp_path


def test_every_user_is_left_out_once_and_strangers_never() -> None:
    fold = fold_of(100, 3, 5)
    assert fold[0] == -1 and torch.equal(fold, fold_of(100, 3, 5)) and not torch.equal(fold, fold_of(100, 3, 6))
    assert sorted(torch.bincount(fold[1:]).tolist()) == [33, 33, 34]


def test_a_fold_knows_nothing_of_its_users(place: Path) -> None:
    """Other clicks of one fold's users change what is trained without the other folds, and not what lacks them."""
    assert stage("folds", root=place) == 0
    before = {fold: digest(place / f"models/folds/{fold + 1}.safetensors") for fold in range(FOLDS)}
    assert len(set(before.values())) == FOLDS
    table = place / "data/sessions/train.parquet"
    frame = pl.read_parquet(table)
    fold = fold_of(USERS, FOLDS, 2026)
    number = {user: n for n, user in enumerate(sorted(frame["user"].unique()), 1)}
    moved = [target % ITEMS + 1 if fold[number[user]] == 1 else target
             for user, target in zip(frame["user"], frame["target"])]
    assert 0 < sum(a != b for a, b in zip(moved, frame["target"])) < len(moved)
    frame.with_columns(target=pl.Series(moved, dtype=pl.Int32)).write_parquet(table)
    assert stage("folds", root=place) == 0
    changed = {fold for fold in range(FOLDS) if digest(place / f"models/folds/{fold + 1}.safetensors") != before[fold]}
    assert changed == {0, 2}


def test_a_session_that_was_trained_on_is_scored_without_its_user_and_any_other_by_the_base(
        place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage("folds", root=place) == 0
    monkeypatch.chdir(place)
    monkeypatch.setattr(cross_fitting, "READ", 7)
    scores, fold = CrossFitted(PARAMS, FILES, ITEMS, torch.device("cpu")), fold_of(USERS, FOLDS, 2026)
    encoder, vectors = load_encoder("models/embeddings", ITEMS)
    config = read_json("models/embeddings/config.json")
    own = {}
    for k in range(FOLDS):
        tensors = load_tensors(f"models/folds/{k + 1}.safetensors")
        one = build_encoder("gcsan", config["dim"], config["dropout"], config["settings"])
        one.load_state_dict({key[8:]: value for key, value in tensors.items() if key != "vectors"})
        own[k] = one.eval(), tensors["vectors"]
    train, _ = read_split(FILES, "train", 50)
    with torch.no_grad():
        chosen = torch.randperm(len(train))[:20]
        found = scores(train, chosen, True)
        for row, sample in enumerate(chosen):
            one, table = own[int(fold[train.user[train.row[sample]]])]
            torch.testing.assert_close(found[row], (one(train.graphs(sample[None]), table) @ table.T)[0])
        every = torch.arange(USERS)
        for split in ("valid", "test"):
            sessions, _ = read_split(FILES, split, 50)
            torch.testing.assert_close(scores(sessions, every, False),
                                       encoder.eval()(sessions.graphs(every), vectors) @ vectors.T)


def test_a_folds_item_vectors_are_turned_onto_the_bases(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact where a fold differs by a rotation alone; else no turn brings the two closer, by items' weights."""
    assert stage("folds", root=place) == 0
    monkeypatch.chdir(place)
    vectors = load_tensors("models/embeddings/items.safetensors")["vectors"]
    turn = torch.linalg.qr(torch.randn(vectors.shape[1], vectors.shape[1]))[0]
    path = "models/folds/1.safetensors"
    save_tensors(path, load_tensors(path) | {"vectors": vectors @ turn})
    count = torch.arange(ITEMS + 1.0)
    base = CrossFitted(PARAMS, FILES, ITEMS, torch.device("cpu"))
    same, other, _ = base.shifts(count)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-5, rtol=0)
    assert other.norm() > 0.1 and not other[0].any()
    turned, own = vectors + other, load_tensors("models/folds/2.safetensors")["vectors"]
    torch.testing.assert_close(turned @ turned.T, own @ own.T, atol=1e-4, rtol=1e-3)

    def apart(found: torch.Tensor) -> float:
        return (count[:, None] * (found - vectors).square()).sum().item()

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        skew = 0.05 * torch.randn(*turn.shape, generator=generator)
        assert apart(turned @ torch.matrix_exp(skew - skew.T)) > apart(turned)


def test_the_bases_scores_are_weighted_by_how_often_others_chose_an_item(place: Path, monkeypatch: pytest.MonkeyPatch
                                                                       ) -> None:
    assert stage("folds", root=place) == 0
    monkeypatch.chdir(place)
    train, frame = read_split(FILES, "train", 50)
    model, base = LeftOut(train, 3.0, 0.7, None, 0.0, ITEMS), CrossFitted(PARAMS, FILES, ITEMS, torch.device("cpu"))
    prior = Prior(model, base)
    samples = torch.arange(len(train))
    with torch.no_grad():
        nothing = F.cross_entropy(prior(train, samples, True)[:, 1:], train.target - 1)
    prior.fit(train, 1)
    F.cross_entropy(prior(train, samples, True)[:, 1:], train.target - 1).backward()
    assert max(parameter.grad.abs().max() for parameter in prior.parameters()) < 2e-3, "it is the optimum"
    with torch.no_grad():
        assert F.cross_entropy(prior(train, samples, True)[:, 1:], train.target - 1) < nothing - 0.1
    for parameter in prior.parameters():
        parameter.data = torch.randn_like(parameter)
    for trained in (True, False):
        scores, own = model(train, samples)
        of_base, found = base(train, samples, trained), prior(train, samples, trained).detach()
        count, held = torch.bincount(train.target, minlength=ITEMS + 1), own.toarray()
        for row in (0, 7, len(train) - 1):
            for item in range(1, ITEMS + 1):
                band = sum(int(count[item]) - held[row, item] >= edge for edge in BANDS)
                expected = prior.weight[band] * scores[row, item] * prior.scale + prior.bias[band]
                expected = expected + prior.base_weight[band] * of_base[row, item]
                expected = expected + prior.clicked * (item in frame["items"][row])
                assert found[row, item].item() == pytest.approx(expected.item(), abs=1e-3, rel=1e-4)


def test_what_was_trained_before_an_interruption_is_not_trained_again(place: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      capfd: pytest.CaptureFixture) -> None:
    assert stage("folds", root=place) == 0
    undisturbed = digest(place / "models/folds")
    reached, fit = [], engine.fit

    def cut(*arguments: object, **options: object) -> object:
        reached.append(options["name"])
        if len(reached) == 2:
            raise UserError("the power is gone")
        return fit(*arguments, **options)

    monkeypatch.setattr(cross_fitting, "fit", cut)
    assert stage("folds", root=place) == 2
    assert reached == ["gcsan without fold 1", "gcsan without fold 2"]
    assert digest(place / "models/folds") == undisturbed, "a folder stays whole until another is"
    monkeypatch.setattr(cross_fitting, "fit", fit)
    capfd.readouterr()
    assert stage("folds", root=place) == 0
    said = capfd.readouterr().err
    assert said.count("resuming at step") == 1 and "fold 1: epoch" not in said and "fold 2: epoch 2" in said
    assert digest(place / "models/folds") == undisturbed
    assert not [path for path in (place / ".resume/folds").iterdir() if path.suffix != ".lock"]
    cost = read_json(place / "reports/metrics/cost/folds.json")
    one = read_json(place / "reports/metrics/cost/gcsan.json")
    assert cost["trainable_parameters"] == FOLDS * one["trainable_parameters"] and cost["seconds"] > 0
    assert list(read_json(place / "reports/metrics/folds.json")) == ["fold 1", "fold 2", "fold 3"]


def test_without_folds_nothing_is_trained(place: Path) -> None:
    set_up(place, tune__linear=True, tune__folds=0)
    assert stage("folds", root=place) == 0
    assert [path.name for path in (place / "models/folds").iterdir()] == ["config.json"]
    assert read_json(place / "reports/metrics/folds.json") == {}
    assert read_json(place / "reports/metrics/cost/folds.json")["seconds"] == 0


def test_what_does_not_fit_is_refused_in_a_sentence(place: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capfd: pytest.CaptureFixture) -> None:
    assert stage("folds", root=place) == 0
    monkeypatch.chdir(place)
    cpu = torch.device("cpu")

    def refused(told: str, params: SimpleNamespace = PARAMS) -> None:
        with pytest.raises(UserError, match=f"{told}: run `dvc repro` to train (them|it) anew"):
            CrossFitted(params, FILES, ITEMS, cpu)

    for params, told in ((SimpleNamespace(seed=2026, tune=SimpleNamespace(folds=2)), "2 of gcsan at seed 2026"),
                         (SimpleNamespace(seed=1, tune=SimpleNamespace(folds=3)), "3 of gcsan at seed 1")):
        refused(f"models/folds holds 3 folds of gcsan at seed 2026, not {told}", params)
    config = read_json("models/embeddings/config.json")
    write_json("models/embeddings/config.json", config | {"settings": config["settings"] | {"lr": 0.5}})
    refused("3 folds of gcsan of other settings at seed 2026, not 3 of gcsan at seed 2026")
    write_json("models/embeddings/config.json", config)
    train, _ = read_split(FILES, "train", 50)
    train.user = train.user.clamp(max=USERS - 1)
    with pytest.raises(UserError, match="models/folds was trained for other users than the sessions have"):
        CrossFitted(PARAMS, FILES, ITEMS, cpu)(train, torch.arange(3), True)
    path = place / "models/folds/2.safetensors"
    tensors = load_tensors(path)
    save_tensors(path, tensors | {"vectors": tensors["vectors"][:-1]})
    refused(f"2.safetensors was trained for {ITEMS - 1} items, the catalogue has {ITEMS}")
    set_up(place, tune__linear=True, tune__folds=USERS + 1)
    assert stage("folds", root=place) == 2
    assert f"tune.folds={USERS + 1} are more than the {USERS} users: lower it" in capfd.readouterr().err


def test_the_bases_that_cannot_be_divided_are_those_with_a_part_of_each_user_or_a_curved_space() -> None:
    """A turn of the item vectors must leave the scores as they are, and a user left out must lack nothing."""
    section = load(DEFAULTS).encoder
    for name in REGISTRY:
        settings = vars(getattr(section, name)) | {"users": 3, "max_session": 5}
        encoder = build_encoder(name, 8, 0.0, settings)
        divides = not encoder.reads_users and encoder.item_width == 8
        assert divides == (name not in WHOLE), name
