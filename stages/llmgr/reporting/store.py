"""The MLflow store: where it is, one publisher at a time, and one sentence where it does not answer.

An experiment's artifacts lie beside the store, at an absolute address that MLflow takes once, when the experiment is
made. Where a clone is moved or copied with its store, earlier runs keep their parameters and metrics, and their
artifacts stay at the former address; the next publication gives the former experiment another name and makes a new one
with this name, beside the store. A run of the former one is found again as long as its artifacts are there.
"""
from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from llmgr.runtime.artifacts import replacing
from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError, disk_is_full
from llmgr.runtime.masking import masked
from llmgr.runtime.resume import home

PROBE_SECONDS = "5"
FORMER = "llmgr.former"  # tag of an experiment that had another name before a move: that name
QUIET_SECONDS = 3  # of waiting without a word
LOCK_SECONDS = 600  # for another publisher, which says the same
BUSY_SECONDS = 60  # for a program that holds the store's file locked
SQLITE = b"SQLite format 3\0"
MEND = "mend track.uri or MLFLOW_TRACKING_URI, or start the server"


def address_of(uri: str | None) -> str:
    """Where runs are kept: `uri`, else MLFLOW_TRACKING_URI, else sqlite under the repository root.

    A relative sqlite path is taken from that root, so that DVC's temporary copies share it. UserError where it names no
    file.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:"):
        path = uri.removeprefix("sqlite:///").partition("?")[0]
        if not uri.startswith("sqlite:///") or not path.strip("/"):
            raise UserError(f"track.uri={uri} names no file: give one, such as sqlite:///mlflow.db")
        if not path.startswith("/"):
            uri = f"sqlite:///{(home() / uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def beside(address: str) -> Path:
    """Where a store's lock and artifacts lie: beside a sqlite file, which clones may share, else in the root."""
    file = file_of(address)
    return home() if file is None else file.parent


def file_of(address: str) -> Path | None:
    """The file of a sqlite store."""
    return Path(address.removeprefix("sqlite:///").partition("?")[0]) if address.startswith("sqlite:///") else None


@contextlib.contextmanager
def opened(experiment: str, uri: str | None, again: str) -> Iterator[tuple[Any, str]]:
    """A client of the store and the experiment's id, while no other process publishes.

    UserError where that fails; `again` is the command that repeats it. Waiting is bounded, and said.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    address = address_of(uri)
    with _refusals(address, again), _alone(address, again):
        import mlflow

        for name in ("mlflow.store", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # their traces of what is said here in a sentence
        check(address)
        _create(mlflow, address)
        client = _client(mlflow, address)
        yield client, _experiment(client, experiment, address)


def reading(uri: str | None) -> Any:
    """A client to read runs with; None where there is no store yet. UserError as `opened`."""
    address = address_of(uri)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if (file := file_of(address)) and not file.exists():
        return None
    with _refusals(address, "the command"):
        import mlflow

        check(address)
        return _client(mlflow, address)


@contextlib.contextmanager
def _refusals(address: str, again: str) -> Iterator[None]:
    """What stores and their libraries raise, as one sentence."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    file = file_of(address)
    shown = f"sqlite, {file.name}" if file else masked(address)
    try:
        yield
    except ImportError as error:
        module = f"the Python package {error.name}" if error.name else "a driver"
        raise UserError(f"the MLflow store ({shown}) needs {module}, which is not installed: install it beside mlflow, "
                        f"or choose another track.uri, and run `{again}` again") from None
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        if disk_is_full(error):
            raise
        reason = masked(" ".join(str(error).split()))[:160]
        raise UserError(f"the MLflow store ({shown}) did not take the run ({reason}): {MEND}, and run `{again}` again"
                        ) from None


