"""Recommendations for sessions of item ids: `Recommender.load(folder).recommend(sessions)`."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmgr.runtime.errors import UserError
from llmgr.serving.new_items import blocking, with_items, without_items
from llmgr.serving.package import Package, load_package, write_package
from llmgr.serving.scoring import PARTS, Scorer
from llmgr.sessions.tensors import Sessions

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

    from llmgr.sessions.graphs import GraphBatch

CELLS = 2**22  # scores held at a time, so that a batch of any size fits
MOST = 512  # sessions scored at a time
NAMED = 100  # unknown ids of a session that are named at most


@dataclass(frozen=True)
class Read:
    """A session's clicks as item numbers, and what the catalogue does not know of it."""

    numbers: list[int]
    unknown: list[str]


class Recommender:
    """Ranks the items of a package for sessions. It never changes, so that threads may share it: what changes its items
    gives another recommender."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.scorer = Scorer(package)
        items = package.items
        self.ids, self.titles = items["item"].to_list(), items["title"].to_list()
        self.number = {item: number for number, item in enumerate(self.ids, 1) if item}
        blocked = torch.from_numpy(items["blocked"].to_numpy().copy())
        self.never = torch.cat((torch.ones(1, dtype=torch.bool), blocked)).nonzero()[:, 0]
        self.popular = torch.cat((torch.zeros(1), torch.from_numpy(items["count"].to_numpy().copy()).float()))
        self.longest = package.config["max_session"]

    @classmethod
    def load(cls, folder: str | Path) -> Recommender:
        """The recommender of a folder that the stage `package` wrote; UserError as `load_package`."""
        return cls(load_package(folder))

    def save(self, folder: str | Path) -> None:
        """Write its package; a server that follows `folder` answers with it from the next request on."""
        write_package(folder, self.package)

    def add_items(self, items: pl.DataFrame) -> Recommender:
        """A recommender with new items, or with new texts of known ones; see `llmgr.serving.new_items.with_items`."""
        return Recommender(with_items(self.package, items))

    def remove_items(self, items: Sequence[str]) -> Recommender:
        """A recommender that neither recommends `items` nor knows their clicks; UserError where it lacks one of
        them."""
        return Recommender(without_items(self.package, items))

    def block_items(self, items: Sequence[str], blocked: bool = True) -> Recommender:
        """A recommender that does not recommend `items`, though their clicks count; with `blocked=False` it does
        again."""
        return Recommender(blocking(self.package, items, blocked))

    def recommend(self, sessions: Sequence[Sequence[str]], k: int = 20, exclude_seen: bool = True,
                  explain: bool = False) -> pl.DataFrame:
        """The `k` best items for each session, a list of item ids with the oldest click first. A row a session.

        Columns: items, titles and scores are lists, best first, equal scores in the catalogue's order; they are shorter
        than `k` where the catalogue ends. unknown lists the first 100 ids that the catalogue lacks; the other clicks
        count. popular is true where no click is known: then the items are the most popular ones, and a score is how
        often the item was a training target. With `exclude_seen` no clicked item is recommended. `explain` adds a
        column for each of `llmgr.serving.scoring.PARTS`, which add up to the score, and because: the click that adds
        most to transitions and text, "" where none does. UserError where a session is not a list of ids, or `k` is not
        a whole number above 0.
        """
        import polars as pl

        check_k(k)
        read = [self._read(session) for session in checked(sessions)]
        size = max(1, min(MOST, CELLS // len(self.popular)))
        rows: list[dict[str, Any]] = []
        for start in range(0, len(read), size):
            rows += self._rows(read[start:start + size], k, exclude_seen, explain)
        scores = {name: pl.List(pl.Float64) for name in PARTS}
        more = {"because": pl.List(pl.String), **{name: scores[name] for name in PARTS}} if explain else {}
        return pl.DataFrame(rows, {"items": pl.List(pl.String), "titles": pl.List(pl.String),
                                   "scores": pl.List(pl.Float64), "unknown": pl.List(pl.String),
                                   "popular": pl.Boolean, **more})

    def session_vectors(self, sessions: Sequence[Sequence[str]]) -> list[list[float]]:
        """A vector for each session, empty where no click is known; see `Scorer.item_vectors`."""
        numbers = [self._read(session).numbers for session in checked(sessions)]
        known = [session for session in numbers if session]
        vectors = iter(self.scorer.session_vectors(self._graphs(known)).tolist() if known else ())
        return [next(vectors) if session else [] for session in numbers]

    def _read(self, session: Sequence[str]) -> Read:
        numbers = [self.number.get(item, 0) for item in session]
        unknown = dict.fromkeys(item for item, number in zip(session, numbers) if not number)
        return Read([number for number in numbers if number], list(unknown)[:NAMED])

    @torch.inference_mode()
    def _rows(self, read: list[Read], k: int, exclude_seen: bool, explain: bool) -> list[dict[str, Any]]:
        warm = [index for index, session in enumerate(read) if session.numbers]
        graphs: GraphBatch | None = None
        parts: dict[str, Tensor] = {}
        if warm:
            graphs = self._graphs([read[index].numbers for index in warm])
            made = self.scorer(graphs)
            if explain:
                parts = self.scorer.parts(graphs)
        if len(warm) < len(read):
            scores = self.popular.repeat(len(read), 1)
            scores[torch.tensor(warm, dtype=torch.long)] = made if warm else scores[:0]
        else:
            scores = made
        scores.index_fill_(1, self.never, -torch.inf)
        if exclude_seen:
            pairs = [(row, number) for row, session in enumerate(read) for number in dict.fromkeys(session.numbers)]
            if pairs:
                scores[tuple(torch.tensor(pairs).T)] = -torch.inf
        best, item = strongest(scores, min(int(k), scores.shape[1] - 1))
        rows = [self._row(session, best[row], item[row]) for row, session in enumerate(read)]
        if explain:
            self._explain(rows, read, warm, graphs, item, parts)
        return rows

    def _graphs(self, numbers: list[list[int]]) -> GraphBatch:
        recent = [session[-self.longest:] for session in numbers]
        length = torch.tensor([len(session) for session in recent])
        items = torch.zeros(len(recent), int(length.max()), dtype=torch.int32)
        for row, session in enumerate(recent):
            items[row, :len(session)] = torch.tensor(session)
        row = torch.arange(len(recent))
        return Sessions(items, row, length, torch.ones_like(row)).graphs(row)

    def _row(self, session: Read, best: Tensor, item: Tensor) -> dict[str, Any]:
        real = int((best > -torch.inf).sum())
        numbers = item[:real].tolist()
        return {"items": [self.ids[number - 1] for number in numbers],
                "titles": [self.titles[number - 1] for number in numbers], "scores": best[:real].tolist(),
                "unknown": session.unknown, "popular": not session.numbers}

    def _explain(self, rows: list[dict[str, Any]], read: list[Read], warm: list[int], graphs: GraphBatch | None,
                 item: Tensor, parts: dict[str, Tensor]) -> None:
        for row in rows:
            zeros = [0.0] * len(row["items"])
            row |= {"because": [""] * len(zeros), **dict.fromkeys(PARTS, zeros), "popularity": row["scores"]}
        if not warm:
            return
        item = item[torch.tensor(warm)]
        because = self.scorer.because(graphs, item).tolist()
        by_part = {name: part.gather(1, item).tolist() for name, part in parts.items()}
        for index, row in enumerate(warm):
            size = len(rows[row]["items"])
            rows[row] |= {name: values[index][:size] for name, values in by_part.items()}
            rows[row]["because"] = [self.ids[number - 1] if number else "" for number in because[index][:size]]


def strongest(scores_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest scores and their columns, both [R, k], best first; of equal scores the lower column first."""
    item_RK = scores_RV.topk(k, 1).indices.sort(1).values  # topk promises no order among equals
    least_R1 = scores_RV.gather(1, item_RK).amin(1, keepdim=True)
    split = ((scores_RV >= least_R1).sum(1) > k) & (least_R1[:, 0] > -torch.inf)  # equals within and without
    if split.any():
        item_RK[split] = scores_RV[split].sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    best_RK, order_RK = scores_RV.gather(1, item_RK).sort(dim=1, descending=True, stable=True)
    return best_RK, item_RK.gather(1, order_RK)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_k(k: Any) -> None:
    """Raise UserError where `k` is not a whole number above 0."""
    if not is_whole(k) or k < 1:
        raise UserError(f"k={k!r} must be a whole number of at least 1")


def checked(sessions: Any) -> list[list[str]]:
    """Sessions as lists of ids, with whole numbers as ids; UserError names the first session that is not a list."""
    if isinstance(sessions, (str, bytes)) or not isinstance(sessions, (list, tuple)):
        raise UserError('sessions must be a list of sessions, each a list of item ids, such as [["B0001", "B0002"]]')
    return [_ids(session, number) for number, session in enumerate(sessions, 1)]


def _ids(session: Any, number: int) -> list[str]:
    if isinstance(session, (str, bytes)) or not isinstance(session, (list, tuple)):
        raise UserError(f"session {number} must be a list of item ids, not {type(session).__name__}")
    ids = []
    for item in session:
        if not isinstance(item, str) and not is_whole(item):
            raise UserError(f"session {number} holds {str(item)[:40]!r}, which is no item id: ids are texts")
        ids.append(str(item))
    return ids
