"""What a client of MLflow's scoring server is told where its request is refused: HTTP 400 and one sentence."""
from __future__ import annotations

import functools
import json
import logging
import sys
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

BYTES = 4_000_000  # of a body at most: reading what is larger would hold up all others
SESSION = '{"items": ["B0001", "B0002"]}'
FORM = f'{{"inputs": [{SESSION}], "params": {{"k": 10}}}}'
PARAMS = {"k": 20, "exclude_seen": True, "explain": False}
SERVER = "mlflow.pyfunc.scoring_server"

log = logging.getLogger(__name__)


class Refused(MlflowException):
    """HTTP 400 with one sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, INVALID_PARAMETER_VALUE)
        self.sentence = sentence  # MLflow puts the whole input before the message


def refuse_plainly() -> None:
    """Let the scoring server of this process, if it is one, refuse requests in one sentence and log no hang-up.

    MLflow's own answers repeat the body, take several lines and may hold a traceback.
    """
    server = sys.modules.get(SERVER)
    if server is None or hasattr(server.invocations, "__wrapped__"):
        return
    server.invocations = _plainly(server.invocations)
    logging.getLogger("uvicorn.error").addFilter(_is_no_hang_up)


def _plainly(answer: Any) -> Any:
    @functools.wraps(answer)
    def plain(data: bytes, content_type: str | None, *rest: Any) -> Any:
        request = parsed(data, content_type)
        try:
            return answer(request, "application/json", *rest)
        except Refused as refused:
            raise Refused(refused.sentence) from None
        except MlflowException as error:
            log.error("%s\n%s", error.message, error.json_kwargs.get("stack_trace", ""))
            raise MlflowException("the request could not be answered: the server's log says why",
                                  INTERNAL_ERROR) from None

    return plain


def parsed(body: bytes, content_type: str | None) -> dict[str, Any]:
    """The request that a body holds; Refused where it is too large, no JSON or of another form."""
    if (content_type or "").split(";")[0].strip().lower() != "application/json":
        raise Refused("the body must be JSON: send the header Content-Type: application/json")
    if len(body) > BYTES:
        raise Refused(f"the body has {len(body) / 1e6:.1f} MB, and at most {BYTES / 1e6:.0f} are read: send fewer "
                      "sessions a request")
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from None
    if not isinstance(request, dict) or not {"inputs"} <= request.keys() <= {"inputs", "params"} or not isinstance(
            request["inputs"], list) or not isinstance(request.get("params", {}), dict):
        raise Refused(f"the body must be of the form {FORM}")
    for name, value in request.get("params", {}).items():
        if name not in PARAMS:
            raise Refused(f"params has no {name[:40]!r}: there are {', '.join(PARAMS)}")
        if type(value) is not type(PARAMS[name]):
            kind = "true or false" if isinstance(PARAMS[name], bool) else "a whole number"
            raise Refused(f"{name}={str(value)[:40]!r} must be {kind}")
    return request


def _is_no_hang_up(record: logging.LogRecord) -> bool:
    from starlette.requests import ClientDisconnect

    return not (record.exc_info and isinstance(record.exc_info[1], ClientDisconnect))
