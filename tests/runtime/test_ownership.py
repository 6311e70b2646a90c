"""A stage ends with the DVC that started it, lives on where a person did, and works alone at its place."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest
from machine import DEFAULTS, ROOT

from llmgr.runtime import ownership
from llmgr.runtime.errors import UserError
from llmgr.runtime.resume import resume_folder

STAGES = ROOT / "stages"
STAGE = '''
    """A stage that works until it is told to end."""
    import os, sys, time
    from pathlib import Path
    from llmgr.pipeline.stage import run

    def main(params):
        from llmgr.runtime.artifacts import replacing_folder
        with replacing_folder("out") as folder:
            Path(f"{os.getpid()}.pid").touch()
            while not Path("end").exists():
                time.sleep(0.05)
            (folder / "whole").write_text("whole")

    run(main, __doc__, ("seed",))
'''


def environment(root: Path, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_", "RANK", "LLMGR_"))}
    return clean | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1",
                    "PYTHONPATH": str(STAGES), "DVC_SITE_CACHE_DIR": str(root / ".site")} | more


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "params.yaml").write_text(DEFAULTS.read_text())
    (tmp_path / "probe.py").write_text(textwrap.dedent(STAGE))
    yield tmp_path
    for process in working(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def working(root: Path) -> list[int]:
    """The stages that have begun and run."""
    begun = [int(path.stem) for path in root.glob("*.pid")]
    return [process for process in begun if Path(f"/proc/{process}/stat").exists()
            and Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"]


def wait_for(found: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("shell", "command"), [("/bin/bash", "python probe.py"),
                                                ("/bin/sh", "python probe.py && true")])  # where the shell stays
def test_a_stage_ends_when_its_dvc_is_killed_and_the_next_one_works(root: Path, shell: str, command: str) -> None:
    (root / "dvc.yaml").write_text(f"stages:\n  a: {{cmd: {command}, outs: [out]}}\n")
    more = {"SHELL": shell}
    subprocess.run(["dvc", "init", "-q", "--no-scm"], cwd=root, env=environment(root), check=True)
    dvc = subprocess.Popen(["dvc", "repro"], cwd=root, env=environment(root, **more), stderr=subprocess.DEVNULL)
    wait_for(lambda: bool(working(root)))
    time.sleep(1)
    assert working(root), "it lives as long as DVC does"
    dvc.kill()
    dvc.wait()
    wait_for(lambda: not working(root), 10)
    (root / "end").touch()
    again = subprocess.run(["dvc", "repro"], cwd=root, env=environment(root, **more), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [path.name for path in (root / "out").iterdir()] == ["whole"] and not list(root.glob(".out*.tmp"))


def test_a_stage_that_a_person_started_outlives_the_shell(root: Path) -> None:
    shell = subprocess.Popen(["/bin/sh", "-c", f"nohup {sys.executable} probe.py >log 2>&1 & sleep 60"], cwd=root,
                             env=environment(root))
    wait_for(lambda: bool(working(root)))
    shell.kill()
    shell.wait()
    time.sleep(2)
    assert working(root)
    (root / "end").touch()
    wait_for(lambda: (root / "out/whole").exists())


def test_two_of_a_stage_never_work_at_one_place(root: Path) -> None:
    def start(wait: float) -> subprocess.Popen:
        body = (f"import sys; sys.argv = ['probe.py']; from llmgr.runtime import ownership as o; o.WAIT = {wait}; "
                "exec(open('probe.py').read())")
        return subprocess.Popen([sys.executable, "-c", body], cwd=root, env=environment(root), text=True,
                                stderr=subprocess.PIPE)

    first = start(60)
    wait_for(lambda: len(working(root)) == 1)
    second = start(0.5)
    said = second.communicate(timeout=60)[1].splitlines()
    assert second.returncode == 2 and len(said) == 2
    assert all(f"another run of this stage (process {first.pid}) works in this folder" in line for line in said)
    third = start(60)
    assert "waiting for it" in third.stderr.readline() and len(working(root)) == 1
    first.kill()
    first.wait()
    wait_for(lambda: len(working(root)) == 1)
    (root / "end").touch()
    assert third.wait(60) == 0 and first.communicate()[1] == ""
    assert (root / "out/whole").exists() and not list(root.glob(".out*.tmp"))


def test_of_two_that_do_the_same_work_elsewhere_each_has_checkpoints_of_its_own(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    body = """
import sys; sys.argv = ['-c']
from llmgr.runtime.resume import resume_folder
print(resume_folder('tune', {'lr': 1}, []), flush=True)
input()
"""
    other = subprocess.Popen([sys.executable, "-c", body], env=environment(tmp_path, DVC_ROOT=str(tmp_path)), text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    taken = Path(other.stdout.readline().strip())
    monkeypatch.setattr(sys, "argv", ["-c"])
    monkeypatch.setattr(ownership, "_held", {})
    own = resume_folder("tune", {"lr": 1}, [])
    assert own != taken and own.parent == taken.parent and "checkpoints of its own" in capsys.readouterr().err
    other.communicate("\n")
    assert resume_folder("tune", {"lr": 1}, []) == taken


def test_a_second_one_says_whom_it_waits_for_and_gives_up(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["probe.py"])
    monkeypatch.setattr(ownership, "_held", {})
    monkeypatch.setattr(ownership, "WAIT", 0.3)
    monkeypatch.delenv("RANK", raising=False)
    ownership.alone(tmp_path)
    (lock,) = (tmp_path / ".resume/locks").iterdir()
    assert lock.read_text() == str(os.getpid())
    ownership.let_go()
    with filelock.FileLock(lock), pytest.raises(UserError, match="another run of this stage"):
        ownership.alone(tmp_path)
    assert capsys.readouterr().err.count("at most") == 1
