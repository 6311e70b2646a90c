"""The text tower: where it starts, what it learns, and whose scores a session gets."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from machine import stage
from small_split import ITEMS as CATALOGUE
from small_split import USERS, set_up, write_data
from tiny import FILES, ITEMS, LISTS, TITLES, language_model, prefixes, tokenizer
from torch.nn import functional as F

from llmgr.params.loading import load
from llmgr.prior import text_tower, tower, tower_training
from llmgr.prior.cross_fitting import fold_of
from llmgr.prior.left_out import LeftOut
from llmgr.prior.text_tower import LanguageModelMeans, TextTower, TokenMeans
from llmgr.prior.tower import Tower
from llmgr.prior.tower_training import TowerJob
from llmgr.prior.weighted_sum import BANDS, Prior
from llmgr.runtime.artifacts import load_tensors, read_json, save_tensors, write_json
from llmgr.runtime.errors import UserError
from llmgr.sessions.clicks import click_weights
from llmgr.sessions.reading import read_split
from llmgr.sessions.tensors import Sessions
from llmgr.text.items import token_table
from llmgr.text.vectors import click_similarity, encode_texts, whitening
from llmgr.training.engine import fit
from llmgr.training.job import Progress
from llmgr.training.precision import arithmetic

SETTINGS = SimpleNamespace(epochs=12, batch_size=6, accumulate=1, lr=3e-3, weight_decay=0.0, warmup_share=0.1, clip=1.0,
                           checkpoint_seconds=1e9, decay=0.7)
CPU = torch.device("cpu")


def small_tower(kind: str = "llama", texts: list[str] = TITLES) -> TextTower:
    table = token_table(tokenizer("llama" if kind == "tokens" else kind)(texts)["input_ids"], 64)
    torch.manual_seed(0)
    model = TextTower(TokenMeans(*table, 16) if kind == "tokens" else
                      LanguageModelMeans(language_model(kind).requires_grad_(True), *table))
    model.whiten()
    return model


def job(model: TextTower, sessions: Sessions, **changes) -> TowerJob:
    settings = SimpleNamespace(**vars(SETTINGS) | changes)
    return TowerJob(model, sessions, sessions, settings, torch.float32, torch.arange(len(sessions)))


@pytest.mark.parametrize("cells", [9, 40, 10000])
@pytest.mark.parametrize("kind", ["llama", "bert", "all-MiniLM-L6-v2"])
def test_it_starts_as_the_whitened_text_vectors_however_texts_are_batched(kind, cells, monkeypatch):
    monkeypatch.setitem(text_tower.CELLS, "cpu", cells)
    model, slack = small_tower(kind), {"atol": 1e-4, "rtol": 1e-3}
    raw = encode_texts(language_model(kind), tokenizer(kind), TITLES, 64)
    mean, axes = whitening(raw)
    vectors = model.vectors()
    assert vectors.shape == (ITEMS + 1, raw.shape[1]) and vectors[0].abs().max() == 0
    some = torch.tensor([7, 2, 11])
    torch.testing.assert_close(model.means(some), raw[some - 1], **slack)
    torch.testing.assert_close(vectors[1:], F.normalize((raw - mean) @ axes, dim=1), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(model(some), vectors[some], **slack)


def test_whitened_vectors_vary_equally_in_every_direction():
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor(
        [3.0, 2.0, 1.0, 1.0, 0.5, 0.0])) + 4
    mean, axes = whitening(vectors)
    spread = torch.cov(((vectors - mean) @ axes).T, correction=0)
    torch.testing.assert_close(spread, torch.diag(torch.tensor([0.0, 1, 1, 1, 1, 1])), atol=1e-4, rtol=1e-3)


def test_a_click_weighs_less_the_further_back_it_is():
    graphs = prefixes().graphs(torch.tensor([2, 6]))
    assert click_weights(graphs, 0.5)[0].tolist()[:3] == [0.25, 0.5, 1.0]
    assert click_weights(graphs, 0.5)[1].tolist() == [1.0, 0.0, 0.0], "padding weighs nothing"


@pytest.mark.parametrize("kind", ["llama", "tokens"])
@torch.no_grad()
def test_the_loss_is_that_of_each_target_among_the_others_that_the_session_does_not_click(kind):
    model, sessions = small_tower(kind), prefixes()
    model.head.weight.normal_(generator=torch.Generator().manual_seed(2))  # whitened, so few texts are all alike
    vectors, micro = model.vectors(), torch.tensor([0, 2, 5, 9, 12, 16, 4])
    assert len(set(sessions.row[micro].tolist())) < len(micro), "a session twice, so that it has later clicks"
    targets, total, masked = sorted(set(sessions.target[micro].tolist())), 0.0, 0
    for sample in micro:
        row, length = sessions.items[sessions.row[sample]].tolist(), int(sessions.length[sample])
        clicks, target = row[:length], int(sessions.target[sample])
        later = sessions.target[micro[sessions.row[micro] == sessions.row[sample]]].tolist()
        query = sum(0.7 ** (length - 1 - n) * vectors[item] for n, item in enumerate(clicks))
        scores = {other: 10 * float(F.cosine_similarity(query, vectors[other], dim=0)) for other in targets
                  if other == target or other not in clicks + later}
        masked += len(targets) - len(scores)
        total -= float(torch.tensor(scores[target]) - torch.tensor(list(scores.values())).logsumexp(0))
    found = job(model, sessions).loss(micro)
    assert masked > 0 and found.targets == len(micro)
    assert float(found.total) == pytest.approx(total, rel=1e-4)
    read = {int(i) for s in micro for i in sessions.items[sessions.row[s], :sessions.length[s]]} | set(targets)
    assert found.tokens == int(model.count[list(read)].sum())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_the_chosen_samples_once_an_epoch_those_of_a_session_together(accumulate):
    made = job(small_tower(), prefixes(), accumulate=accumulate)
    made.rows = torch.tensor([1, 3, 4, 7, 8, 9, 12, 13, 14])
    epochs = [made.steps(0, torch.Generator().manual_seed(seed)) for seed in range(5)]
    orders = [torch.cat([m for s in steps for m in s]) for steps in epochs]
    assert all(sorted(order.tolist()) == made.rows.tolist() for order in orders)
    assert [[len(m) for m in s] for s in epochs[0]] == ([[6], [3]] if accumulate == 1 else [[6, 3]])
    turns = [torch.unique_consecutive(made.train.row[order]).tolist() for order in orders]
    assert all(len(set(turn)) == len(turn) for turn in turns) and len({tuple(turn) for turn in turns}) > 1


@torch.no_grad()
def test_without_a_language_model_a_text_is_the_mean_of_its_normed_token_vectors():
    ids = [[4, 9, 4], [], [7], [9, 2, 30, 7]]
    torch.manual_seed(3)
    means = TokenMeans(*token_table(ids, 4), 8)
    assert len(means.weight) == len({t for row in ids for t in row}), "tokens that no text has are not drawn"
    table = dict(zip(sorted({t for row in ids for t in row}), means.weight))
    for items in ([1, 2, 3, 4], [4, 1], [2], [3, 3, 1]):
        found = means(torch.tensor(items))
        for vector, item in zip(found, items):
            normed = [(table[t] - table[t].mean()) / (table[t].var(correction=0) + 1e-5).sqrt() for t in ids[item - 1]]
            mean = torch.stack(normed).mean(0) if normed else torch.zeros(8)
            torch.testing.assert_close(vector, F.normalize(mean, dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "tokens"])
def test_it_learns_which_texts_follow_each_other_and_ranks_by_it(tmp_path, kind):
    """Item n is followed by n + 6, which shares no letter with it; no item is a target of two others."""
    lists = [[n] for n in range(1, 7)] * 3
    items = torch.tensor(lists, dtype=torch.int32)
    rows = torch.arange(len(lists))
    sessions = Sessions(items, rows, torch.ones(len(lists), dtype=torch.long), items[:, 0].long() + 6)
    model = small_tower(kind)
    made = job(model, sessions, epochs=10 if kind == "llama" else 30)
    progress = fit(made, made.settings, seed=0, resume=tmp_path, name="tower")
    first, last = progress.epoch_rows[0], progress.epoch_rows[-1]
    assert last["train_loss"] < 0.1 and first["valid_mrr_at_20"] < 0.4
    assert last["valid_mrr_at_20"] == pytest.approx(0.5), "second to the click itself alone"
    before = small_tower(kind)
    assert model.log_temperature.item() != pytest.approx(before.log_temperature.item())
    assert all((new - old).abs().max() > 1e-4 for new, old in zip(model.means.parameters(), before.means.parameters())
               if old.numel() > 1)


def test_a_token_learns_from_the_texts_that_hold_it_and_as_exactly_in_bf16():
    model, sessions = small_tower("tokens"), prefixes()
    made, micro = job(model, sessions), torch.tensor([0, 9, 12])
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    made.loss(micro).total.backward()
    read = {int(item) for s in micro for item in sessions.items[sessions.row[s], :sessions.length[s]]}
    met = {t for item in read | set(sessions.target[micro].tolist())
           for t in tokenizer("llama")(TITLES[item - 1])["input_ids"]}
    every = sorted({t for title in TITLES for t in tokenizer("llama")(title)["input_ids"]})
    learned = model.means.weight.grad.abs().sum(1) > 0
    assert {t for t, one in zip(every, learned) if one} == met and len(met) < len(every)
    made.dtype = torch.bfloat16
    assert torch.equal(made.loss(micro).total, job(model, sessions).loss(micro).total)


def ready(root: Path, folds: int = 3, **changes) -> None:
    """Data, and a backbone whose texts are those of the tiny tests."""
    write_data(root)
    set_up(root, tune__linear=True, tune__folds=folds, tower__enabled=True, tower__epochs=1, tower__batch_size=64,
           tower__max_text_tokens=12, tower__precision="fp32", **changes)
    table = root / "data/core/items.parquet"
    pl.read_parquet(table).with_columns(text=pl.format("an item of {} letters", "item_id")).write_parquet(table)
    folder = root / "models/text_encoder"
    folder.mkdir(parents=True, exist_ok=True)
    language_model("bert").save_pretrained(folder)
    tokenizer("bert").save_pretrained(folder)
    write_json(folder / "text_encoder.json", {"sha256": {"model.safetensors": "own"}, "width": 16})


@pytest.mark.parametrize("encoder, own", [("language-model", "word_embeddings"), ("tokens", "means.weight")])
def test_the_stage_tunes_one_over_all_users_and_one_without_each_fold(tmp_path, capfd, encoder, own):
    ready(tmp_path, tower__encoder=encoder)
    assert stage("tower", root=tmp_path) == 0
    names = ["whole", "1", "2", "3"]
    vectors = {n: load_tensors(tmp_path / f"models/tower/{n}.safetensors")["vectors"] for n in names}
    assert {v.shape for v in vectors.values()} == {(CATALOGUE + 1, 16)}
    assert all((vectors[a] - vectors[b]).abs().max() > 1e-4 for a in names for b in names if a < b)
    record = read_json(tmp_path / "reports/metrics/tower.json")
    assert list(record) == ["whole", "fold 1", "fold 2", "fold 3"] and record["whole"]["hr_at_20"] >= 0
    cost, whole = read_json(tmp_path / "reports/metrics/cost/tower.json"), load_tensors(
        tmp_path / "models/tower/tower.safetensors")
    assert cost["trainable_parameters"] == sum(v.numel() for v in whole.values()) == cost["total_parameters"]
    assert "head.weight" in whole and any(own in name for name in whole)
    said = capfd.readouterr().err
    assert "tower: epoch 1" in said and "tower without fold 3: epoch 1" in said
    assert said.count("valid_hr_at_20") == 1, "those without a fold are validated once, at their end"
    assert not list((tmp_path / ".resume").rglob("*.pt"))


def test_a_fold_is_tuned_without_its_users_and_scores_theirs(tmp_path, monkeypatch):
    """Which samples each training gets, and that what it saves is what their users' sessions are scored with."""
    ready(tmp_path)
    monkeypatch.chdir(tmp_path)
    params, seen = load("params.yaml"), []

    def trained(made, settings, *, seed, resume, name):
        with torch.no_grad():
            made.model.head.bias += len(seen)
        seen.append((name, made.rows, made.model.vectors()))
        return Progress(epoch_rows=[{"epoch": 0}])

    monkeypatch.setattr(tower_training, "fit", trained)
    tower_training.train_tower(params, FILES)
    train, _ = read_split(FILES, "train", 50)
    user, fold = train.user[train.row], fold_of(USERS, 3, params.seed)
    assert [name for name, *_ in seen] == ["tower", *(f"tower without fold {k}" for k in (1, 2, 3))]
    for number, (_, rows, _) in enumerate(seen):
        assert set(rows.tolist()) == {n for n in range(len(train)) if number == 0 or fold[user[n]] != number - 1}
    model, every = Tower(params, FILES, CATALOGUE, CPU), torch.arange(len(train))
    found = model(train, every, True) / model.scale
    for sample in every:
        own = seen[1 + int(fold[user[sample]])][2]
        torch.testing.assert_close(found[sample], click_similarity(train, sample[None], own, 0.7)[0])


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"accumulate": 2}])
def test_other_ways_of_tuning_take_the_plain_ones_first_step(tmp_path, monkeypatch, change):
    ready(tmp_path)
    monkeypatch.chdir(tmp_path)
    params, ends = load("params.yaml"), []
    train, valid = (read_split(FILES, split, 50)[0] for split in ("train", "valid"))
    for number, changes in enumerate(({}, change)):
        settings = replace(params.tower, **{"precision": "fp32", "batch_size": 40, "epochs": 2} | changes)
        short = replace(params.data, max_session=30)  # a batch must hold more than one session
        model = tower_training.build_tower(replace(params, tower=settings, data=short), FILES, CPU)
        model.train()
        made = TowerJob(model, train, valid, settings, arithmetic(settings.precision), torch.arange(len(train)))
        progress = fit(made, settings, seed=1, resume=tmp_path / str(number), name="tower")
        ends.append(progress.step_rows[0]["loss"])  # later ones drift apart: whitening magnifies rounding
    slack = {"gradient_checkpointing": 1e-5, "precision": 0.03, "accumulate": 0.1}[next(iter(change))]
    assert ends[1] == pytest.approx(ends[0], rel=slack)


