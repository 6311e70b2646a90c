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
from machine import DEFAULTS

from llmgr.params import loading

STAGES = Path(__file__).resolve().parent.parent / "stages"


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
    ("raise MemoryError", ["out of memory", "tune.batch_size", "encoder.training.batch_size"]),
    ("import torch\ntorch.empty(2**60, dtype=torch.uint8)", ["out of memory", "tune.gradient_checkpointing"]),
    ("import torch\nraise torch.OutOfMemoryError('CUDA out of memory')", ["out of memory", "launch.strategy=zero3"]),
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
    text = (STAGES / "llmgr/pipeline/stage.py").read_text()
    named = set(re.findall(rf"\b((?:{'|'.join(sections)})\.[a-z_.]*[a-z_])", text)) - {"params.yaml"}
    assert named and named <= known


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
