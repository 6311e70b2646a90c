"""What a killed DVC leaves behind, put right: locks, references, the branch. Standard library and git alone.

DVC writes `.dvc/tmp/rwlock` and `dvc.lock` in place, and `dvc exp run` works on a detached HEAD with references under
`refs/exps/exec`. Killed at the wrong moment it leaves the first two cut short and the others where they are; then
`dvc repro` fails, and `dvc exp show` shows an old commit.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

WAIT = 10.0
"""Seconds to wait for a lock that a DVC at work holds for moments."""
EXEC = "refs/exps/exec/"
STASHED = 30.0
"""Seconds within which a DVC that sets an experiment up puts the user's changes aside."""
PENDING = "refs/exps/stash"
"""Where `dvc exp run` keeps an experiment between its set-up and its start."""


class AtWork(Exception):
    """Another process works in the repository, so nothing was changed."""


def heal(root: Path) -> list[str]:
    """Put right whatever a killed DVC left in the repository `root`; a line for each thing done.

    AtWork where DVC or git runs there. Files in the working tree stay as they are, but a damaged dvc.lock.
    """
    busy = at_work(root)
    if busy:
        raise AtWork(f"{busy} runs in this repository: wait for it, or stop it first")
    setting_up = _setting_up(root)
    done = [*heal_locks(root), *_git_locks(root)]
    moved = [*_branch(root), *_put_back(root, setting_up)]
    done += moved + (_differing(root) if moved else [])
    for name, content in _references(root, EXEC):
        _git(root, "update-ref", "--no-deref", "-d", name)
        done.append(f"{name} of a killed experiment removed (it was {content[:10]})")
    for name, content in _references(root, PENDING):
        _git(root, "update-ref", "--no-deref", "-d", name)
        done.append(f"an experiment that never started was removed (`git stash apply {content[:10]}` shows it)")
    return done + _running(root)


def heal_locks(root: Path) -> list[str]:
    """Put right what alone keeps `dvc repro` from starting: DVC's lock files and dvc.lock. Safe beside another DVC."""
    done = []
    for path in (root / ".dvc/tmp/rwlock", root / ".dvc/tmp/exps/rwlock"):
        if path.exists() and not _whole(path):
            with _guard(path.with_name("rwlock.lock")):
                if path.exists() and not _whole(path):
                    _remove(path)
                    done.append(f"{path.relative_to(root)} was cut short by a kill and was removed")
    return done + _dvc_lock(root)


def queue_hindrance(root: Path) -> str:
    """Why experiments cannot be queued in `root`, in one sentence; '' where they can.

    DVC writes the cache's path into the queue's copies in ASCII: every queued (or `--temp`) experiment would fail.
    """
    path = str(root.resolve())
    return "" if path.isascii() else (
        f"{path} has letters that are not ASCII, where DVC's queue fails: move the repository to another folder, or "
        "run the experiments one by one without --queue")


def at_work(root: Path) -> str:
    """The command line of a DVC or git at work in `root` or below, if there is one ('' where none can be seen)."""
    root = root.resolve()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if int(process.name) == os.getpid():
                continue
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            names = {Path(word).name for word in words[:3] if "fsmonitor" not in words[1:]}
            here = Path(os.readlink(process / "cwd"))
            if names & {"dvc", "git"} and (here == root or root in here.parents):
                return " ".join(words).strip()[:80]
    return ""


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    """DVC's lock on one of its files, which it holds while it writes that file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:  # by fcntl, not filelock: heal.py also runs on a Python with no package installed
        until = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    raise AtWork(f"{path} is held by a DVC at work: wait for it, or stop it first") from None
                time.sleep(0.2)
        yield


def _whole(path: Path) -> bool:
    """Whether DVC will take this lock file."""
    try:
        lock = json.loads(path.read_text())
        entries = [*lock.get("write", {}).values(), *(e for part in lock.get("read", {}).values() for e in part)]
        return lock.keys() <= {"read", "write"} and all(
            entry.keys() == {"pid", "cmd"} and type(entry["pid"]) is int and type(entry["cmd"]) is str
            for entry in entries)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _dvc_lock(root: Path) -> list[str]:
    """A dvc.lock that is cut short, from the commit; DVC finds again in its cache what the commit does not know."""
    path = root / "dvc.lock"
    try:
        import yaml
    except ImportError:
        return []  # DVC is not here yet either
    if not path.exists():
        return []
    try:
        content = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        outputs = [entry for stage in content["stages"].values()
                   for part in ("deps", "outs") for entry in stage.get(part, [])]
        whole = content["schema"] == "2.0" and all("path" in entry and len(entry) > 1 for entry in outputs) and all(
            "cmd" in stage for stage in content["stages"].values())
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
        whole = False
    if whole:
        return []
    committed = _git(root, "show", "HEAD:dvc.lock", check=False)
    damaged = path.with_name("dvc.lock.damaged")
    path.replace(damaged)
    if committed.returncode == 0:
        path.write_bytes(committed.stdout)
    return [f"dvc.lock was cut short by a kill and is the commit's again ({damaged.name} is what it was)"]


def _git_locks(root: Path) -> list[str]:
    """Lock files of a git that is no more."""
    folder = _git_folder(root)
    if folder is None:
        return []
    paths = [*(folder / f"{name}.lock" for name in ("index", "HEAD", "config", "packed-refs")),
             *folder.glob("refs/**/*.lock")]
    done = []
    for path in paths:
        if path.exists():
            path.unlink()
            done.append(f".git/{path.relative_to(folder)} of a killed git removed")
    return done


def _branch(root: Path) -> list[str]:
    """HEAD back on the branch that a killed experiment left; the working tree stays, its index is the branch's."""
    folder = _git_folder(root)
    if folder is None or _git(root, "symbolic-ref", "-q", "HEAD", check=False).returncode == 0 or any(
            (folder / name).exists() for name in ("rebase-merge", "rebase-apply", "BISECT_LOG", "MERGE_HEAD")):
        return []
    exec_refs, name, head = dict(_references(root, EXEC)), _left_branch(root), _commit(root, "HEAD")
    if name is None:
        return ["HEAD is detached and no branch is known that it came from: `git switch BRANCH`"] if exec_refs else []
    ours = {exec_refs.get(f"{EXEC}EXEC_HEAD"), _commit(root, f"refs/heads/{name}")}
    subject = _git(root, "log", "-1", "--format=%s").stdout
    if head not in ours and not (exec_refs and subject.startswith(b"dvc: commit experiment")):
        return ["HEAD is detached at a commit of yours, and stays there"] if exec_refs else []
    done = [f"back on branch {name}"]
    merged = exec_refs.get(f"{EXEC}EXEC_MERGE")
    if merged and head == exec_refs.get(f"{EXEC}EXEC_HEAD") and _clean(root):  # killed before it brought them back
        _git(root, "stash", "apply", "-q", merged, check=False)
        done.append("the files have your changes and the experiment's parameters again")
    _git(root, "symbolic-ref", "-m", f"heal: back to {name}", "HEAD", f"refs/heads/{name}")
    _git(root, "reset", "-q")
    return done


