"""The learning rate chosen by successive rejects: which rate, at what cost, and that interruptions change nothing."""
from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machine import stage
from small_split import ITEMS, set_up, write_data
from torch import nn
from toy import Toy, bytes_of, settings, stop

from llmgr.encoders.pretraining import EncoderJob
from llmgr.prior import cross_fitting
from llmgr.runtime.artifacts import digest, read_json, save_tensors
from llmgr.runtime.errors import UserError
from llmgr.training import rates as search
from llmgr.training.engine import fit
from llmgr.training.rates import fit_best_rate

RATES = [1e-6, 0.003, 0.03, 0.1, 1e-5]


class Accuracy(Toy):
    """Classes of random points, selected by minus the loss; `limit` is the largest loss that stays finite."""

    selects = "valid_score"

    def __init__(self, limit: float = 1e9) -> None:
        super().__init__(samples=48)
        self.limit = limit

    def loss(self, micro):
        loss = super().loss(micro)
        return loss if loss.total < self.limit * len(micro) else loss._replace(total=loss.total * float("nan"))

    @torch.no_grad()
    def validate(self):
        return {"valid_score": -float(nn.functional.cross_entropy(self.model(self.x), self.y))}


def searched(**changes) -> SimpleNamespace:
    return settings(**{"epochs": 6, "patience": 9, "rates": RATES, "rungs": [1, 2, 3, 4],
                       "warmup_share": 0.0} | changes)


def at_rate(rate: float, folder: Path, until: int | None = None, **changes) -> tuple[bytes, float]:
    job = Accuracy()
    progress = fit(job, searched(lr=rate, **changes), seed=7, resume=folder / f"alone{rate}", name="stamp", until=until)
    return bytes_of(job), progress.best


def test_the_chosen_rate_ends_as_a_training_at_that_rate_alone_and_the_others_cost_less_than_it(tmp_path):
    alone = {rate: at_rate(rate, tmp_path) for rate in RATES}
    job, options = Accuracy(), searched()
    chosen = fit_best_rate(job, options, seed=7, resume=tmp_path / "search", name="stamp")
    assert chosen.rate == max(RATES, key=lambda rate: alone[rate][1]) and options == searched()
    assert (bytes_of(job), chosen.progress.best) == alone[chosen.rate]
    assert chosen.record["rates"] == RATES and sorted(chosen.record["epochs"]) == [1, 2, 3, 4, 6]
    assert chosen.record["valid_score"][RATES.index(chosen.rate)] == chosen.progress.best
    assert chosen.seconds > 0


@pytest.mark.parametrize(("rungs", "epochs"), [([1], [1] * 4 + [6]), ([1, 3], [1, 3, 3, 3, 6])])
def test_a_rung_gives_up_the_worst_and_the_last_rung_all_but_the_best(tmp_path, rungs, epochs):
    chosen = fit_best_rate(Accuracy(), searched(rungs=rungs), seed=7, resume=tmp_path, name="stamp").record
    assert sorted(chosen["epochs"]) == epochs
    if len(rungs) > 1:
        assert chosen["epochs"][0] == 1, "the lowest rate, which hardly moves"
    given_up = [score for n, score in zip(chosen["epochs"], chosen["valid_score"]) if n == max(rungs)]
    winner = at_rate(chosen["rates"][chosen["epochs"].index(6)], tmp_path, until=max(rungs))
    assert winner[1] > max(given_up)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_where_the_rungs_reach_the_end_the_best_full_training_wins(tmp_path, epochs):
    chosen = fit_best_rate(Accuracy(), searched(epochs=epochs, rungs=[epochs]), seed=7, resume=tmp_path, name="stamp")
    assert chosen.rate == max(RATES, key=lambda rate: at_rate(rate, tmp_path, epochs=epochs)[1])
    assert chosen.record["epochs"] == [epochs] * len(RATES)


def test_fewer_rates_take_the_later_rungs(tmp_path):
    for rates, epochs in ((RATES[1:4], [3, 4, 6]), (RATES[1:3], [4, 6]), (RATES[1:2], [6])):
        chosen = fit_best_rate(Accuracy(), searched(rates=rates), seed=7, resume=tmp_path / str(rates), name="stamp")
        assert sorted(chosen.record["epochs"]) == epochs


def test_interrupted_anywhere_it_ends_with_the_same_bytes_and_the_same_record(tmp_path):
    whole = Accuracy()
    expected = fit_best_rate(whole, searched(checkpoint_seconds=0), seed=7, resume=tmp_path / "whole", name="stamp")
    for call in range(2, whole.calls, 8):
        first = Accuracy()
        first.broken = {call: stop}
        with pytest.raises(InterruptedError):
            fit_best_rate(first, searched(checkpoint_seconds=0), seed=7, resume=tmp_path / f"{call}", name="stamp")
        torch.manual_seed(call)  # whatever the random state was
        second = Accuracy()
        again = fit_best_rate(second, searched(checkpoint_seconds=0), seed=7, resume=tmp_path / f"{call}", name="stamp")
        assert bytes_of(second) == bytes_of(whole) and (again.rate, again.record) == (expected.rate, expected.record)
        assert second.calls == whole.calls - call + 1, "no step is done twice"


