"""Cleaning of item texts: markup, entities, list literals, marketing, shared templates, repetitions."""
from __future__ import annotations

import ast
import html
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

UNKNOWN = "unknown item"
"""The text of an item that has none."""
FIELDS = ["item", "title", "brand", "category", "description", "text"]
NOTHING = {"title": "", "brand": "", "category": "", "description": []}
MAX_LITERAL = 100_000
"""Characters of a list literal inside a field that is still parsed."""
MARKETING = (
    r"an amazon brand",
    r"(?:100% )?(?:customer )?satisfaction (?:is )?(?:100% )?guaranteed?",
    r"(?:100% )?(?:\d+[- ]days? )?money[- ]back guaranteed?",
    r"(?:buy|order|shop)(?: it| yours| one)? (?:now|today)",
    r"get yours (?:now|today)",
    r"add (?:it )?to (?:your )?cart(?: now| today)?",
    r"(?:please )?click (?:here|on|the|below)\b[^.!?]{0,120}",
    r"(?:please )?(?:visit|see|check out) (?:us|our (?:web ?site|store|shop|other))\b[^.!?]{0,120}",
    r"view larger(?: image)?",
    r"(?:fast and |fast & )?free shipping",
    r"limited[- ]time offer",
    r"(?:see|read|show) more\b(?= *(?:[.!]|$))",
    r"risk[- ]free purchase",
    r"brand new and high quality",
    r"contact (?:the seller|us) (?:directly )?[^.!?]{0,120}",
)
"""What sellers say of everything: removed with the punctuation behind it."""
_MARKETING = re.compile(r"(?<!\w)(?:" + "|".join(MARKETING) + r")(?!\w)\s*[.!*]*", re.I)
_ADDRESS = re.compile(r"https?://\S+|www\.\S+|\S+@\w[\w.-]*\.\w+|\b[\w-]+\.(?:com|net|org)\b(?:/\S*)?", re.I)
_LOST_AMPERSAND = re.compile(r"&?(?:amp; ?)+(#?\w{2,8});")
_LOST_NAME = re.compile(
    r"(?<![&A-Za-z#])(quot|nbsp|apos|[lr][sd]quo|[mn]dash|hellip|bull|frac\d\d|plusmn|[aeiou](?:acute|grave|uml));"
    r"|(?<=\d)(deg|reg|trade|times|lt|gt);"
)
_ENTITY = re.compile(r"&(?:#\d{1,7};?|#[xX][0-9a-fA-F]{1,6};?|[A-Za-z]\w{1,30};|(?:nbsp|quot|amp|lt|gt)\b)")
_BLOCK = re.compile(r"<!--.*?(?:-->|$)|<(script|style)\b.*?(?:</\1\s*>|$)|<!\[CDATA\[|\]\]>", re.I | re.S)
_TAG = re.compile(r"</?[A-Za-z!][^<>]{0,2000}>|<[A-Za-z]+\s+[\w-]+\s*=[^<>]*$|</?(?:br|li|ul|ol|p|div|span)\b/?")
_PARAGRAPH = re.compile(r"""(?<=[\w"')])\s*(?:</?(?:p|li|ul|div|br)\b[^<>]*>\s*)+(?=[A-Z0-9])""")
_TAG_END = re.compile(r"""["']?\s*/>|["']>(?=\s|$)""")
_SCRIPT = re.compile(r"(?:\bvar \w+\s*=|\bfunction\s*\(|\bP\.when\s*\().*", re.S)
_STYLE = re.compile(r"[\w.#@,: -]{0,80}\{[^{}]{0,4000}\}")
_INNER_LIST = re.compile(r"""\[\s*(['"])(.*?)\1\s*\]""", re.S)
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd]")
_SPACE = re.compile(r"(?:[\s\x00-\x1f\x7f-\x9f\u2028\u2029]|\\n|\\[rt](?![a-z]))+")
_SENTENCE = re.compile(r"""(?<=[.!?])\s+(?=["'(]?[A-Z0-9])|\s*[•·▪●]\s*""")
_GLUED = re.compile(r"(?<=[a-z][.!?])(?=[A-Z])")
_STRAY = re.compile(r"(?<=[.!?,;:])(?: \.)+(?= |$)")
_WORD = re.compile(r"\w+")


