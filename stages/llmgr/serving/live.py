"""A recommender that follows its folder: a new package replaces the old one between two requests."""
from __future__ import annotations

import threading
from pathlib import Path

from llmgr.runtime.console import say
from llmgr.runtime.errors import UserError
from llmgr.serving.package import CONFIG
from llmgr.serving.recommender import Recommender


class Live:
    """The recommender of a folder's current package.

    When the folder changes, a thread reads it while the old package answers. A damaged package is refused in one line
    on standard error, and the old one stays until the folder changes again.
    """

    def __init__(self, folder: str | Path) -> None:
        """Load `folder`; UserError as `Recommender.load`."""
        self.folder, self.lock = Path(folder), threading.Lock()
        self.met = self._mark()
        self.now = Recommender.load(self.folder)

    def current(self) -> Recommender:
        """The recommender to answer a request with; looks whether the folder changed."""
        if self._mark() not in (None, self.met) and self.lock.acquire(blocking=False):
            threading.Thread(target=self._reload, daemon=True).start()
        return self.now

    def _reload(self) -> None:
        try:
            mark = self._mark()
            if mark is None:  # between two renames of a folder that is being replaced
                return
            try:
                self.now = Recommender.load(self.folder)
                say(f"recommender: {self.folder} was replaced and is served now")
            except UserError as error:
                if self._mark() != mark:
                    return  # read while it was being replaced: the next request reads it again
                say(f"recommender: the package that was loaded before stays: {error}")
            self.met = mark
        finally:
            self.lock.release()

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            about = (self.folder / CONFIG).stat()
        except OSError:
            return None
        return about.st_ino, about.st_mtime_ns, about.st_size
