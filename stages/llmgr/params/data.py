"""The data: where they come from, what is taken of them, how they are divided."""
from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmgr.params.types import Count, Flag, Mapped, Natural, OptionalText, Positive, Seed, Share, Text, Whole, dataclass
from llmgr.runtime.errors import UserError


@dataclass
class Columns:
    """The columns of `data.interactions` and `data.items`; null takes the usual names."""

    user: OptionalText
    """Who clicked."""
    item: OptionalText
    """Which item, in both files; where `data.items` has no such column, its usual names are tried."""
    time: OptionalText
    """When: a number of any unit, or an ISO date."""
    title: OptionalText
    """An item's title."""
    brand: OptionalText
    """Its brand or maker."""
    category: OptionalText
    """Its category: a name, or a path as a list or with > or | between."""
    description: OptionalText
    """Its description."""


@dataclass
class Data:
    """Where the data comes from."""

    dataset: Text
    """`sample`, a name of the catalogue (`beauty`, `office`, `music`, `pantry`, ...), `RELEASE:Category`, or `files`:
    `data.interactions` and `data.items`."""
    interactions: OptionalText
    """With `dataset=files`: Parquet, CSV, TSV, JSON lines or RecBole's .inter of who clicked what and when."""
    items: OptionalText
    """With `dataset=files`: the items' texts, in any of these formats; null takes them from `interactions`."""
    session: OptionalText
    """With `dataset=files`: the column of `interactions` that says which rows are one session; null: a user's are."""
    columns: Columns
    mirror: OptionalText
    """Folder or URL that holds the files under their official names; null takes the official host."""
    sha256: Annotated[dict[Text, Text], Mapped]
    """Expected digests, file name to hex; a file that differs is refused."""
    max_session: Count
    """Items of a session that a model sees, the most recent ones."""
    retries: Natural
    """Further attempts after a failed request, with exponential back-off."""
    timeout: Positive
    """Seconds without a byte after which a request is given up."""
    sample_users: Count
    """Users that the simulator of the embedded sample draws."""
    sample_items: Count
    """Items of the embedded sample."""
    sample_seed: Seed
    """Seed of the simulator; separate from `seed`, so that another seed trains on the same data and downloads
    nothing."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.dataset == "files" and not self.interactions:
            raise UserError("data.dataset=files needs data.interactions: set it to the file of who clicked what and "
                            "when, such as -S data.interactions=clicks.csv")
        return self


@dataclass
class Filter:
    """What is removed from the data, and how item texts are cleaned."""

    core: Count
    """Least number of interactions of every user and item (k of the k-core)."""
    duplicates: Literal["first", "last", "keep"]
    """Which of several interactions of one user with one item stays."""
    textless: Literal["keep", "drop"]
    """Items without any text: `keep` them with the text "unknown item", or `drop` them before the k-core."""
    max_chars: Count
    """Length cap of an item's cleaned text, cut at a word."""
    template_items: Annotated[Whole, Field(ge=2)]
    """A description sentence that at least so many items share is a template, not a description, and is removed."""
    max_bad_share: Share
    """Largest share of malformed lines that is skipped instead of refused."""
    max_textless_share: Share
    """Largest share of items without text; more of them are refused, since most likely the ids do not match."""
    unseen_share: Annotated[Share, Field(lt=0.5)]
    """Share of the core's items that no stage learns from, nor from their interactions: `evaluate` adds them to the
    package by their texts and ranks the sessions that end in one of them. 0: none."""


@dataclass
class Split:
    """How sessions are divided into training, validation and test."""

    ties: Literal["hash", "file"]
    """Order among equal timestamps: a seeded hash of (user, item), or the order of the file (common, leaks)."""
    seed: Seed
    """Key of that hash; separate from `seed`, so that another seed trains and tests on the same sessions."""
    selection: Flag
    """For choosing parameters: a session's last training item is not a target, so that validation sessions, like test
    sessions, end in a click that never was one. Models that overfit their sessions often gain less. Test is not scored
    then."""
