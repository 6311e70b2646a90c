"""The memory of the machine and its control group, and advice for a stage that ran out of it."""
from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
GB = 1e9
_STEP = ("lower {0}.batch_size and raise {0}.accumulate by the same factor, set {0}.gradient_checkpointing=true, or "
         "launch.strategy=zero3 with several launch.processes")
_PAIRS = "the linear model's two matrices of all pairs of items go with {}"
_TRAINING = "lower encoder.training.batch_size"
HELP = {
    "backbone": ["lower llm.scratch.batch_size where llm.name=scratch, or choose a smaller llm.name or "
                 "text_encoder.name"],
    "pretrain": [_TRAINING],
    "linear": [_TRAINING, _PAIRS.format("encoder.linear_controls=[]")],
    "folds": [_TRAINING],
    "tower": ["lower tower.batch_size and raise tower.accumulate by the same factor, or set "
              "tower.gradient_checkpointing=true where a language model is the tower"],
    "align": [_STEP.format("align")],
    "tune": [_STEP.format("tune"), _PAIRS.format("tune.linear=false and tune.folds=0")],
    "bench": [_STEP.format("tune"), _PAIRS.format("tune.linear=false and tune.folds=0")],
    "gate": ["lower evaluate.batch_size or gate.sessions"],
    "evaluate": ["lower evaluate.batch_size"],
    "bucket": ["lower bucket.resamples"],
    "seeds": ["lower bucket.resamples"],
}
"""What lowers a stage's memory, by the name of its script."""


def what_helps(stage: str) -> str:
    """The advice for a user whose stage ran out of memory."""
    return "; ".join(HELP.get(stage, ["close other programs, or take a machine with more memory"]))


def capacity() -> float:
    """Bytes that this process could have if nothing else ran: the machine's, or its control group's."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _groups())])


def available() -> float:
    """Bytes that this process can still get, of the machine and of its control group."""
    import psutil

    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _groups())])


def _groups() -> list[tuple[float, float]]:
    """Limit and use, without what can be given back, of every control group that bounds this process."""
    limits = []
    for folder, names in _folders():
        try:
            limit, used = (float((folder / name).read_text()) for name in names)
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            limits.append((limit, used - float(stat.get("total_inactive_file", stat.get("inactive_file", 0)))))
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return limits


def _folders() -> list[tuple[Path, tuple[str, str]]]:
    """Folders of the control groups, this process's own and those above it, of version 2 and of version 1."""
    folders = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root, names = (GROUPS, ("memory.max", "memory.current")) if kinds == "" else (
            GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        own = root / path.lstrip("/")
        folders += [(folder, names) for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return folders
