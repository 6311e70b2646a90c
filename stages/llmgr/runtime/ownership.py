"""Whose work a stage is: it ends with the DVC that started it, and one alone works at a place."""
from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmgr.runtime.console import WORKERS, say
from llmgr.runtime.errors import UserError

WAIT = 60.0
"""Seconds to wait for another process that works at the same place."""
SPOKEN = 20.0
"""Seconds between lines that say what is waited for."""
LEFT = 1
_held: dict[Path, Any] = {}  # locks of this process, which end with it


def follow_dvc() -> None:
    """End this process when the DVC that started it is gone: killed, it would leave the stage training on.

    A stage that a person started lives on, whatever becomes of the terminal; workers follow the stage.
    """
    if "DVC_STAGE" not in os.environ or WORKERS in os.environ:
        return
    leave_when(_dvc_gone(), "the DVC that started this stage is gone, so it ends; `dvc repro` goes on from the last "
                            "checkpoint")


def leave_when(gone: Callable[[], bool], said: str = "") -> None:
    """End this process, from a thread beside it, when `gone()`."""
    def watch() -> None:
        while not gone():
            time.sleep(0.5)
        with contextlib.suppress(OSError):  # who would read it may be gone, too
            if said:
                say(said)
        os._exit(LEFT)

    threading.Thread(target=watch, daemon=True).start()


def parent_gone(parent: int) -> Callable[[], bool]:
    """Whether the process `parent` started this one and is no more."""
    return lambda: os.getppid() != parent


def _dvc_gone() -> Callable[[], bool]:
    """Whether DVC is no more: this process's parent, or that one's, where a shell that DVC started came between."""
    import psutil

    parent = os.getppid()
    with contextlib.suppress(psutil.Error):
        shell = psutil.Process(parent)
        if "-c" in shell.cmdline()[1:4] and any(Path(sys.argv[0]).name in word for word in shell.cmdline()):
            above = shell.ppid()

            def gone() -> bool:
                with contextlib.suppress(psutil.Error):
                    return os.getppid() != parent or shell.ppid() != above
                return True

            return gone
    return parent_gone(parent)


def alone(root: Path) -> None:
    """Hold this stage's place until this process ends; a second one of the stage here waits a minute, and says so.

    The lock lies below `root`. UserError where the first one is still at work after that minute.
    """
    if WORKERS in os.environ or os.environ.get("RANK", "0") != "0":
        return  # what started the workers holds it
    script = Path(sys.argv[0]).resolve()
    of = hashlib.sha256("\0".join((str(Path.cwd()), str(script), *sys.argv[1:])).encode()).hexdigest()[:16]
    path, until, spoken = root / ".resume/locks" / f"{script.stem}-{of}.lock", time.monotonic() + WAIT, 0.0
    while not hold(path):
        now, other = time.monotonic(), _writer(path)
        if now > until:
            raise UserError(f"another run of this stage{other} works in this folder: wait for it or stop it, then run "
                            "this one again")
        if now - spoken > SPOKEN:
            say(f"another run of this stage{other} works in this folder: waiting for it, {until - now:.0f} s at most")
            spoken = now
        time.sleep(0.2)


def hold(path: Path) -> bool:
    """Whether this process now holds the lock file `path`, which it then does until it ends."""
    import filelock

    path = path.absolute()
    if path in _held:
        return True
    lock = filelock.FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except PermissionError:
        return True  # a folder that cannot be written is no place of two writers
    except filelock.Timeout:
        return False
    path.write_text(str(os.getpid()))
    _held[path] = lock
    return True


def let_go(path: Path | None = None) -> None:
    """Give up the place `path`, or every one that this process holds: its stage is over, though the process may live
    on."""
    for held in list(_held) if path is None else [path.absolute()]:
        if held in _held:
            _held.pop(held).release()


def _writer(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f" (process {path.read_text() or '?'})"
    return ""
