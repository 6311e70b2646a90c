"""Several processes: the single-process result, files of one of them, interruptions, and how they fail."""
from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from launched import CASES, STRATEGIES, trained
from machine import DEFAULTS, ROOT
from toy import checkpoint_of

from llmgr.params import loading
from llmgr.runtime.console import PARENT, WORKERS
from llmgr.runtime.errors import UserError
from llmgr.training import distributed, launcher


def probe(folder: Path, body: str, processes: int = 2, **settings: Any) -> list[str]:
    """The command of a stage that runs `body` in so many processes."""
    content = yaml.safe_load(DEFAULTS.read_text())
    content = loading.changed(content, {"launch.processes": processes, "launch.device": "cpu"} | settings)
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    (folder / "probe.py").write_text('"""Probe."""\nfrom llmgr.pipeline.stage import run\n\n\ndef main(params):\n'
                                     + textwrap.indent(textwrap.dedent(body), "    ")
                                     + '\n\nrun(main, __doc__, ("launch",), workers=True)\n')
    return [sys.executable, "probe.py"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'stages'}:{ROOT / 'tests/support'}", "OMP_NUM_THREADS": "1"}


def run(folder: Path, body: str, processes: int = 2, **settings: Any) -> subprocess.CompletedProcess:
    return subprocess.run(probe(folder, body, processes, **settings), cwd=folder, env=environment(), text=True,
                          capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case in one process.

    In bf16 a hidden state depends on the shape of the batch that it is in: there one process goes through the shares of
    two, one after the other, and what remains is the order in which float32 gradients are added up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {case: trained(case, tmp_path_factory.mktemp(case), divided=case.endswith("bf16")) for case in CASES}
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case in two processes, by each strategy; one run of workers for all, since starting them takes longest."""
    folder = tmp_path_factory.mktemp("together")
    done = run(folder, """
        import shutil, sys
        from pathlib import Path
        import torch
        from llmgr.training import distributed
        from launched import CASES, STRATEGIES, resumed, trained

        distributed.WHOLE = 0  # ZeRO-3 divides the smallest weight, too
        found = {}
        for strategy in STRATEGIES:
            for case in CASES:
                found[case, strategy] = trained(case, Path(f"{case}-{strategy}"), strategy)
            found["resumed", strategy] = resumed(strategy)
            other = Path(f"other-{strategy}")
            if distributed.rank() == 0:
                shutil.copytree("half-ddp-0.0", other)
            found["other", strategy] = trained("positions", other, strategy)
            found["imported", strategy] = "deepspeed" in sys.modules
        torch.save(found, f"found.{distributed.rank()}")
        """)
    assert done.returncode == 0, done.stderr
    found, other = (torch.load(folder / f"found.{n}") for n in range(2))
    for case in CASES:
        assert all(found[case, s]["epochs"] == other[case, s]["epochs"] for s in STRATEGIES), "both know the same"
    return {**found, "folder": folder, "said": done.stderr}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_steps_of_one(alone, together, case: str, strategy: str) -> None:
    one, two = alone[case], together[case, strategy]
    assert (one["samples"], one["tokens"]) == (two["samples"], two["tokens"])
    assert len(one["steps"]) == len(two["steps"]) >= 3
    assert one["epochs"][-1]["train_loss"] < 0.95 * one["epochs"][1]["train_loss"], "it learns"
    bf16 = case.endswith("bf16")
    # In bf16 rounding in another order turns over a few last places: 0.13% was seen under zero2, and under zero3, whose
    # adapters are not joined, 2.2%, where bf16 and float32 are 1.3% apart.
    allowed = 1e-5 if not bf16 else 2**-5 if strategy == "zero3" else 2**-8
    assert two["steps"] == pytest.approx(one["steps"], rel=allowed)
    for ours, theirs in zip(two["epochs"], one["epochs"]):
        assert bf16 or ours == pytest.approx(theirs, rel=1e-5)
    for name, weight in one["weights"].items():
        pair = two["weights"][name], weight
        if name.endswith("key_value.bias"):  # a key's bias moves no softmax: its gradient is rounding, scaled by Adam
            pair = pair[0].chunk(2)[1], pair[1].chunk(2)[1]
        if not bf16:
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_run_ends_with_the_bytes_of_an_undisturbed_one(together, strategy: str) -> None:
    whole, cut = together["resumed", strategy]
    assert cut["steps"] == whole["steps"] and cut["epochs"] == whole["epochs"]
    assert all(torch.equal(cut["weights"][k], w) for k, w in whole["weights"].items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_are_whole_hold_no_frozen_weight_and_suit_one_process(alone, together, strategy, tmp_path, capsys):
    state = checkpoint_of(together["folder"] / f"half-{strategy}-0.0/state.pt")
    frozen = {k for k in state["weights"] if "base_layer" in k or "embed" in k}
    step = state["progress"]["step"]
    assert state["weights"] and not frozen and 0 < step < len(alone["positions"]["steps"])
    (tmp_path / "state.pt").write_bytes((together["folder"] / f"half-{strategy}-0.0/state.pt").read_bytes())
    torch.set_num_threads(1)
    found, other = trained("positions", tmp_path), together["other", strategy]  # and ddp's one under each strategy
    said = capsys.readouterr().err
    assert f"resuming at step {step}" in said and f"2 {strategy} processes of 1 threads, float32 on cpu before" in said
    assert found["steps"] == pytest.approx(alone["positions"]["steps"], rel=1e-5)
    assert other["steps"] == pytest.approx(alone["positions"]["steps"], rel=1e-5)


def test_a_checkpoints_count_of_steps_goes_where_the_weights_are(monkeypatch) -> None:
    parts = [torch.zeros(3, device="meta"), torch.zeros(2, device="meta")]
    zero = object.__new__(distributed.Zero)
    zero.optimizer, zero.order, zero.stage = SimpleNamespace(state={}), parts, 3
    monkeypatch.setattr(zero, "_parts", lambda: parts)
    monkeypatch.setattr(zero, "_set", lambda *_: None)
    steps = {n: {"step": torch.tensor(4.0), **{key: torch.zeros(1) for key in distributed.MOMENTS}} for n in range(2)}
    zero.load({"state": steps})
    for part in parts:
        assert {key: value.device for key, value in zero.optimizer.state[part].items()} == dict.fromkeys(
            ("step", *distributed.MOMENTS), part.device)
    assert steps[0]["step"].device.type == "cpu"


def test_deepspeed_is_imported_only_where_it_is_used_and_only_the_first_process_prints(together) -> None:
    assert [together["imported", s] for s in STRATEGIES] == [False, True, True]
    assert together["said"].count("tune: epoch 1 ") == len(STRATEGIES) * (len(CASES) + 3)
    assert not [line for line in together["said"].splitlines() if "c10d" in line or "DeepSpeed" in line]


TOY = """
    import os, signal, time
    from pathlib import Path
    import torch
    from llmgr.training import distributed
    from llmgr.training.engine import fit
    from toy import Toy, bytes_of, settings

    job, own = Toy(), int(os.environ.get("RANK", 0))
    job.broken = {8: WHAT} if own == 1 else {}
    fit(job, settings(checkpoint_seconds=0), seed=7, resume=Path("resume"), name="tune", strategy="ddp")
    Path(f"bytes.{distributed.rank()}").write_bytes(bytes_of(job))
"""


def toy(what: str) -> str:
    """A small training whose second process does `what` at its eighth loss."""
    return TOY.replace("WHAT", what)


def sentence(done: subprocess.CompletedProcess) -> str:
    """The one line that it says of its failure, which the user can mend."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.splitlines()[-1] == said
    return said


def test_a_worker_that_dies_takes_the_others_along_and_the_run_goes_on_to_the_same_bytes(undisturbed, tmp_path) -> None:
    done = run(tmp_path, toy("lambda total: os.kill(os.getpid(), signal.SIGKILL)"))
    assert re.search(r"error: process 2 of 2 was killed \(SIGKILL\) and the others were stopped; .*launch.processes",
                     sentence(done))
    assert not list(tmp_path.glob("bytes.*")) and checkpoint_of(tmp_path / "resume/state.pt")["progress"]["step"] == 7
    again = run(tmp_path, toy("lambda total: total"))
    assert again.returncode == 0 and "resuming at step 7, epoch 1\n" in again.stderr, again.stderr
    assert {(tmp_path / f"bytes.{n}").read_bytes() for n in range(2)} == {undisturbed}


@pytest.mark.parametrize(("what", "words"), [
    ("lambda total: total * float('nan')", ["tune: the loss", "not finite at step 8", "lower tune.lr"]),
    ("lambda total: torch.empty(2**60, dtype=torch.uint8)",
     ["out of memory"]),
], ids=["nan", "memory"])
def test_what_one_worker_meets_stops_all_with_one_sentence(tmp_path: Path, what: str, words: list[str]) -> None:
    said = sentence(run(tmp_path, toy(what)))
    assert all(word in said for word in words)
    state = checkpoint_of(tmp_path / "resume/state.pt")
    assert state["progress"]["step"] == 7 and all(w.isfinite().all() for w in state["weights"].values())


def test_a_defect_of_one_worker_keeps_its_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, toy("lambda total: {}['defect']"))
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and "KeyError: 'defect'" in done.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of the small training in two processes, which torchrun starts, whatever launch.processes says."""
    folder = tmp_path_factory.mktemp("torchrun")
    probe(folder, toy("lambda total: total"), processes=7)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "probe.py"], cwd=folder, env=environment(), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tune: epoch 1 ") == 1
    return (folder / "bytes.0").read_bytes()


def test_workers_leave_with_the_process_that_started_them(tmp_path: Path) -> None:
    command = probe(tmp_path, """
        import os, time
        from pathlib import Path
        Path(f"{os.getpid()}.pid").touch()
        time.sleep(300)
        """)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment())
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{path.stem}").exists() for path in tmp_path.glob("*.pid")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_workers_whose_parent_left_before_they_joined_leave_too(tmp_path: Path) -> None:
    command = probe(tmp_path, """
        import os, time
        from pathlib import Path
        Path(f"{os.getpid()}.pid").touch()
        time.sleep(300)
        """)
    gone = subprocess.Popen(["true"])
    gone.wait()
    workers = [subprocess.Popen(command, cwd=tmp_path, env=environment() | {
        WORKERS: str(tmp_path), PARENT: str(gone.pid), "WORLD_SIZE": "2", "RANK": str(n), "LOCAL_RANK": str(n),
        "LOCAL_WORLD_SIZE": "2"}) for n in range(2)]
    assert [worker.wait(100) for worker in workers] == [1, 1]


@pytest.mark.parametrize(("settings", "gpus", "words"), [
    ({"device": "cuda", "processes": 1}, 0, "launch.device=cuda, but there is no GPU"),
    ({"device": "cuda", "processes": 3}, 2, "3 processes want a GPU each and there are 2: lower launch.processes"),
    ({"device": "auto", "processes": 2}, 1, "2 processes want a GPU each and there is 1: lower launch.processes"),
])
def test_devices_that_are_not_there_are_refused(monkeypatch, settings, gpus, words) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=words), launcher.processes(SimpleNamespace(**settings)):
        pass


def test_the_device_cpu_hides_the_gpus(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert launcher.device(SimpleNamespace(device="cpu", processes=1)).type == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("strategy", "warned"), [("ddp", False), ("zero2", True), ("zero3", True)])
def test_a_strategy_that_divides_nothing_is_warned_of(monkeypatch, capsys, strategy: str, warned: bool) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launcher.processes(SimpleNamespace(device="auto", processes=1, strategy=strategy)) as works:
        assert works
    assert (f"launch.strategy={strategy} divides nothing in one process" in capsys.readouterr().err) == warned


def test_a_missing_gpu_is_a_sentence_of_the_stage(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(tmp_path, "print('worked')", 1, **{"launch.device": "cuda"})
    assert "launch.device=auto" in sentence(done) and done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_rows_are_divided_and_come_back_in_order(monkeypatch) -> None:
    rows = torch.arange(10, 15)
    monkeypatch.setattr(distributed, "size", lambda: 3)
    shares = []
    for number in range(3):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        shares.append(distributed.share(rows))
        assert distributed.share(rows[:1])[1] == (number == 0), "a row too few counts for nothing"
    assert sorted(torch.cat([own for own, counts in shares if counts]).tolist()) == rows.tolist()
