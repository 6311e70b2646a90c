"""The MLflow model of a package, served by MLflow's own server and asked over HTTP."""
from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from machine import ROOT
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from scoring_server import Server
from tiny_package import IDS, package, renamed

from llmgr.serving.package import write_package
from llmgr.serving.recommender import Recommender
from llmgr.serving.refusals import refuse_plainly
from llmgr.serving.registry import log_package


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package and a store."""
    root = tmp_path_factory.mktemp("registry")
    write_package(root / "recommender", package())
    return root


@pytest.fixture(scope="module")
def store(place: Path) -> str:
    uri = f"sqlite:///{place}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    client.create_experiment("here", artifact_location=(place / "artifacts").as_uri())
    assert log(client, place, "sample", 0.3) == 1
    return uri


def log(client: mlflow.MlflowClient, place: Path, dataset: str, score: float) -> int:
    """The number of the version that a new run's package becomes."""
    run = client.create_run(client.get_experiment_by_name("here").experiment_id)
    return int(log_package(client, run.info.run_id, dataset, score, place / "recommender"))


@pytest.fixture(scope="module")
def server(place: Path, store: str) -> Iterator[Server]:
    running = Server(store, "models:/llmgr@best", place / "recommender", place / "server.log")
    yield running
    running.stop()


def test_best_is_the_best_on_the_dataset_published_last(place: Path, store: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow.MlflowClient(store)
    monkeypatch.setattr("llmgr.serving.registry.save_model", lambda path, folder: path.mkdir())

    def best(alias: str) -> int:
        return int(client.get_model_version_by_alias("llmgr", alias).version)

    assert (log(client, place, "sample", 0.4), best("best"), best("best-sample")) == (2, 2, 2)
    assert (log(client, place, "sample", 0.2), best("best"), best("best-sample")) == (3, 2, 2)
    assert (log(client, place, "other:one", 0.1), best("best"), best("best-other-one")) == (4, 4, 4)
    assert (log(client, place, "sample", 0.1), best("best"), best("best-sample")) == (5, 2, 2)
    client.set_registered_model_alias("llmgr", "best", "1")  # the one that is whole


def test_a_model_holds_no_pickle_and_nothing_of_this_machine(place: Path, store: str) -> None:
    files = [path for path in (place / "artifacts").rglob("*") if path.is_file() and "code" not in path.parts]
    assert {"MLmodel", "mlflow_model.py", "tensors.safetensors"} <= {path.name for path in files}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    for about in (place / "artifacts").rglob("MLmodel"):
        assert str(ROOT) not in about.read_text()


def test_the_server_answers_as_the_recommender(place: Path, server: Server) -> None:
    status, answer = server.ask({"inputs": [{"items": ["B0003", "x"]}, {"items": []}], "params": {"k": 5}})
    expected = Recommender.load(place / "recommender").recommend([["B0003", "x"], []], 5).to_dicts()
    assert status == 200 and [a["items"] for a in answer["predictions"]] == [e["items"] for e in expected]
    assert [a["scores"] for a in answer["predictions"]] == [pytest.approx(e["scores"], abs=1e-4) for e in expected]
    assert [(a["unknown"], a["popular"]) for a in answer["predictions"]] == [(["x"], False), ([], True)]
    status, answer = server.ask({"inputs": [{"items": ["B0003"]}], "params": {"exclude_seen": False, "explain": True}})
    assert status == 200 and len(answer["predictions"][0]["items"]) == 12 and "because" in answer["predictions"][0]


OURS = [({"inputs": [{"items": ["B0003"]}], "params": {"k": 0}}, "k=0"),
        ({"inputs": [{"items": "B0003"}]}, "session 1"),
        ({"inputs": [{"items": ["B0001"]}, {"items": [None]}]}, "session 2"), ({"inputs": ["B0003"]}, "input 1"),
        ({"inputs": [{"clicks": ["B0003"]}]}, "input 1"), ({"inputs": [{"items": ["B0003"], "k": 3}]}, "input 1")]
BODIES = [(b'{"inputs": [{"items": ["B0003"', "the body is no JSON"), (b"\xff\xfe", "the body is no JSON"),
          (b"", "the body is no JSON"), (b"[" * 100_000, "the body is no JSON"), ([1], "the body must be of the form"),
          ({"data": 3}, "the body must be of the form"), ({"inputs": None}, "the body must be of the form"),
          ({"inputs": "B0003"}, "the body must be of the form"), ({"inputs": [], "params": [3]}, "the body must be of"),
          ({"inputs": [{"items": ["B0003"]}], "params": {"k": "many"}}, "k='many'"),
          ({"inputs": [{"items": ["B0003"]}], "params": {"k": True}}, "k='True'"),
          (b'{"inputs": [{"items": []}], "params": {"k": NaN}}', "k='nan'"),
          ({"inputs": [{"items": ["B0003"]}], "params": {"top": 3}}, "params has no 'top'"),
          ({"inputs": [{"items": []}] * 100_000}, "100,000 sessions of 12 items"),
          (b'{"inputs": [{"items": [' + b'"B0003",' * 6_000_000 + b'"B0001"]}]}', "the body has 48.0 MB"),
          (b'{"inputs": ' + b" " * 50_000_000, "the body has 50.0 MB")]


def short(value: object) -> str:
    return ascii(value[:30] if isinstance(value, bytes) else value)[:30]


@pytest.mark.parametrize(("body", "named"), OURS + BODIES, ids=short)
def test_a_wrong_request_is_refused_in_one_sentence(server: Server, body: object, named: str) -> None:
    status, answer = server.ask(body)
    assert status == 400 and answer["message"].startswith(named) and "\n" not in answer["message"]
    assert "stack_trace" not in answer and len(answer["message"]) < 200
    assert server.ask({"inputs": [{"items": ["B0003"]}]})[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_a_body_of_another_kind_is_refused_in_one_sentence(server: Server) -> None:
    status, answer = server.ask(b"items\nB0003\n", "text/csv")
    assert status == 400 and answer["message"].startswith("the body must be JSON") and "stack_trace" not in answer


def test_an_error_of_ours_is_logged_and_not_sent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
                                                 ) -> None:
    def failing(*_: object) -> None:
        raise MlflowException("Encountered an unexpected error", stack_trace="Traceback: a mistake of ours")

    monkeypatch.setattr(scoring_server, "invocations", failing)
    refuse_plainly()
    with pytest.raises(MlflowException) as refused:
        scoring_server.invocations(b'{"inputs": []}', "application/json", None, None)
    assert refused.value.get_http_status_code() == 500 and "Traceback" not in refused.value.serialize_as_json()
    assert "a mistake of ours" in caplog.text


def test_one_click_ten_thousand_times_is_answered(server: Server) -> None:
    status, answer = server.ask({"inputs": [{"items": ["B0003"] * 10_000}], "params": {"k": 5}})
    assert status == 200 and answer == server.ask({"inputs": [{"items": ["B0003"] * 6}], "params": {"k": 5}})[1]


def test_a_client_that_hangs_up_leaves_no_traceback(server: Server) -> None:
    for sent in (b"", b'{"inputs"'):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(b"POST /invocations HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n" + sent)
    body = b'{"inputs": [{"items": ["B0003"]}]}'
    with socket.create_connection(("127.0.0.1", server.port)) as client:  # asks, and does not wait for the answer
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    assert server.ask({"inputs": [{"items": ["B0003"]}]})[0] == 200
    time.sleep(0.5)
    assert "Traceback" not in server.log.read_text() and server.process.poll() is None


def test_five_hundred_clients_at_once_are_answered(server: Server) -> None:
    expected = server.ask({"inputs": [{"items": ["B0003"]}], "params": {"k": 3}})
    wrong: list[object] = []

    def ask() -> None:
        try:
            if server.ask({"inputs": [{"items": ["B0003"]}], "params": {"k": 3}}) != expected:
                wrong.append("answer")
        except OSError as error:
            wrong.append(error)

    crowd = [threading.Thread(target=ask) for _ in range(500)]
    for client in crowd:
        client.start()
    for client in crowd:
        client.join()
    assert not wrong and server.process.poll() is None


def test_the_folder_is_followed_and_a_damaged_package_refused(place: Path, server: Server) -> None:
    def popular(item: str) -> bool:
        return server.ask({"inputs": [{"items": [item]}]})[1]["predictions"][0]["popular"]

    write_package(place / "recommender", renamed())
    for _ in range(100):
        if popular("B0001"):
            break
        time.sleep(0.05)
    assert not popular("C0001")
    (place / "recommender/config.json").write_text("{")
    for _ in range(5):
        assert not popular("C0001")
        time.sleep(0.05)
    assert "recommender: the package that was loaded before stays" in server.log.read_text()
    write_package(place / "recommender", package())
    for _ in range(100):
        if not popular("B0001"):
            break
        time.sleep(0.05)
    assert not popular(IDS[0])
