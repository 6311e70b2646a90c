"""What a killed DVC leaves is put right, in a real repository, without a change of the user's lost."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from machine import ROOT

from llmgr.runtime import healing

STAGES = ROOT / "stages"
KILLED = """
    import itertools, os, signal, sys
    from scmrepo.git import Git

    calls, last = itertools.count(1), int(sys.argv.pop(1))

    def counted(function):
        def call(*args, **options):
            found = function(*args, **options)
            if next(calls) == last:
                os.killpg(0, signal.SIGKILL)
            return found
        return call

    for name in ("checkout", "set_ref", "remove_ref", "reset", "_stash_push", "_stash_apply", "_stash_drop", "add",
                 "commit"):
        setattr(Git, name, counted(getattr(Git, name)))
    from dvc.cli import main
    sys.exit(main(sys.argv[1:]))
"""


def environment(root: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_"))}
    return clean | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1",
                    "DVC_SITE_CACHE_DIR": str(root.parent / "site")}


def run(root: Path, *command: str, status: int | None = 0) -> str:
    done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, timeout=120)
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one stage that has run."""
    root = tmp_path_factory.mktemp("heal") / "made"
    root.mkdir()
    for name, value in (("name", "A User"), ("email", "user@example.org")):
        run(root, "git", "init", "-q", "-b", "work")
        run(root, "git", "config", f"user.{name}", value)
    (root / "dvc.yaml").write_text("stages:\n  a: {cmd: cp params.yaml out, params: [x], outs: [out]}\n")
    (root / "params.yaml").write_text("x: 1\nother: 1\n")
    (root / "notes").write_text("notes")
    (root / "killed.py").write_text(textwrap.dedent(KILLED))
    run(root, "dvc", "init", "-q")
    run(root, "dvc", "repro", "-q")
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "made")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "llmgr", symlinks=True)
    return tmp_path / "llmgr"


def references(root: Path) -> set[str]:
    return set(run(root, "git", "for-each-ref", "--format=%(refname)").split())


# In the order in which `dvc exp run` does it: the user's changes put aside, HEAD detached, the changes brought back for
# the experiment, parameters set, the experiment put aside, HEAD restored, the changes brought back; then its start.
@pytest.mark.parametrize("call", [1, 2, 4, 9, 11, 13, 17, 18, 22, 24])
def test_an_experiment_killed_at_any_moment_is_put_right(root: Path, call: int) -> None:
    (root / "notes").write_text("a change of the user's")
    (root / "params.yaml").write_text("x: 1\nother: 2\n")
    own = subprocess.Popen([sys.executable, "killed.py", str(call), "exp", "run", "-S", "x=5"], cwd=root,
                           env=environment(root), start_new_session=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    assert own.wait(120) == -signal.SIGKILL
    healing.heal(root)
    assert run(root, "git", "symbolic-ref", "HEAD").strip() == "refs/heads/work"
    assert (root / "notes").read_text() == "a change of the user's"
    assert (root / "params.yaml").read_text() in ("x: 1\nother: 2\n", "x: 5\nother: 2\n")
    assert not [name for name in references(root) if name.startswith(("refs/exps/exec", "refs/exps/stash"))]
    assert not run(root, "git", "diff", "--cached", "--name-only")
    assert healing.heal(root) == [], "once is enough"
    experiments = {name for name in references(root) if name.startswith("refs/exps/")}
    assert len(experiments) == (call >= 23), "what was finished stays"
    if call in (1, 17, 24):
        shown = json.loads(run(root, "dvc", "exp", "show", "--json"))
        assert [entry["rev"] for entry in shown] == ["workspace", run(root, "git", "rev-parse", "HEAD").strip()]
        run(root, "dvc", "exp", "list")
        assert "a" in run(root, "dvc", "exp", "run", "-S", "x=7")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"write": 3}', '{"write": {"out": {"pid": "x", "cmd": "dvc"}}}'])
@pytest.mark.parametrize("place", [".dvc/tmp/rwlock", ".dvc/tmp/exps/rwlock"])
def test_a_lock_file_that_dvc_does_not_take_is_removed(root: Path, content: str, place: str) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(content)
    assert [line.split()[0] for line in healing.heal_locks(root)] == [place]
    assert not (root / place).exists() and healing.heal_locks(root) == []


