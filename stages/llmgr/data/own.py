"""Interactions and items from files of one's own: Parquet, CSV, TSV, JSON lines or RecBole's atomic files.

Columns are those that `data.columns` names, else found by their usual names. A row that cannot be used is counted by
reason and skipped.
"""
from __future__ import annotations

import contextlib
import difflib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr.data.amazon import checked, dated, lines
from llmgr.data.files import ending, is_json
from llmgr.runtime.errors import UserError

if TYPE_CHECKING:
    import polars as pl

TEXTS = ("title", "brand", "category", "description")
USUAL = {
    "user": ("user_id", "user", "userid", "uid", "reviewerID", "visitor_id", "visitor", "customer_id", "customer",
             "client_id", "account_id", "member_id"),
    "item": ("item_id", "item", "itemid", "iid", "parent_asin", "asin", "product_id", "product", "sku", "article_id",
             "movie_id", "book_id"),
    "time": ("timestamp", "time", "ts", "unixReviewTime", "event_time", "created_at", "datetime", "date", "t_dat"),
    "rating": ("rating", "overall", "stars", "score"),
    "session": ("session_id", "session"),
    "title": ("title", "name", "item_name", "product_name", "prod_name", "movie_title"),
    "brand": ("brand", "manufacturer", "store", "brand_name", "vendor"),
    "category": ("category", "categories", "category_name", "genres", "genre", "class", "main_category",
                 "product_type_name", "department"),
    "description": ("description", "text", "features", "detail_desc", "feature"),
}
"""Names by which a column is found, the likeliest first; case, spaces, - and _ do not count."""
BATCH = 200_000
NUMBER = r"^\s*\d+(\.\d*)?([eE]\+?\d{1,2})?\s*$"


def table(path: Path) -> pl.LazyFrame:
    """A tabular file as it is read, lazily: texts, but for Parquet, whose types stay."""
    import polars as pl

    kind = ending(path)
    if kind == ".parquet":
        return pl.scan_parquet(path)
    header = (next(lines(path)) or b"").decode("utf-8-sig", "replace")
    separator = "\t" if kind in (".tsv", ".inter", ".item") else max(",;\t|", key=header.count)
    frame = pl.scan_csv(path, separator=separator, infer_schema=False, truncate_ragged_lines=True,
                        encoding="utf8-lossy", quote_char='"' if kind == ".csv" else None)
    names = {name: name.strip().strip("\ufeff") for name in frame.collect_schema().names()}
    if kind in (".inter", ".item"):
        names = {name: plain.partition(":")[0] for name, plain in names.items()}
    return frame.rename(names)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """UserError where the file's inside is damaged."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path.name} cannot be read ({reason}): write it anew in the format that its ending says"
                        ) from None


def names_of(path: Path) -> list[str]:
    """The columns of a table, or the keys of the first objects of a JSON-lines file."""
    if not is_json(path):
        return table(path).collect_schema().names()
    names: dict[str, None] = {}
    for number, record in enumerate(objects(path)):
        names |= dict.fromkeys(record or ())
        if number == 1000:
            break
    return list(names)


def objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON-lines file; None for a line that holds none."""
    import orjson

    for line in lines(path):
        if line is not None and line.isspace():
            continue
        try:
            record = orjson.loads(line.removeprefix(b"\xef\xbb\xbf")) if line is not None else None
        except orjson.JSONDecodeError:
            record = None
        yield record if type(record) is dict else None


def column(path: Path, names: list[str], role: str, given: str | None, key: str = "") -> str | None:
    """The column of a role: the one that a parameter names, else the likeliest of the usual names, else None."""
    key = key or f"data.columns.{role}"
    if given is not None:
        if given in names:
            return given
        near = difflib.get_close_matches(given, names, 1, 0.0)
        raise UserError(f"{path.name} has no column {given} ({key}); the nearest is {near[0] if near else 'none'}: it "
                        f"has {listed(names)}; set {key} to one of them")
    plain = {re.sub(r"[\W_]", "", name).lower(): name for name in reversed(names)}
    usual = (plain.get(re.sub(r"[\W_]", "", name).lower()) for name in USUAL[role])
    return next((name for name in usual if name), None)


