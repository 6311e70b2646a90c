"""Items added, changed and removed without training: each function returns a new package.

A new item has a text and no clicks. The text tower's stored tokens give its vector. A linear map of that vector, fitted
to the trained items, replaces the vectors that training on clicks would have given. The similarity of words replaces
its row and column of the item-item matrix. Its band is that of items that were never a target.

Shapes: N new items, T stored tokens.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_array, hstack, vstack
from torch import Tensor
from torch.nn import functional as F

from llmgr.runtime.errors import UserError
from llmgr.serving.package import Package
from llmgr.text.words import WORD

if TYPE_CHECKING:
    import polars as pl

RIDGE = 1.0  # of the maps from text vectors to the others
MAPPED = ("base", "student.table")  # vectors that a new item gets by a map of its text vector


def text_tensors(package: Package, tower: dict[str, Tensor], token_T: Tensor, tokenizer: bytes) -> dict[str, Tensor]:
    """The tensors that read new texts: the token tower, and the maps from its vectors to the package's other vectors.

    `token_T` are the tokens that `tower` has vectors for; `tokenizer` is the content of a tokenizer.json.
    """
    tensors = {"reader.token": token_T, "reader.vector": tower["means.weight"], "reader.head.weight":
               tower["head.weight"], "reader.head.bias": tower["head.bias"], "reader.tokenizer": as_bytes(tokenizer)}
    text_VH = package.tensors["tower"]
    gram_HH = text_VH.T @ text_VH + RIDGE * torch.eye(text_VH.shape[1])
    for name in MAPPED:
        if name in package.tensors:
            tensors[f"map.{name}"] = torch.linalg.solve(gram_HH, text_VH.T @ package.tensors[name])
    return tensors


def word_tensors(texts: Sequence[str], share_V: np.ndarray) -> dict[str, Tensor]:
    """The words of the items' titles and brands, with the weights of `llmgr.text.words.word_matrix`.

    `share_V` [V+1] is what a click on an item adds to the score of an item with the same words (see `LeftOut`).
    """
    count = Counter(word for text in texts for word in set(WORD.findall(text.lower())))
    words = sorted(word for word, number in count.items() if number > 1)
    idf = np.log(len(texts) / np.array([count[word] for word in words], dtype=np.float64))
    matrix = unit_words(["", *texts], words, idf)
    return rows_as_tensors(matrix, "words") | {
        "words.known": as_bytes("\n".join(words).encode()), "words.idf": torch.from_numpy(idf).float(),
        "words.share": torch.from_numpy(share_V).float()}


def unit_words(texts: Sequence[str], words: Sequence[str], idf: np.ndarray) -> csr_array:
    """Unit TF-IDF vectors of texts [N, words]."""
    column_of = {word: number for number, word in enumerate(words)}
    pairs = [(row, column_of[word]) for row, text in enumerate(texts) for word in sorted(
        set(WORD.findall(text.lower())) & column_of.keys())]
    row, column = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    weight = idf[column]
    length = np.sqrt(np.bincount(row, weight**2, len(texts)))
    return csr_array((weight / np.maximum(length[row], 1e-12), (row, column)), shape=(len(texts), len(words)))


def as_bytes(content: bytes) -> Tensor:
    """Bytes as a tensor of a package."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def with_items(package: Package, items: pl.DataFrame) -> Package:
    """The package with `items`, a table with the columns item and title, and text if that is more than the title.

    Title or text may be null; then the other is used. An item of the package gets the new text, and the title if there
    is one: its text vector is made anew, and what was learned from clicks stays. New items follow the last one. The
    scores of all other items stay as they are. UserError where columns or texts are missing, an id is empty, or the
    package has no text encoder.
    """
    import polars as pl

    items = _checked(items)
    known = {item: number for number, item in enumerate(package.items["item"], 1) if item}
    old = items.filter(pl.col("item").is_in(list(known)))
    new = items.filter(~pl.col("item").is_in(list(known))).with_columns(title=pl.coalesce("title", "text"))
    tensors = dict(package.tensors)
    if len(old):
        tensors |= _changed(package, torch.tensor([known[item] for item in old["item"]]), old["text"].to_list())
    table = package.items.join(old.select("item", pl.col("title").alias("new")), on="item", how="left",
                               maintain_order="left")
    table = table.with_columns(pl.coalesce("new", "title").alias("title")).drop("new")
    changed = Package(package.config, table, tensors)
    return changed if not len(new) else _appended(changed, new)


