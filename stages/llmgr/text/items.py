"""Item texts of the catalogue, and their token ids as tables."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmgr.runtime.artifacts import read_table


def texts_shuffled(params: Any) -> int | None:
    """What deals the texts to other items under `model.texts=shuffled`, None where they stay."""
    return params.seed if params.model.texts == "shuffled" else None


def token_table(ids: list[list[int]], longest: int) -> tuple[Tensor, Tensor]:
    """The first `longest` token ids of every text, padded [V+1, longest], and how many each has [V+1]; row 0 is empty.

    Tokenizers leave a text whole where `longest` is less than their own opening and closing tokens.
    """
    ids = [row[:longest] for row in ids]
    count_V = torch.tensor([0, *map(len, ids)])
    token_VL = torch.zeros(len(ids) + 1, longest, dtype=torch.long)
    token_VL[torch.arange(longest) < count_V[:, None]] = torch.tensor([t for row in ids for t in row],
                                                                      dtype=torch.long)
    return token_VL, count_V


def token_ids(tokenizer: Any, texts: list[str], longest: int | None, special: bool) -> list[list[int]]:
    """The first `longest` token ids of item texts (None: all), with the tokenizer's own around them if `special`.

    A text is text: what reads like one of the tokenizer's special tokens (`</s>`, `<|endoftext|>`) gets a space behind
    its first character, so that the text cannot end a prompt. The end of a text is cut, whatever side the tokenizer's
    file names, since the title stands first.
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
    return torch.randperm(items, generator=torch.Generator().manual_seed(seed))


def item_texts(path: str | Path, column: str, shuffle: int | None = None) -> list[str]:
    """The items' `title`, `text` or `words` (title and brand) by their ids; the text stands in for an empty title.

    With the seed `shuffle` they are dealt out to other items, as `shuffled` deals out vectors.
    """
    import polars as pl

    text = {"text": pl.col("text"), "title": pl.when(pl.col("title") == "").then("text").otherwise("title"),
            "words": pl.concat_str(pl.col("title", "brand").fill_null(""), separator=" ")}[column]
    texts = read_table(path).sort("item_id").select(text.alias("read"))["read"].to_list()
    return texts if shuffle is None else [texts[i] for i in deal(len(texts), shuffle).tolist()]
