"""The training engine: resume, accumulation, schedule, clipping, early stopping, failures, what it writes."""
from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from machine import ROOT
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy import Toy, bytes_of, checkpoint_of, settings, stop

from llmgr.runtime.errors import UserError
from llmgr.runtime.state import former, read_state, write_state
from llmgr.training import engine, job, optimizer, precision
from llmgr.training.engine import fit
from llmgr.training.optimizer import ITEM_TABLE, adamw, cosine


class Selecting(Toy):
    """Validation follows a script instead of the model, so that the best epoch is known."""

    selects = "valid_ndcg_at_20"

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.script, self.weights = list(script), []

    def validate(self):
        self.weights.append(bytes_of(self))
        return {"valid_ndcg_at_20": self.script[len(self.weights) - 1]}


def outcome(job: Toy, progress: job.Progress) -> tuple:
    return bytes_of(job), progress.step_rows, progress.epoch_rows, progress.samples, progress.tokens, progress.step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_at_any_step_ends_with_the_same_bytes(tmp_path, accumulate):
    whole = Toy(8, accumulate)
    expected = outcome(whole, fit(whole, settings(), seed=7, resume=tmp_path / "whole", name="tune"))
    assert expected[3] == 240 and expected[4] == 480
    for at in (2, 7, 10, 11, 19, 28):
        folder = tmp_path / f"{accumulate}-{at}"
        first = Toy(8, accumulate)
        first.broken = {at: stop}
        with pytest.raises(InterruptedError):
            fit(first, settings(checkpoint_seconds=0), seed=7, resume=folder, name="tune")
        assert (folder / "state.pt").exists() or at <= accumulate
        torch.manual_seed(at)  # whatever the random state was
        second = Toy(8, accumulate)
        progress = fit(second, settings(checkpoint_seconds=0), seed=7, resume=folder, name="tune")
        assert outcome(second, progress) == expected
        assert second.calls < whole.calls or at <= accumulate, "it began anew"


def test_a_checkpoint_between_epochs_alone_is_enough(tmp_path):
    whole = Toy()
    expected = outcome(whole, fit(whole, settings(), seed=7, resume=tmp_path / "whole", name="tune"))
    first = Toy()
    first.broken = {9: stop}  # in the second epoch of five steps
    with pytest.raises(InterruptedError):
        fit(first, settings(), seed=7, resume=tmp_path / "cut", name="tune")
    second = Toy()
    assert outcome(second, fit(second, settings(), seed=7, resume=tmp_path / "cut", name="tune")) == expected
    assert second.calls == 10
    third = Toy()
    assert outcome(third, fit(third, settings(), seed=7, resume=tmp_path / "cut", name="tune")) == expected
    assert third.calls == 0, "a finished training is not trained again"


