"""The package that recommendations come from: a folder written whole, checked by its digests, memory-mapped.

`config.json` has the format, the settings of scoring, the digests of what the package was made of and of its own files;
`items.parquet` a row an item; `tensors.safetensors` everything else.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr.runtime.artifacts import digest, replacing_folder, save_tensors, write_json, write_table
from llmgr.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

FORMAT = 1
CONFIG, ITEMS, TENSORS = "config.json", "items.parquet", "tensors.safetensors"
AGAIN = "write the package again with `dvc repro package`"


@dataclass(frozen=True)
class Package:
    """Everything that a request needs. `items` has the columns item, title, count (as a training target) and blocked.

    `tensors` by name: `transitions.{value,item,start}` (the item-item matrix in rows of its strongest entries),
    `weights.*` by band of counts, `base` and `tower` [V+1, width], `encoder.*`, and what `llmgr.serving.student` and
    `llmgr.serving.new_items` add.
    """

    config: dict[str, Any]
    items: pl.DataFrame
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of the name."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def write_package(folder: str | Path, package: Package) -> None:
    """Write the package into `folder`, whole or not at all; equal packages give equal bytes."""
    with replacing_folder(folder) as temporary:
        write_table(temporary / ITEMS, package.items)
        save_tensors(temporary / TENSORS, package.tensors)
        files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": digest(temporary / name)}
                 for name in (ITEMS, TENSORS)}
        write_json(temporary / CONFIG, {"format": FORMAT, **package.config, "files": files})


def load_package(folder: str | Path) -> Package:
    """Read and check a package; UserError where it is missing, damaged or of another format."""
    import polars as pl
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _config(folder)
    try:
        for name, written in config["files"].items():
            path = folder / name
            if path.stat().st_size != written["bytes"] or digest(path) != written["sha256"]:
                raise UserError(f"{path} is not what was written: {AGAIN}")
        items, tensors = pl.read_parquet(folder / ITEMS), load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {AGAIN}") from None
    except (KeyError, TypeError, AttributeError, OSError, SafetensorError, pl.exceptions.PolarsError):
        raise UserError(f"{folder} is damaged: {AGAIN}") from None
    return Package({key: value for key, value in config.items() if key not in ("format", "files")}, items, tensors)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
        version = config["format"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no package: {AGAIN}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: {AGAIN}") from None
    if version != FORMAT:
        raise UserError(f"{folder} has format {version} and this version of llmgr reads {FORMAT}: {AGAIN}")
    return config
