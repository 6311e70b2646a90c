"""Errors that a user can mend, and how to recognise a full disk and exhausted memory."""
from __future__ import annotations

import errno
import os


class UserError(ValueError):
    """One sentence: what is wrong, the key or file, and how to mend it. Stages print it and exit with status 2."""


class Diverged(UserError):
    """A training's loss, gradients or scores stopped being finite: its learning rate is too high."""


class WorkersFailed(Exception):
    """Workers that a stage started failed: what they said, and the exit status that says whose fault it is."""

    def __init__(self, said: str, status: int) -> None:
        super().__init__(said)
        self.status = status


FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_DISK_WORDS = (*map(os.strerror, FULL_DISK), "database or disk is full")  # the last is SQLite's


NO_MEMORY_WORDS = ("can't allocate memory", "ALLOC_FAILED", "std::bad_alloc", "CUDA out of memory",
                   "could not create a primitive", "could not create a memory")  # the last two are oneDNN's


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full; libraries that wrap it keep its words at most."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(words in str(error) for words in FULL_DISK_WORDS)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the machine or of a GPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        any(words in str(error) for words in NO_MEMORY_WORDS))
