"""The beginning of a file that came over the network, with a digest of every block beside it."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmgr.runtime.console import say


class Part:
    """Bytes at `path`, and `path`.sums with a line a block: its length and SHA-256."""

    def __init__(self, path: Path) -> None:
        self.path, self.sums = path, path.with_name(f"{path.name}.sums")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.sums.unlink(missing_ok=True)

    def check(self) -> None:
        """Cut the part behind its last block that is what came: a kill or a fault of the disk may have left others."""
        if not self.path.exists():
            return self.remove()
        written = self._written()
        good = lines = 0
        with self.path.open("r+b") as handle:
            for line, length, digest in written:
                if hashlib.sha256(handle.read(length)).hexdigest() != digest:
                    say(f"{self.path.name.removesuffix('.part')}: what came before is damaged from byte {good} on and "
                        "is fetched again")
                    break
                good, lines = good + length, lines + len(line)
            handle.truncate(good)
        if lines < self._lines():
            with self.sums.open("r+b") as handle:
                handle.truncate(lines)

    @contextmanager
    def appended(self) -> Iterator[Callable[[bytes], None]]:
        """What takes the next block."""
        with self.path.open("ab") as handle, self.sums.open("ab") as sums:
            def add(block: bytes) -> None:
                handle.write(block)
                handle.flush()
                sums.write(f"{len(block)} {hashlib.sha256(block).hexdigest()}\n".encode())
                sums.flush()

            yield add

    def _lines(self) -> int:
        return self.sums.stat().st_size if self.sums.exists() else 0

    def _written(self) -> list[tuple[bytes, int, str]]:
        """The lines of `sums` that can be read, with what they say."""
        found = []
        for line in self.sums.read_bytes().splitlines(keepends=True) if self.sums.exists() else ():
            length, _, digest = line.decode("ascii", "replace").partition(" ")
            if not line.endswith(b"\n") or not (length.isdecimal() and 0 < len(length) < 10):
                break
            found.append((line, int(length), digest.strip()))
        return found