def test_a_rate_that_diverges_is_given_up(tmp_path, capsys):
    chosen = fit_best_rate(Accuracy(limit=3), searched(rates=[3e8, 0.03, 0.003]), seed=7, resume=tmp_path, name="stamp")
    assert chosen.rate == 0.03 and chosen.record["valid_score"][0] is None
    assert "learning rate 3e+08 stopped being finite" in capsys.readouterr().err


def test_rates_that_diverge_are_trained_once_and_their_seconds_count(tmp_path, monkeypatch, capsys):
    trained, calls = calls_of(monkeypatch)
    rates = [3e8, 0.03, 2e8, 1e8, 0.003]
    clock = itertools.count()
    monkeypatch.setattr(search.time, "monotonic", lambda: float(next(clock)))
    chosen = fit_best_rate(Accuracy(limit=3), searched(rates=rates), seed=7, resume=tmp_path, name="stamp")
    assert [calls.count(rate) for rate in (3e8, 2e8, 1e8)] == [1, 1, 1]
    assert capsys.readouterr().err.count("the rate is given up") == 3
    assert chosen.record["epochs"] == [0, 6, 0, 0, 4] and chosen.rate == 0.03
    assert chosen.seconds > trained[0.003].seconds + 3


def calls_of(monkeypatch):
    """The progress of every rate's last training, and the rates in the order in which `fit` is called."""
    trained, calls = {}, []

    def seen(job, settings, **options):
        calls.append(settings.lr)
        trained[settings.lr] = fit(job, settings, **options)
        return trained[settings.lr]

    monkeypatch.setattr(search, "fit", seen)
    return trained, calls


def test_where_the_best_diverges_later_the_next_takes_its_place(tmp_path, monkeypatch):
    job = Accuracy()
    _, trained = calls_of(monkeypatch)
    calls = itertools.count(1)
    best = fit_best_rate(Accuracy(), searched(), seed=7, resume=tmp_path / "a", name="stamp").rate

    def loss(micro, plain=job.loss):
        result = plain(micro)
        late = trained[-1] == best and next(calls) > 5 * 3  # batches an epoch
        return result._replace(total=result.total * float("nan")) if late else result

    job.loss = loss
    trained.clear()
    chosen = fit_best_rate(job, searched(), seed=7, resume=tmp_path / "b", name="stamp")
    assert chosen.rate != best and chosen.progress.epoch == 6
    assert bytes_of(job) == at_rate(chosen.rate, tmp_path)[0]


def test_where_no_rate_stays_finite_it_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"encoder\.training\.rates=\[0\.1, 0\.2\]: add lower ones"):
        fit_best_rate(Accuracy(limit=0.0), searched(rates=[0.1, 0.2]), seed=7, resume=tmp_path, name="stamp")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_data(tmp_path)
    set_up(tmp_path, encoder__gcsan__lr="auto", encoder__text_lr="auto", encoder__training__epochs=4,
           encoder__training__rates=[0.0001, 0.02, 1e9], encoder__training__rungs=[1, 2], encoder__training__clip=1e9,
           tune__linear=True, tune__folds=2)
    save_tensors(tmp_path / "models/text_encoder/item_text.safetensors", {"vectors": torch.randn(ITEMS + 1, 12)})
    return tmp_path


@pytest.mark.parametrize("name", ["gcsan", "gcsan-text"])
def test_pretraining_records_what_it_chose_and_goes_on_after_an_interruption(
        place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert stage("pretrain", "--encoder", name, root=place) == 0
    folder, record = place / "models/encoders" / name, place / f"reports/metrics/encoders/{name}.json"
    metrics, before = read_json(record), [digest(path) for path in sorted(folder.iterdir())]
    assert metrics["lr"] == read_json(folder / "config.json")["settings"]["lr"] == 0.02
    assert metrics["search"]["rates"] == [0.0001, 0.02, 1e9] and metrics["search"]["epochs"] == [2, 4, 0]
    assert metrics["search"]["valid_ndcg_at_20"][1] == pytest.approx(metrics["valid"]["ndcg_at_20"], abs=1e-5)
    plain, calls = EncoderJob.loss, itertools.count(1)

    def loss(self, micro):
        if next(calls) == 17:  # the second rate's training
            raise InterruptedError
        return plain(self, micro)

    monkeypatch.setattr(EncoderJob, "loss", loss)
    assert stage("pretrain", "--encoder", name, root=place) == 1
    assert list((place / ".resume").rglob("state.pt"))
    assert stage("pretrain", "--encoder", name, root=place) == 0
    assert [digest(path) for path in sorted(folder.iterdir())] == before and read_json(record) == metrics


def test_folds_learn_at_the_rate_that_the_base_chose(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage("pretrain", "--encoder", "gcsan", root=place) == 0
    assert stage("export", root=place) == 0
    rates = []

    def seen(job, settings, **options):
        rates.append(settings.lr)
        return fit(job, settings, **options)

    monkeypatch.setattr(cross_fitting, "fit", seen)
    assert stage("folds", root=place) == 0
    assert rates == [0.02, 0.02]
