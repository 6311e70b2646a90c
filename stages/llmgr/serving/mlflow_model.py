"""The package as an MLflow model: code that MLflow runs as it is, with the package's folder as its artifact.

`mlflow models serve -m models:/llmgr@best --env-manager local` answers POST /invocations with
`{"inputs": [{"items": ["B0001", "B0002"]}], "params": {"k": 10}}`. The environment variable LLMGR_RECOMMENDER names a
folder to serve in the artifact's place, such as models/recommender: a package that replaces it is served from the next
request on.
"""
from __future__ import annotations

import os
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from llmgr.runtime.errors import UserError
from llmgr.serving.live import Live

FOLDER = "LLMGR_RECOMMENDER"
PARAMS = {"k": 20, "exclude_seen": True, "explain": False}


class Refused(MlflowException):
    """HTTP 400 with one sentence: MLflow would put the whole input before it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, INVALID_PARAMETER_VALUE)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        self.message = self.sentence
        return super().serialize_as_json()


class Served(mlflow.pyfunc.PythonModel):
    """Answers each session with the best items: a dictionary of `items`, `titles`, `scores` and the other columns of
    `llmgr.serving.recommender.Recommender.recommend`."""

    def load_context(self, context: Any) -> None:
        self.live = Live(os.environ.get(FOLDER) or context.artifacts["package"])

    def predict(self, model_input: list[Any], params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Each session is `{"items": [ID, ...]}`; `params` are those of `recommend`."""
        settings = PARAMS | (params or {})
        try:
            return self.live.current().recommend([_items(session, place) for place, session in enumerate(
                model_input, 1)], **{name: settings[name] for name in PARAMS}).to_dicts()
        except UserError as error:
            raise Refused(str(error)) from None


def _items(session: Any, place: int) -> Any:
    if not isinstance(session, dict) or set(session) != {"items"}:
        raise UserError(f'input {place} must be a session such as {{"items": ["B0001", "B0002"]}}')
    return session["items"]


mlflow.models.set_model(Served())
