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

from llmgr.runtime.errors import UserError
from llmgr.serving.live import Live
from llmgr.serving.recommender import Recommender
from llmgr.serving.refusals import PARAMS, SESSION, Refused, refuse_plainly

FOLDER = "LLMGR_RECOMMENDER"
ANSWERS = 1_000_000  # items of an answer at most, over all its sessions


class Served(mlflow.pyfunc.PythonModel):
    """Answers each session with the best items: a dictionary of `items`, `titles`, `scores` and the other columns of
    `llmgr.serving.recommender.Recommender.recommend`."""

    def load_context(self, context: Any) -> None:
        refuse_plainly()
        self.live = Live(os.environ.get(FOLDER) or context.artifacts["package"])

    def predict(self, model_input: list[Any], params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Each session is `{"items": [ID, ...]}`; `params` are those of `recommend`."""
        settings = PARAMS | (params or {})
        try:
            sessions = [_items(session, number) for number, session in enumerate(model_input, 1)]
            recommender = self.live.current()
            _check_size(recommender, len(sessions), settings["k"])
            return recommender.recommend(sessions, **{name: settings[name] for name in PARAMS}).to_dicts()
        except UserError as error:
            raise Refused(str(error)) from None


def _items(session: Any, number: int) -> Any:
    if not isinstance(session, dict) or set(session) != {"items"}:
        raise UserError(f"input {number} must be a session such as {SESSION}")
    return session["items"]


def _check_size(recommender: Recommender, sessions: int, k: int) -> None:
    most = min(k, len(recommender.ids))
    if sessions * most > ANSWERS:
        raise UserError(f"{sessions:,} sessions of {most:,} items each are more than {ANSWERS:,} items: send fewer "
                        "sessions a request, or lower k")


mlflow.models.set_model(Served())
