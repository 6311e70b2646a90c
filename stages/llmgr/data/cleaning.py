"""Cleaning of item texts: markup, entities, list literals, marketing, shared templates, repetitions."""
from __future__ import annotations

import ast
import html
import itertools
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

UNKNOWN = "unknown item"
"""The text of an item that has none."""
FIELDS = ["item", "title", "brand", "category", "description", "text"]
NOTHING = {"title": "", "brand": "", "category": "", "description": []}
MAX_TEXT = 100_000
"""Characters of a field that are read: the longest description of 7,000 real ones has 8,939."""
MAX_PIECES = 500
"""Pieces of a description, and names of a category's path, that are read."""
MARKETING = {
    r"an amazon brand": ("an amazon brand",),
    r"(?:100% )?(?:customer )?satisfaction (?:is )?(?:100% )?guaranteed?": ("satisfaction ",),
    r"(?:100% )?(?:\d+[- ]days? )?money[- ]back guaranteed?": (" guarantee",),
    r"(?:buy|order|shop)(?: it| yours| one)? (?:now|today)": (
        "buy now", "buy today", "order now", "order today", "shop now", "shop today", " it now", " it today",
        " yours now", " yours today", " one now", " one today"),
    r"get yours (?:now|today)": ("get yours ",),
    r"add (?:it )?to (?:your )?cart(?: now| today)?": ("add ",),
    r"(?:please )?click (?:here|on|the|below)\b[^.!?]{0,120}": ("click ",),
    r"(?:please )?(?:visit|see|check out) (?:us|our (?:web ?site|store|shop|other))\b[^.!?]{0,120}": (
        "visit us", "visit our ", "see us", "see our ", "check out us", "check out our "),
    r"view larger(?: image)?": ("view larger",),
    r"(?:fast and |fast & )?free shipping": ("free shipping",),
    r"limited[- ]time offer": ("time offer",),
    r"(?:see|read|show) more\b(?= *(?:[.!]|$))": ("see more", "read more", "show more"),
    r"risk[- ]free purchase": ("free purchase",),
    r"brand new and high quality": ("brand new and ",),
    r"contact (?:the seller|us) (?:directly )?[^.!?]{0,120}": ("contact ",),
}
"""What sellers say of everything: removed with the punctuation behind it. A phrase is looked for where one of the words
beside it is, which is much quicker than the pattern."""
_MAIL_HOST = re.compile(r"@\w[\w.-]*\.\w+")
_SITE = re.compile(
    r"(?P<dashes>(?<!\w)-++)|(?:https?://|www\.)\S+|(?P<word>[\w-]++)"
    r"(?:(?P<site>\.(?:com|net|org)\b(?:/\S*)?)|(?:(?<=http)|(?<=https))://\S+|(?<=www)\.\S+)?", re.I)
"""Every word, so that none is read twice, with the web address that it begins or ends in."""
_SITE_SIGNS = ("://", "www.", ".com", ".net", ".org")
_SITE_START = re.compile(r"(?:https?|www)\Z", re.I)
_WEB_FIRST = re.compile(r"(?:https?://|www\.)\S", re.I)
_LOST_AMPERSAND = re.compile(r"&?(?:amp; ?)+(#?\w{2,8});")
_LONE_AMPERSAND = re.compile(r"(?<!\w)amp;(?=\s|$)")
_LOST_NAME = re.compile(
    r"(?<![&A-Za-z#])(quot|nbsp|apos|[lr][sd]quo|[mn]dash|hellip|bull|frac\d\d|plusmn|[aeiou](?:acute|grave|uml));"
    r"|(?<=\d)(deg|reg|trade|times|lt|gt);"
)
_NAME_ENDS = ("uot;", "nbsp;", "apos;", "dash;", "hellip;", "bull;", "frac", "plusmn;", "acute;", "grave;", "uml;",
              "deg;", "reg;", "trade;", "times;", "lt;", "gt;")
