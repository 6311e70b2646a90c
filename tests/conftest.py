"""The order of the tests, and which files `make test-fast` leaves out."""
from __future__ import annotations

from pathlib import Path

import pytest

LONGEST = ("pipeline/test_pipeline.py", "reporting/test_tracking.py")
"""What takes longest begins first, while others run beside it."""
SLOW = {*LONGEST, "training/test_launch.py", "runtime/test_healing.py", "runtime/test_ownership.py",
        "data/test_data_stages.py", "serving/test_http.py", "model/test_tuning.py", "encoders/test_pretrain.py",
        "reporting/test_report.py"}
"""Files that run the DAG, start several processes or a server, or train at length."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = {item: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}
    items.sort(key=lambda item: LONGEST.index(files[item]) if files[item] in LONGEST else len(LONGEST))
    for item, file in files.items():
        if file in SLOW:
            item.add_marker(pytest.mark.slow)
