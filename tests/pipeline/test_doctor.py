"""`make doctor`: what a machine lacks, before anything is installed."""
from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from machine import ROOT


@pytest.fixture
def doctor(monkeypatch, tmp_path):
    """The script, looking at an empty repository."""
    monkeypatch.syspath_prepend(str(ROOT / "stages"))
    module = importlib.import_module("doctor")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "WATCHED", tmp_path / "data/.watched")
    monkeypatch.delenv("VENV", raising=False)
    git("init", "-q", "-b", "main", folder=tmp_path)
    return module


def git(*arguments: str, folder: Path) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", folder, *arguments], check=True,
                   capture_output=True)


def test_it_runs_on_the_standard_library_alone_and_is_quiet_where_all_is_well():
    for options, least in (([], 14), (["--quiet"], 0)):
        done = subprocess.run([sys.executable, "-S", ROOT / "stages/doctor.py", *options], capture_output=True,
                              text=True, env={"PATH": os.environ["PATH"]})
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) >= least
        assert not options or not [line for line in done.stderr.splitlines() if line.startswith("ok")]


def test_a_python_that_is_too_old_and_a_program_that_is_missing(doctor, monkeypatch):
    assert doctor.python()[0] == doctor.GOOD
    monkeypatch.setattr(doctor, "OLDEST", (9, 0))
    assert doctor.python()[0] == doctor.BAD
    assert doctor.program("git")[0] == doctor.GOOD
    monkeypatch.setenv("PATH", "")
    assert doctor.program("git")[0] == doctor.BAD


def test_disk_and_memory(doctor, monkeypatch):
    usage = namedtuple("usage", "total used free")
    for free, state in ((2e9, doctor.BAD), (50e9, doctor.GOOD)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: usage(1e12, 0, free))
        assert doctor.disk()[0] == state
    monkeypatch.setattr(doctor, "MEMORY_GB", 1e6)
    assert doctor.memory()[0] == doctor.ODD


def test_an_environment_that_lost_dvc(doctor, tmp_path):
    assert doctor.dvc()[0] == doctor.GOOD, "it is installed by make repro"
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    assert doctor.dvc()[0] == doctor.BAD and doctor.index()[0] == doctor.GOOD


@pytest.mark.parametrize(("given", "state"), [("0", "odd"), ("many", "odd"), ("9999", "odd"), ("1", "ok")])
def test_threads(doctor, monkeypatch, given, state):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert doctor.threads()[0] == state


def test_what_a_killed_run_left(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr("llmgr.runtime.healing.at_work", lambda root: "")
    assert doctor.leftovers()[0] == doctor.branch()[0] == doctor.GOOD
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/rwlock").touch()
    assert doctor.leftovers()[0] == doctor.ODD and "rwlock" in doctor.leftovers()[2]
    (tmp_path / ".dvc/tmp/rwlock").write_text("{}")
    git("commit", "-q", "--allow-empty", "-m", "a", folder=tmp_path)
    git("update-ref", "refs/exps/exec/EXEC_HEAD", "HEAD", folder=tmp_path)
    assert doctor.leftovers()[0] == doctor.GOOD, "DVC leaves this one of every experiment that ended well"
    git("update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD", folder=tmp_path)
    git("switch", "-q", "--detach", folder=tmp_path)
    assert "EXEC_BASELINE" in doctor.leftovers()[2] and doctor.branch()[0] == doctor.ODD


def test_a_path_where_the_queue_fails(doctor, monkeypatch, tmp_path):
    assert doctor.queue()[0] == doctor.GOOD
    monkeypatch.setattr(doctor, "ROOT", tmp_path / "mühle")
    assert doctor.queue()[0] == doctor.ODD and "ASCII" in doctor.queue()[2]


def test_a_file_of_ones_own_that_moved(doctor, tmp_path):
    doctor.WATCHED.mkdir(parents=True)
    (tmp_path / "shop.csv").touch()
    (doctor.WATCHED / "interactions.csv").symlink_to(tmp_path / "shop.csv")
    assert doctor.watched()[0] == doctor.GOOD
    (tmp_path / "shop.csv").unlink()
    state, _, text = doctor.watched()
    assert state == doctor.BAD and "rm data/.watched/interactions.csv" in text


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_folders_that_cannot_be_written_to(doctor, tmp_path):
    (tmp_path / "data").mkdir(mode=0o555)
    assert doctor.writable()[0] == doctor.BAD


def test_make_doctor_and_make_repro_ask(tmp_path):
    said = subprocess.run(["make", "-n", "-C", ROOT, "repro", f"VENV={tmp_path}/none"], capture_output=True, text=True)
    lines = [line for line in said.stdout.splitlines() if "doctor.py --quiet" in line or "-m venv" in line]
    assert "doctor.py" in lines[0] and "-m venv" in lines[1], "it looks before it installs"
