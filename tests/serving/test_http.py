"""The MLflow model of a package, served by MLflow's own server and asked over HTTP."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from machine import ROOT
from tiny_package import IDS, package, renamed

from llmgr.serving.package import write_package
from llmgr.serving.recommender import Recommender
from llmgr.serving.registry import log_package


class Server:
    """`mlflow models serve` on a port of its own."""

    def __init__(self, store: str, model: str, folder: Path | None, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTHONPATH"))}
        own = {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "OMP_NUM_THREADS": "1",
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        if folder is not None:
            own["LLMGR_RECOMMENDER"] = str(folder)
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local", "-p",
                   str(self.port)]
        self.log = log
        self.process = subprocess.Popen(command, cwd=log.parent, env=clean | own, stdout=log.open("w"),
                                        stderr=subprocess.STDOUT, start_new_session=True)
        for _ in range(600):
            try:
                if urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5).status == 200:
                    return
            except OSError:
                time.sleep(0.2)
            assert self.process.poll() is None, log.read_text()[-3000:]
        raise AssertionError(log.read_text()[-3000:])

    def ask(self, body: object) -> tuple[int, dict]:
        """HTTP status and answer."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/invocations", content,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)


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
MLFLOWS = [b'{"inputs": [{"items": ["B0003"', b"\xff\xfe", b"", [1], {"data": 3}, {"inputs": None}, {"inputs": "B0003"},
           {"inputs": [{"items": ["B0003"]}], "params": {"k": "many"}}]


@pytest.mark.parametrize(("body", "named"), OURS, ids=lambda value: str(value)[:30])
def test_wrong_sessions_are_refused_in_one_sentence(server: Server, body: object, named: str) -> None:
    status, answer = server.ask(body)
    assert status == 400 and answer["message"].startswith(named) and "\n" not in answer["message"]


@pytest.mark.parametrize("body", MLFLOWS, ids=lambda value: str(value)[:30])
def test_wrong_requests_are_refused_without_a_traceback(server: Server, body: object) -> None:
    status, answer = server.ask(body)
    assert status == 400 and "Traceback" not in json.dumps(answer) and "stack_trace" not in answer
    assert server.ask({"inputs": [{"items": ["B0003"]}]})[0] == 200


def test_the_server_outlives_large_bodies_hang_ups_and_crowds(server: Server) -> None:
    assert server.ask({"inputs": [{"items": ["B0003"] * 10_000}]})[0] == 200
    assert server.ask(b'{"inputs": ' + b" " * 50_000_000)[0] == 400
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"POST /invocations HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{")
    wrong: list[object] = []

    def ask() -> None:
        try:
            if server.ask({"inputs": [{"items": ["B0003"]}], "params": {"k": 3}})[0] != 200:
                wrong.append("status")
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
