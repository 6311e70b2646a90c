"""Parameters, a stage run in this process, what processes may cost, and a disk that is small enough to fill."""
from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = ROOT / "tests/params.yaml"
"""Parameters of the embedded sample, whatever experiment the project's own file is at."""


def stage(name: str, *arguments: str, root: Path) -> int:
    """The exit status of `python stages/NAME.py ARGUMENTS` in `root`, without another process's seconds of imports.

    One thread, so that rounding is that of the processes that test_pipeline.py starts.
    """
    before, threads = Path.cwd(), torch.get_num_threads()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    with mock.patch.dict(os.environ, clean, clear=True), mock.patch.object(sys, "argv", [name, *arguments]):
        os.chdir(root)
        torch.set_num_threads(1)
        try:
            runpy.run_path(str(ROOT / f"stages/{name}.py"), run_name="__main__")
        except SystemExit as left:
            return left.code
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
    return 0


@contextlib.contextmanager
def within(seconds: float, told: str) -> Iterator[None]:
    """The processes run inside take fewer seconds of work than that, however busy the machine is."""
    before = os.times()
    yield
    after = os.times()
    taken = after.children_user + after.children_system - before.children_user - before.children_system
    assert taken < seconds, f"{taken:.1f} s: {told}"


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """`folder` on a file system of so many kilobytes; the test skips where nothing may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