@pytest.mark.parametrize("kind", ["bert", "tokens"])
@torch.no_grad()
def test_texts_without_tokens_and_batches_of_one_stay_finite(kind):
    table = token_table([[], [3, 4], [], [5]], 2)
    model = TextTower(TokenMeans(*table, 8) if kind == "tokens" else LanguageModelMeans(language_model(kind), *table))
    model.whiten()
    assert model.vectors().isfinite().all() and model(torch.tensor([1])).isfinite().all()
    assert float(job(small_tower(), prefixes()).loss(torch.tensor([3])).total) == pytest.approx(0, abs=1e-6)


def test_a_disabled_tower_leaves_only_a_config(tmp_path):
    ready(tmp_path)
    set_up(tmp_path, tower__enabled=False)
    assert stage("tower", root=tmp_path) == 0
    assert [p.name for p in (tmp_path / "models/tower").iterdir()] == ["config.json"]
    assert read_json(tmp_path / "reports/metrics/tower.json") == {}
    assert (tmp_path / "reports/curves/tower_steps.csv").exists()


@pytest.mark.parametrize("change, told", [
    ({"tower__max_text_tokens": 701}, "tower.max_text_tokens=701 exceeds the text encoder's 700 positions"),
    ({"tune__folds": USERS + 1}, f"tune.folds={USERS + 1} are more than the {USERS} users")])
