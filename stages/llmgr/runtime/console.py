"""What a stage says while it works: lines to standard error, and bars with rate and time left."""
from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm

from llmgr.runtime.masking import masked

WORKERS = "LLMGR_WORKERS"  # environment: the folder where workers meet and leave what they died of
PARENT = "LLMGR_PARENT"  # environment: the process that started them and ends them


def first() -> bool:
    """Whether this process speaks for all: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line of progress to standard error, at once; the first of several processes speaks for all."""
    if first():
        print(masked(text, paths=False), file=sys.stderr, flush=True)


class Bar:
    """A bar with rate and time left in a terminal, a line now and then in a log."""

    def __init__(self, total: int, start: int, name: str, every: float = 20.0) -> None:
        self.total, self.name, self.every = total, name, every
        self.begun = self.shown = time.monotonic()
        self.start = start
        self.bar = tqdm(total=total, initial=start, desc=name, leave=False) if (
            sys.stderr.isatty() and first()) else None

    def show(self, step: int, text: str = "") -> None:
        """Bring the display to `step`."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.shown > self.every:
            self.shown = time.monotonic()
            rate = (step - self.start) / (self.shown - self.begun)
            say(f"{self.name}: step {step}/{self.total}  {rate:.2f} steps/s  "
                f"{(self.total - step) / max(rate, 1e-9) / 60:.1f} min left  {text}".rstrip())

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()