def required(path: Path, names: list[str], role: str, given: str | None) -> str:
    """As `column`; UserError names the nearest columns where there is none."""
    if name := column(path, names, role, given):
        return name
    ratios = {name: max(difflib.SequenceMatcher(None, name.lower(), usual.lower()).ratio() for usual in USUAL[role])
              for name in names}
    nearest = max(ratios, key=ratios.__getitem__) if ratios else "NAME"
    raise UserError(f"{path.name} has no column that is known as the {role}; it has {listed(names)}: set "
                    f"data.columns.{role}, such as -S data.columns.{role}={nearest}")


def listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def text_of(name: str, kind: pl.DataType) -> pl.Expr:
    """A column as text: whole numbers without a point, times as microseconds since 1970, lists as null."""
    import polars as pl

    value = pl.col(name)
    if kind == pl.String or kind.is_integer():
        return value.cast(pl.String)
    if kind.is_float():
        whole = value.cast(pl.Int64, strict=False)
        return pl.when(whole == value).then(whole.cast(pl.String)).otherwise(value.cast(pl.String))
    if isinstance(kind, pl.Datetime) or kind == pl.Date:
        return value.cast(pl.Datetime("us")).dt.epoch("us").cast(pl.String)
    return value.cast(pl.String) if kind in (pl.Categorical, pl.Enum) else pl.lit(None, pl.String)


