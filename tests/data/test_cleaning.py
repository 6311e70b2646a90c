from __future__ import annotations

import gzip
import json
import re
import time

import pytest
from machine import ROOT

from llmgr.data import cleaning

SAMPLES = ROOT.parent / "shared/amazon/item_text_samples.jsonl.gz"
DIRT = {
    "entity": r"&#?\w{2,10};|amp;|quot;|nbsp;",
    "tag": r"</?[a-zA-Z!][^<>]*>|<!--|-->",
    "list": r"[\[\]]",
    "control": r"[\x00-\x1f\x7f-\x9f\u200b\ufeff]",
    "address": r"https?:|www\.",
}


@pytest.mark.parametrize(("dirty", "expected"), [
    ("Simple title, 4 oz", "Simple title, 4 oz"),
    ("Salt &amp; Pepper", "Salt & Pepper"),
    ("Salt &amp;amp;amp; Pepper", "Salt & Pepper"),
    ("1amp;quot; x 3amp;quot; Sheet", '1" x 3" Sheet'),
    ("5/16 quot; thick", '5/16 " thick'),
    ("a 40 amp fuse", "a 40 amp fuse"),
    ("AT&T phone; R&D", "AT&T phone; R&D"),
    ("Caf&eacute; &#39;n&#x27; more", "Café 'n' more"),
    ("<p>One<br/>two</p>", "One two"),
    ("One<p>Two words</p> <p>Three</p>", "One. Two words. Three"),
    ("&lt;b&gt;bold&lt;/b&gt; words", "bold words"),
    ("Before <!-- .a {color:#000} --> after", "Before after"),
    ("Kept <script>var a = '<b>';</script> words <style>p {x:y}</style> here", "Kept words here"),
    ("Kettle <a href='http://x.com/shop", "Kettle"),
    ("2 < 3 and 5 > 4", "2 < 3 and 5 > 4"),
    ("['One.', 'Two']", "One. Two"),
    ("['First piece', '', \"Second's piece.\"]", "First piece. Second's piece."),
    ("['cut short, 'badly\" quoted", "cut short, 'badly\" quoted"),
    ("[]", ""),
    ("['a', {[]: 1}]", "a'"),
    ("['a', {{}}, 'b']", "a' , 'b"),
    ("Pens [12 Pack]", "Pens (12 Pack)"),
    ("a\x00b\u200bc\n\td", "a bc d"),
    ("line\\nbreak", "line break"),
    ("An Amazon Brand.", ""),
    ("Good pens. 100% Satisfaction Guaranteed! Buy now!", "Good pens."),
    ("Soft. Click here to see our other products. Warm.", "Soft. Warm."),
    ("See http://shop.example.com/x?y=1 or www.example.com, mail me@example.com", "See or mail"),
    ("a-www.com,blue x.com-y.com/z --w.net c", "blue -- c"),
    ("b-www.pens.com,blue c", "b- c"),
    ("mail (me@shop.example.com), @home, a@b, we@x.y@z.org!now", "mail ), @home, a@b, !now"),
    ("One [ 'two' ] three [\"four\"] [ 'five", "One two three four ( 'five"),
    ("['cut', \"badly' , 'quoted\" ]", "cut. badly' , 'quoted"),
    ("Soft .a b:hover, #c {color: red; width: 3px} wool", "wool"),
    ("Read more books", "Read more books"),
    ("field.Add water", "field. Add water"),
    ("var aPageStart = (new Date()).getTime();", ""),
    ('Industrial & Scientific" />', "Industrial & Scientific"),
    ("lone \ud800 surrogate", "lone surrogate"),
    ("", ""),
])
def test_clean(dirty, expected):
    assert cleaning.clean(dirty) == expected
    assert cleaning.clean(expected) == expected


