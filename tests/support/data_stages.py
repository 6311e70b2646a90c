"""download, filter and split run as processes in a folder with a params.yaml."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from machine import DEFAULTS, ROOT

STAGES = ("download", "filter", "split")


def run(folder: Path, *stages: str, threads: int = 1, **sections) -> subprocess.CompletedProcess:
    """Run stages one after the other, as far as they succeed, with changes to the committed parameters."""
    params = yaml.safe_load(DEFAULTS.read_text())
    for section, changes in sections.items():
        params[section] |= changes
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    environment["POLARS_MAX_THREADS"] = str(threads)
    for stage in stages:
        result = subprocess.run([sys.executable, ROOT / f"stages/{stage}.py"], cwd=folder, env=environment,
                                capture_output=True, text=True, check=False)
        if result.returncode:
            break
    return result


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit status 2, one sentence with these words, no traceback."""
    said = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert said[-1].startswith("error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in said[-1], said[-1]