def test_repro_works_again_after_its_lock_file_was_emptied(root: Path) -> None:
    (root / ".dvc/tmp/rwlock").write_text("")
    assert "corrupted" in run(root, "dvc", "repro", status=None)
    shutil.copytree(STAGES, root / "stages")
    said = run(root, sys.executable, "stages/heal.py", "--locks")
    assert ".dvc/tmp/rwlock" in said
    assert "up to date" in run(root, "dvc", "repro") and "up to date" in run(root, "dvc", "status")
    assert run(root, sys.executable, "stages/heal.py", "--locks") == ""


def test_a_whole_lock_file_stays(root: Path) -> None:
    content = '{"read": {"/a": [{"pid": 4, "cmd": "dvc repro"}]}, "write": {"/b": {"pid": 4, "cmd": "dvc repro"}}}'
    (root / ".dvc/tmp/rwlock").write_text(content)
    assert healing.heal_locks(root) == [] and (root / ".dvc/tmp/rwlock").read_text() == content


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_a_dvc_lock_that_is_cut_short_hinders_no_repro(root: Path, share: float) -> None:
    whole = (root / "dvc.lock").read_text()
    cut = whole[:int(share * len(whole))]
    (root / "dvc.lock").write_text(cut)
    if healing.heal_locks(root):
        assert (root / "dvc.lock").read_text() == whole and (root / "dvc.lock.damaged").read_text() == cut
    run(root, "dvc", "repro")
    assert (root / "dvc.lock").read_text() == whole


def test_locks_of_git_are_removed(root: Path) -> None:
    for name in ("index.lock", "HEAD.lock", "refs/heads/work.lock"):
        (root / ".git" / name).touch()
    assert len(healing.heal(root)) == 3
    run(root, "git", "commit", "--allow-empty", "-qm", "works")


def test_what_is_the_users_own_stays(root: Path) -> None:
    (root / "notes").write_text("mine")
    run(root, "git", "stash", "push", "-q")
    run(root, "git", "checkout", "-q", "--detach")
    run(root, "git", "commit", "-q", "--allow-empty", "-m", "a commit beside the branch")
    head = run(root, "git", "rev-parse", "HEAD")
    assert healing.heal(root) == []
    assert run(root, "git", "rev-parse", "HEAD") == head and "refs/stash" in references(root)
    run(root, "git", "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    healing.heal(root)
    assert run(root, "git", "rev-parse", "HEAD") == head and references(root) == {"refs/stash", "refs/heads/work"}


def test_nothing_is_done_while_dvc_runs(root: Path) -> None:
    run(root, "git", "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    (root / "dvc").write_text("import time\nprint('on', flush=True)\ntime.sleep(60)\n")
    other = subprocess.Popen([sys.executable, "dvc", "repro"], cwd=root, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"on\n"
        with pytest.raises(healing.AtWork, match="dvc repro"):
            healing.heal(root)
        assert "refs/exps/exec/EXEC_BASELINE" in references(root)
    finally:
        other.kill()
        other.wait()
    healing.heal(root)
    assert "refs/exps/exec/EXEC_BASELINE" not in references(root)


def test_a_lock_file_is_left_to_a_dvc_that_writes_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(healing, "WAIT", 0.3)
    (root / ".dvc/tmp/rwlock").write_text("")
    with (root / ".dvc/tmp/rwlock.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        start = time.monotonic()
        with pytest.raises(healing.AtWork):
            healing.heal_locks(root)
        assert time.monotonic() - start < 5 and (root / ".dvc/tmp/rwlock").exists()
    assert healing.heal_locks(root)


def test_where_experiments_cannot_be_queued_it_is_said_before(root: Path, tmp_path: Path) -> None:
    shutil.copytree(STAGES, root / "stages")
    assert run(root, sys.executable, "stages/heal.py", "--queue") == ""
    moved = root.rename(tmp_path / "häuser")
    said = run(moved, sys.executable, "stages/heal.py", "--queue", status=2)
    assert said.startswith("error: ") and len(said.splitlines()) == 1 and "--queue" in said
