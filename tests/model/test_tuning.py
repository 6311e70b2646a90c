"""The two stages: their candidates, targets and losses, and that both learn."""
from __future__ import annotations

import types

import polars as pl
import pytest
import torch
from tiny import DIM, ITEMS, LISTS, TITLES, linear_prior, llmgr, prefixes, tokenizer
from tiny_stages import align, behave, ranker, settings
from torch.nn import functional as F

from llmgr.encoders.registry import build_encoder
from llmgr.encoders.srgnn import Srgnn
from llmgr.model.align import draw_candidates
from llmgr.model.behaviour import BehaviourJob, spans
from llmgr.model.building import text_smoothing
from llmgr.model.loss import TextSmoothing
from llmgr.model.prompts import BehaviourPrompts
from llmgr.model.ranker import Ranker
from llmgr.runtime.errors import UserError
from llmgr.runtime.layout import Layout
from llmgr.sessions.tensors import Sessions
from llmgr.text.vectors import shuffled
from llmgr.training.engine import fit

COUNT = sum(map(len, LISTS))


def test_candidates_hold_the_described_item_once_anywhere():
    drawn = draw_candidates(9, 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (10, 4)
    places, others = torch.zeros(4), torch.zeros(10)
    for seed in range(400):
        drawn = draw_candidates(9, 4, torch.Generator().manual_seed(seed))[1:]
        own = drawn == torch.arange(1, 10)[:, None]
        assert own.sum(1).eq(1).all()
        assert drawn.min() >= 1 and drawn.max() <= 9
        places += own.sum(0)
        others += torch.bincount(drawn[0][~own[0]], minlength=10)
    assert (places / places.sum() - 0.25).abs().max() < 0.03
    assert others[1] == 0 and (others[2:] / others.sum() - 1 / 8).abs().max() < 0.04, "the others are drawn evenly"
    assert torch.equal(draw_candidates(2, 2, torch.Generator()).sort(1)[0][1:], torch.tensor([[1, 2], [1, 2]]))


def test_every_item_is_described_once_an_epoch_among_new_candidates():
    job = align(llmgr())
    seen = []
    for epoch in range(2):
        steps = job.steps(epoch, torch.Generator().manual_seed(epoch))
        assert sorted(torch.cat([m for step in steps for m in step]).tolist()) == list(range(1, ITEMS + 1))
        seen.append(job.candidates)
    assert not torch.equal(*seen)
    checked = job.checked_candidates.clone()
    job.steps(0, torch.Generator().manual_seed(0))
    assert torch.equal(job.candidates, seen[0]) and torch.equal(job.checked_candidates, checked)
    steps = align(llmgr(), accumulate=2).steps(0, torch.Generator().manual_seed(0))
    assert [len(s) for s in steps] == [2, 1]


@pytest.mark.parametrize("output", ["linear", "items"])
def test_the_alignment_loss_is_the_softmax_over_all_items(output):
    model = llmgr(output=output)
    job = align(model)
    job.steps(0, torch.Generator().manual_seed(0))
    micro = torch.tensor([5, 2, 12])
    found = job.loss(micro)
    scores = model(job.prompts(micro, job.candidates[micro]), None).logits()
    expected = 0.0
    for row, item in enumerate(micro.tolist()):
        expected += (scores[row, 1:].logsumexp(0) - scores[row, item]).item()
    assert found.total.item() == pytest.approx(expected, rel=1e-4)
    assert found.targets == 3 and found.tokens == job.prompts(micro, job.candidates[micro]).tokens


@torch.no_grad()
def test_alignment_starts_at_chance():
    found = [align(llmgr(seed=seed, output="linear")).validate()["accuracy_candidates"] for seed in range(8)]
    assert abs(sum(found) / len(found) - 1 / 4) < 0.15 and len(set(found)) > 1, "chance, and no constant"


def test_alignment_learns_what_it_is_shown(tmp_path):
    job = align(llmgr(), lr=0.03)
    fit(job, job.settings, seed=1, resume=tmp_path, name="align")
    after = job.validate()
    assert after["accuracy_candidates"] > 0.8
    assert after["accuracy_items"] > 0.8


def test_more_candidates_than_items_are_refused():
    with pytest.raises(UserError, match=f"align.candidates=13 exceeds the catalogue's {ITEMS} items"):
        align(llmgr(), candidates=13)


def test_texts_longer_than_the_backbone_are_cut_and_counted(capsys):
    model = llmgr()
    whole = align(model)
    assert whole.cut == 0 and capsys.readouterr().err == ""
    room = int(whole.prompts.count.max()) - 2
    model.positions = whole.prompts.longest(4) - whole.prompts.table.shape[1] + room
    job = align(model)
    assert job.cut == int((whole.prompts.count > room).sum()) > 0
    assert f"{job.cut} of {ITEMS} texts are cut" in capsys.readouterr().err
    job.steps(0, torch.Generator().manual_seed(0))
    every = torch.arange(1, ITEMS + 1)
    prompts = job.prompts(every, job.candidates[every])
    assert int(prompts.position_BL.max()) + 1 == model.positions
    job.loss(every)
    short = every[whole.prompts.count[1:] <= room]
    assert torch.equal(job.prompts(short, job.candidates[short]).token_BL,
                       whole.prompts(short, job.candidates[short]).token_BL), "what fits stays"
    model.positions -= room
    with pytest.raises(UserError, match=r"not one token of text fits .* lower align.candidates"):
        align(model)


def test_sessions_of_more_users_than_the_graph_encoder_knows_are_refused():
    model, train = llmgr(), prefixes()
    model.encoder = build_encoder("fpmc", DIM, 0.0, {"users": 2})
    train.user = torch.tensor([1, 2, 0, 3, 1])
    with pytest.raises(UserError, match=r"model.base was trained for fewer users than the sessions have"):
        behave(model, train)


@pytest.mark.parametrize(("family", "titles", "edges"), [("slot", True, False), ("slot", False, False),
                                                         ("paper", True, True), ("titles", True, False)])
def test_sessions_longer_than_the_backbone_keep_as_many_recent_clicks_as_fit(family, titles, edges):
    build = BehaviourPrompts(tokenizer(), family, TITLES if titles else None, 4, edges)
    sessions, model = prefixes(), Ranker(llmgr(), build, torch.float32)
    clicks = [[c for c in row if c] for row in (sessions.graphs(torch.tensor([n])).items_BS[0].tolist()
                                                for n in range(COUNT))]

    def span(items: list[int]) -> int:
        graphs = Sessions(torch.tensor([items]).int(), torch.tensor([0]), torch.tensor([len(items)]), torch.tensor([1])
                          ).graphs(torch.tensor([0]))
        return int(build(graphs, graphs.length_B).position_BL.max()) + 1

    least = max(span(c[-1:]) for c in clicks)
    for positions in range(least, build.longest(7) + 1, 3):
        expected = [next(c[-k:] for k in range(len(c), 0, -1) if span(c[-k:]) <= positions) for c in clicks]
        model.llmgr.positions = positions
        found, cut = model.shortened(sessions, "training")
        assert cut == sum(len(a) < len(b) for a, b in zip(expected, clicks))
        assert [[c for c in row if c] for n in range(COUNT)
                for row in found.graphs(torch.tensor([n])).items_BS.tolist()] == expected
        assert torch.equal(found.target, sessions.target) and (cut or found is sessions)
    model.llmgr.positions = least - 1
    with pytest.raises(UserError, match="not even one click fits"):
        model.shortened(sessions, "training")


def test_both_forms_agree_on_cut_prompts_and_what_fits_is_as_before(capsys):
    model = llmgr()
    losses = {}
    for positions in (model.positions, 60):
        model.positions = positions
        for targets in ("prefix", "positions"):
            job = behave(model, titles=True, targets=targets, batch_size=1)
            micros = [m for step in job.steps(0, torch.Generator().manual_seed(0)) for m in step]
            with torch.no_grad():
                losses[positions, targets] = {int(job.sample[m]): job.loss(m).total.item() for m in micros}
            assert sum(map(job.targets, micros)) == COUNT
    prefix = losses[60, "prefix"]
    assert 0 < job.cut < COUNT and f"{job.cut} of {COUNT} training prompts are cut" in capsys.readouterr().err
    assert sum(losses[60, "positions"].values()) == pytest.approx(sum(prefix.values()), rel=1e-5)
    whole = job.train.length == prefixes().length
    assert int((~whole).sum()) == job.cut
    before = losses[700, "prefix"]
    assert [before[n] for n in range(COUNT) if whole[n]] == [prefix[n] for n in range(COUNT) if whole[n]]
    assert all(before[n] != prefix[n] for n in range(COUNT) if not whole[n])


@pytest.mark.parametrize("positions", [False, True])
def test_spans_cover_every_prefix_once(tmp_path, positions):
    import polars as pl

    from llmgr.sessions.reading import read_sessions

    lists = [[3, 5, 3, 7, 7, 2, 9, 1], [4, 1], [1, 2, 3], [9, 9, 9, 9, 9, 9]]
    rows = [(f"u{n}", x[max(0, t - 4):t], x[t]) for n, x in enumerate(lists) for t in range(1, len(x))]
    schema = {"user": pl.String, "items": pl.List(pl.Int32), "target": pl.Int32}
    pl.DataFrame(rows, schema, orient="row").write_parquet(tmp_path / "train.parquet")
    train, frame = read_sessions(tmp_path / "train.parquet", 4)
    first, last, start = spans(train, positions)
    covered = []
    for a, b, sample in zip(first.tolist(), last.tolist(), start.tolist()):
        for n in range(b - a + 1):
            assert int(train.length[sample + n]) == a + n and int(train.row[sample + n]) == int(train.row[sample])
            covered.append(sample + n)
    assert covered == list(range(len(frame)))
    assert len(first) == (len(frame) if not positions else 4 + 3 + 1)


@pytest.mark.parametrize("output", ["linear", "items"])
@pytest.mark.parametrize("train_encoder", ["all", "none"])
def test_both_forms_have_the_same_loss_and_it_is_the_softmax(output, train_encoder):
    model = llmgr(output=output)
    model.unfreeze_encoder(train_encoder)
    model.train()
    train = prefixes()
    totals, gradients = {}, {}
    for targets in ("prefix", "positions"):
        job = behave(model, train, titles=True, targets=targets)
        assert (job.model.readouts is None) == (train_encoder == "all")
        steps = job.steps(0, torch.Generator().manual_seed(0))
        micros = [m for step in steps for m in step]
        assert sum(map(job.targets, micros)) == COUNT
        losses = [job.loss(m) for m in micros]
        assert [x.targets for x in losses] == [job.targets(m) for m in micros]
        total = sum(x.total for x in losses)
        model.zero_grad()
        total.backward()
        totals[targets], gradients[targets] = total.item(), model.hybrid.project.weight.grad.clone()
    assert totals["prefix"] == pytest.approx(totals["positions"], rel=1e-5)
    torch.testing.assert_close(gradients["prefix"], gradients["positions"], rtol=1e-3, atol=1e-4 * float(
        gradients["prefix"].abs().max()))
    build, expected = job.model.prompts, 0.0
    with torch.no_grad():
        for sample in range(COUNT):
            graphs = train.graphs(torch.tensor([sample]))
            scores = model(build(graphs, graphs.length_B), model.sessions(graphs)).logits()[0]
            target = int(train.target[sample])
            expected += float(scores[1:].logsumexp(0) - scores[target])
    assert totals["prefix"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("targets", "output"), [("positions", "linear"), ("positions", "items"), ("prefix", "items")])
def test_behaviour_learns_a_tiny_batch(tmp_path, targets, output):
    model = llmgr(output=output)
    model.unfreeze_encoder("all")
    train = prefixes([[1, 2, 3, 4], [5, 6, 7], [8, 9, 10]])
    train.target = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9, 10, 11])  # the next item, and one more
    before = model.vectors.clone()
    epochs = 40 if targets == "positions" else 15  # as many steps
    job = behave(model, train, train.subset(torch.tensor([9])), targets=targets, epochs=epochs, lr=0.03)
    start = job.model.validate(train)["valid_loss"]
    progress = fit(job, job.settings, seed=1, resume=tmp_path, name="tune")
    assert start > 1.5 > 0.5 > job.model.validate(train)["valid_loss"]
    assert progress.epoch_rows[-1]["train_loss"] < 0.6
    assert torch.equal(model.vectors, before), "item embeddings stay frozen"
    assert progress.samples == 10 * epochs


