"""What a stage says while it works: lines to standard error, and bars with rate and time left."""
from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from llmgr.runtime.masking import masked

WORKERS = "LLMGR_WORKERS"  # environment: the folder where workers meet and leave what they died of
PARENT = "LLMGR_PARENT"  # environment: the process that started them and ends them


def first() -> bool:
    """Whether this process speaks for all: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


QUIET = 30.0
"""Seconds after which work that says nothing is said to go on."""
_spoken = time.monotonic()
_bars = 0


def say(text: str) -> None:
    """One line of progress to standard error, at once; the first of several processes speaks for all."""
    global _spoken
    if first():
        _spoken = time.monotonic()
        print(masked(text, paths=False), file=sys.stderr, flush=True)


@contextlib.contextmanager
def during(text: str) -> Iterator[None]:
    """Say that `text` goes on, and for how long it has, whenever nothing was said or shown for `QUIET` seconds."""
    over, begun = threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(QUIET / 10):
            now = time.monotonic()
            if now - max(_spoken, begun) >= QUIET and not _bars:
                say(f"{text}: {(now - begun) / 60:.1f} min so far")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


class Bar:
    """A bar with rate and time left in a terminal, a line now and then in a log; what is over at once shows neither."""

    def __init__(self, total: int, start: int, name: str, every: float = 20.0, unit: str = "step") -> None:
        global _bars
        self.total, self.name, self.every, self.unit = total, name, every, unit
        self.begun = self.shown = time.monotonic()
        self.start = start
        self.bar = tqdm(total=total, initial=start, desc=name, leave=False, delay=3, unit=unit) if (
            sys.stderr.isatty() and first()) else None
        _bars += self.bar is not None

    def show(self, step: int, text: str = "") -> None:
        """Bring the display to `step`."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.shown > self.every:
            self.shown = time.monotonic()
            rate = (step - self.start) / (self.shown - self.begun)
            say(f"{self.name}: {self.unit} {step}/{self.total}  {rate:.2f} {self.unit}s/s  "
                f"{(self.total - step) / max(rate, 1e-9) / 60:.1f} min left  {text}".rstrip())

    def close(self) -> None:
        """Take the bar off the terminal."""
        global _bars
        if self.bar is not None:
            self.bar.close()
            self.bar = None
            _bars -= 1
