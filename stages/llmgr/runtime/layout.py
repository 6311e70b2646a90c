"""Where a pipeline keeps its files."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """The folders of data, models and reports, and the paths of the files in them. Nothing else in the library has
    any."""

    data: str | Path
    models: str | Path
    reports: str | Path

    @property
    def items(self) -> Path:
        """The catalogue: ids from 1 to V, titles, brands, texts."""
        return Path(self.data, "core", "items.parquet")

    @property
    def unseen_items(self) -> Path:
        """The items that are held out of training, with ids from V+1; there under `filter.unseen_share` alone."""
        return Path(self.data, "core", "unseen_items.parquet")

    def sessions(self, split: str) -> Path:
        """The sessions of `train`, `valid` or `test`, or `unseen`: those that end in an item held out of training."""
        return Path(self.data, "sessions", f"{split}.parquet")

    @property
    def backbone(self) -> Path:
        """The language model of the prompts, its tokenizer and backbone.json."""
        return Path(self.models, "backbone")

    @property
    def text_encoder(self) -> Path:
        """The text encoder, its tokenizer, text_encoder.json and the items' text vectors."""
        return Path(self.models, "text_encoder")

    @property
    def item_vectors(self) -> Path:
        """The items' text vectors [V+1, H]."""
        return self.text_encoder / "item_text.safetensors"

    def encoder(self, name: str) -> Path:
        """A pretrained encoder or control."""
        return Path(self.models, "encoders", name)

    @property
    def embeddings(self) -> Path:
        """LLMGR's base: the encoder that it reads."""
        return Path(self.models, "embeddings")

    @property
    def folds(self) -> Path:
        """The base without each fold of the users."""
        return Path(self.models, "folds")

    @property
    def tower(self) -> Path:
        """The text tower, over all users and without each fold of them."""
        return Path(self.models, "tower")

    @property
    def aligned(self) -> Path:
        """LLMGR after stage 1."""
        return Path(self.models, "aligned")

    @property
    def tuned(self) -> Path:
        """LLMGR after stage 2."""
        return Path(self.models, "tuned")

    @property
    def gates(self) -> Path:
        """The gates' weights."""
        return Path(self.models, "gates")

    @property
    def recommender(self) -> Path:
        """The package for production."""
        return Path(self.models, "recommender")

    def ranks(self, model: str) -> Path:
        """A model's ranks of the test targets."""
        return Path(self.reports, "ranks", f"{model}.parquet")

    def metrics(self, name: str) -> Path:
        """The figures of a stage; those of an encoder are `encoders/NAME`, what something cost is `cost/NAME`."""
        return Path(self.reports, "metrics", f"{name}.json")


PIPELINE = Layout("data", "models", "reports")
"""The folders that dvc.yaml names, relative to the repository's root."""
