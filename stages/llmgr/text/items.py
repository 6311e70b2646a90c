"""Item texts of the catalogue, and their token ids as tables."""
from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmgr.runtime.artifacts import read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmgr.params.schema import Params


def texts_shuffled(params: Params) -> int | None:
    """The seed that shuffles the texts among the items under `model.texts=shuffled`, else None."""
    return params.seed if params.model.texts == "shuffled" else None


def token_table(ids: list[list[int]], longest: int) -> tuple[Tensor, Tensor]:
    """The first `longest` token ids of every text, padded [V+1, longest], and their number [V+1]; row 0 is empty.

    It cuts what the tokenizer did not: one whose own opening and closing tokens exceed `longest` cuts nothing.
    """
    ids = [row[:longest] for row in ids]
    count_V = torch.tensor([0, *map(len, ids)])
    token_VL = torch.zeros(len(ids) + 1, longest, dtype=torch.long)
    token_VL[torch.arange(longest) < count_V[:, None]] = torch.tensor([t for row in ids for t in row],
                                                                      dtype=torch.long)
    return token_VL, count_V


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int | None, special: bool
              ) -> list[list[int]]:
    """The first `longest` token ids of each text (None: all), with opening and closing tokens if `special`.

    A text that spells one of the tokenizer's special tokens (`</s>`, `<|endoftext|>`) gets a space after the token's
    first character, so that it cannot end a prompt. Long texts lose their end, whatever side the tokenizer's own file
    would cut, since the title stands first.
    """
    known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    known |= set(tokenizer.all_special_tokens)
    spelled = sorted((token.strip() for token in known if len(token.strip()) > 1), key=len, reverse=True)
    if spelled:
        pattern = re.compile("|".join(map(re.escape, spelled)), re.I)
        texts = [pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) for text in texts]
    tokenizer.truncation_side = "right"
    return tokenizer(texts, add_special_tokens=special, truncation=longest is not None, max_length=longest)["input_ids"]


def deal(items: int, seed: int) -> Tensor:
    """A random order [items] of the numbers from 0: the item whose text each item gets when texts are shuffled."""
    return torch.randperm(items, generator=torch.Generator().manual_seed(seed))


def item_texts(path: str | Path, column: str, shuffle: int | None = None) -> list[str]:
    """The `title`, `text` or `words` (title and brand) of the items of items.parquet, in the order of their ids.

    The text stands in for an empty title. With the seed `shuffle` the texts are shuffled among the items, in the order
    in which `llmgr.text.vectors.shuffled` shuffles vectors.
    """
    import polars as pl

    text = {"text": pl.col("text"), "title": pl.when(pl.col("title") == "").then("text").otherwise("title"),
            "words": pl.concat_str(pl.col("title", "brand").fill_null(""), separator=" ")}[column]
    texts = read_table(path).sort("item_id").select(text.alias("read"))["read"].to_list()
    return texts if shuffle is None else [texts[i] for i in deal(len(texts), shuffle).tolist()]