def _setting_up(root: Path) -> float | None:
    """When a killed `dvc exp run` began to set an experiment up, if it did not come to its end."""
    path = root / ".dvc/tmp/exps/rwlock"
    try:
        writer = json.loads(path.read_text())["write"]["workspace"]["pid"]
    except ValueError:
        writer = None  # cut short by a kill
    except (OSError, KeyError, TypeError):
        return None
    return None if writer is not None and _runs(writer) else path.stat().st_mtime


def _put_back(root: Path, setting_up: float | None) -> list[str]:
    """Changes of the user, which DVC puts into a stash while it sets an experiment up, back in the files."""
    made = _git(root, "log", "-1", "--format=%ct", "refs/stash", check=False).stdout
    if setting_up is None:
        return []
    _remove(root / ".dvc/tmp/exps/rwlock")  # or another stash, made later, would be taken for this one
    if not made or _references(root, EXEC) or not -1 <= int(made) - setting_up <= STASHED:
        return []
    done, stash = [], "stash@{0}"
    if not _clean(root):
        _git(root, "stash", "push", "-q", "-m", "heal: what stood in the files")
        done, stash = ["what stood in the files is in `git stash list`"], "stash@{1}"
    if _git(root, "stash", "pop", "-q", "--index", stash, check=False).returncode:
        return [*done, f"your changes, which DVC had put aside, do not fit here: `git stash pop {stash}`"]
    return ["your changes, which DVC had put aside, are back", *done]


def _clean(root: Path) -> bool:
    return _git(root, "diff", "--quiet", "HEAD", check=False).returncode == 0


def _differing(root: Path) -> list[str]:
    changed = _git(root, "diff", "--name-only", "HEAD").stdout.decode().split()
    named = ", ".join(changed[:5]) + (" and more" if len(changed) > 5 else "")
    return [f"{named} differ from the commit, by you or by the experiment: `git diff` shows them, `git checkout -- "
            "FILE` takes one back"] if changed else []


def _left_branch(root: Path) -> str | None:
    """The branch that HEAD was on before DVC detached it, by git's log of HEAD."""
    log = _git(root, "reflog", "show", "--format=%gs", "HEAD", check=False).stdout.decode(errors="replace")
    for line in log.splitlines():
        if line.startswith("checkout: moving from "):
            name = line.removeprefix("checkout: moving from ").rsplit(" to ", 1)[0]
            if _commit(root, f"refs/heads/{name}"):
                return name
    return None


def _running(root: Path) -> list[str]:
    """What says that an experiment runs in the workspace, where none does."""
    folder = root / ".dvc/tmp/exps/run/workspace"
    _remove(root / ".dvc/tmp/repro.dat")
    if not folder.exists():
        return []
    shutil.rmtree(folder)
    return ["the record of a running experiment removed"]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError, TypeError):
        return False
    except PermissionError:
        pass
    return True


def _references(root: Path, prefix: str) -> list[tuple[str, str]]:
    output = _git(root, "for-each-ref", "--format=%(refname) %(objectname)", prefix, check=False)
    return [tuple(line.split()) for line in output.stdout.decode().splitlines()]


def _commit(root: Path, name: str) -> str:
    output = _git(root, "rev-parse", "-q", "--verify", f"{name}^{{commit}}", check=False)
    return output.stdout.decode().strip()


def _git_folder(root: Path) -> Path | None:
    output = _git(root, "rev-parse", "--absolute-git-dir", check=False)
    return Path(os.fsdecode(output.stdout).strip()) if output.returncode == 0 else None


def _git(root: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(root), *arguments], check=check, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
