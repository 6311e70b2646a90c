"""Several processes: the single-process result, files of one of them, interruptions, and how they fail."""
from __future__ import annotations

import json
import os
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
from tiny import llmgr, prefixes
from torch import Tensor

from llmgr import launch, params
from llmgr.errors import UserError
from llmgr.launch import rank
from llmgr.training import fit

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = ["ddp", "zero2", "zero3"]
CASES = {  # the last micro-batch of an epoch is one prompt: nothing is left for the second process
    "align": {"batch_size": 11}, "align-free": {"batch_size": 11, "output": "linear", "accumulate": 2},
    "positions": {"batch_size": 4}, "prefix": {"batch_size": 16, "targets": "prefix", "accumulate": 2},
    "frozen": {"batch_size": 4, "train_encoder": "none"},
}


def trained(case: str, resume: Path, strategy: str = "ddp", dtype: torch.dtype = torch.float32, **changes: Any
            ) -> dict[str, Any]:
    """A tiny model through one of the stages: curve and weights."""
    from test_tuning import align, behave, settings

    chosen = {"epochs": 4, "weight_decay": 0.01, "clip": 0.5, **CASES[case], **changes}
    model = llmgr("llama", output=chosen.pop("output", "items"))
    if case.startswith("align"):
        job = align(model, **chosen)
    else:
        model.unfreeze_encoder(chosen.pop("train_encoder", "all"))
        job = behave(model, prefixes(), titles=True, **chosen)
    job.dtype = dtype
    progress = fit(job, settings(**chosen), seed=5, resume=resume, name="tune", strategy=strategy)
    return {"steps": [row["loss"] for row in progress.step_rows], "epochs": progress.epoch_rows,
            "samples": progress.samples, "tokens": progress.tokens,
            "weights": {k: p.detach().clone() for k, p in model.named_parameters()}}


def probe(folder: Path, body: str, processes: int = 2, **settings: Any) -> list[str]:
    """The command of a stage that runs `body` in so many processes."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content = params.changed(content, {"launch.processes": processes, "launch.device": "cpu"} | settings)
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    (folder / "probe.py").write_text(
        '"""Probe.\n"""\nfrom llmgr.stage import run\n\n\ndef main(params):\n' + textwrap.indent(textwrap.dedent(body), "    ")
        + '\n\nrun(main, __doc__, ("launch",))\n')
    return [sys.executable, "probe.py"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'stages'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def run(folder: Path, body: str, processes: int = 2, **settings: Any) -> subprocess.CompletedProcess:
    return subprocess.run(probe(folder, body, processes, **settings), cwd=folder, env=environment(), text=True,
                          capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {case: trained(case, tmp_path_factory.mktemp(case)) for case in CASES}
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module", params=STRATEGIES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case in two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    done = run(folder, f"""
        import torch
        from pathlib import Path
        from llmgr import launch
        from test_launch import CASES, rank, trained
        launch.WHOLE = 0  # divide the smallest weight
        found = {{case: trained(case, Path(case), {request.param!r}) for case in CASES}}
        torch.save(found, f"found.{{rank()}}")
        """)
    assert done.returncode == 0, done.stderr
    found = [torch.load(folder / f"found.{n}") for n in range(2)]
    for case in CASES:
        assert found[0][case]["steps"] == found[1][case]["steps"]
    return found[0]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_steps_of_one(alone, together, case: str) -> None:
    one, two = alone[case], together[case]
    assert (one["samples"], one["tokens"]) == (two["samples"], two["tokens"])
    assert len(one["steps"]) == len(two["steps"]) > 3
    assert one["epochs"][-1]["train_loss"] < 0.95 * one["epochs"][1]["train_loss"], "it learns"
    assert two["steps"] == pytest.approx(one["steps"], rel=1e-5)
    for ours, theirs in zip(two["epochs"], one["epochs"]):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-5, msg=name)
