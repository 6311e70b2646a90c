"""Files of one's own before they are read: where they lie, whether they are what their ending says, DVC's watch."""
from __future__ import annotations

from pathlib import Path

from llmgr.data.amazon import lines
from llmgr.runtime import resume
from llmgr.runtime.errors import UserError
from llmgr.runtime.masking import masked

JSON_LINES = (".jsonl", ".ndjson", ".json")
ENDINGS = (".parquet", ".csv", ".tsv", *JSON_LINES, ".inter", ".item")
NAMED = ".parquet, .csv, .tsv, .jsonl, .inter or .item, or one of them but .parquet with .gz"


def located(given: str, key: str) -> Path:
    """The file that a parameter names, from the repository's root or from here; UserError where there is none."""
    paths = [base / Path(given).expanduser() for base in (resume.home(), Path())]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"{key}={masked(given, paths=False)} is no file: give its path, from the repository's root or "
                        "absolute")
    return path


def watch(files: dict[str, Path], folder: Path) -> None:
    """Link the files, by name, into `folder`, in place of earlier links.

    The download stage depends on that folder, so that DVC notices when a file changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for link in folder.iterdir():
        if link.is_symlink():
            link.unlink()
    for name, path in files.items():
        (folder / name).symlink_to(path.resolve())


def is_json(path: Path) -> bool:
    """Whether a file holds JSON lines, by its ending."""
    return ending(path) in JSON_LINES


def ending(path: Path) -> str:
    """The ending that says what a file is, without .gz; UserError where it is none of those that can be read."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in ENDINGS or (suffix == ".parquet" and path.name.endswith(".gz")):
        raise UserError(f"{path.name} has an ending that says nothing of its format: name it {NAMED}")
    return suffix


def check_format(path: Path) -> None:
    """UserError where a file is not what its ending says, or holds nothing."""
    kind, zipped = ending(path), path.name.endswith(".gz")
    with path.open("rb") as handle:
        head = handle.read(8)
    if not head:
        raise UserError(f"{path.name} is empty: give a file with rows")
    signs = {"Parquet": b"PAR1", "gzip": b"\x1f\x8b", "a zip archive or an Excel file": b"PK\x03\x04",
             "SQLite": b"SQLite f", "HTML": b"<"}
    expected = "gzip" if zipped else "Parquet" if kind == ".parquet" else None
    actual = next((name for name, sign in signs.items() if head.startswith(sign)), None)
    if actual != expected:
        raise UserError(f"{path.name} is {actual or 'plain text'}, not {expected or 'text'} as its ending says: name "
                        f"it after what it is ({NAMED})")
    if kind == ".parquet":
        return
    first = next((line for line in lines(path) if line is None or not line.isspace()), b"")
    if not first:
        raise UserError(f"{path.name} is empty: give a file with rows")
    start = first.lstrip(b"\xef\xbb\xbf \t")[:1]
    if kind in JSON_LINES and start != b"{":
        raise UserError(f"{path.name} does not hold one JSON object a line, as its ending says: write it so (jq -c "
                        "'.[]' takes a list apart), or name it after what it is")
    if kind not in JSON_LINES and start in (b"{", b"["):
        raise UserError(f"{path.name} looks like JSON, not like the table that its ending says: name it .jsonl")
    if kind in (".inter", ".item") and b":" not in first:
        raise UserError(f"{path.name} has no header of name:type, as RecBole's atomic files have: add it, or name the "
                        "file .tsv")
