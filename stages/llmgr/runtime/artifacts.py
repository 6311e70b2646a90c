"""Files that appear whole or not at all, their digests, and clear errors where they are damaged."""
from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block succeeds and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove the temporary files of `name` in `folder` that ended processes left; those of running ones stay."""
    for leftover in folder.glob(f".{name}.tmp"):
        writer = leftover.name.split(".")[-2]
        if writer == str(os.getpid()) or not (writer.isdigit() and _runs(int(writer))):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with contextlib.suppress(OSError):  # dead, but its parent has not asked for its status yet
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, whole, when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, f"{path.name}*")
    temporary, former = (path.with_name(f".{path.name}{kind}.{os.getpid()}.tmp") for kind in ("", ".former"))
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.replace(former)
        temporary.replace(path)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Write `content` atomically as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` atomically as indented JSON with keys in the given order; floats keep six digits."""
    write_text(path, json.dumps(rounded(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file that an earlier stage wrote; UserError where it is missing or damaged."""
    content = require(path).read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise damaged(path, error) from None


def write_table(path: str | Path, frame: pl.DataFrame) -> None:
    """Write a polars frame atomically: Parquet, or CSV where the name ends so."""
    buffer = io.BytesIO()
    frame.write_csv(buffer) if Path(path).suffix == ".csv" else frame.write_parquet(buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read a Parquet file that an earlier stage wrote, or some of its columns, as a polars frame.

    UserError where it is missing or damaged.
    """
    import polars as pl

    try:
        return pl.read_parquet(require(path), columns=columns)
    except pl.exceptions.ComputeError as error:
        raise damaged(path, error) from None


def save_tensors(path: str | Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically as safetensors; equal tensors give equal bytes."""
    from safetensors.torch import save

    write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}, metadata))


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Read a safetensors file onto the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(require(path))
    except SafetensorError as error:
        raise damaged(path, error) from None


def damaged(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({' '.join(str(error).split())}): delete it and run `dvc repro`")


def require(path: str | Path) -> Path:
    """`path`, or a UserError that names the missing file and how to get it."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is missing: run `dvc repro` so that the stage that writes it runs first")
    return path


def digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, or of a folder's relative names and contents."""
    path = Path(path)
    if path.is_dir():
        total = hashlib.new(algorithm)
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            total.update(f"{file.relative_to(path).as_posix()}\0{digest(file, algorithm)}\n".encode())
        return total.hexdigest()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def rounded(value: Any) -> Any:
    """A value as `write_json` keeps it: every float in it to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