def test_killed_without_warning_it_goes_on(tmp_path):
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import os, signal
        from pathlib import Path
        from toy import Toy, settings
        from llmgr.training.engine import fit
        job = Toy()
        job.broken = {8: lambda total: os.kill(os.getpid(), signal.SIGKILL)}
        fit(job, settings(checkpoint_seconds=0), seed=7, resume=Path("a"), name="tune")
        """)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{ROOT / 'stages'}:{ROOT / 'tests/support'}"})
    assert killed.returncode == -signal.SIGKILL
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "a" / f".state.pt.{gone.pid}.tmp").write_bytes(b"half a checkpoint")
    resumed, whole = Toy(), Toy()
    expected = outcome(whole, fit(whole, settings(), seed=7, resume=tmp_path / "b", name="tune"))
    assert outcome(resumed, fit(resumed, settings(), seed=7, resume=tmp_path / "a", name="tune")) == expected
    assert resumed.calls == 15 - 7
    assert sorted(os.listdir(tmp_path / "a")) == ["state.pt", "state.pt.former"]


def left_at(folder: Path, step: int, name: str = "tune") -> None:
    """A training that was stopped after so many steps, each with its checkpoint."""
    job = Toy()
    job.broken = {step + 1: stop}
    with pytest.raises(InterruptedError):
        fit(job, settings(checkpoint_seconds=0), seed=7, resume=folder, name=name)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, tuple]:
    """A folder with the checkpoints of steps 8 and 7, and what an undisturbed training comes to."""
    folder, whole = tmp_path_factory.mktemp("stopped"), Toy()
    expected = outcome(whole, fit(whole, settings(), seed=7, resume=folder / "whole", name="tune"))
    left_at(folder / "cut", 8)
    return folder / "cut", expected


def rewritten(path: Path, change) -> None:
    """The checkpoint with a change, under a digest that holds."""
    state = checkpoint_of(path)
    buffer = io.BytesIO()
    torch.save(change(state), buffer)
    write_state(path, buffer.getvalue())


def flipped(place: float):
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 4
        path.write_bytes(content)
    return damage


DAMAGE = {
    **{f"a bit at {place}": flipped(place) for place in (0, 0.003, 0.1, 0.3, 0.5, 0.7, 0.9, 1)},
    **{f"{size} bytes": lambda path, size=size: path.write_bytes(path.read_bytes()[:size])
       for size in (0, 20, 500, -1)},
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "no digest": lambda path: path.write_bytes(read_state(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
    "a list": lambda path: rewritten(path, lambda state: [state]),
    "a weight less": lambda path: rewritten(path, lambda state: state["weights"].popitem() and state),
    "another shape": lambda path: rewritten(path, lambda state: state | {
        "weights": {key: value[:1] for key, value in state["weights"].items()}}),
    "moments of another shape": lambda path: rewritten(path, lambda state: state["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(2)) or state),
    "no number": lambda path: rewritten(path, lambda state: state | {
        "weights": {key: value * math.nan for key, value in state["weights"].items()}}),
    "no progress": lambda path: rewritten(path, lambda state: state.pop("progress") and state),
    "half a progress": lambda path: rewritten(path, lambda state: state["progress"].pop("window") and state),
    "a step in words": lambda path: rewritten(path, lambda state: state["progress"].update(step="8") or state),
    "random state of no kind": lambda path: rewritten(path, lambda state: state | {"random": [[1]]}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(stopped, tmp_path, capsys, damage):
    folder, expected = stopped
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "state.pt"
    older = former(state).read_bytes()
    DAMAGE[damage](state)
    former(state).write_bytes(older)
    job = Toy()
    assert outcome(job, fit(job, settings(checkpoint_seconds=0), seed=7, resume=tmp_path, name="tune")) == expected
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [f"{state} is damaged and was removed: the training goes on from the checkpoint before it",
                        "resuming at step 7, epoch 1"] and job.calls == 15 - 7


@pytest.mark.parametrize("damage", ["a bit at 0.5", "0 bytes", "a list"])
def test_where_no_checkpoint_is_whole_the_training_begins_anew(stopped, tmp_path, capsys, damage):
    folder, expected = stopped
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "state.pt"
    DAMAGE[damage](state)
    shutil.copy(state, former(state))
    job = Toy()
    assert outcome(job, fit(job, settings(), seed=7, resume=tmp_path, name="tune")) == expected
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == f"{state} is damaged and was removed: the training starts anew" and job.calls == 15


@pytest.mark.parametrize(("place", "name"), [("tune/a", "tower"), ("tune/b", "tune"), ("align/a", "tune")])
def test_a_checkpoint_of_another_training_is_not_taken(tmp_path, capsys, place, name):
    left_at(tmp_path / ".resume/tune/a", 8)
    shutil.copytree(tmp_path / ".resume/tune/a", tmp_path / "other/.resume" / place)
    job = Toy()
    fit(job, settings(), seed=7, resume=tmp_path / "other/.resume" / place, name=name)
    assert "the training starts anew" in capsys.readouterr().err and job.calls == 15
    shutil.copytree(tmp_path / ".resume/tune/a", tmp_path / "moved/.resume/tune/a")
    job = Toy()
    fit(job, settings(), seed=7, resume=tmp_path / "moved/.resume/tune/a", name="tune")
    assert job.calls == 15 - 8, "a repository may be moved"


def test_a_checkpoint_too_large_for_memory_stays(tmp_path, monkeypatch):
    write_state(tmp_path / "state.pt", b"whole")

    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate"):
        fit(Toy(), settings(), seed=7, resume=tmp_path, name="tune")
    assert (tmp_path / "state.pt").exists()


def test_two_micro_batches_of_eight_are_one_of_sixteen(tmp_path):
    one, two = Toy(16, 1, dropout=0.0), Toy(8, 2, dropout=0.0)
    a = fit(one, settings(), seed=3, resume=tmp_path / "1", name="tune")
    b = fit(two, settings(), seed=3, resume=tmp_path / "2", name="tune")
    assert a.step == b.step == 15
    for ours, theirs in zip(one.model.parameters(), two.model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close([r["loss"] for r in a.step_rows], [r["loss"] for r in b.step_rows], atol=1e-6, rtol=1e-5)


def test_three_golden_steps_against_a_plain_loop(tmp_path):
    job = Toy(16, 1, dropout=0.0, samples=48)
    progress = fit(job, settings(epochs=1, warmup_share=0.0), seed=11, resume=tmp_path / "r", name="tune")
    plain = Toy(16, 1, dropout=0.0, samples=48)
    matrices, rest = ([p for p in plain.model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}])
    losses = []
    for step, [micro] in enumerate(plain.steps(0, torch.Generator().manual_seed(11))):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(plain.model(plain.x[micro]), plain.y[micro])
        loss.backward()
        nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert [r["loss"] for r in progress.step_rows] == pytest.approx(losses, abs=1e-6)
    assert losses == pytest.approx([1.26746, 1.15353, 1.04164], abs=1e-4)
    for ours, theirs in zip(job.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_last_checkpoint(tmp_path, value):
    job = Toy()
    job.broken = {8: lambda total: total * value}
    with pytest.raises(UserError, match=r"tune: the loss .* not finite at step 8; lower tune.lr"):
        fit(job, settings(checkpoint_seconds=0), seed=7, resume=tmp_path, name="tune")
    state = checkpoint_of(tmp_path / "state.pt")
    assert state["progress"]["step"] == 7
    assert all(bool(w.isfinite().all()) for w in state["weights"].values())


def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path):
    job = Toy()
    job.broken = {8: lambda total: total + (0 * job.model[0].weight).pow(0.5).sum()}  # finite value, gradient 0 * inf
    with pytest.raises(UserError, match="not finite at step 8"):
        fit(job, settings(checkpoint_seconds=0), seed=7, resume=tmp_path, name="tune")
    state = checkpoint_of(tmp_path / "state.pt")
    assert state["progress"]["step"] == 7
    assert all(bool(p.isfinite().all()) for p in job.model.parameters())


@pytest.mark.parametrize(("name", "key"), [
    ("gcsan-text", "encoder.text_lr"), ("backbone", "llm.scratch.lr"),
    ("stamp-linear without fold 2", "encoder.text_lr"), ("gcsan at 0.03", "encoder.gcsan.lr"),
    ("align", "align.lr, or model.lora_alpha where it is high"),
    ("tune", "tune.lr, or model.lora_alpha where it is high")])
def test_the_key_to_lower_is_that_of_the_stage(tmp_path, name, key):
    job = Toy()
    job.broken = {1: lambda total: total * math.nan}
    with pytest.raises(UserError, match=re.escape(f"lower {key};")):
        fit(job, settings(), seed=7, resume=tmp_path, name=name)


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    assert [cosine(s, 100, 0.0) for s in (0, 50, 99)] == pytest.approx([1.0, 0.5, 0.000246719], abs=1e-6)
    shares = [cosine(s, 100, 0.1) for s in range(100)]
    assert shares[:10] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert shares[10] == 1.0 == max(shares)
    assert shares[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(shares[10:])) and 0 < shares[99] < 0.001
    assert [cosine(s, 2, 1.0) for s in range(2)] == pytest.approx([1 / 3, 2 / 3])


def test_the_curve_shows_the_schedule(tmp_path):
    job = Toy()
    progress = fit(job, settings(), seed=7, resume=tmp_path, name="tune")
    assert [r["lr"] for r in progress.step_rows] == pytest.approx([0.05 * cosine(s, 15, 0.2) for s in range(15)])
    assert [r["step"] for r in progress.step_rows] == list(range(1, 16))
    assert [r["epoch"] for r in progress.epoch_rows] == [0, 1, 2, 3]
    assert progress.epoch_rows[-1]["train_loss"] == pytest.approx(sum(r["loss"] for r in progress.step_rows[10:]) / 5)
    assert progress.epoch_rows[-1]["valid_loss"] < 0.8 * progress.epoch_rows[0]["valid_loss"], "it learns"


def test_early_stopping_keeps_the_best_epochs_weights(tmp_path):
    job = Selecting([0.0, 0.1, 0.3, 0.2, 0.3, 0.9])  # before training, then epoch by epoch
    progress = fit(job, settings(epochs=9, patience=2), seed=7, resume=tmp_path, name="gcsan")
    assert (progress.epoch, progress.best_epoch, progress.best) == (4, 2, 0.3)
    assert bytes_of(job) == job.weights[2] != job.weights[4]
    again = Selecting([])
    fit(again, settings(epochs=9, patience=2), seed=7, resume=tmp_path, name="gcsan")
    assert bytes_of(again) == bytes_of(job), "the best weights survive an interruption after the last epoch"


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    moved = {}
    for clip in (1e-3, 1e9):
        job = Toy(dropout=0.0)
        job.broken = {n: lambda total: 1e4 * total for n in range(1, 99)}
        norms = moved[clip] = []

        def look(optimizer, *_, norms=norms):
            found = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.stack(found).norm()))

        handle = register_optimizer_step_pre_hook(look)
        fit(job, settings(epochs=1, clip=clip), seed=7, resume=tmp_path / str(clip), name="tune")
        handle.remove()
    assert moved[1e-3] == pytest.approx([1e-3] * 5, rel=1e-3)
    assert min(moved[1e9]) > 100, "what is within the norm stays"


def test_the_item_table_has_a_decay_of_its_own():
    table, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = adamw({ITEM_TABLE: table, "other": other}, settings(lr=0.1, weight_decay=0.0,
                                                                                          table_decay=0.5))
    (0 * (table.sum() + other.sum())).backward()
    optimizer.step()
    assert torch.allclose(table, torch.full((3, 2), 0.95)) and torch.equal(other, torch.ones(2, 2))


def test_only_matrices_decay_and_frozen_weights_stay(tmp_path):
    job = Toy(dropout=0.0)
    job.model[0].requires_grad_(False)
    before = job.model[0].weight.clone()
    groups = optimizer._groups({k: p for k, p in job.model.named_parameters() if p.requires_grad}, 0.5, 0.1)
    assert [(g["weight_decay"], [p.dim() for p in g["params"]]) for g in groups] == [(0.5, [2]), (0.0, [1])]
    assert len(optimizer._groups({"w": job.model[3].weight}, 0.5, 0.1)) == 1, "no empty group"
    fit(job, settings(), seed=7, resume=tmp_path, name="tune")
    assert torch.equal(job.model[0].weight, before)
    assert "0.weight" not in checkpoint_of(tmp_path / "state.pt")["weights"]


def test_what_a_finished_training_writes(tmp_path):
    job = Toy()
    job.model[0].bias.requires_grad_(False)
    resume = tmp_path / "resume"
    progress = fit(job, settings(), seed=7, resume=resume, name="tune")
    engine.finish(progress, job.model, name="tune", resume=resume, reports=tmp_path / "reports")
    assert not resume.exists()
    rows = list(csv.DictReader((tmp_path / "reports/curves/tune_epochs.csv").open()))
    assert [r["epoch"] for r in rows] == ["0", "1", "2", "3"] and rows[0]["train_loss"] == ""
    assert len(list(csv.DictReader((tmp_path / "reports/curves/tune_steps.csv").open()))) == 15
    cost = json.loads((tmp_path / "reports/metrics/cost/tune.json").read_text())
    assert cost["trainable_parameters"] == 32 + 27 and cost["total_parameters"] == 67
    assert 0 < cost["training_seconds"] <= cost["seconds"] and cost["peak_memory_mb"] > 50
    assert cost["tokens_per_second"] == pytest.approx(2 * cost["samples_per_second"], rel=1e-3)
    assert cost["samples_per_second"] == pytest.approx(240 / cost["training_seconds"], rel=1e-2)


def test_precision_follows_the_parameter_and_auto_says_why(capsys):
    assert precision.arithmetic("fp32") is torch.float32
    assert precision.arithmetic("bf16") is torch.bfloat16
    assert capsys.readouterr().err == ""
    chosen = precision.arithmetic("auto")
    said = capsys.readouterr().err
    assert said.startswith("precision auto: " + ("bf16" if chosen is torch.bfloat16 else "fp32")) and "(" in said


@pytest.mark.parametrize(("cpu", "bf16", "chosen"), [
    ({"amx_bf16": True}, 0.5, "bf16"), ({"amx_bf16": True}, 0.9, "fp32"), ({"amx_bf16": True}, 4.0, "fp32"),
    ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, 0.5, "bf16"), ({"avx512_bf16": True}, 0.5, "fp32"),
    ({}, 0.5, "fp32")])
def test_a_cpu_takes_bf16_where_it_has_it_and_it_is_clearly_faster(monkeypatch, capsys, cpu, bf16, chosen):
    measured = []

    def seconds(dtype):
        measured.append(dtype)
        return 0.002 * (bf16 if dtype is torch.bfloat16 else 1)

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(precision, "product_seconds", seconds)
    precision._cpu.cache_clear()
    try:
        found = [precision.arithmetic("auto") for _ in range(2)]
    finally:
        precision._cpu.cache_clear()
    assert found == [{"bf16": torch.bfloat16, "fp32": torch.float32}[chosen]] * 2
    asked = "amx_bf16" in cpu or "cpu_name" in cpu
    assert len(measured) == 2 * asked, "once"
    assert (f"2.0 ms in fp32 and {2 * bf16:.1f} ms in bf16" in capsys.readouterr().err) == asked


@pytest.mark.parametrize("built_in", [False, True])
def test_a_gpu_that_emulates_bf16_computes_in_fp32(monkeypatch, capsys, built_in):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: built_in or including_emulation)
    assert precision.arithmetic("auto") is (torch.bfloat16 if built_in else torch.float32)
    assert ("the GPU has no bf16" in capsys.readouterr().err) != built_in
