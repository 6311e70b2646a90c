"""Worker processes: how they are started, watched and ended."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed

from llmgr.params.training import Launch
from llmgr.runtime.console import PARENT, WORKERS, say
from llmgr.runtime.errors import UserError, WorkersFailed
from llmgr.runtime.memory import what_helps
from llmgr.runtime.ownership import leave_when, parent_gone


def device(settings: Launch) -> torch.device:
    """The device of this process under the `launch` section; UserError where there are too few GPUs.

    launch.device=cpu hides the GPUs from torch, so that the whole process computes on the CPU.
    """
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", settings.processes))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        raise UserError("launch.device=cuda, but there is no GPU that torch can use: set launch.device=auto or cpu")
    if local > gpus:
        raise UserError(f"{local} processes want a GPU each and there {'is' if gpus == 1 else 'are'} {gpus}: lower "
                        "launch.processes or set launch.device=cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def processes(settings: Launch) -> Iterator[bool]:
    """Start the worker processes of the `launch` section and wait for them, or be a worker; yields True in a worker.

    With launch.processes=1 this process is the only worker. A process that torchrun started is always a worker.
    UserError as `device`; WorkersFailed where a worker fails.
    """
    chosen = device(settings)
    if "WORLD_SIZE" not in os.environ and settings.processes > 1:
        _supervise(settings.processes)
        yield False
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _join(chosen)
    elif settings.strategy != "ddp":
        say(f"warning: launch.strategy={settings.strategy} divides nothing in one process: raise launch.processes")
    yield True
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _join(chosen: torch.device) -> None:
    method = {}
    if folder := os.environ.get(WORKERS):
        method = {"init_method": f"file://{folder}/store", "rank": int(os.environ["RANK"]),
                  "world_size": int(os.environ["WORLD_SIZE"])}
        leave_when(parent_gone(int(os.environ[PARENT])))  # however it ended, even before this call
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    distributed.init_process_group("gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl", **method)


def _supervise(count: int) -> None:
    """Run this command `count` times as workers of one group; WorkersFailed when one fails.

    Not by torchrun: its workers are in process sessions of their own, so they would outlive a killed `dvc repro`.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, _cpus() // count)))
    with tempfile.TemporaryDirectory() as folder:
        shared = {**os.environ, WORKERS: folder, PARENT: str(os.getpid()), "WORLD_SIZE": str(count),
                  "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": threads,
                  "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        workers = [subprocess.Popen([sys.executable, *sys.argv],
                                    env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(count)]
        try:
            while not any(statuses := [w.poll() for w in workers]) and None in statuses:
                time.sleep(0.05)
            statuses = [w.poll() for w in workers]  # others may have failed with the first
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if any(statuses):
            raise _reason(statuses, Path(folder))


def _cpus() -> int:
    """The number of CPUs that this process may use, which a container or `taskset` may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reason(statuses: list[int | None], folder: Path) -> WorkersFailed:
    """Why the workers failed: a fault that the user can mend first, then a signal, then the earliest defect."""
    files = {n: folder / f"{n}.error" for n, status in enumerate(statuses) if status}
    said = {n: path for n, path in files.items() if path.exists()}
    for status in (2, 130):
        for n, path in said.items():
            if statuses[n] == status:
                return WorkersFailed(path.read_text(), status)
    for n, status in enumerate(statuses):
        if status and status < 0:
            return WorkersFailed(
                f"process {n + 1} of {len(statuses)} was killed ({signal.Signals(-status).name}) and the others were "
                f"stopped; if memory had run out, {what_helps(Path(sys.argv[0]).stem)}; or lower "
                "launch.processes; the same command goes on from the last checkpoint", 2)
    if said:
        return WorkersFailed(min(said.values(), key=lambda path: path.stat().st_mtime_ns).read_text(), 1)
    return WorkersFailed(f"a process ended with status {max(statuses, key=bool)} and the others were stopped", 1)
