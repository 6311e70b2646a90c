"""What a parameter may be: the types of the sections' fields, with their bounds, and how what YAML reads becomes one.

Strict but for what `-S key=value` makes of a value: `1e-5` reaches YAML 1.1 as a text, `true` as a word, a list of one
as a scalar. Bounds are pydantic's; no number is so large that arithmetic on it leaves its type.
"""
from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

dataclass = partial(pydantic_dataclass, frozen=True, config=ConfigDict(extra="forbid"))
"""A section: frozen, without unknown keys."""
LARGE = 10**9  # of any number but a seed
LONG = 4096  # characters of a text, as of a path
NULL = (None, "null", "")  # what YAML or -S writes for nothing


def _wanted(what: str) -> PydanticCustomError:
    return PydanticCustomError("wanted", "{what}", {"what": what})


def number(value: Any) -> float:
    """A finite number, or its text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _wanted("a number")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise _wanted("a number") from None
    if not math.isfinite(result):
        raise _wanted("a number")
    return result


def whole_number(value: Any) -> int:
    """A number without a fraction, however it is written."""
    try:
        result = number(value)
    except PydanticCustomError:
        raise _wanted("a whole number") from None
    if result != int(result):
        raise _wanted("a whole number")
    return value if isinstance(value, int) else int(result)


def flag(value: Any) -> bool:
    """True or false, or their word."""
    word = str(value).lower() if isinstance(value, (bool, str)) else ""
    if word not in ("true", "false"):
        raise _wanted("true or false")
    return word == "true"


def text(value: Any) -> str:
    """One line that can be part of a path, of printable characters; numbers are taken as one types them."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _wanted("a text")
    try:
        result = str(value)
    except ValueError:  # a number of thousands of digits
        raise _wanted("a text") from None
    if not result.isprintable() or len(result) > LONG:
        raise _wanted(f"a text of one line, at most {LONG} characters")
    return result


def rate(value: Any) -> float | str:
    """A number above 0, or `auto`."""
    if value == "auto":
        return value
    result = number(value)
    if not 0 < result <= LARGE:
        raise PydanticCustomError("bound", "must be above 0, or auto")
    return result


def several(value: Any) -> list:
    """A list, or the one value that is in it."""
    if isinstance(value, (str, int, float)):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("list", "a list")
    return value


def mapped(value: Any) -> dict:
    """Names and what they stand for."""
    if not isinstance(value, dict):
        raise PydanticCustomError("map", "must map names to values")
    return {text(key): inner for key, inner in value.items()}


Whole = Annotated[int, BeforeValidator(whole_number), Field(ge=-LARGE, le=LARGE)]
Count = Annotated[int, BeforeValidator(whole_number), Field(gt=0, le=LARGE)]
Natural = Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=LARGE)]
Layers = Annotated[int, BeforeValidator(whole_number), Field(ge=1, le=5)]
Seed = Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=2**63 - 1)]  # of all random generators
Number = Annotated[float, BeforeValidator(number), Field(ge=-LARGE, le=LARGE)]
Positive = Annotated[float, BeforeValidator(number), Field(gt=0, le=LARGE)]
NotNegative = Annotated[float, BeforeValidator(number), Field(ge=0, le=LARGE)]
Share = Annotated[float, BeforeValidator(number), Field(ge=0, le=1)]
Rate = Annotated[float | Literal["auto"], BeforeValidator(rate)]
Flag = Annotated[bool, BeforeValidator(flag)]
Text = Annotated[str, BeforeValidator(text)]
OptionalText = Annotated[str | None, BeforeValidator(lambda value: None if value in NULL else text(value))]
Several, Mapped = BeforeValidator(several), BeforeValidator(mapped)
Words = Annotated[list[Text], Several]
Wholes = Annotated[list[Whole], Several]
Numbers = Annotated[list[Number], Several]