def test_what_cannot_be_tuned_is_refused_in_a_sentence(tmp_path, capfd, change, told):
    ready(tmp_path)
    set_up(tmp_path, **{"tune__linear": True, "tower__enabled": True, "tune__folds": 3} | change)
    assert stage("tower", root=tmp_path) == 2
    assert told in capfd.readouterr().err


TOWER = SimpleNamespace(enabled=True, encoder="language-model", decay=0.7071068)
PARAMS = SimpleNamespace(seed=5, tune=SimpleNamespace(folds=2), tower=TOWER,
                         model=SimpleNamespace(texts="own", weights="pretrained"))
DECAY = PARAMS.tower.decay


def saved(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[torch.Tensor]:
    """A tower's folder of random vectors, whole and of two folds."""
    monkeypatch.chdir(root)
    draw = torch.Generator().manual_seed(1)
    vectors = [F.pad(F.normalize(torch.randn(ITEMS, 4, generator=draw), dim=1), (0, 0, 1, 0)) for _ in range(3)]
    for name, one in zip(("whole", "1", "2"), vectors):
        save_tensors(root / f"models/tower/{name}.safetensors", {"vectors": one})
    write_json(root / "models/text_encoder/text_encoder.json", {"sha256": {"model.safetensors": "own"}})
    write_json(root / "models/tower/config.json", tower.made_of(PARAMS, FILES) | {"users": len(LISTS)})
    return vectors


def test_a_session_that_was_tuned_on_is_scored_without_its_user_and_any_other_by_the_whole(tmp_path, monkeypatch):
    vectors, sessions = saved(monkeypatch, tmp_path), prefixes()
    sessions.user = torch.arange(1, len(LISTS) + 1)
    model, every = Tower(PARAMS, FILES, ITEMS, CPU), torch.arange(len(sessions))
    fold = fold_of(len(LISTS), 2, 5)
    assert set(fold[1:].tolist()) == {0, 1}
    trained, fresh = model(sessions, every, True), model(sessions, every, False)
    torch.testing.assert_close(fresh, click_similarity(sessions, every, vectors[0], DECAY) * model.scale)
    for sample in every:
        own = vectors[1 + int(fold[sessions.user[sessions.row[sample]]])]
        similarity = click_similarity(sessions, sample[None], own, DECAY)[0]
        torch.testing.assert_close(trained[sample], similarity * model.scale)
    pairs = vectors[0][1:] @ vectors[0][1:].T * model.scale
    assert float(pairs.square().mean().sqrt()) == pytest.approx((ITEMS + 1) / ITEMS, rel=1e-4)
    sessions.user = sessions.user + 1
    with pytest.raises(UserError, match="tuned on other users"):
        model(sessions, every, True)


@pytest.mark.parametrize("change, told", [
    ({"seed": 6}, "seed=5, not 6"), ({"tune": SimpleNamespace(folds=3)}, "folds=2, not 3"),
    ({"tower": SimpleNamespace(**vars(TOWER) | {"decay": 0.5})}, "decay=0.707107, not 0.5"),
    ({"tower": SimpleNamespace(**vars(TOWER) | {"encoder": "tokens"})}, "encoder=language-model, not tokens"),
    ({"model": SimpleNamespace(texts="shuffled", weights="pretrained")}, "texts=own, not shuffled"),
    ({"model": SimpleNamespace(texts="own", weights="random")}, "weights=pretrained, not random"),
    ({}, "another text encoder")])
def test_a_tower_of_other_parameters_is_refused(tmp_path, monkeypatch, change, told):
    saved(monkeypatch, tmp_path)
    digest = tmp_path / "models/text_encoder/text_encoder.json"
    own = digest.read_bytes()
    if not change:
        write_json(digest, {"sha256": {"model.safetensors": "other"}})
    with pytest.raises(UserError, match=told):
        Tower(SimpleNamespace(**vars(PARAMS) | change), FILES, ITEMS, CPU)
    digest.write_bytes(own)
    with pytest.raises(UserError, match=f"{ITEMS} items, the catalogue {ITEMS + 1}"):
        Tower(PARAMS, FILES, ITEMS + 1, CPU)


def test_the_linear_start_weighs_the_towers_scores_as_those_of_a_session_it_has_not_met(tmp_path, monkeypatch):
    saved(monkeypatch, tmp_path)
    sessions = prefixes()
    sessions.user = torch.arange(1, len(LISTS) + 1)
    model = LeftOut(sessions, 3.0, 0.7, None, 0.0, ITEMS)
    plain, term = Prior(model), Prior(model, None, Tower(PARAMS, FILES, ITEMS, CPU))
    every = torch.arange(len(sessions))
    with torch.no_grad():
        weight = 0.1 * torch.arange(1.0, len(BANDS) + 2)
        term.tower_weight.copy_(weight)
        for trained in (True, False):
            added = term(sessions, every, trained) - plain(sessions, every, trained)
            scores = term.tower(sessions, every, trained)
            count = torch.from_numpy(model.targets.sum(0))
            for sample in every:
                own = (sessions.user[sessions.row] == sessions.user[sessions.row[sample]]).nonzero()[:, 0]
                others = count - torch.bincount(sessions.target[own], minlength=ITEMS + 1)
                band = torch.bucketize(others, torch.tensor(BANDS, dtype=others.dtype), right=True)
                torch.testing.assert_close(added[sample], weight[band] * scores[sample], atol=1e-5, rtol=1e-4)
    term.fit(sessions, 0)
    assert set(dict(term.named_parameters())) == {"weight", "bias", "clicked", "tower_weight"}
    assert float(term.tower_weight.detach().abs().max()) > 0


def test_an_ablation_of_random_weights_or_shuffled_texts_has_a_tower_of_them(tmp_path, monkeypatch):
    ready(tmp_path)
    monkeypatch.chdir(tmp_path)
    params = load("params.yaml")
    models = (replace(params.model, **change) for change in ({}, {"weights": "random"}, {"texts": "shuffled"}))
    own, random, dealt = (tower_training.build_tower(replace(params, model=model), FILES, CPU).means
                          for model in models)
    name = "language_model.encoder.layer.0.attention.self.query.weight"
    weights = [dict(model.named_parameters())[name] for model in (own, random, dealt)]
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1])
    assert sorted(map(tuple, own.token.tolist())) == sorted(map(tuple, dealt.token.tolist()))
    assert not torch.equal(own.token, dealt.token)


def test_a_tower_of_tokens_is_drawn_by_the_seed_and_reads_an_ablations_shuffled_texts(tmp_path, monkeypatch):
    ready(tmp_path, tower__encoder="tokens")
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "models/text_encoder/text_encoder.json", {"width": 12})
    params, every = load("params.yaml"), torch.arange(1, CATALOGUE + 1)
    changes = {}, {}, {"seed": params.seed + 1}, {"model": replace(params.model, texts="shuffled")}
    own, again, other, dealt = (tower_training.build_tower(replace(params, **change), FILES, CPU).means(every).detach()
                                for change in changes)
    assert own.shape == (CATALOGUE, 12) and torch.equal(own, again) and not torch.allclose(own, other, atol=1e-2)
    assert not torch.equal(own, dealt)
    assert sorted(map(tuple, own.tolist())) == sorted(map(tuple, dealt.tolist()))
