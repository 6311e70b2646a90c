"""What may leave this machine: texts without passwords, tokens and local folders."""
from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(r"token|secret|passw|pwd|api[-_]?key|access[-_]?key|signature|credential|^(?:sig|key|auth)$", re.I)
_QUERY = re.compile(r"([?&;#](?:amp;)?)([\w.%-]+)=([^\s&;#\"'<>]+)")
_SPOKEN = tuple((re.compile(pattern, re.IGNORECASE), rf"\1{HIDDEN}") for pattern in (
    r"""\b(authorization["']?\s*[=:]\s*["']?(?:\w+\s+)?)[^\s"',;]+""",
    r"\b(bearer\s+)[\w.~+/=-]{8,}",
    r"""\b((?:password|passwd|pwd|secret|token)["']?\s*[=:]\s*["']?)[^\s"'&,;]+""",
    r"\b(hf_|gh[pousr]_|github_pat_|glpat-|AKIA)\w{12,}"))
_PART = r"""[^\s/'"`<>|,;()\[\]{}…]+/"""
_FOLDERS = tuple((re.compile(pattern), with_) for pattern, with_ in (
    (rf"\b((?:file|sqlite(?:\+\w{{1,20}})?):)/{{1,4}}(?:{_PART})+", r"\1///…/"),
    (rf"(?<![\w.~/…-])(?<!models:)(?<!runs:)(?:~\w*)?/(?:{_PART})+", "…/"),
    (r"(?<!\w)[A-Za-z]:\\(?:[^\s\\]+\\)*", "…/")))
_WHOLE = re.compile(r"(?:~[\w.-]*)?/[^\n]*")


def masked(text: str, paths: bool = True) -> str:
    """`text` without what must stay here; masking twice changes nothing.

    Credentials in addresses, tokens in query strings and in headers become `***`, absolute folders and the home folder
    `…/`: the last part stays, so that a reader knows which model or file is meant. With `paths=False` folders stay: a
    message in one's own terminal must say which file to mend.
    """
    text = re.sub(r"^\s*\w[\w+.-]{0,40}://.*|\S+", _without_login, text)
    text = _QUERY.sub(lambda m: f"{m[1]}{m[2]}={HIDDEN}" if _SECRET.search(m[2]) else m[0], text)
    for pattern, with_ in _SPOKEN:
        text = pattern.sub(with_, text)
    if not paths:
        return text
    if _WHOLE.fullmatch(text.strip()) and (last := text.strip().rstrip("/").rpartition("/")[2]):
        return f"…/{last}"  # a path by itself, blanks and all
    for pattern, with_ in _FOLDERS:
        text = pattern.sub(with_, text)
    return text


def _without_login(word: re.Match) -> str:
    """An address without user and password, which may hold slashes, percent signs and more @: the last @ ends them."""
    scheme, sign, rest = word[0].partition("://")
    return f"{scheme}://{HIDDEN}@{rest.rpartition('@')[2]}" if sign and "@" in rest else word[0]


def masked_all(value: Any) -> Any:
    """A value of lists and mappings with every text in it masked, keys too."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {masked_all(key): masked_all(inner) for key, inner in value.items()}
    return [masked_all(inner) for inner in value] if isinstance(value, (list, tuple)) else value