def _checked(items: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    if not {"item", "title"} <= set(items.columns):
        raise UserError("new items need the columns item and title, and may have text")
    items = items.select(pl.col(name).cast(pl.String) if name in items.columns else pl.lit(None, pl.String).alias(name)
                         for name in ("item", "title", "text"))
    items = items.with_columns(pl.when(pl.all().str.strip_chars() != "").then(pl.all()))  # blanks are missing
    items = items.with_columns(text=pl.coalesce("text", "title"))
    if items.is_empty() or items["item"].null_count() or items["text"].null_count():
        raise UserError("each new item needs an id, and a title or text that is not empty")
    if items["item"].is_duplicated().any():
        twice = items.filter(items["item"].is_duplicated())["item"][0]
        raise UserError(f"new item {twice} is named twice: leave one of its rows out")
    return items


def _changed(package: Package, number_N: Tensor, texts: list[str]) -> dict[str, Tensor]:
    vector_NH = read(package, texts)
    change_NH = vector_NH - package.tensors["tower"][number_N]
    tensors = {"tower": package.tensors["tower"].index_copy(0, number_N, vector_NH)}
    for name in MAPPED:
        if f"map.{name}" in package.tensors:
            tensors[name] = package.tensors[name].index_add(0, number_N, change_NH @ package.tensors[f"map.{name}"])
    return tensors


def _appended(package: Package, new: pl.DataFrame) -> Package:
    import polars as pl

    vector_NH = read(package, new["text"].to_list())
    tensors = package.tensors | {"tower": torch.cat((package.tensors["tower"], vector_NH))}
    for name in MAPPED:
        if f"map.{name}" in tensors:
            tensors[name] = torch.cat((tensors[name], vector_NH @ tensors[f"map.{name}"]))
    if "student.bias" in tensors:
        tensors["student.bias"] = F.pad(tensors["student.bias"], (0, len(new)))
    if "transitions.value" in tensors:
        tensors |= _with_similar(package, new["title"].to_list())
    rows = new.select("item", "title", pl.lit(0, package.items.schema["count"]).alias("count"),
                      pl.lit(False).alias("blocked"))
    return Package(package.config, pl.concat([package.items, rows]), tensors)


def _with_similar(package: Package, titles: list[str]) -> dict[str, Tensor]:
    """The item-item matrix with rows and columns for new items, from the similarity of their words to known items."""
    matrix, size = sparse(package, "transitions"), len(package.items) + 1
    if "words.value" not in package.tensors:
        whole = csr_array(matrix, copy=True)
        whole.resize((size + len(titles),) * 2)
        return rows_as_tensors(whole, "transitions")
    words = sparse(package, "words")
    known = bytes(package.tensors["words.known"].numpy()).decode().split("\n")
    weight = unit_words(titles, known, package.tensors["words.idf"].numpy())
    similarity = csr_array(words @ weight.T).astype(np.float32)  # [V+1, N]
    share = package.tensors["words.share"].numpy()
    strongest = share.max()  # that of an item without clicks
    rows = _few(csr_array(similarity.T), max(1, package.config["entries"])) * strongest
    own = csr_array(weight @ weight.T).astype(np.float32) * strongest
    whole = vstack([hstack([matrix, csr_array(similarity.multiply(share[:, None]))]), hstack([rows, own])])
    return rows_as_tensors(whole, "transitions") | rows_as_tensors(vstack([words, weight]), "words") | {
        "words.share": torch.cat((package.tensors["words.share"], torch.full((len(titles),), float(strongest))))}


def _few(matrix: csr_array, most: int) -> csr_array:
    """The `most` largest entries of every row."""
    for row in range(matrix.shape[0]):
        part = matrix.data[matrix.indptr[row]:matrix.indptr[row + 1]]
        if len(part) > most:
            part[part < np.partition(part, -most)[-most]] = 0
    matrix.eliminate_zeros()
    return matrix


def without_items(package: Package, items: Sequence[str]) -> Package:
    """The package without `items`: they are never recommended, and their clicks are unknown."""
    import polars as pl

    gone = _rows_of(package, items)
    return Package(package.config, package.items.with_columns(
        pl.when(gone).then(pl.lit("")).otherwise("item").alias("item"), blocked=pl.col("blocked") | gone),
        package.tensors)


def blocking(package: Package, items: Sequence[str], blocked: bool = True) -> Package:
    """The package that does not recommend `items`, though their clicks count; with `blocked=False` it does again."""
    import polars as pl

    chosen = _rows_of(package, items)
    return Package(package.config, package.items.with_columns(
        blocked=pl.when(chosen).then(pl.lit(blocked)).otherwise("blocked")), package.tensors)


def _rows_of(package: Package, items: Sequence[str]) -> Any:
    import polars as pl

    unknown = sorted({*items} - {*package.items["item"]})
    if unknown or "" in items:
        raise UserError(f"the package has no item {', '.join(unknown[:5])}: name items of its catalogue")
    return pl.col("item").is_in(list(items))


def read(package: Package, texts: list[str]) -> Tensor:
    """The tower's unit vectors [N, H] of texts; UserError where the package stores no text encoder."""
    tensors = package.under("reader.")
    if not tensors:
        raise UserError("this package cannot read new texts, since the text tower is off or a language model: set "
                        "tower.enabled=true and tower.encoder=tokens, and run `dvc repro package`")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(bytes(tensors["tokenizer"].numpy()).decode())
    tokenizer.enable_truncation(package.config["tower"]["max_text_tokens"])
    row_of = {token: number for number, token in enumerate(tensors["token"].tolist())}
    ids = [[row_of[token] for token in encoded.ids if token in row_of] for encoded in tokenizer.encode_batch(texts)]
    count = torch.tensor([len(row) for row in ids])
    flat = torch.tensor([token for row in ids for token in row], dtype=torch.long)
    normed_TH = F.layer_norm(tensors["vector"], tensors["vector"].shape[1:])
    mean_NH = F.normalize(F.embedding_bag(flat, normed_TH, count.cumsum(0) - count, mode="mean"), dim=-1)
    return F.normalize(F.linear(mean_NH, tensors["head.weight"], tensors["head.bias"]), dim=-1)


def sparse(package: Package, name: str) -> csr_array:
    """The matrix that `rows_as_tensors` stored under a name."""
    tensors = package.under(f"{name}.")
    width = len(package.items) + 1 if name == "transitions" else len(package.tensors["words.idf"])
    return csr_array(tuple(tensors[part].numpy() for part in ("value", "item", "start")),
                     shape=(len(package.items) + 1, width))


def rows_as_tensors(matrix: csr_array, name: str) -> dict[str, Tensor]:
    """A sparse matrix as tensors of a package."""
    matrix = csr_array(matrix)
    matrix.sort_indices()
    return {f"{name}.value": torch.from_numpy(matrix.data.astype(np.float32)),
            f"{name}.item": torch.from_numpy(matrix.indices.astype(np.int32)),
            f"{name}.start": torch.from_numpy(matrix.indptr.astype(np.int32))}