def read_interactions(path: Path, given: dict[str, str | None], session: str | None, max_bad_share: float
                      ) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Interactions as `amazon.read_reviews` gives them; `user` holds the values of the column `session` if given.

    Times are numbers of any unit (`times.in_one_unit`) or ISO dates. Also the counts, and the `columns` taken.
    """
    import polars as pl

    with readable(path):
        names = names_of(path)
    user = column(path, names, "session", session, "data.session") if session else required(
        path, names, "user", given["user"])
    taken = {"user": user, "item": required(path, names, "item", given["item"]),
             "time": required(path, names, "time", given["time"]), "rating": column(path, names, "rating", None)}
    roles = {role: name for role, name in taken.items() if name}
    bad: Counter[str] = Counter()
    if is_json(path):
        raw, total = json_columns(path, roles, bad)
    else:
        frame = table(path)
        kinds = frame.collect_schema()
        texts = {role: text_of(name, kinds[name]) for role, name in roles.items()}
        with readable(path):
            raw = frame.select(**texts).with_row_index("line").collect(engine="streaming")
        total = raw.height
    raw = raw.with_columns(pl.col("user", "item").str.strip_chars().replace("", None), pl.col("line").cast(pl.Int64),
                           timestamp=moments(raw["time"]))
    for role, name in (("user", user), ("item", taken["item"]), ("timestamp", taken["time"])):
        missing = raw[role].is_null()
        if missing.any():
            bad[f"{name} missing or unreadable"] += int(missing.sum())
            raw = raw.filter(~missing)
    rating = pl.col("rating").cast(pl.Float32, strict=False) if "rating" in raw.columns else pl.lit(None, pl.Float32)
    result, counts = dated(raw.select("user", "item", "timestamp", rating=rating, line="line"), taken["time"], bad)
    return result, checked(path, total, bad, max_bad_share) | {"times": counts, "columns": roles}


def json_columns(path: Path, roles: dict[str, str], bad: Counter[str]) -> tuple[pl.DataFrame, int]:
    """Columns by role as texts, and `line`, of a JSON-lines file; and how many lines it has."""
    import polars as pl

    def text(value: Any) -> str | None:
        if type(value) is float and value.is_integer():
            return str(int(value))
        return str(value) if type(value) in (str, int, float) else None

    schema = {**dict.fromkeys(roles, pl.String), "line": pl.Int64}
    frames, total = [pl.DataFrame(schema=schema)], 0
    columns: dict[str, list] = {name: [] for name in schema}
    fields = [(name, columns[role]) for role, name in roles.items()]
    for number, record in enumerate(objects(path)):
        total += 1
        if record is None:
            bad["no JSON object"] += 1
            continue
        columns["line"].append(number)
        for name, values in fields:
            value = record.get(name)
            values.append(value if type(value) is str else text(value))
        if len(columns["line"]) == BATCH:
            frames.append(pl.DataFrame(columns, schema=schema))
            for values in columns.values():
                values.clear()
    return pl.concat([*frames, pl.DataFrame(columns, schema=schema)], rechunk=True), total


def moments(texts: pl.Series) -> pl.Series:
    """Times as whole numbers: a number as it is (one with a fraction in microseconds), an ISO date in microseconds."""
    import polars as pl

    text = pl.col("t").str.strip_chars()
    number = pl.when(text.str.contains(NUMBER)).then(text.cast(pl.Float64, strict=False))
    large = pl.when(number < 1e11).then(number * 1e6).when(number < 1e14).then(number * 1e3).otherwise(number)
    fraction = pl.when(number < 1e8).then(number).otherwise(large).round().cast(pl.Int64, strict=False)
    offset = text.str.extract(r"[\d:.]([+-]\d\d:?\d\d)$").str.replace(":", "")
    behind = pl.when(offset.str.starts_with("-")).then(-1).otherwise(1) * (
        offset.str.slice(1, 2).cast(pl.Int64) * 60 + offset.str.slice(3, 2).cast(pl.Int64)) * 60_000_000
    plain = (text.str.replace(r"([\d:.])[+-]\d\d:?\d\d$", "${1}").str.replace(r"\s*(Z|UTC|GMT)$", "")
             .str.replace("T", " ").str.replace_all("/", "-"))
    dates = [plain.str.to_datetime(form, time_unit="us", strict=False)
             for form in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")]
    date = pl.coalesce(dates).dt.epoch("us") - behind.fill_null(0)
    whole = text.cast(pl.Int64, strict=False)
    return pl.select(t=texts).select(
        t=pl.when(whole >= 0).then(whole).when(number.is_not_null()).then(fraction).otherwise(date))["t"]


def read_items(path: Path, given: dict[str, str | None], wanted: set[str], max_bad_share: float, beside: bool = False
               ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Raw texts of the `wanted` items, as `amazon.read_metadata` gives them; the first row of an item counts.

    A category path is a list, or a text with > or | between its names. `beside` the interactions a text may be what a
    user said of an item, and is no description unless `given` names it.
    """
    with readable(path):
        names = names_of(path)
    item_given = given["item"] if given["item"] in names else None
    item = column(path, names, "item", item_given) or (column(path, names, "item", "id") if "id" in names else None)
    item = item or required(path, names, "item", given["item"])
    texts = {role: None if beside and role == "description" and not given[role] else
             column(path, names, role, given[role]) for role in TEXTS}
    if not any(texts.values()):
        raise UserError(f"{path.name} has no column known as title, brand, category or description; it has "
                        f"{listed(names)}: set data.columns.title to the one that names an item")
    rows: dict[str, dict[str, Any]] = {}
    bad: Counter[str] = Counter()
    total = repeated = untitled = 0
    other = ""
    for record in rows_of(path, [item, *filter(None, texts.values())]):
        total += 1
        name = record.get(item) if record else None
        if isinstance(name, float) and name.is_integer():
            name = int(name)
        name = str(name).strip() if isinstance(name, (str, int)) and not isinstance(name, bool) else ""
        if not name:
            bad[f"{item} missing or unreadable" if record is not None else "no JSON object"] += 1
        elif name in rows:
            repeated += 1
        elif name not in wanted:
            other = other or name
        else:
            pieces = {role: words(record.get(field)) if field else [] for role, field in texts.items()}
            untitled += not pieces["title"]
            category = [part for piece in pieces["category"] for part in re.split(r"\s*[>|]\s*", piece)]
            rows[name] = {"title": " ".join(pieces["title"]), "brand": " ".join(pieces["brand"]),
                          "category": " > ".join(filter(None, category)), "description": pieces["description"]}
    counts = checked(path, total, bad, max_bad_share)
    return rows, counts | {"repeated": repeated, "titles_missing_or_no_text": untitled, "other_item": other,
                           "columns": {"item": item, **{role: name for role, name in texts.items() if name}}}


def rows_of(path: Path, names: list[str]) -> Iterator[dict[str, Any] | None]:
    """Rows as mappings with these columns at least; None for a line that holds none."""
    if is_json(path):
        yield from objects(path)
        return
    with readable(path):
        for batch in table(path).select(*dict.fromkeys(names)).collect_batches(chunk_size=BATCH, maintain_order=True):
            yield from batch.iter_rows(named=True)


def words(value: Any) -> list[str]:
    """The texts in a value: itself, those of a list, or a number's digits."""
    if isinstance(value, (list, tuple)):
        return [text for entry in value for text in words(entry)]
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return [str(value).strip()] if str(value).strip() else []
    return []
