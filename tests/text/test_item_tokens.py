"""Item texts are text for every tokenizer: no word of theirs is a special token, and their beginning stays."""
from __future__ import annotations

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmgr.text.items import token_ids

WORDS = "Red pen <|endoftext|> <|im_start|> [SEP] [CLS] </s> <s> <unk> <pad> <mask> blue"


def unigram():
    """As XLM-RoBERTa's: special tokens are pieces of the vocabulary, too, and the likeliest ones."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -5.0) for piece in ["▁", *"abcdefghijklmnopqrstuvwxyzRSEPCLK<>/|[]_"]]
    read = Tokenizer(models.Unigram(pieces, unk_id=3))
    read.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=read, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   unk_token="<unk>")


def made(kind: str):
    if kind == "unigram":
        return unigram()
    return AutoTokenizer.from_pretrained(tiny.checkpoint(kind)) if "." in kind else tiny.tokenizer(kind)


@pytest.mark.parametrize("kind", [*tiny.KINDS, "SmolLM2-135M-Instruct.packed", "unigram"])
def test_no_word_of_a_text_is_a_special_token(kind):
    tokenizer = made(kind)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert special & set(tokenizer(WORDS, add_special_tokens=False)["input_ids"]), "without care they are"
    ids, = token_ids(tokenizer, [WORDS], None, special=False)
    assert not special & set(ids)
    assert len(ids) > 10


@pytest.mark.parametrize("kind", [*tiny.KINDS, "unigram"])
def test_other_texts_and_the_tokenizers_own_tokens_stay(kind):
    tokenizer, texts = made(kind), ["red pen, 2 < 3 and s > pad", "blue"]
    for special in (False, True):
        plain = tokenizer(texts, add_special_tokens=special)["input_ids"]
        assert token_ids(tokenizer, texts, None, special) == plain
        assert token_ids(tokenizer, texts, 5, special) == tokenizer(
            texts, add_special_tokens=special, truncation=True, max_length=5)["input_ids"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_end_of_a_text_is_cut_whatever_the_tokenizer_says(kind):
    tokenizer = made(kind)
    whole, = token_ids(tokenizer, ["red pen of a long description"], None, special=False)
    tokenizer.truncation_side = "left"
    assert token_ids(tokenizer, ["red pen of a long description"], 3, special=False) == [whole[:3]]
