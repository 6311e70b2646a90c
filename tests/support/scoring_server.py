"""MLflow's own scoring server on a port of its own, asked over HTTP."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


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

    def ask(self, body: object, kind: str = "application/json") -> tuple[int, dict]:
        """HTTP status and answer."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/invocations", content,
                                         {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)
