"""A store of MLflow, made once, in which every test has an experiment of its own."""
from __future__ import annotations

from pathlib import Path

import pytest
from mlflow_store import Store


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def mlflow_store(store_folder: Path, request: pytest.FixtureRequest) -> Store:
    return Store(store_folder, request.node.name)
