"""What this machine lacks for the pipeline, one line each with the mend (no stage of the DAG).

    make doctor                        # or: python3 stages/doctor.py
    python3 stages/doctor.py --quiet   # what is wrong or odd alone; `make repro` begins with it

Needs Python's standard library alone, so that it runs before anything is installed. Exit status 2 where something would
keep `make repro` from working; what is merely odd is said.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
INSTALLATION_GB, RUN_GB, MEMORY_GB = 6.0, 1.0, 2.0
"""Free disk to install the packages, free disk of a run on the sample, memory of one."""
WATCHED = ROOT / "data/.watched"
GOOD, ODD, BAD = "ok", "odd", "bad"
Finding = tuple[str, str, str]
"""GOOD, ODD or BAD; what was looked at; what was found, with the mend."""


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        return BAD, "Python", f"{version} is older than 3.11: install Python 3.11 and run make PYTHON=python3.11"
    return GOOD, "Python", version


def program(name: str) -> Finding:
    path = shutil.which(name)
    return (GOOD, name, "here") if path else (BAD, name, f"not found: install it, as with `apt-get install {name}`")


def installed() -> bool:
    return (environment() / ".installed").exists()


def environment() -> Path:
    """The virtual environment that the Makefile uses."""
    return ROOT / os.environ.get("VENV", ".venv")


def dvc() -> Finding:
    name = environment().name
    if (environment() / "bin/dvc").exists():
        return GOOD, "dvc", f"installed in {name}"
    if installed():
        return BAD, "dvc", f"missing from {name}, which is incomplete: delete it and run make repro"
    return GOOD, "dvc", "not installed yet; make repro installs it"


def disk() -> Finding:
    free, needed = shutil.disk_usage(ROOT).free / 1e9, RUN_GB if installed() else RUN_GB + INSTALLATION_GB
    if free < needed:
        return BAD, "disk", f"{free:.1f} GB are free, some {needed:.0f} GB are needed: free some, or clone elsewhere"
    return GOOD, "disk", f"{free:.0f} GB free"


def memory() -> Finding:
    """What the machine has to give, or the control group of this process, if that is less."""
    sizes = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes",
                                                           "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            group = Path("/sys/fs/cgroup")
            sizes.append(int((group / limit).read_text()) - int((group / used).read_text()))
    if not sizes:
        return GOOD, "memory", "unknown on this system"
    free = min(sizes) / 1e9
    if free < MEMORY_GB:
        return ODD, "memory", f"{free:.1f} GB are free, the sample needs {MEMORY_GB:.0f} GB: end other programs"
    return GOOD, "memory", f"{free:.0f} GB free"


def index() -> Finding:
    """Whether pip reaches the index that it is set to use; asked only while something must be installed."""
    if installed():
        return GOOD, "package index", "not needed: all is installed"
    options = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout", "5", "--retries", "0"]
    if subprocess.run([*options, "index", "versions", "pip"], capture_output=True, check=False).returncode:
        return ODD, "package index", ("pip reaches none: connect the machine, or set PIP_INDEX_URL to an index that it "
                                      "reaches")
    return GOOD, "package index", "answers"


def gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return GOOD, "GPU", "none seen; the sample needs none"
    said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True,
                          check=False)
    if said.returncode:
        return ODD, "GPU", "nvidia-smi fails, so that the driver is at fault: mend it, or set launch.device=cpu"
    return GOOD, "GPU", ", ".join(said.stdout.split("\n")[:-1])


def threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given and (not given.isdigit() or int(given) < 1):
        return ODD, "threads", f"OMP_NUM_THREADS={given} is no number of threads: unset it"
    if given and int(given) > cores:
        return ODD, "threads", f"OMP_NUM_THREADS={given} is more than the {cores} cores here: lower it, or unset it"
    return GOOD, "threads", f"{given or cores} of {cores} cores"


def writable() -> Finding:
    folders = [ROOT, *(ROOT / name for name in ("data", "models", "reports", ".dvc"))]
    for folder in filter(Path.exists, folders):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            name = folder.name if folder != ROOT else "the repository"
            return BAD, "writing", f"{name} cannot be written to ({error.strerror}): chown or remount it, or free space"
    return GOOD, "writing", "allowed"


def leftovers() -> Finding:
    """What a killed DVC left behind; `make heal` puts it right."""
    from llmgr.runtime import healing

    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return ODD, "leftovers", "this is no git repository, in which DVC runs: clone it with git"
    locks = [path for path in (ROOT / ".dvc/tmp/rwlock", ROOT / ".dvc/tmp/exps/rwlock")
             if path.exists() and not path.read_bytes().strip()]
    left = subprocess.run(["git", "-C", str(ROOT), "for-each-ref", "--format=%(refname)", healing.EXEC],
                          capture_output=True, text=True, check=False).stdout.split()
    left = [name for name in left if name != f"{healing.EXEC}EXEC_HEAD"]  # which DVC leaves of every experiment
    if (locks or left) and not healing.at_work(ROOT):
        what = [*(f"{path.relative_to(ROOT)} is empty" for path in locks), *(f"{name} is left" for name in left)]
        return ODD, "leftovers", f"{', '.join(what)} of a killed run: make heal"
    return GOOD, "leftovers", "none of a killed run"


def queue() -> Finding:
    """Whether experiments can be queued: DVC says nothing, and each of them fails."""
    from llmgr.runtime import healing

    hindrance = healing.queue_hindrance(ROOT)
    return (ODD, "queue", hindrance) if hindrance else (GOOD, "queue", "experiments can be queued here")


def branch() -> Finding:
    said = subprocess.run(["git", "-C", str(ROOT), "symbolic-ref", "-q", "--short", "HEAD"], capture_output=True,
                          text=True, check=False) if shutil.which("git") else None
    if said is None or said.returncode > 1:
        return GOOD, "branch", "no git repository"
    if said.returncode:
        return ODD, "branch", "HEAD is detached: git switch BRANCH, or make heal after a killed experiment"
    return GOOD, "branch", said.stdout.strip()


def watched() -> Finding:
    """Links to files of one's own that have gone: DVC would stop at them."""
    gone = [link for link in (WATCHED.iterdir() if WATCHED.exists() else ()) if link.is_symlink() and not link.exists()]
    if gone:
        names = " ".join(str(link.relative_to(ROOT)) for link in gone)
        return BAD, "own files", f"a file that data.interactions or data.items named has moved: rm {names}"
    return GOOD, "own files", "where they were, if any"


def findings() -> Iterator[Finding]:
    yield python()
    yield from map(program, ("git", "make"))
    for look in (dvc, disk, memory, index, gpu, threads, writable, leftovers, queue, branch, watched):
        yield look()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="say nothing of what is well")
    quiet, worst = parser.parse_args().quiet, GOOD
    for state, name, text in findings():
        if state != GOOD or not quiet:
            print(f"{state:4}{name:14} {text}", file=sys.stderr, flush=True)
        worst = BAD if BAD in (state, worst) else state if state != GOOD else worst
    sys.exit(2 if worst == BAD else 0)


if __name__ == "__main__":
    main()