def clean(text: str) -> str:
    """`text` as one line of plain words: no markup, entities, list literals, scripts, addresses or marketing.

    Repeated until nothing changes, because one kind of dirt hides another (an escaped tag, an entity of an entity).
    Square brackets become round ones, so that nothing in a text looks like a list or like a slot of a prompt.
    """
    for _ in range(8):
        cleaned = _pass(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def _pass(text: str) -> str:
    text = _INVISIBLE.sub("", text.encode("utf-8", "ignore").decode())
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "[" in text:
        text = _INNER_LIST.sub(lambda match: match[2], _flattened(text.strip()))
    if ";" in text or "&" in text:
        text = _unescaped(text)
    if "<" in text or ">" in text:
        text = _TAG_END.sub(" ", _TAG.sub(" ", _PARAGRAPH.sub(". ", _BLOCK.sub(" ", text))))
    if "{" in text:
        text = _STYLE.sub(" ", text)
    if "(" in text or "=" in text:
        text = _SCRIPT.sub(" ", text)
    if "." in text or "@" in text:
        text = _ADDRESS.sub(" ", text)
    if "\\" in text:
        text = re.sub(r"""\\(?=['"])""", "", text)
    text = _SPACE.sub(" ", _GLUED.sub(" ", _MARKETING.sub(" ", text)))
    text = _STRAY.sub("", text)
    return text.translate({91: "(", 93: ")"}).replace("( )", "").replace("()", "").strip(" |>,;*_-")


def _flattened(text: str) -> str:
    """The elements of a list literal as sentences; `text` itself if it is none."""
    if text[:1] != "[" or text[1:].lstrip()[:1] not in ("'", '"', "]"):
        return text
    try:
        parts = ast.literal_eval(text) if len(text) <= MAX_LITERAL else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        parts = None
    if not isinstance(parts, list):  # cut short, or badly quoted
        parts = re.split(r"""['"]\s*,\s*['"]""", re.sub(r"""^\[\s*['"]?|['"]?\s*\]?$""", "", text))
    return _joined([part for part in parts if isinstance(part, str)])


def _joined(parts: list[str]) -> str:
    *most, last = [part.strip() for part in parts if part.strip()] or [""]
    return " ".join([part if part[-1] in ".!?:;," else part + "." for part in most] + [last])


def _unescaped(text: str) -> str:
    for _ in range(5):
        known = _LOST_NAME.sub(lambda m: f"&{m[1] or m[2]};", _LOST_AMPERSAND.sub(r"&\1;", text))
        known = _ENTITY.sub(lambda m: html.unescape(m[0]), known)
        if known == text:
            break
        text = known
    return re.sub(r"(?<!\w)amp;(?=\s|$)", "&", text)


def cut(text: str, max_chars: int) -> str:
    """`text`, or its longest beginning of whole words within `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    head, space, _ = text[: max_chars + 1].rpartition(" ")
    return (head if space else text[:max_chars]).rstrip(" ,;:|(>*_-")


def sentences(text: str) -> list[str]:
    """The sentences of a cleaned text."""
    return [part for part in _SENTENCE.split(text) if part and part.strip(" .!?")]


def item_texts(
    items: list[str], metadata: dict[str, dict[str, Any]], template_items: int, max_chars: int
) -> list[dict[str, str | None]]:
    """Cleaned FIELDS of every item, in the given order, from raw `metadata` (as amazon.read_metadata gives it).

    An empty field is "", an empty description null. From descriptions go the sentences that `template_items` or more of
    the items share, those that only repeat words of the title and brand, and repetitions. `text` joins title, brand
    (unless the title has it), the two leaf-most categories and the description by " | ". All are cut to `max_chars`
    characters.
    """
    category_of = lru_cache(None)(_category)
    raw = [metadata.get(item) or NOTHING for item in items]
    bodies = [sentences(_joined([clean(piece) for piece in row["description"]])) for row in raw]
    shared = Counter(key for body in bodies for key in {_key(sentence) for sentence in body})
    rows: list[dict[str, str | None]] = []
    for item, row, body in zip(items, raw, bodies, strict=True):
        title, brand, category = clean(row["title"]), _brand(row["brand"]), category_of(row["category"])
        known, seen, kept = set(_words(f"{title} {brand}")), set(), []
        for sentence in body:
            key = _key(sentence)
            if shared[key] < template_items and key not in seen and not known.issuperset(_words(sentence)):
                kept.append(sentence)
            seen.add(key)
        description = cut(" ".join(kept), max_chars)
        leaf = ", ".join(category.split(" > ")[-2:])
        parts = [title, "" if brand.casefold() in title.casefold() else brand, leaf, description]
        rows.append({
            "item": item, "title": cut(title, max_chars), "brand": brand, "category": category,
            "description": description or None, "text": cut(" | ".join(filter(None, parts)), max_chars),
        })
    return rows


def _category(path: str) -> str:
    return " > ".join(filter(None, (clean(name) for name in path.split(" > "))))


def _brand(raw: str) -> str:
    """The brand without the shop's words around it ("by X", "Visit the X Store")."""
    return re.sub(r"^(?:by|visit the)\s+|(?<=\w)\s+store$", "", clean(raw), flags=re.I) if raw else ""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _key(sentence: str) -> str:
    return " ".join(_words(sentence))
