"""The order of the tests: what takes longest begins first, while others run beside it."""
from __future__ import annotations

import pytest

LONGEST = ("test_pipeline.py", "test_tracking.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
