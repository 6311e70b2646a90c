"""Put right what a killed DVC left: lock files, references of experiments, the branch (no stage of the DAG).

    make heal                        # or: python stages/heal.py
    python stages/heal.py --locks    # what keeps `dvc repro` from starting alone; `make repro` does so by itself
    python stages/heal.py --queue    # whether experiments can be queued here; `make grid`, `ablations` and `seeds` ask

Needs git and Python's standard library alone. Changes in the working tree stay. Nothing is done while DVC or git runs
here.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmgr.runtime import healing


def fail(said: str) -> None:
    print(f"error: {said}", file=sys.stderr, flush=True)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--locks", action="store_true", help="DVC's lock files and dvc.lock alone; quiet where whole")
    parser.add_argument("--queue", action="store_true", help="put nothing right: say why no experiment can be queued")
    options, root = parser.parse_args(), Path(__file__).resolve().parent.parent
    if options.queue:
        if hindrance := healing.queue_hindrance(root):
            fail(hindrance)
        return
    try:
        done = (healing.heal_locks if options.locks else healing.heal)(root)
    except healing.AtWork as busy:
        fail(str(busy))
    for line in done or ([] if options.locks else ["nothing to put right"]):
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
