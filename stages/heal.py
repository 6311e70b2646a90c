"""Put right what a killed DVC left: lock files, references of experiments, the branch (no stage of the DAG).

    make heal                        # or: python stages/heal.py
    python stages/heal.py --locks    # what keeps `dvc repro` from starting alone; `make repro` does so by itself

Needs git and Python's standard library alone. Changes in the working tree stay. Nothing is done while DVC or git runs
here.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmgr.runtime import healing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--locks", action="store_true", help="DVC's lock files and dvc.lock alone; quiet where whole")
    only_locks = parser.parse_args().locks
    try:
        done = (healing.heal_locks if only_locks else healing.heal)(Path(__file__).resolve().parent.parent)
    except healing.AtWork as busy:
        sys.exit(f"error: {busy}")
    for line in done or ([] if only_locks else ["nothing to put right"]):
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
