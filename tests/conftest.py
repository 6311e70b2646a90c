"""The order of the tests, and which files `make test-fast` leaves out."""
from __future__ import annotations

import pytest

LONGEST = ("test_pipeline.py", "test_tracking.py")
"""What takes longest begins first, while others run beside it."""
SLOW = {*LONGEST, "test_launch.py", "test_heal.py", "test_ownership.py", "test_data_stages.py",
        "test_serving_http.py", "test_tuning.py", "test_pretrain.py", "test_report.py"}
"""Files that run the DAG, start several processes or a server, or train at length."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
