from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from machine import DEFAULTS, ROOT

from llmgr.data import fetch
from llmgr.runtime import artifacts
from llmgr.runtime.errors import UserError
from llmgr.runtime.state import write_state

DATA = gzip.compress(random.Random(1).randbytes(300_000), 1)
NAME = "reviews_Beauty_5.json.gz"


class Server(ThreadingHTTPServer):
    """Serves `files`; `plan` holds what goes wrong, one entry a request; `seen` what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {NAME: DATA}
        self.plan: list[str | int | tuple[int, dict[str, str]]] = []
        self.seen: list[tuple[int, str | None]] = []
        self.etag: str | None = '"one"'
        self.ranges = True
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Server = self.server
        wrong = server.plan.pop(0) if server.plan else None
        content = server.files.get(self.path.rsplit("/", 1)[1])
        if isinstance(wrong, tuple):
            return self.lie(*wrong)
        asked = self.headers.get("Range")
        if isinstance(wrong, int) or content is None:
            server.seen.append((wrong or 404, asked))
            return self.send_error(wrong or 404)
        start, status = 0, 200
        if asked and server.ranges and self.headers.get("If-Range") in (None, server.etag):
            start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
        server.seen.append((status, asked))
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if wrong != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: len(body) // 2] if wrong in ("drop", "stall") else body)
        self.wfile.flush()
        if wrong == "stall":
            time.sleep(20)

    def lie(self, status: int, headers: dict[str, str]) -> None:
        """The whole file, whatever the status and the headers say."""
        self.send_response(status)
        for pair in headers.items():
            self.send_header(*pair)
        self.end_headers()
        self.wfile.write(DATA)
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fetched(server: Server, retries: int = 2, timeout: float = 5.0, sha256: str | None = None) -> bytes:
    with fetch.source(f"http://official.invalid/x/{NAME}", server.address, sha256, retries, timeout) as (path, origin):
        assert origin == f"{server.address}/{NAME}"
        return path.read_bytes()


def test_whole_file_and_nothing_left_behind(server, home):
    assert fetched(server) == DATA
    assert server.seen == [(200, None)]
    assert not list(home.rglob("*.part"))


def test_a_dropped_connection_goes_on_where_it_stopped(server):
    server.plan = ["drop"]
    assert fetched(server) == DATA
    (first, _), (second, asked) = server.seen
    assert (first, second) == (200, 206)
    assert asked == f"bytes={len(DATA) // 2}-"


def test_a_second_run_goes_on_where_the_first_gave_up(server, home):
    server.plan = ["drop", 503, 503]
    with pytest.raises(UserError, match="503"):
        fetched(server, retries=1)
    part, = home.rglob("*.part")
    assert part.stat().st_size == len(DATA) // 2
    assert part.is_relative_to(home / ".resume/download")
    server.seen.clear()
    assert fetched(server) == DATA
    assert server.seen == [(206, f"bytes={len(DATA) // 2}-")]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_server_errors_are_retried(server, status):
    server.plan = [status]
    assert fetched(server) == DATA
    assert [answer for answer, _ in server.seen] == [status, 200]


def test_retries_end(server):
    server.plan = [503] * 9
    with pytest.raises(UserError, match=r"503.*-S data.mirror=FOLDER"):
        fetched(server, retries=2)
    assert len(server.seen) == 3


def test_progress_renews_the_retries(server):
    server.plan = ["drop"] * 3
    assert fetched(server, retries=1) == DATA


def test_a_missing_file_is_not_retried(server):
    server.files = {}
    with pytest.raises(UserError, match=f"404.*data.mirror.*{NAME}"):
        fetched(server)
    assert len(server.seen) == 1


@pytest.mark.parametrize("kept_etag", [False, True])
def test_a_file_that_changed_is_never_glued(server, kept_etag):
    server.plan = ["drop", 503]
    with pytest.raises(UserError):
        fetched(server, retries=0)
        fetched(server, retries=0)
    changed = gzip.compress(random.Random(2).randbytes(310_000), 1)
    server.files[NAME] = changed
    server.etag = server.etag if kept_etag else '"two"'
    assert fetched(server) == changed


@pytest.mark.parametrize(("etag", "ranges"), [(None, True), ('W/"weak"', True), ('"one"', False)])
def test_without_a_way_to_go_on_it_starts_over(server, etag, ranges):
    server.etag, server.ranges, server.plan = etag, ranges, ["drop"]
    assert fetched(server) == DATA
    assert [status for status, _ in server.seen] == [200, 200]


def test_a_server_without_lengths(server):
    server.plan = ["no length"]
    assert fetched(server) == DATA


def test_a_silent_server_is_given_up(server):
    server.plan = ["stall"]
    start = time.monotonic()
    assert fetched(server, timeout=0.3) == DATA
    assert time.monotonic() - start < 5
    assert server.seen[1][0] == 206


LENGTH = str(len(DATA))


def test_the_same_length_given_twice_is_that_length(server):
    server.plan = [(200, {"Content-Length": LENGTH, "content-length": LENGTH})]
    assert fetched(server, retries=0) == DATA


@pytest.mark.parametrize(("status", "headers"), [
    (200, {"Content-Length": "many"}), (200, {"Content-Length": "-5"}), (200, {"Content-Length": "9" * 5000}),
    (200, {"Content-Length": LENGTH, "content-length": "7"}),
    (206, {}), (206, {"Content-Range": f"bytes 0-{len(DATA) - 1}/{LENGTH}"}),
    (206, {"Content-Range": "bytes 5-9/" + "9" * 5000}),
    (416, {}), (302, {"Location": "http://[::1/x"}), (302, {"Location": "http://host:99999/x"}),
    (302, {"Location": "http://a..b/x"}), (302, {"Location": "ftp://me:hush@host/x"}), (302, {"Location": ""}),
    (302, {"Location": "http://\u00ff\u00fe"}), (302, {}), (299, {"Content-Length": "3"}),
])
def test_a_server_that_lies_is_one_sentence(server, home, status, headers):
    server.plan = [(status, headers)] * 20
    with pytest.raises(UserError, match=r"data\.mirror|fetch it again") as refused:
        fetched(server, retries=1)
    assert NAME in str(refused.value) and "hush" not in str(refused.value)
    server.plan = []
    assert fetched(server) == DATA, "nothing of it stays"


@pytest.mark.parametrize("mirror", [
    "http://me:hush@[::1", "http://me:hush@host:port/x", "https://me:hush@/", "http://me:hush@a..b",
    "ftp://me:hush@host/x", "http://me:hush/hush@127.0.0.1:9",
])
def test_addresses_that_cannot_be_read_are_one_sentence_without_their_password(mirror):
    source = fetch.source(f"http://x/{NAME}", mirror, None, 0, 1)
    with pytest.raises(UserError, match=r"data\.mirror") as refused, source:
        pass
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"total": "x", "validator": null}', b"\xff",
                                     b'{"total": -1, "validator": "y"}', b'{"total": 7, "validator": [1]}'])
@pytest.mark.parametrize("write", [Path.write_bytes, write_state], ids=["bytes", "state"])
def test_a_state_that_cannot_be_read_is_absent(server, home, content, write):
    server.plan = ["drop", 503, 503]
    with pytest.raises(UserError, match="503"):
        fetched(server, retries=1)
    state, = home.rglob("state")
    write(state, content)
    assert fetched(server) == DATA


def begun(server: Server, home: Path) -> Path:
    """The part of a transfer that ended halfway, of several blocks."""
    server.plan = ["drop", 503, 503]
    with pytest.raises(UserError, match="503"):
        fetched(server, retries=1)
    server.seen.clear()
    part, = home.rglob("*.part")
    return part


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_bytes_altered_on_the_disk_are_fetched_again(server, home, place, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "BLOCK", 10_000)
    part = begun(server, home)
    held = bytearray(part.read_bytes())
    held[place] ^= 1
    part.write_bytes(held)
    assert fetched(server) == DATA
    (status, asked), = server.seen
    good = 0 if asked is None else int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
    assert good <= place % len(held) and (place != -1 or (status, good > 0) == (206, True)), "what is whole stays"
    assert f"\n{NAME}: what came before is damaged from byte {good} on" in capsys.readouterr().err


@pytest.mark.parametrize("harm", [
    lambda part, sums: part.write_bytes(part.read_bytes()[:-7]), lambda part, sums: part.write_bytes(b""),
    lambda part, sums: part.write_bytes(part.read_bytes() + b"x"), lambda part, sums: sums.unlink(),
    lambda part, sums: sums.write_bytes(sums.read_bytes()[:-3]), lambda part, sums: sums.write_bytes(b"\xff -1 \n"),
    lambda part, sums: sums.write_bytes(b"99999999999999999999999 0\n"), lambda part, sums: part.unlink(),
])
def test_a_part_or_its_digests_cut_short_or_gone_end_in_the_same_file(server, home, harm):
    part = begun(server, home)
    harm(part, part.with_name(f"{part.name}.sums"))
    assert fetched(server) == DATA


def test_a_page_in_place_of_data_is_refused_and_forgotten(server, home):
    server.files[NAME] = b"<!DOCTYPE html><html>moved</html>"
    with pytest.raises(UserError, match=f"{NAME} is an HTML page"):
        fetched(server)
    assert not list(home.rglob("*.part"))
    server.files[NAME] = DATA
    assert fetched(server) == DATA


@pytest.mark.parametrize(("content", "says"), [
    (DATA[:-1000], "cut short"), (DATA[:5000] + b"\0" * 64 + DATA[5064:], "damaged"),
    (b"reviewerID,asin\n", "not a gzip"), (b"", "not a gzip"),
])
def test_damaged_files_are_refused(tmp_path, content, says):
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        fetch.verify(path, NAME, None)


def test_checksum(server):
    digest = hashlib.sha256(DATA).hexdigest()
    assert fetched(server, sha256=digest.upper()) == DATA
    with pytest.raises(UserError, match=r"SHA-256 .* not the expected 0000"):
        fetched(server, sha256="0" * 64)


def test_checksums_of_a_mirror_folder_count(home):
    mirror = home / "mirror"
    mirror.mkdir()
    (mirror / NAME).write_bytes(DATA)
    (mirror / "SHA256SUMS").write_text(f"{'1' * 64}  other.gz\n{hashlib.sha256(DATA).hexdigest()}  {NAME}\n")
    with fetch.source(f"http://x/{NAME}", "mirror", None, 0, 1) as (path, origin):
        assert path.read_bytes() == DATA and origin == "mirror"
    (mirror / "SHA256SUMS").write_text(f"{'1' * 64} *{NAME}\n")
    with pytest.raises(UserError, match="SHA-256"), fetch.source(f"http://x/{NAME}", "mirror", None, 0, 1):
        pass


def test_a_relative_mirror_works_from_an_experiments_copy(home, monkeypatch):
    (home / "mirror").mkdir()
    (home / "mirror" / NAME).write_bytes(DATA)
    copy = home / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    assert fetch.from_folder("mirror", NAME)[0].read_bytes() == DATA


def test_origins_hide_credentials_and_machine_paths():
    assert fetch.shown("https://me:secret@host:8080/data") == "https://***@host:8080/data"
    assert fetch.shown("/home/somebody/amazon") == "…/amazon"
    assert fetch.shown("../shared/amazon") == "../shared/amazon"


def run_stage(folder: Path, **data) -> subprocess.Popen:
    params = yaml.safe_load(DEFAULTS.read_text())
    params["data"] |= data
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return subprocess.Popen([sys.executable, ROOT / "stages/download.py"], cwd=folder, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "DVC_ROOT": str(folder)})


def test_a_killed_stage_loses_nothing(server, home):
    server.files["meta_Beauty.json.gz"] = meta = gzip.compress(random.Random(3).randbytes(100_000), 1)
    server.plan = ["whole", "stall"]
    stage = run_stage(home, dataset="beauty", mirror=server.address)
    parts = {"meta_Beauty.json.gz": len(meta) // 2, NAME: len(DATA)}
    deadline = time.monotonic() + 20
    while {p.name[:-5]: p.stat().st_size for p in home.rglob("*.part")} != parts and time.monotonic() < deadline:
        time.sleep(0.02)
    stage.send_signal(signal.SIGKILL)
    stage.communicate()
    for file in (home / "data/raw").glob("*"):  # as DVC does before it runs a stage again
        file.unlink()
    server.seen.clear()
    stage = run_stage(home, dataset="beauty", mirror=server.address)
    _, said = stage.communicate(timeout=30)
    assert stage.returncode == 0, said
    assert server.seen == [(206, f"bytes={len(meta) // 2}-")], "the first file is not fetched again"
    assert (home / "data/raw" / NAME).read_bytes() == DATA
    assert (home / "data/raw/meta_Beauty.json.gz").read_bytes() == meta
    files = artifacts.read_json(home / "data/raw/source.json")["files"]
    assert files["meta"] == {"name": "meta_Beauty.json.gz", "origin": f"{server.address}/meta_Beauty.json.gz",
                             "size": len(meta), "sha256": hashlib.sha256(meta).hexdigest()}
    assert not list(home.rglob("*.part"))


def test_offline_is_one_sentence(home):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    stage = run_stage(home, dataset="beauty", mirror=address, retries=1)
    _, said = stage.communicate(timeout=30)
    assert stage.returncode == 2 and "Traceback" not in said
    *_, last = said.strip().splitlines()
    assert last.startswith("error: ") and "-S data.mirror=FOLDER" in last and "refused" in last
