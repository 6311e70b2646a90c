"""Files from a web server or a mirror folder: resumed by range, retried, verified before use."""
from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from llmgr.data.part import Part
from llmgr.runtime import artifacts, resume
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError
from llmgr.runtime.masking import masked
from llmgr.runtime.state import read_state, write_state

BLOCK = 1 << 20
LONGEST_PAUSE = 30.0
"""Seconds between two attempts at most."""
LOG_SECONDS = 15.0
"""Seconds between two lines of progress where there is no terminal."""


def is_url(text: str) -> bool:
    """Whether `text` is a web address rather than a folder."""
    return text.lower().startswith(("http://", "https://"))


def shown(origin: str) -> str:
    """`origin` as it may be recorded: without credentials, and without the machine's own path to a folder."""
    return masked(origin)


def from_folder(mirror: str, name: str) -> tuple[Path, str | None]:
    """The file `name` of a mirror folder and its digest in the folder's SHA256SUMS, if it has one.

    A relative folder is looked up from the repository root first (experiments run in a copy elsewhere).
    """
    given = masked(mirror, paths=False)
    folders = [base / Path(mirror).expanduser() for base in (resume.home(), Path())]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise UserError(f"data.mirror={given} is neither a folder nor an http address: give the "
                        f"one that holds {name}")
    if not (folder / name).is_file():
        raise UserError(f"data.mirror={given} does not hold {name}: put the file there under this name, or choose "
                        "another data.dataset")
    sums = folder / "SHA256SUMS"
    listed = re.findall(r"^([0-9a-fA-F]{64}) [ *](\S+)$", sums.read_text(), re.M) if sums.is_file() else []
    return folder / name, {file: digest for digest, file in listed}.get(name)


def verify(path: Path, name: str, expected: str | None) -> str:
    """The SHA-256 of a fetched file, after it is found to be what `name` says and whole; UserError if it is not."""
    with path.open("rb") as handle:
        head = handle.read(512).lstrip()
    if head.startswith(b"<"):
        raise UserError(f"{name} is an HTML page, not data: look at data.mirror, or open its address in a browser")
    digest = artifacts.digest(path)
    if expected and digest != expected.lower():
        raise UserError(f"{name} has SHA-256 {digest}, not the expected {expected.lower()}: fetch it again, or correct "
                        "data.sha256 (SHA256SUMS of the mirror)")
    if name.endswith(".gz"):
        if not head.startswith(b"\x1f\x8b"):
            raise UserError(f"{name} is not a gzip file: look at data.mirror")
        try:
            with gzip.open(path) as handle:
                while handle.read(BLOCK):
                    pass
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{name} is damaged or cut short: fetch it again") from None
    return digest


@contextlib.contextmanager
def source(url: str, mirror: str | None, expected: str | None, retries: int, timeout: float) -> Iterator[
    tuple[Path, str]
]:
    """The verified file behind `url`, or the one of that name in `mirror`, and its origin in words for the record.

    What came over the network waits under `.resume/download` until the block succeeds: DVC deletes a stage's outputs
    before it runs the stage again, and an interruption between two files must not lose the first.
    """
    name = url.rsplit("/", 1)[1]
    if mirror and not is_url(mirror):
        path, listed = from_folder(mirror, name)
        verify(path, name, expected or listed)
        yield path, shown(mirror)
        return
    url = f"{mirror.rstrip('/')}/{name}" if mirror else url
    folder = resume.waiting("download", hashlib.sha256(url.encode()).hexdigest()[:16])
    with filelock.FileLock(folder.with_suffix(".lock")):  # experiments that run side by side want the same file
        folder.mkdir(exist_ok=True)
        path = from_web(url, name, folder, retries, timeout)
        try:
            verify(path, name, expected)
        except UserError:
            path.unlink()
            raise
        yield path, shown(url)
        shutil.rmtree(folder)


