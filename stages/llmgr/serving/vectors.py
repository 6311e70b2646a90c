"""Item and session vectors as Parquet, for anyone's vector store."""
from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from llmgr.runtime.artifacts import replacing, write_table
from llmgr.runtime.errors import UserError
from llmgr.serving.bulk import ROWS, read_sessions

if TYPE_CHECKING:
    from llmgr.serving.recommender import Recommender


def write_vectors(recommender: Recommender, folder: Path, sessions: Path | None = None) -> None:
    """Write `items.parquet` (item, vector) and, for a file of sessions, `sessions.parquet` (session, vector).

    Vectors are lists of float32; a session without a known click has an empty one. Their inner products are scores
    without what `Scorer.item_vectors` says. UserError as there, and where the file holds no sessions.
    """
    import polars as pl

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --vectors the name of a folder")
    kind = pl.List(pl.Float32)
    vectors = recommender.scorer.item_vectors()[1:].tolist()
    write_table(folder / "items.parquet", pl.DataFrame({"item": recommender.ids, "vector": vectors},
                                                       {"item": pl.String, "vector": kind}))
    if sessions is None:
        return
    from pyarrow import parquet

    rows, writer = read_sessions(sessions), None
    with replacing(folder / "sessions.parquet") as temporary:
        while batch := list(itertools.islice(rows, ROWS)):
            names, clicks = zip(*batch)
            vectors = pl.Series("vector", recommender.session_vectors(clicks), kind)
            table = pl.DataFrame([pl.Series("session", names), vectors]).to_arrow()
            writer = writer or parquet.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is None:
            raise UserError(f"{sessions} holds no session: name a file that has some")
        writer.close()
