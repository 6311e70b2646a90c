"""Recommendations for a file of sessions, in a stream that goes on where it was killed."""
from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr.runtime.artifacts import digest, replacing, write_bytes, write_json
from llmgr.runtime.console import Bar
from llmgr.runtime.errors import UserError
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
    recommender = Recommender.load(folder)
    parts = out.with_name(f".{out.name}.parts")
    _begin(parts, {"package": digest(folder / CONFIG), "sessions": digest(sessions), "k": int(k),
                   "exclude_seen": exclude_seen, "rows": ROWS})
    rows = _rows(sessions)
    done = len(list(parts.glob(f"*{out.suffix}")))
    total = _count(sessions)
    bar, number = Bar(total, min(done * ROWS, total), f"recommend: {sessions.name}"), done
    for _ in itertools.islice(rows, done * ROWS):
        pass
    while batch := list(itertools.islice(rows, ROWS)):
        answer = recommender.recommend([items for _, items in batch], k, exclude_seen).drop("titles")
        _write(parts / f"{number:08d}{out.suffix}", [session for session, _ in batch], answer)
        number += 1
        bar.show(min(number * ROWS, total))
    bar.close()
    _join(sorted(parts.glob(f"*{out.suffix}")), out)
    shutil.rmtree(parts)
    return total


def _begin(parts: Path, about: dict[str, Any]) -> None:
    """Leave in `parts` what belongs to this package, file and settings, and nothing else."""
    mark = parts / "about.json"
    if not mark.exists() or json.loads(mark.read_bytes()) != about:
        shutil.rmtree(parts, ignore_errors=True)
        write_json(mark, about)


def _rows(path: Path) -> Rows:
    """Names and item ids of the sessions of a file; UserError names the row that has none."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8", newline="" if path.suffix == ".csv" else None) as lines:
        read = csv.DictReader(lines) if path.suffix == ".csv" else lines
        for number, line in enumerate(read, 1):
            try:
                row = line if path.suffix == ".csv" else json.loads(line)
                items = row["items"].split() if path.suffix == ".csv" else row["items"]
                if not isinstance(items, list):
                    raise TypeError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}: row {number} holds no session: each must have `items`") from None
            yield row.get("session", number), items


def _parquet_rows(path: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
    except (ArrowException, OSError):
        raise UserError(f"{path} is no Parquet file: write it again") from None
    names = file.schema_arrow.names
    if "items" not in names:
        raise UserError(f"{path} has no column `items`: name the column of item lists so")
    number = itertools.count(1)
    for batch in file.iter_batches(ROWS, columns=[name for name in ("session", "items") if name in names]):
        for row in batch.to_pylist():
            yield row.get("session", next(number)), row["items"] or []


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.ParquetFile(path).metadata.num_rows
    with path.open("rb") as lines:
        return sum(1 for _ in lines) - (path.suffix == ".csv")


def _write(path: Path, sessions: list[Any], answer: pl.DataFrame) -> None:
    import polars as pl

    if path.suffix == ".parquet":
        with replacing(path) as temporary:
            answer.insert_column(0, pl.Series("session", sessions)).write_parquet(temporary)
        return
    lines = (json.dumps({"session": session, **row}, ensure_ascii=False) + "\n"
             for session, row in zip(sessions, answer.iter_rows(named=True)))
    write_bytes(path, "".join(lines).encode())


def _join(parts: list[Path], out: Path) -> None:
    with replacing(out) as temporary:
        if out.suffix == ".jsonl":
            with temporary.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as lines:
                        shutil.copyfileobj(lines, whole)
            return
        from pyarrow import parquet

        if not parts:
            raise UserError(f"{out} would be empty: the file holds no session")
        with parquet.ParquetWriter(temporary, parquet.read_schema(parts[0]), compression="zstd") as whole:
            for part in parts:
                whole.write_table(parquet.read_table(part))