"""What an entity's name without its ampersand ends in; to look for these is quicker than the pattern."""
_ENTITY = re.compile(r"&(?:#\d{1,7};?|#[xX][0-9a-fA-F]{1,6};?|[A-Za-z]\w{1,30};|(?:nbsp|quot|amp|lt|gt)\b)")
_BLOCK = re.compile(r"<!--.*?(?:-->|$)|<(script|style)\b.*?(?:</\1\s*>|$)|<!\[CDATA\[|\]\]>", re.I | re.S)
_TAG = re.compile(r"</?[A-Za-z!][^<>]{0,2000}>|<[A-Za-z]+\s+[\w-]+\s*=[^<>]*$|</?(?:br|li|ul|ol|p|div|span)\b/?")
_PARAGRAPH = re.compile(r"""(?<=[\w"')])\s*(?:</?(?:p|li|ul|div|br)\b[^<>]*>\s*)+(?=[A-Z0-9])""")
_TAG_END = re.compile(r"""["']\s*+/>|(?<!\s)\s*+/>|["']>(?=\s|$)""")
_SCRIPT = re.compile(r"(?:\bvar \w+\s*=|\bfunction\s*\(|\bP\.when\s*\().*", re.S)
_BRACES = re.compile(r"\{[^{}]{0,4000}\}")
_SELECTOR = re.compile(r"[\w.#@,: -]*")
_LIST_START = re.compile(r"""\[\s*+(['"])""")
_LIST_END = {quote: re.compile(rf"{quote}\s*+\]") for quote in "'\""}
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd]")
_MARKS = re.compile(r"(?<=[^\w\s\x00-\x7f]{30})[^\w\s\x00-\x7f]+")
_WRITTEN_SPACE = re.compile(r"(?:\\n|\\[rt](?![a-z]))+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_SENTENCE = re.compile(r"""(?<=[.!?])\s+(?=["'(]?[A-Z0-9])|(?<!\s)(?:\s*+[•·▪●])++\s*""")
_GLUED = re.compile(r"(?<=[a-z][.!?])(?=[A-Z])")
_STRAY = re.compile(r"(?<=[.!?,;:])(?: \.)+(?= |$)")
_WORD = re.compile(r"\w+")


def clean(text: str) -> str:
    """`text` as one line of plain words: no markup, entities, list literals, scripts, addresses or marketing.

    Repeated until nothing changes, because one kind of dirt hides another (an escaped tag, an entity of an entity).
    Square brackets become round ones, so that nothing in a text looks like a list or like a slot of a prompt. What
    stands behind MAX_TEXT characters is not read.
    """
    text = text[:MAX_TEXT]
    for _ in range(8):
        cleaned = _pass(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def _pass(text: str) -> str:
    """Every kind of dirt removed once. What cannot be in a text is not searched for: most texts are clean."""
    if not text.isascii():
        text = _composed(_INVISIBLE.sub("", text.encode("utf-8", "ignore").decode()))
    if "[" in text:
        text = _without_inner_lists(_flattened(text.strip()))
    if ";" in text or "&" in text:
        text = _unescaped(text)
    if "<" in text or ">" in text:
        text = _TAG_END.sub(" ", _TAG.sub(" ", _PARAGRAPH.sub(". ", _BLOCK.sub(" ", text))))
    if "{" in text:
        text = _without_styles(text)
    if "(" in text or "=" in text:
        text = _SCRIPT.sub(" ", text)
    folded, has_address = text.casefold(), "." in text or "@" in text
    if "@" in text:
        text = re.sub(r"\S*@\S*", lambda match: _without_mail(match[0]), text)
    if has_address and any(sign in folded for sign in _SITE_SIGNS):
        text = _SITE.sub(_without_site, text)
    if "\\" in text:
        text = re.sub(r"""\\(?=['"])""", "", text)
    if phrases := tuple(phrase for phrase, hints in MARKETING.items() if any(hint in folded for hint in hints)):
        text = _marketing(phrases).sub(" ", text)
    if "." in text or "!" in text or "?" in text:
        text = _GLUED.sub(" ", text)
    if "\\" in text:
        text = _WRITTEN_SPACE.sub(" ", text)
    if not text.isprintable():
        text = " ".join(_CONTROL.sub(" ", text).split())
    elif "  " in text:
        text = " ".join(text.split())
    if " ." in text:
        text = _STRAY.sub("", text)
    return text.replace("[", "(").replace("]", ")").replace("( )", "").replace("()", "").strip(" |>,;*_-")


def _flattened(text: str) -> str:
    """The elements of a list literal as sentences; `text` itself if it is none."""
    if text[:1] != "[" or text[1:].lstrip()[:1] not in ("'", '"', "]"):
        return text
    try:
        parts = ast.literal_eval(text)
    except Exception:  # whatever a text makes literal_eval raise
        parts = None
    if not isinstance(parts, list):  # cut short, or badly quoted
        inner = re.sub(r"""^\[\s*['"]?""", "", text).removesuffix("]").rstrip()
        parts = re.split(r"""['"]\s*,\s*['"]""", re.sub(r"""['"]\Z""", "", inner))
    return _joined([part for part in parts if isinstance(part, str)])


def _without_inner_lists(text: str) -> str:
    """`['words']` inside a text becomes its words."""
    pieces, at, unclosed = [], 0, set()
    while len(unclosed) < len(_LIST_END) and (start := _LIST_START.search(text, at)):
        quote = start[1]
        end = None if quote in unclosed else _LIST_END[quote].search(text, start.end())
        if end:
            pieces += [text[at:start.start()], text[start.end():end.start()]]
        else:
            unclosed.add(quote)
            pieces.append(text[at:start.end()])
        at = (end or start).end()
    return "".join(pieces) + text[at:]


def _without_styles(text: str) -> str:
    """Without blocks in braces and the selectors, at most 80 characters, before them."""
    pieces, at = [], 0
    for block in _BRACES.finditer(text):
        before = text[max(at, block.start() - 80):block.start()]
        selector = _SELECTOR.match(before[::-1])
        pieces.append(text[at:block.start() - selector.end()])
        at = block.end()
    return " ".join([*pieces, text[at:]])


@lru_cache
def _marketing(phrases: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(r"(?<!\w)(?:" + "|".join(phrases) + r")(?!\w)\s*[.!*]*", re.I)


def _without_mail(run: str) -> str:
    """Characters without a space, at least one an @: without the mail address, which ends behind the last host."""
    if _WEB_FIRST.match(run):
        return run
    at = len(run)
    while (at := run.rfind("@", 1, at)) > 0:
        if host := _MAIL_HOST.match(run, at):
            return " " + run[host.end():]
    return run


def _without_site(match: re.Match[str]) -> str:
    word = match["word"]
    if match["dashes"] or word == match[0]:
        return match[0]
    return " " if word is None or match["site"] else _SITE_START.sub("", word) + " "


def _composed(text: str) -> str:
    """`text` in normal form C. Of marks on one character 30 stay (Unicode's stream-safe format): sorting them is slow.
    """
    safe = _MARKS.sub(lambda run: "".join(char for char in run[0] if not unicodedata.combining(char)), text)
    return unicodedata.normalize("NFC", safe)


def _joined(parts: list[str]) -> str:
    *most, last = [part.strip() for part in parts if part.strip()] or [""]
    return " ".join([part if part[-1] in ".!?:;," else part + "." for part in most] + [last])


def _unescaped(text: str) -> str:
    for _ in range(5):
        known = _LOST_AMPERSAND.sub(r"&\1;", text) if "amp;" in text else text
        known = _LOST_NAME.sub(lambda m: f"&{m[1] or m[2]};", known) if any(
            end in known for end in _NAME_ENDS) else known
        known = _ENTITY.sub(lambda m: html.unescape(m[0]), known) if "&" in known else known
        if known == text:
            break
        text = known
    return _LONE_AMPERSAND.sub("&", text) if "amp;" in text else text


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
    bodies = [[(_key(sentence), sentence) for sentence in _description(row["description"])] for row in raw]
    shared = Counter(key for body in bodies for key in {key for key, _ in body})
    rows: list[dict[str, str | None]] = []
    for item, row, body in zip(items, raw, bodies, strict=True):
        title, brand, category = clean(row["title"]), _brand(row["brand"]), category_of(row["category"])
        known, seen, kept = set(_words(f"{title} {brand}")), set(), []
        for key, sentence in body:
            if shared[key] < template_items and key not in seen and not known.issuperset(key.split()):
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


def _description(pieces: list[str]) -> list[str]:
    """The sentences of a description's pieces, of which MAX_TEXT characters and MAX_PIECES pieces are read."""
    ends = itertools.accumulate(map(len, pieces[:MAX_PIECES]))
    read = [piece for piece, end in zip(pieces, ends, strict=False) if end - len(piece) < MAX_TEXT]
    return sentences(_joined([clean(piece) for piece in read]))


def _category(path: str) -> str:
    return " > ".join(filter(None, (clean(name) for name in path.split(" > ")[:MAX_PIECES])))


def _brand(raw: str) -> str:
    """The brand without the shop's words around it ("by X", "Visit the X Store")."""
    return re.sub(r"^(?:by|visit the)\s+|(?<=\w)\s+store$", "", clean(raw), flags=re.I) if raw else ""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _key(sentence: str) -> str:
    return " ".join(_words(sentence))
