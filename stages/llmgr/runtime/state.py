"""The state from which an interrupted stage resumes: written with its digest, beside the state before it."""
from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmgr.runtime.artifacts import replacing

MARK = b"llmgr state 1\n"
"""What a state file starts with; the SHA-256 of the rest follows, then the rest."""


def former(path: Path) -> Path:
    """The path of the state before the one at `path`."""
    return path.with_name(f"{path.name}.former")


def write_state(path: Path, content: bytes | memoryview) -> None:
    """Write `content` with its digest, whole or not at all; what stood there stays as `former(path)`."""
    with replacing(path) as temporary:
        with temporary.open("wb") as handle:  # by Python, whose errors say when a disk is full
            handle.write(MARK + hashlib.sha256(content).digest())
            handle.write(content)
        if path.is_file():
            path.replace(former(path))


def read_state(path: Path) -> bytes | None:
    """What `write_state` wrote at `path`; None where a byte differs or something else stands there."""
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        head = handle.read(len(MARK) + hashlib.sha256().digest_size)
        content = handle.read()
    return content if head == MARK + hashlib.sha256(content).digest() else None


def states(path: Path) -> Iterator[Path]:
    """The files that hold a state, the newest first."""
    yield from (file for file in (path, former(path)) if file.exists() or file.is_symlink())


def discard(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