def from_web(url: str, name: str, folder: Path, retries: int, timeout: float) -> Path:
    """Fetch `url` into `folder`, going on from what an earlier run left there; returns the complete file.

    A part is continued only if its bytes are still those that came and the server confirms by ETag or date that the
    file is still the same one. Failures of
    the server or the line are retried `retries` times after pauses that double, counted anew whenever bytes came.
    """
    import requests
    import urllib3

    part, state = Part(folder / f"{name}.part"), folder / "state"
    part.check()
    failures, furthest = 0, -1
    with requests.Session() as session:
        while not _complete(part, state):
            try:
                problem = _transfer(session, url, name, part, state, timeout)
            except UserError:
                raise
            except requests.HTTPError as error:
                status = error.response.status_code
                if status < 500 and status not in (408, 429):
                    raise UserError(f"{shown(url)} answers {status} {error.response.reason}: check data.dataset, or "
                                    f"set data.mirror to a folder or URL that holds {name}") from None
                problem = f"the server answers {status}"
            except (requests.Timeout, urllib3.exceptions.TimeoutError):
                problem = "no answer in time"
            except requests.ConnectionError as error:
                problem = _cause(error)
            except (requests.RequestException, ValueError, OverflowError) as error:  # an address nobody can read
                raise UserError(f"{shown(url)} cannot be fetched, or leads to an address that cannot "
                                f"({_cause(error)}): correct data.mirror") from None
            except urllib3.exceptions.HTTPError as error:
                problem = _cause(error)
            if _complete(part, state):
                break
            size = part.size()
            failures, furthest = (0 if size > max(furthest, 0) else failures + 1), max(furthest, size)
            if failures > retries:
                raise UserError(f"{shown(url)} cannot be fetched ({problem}): run the stage again to go on, or set "
                                f"data.mirror to a folder that holds {name}, as in -S data.mirror=FOLDER")
            pause = min(0.25 * 2**failures, LONGEST_PAUSE)
            say(f"{name}: {problem}; trying again in {pause:g} s")
            time.sleep(pause)
    return part.path


def _transfer(session: Any, url: str, name: str, part: Part, state: Path, timeout: float) -> str:
    """One request: append to the part if the server continues the same file, start over if it does not.

    Returns what is wrong should the file not be complete now.
    """
    known = _known(state)
    have = part.size()
    headers = {"Accept-Encoding": "identity"}
    if have and known.get("validator"):
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    with session.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        etag = answer.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified")
        span = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", answer.headers.get("Content-Range", ""))
        offered = (int(span[1]), int(span[2]), validator) if span else None
        asked = (have, known.get("total"), known.get("validator")) if "Range" in headers else ()
        if answer.status_code == 416 or (answer.status_code == 206 and offered != asked):
            part.remove()  # another file than the one that was begun
            return f"the server answers {answer.status_code} for a part that was not asked for"
        answer.raise_for_status()
        if answer.status_code not in (200, 206):
            raise UserError(f"{shown(url)} answers {answer.status_code} and no file: set data.mirror to a folder or "
                            f"URL that holds {name}")
        if answer.status_code == 200:
            have, known = 0, {"validator": validator, "total": _length(answer.headers.get("Content-Length"), url)}
            part.remove()
            _remember(state, known)
        # Bytes as they come: iter_content would lose a block that the connection breaks off in, and would unpack a file
        # that the server labels as gzip-encoded, as some do with .gz files.
        with part.appended() as add, _progress(name, have, known["total"]) as advance:
            while block := answer.raw.read1(BLOCK, decode_content=False):
                add(block)
                advance(len(block))
    if known["total"] is None:  # a server that names no length: the end of the stream is the end of the file
        _remember(state, known | {"total": part.size()})
    return "the connection closed early"


def _length(header: str | None, url: str) -> int | None:
    """Content-Length, which a server may give twice, in bytes; None where there is none."""
    lengths = {part.strip() for part in header.split(",")} if header else set()
    if len(lengths) > 1 or not all(re.fullmatch(r"[0-9]{1,18}", length) for length in lengths):
        raise UserError(f"{shown(url)} gives its length as {header[:40]!r}, which is none: set data.mirror to another "
                        "server, or to a folder that holds the file")
    return int(lengths.pop()) if lengths else None


def _remember(state: Path, known: dict[str, Any]) -> None:
    write_state(state, json.dumps(known).encode())


def _known(state: Path) -> dict[str, Any]:
    """What an earlier run wrote of the file that it began; nothing where that cannot be read."""
    try:
        known = json.loads(read_state(state) or b"")
        total, validator = known["total"], known["validator"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    whole = total is None or (type(total) is int and total >= 0)
    return known if whole and isinstance(validator, str | None) else {}


def _complete(part: Part, state: Path) -> bool:
    return part.path.exists() and part.size() == _known(state).get("total")


def _cause(error: Exception) -> str:
    """The innermost words of a nested transport error."""
    text = str(error)
    for sign, words in (("NameResolution", "its name cannot be resolved; is this machine offline?"),
                        ("refused", "the connection is refused"), ("unreachable", "the network is unreachable"),
                        ("IncompleteRead", "the connection broke off"), ("Proxy", "the proxy does not let it pass"),
                        ("reset", "the connection broke off"), ("SSL", "its certificate is not accepted")):
        if sign in text:
            return words
    return type(error).__name__


@contextlib.contextmanager
def _progress(name: str, done: int, total: int | None) -> Iterator[Any]:
    """A bar in a terminal, a line now and then elsewhere."""
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        last = time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            bar.update(count)
            if bar.disable and time.monotonic() - last > LOG_SECONDS:
                say(f"{name}: {done / 1e6:.0f} MB" + (f" of {total / 1e6:.0f}" if total else ""))
                last = time.monotonic()

        yield advance