@contextlib.contextmanager
def _alone(address: str, again: str) -> Iterator[None]:
    """The lock of publishers, with a word on what is waited for."""
    import filelock

    folder = beside(address)
    if not folder.is_dir():
        raise UserError(f"the MLflow store has no folder {folder}: make it, or correct track.uri")
    lock = filelock.FileLock(folder / ".mlflow.lock")
    try:
        with _saying(f"waiting for .mlflow.lock, which another process that publishes holds (at most {LOCK_SECONDS} "
                     "s)"):
            lock.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout:
        raise UserError(f".mlflow.lock has been held for {LOCK_SECONDS} s by another process that publishes: wait for "
                        f"it, then run `{again}` again") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _saying(text: str) -> Iterator[None]:
    """Say `text` once where the block takes longer than `QUIET_SECONDS`."""
    timer = threading.Timer(QUIET_SECONDS, say, [text])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check(address: str) -> None:
    """Raise UserError where the store cannot be one, before MLflow tries for minutes."""
    file = file_of(address)
    if file is None:
        return _check_server(address)
    if file.is_dir():
        raise UserError(f"track.uri names {file}, which is a folder: name a file, such as sqlite:///mlflow.db")
    if not file.exists():
        return None
    damaged = (f"{file} is no MLflow store, or is damaged: move it out of the way (a new one is made), or restore it "
               "from a copy")
    with file.open("rb") as handle:
        if handle.read(len(SQLITE)) != SQLITE:
            raise UserError(damaged)
    try:
        with _saying(f"waiting for {file}, which another program holds locked (at most {BUSY_SECONDS} s)"), \
                contextlib.closing(sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            whole = database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            database.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise UserError(f"{file} has been locked by another program for {BUSY_SECONDS} s: close that program, then "
                            "try again") from None
        raise
    except sqlite3.DatabaseError:
        raise UserError(damaged) from None
    if not whole or (tables and "experiments" not in tables):
        raise UserError(damaged)


def _check_server(address: str) -> None:
    """Raise what a database says at the first try; MLflow alone tries for 100 s. Other addresses are probed later."""
    if urlsplit(address).scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        import sqlalchemy

        with _saying("waiting for the MLflow store's database to answer"):
            sqlalchemy.create_engine(address).connect().close()


def _create(mlflow: Any, address: str) -> None:
    """A new sqlite store takes its name when it is whole: one that was killed or ran full halfway never opens again."""
    file = file_of(address)
    if file is None or file.exists():
        return
    for leftover in file.parent.glob(f".{file.name}.*.tmp*"):
        leftover.unlink()
    with replacing(file) as temporary:
        _client(mlflow, f"sqlite:///{temporary}")


def _client(mlflow: Any, address: str) -> Any:
    """A client whose store has answered; a server that does not answer is given up after a few seconds."""
    patience = {"MLFLOW_HTTP_REQUEST_TIMEOUT": PROBE_SECONDS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in patience}
    os.environ.update(patience)
    try:
        client = mlflow.MlflowClient(tracking_uri=address)
        client.search_experiments(max_results=1)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return client


def _experiment(client: Any, name: str, address: str) -> str:
    # A database store would put artifacts below the current folder, which in DVC's temporary copies vanishes.
    location = None if address.startswith("http") else (beside(address) / "mlartifacts").resolve().as_uri()
    existing = client.get_experiment_by_name(name)
    if existing is None:
        return client.create_experiment(name, artifact_location=location)
    if existing.lifecycle_stage == "deleted":
        raise UserError(f"track.experiment={name} was deleted in MLflow: restore it there or choose another name")
    if file_of(address) and _elsewhere(existing.artifact_location, location):
        former = f"{name} (former {existing.experiment_id})"
        client.set_experiment_tag(existing.experiment_id, FORMER, name)
        client.rename_experiment(existing.experiment_id, former)
        say(f"the artifacts of MLflow's experiment {name} lie in another folder, from before a move or a copy: it is "
            f"now called {former}, and this run opens a new {name}")
        return client.create_experiment(name, artifact_location=location)
    return existing.experiment_id


def finished(client: Any, experiment_id: str, key: str, tag: str) -> Any:
    """The finished run whose `tag` is `key`, in the experiment or in what it was before a move; else None.

    What killed publishers left there, with the runs below it, is deleted.
    """
    name = client.get_experiment(experiment_id).name
    former = [e.experiment_id for e in client.search_experiments() if e.tags.get(FORMER) == name]
    same = client.search_runs([experiment_id, *former], f"tags.`{tag}` = '{key}'",
                              order_by=["attributes.start_time ASC"])
    for run in same:
        if run.info.status != "FINISHED":
            below = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
            for leftover in (*below, run):
                client.delete_run(leftover.info.run_id)
    return next((run for run in same if run.info.status == "FINISHED" and (
        run.info.experiment_id == experiment_id or _path(run.info.artifact_uri).exists())), None)


def _path(location: str) -> Path:
    return Path(unquote(location.removeprefix("file://")))


def _elsewhere(location: str, here: str) -> bool:
    """Whether an experiment's artifacts are in a folder that MLflow or this project chose for another store."""
    return location != here and bool(re.fullmatch(r"/.*/(mlartifacts|mlruns/\d+)/?", str(_path(location))))