HOSTILE = [
    "a-", "a-a.", "a.", ".", " .", " ", "\t", "a", "_", "1", ",", "1 days ", "100% ", "click the ", "contact us ",
    "<", "<a ", "<a b=", "<p>", "a<p> ", "/>", "<!--", "<script ", "</script ", "\"' ", "'", '"', " •", "()", "(",
    "&amp;", "amp;", "amp; ", "&amp;lt;", "&#", "&nbsp;", "{", "a {b", "{}", "\\", "\\n", "\\'", "\u200b", "é",
    "['", '["', "[", "[ ", "['a', ", "['', -", "]", "' ]", "a@", "@", "a@b.", "www.", "http:", "http://", ".com",
    "a.com-", "var ", "function ", "\u0301\u0323",
]


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("end", ["", ".", " x"])
def test_cleaning_takes_time_in_proportion_to_the_text(piece, end, monkeypatch):
    """Eight times the text takes about eight times the time; it took 64 times, and minutes."""
    monkeypatch.setattr(cleaning, "MAX_TEXT", 1_000_000)

    def seconds(length: int) -> float:
        text = piece * (length // len(piece)) + end
        begun = time.process_time()
        cleaning.sentences(cleaning.clean(text))
        return time.process_time() - begun

    assert seconds(160_000) < 16 * seconds(20_000) + 0.5


@pytest.mark.parametrize("piece", ["a-", "&amp;amp;", "['", "a.B", "<b ", "a\u0301", " ", "Fine. "])
def test_ten_megabytes_of_a_text_or_of_its_pieces_are_soon_cleaned(piece):
    """Text is cut to some hundred characters, so that what stands far behind is not read."""
    whole = "Fine wool. " + piece * (10_000_000 // len(piece))
    pieces = [piece] * 1_000_000
    raw = {"title": whole, "brand": whole, "category": " > ".join(pieces), "description": pieces}
    begun = time.process_time()
    row, = cleaning.item_texts(["x"], {"x": raw}, 8, 600)
    raw = raw | {"description": [whole]}
    other, = cleaning.item_texts(["x"], {"x": raw}, 8, 600)
    assert time.process_time() - begun < 4
    assert row["title"].startswith("Fine wool") and other["text"].startswith("Fine wool")


@pytest.mark.parametrize("tail", ["-" * 90_000, "(" * 90_000, "[" * 90_000, "{" * 90_000, "9" * 90_000,
                                  "1+1j+" * 9_000, "\\N{x}'", "\0'", "{1: {[1]: 2}}]", "f'{1}']", "b'\\xff']",
                                  "..." * 30_000, "'' " * 30_000])
def test_a_list_literal_that_cannot_be_read_is_text(tail):
    assert cleaning.clean(f"['Fine wool', {tail}").startswith("Fine wool")


def test_bullets_part_sentences():
    assert cleaning.sentences("Soft • Warm • • Red. Blue") == ["Soft", "Warm", "Red.", "Blue"]


def test_marks_that_pile_up_on_a_letter_are_cut_and_real_ones_stay():
    assert cleaning.clean("cafe\u0301 a\u0323\u0301") == "café ạ́"
    assert len(cleaning.clean("a" + "\u0301" * 1000 + "b")) < 40


def metadata(**fields) -> dict:
    return {"title": "", "brand": "", "category": "", "description": []} | fields


def texts(*rows: dict, template_items: int = 8, max_chars: int = 600) -> list[dict]:
    named = {f"i{n}": row for n, row in enumerate(rows)}
    return cleaning.item_texts(list(named), named, template_items, max_chars)


def test_text_joins_title_brand_category_description():
    row, = texts(metadata(title="Red Pen", brand="Acme", category="Office > Writing > Pens", description=["Fine tip."]))
    assert row["text"] == "Red Pen | Acme | Writing, Pens | Fine tip."
    assert row["category"] == "Office > Writing > Pens"


def test_brand_stands_once_and_without_its_shop():
    with_brand, visit, by = texts(metadata(title="ACME Red Pen", brand="Acme"), metadata(brand="Visit the Acme Store"),
                                  metadata(brand="by Acme"))
    assert with_brand["text"] == "ACME Red Pen"
    assert visit["brand"] == by["brand"] == "Acme"


def test_shared_sentences_are_templates_from_the_given_number_on():
    rows = [metadata(title=f"Item {n}", description=[f"Own words {n} here. We love all customers!"]) for n in range(5)]
    assert all("love" not in row["text"] for row in texts(*rows, template_items=5))
    assert all("love" in row["text"] for row in texts(*rows, template_items=6))
    assert all(f"Own words {n} here" in row["text"] for n, row in enumerate(texts(*rows, template_items=5)))


def test_a_sentence_repeated_in_one_item_is_no_template_but_stands_once():
    row, = texts(metadata(description=["Soft wool. Soft wool. Warm."]), template_items=2)
    assert row["description"] == "Soft wool. Warm."


def test_sentences_that_repeat_the_title_go():
    row, = texts(metadata(title="Acme Red Pen, 2 Pack", description=["ACME red pen - 2 pack.", "Writes well."]))
    assert row["description"] == "Writes well."


def test_an_item_without_text_is_empty_and_has_no_description():
    empty, dirt = texts(metadata(), metadata(title="<br>", description=["['', '']", "An Amazon Brand."]))
    for row in (empty, dirt):
        assert row["text"] == "" and row["description"] is None
    missing, = cleaning.item_texts(["x"], {}, 8, 600)
    assert missing["item"] == "x" and missing["text"] == ""


@pytest.mark.parametrize("limit", [1, 7, 12, 600])
def test_cut_ends_at_a_word(limit):
    words = "alpha beta gamma"
    short = cleaning.cut(words, limit)
    assert len(short) <= limit and words.startswith(short)
    assert limit < 5 or short.split() == words.split()[: len(short.split())]
    row, = texts(metadata(title=words, description=["delta epsilon " * 50]), max_chars=limit)
    assert all(len(row[field] or "") <= limit for field in ("title", "description", "text"))


@pytest.mark.skipif(not SAMPLES.exists(), reason="real item texts are not here")
def test_real_texts_come_out_clean():
    with gzip.open(SAMPLES, "rt") as handle:
        rows = [json.loads(line) for line in handle][::4]
    rows = [row | {"description": [row["description"]] if row["description"] else []} for row in rows]
    cleaned = texts(*rows)
    for raw, row in zip(rows, cleaned):
        assert row["title"] and row["text"].startswith(row["title"][:40])
        for field in ("title", "brand", "description", "text"):
            value = row[field] or ""
            for name, pattern in DIRT.items():
                found = re.search(pattern, value)
                assert not found, f"{name} in {field}: {value!r} of {raw[field]!r}"
            assert field == "text" or cleaning.clean(value) == value
    kept = sum(len(row["description"] or "") for row in cleaned) / len(cleaned)
    assert kept > 200, "cleaning must not eat the descriptions"
    assert not any("An Amazon Brand" in row["text"] for row in cleaned)
