"""What every session encoder must do: names, invariances, gradients, learning, saving, reading texts."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import chain, encoder_section
from torch.nn import functional as F

from llmgr.encoders import pretraining
from llmgr.encoders.layers import Dropout
from llmgr.encoders.pretraining import EncoderJob
from llmgr.encoders.registry import REGISTRY, EncoderWithItems, build_with_items, family, load_encoder, save_with_items
from llmgr.ranking.loop import rank_sessions
from llmgr.runtime.errors import UserError
from llmgr.sessions.batching import by_length
from llmgr.sessions.tensors import Sessions
from llmgr.training.engine import fit

ITEMS, DIM, USERS, LONGEST = 12, 8, 4, 10
LISTS = [[3, 5, 3, 7, 7, 2], [4], [1, 2], [9, 9, 9], [6, 1, 6, 1, 8], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
RATES = {"hcgr": 0.1, "sasrec": 0.08, "bsarec": 0.08, "stamp": 0.03, "gcsan": 0.08}
"""Learning rates of the Markov chain below, where they are not 0.02."""
HITS = {"sasrec": 0.8, "bsarec": 0.8}
"""Hit rates of the Markov chain to pass, where they are not 0.9: these start from much smaller weights."""


def sessions(lists: list[list[int]] = LISTS, users: list[int] | None = None) -> Sessions:
    items = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
    for row, clicks in enumerate(lists):
        items[row, :len(clicks)] = torch.tensor(clicks)
    target = torch.arange(len(lists)) % ITEMS + 1
    user = torch.tensor(users or [(n % USERS) + 1 for n in range(len(lists))])
    return Sessions(items, torch.arange(len(lists)), torch.tensor([len(x) for x in lists]), target, user)


def made(name: str, dropout: float = 0.0, items: int = ITEMS) -> EncoderWithItems:
    torch.manual_seed(0)
    features = F.pad(torch.randn(items, 3), (0, 0, 1, 0))
    return build_with_items(name, items, encoder_section(DIM, dropout), features, users=USERS, max_session=LONGEST)


def every() -> torch.Tensor:
    return torch.arange(len(LISTS))


@pytest.mark.parametrize("name", REGISTRY)
@torch.no_grad()
def test_a_session_does_not_hang_on_its_batch(name):
    model = made(name, dropout=0.3).eval()
    together, vectors = model(sessions().graphs(every()))
    users = sessions().user.tolist()
    alone = torch.cat([model(sessions([x], [u]).graphs(torch.tensor([0])))[0] for x, u in zip(LISTS, users)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(model(sessions().graphs(order))[0], together[order], atol=1e-5, rtol=1e-4)
    assert (together @ vectors[1:].T).std(0).min() > 1e-4, "sessions differ"


@pytest.mark.parametrize("name", [f"{base}{text}" for base in REGISTRY for text in ("", "-text")])
def test_every_parameter_learns_and_padding_does_not(name):
    model = made(name)
    session, vectors = model(sessions().graphs(every()))
    model.encoder.loss(session, vectors, sessions().target).backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    assert not still
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
    assert model.items.table.weight.grad[0].abs().sum() == 0
    readout = {id(p) for p in model.encoder.readout_parameters()}
    assert readout and readout <= {id(p) for p in model.encoder.parameters()}


@pytest.mark.parametrize("name", REGISTRY)
def test_only_the_dropout_of_training_is_random(name):
    model, batch = made(name, dropout=0.5), sessions().graphs(every())
    with torch.no_grad():
        assert not torch.equal(model.train()(batch)[0], model(batch)[0])
        assert torch.equal(model.eval()(batch)[0], model(batch)[0])


@pytest.mark.parametrize("name", [f"{base}{text}" for base in REGISTRY for text in ("", "-text")])
@torch.no_grad()
def test_an_encoder_comes_back_as_it_was_and_only_for_its_catalogue(name, tmp_path):
    model = made(name, dropout=0.1).eval()
    save_with_items(tmp_path / "m", name, model)
    encoder, vectors = load_encoder(tmp_path / "m", ITEMS)
    session, own = model(sessions().graphs(every()))
    assert torch.equal(vectors, own)
    assert torch.equal(encoder.eval()(sessions().graphs(every()), vectors), session)
    with pytest.raises(UserError, match=r"was trained for 12 items, the catalogue has 13"):
        load_encoder(tmp_path / "m", ITEMS + 1)


@pytest.mark.parametrize("base", REGISTRY)
@torch.no_grad()
def test_a_control_without_text_weights_is_the_encoder_and_texts_change_it(base):
    control, plain = made(f"{base}-text").eval(), made(base).eval()
    plain.items.table.load_state_dict(control.items.table.state_dict())
    plain.encoder.load_state_dict(control.encoder.state_dict())
    batch = sessions().graphs(every())
    assert (control.vectors() - plain.vectors())[1:].abs().max() > 1e-3
    assert not torch.allclose(control(batch)[0], plain(batch)[0])
    control.items.text.weight.zero_()
    for ours, ids in zip(control(batch), plain(batch)):
        torch.testing.assert_close(ours, ids, atol=1e-6, rtol=1e-4)
    assert "features" not in " ".join(control.state_dict()) and plain.items.text is None


@pytest.mark.parametrize("name", REGISTRY)
def test_a_batch_read_in_groups_has_the_loss_and_gradient_of_one_read_at_once(name, monkeypatch):
    monkeypatch.setattr(pretraining, "PIECE", 4)  # of encoders that are not read in groups of like length
    model = made(name).eval()
    job = EncoderJob(model, sessions(), sessions(), encoder_section(DIM, 0.0).training, torch.float32)

    def gradient(total: torch.Tensor) -> list[torch.Tensor]:
        return [total, *torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])]

    torch.manual_seed(1)
    grouped = gradient(job.loss(every()).total)
    torch.manual_seed(1)  # HCGR draws negatives session by session
    order = torch.cat(by_length(every(), sessions().length))
    session, vectors = model(sessions().graphs(order))
    whole = gradient(model.encoder.loss(session, vectors, sessions().target[order]))
    for a, b in zip(grouped, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_every_batch_mixes_short_and_long_sessions():
    length = torch.arange(400) % LONGEST + 1
    train = Sessions(torch.randint(1, 9, (400, LONGEST)).int(), torch.arange(400), length, torch.ones(400).long())
    job = EncoderJob(made("stamp"), train, train, encoder_section(DIM, 0.0).training, torch.float32)
    first, again = ([s[0] for s in job.steps(0, torch.Generator().manual_seed(n))] for n in (1, 1))
    assert torch.cat(first).sort()[0].tolist() == list(range(400))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(3.5 < float(length[batch].float().mean()) < 7.5 for batch in first if len(batch) > 30)


def hit_at_1(name: str, folder: Path, shuffle: bool) -> float:
    model = made(name, dropout=0.1, items=30)
    train, valid = chain(300, 1, shuffle), chain(60, 2, False)
    settings = encoder_section(DIM, 0.1, lr=RATES.get(name, 0.02)).training
    job = EncoderJob(model, train, valid, settings, torch.float32)
    fit(job, settings, seed=1, resume=folder / str(shuffle), name=name)
    vectors = model.vectors()
    found = rank_sessions(lambda s: model.encoder(valid.graphs(s), vectors) @ vectors.T, valid, 25)
    assert len(found) == 60
    return float((found == 1).float().mean())


@pytest.mark.parametrize("name", REGISTRY)
def test_it_learns_a_markov_chain_and_not_a_shuffled_one(name, tmp_path):
    assert hit_at_1(name, tmp_path, shuffle=False) > HITS.get(name, 0.9)
    assert hit_at_1(name, tmp_path, shuffle=True) < 0.3


def test_names_of_encoders():
    assert family("gcsan") == ("gcsan", "none")
    assert family("gcsan-text") == ("gcsan", "text")
    assert family("gcsan-shuffled") == ("gcsan", "shuffled")
    with pytest.raises(UserError, match=r"gcsam-text is no encoder: the nearest .* is gcsan"):
        family("gcsam-text")
    with pytest.raises(UserError, match=r"gcsan-textt is no encoder: .*; the nearest is gcsan-text"):
        family("gcsan-textt")
    with pytest.raises(UserError, match=r"gcsan- is no encoder"):
        family("gcsan-")


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout, x = Dropout(p), torch.ones(1001, 333, requires_grad=True)
    y = dropout(x)
    share = float((y == 0).float().mean())
    assert abs(share - p) < 4 * (0.25 / y.numel()) ** 0.5
    kept = y[y != 0]
    if p < 1:
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    if 0 < p < 1:
        zero = (y.detach() == 0).float() - p
        for other in (zero.roll(1, 1), zero.roll(1, 0), zero.roll(4, 1)):
            assert abs(float((zero * other).mean())) < 4 * p * (1 - p) / y.numel() ** 0.5, "neighbours hang together"
        assert not torch.equal(dropout(x), y)
        torch.manual_seed(0)
        assert torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)