class Base:
    """Scores of sessions that were trained on, and others of those that were not; item vectors `apart` by fold."""

    def __init__(self, apart: float = 0.0) -> None:
        self.fold_U = torch.tensor([-1, 0, 1, 0, 1, 1])
        draw = torch.Generator().manual_seed(2)
        self.shift = [F.pad(apart * torch.randn(ITEMS, DIM, generator=draw), (0, 0, 1, 0)) for _ in range(2)]

    def shifts(self, count_V):
        assert torch.equal(count_V, torch.bincount(prefixes().target, minlength=ITEMS + 1).float())
        return self.shift

    def __call__(self, sessions, samples, trained):
        return torch.randn(2, COUNT, ITEMS + 1, generator=torch.Generator().manual_seed(1))[int(trained), samples]


@pytest.mark.parametrize("base", [None, Base()], ids=["alone", "over the base"])
@pytest.mark.parametrize("targets", ["positions", "prefix"])
def test_the_prior_is_in_the_logits_of_training_and_scoring(targets, base):
    train, model = prefixes(), llmgr()
    without = torch.cat([ranker(model).over(train)(torch.tensor([n])) for n in range(COUNT)])
    prior = linear_prior(train, base)
    job = behave(model, train, targets=targets, batch_size=3, prior=prior)
    every = torch.arange(COUNT)
    scored = torch.cat([job.model.over(train)(n) for n in every.split(5)])
    torch.testing.assert_close(scored[:, 1:], (without + prior(train, every, False))[:, 1:], rtol=1e-4, atol=1e-4)
    scores = without + prior(train, every, True)
    expected = F.cross_entropy(scores[:, 1:], train.target - 1, reduction="sum").item()
    micros = [micro for step in job.steps(0, torch.Generator().manual_seed(0)) for micro in step]
    found = sum(job.loss(micro).total for micro in micros)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in prior.parameters())
    with torch.no_grad():
        one_each = torch.cat([job.model.logits(train, n, trained=True) for n in every.split(1)])
        torch.testing.assert_close(one_each[:, 1:], scores[:, 1:].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("targets", ["positions", "prefix"])
def test_a_step_is_of_one_fold_and_reads_its_item_vectors(targets, frozen):
    def job(base, fold=None):
        model = llmgr(node_text=True)
        if not frozen:
            model.unfreeze_encoder("all")
        if fold is not None:
            for table in (model.vectors, model.hybrid.nodes, model.output.table):
                table[:, :DIM] += apart.shift[fold]
        train = prefixes()
        return behave(model, train, targets=targets, batch_size=2, prior=linear_prior(train, base))

    apart = Base(0.7)
    ours = job(apart)
    assert (ours.model.readouts is not None) == frozen
    steps = ours.steps(0, torch.Generator().manual_seed(0))
    micros = [micro for step in steps for micro in step]
    assert sorted(torch.cat(micros).tolist()) == list(range(len(ours.first))) and len(steps) > 2
    folds = [{int(apart.fold_U[1 + ours.train.row[ours.sample[n]]]) for n in micro} for micro in micros]
    assert {len(fold) for fold in folds} == {1} and {0} in folds and {1} in folds
    assert [m.tolist() for m in micros] != [m.tolist() for step in ours.steps(1, torch.Generator().manual_seed(1))
                                            for m in step]
    few = BehaviourJob(ours.model, ours.train, ours.train, settings(targets=targets, batch_size=2, samples=1), 3)
    assert all(len(step) == 1 and len(step[0]) == 1 for epoch in range(4) for step in few.steps(
        epoch, torch.Generator().manual_seed(epoch))), "a fold without a drawn prompt has no step"
    moved = [job(Base(), fold) for fold in (0, 1)]
    for micro, (fold,) in zip(micros, folds):
        found, *others = (by.loss(micro).total.item() for by in (ours, *moved))
        assert found == pytest.approx(others[fold], rel=1e-5) and found != pytest.approx(others[1 - fold], rel=1e-4)
    assert ours.validate() == job(Base()).validate(), "what is not trained on reads the whole base's"


@pytest.mark.parametrize("output", ["linear", "items", "items-linear"])
def test_text_smoothing_is_the_cross_entropy_of_smoothed_targets(output):
    train, model = prefixes(), llmgr(output=output.removesuffix("-linear"))
    prior = linear_prior(train) if output.endswith("-linear") else None
    nearest = torch.stack([torch.randperm(ITEMS)[:3] + 1 for _ in range(ITEMS + 1)])
    weight = torch.rand(ITEMS + 1, 3).softmax(1)
    job = behave(model, train, prior=prior, smoothing=TextSmoothing(0.3, nearest, weight))
    scores = torch.cat([job.model.over(train)(torch.tensor([n])) for n in range(len(train))])
    share = F.one_hot(train.target, ITEMS + 1) * 0.7
    share = share + 0.3 * torch.zeros_like(share).scatter_add(1, nearest[train.target], weight[train.target])
    expected = F.cross_entropy(scores[:, 1:], share[:, 1:], reduction="sum").item()
    assert job.loss(torch.arange(len(job.first))).total.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("over", ["", "linear", "smoothed"])
@pytest.mark.parametrize("targets", ["positions", "prefix"])
def test_a_targets_weight_falls_with_the_users_later_targets(over, targets):
    train, model = prefixes(), llmgr(output="items")
    train.user = torch.arange(1, len(train.items) + 1)
    prior = linear_prior(train) if over else None
    nearest, weight = torch.randint(1, ITEMS + 1, (ITEMS + 1, 2)), torch.rand(ITEMS + 1, 2).softmax(1)
    job = behave(model, train, prior=prior, recency=0.5, targets=targets,
                 smoothing=TextSmoothing(0.3, nearest, weight) if over == "smoothed" else None)
    scores = torch.cat([job.model.over(train)(torch.tensor([n])) for n in range(len(train))])[:, 1:].log_softmax(1)
    loss = -scores.gather(1, train.target[:, None] - 1)[:, 0]
    if over == "smoothed":
        loss = 0.7 * loss - 0.3 * (weight[train.target] * scores.gather(1, nearest[train.target] - 1)).sum(1)
    later = [sum(train.row[n:].eq(train.row[n]).tolist()) - 1 for n in range(len(train))]
    share = torch.tensor([0.5 ** n for n in later])
    assert max(later) > 2 and share.max() == 1
    found = sum(job.loss(micro).total.item() for micro in torch.arange(len(job.first)).split(2))
    assert found == pytest.approx((loss * share / share.mean()).sum().item(), rel=1e-4)


def test_similar_items_come_from_the_catalogues_words_or_from_shuffled_ones(tmp_path):
    files = Layout(tmp_path / "data", "", "")
    files.items.parent.mkdir(parents=True)
    titles = ["red lipstick", "nail file", "red lipstick case", "steel nail file", "lipstick case", "red brush"]
    pl.DataFrame({"item_id": range(1, 7), "title": titles, "brand": [None] * 6}).write_parquet(files.items)

    def params(share: float, texts: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(seed=4, tune=types.SimpleNamespace(text_smoothing=share),
                                     model=types.SimpleNamespace(texts=texts))

    assert text_smoothing(params(0.0, "own"), files) is None
    smoothing = text_smoothing(params(0.1, "own"), files)
    nearest, weight = smoothing.nearest_VN, smoothing.weight_VN
    assert nearest.shape == weight.shape == (7, 5) and nearest[1:, 0].tolist() == [6, 4, 5, 2, 3, 1]
    torch.testing.assert_close(weight.sum(1), torch.ones(7))
    dealt = shuffled(torch.arange(7.0)[:, None], 4)[:, 0].long()  # whose text an item has
    other = text_smoothing(params(0.1, "shuffled"), files).nearest_VN
    assert dealt[other[1:, 0]].tolist() == nearest[dealt[1:], 0].tolist()


def test_samples_are_drawn_anew_and_reproducibly():
    job = behave(llmgr(), targets="prefix", samples=7)
    drawn = [sorted(torch.cat([m for s in job.steps(0, torch.Generator().manual_seed(n)) for m in s]).tolist())
             for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7


def test_a_step_holds_random_sessions_in_micro_batches_of_like_length():
    job = behave(llmgr("bert"), targets="prefix", accumulate=3)
    steps = job.steps(0, torch.Generator().manual_seed(1))
    assert sorted(torch.cat([m for s in steps for m in s]).tolist()) == list(range(len(job.first)))
    assert [sum(map(len, s)) for s in steps[:-1]] == [12] * (len(steps) - 1)
    micros = [job.last[m] for s in steps for m in s]
    assert all(len(m) <= 4 and m.max() < 1.5 * m.min() + 1 for m in micros)
    assert any(len({*torch.cat([job.last[m] for m in s]).tolist()}) > 3 for s in steps), "a step mixes lengths"


def test_where_prompts_are_packed_a_step_is_read_in_whole_micro_batches():
    job = behave(llmgr(), accumulate=2)
    steps = job.steps(0, torch.Generator().manual_seed(1))
    assert sorted(torch.cat([m for s in steps for m in s]).tolist()) == list(range(len(job.first)))
    assert [[len(m) for m in s] for s in steps] == [[4, 1]]


class Again:
    """A recorder without a GPU: its replay calls the function again and puts what it returns where it once was."""

    replays = 0

    def warm(self, function):
        function()

    def record(self, function):
        found = function()
        kept = [t for t in (found if isinstance(found, tuple) else [found]) if t is not None]

        def replay() -> None:
            self.replays += 1
            with torch.enable_grad():
                anew = function()
            for old, new in zip(kept, anew if isinstance(anew, tuple) else [anew]):
                old.data.copy_(new)

        for tensor in kept:
            tensor.data.fill_(torch.nan)  # recording computes nothing
        return found, replay


@pytest.mark.parametrize("make", [align, behave])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_step_is_the_same_padded_in_rows_in_blocks_and_replayed(kind, make):
    found, launch = [], types.SimpleNamespace(compile=False, strategy="ddp")
    for form in ("padded", "rows", "blocks", "recomputed", "line", "replayed"):
        model = llmgr(kind, attention="causal")
        model.unfreeze_encoder("all")
        model.execution.packs = form != "padded"
        if form in ("blocks", "recomputed"):
            asked = types.SimpleNamespace(gradient_checkpointing=form == "recomputed")
            model.execution.prepare(asked, launch, torch.device("cpu"))
            model.language_model.train()
        elif form in ("line", "replayed"):
            recorder = Again() if form == "replayed" else None
            model.execution.prepare(types.SimpleNamespace(gradient_checkpointing=False), launch, torch.device("cuda"),
                                    recorder)
            model.language_model.train()
            if form == "line":
                model.execution.replayed = model.execution.states
        assert model.execution.in_blocks == (form in ("blocks", "recomputed"))
        job = make(model)
        job.steps(0, torch.Generator().manual_seed(0))
        trained = [p for p in model.parameters() if p.requires_grad]
        for micro in (torch.arange(1, 4), torch.arange(1, 5), torch.tensor([4, 2])):  # the last two add up
            if len(micro) > 2:
                model.zero_grad()
            loss = job.loss(micro)
            loss.total.backward()
        if form == "replayed":
            assert 1 < len(model.execution.replayed.passes) <= 3 and recorder.replays == 6
        found.append((loss.tokens, loss.total, *(p.grad for p in trained)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


def test_a_pass_that_cannot_be_recorded_is_run_as_it_is(capfd):
    class Refusing(Again):
        def record(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    found = []
    for recorder in (Again(), Refusing()):
        model = llmgr(attention="causal")
        model.execution.prepare(types.SimpleNamespace(gradient_checkpointing=False),
                      types.SimpleNamespace(compile=False, strategy="ddp"), torch.device("cuda"), recorder)
        model.train()
        made = behave(model)
        for _ in range(2):
            model.zero_grad()
            made.loss(torch.arange(1, 5)).total.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert capfd.readouterr().err.count("cannot be recorded for replay") == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_recorded_pass_casts_its_weights_every_time():
    """In bf16, where autocast would keep copies of the weights that a recording had cast."""
    model = llmgr(attention="causal", dtype=torch.bfloat16)
    inputs, flags = torch.randn(1, 4, 16), []
    execution, states = model.execution, model.execution.states

    def monitored(*inputs):
        flags.append((torch.is_autocast_cache_enabled(), torch.is_autocast_enabled("cpu")))
        return states(*inputs)

    execution.states = monitored
    with torch.autocast("cpu", torch.bfloat16):
        there = torch.arange(4)[None]
        execution._cast_anew(inputs, torch.arange(4)[None], there, torch.arange(4), torch.ones(1, 1, 4, 4).bool())
        assert torch.is_autocast_cache_enabled()
    assert flags == [(False, True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [align, behave])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_gpu_learns_what_a_cpu_learns(kind, make, tmp_path):
    ends = []
    for place in map(torch.device, ("cpu", "cuda")):
        torch.manual_seed(4)
        model = llmgr(kind, attention="causal")
        model.unfreeze_encoder("all")
        asked = settings(epochs=3, batch_size=2, gradient_checkpointing=False)
        model.execution.prepare(asked, types.SimpleNamespace(compile=False, strategy="ddp"), place)
        given = {"train": prefixes().to(place)} if make is behave else {}
        job = make(model.to(place), **given, epochs=3, batch_size=2)
        progress = fit(job, asked, seed=3, resume=tmp_path / place.type, name="tune")
        replayed = model.execution.replayed
        assert (replayed is not None and len(replayed.passes) > 1) == (place.type == "cuda")
        ends.append(([row["loss"] for row in progress.step_rows],
                     [p.detach().cpu() for p in model.parameters() if p.requires_grad]))
    (one, of_cpu), (other, of_gpu) = ends
    assert one == pytest.approx(other, abs=5e-3)
    for a, b in zip(of_cpu, of_gpu, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@torch.no_grad()
def test_blocks_and_joined_products_in_bf16_are_as_near_to_float32_as_rows(kind):
    away = {}
    sessions = prefixes()
    graphs = sessions.prefix_graphs(torch.arange(len(LISTS)), torch.tensor([len(x) for x in LISTS]))
    exact = llmgr(kind, attention="causal")
    session_RD = exact.sessions(sessions.graphs(torch.arange(len(sessions))))
    prompts = BehaviourPrompts(tokenizer(kind), "slot", None, 4, False)(graphs, torch.ones(len(LISTS), dtype=int))
    wanted = exact.hidden(prompts, session_RD)
    for form in ("rows", "blocks"):
        model = llmgr(kind, attention="causal", dtype=torch.bfloat16)
        if form == "blocks":
            model.execution.prepare(types.SimpleNamespace(gradient_checkpointing=False),
                          types.SimpleNamespace(compile=False, strategy="ddp"), torch.device("cpu"))
            assert model.execution.in_blocks and model.execution.arranged(prompts, 64).blocks
        with torch.autocast("cpu", torch.bfloat16):
            found = model.hidden(model.execution.arranged(prompts, 64), session_RD)
        away[form] = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < away["blocks"] < 1.5 * away["rows"] < 0.1, away


def test_blocks_are_for_a_cpu_and_joined_products_not_for_zero3():
    settings = types.SimpleNamespace(gradient_checkpointing=False)
    for strategy, joined in (("ddp", True), ("zero3", False)):
        model = llmgr()
        model.execution.prepare(settings, types.SimpleNamespace(compile=False, strategy=strategy), torch.device("cuda"))
        assert not model.execution.in_blocks
        assert any("forward" in vars(module) for module in model.language_model.modules()) == joined


@pytest.mark.parametrize("padded", [True, False])
def test_the_graph_encoders_readouts_keep_their_order(padded):
    model = llmgr()
    if not padded:
        model.encoder = Srgnn(DIM, 0.0, types.SimpleNamespace(gnn_layers=1)).requires_grad_(False).eval()
    assert model.encoder.pads == padded
    job = behave(model)
    everything = torch.arange(COUNT)
    torch.testing.assert_close(job.model._read_in_groups(job.train, everything, job.train.length, None),
                               model.sessions(job.train.graphs(everything)))


def test_positions_need_causal_attention():
    with pytest.raises(UserError, match=r"tune.targets=positions needs causal attention .* model.attention=causal"):
        behave(llmgr("bert"))
    behave(llmgr("bert"), targets="prefix")
    behave(llmgr("bert", attention="causal"))


@torch.no_grad()
def test_a_frozen_encoders_readouts_are_computed_once_for_all():
    model, sessions = llmgr(dropout=0.5), prefixes()
    model.train()
    expected = torch.cat([model.sessions(sessions.graphs(torch.tensor([s]))) for s in range(COUNT)])
    once = ranker(model)
    once.learn_from(sessions)
    torch.testing.assert_close(once.readouts, expected)


def test_samples_of_several_folds_are_refused():
    train = prefixes()
    job = behave(llmgr(), train, targets="prefix", prior=linear_prior(train, Base(0.7)))
    first, other = (int((job.model.fold_N == fold).nonzero()[0]) for fold in (0, 1))
    for call in (job.model.logits, job.model.factors):
        with pytest.raises(ValueError, match=r"of one fold, not of \[0, 1\]"):
            call(train, torch.tensor([first, other]), trained=True)
    with pytest.raises(ValueError, match="one fold"):
        job.model.loss(train, torch.tensor([first, other]))
    assert job.model.logits(train, torch.tensor([first, other])).shape == (2, ITEMS + 1), "none is learned from"


def test_validation_sessions_are_cut_and_announced_once(capsys):
    model, train = llmgr(), prefixes()
    model.positions = 60
    job = behave(model, train, titles=True)
    assert job.cut and capsys.readouterr().err.count("validation prompts are cut") == 1
    expected = job.model.over(train)(torch.arange(COUNT))
    loss = F.cross_entropy(expected[:, 1:], train.target - 1).item()
    capsys.readouterr()
    for _ in range(2):
        assert job.validate()["valid_loss"] == pytest.approx(loss, rel=1e-4)
    assert "cut" not in capsys.readouterr().err


@torch.no_grad()
def test_scores_of_a_session_are_those_of_training_and_validation_counts_right():
    model = llmgr()
    train = prefixes()
    scorer = ranker(model).over(train)
    scores = scorer(torch.arange(COUNT))
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scorer(shuffled), scores[shuffled], atol=1e-4, rtol=1e-4)
    job = behave(model, train)
    loss = sum(job.loss(m).total.item() for step in job.steps(0, torch.Generator()) for m in step)
    found = ranker(model).validate(train)
    assert found["valid_loss"] == pytest.approx(loss / COUNT, rel=1e-4)
    assert found["valid_loss"] == pytest.approx(float(F.cross_entropy(scores[:, 1:], train.target - 1)), rel=1e-4)
    target = scores[torch.arange(COUNT), train.target]
    rank = (scores[:, 1:] >= target[:, None]).sum(1)
    assert found["valid_mrr_at_20"] == pytest.approx(float((1 / rank).mean()), rel=1e-5)
    assert found["valid_hr_at_20"] == 1.0, "twelve items"


def test_validation_takes_the_number_of_sessions_in_the_parameters():
    assert len(behave(llmgr(), valid_sessions=5).valid) == 5
    assert len(behave(llmgr()).valid) == COUNT
