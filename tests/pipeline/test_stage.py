from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from machine import DEFAULTS, ROOT

from llmgr.params import loading
from llmgr.runtime import memory

STAGES = ROOT / "stages"


def script(folder: Path, body: str) -> list[str]:
    """A stage whose `main(params, mark)` is `body`."""
    (folder / "params.yaml").write_text(DEFAULTS.read_text())
    (folder / "probe.py").write_text(
        '"""Probe the frame.\n\nreads   nothing\n"""\nfrom llmgr.pipeline.stage import run\n\n\n'
        'def main(params, mark):\n'
        + textwrap.indent(textwrap.dedent(body), "    ")
        + '\n\nrun(main, __doc__, ("seed", "tune"), {"mark": "any word"})\n')
    return [sys.executable, "probe.py"]


def run(folder: Path, body: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*script(folder, body), *arguments], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(STAGES)})


def test_main_gets_its_options_and_its_declared_parameters_only(tmp_path):
    done = run(tmp_path, "print(mark, params.seed, params.tune.lr, hasattr(params, 'align'))", "--mark", "here")
    assert done.returncode == 0, done.stderr
    content = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert done.stdout == f"here {content['seed']} {float(content['tune']['lr'])} False\n"


def test_help_is_the_docstring(tmp_path):
    done = run(tmp_path, "raise SystemExit(5)", "--help")
    assert done.returncode == 0
    assert "Probe the frame.\n\nreads   nothing" in done.stdout and "any word" in done.stdout


@pytest.mark.parametrize(("body", "words"), [
    ("from llmgr.runtime.errors import UserError\nraise UserError('tune.lr=9 is high: lower it')",
     ["tune.lr=9 is high"]),
    ("from llmgr.runtime.artifacts import read_json\nread_json('gone.json')", ["gone.json", "dvc repro"]),
    ("raise MemoryError", ["out of memory"]),
    ("import torch\ntorch.empty(2**60, dtype=torch.uint8)", ["out of memory"]),
    ("import torch\nraise torch.OutOfMemoryError('CUDA out of memory')", ["out of memory"]),
    ("raise RuntimeError('could not create a primitive')", ["out of memory"]),
    ("raise RuntimeError('could not create a memory object')", ["out of memory"]),
    ("import os, errno\nraise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", ["disk is full"]),
    ("raise RuntimeError('I/O error: No space left on device (os error 28)')", ["disk is full"]),
    ("raise RuntimeError('(sqlite3.OperationalError) database or disk is full\\n[SQL: ...]')", ["disk is full"]),
])
def test_what_the_user_can_mend_is_one_sentence_and_status_2(tmp_path, body, words):
    done = run(tmp_path, body, "--mark", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_keys_that_the_messages_name_exist():
    known = set(loading.flat(loading.load(DEFAULTS)))
    sections = {k.split(".")[0] for k in known}
    text = (STAGES / "llmgr/pipeline/stage.py").read_text() + "\n".join(map(memory.what_helps, memory.HELP))
    named = set(re.findall(rf"\b((?:{'|'.join(sections)})\.[a-z_.]*[a-z_])", text)) - {"params.yaml"}
    assert named and named <= known


@pytest.mark.parametrize(("stage", "named", "other"), [
    ("tune", "tune.batch_size", "align."), ("align", "align.batch_size", "tune."),
    ("bucket", "bucket.resamples", "tune."),
    ("pretrain", "encoder.training.batch_size", "linear"), ("tower", "tower.batch_size", "tune."),
    ("gate", "gate.sessions", "tune."), ("linear", "encoder.linear_controls=[]", "tune."),
    ("filter", "memory", ".batch_size")])
def test_out_of_memory_a_stage_names_what_is_its_own(tmp_path, stage, named, other):
    command = script(tmp_path, "raise MemoryError")
    (tmp_path / "probe.py").rename(tmp_path / f"{stage}.py")
    done = subprocess.run([command[0], f"{stage}.py", "--mark", "x"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(STAGES)})
    assert done.returncode == 2 and done.stderr.startswith("error: out of memory: ")
    assert named in done.stderr and other not in done.stderr


def group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_memory_is_the_least_that_machine_and_groups_have(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_folders", lambda: [(tmp_path / name, ("memory.max", "memory.current"))
                                                     for name in ("a/b", "a", "gone")])
    whole = memory.capacity()
    assert whole > 1e8 and 0 < memory.available() <= whole
    group(tmp_path / "a", "max", 10, 0)
    assert memory.capacity() == whole
    group(tmp_path / "a/b", "2000", 1500, 300)
    assert memory.capacity() == 2000 and memory.available() == 800


def test_a_wrong_parameter_stops_before_any_work(tmp_path):
    command = script(tmp_path, "print('worked')")
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(re.sub(r"(tune:\n  epochs:) \d+", r"\1 many", text))
    done = subprocess.run([*command, "--mark", "x"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(STAGES)})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: tune.epochs=many must be a whole number; set it with -S tune.epochs=VALUE\n"


def test_an_unknown_key_is_one_sentence(tmp_path):
    command = script(tmp_path, "print('worked')")
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("tune:\n", "tune:\n  epoch: 2\n"))
    done = subprocess.run([*command, "--mark", "x"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(STAGES)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: params.yaml: unknown key tune.epoch; the nearest known one is tune.epochs\n"


@pytest.mark.parametrize("body", ["raise KeyError('defect')", "raise OSError(2, 'No such file')"])
def test_a_defect_keeps_its_traceback(tmp_path, body):
    done = run(tmp_path, body, "--mark", "x")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_an_interrupt_is_a_sentence(tmp_path):
    command = script(tmp_path, "import time\nprint('ready', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([*command, "--mark", "x"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": str(STAGES)})
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.startswith("error: interrupted") and len(said.splitlines()) == 1
