"""Recommendations for a file of sessions, in a stream that goes on where it was killed."""
from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr.runtime.artifacts import digest, replacing
from llmgr.runtime.console import Bar, say
from llmgr.runtime.errors import UserError
from llmgr.runtime.ownership import hold, let_go
from llmgr.runtime.state import discard, read_state, write_state
from llmgr.serving.package import CONFIG
from llmgr.serving.recommender import Recommender, check_k

if TYPE_CHECKING:
    import polars as pl

    Rows = Iterator[tuple[Any, list[str]]]

ROWS = 4096  # sessions of a part: what a killed run does again at most
FORMS = (".parquet", ".csv", ".jsonl")


def recommend_file(folder: Path, sessions: Path, out: Path, k: int, exclude_seen: bool = True) -> int:
    """Write the `k` best items for every session of a file, and return how many sessions there are.

    `sessions` is Parquet or JSON lines with a list `items`, or CSV whose `items` are parted by spaces; a column
    `session`, where there is one, names the rows, else their number does. `out` is Parquet or JSON lines: session,
    items, scores, unknown and popular as `Recommender.recommend`. Parts stand in a folder beside `out` until all are
    there: the same command goes on after the last of them, and ends in the same bytes. UserError where a file is of
    another form, or a row is no session.
    """
    check_k(k)
    if sessions.suffix not in FORMS or out.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"{sessions} must end in .parquet, .csv or .jsonl, and {out} in .parquet or .jsonl")
    if not sessions.is_file():
        raise UserError(f"{sessions} is not here: name a file of sessions")
    if out.is_dir():
        raise UserError(f"{out} is a folder: give --out the name of a file")
    recommender = Recommender.load(folder)
    parts, lock = (out.with_name(f".{out.name}.{kind}") for kind in ("parts", "lock"))
    if not hold(lock):
        raise UserError(f"another run writes {out}: wait for it, or give --out another name")
    try:
        return _recommended(recommender, folder, sessions, out, parts, k, exclude_seen)
    finally:
        lock.unlink(missing_ok=True)
        let_go(lock)


def _recommended(recommender: Recommender, folder: Path, sessions: Path, out: Path, parts: Path, k: int,
                 exclude_seen: bool) -> int:
    _begin(parts, {"package": digest(folder / CONFIG), "sessions": digest(sessions), "k": int(k),
                   "exclude_seen": exclude_seen, "rows": ROWS})
    rows = read_sessions(sessions)
    done = _done(parts, out.suffix)
    total = _count(sessions)
    bar, number = Bar(total, min(done * ROWS, total), f"recommend: {sessions.name}"), done
    for _ in itertools.islice(rows, done * ROWS):
        pass
    while batch := list(itertools.islice(rows, ROWS)):
        answer = recommender.recommend([items for _, items in batch], k, exclude_seen).drop("titles")
        write_state(parts / f"{number:08d}{out.suffix}", _part(out.suffix, [session for session, _ in batch], answer))
        number += 1
        bar.show(min(number * ROWS, total))
    bar.close()
    _join(sorted(parts.glob(f"*{out.suffix}")), out)
    shutil.rmtree(parts)
    return total


def _begin(parts: Path, about: dict[str, Any]) -> None:
    """Leave in `parts` what belongs to this package, file and settings, and nothing else."""
    mark, content = parts / "about", json.dumps(about).encode()
    if read_state(mark) != content:
        shutil.rmtree(parts, ignore_errors=True)
        write_state(mark, content)


def _done(parts: Path, form: str) -> int:
    """How many parts from the first on are whole; what stands behind them is removed."""
    done = 0
    while read_state(parts / f"{done:08d}{form}") is not None:
        done += 1
    for path in parts.glob(f"*{form}"):
        if not path.stem.isdecimal() or int(path.stem) >= done:
            say(f"{path} is damaged, or stands behind one that is: its sessions are ranked again")
            discard(path)
    return done


def read_sessions(path: Path) -> Rows:
    """Names and item ids of the sessions of a file; UserError names the row that has none."""
    if path.suffix not in FORMS or not path.is_file():
        raise UserError(f"{path} must be a .parquet, .csv or .jsonl file of sessions")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8", newline="" if path.suffix == ".csv" else None) as lines:
        read = iter(csv.DictReader(lines) if path.suffix == ".csv" else lines)
        for number in itertools.count(1):
            try:
                line = next(read)
                row = line if path.suffix == ".csv" else json.loads(line)
                items = row["items"].split() if path.suffix == ".csv" else row["items"]
                if not isinstance(items, list):
                    raise TypeError
            except StopIteration:
                return
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error):
                raise UserError(f"{path}: row {number} holds no session: each must be UTF-8 and have `items`") from None
            yield row.get("session", number), items


def _parquet(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError):
        raise UserError(f"{path} is no Parquet file: write it again") from None


def _parquet_rows(path: Path) -> Rows:
    file = _parquet(path)
    names = file.schema_arrow.names
    if "items" not in names:
        raise UserError(f"{path} has no column `items`: name the column of item lists so")
    number = itertools.count(1)
    for batch in file.iter_batches(ROWS, columns=[name for name in ("session", "items") if name in names]):
        for row in batch.to_pylist():
            yield row.get("session", next(number)), row["items"] or []


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        return _parquet(path).metadata.num_rows
    with path.open("rb") as lines:
        return sum(1 for _ in lines) - (path.suffix == ".csv")


def _part(form: str, sessions: list[Any], answer: pl.DataFrame) -> bytes:
    import polars as pl

    if form == ".parquet":
        buffer = io.BytesIO()
        answer.insert_column(0, pl.Series("session", sessions)).write_parquet(buffer)
        return buffer.getvalue()
    return "".join(json.dumps({"session": session, **row}, ensure_ascii=False) + "\n"
                   for session, row in zip(sessions, answer.iter_rows(named=True))).encode()


def _join(parts: list[Path], out: Path) -> None:
    contents = (read_state(part) or b"" for part in parts)
    with replacing(out) as temporary:
        if out.suffix == ".jsonl":
            with temporary.open("wb") as whole:
                whole.writelines(contents)
            return
        from pyarrow import parquet

        tables = (parquet.read_table(io.BytesIO(content)) for content in contents)
        first = next(tables, None)
        if first is None:
            raise UserError(f"{out} would be empty: the file holds no session")
        with parquet.ParquetWriter(temporary, first.schema, compression="zstd") as whole:
            for table in itertools.chain([first], tables):
                whole.write_table(table)
