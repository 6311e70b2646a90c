"""Recommend items: for the item ids of one session, or for a file of sessions; or change the package's items.

  python stages/recommend.py B0001 B0002 --k 10 --explain
  python stages/recommend.py --sessions sessions.parquet --out recommended.parquet
  python stages/recommend.py --add new.csv
  python stages/recommend.py B0001 B0002 --block
  python stages/recommend.py --vectors FOLDER --sessions sessions.parquet

A file of sessions is Parquet or JSON lines with a list `items`, or CSV whose `items` are parted by spaces; what is
written is Parquet or JSON lines. The same command goes on where it was killed. A file of new items has the columns
item and title, and may have text; an item that the package has gets its new text. --vectors writes items.parquet and,
for a file of sessions, sessions.parquet: vectors whose inner products are scores, for a vector store of your own.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", help="the session's item ids, oldest click first")
    parser.add_argument("--k", type=int, default=20, help="how many items to recommend")
    parser.add_argument("--keep-seen", action="store_true", help="recommend clicked items, too")
    parser.add_argument("--explain", action="store_true", help="say which parts the scores are made of")
    parser.add_argument("--sessions", type=Path, help="a file of sessions")
    parser.add_argument("--out", type=Path, help="the file to write their recommendations to")
    parser.add_argument("--add", type=Path, help="a file of new items, or new texts, for the package")
    parser.add_argument("--vectors", type=Path, help="a folder to write item vectors, and those of --sessions, to")
    parser.add_argument("--remove", action="store_true", help="take the items out of the package")
    parser.add_argument("--block", action="store_true", help="do not recommend the items from now on")
    parser.add_argument("--unblock", action="store_true", help="recommend the items again")
    parser.add_argument("--package", type=Path, default=Path("models/recommender"), help="the package's folder")
    arguments = parser.parse_args()

    from llmgr.runtime.errors import UserError, disk_is_full, out_of_memory

    try:
        _work(arguments)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", 130)
    except Exception as error:
        if disk_is_full(error):
            return _fail("the disk is full or a file limit was reached; free some space and run the same command again")
        if out_of_memory(error):
            return _fail("out of memory: close other programs, or take a machine with more memory")
        if isinstance(error, OSError) and error.filename:
            return _fail(f"{error.filename}: {error.strerror}: give another file, or mend this one's place")
        raise
    return 0


def _fail(said: str, status: int = 2) -> int:
    print(f"error: {said}", file=sys.stderr)
    return status


def _work(arguments: argparse.Namespace) -> None:
    from llmgr.runtime.errors import UserError
    from llmgr.serving.bulk import recommend_file
    from llmgr.serving.recommender import Recommender
    from llmgr.serving.vectors import write_vectors

    changes = [name for name in ("add", "remove", "block", "unblock") if getattr(arguments, name)]
    if changes:
        _change(arguments, changes)
        return
    if arguments.vectors:
        if arguments.items or arguments.out:
            raise UserError("--vectors goes with --sessions alone: leave out item ids and --out")
        write_vectors(Recommender.load(arguments.package), arguments.vectors, arguments.sessions)
        print(f"vectors in {arguments.vectors}")
        return
    given = (bool(arguments.items), arguments.sessions is not None)
    if sum(given) != 1 or (arguments.sessions is None) != (arguments.out is None):
        raise UserError("name the item ids of one session, or both --sessions and --out")
    if arguments.sessions:
        number = recommend_file(arguments.package, arguments.sessions, arguments.out, arguments.k,
                                not arguments.keep_seen)
        print(f"{number:,} sessions, recommendations in {arguments.out}")
        return
    answer = Recommender.load(arguments.package).recommend([arguments.items], arguments.k, not arguments.keep_seen,
                                                           arguments.explain)
    _show(answer.row(0, named=True), arguments.explain)


def _change(arguments: argparse.Namespace, changes: list[str]) -> None:
    from llmgr.runtime.errors import UserError
    from llmgr.serving.recommender import Recommender

    if len(changes) > 1 or bool(arguments.items) != (changes != ["add"]) or arguments.sessions:
        raise UserError("change one thing at a time: --add FILE, or item ids with --remove, --block or --unblock")
    recommender = Recommender.load(arguments.package)
    if arguments.add:
        recommender = recommender.add_items(_items(arguments.add))
    elif arguments.remove:
        recommender = recommender.remove_items(arguments.items)
    else:
        recommender = recommender.block_items(arguments.items, arguments.block)
    recommender.save(arguments.package)
    print(f"{arguments.package}: {len(recommender.number):,} items")


def _items(path: Path):
    import polars as pl

    from llmgr.runtime.errors import UserError

    read = {".parquet": pl.read_parquet, ".jsonl": pl.read_ndjson, ".csv": lambda p: pl.read_csv(p, infer_schema=False)}
    if path.suffix not in read or not path.is_file():
        raise UserError(f"{path} must be a .parquet, .jsonl or .csv file of items")
    try:
        return read[path.suffix](path)
    except (pl.exceptions.PolarsError, OSError):
        raise UserError(f"{path} cannot be read as {path.suffix}: write it again") from None


def _show(answer: dict, explain: bool) -> None:
    from llmgr.serving.scoring import PARTS

    if answer["unknown"]:
        print(f"not in the catalogue: {', '.join(answer['unknown'])}", file=sys.stderr)
    if answer["popular"]:
        print("no click is known: these are the most popular items", file=sys.stderr)
    names = ["because", *PARTS] if explain else []
    rows = [[str(number), *map(str, values[:2]), *(v if isinstance(v, str) else f"{v:.3f}" for v in values[2:])]
            for number, values in enumerate(zip(answer["items"], [title[:60] for title in answer["titles"]],
                                               answer["scores"], *(answer[name] for name in names)), 1)]
    table = [["", "item", "title", "score", *names], *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) if column < 3 or (names and column == 4) else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths))).rstrip())


if __name__ == "__main__":
    sys.exit(main())
