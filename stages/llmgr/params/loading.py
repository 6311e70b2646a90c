"""params.yaml read strictly into the dataclasses of `schema`, and what is wrong with it in a sentence."""
from __future__ import annotations

import copy
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmgr.params.derived import Derived, derived
from llmgr.params.schema import Params
from llmgr.params.types import LARGE
from llmgr.runtime.errors import UserError


def load(path: str | Path) -> Params:
    """The parameters of a file that can be carried out (`llmgr.params.derived`)."""
    return read(path).params


def read(path: str | Path) -> Derived:
    """Read and check a parameter file; UserError names the key as one types it after `-S`."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not here: run the stage from the repository's root folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it with `git checkout {path}`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 from byte {error.start} on: write it anew, or restore it with "
                        f"`git checkout {path}`") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that is none, a number of thousands of digits
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} nests values in values without end: restore it with `git checkout {path}`") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no sections: restore it with `git checkout {path}`")
    return whole(content)


def whole(content: dict[str, Any]) -> Derived:
    """The parameters of a file's content, checked, with what follows from them."""
    return derived(build(Params, content, ""))


def build(kind: type, content: dict[str, Any], prefix: str) -> Any:
    """A dataclass from a mapping, strictly: unknown keys and values of a wrong type are refused."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise UserError(_refusal(error, kind, prefix)) from None
    except RecursionError:
        raise UserError("params.yaml nests values in values without end: restore it with `git checkout params.yaml`"
                        ) from None


def changed(content: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A parameter file's content with new values at dotted keys, as `-S` sets them; the content itself stays."""
    result = copy.deepcopy(content)
    for key, value in values.items():
        *parents, leaf = key.split(".")
        section = result
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return result


def flat(params: Any, prefix: str = "") -> dict[str, Any]:
    """Parameters as one level of dotted keys, as one types them after `-S`."""
    content = params if isinstance(params, dict) else vars(params)
    result: dict[str, Any] = {}
    for key, value in content.items():
        if dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


FIRST = {"unexpected_keyword_argument": 0, "missing": 1}  # said before the rest: a key mistyped is both


def _refusal(error: ValidationError, kind: type, prefix: str) -> str:
    """The first of what is wrong, as one sentence that names the key as one types it."""
    wrong = min(error.errors(include_url=False), key=lambda one: FIRST.get(one["type"], 2))
    key, section, bounds = _location(kind, wrong["loc"])
    key, context, value = prefix + key, wrong.get("ctx", {}), shown(wrong["input"])
    if wrong["type"] == "unexpected_keyword_argument":
        parent, _, own = key.rpartition(".")
        known = [field.name for field in dataclasses.fields(section)]
        near = difflib.get_close_matches(own, known, 1, 0.0)[0]
        return f"params.yaml: unknown key {key}; the nearest known one is {f'{parent}.{near}'.lstrip('.')}"
    if wrong["type"] == "missing":
        return f"params.yaml: {key} is missing; add it (the committed file has every key)"
    if wrong["type"] == "value_error":
        return str(context["error"])
    if wrong["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{key}={value} must be a section with keys, such as {key}.{dataclasses.fields(section)[0].name}"
    if wrong["type"] == "wanted":
        return f"{key}={value} must be {context['what']}; set it with -S {key}=VALUE"
    if wrong["type"] == "list":
        return f"{key}={value} must be a list, such as '{key}=[a,b]'"
    if wrong["type"] == "literal_error":
        return f"{key}={value} is not one of {context['expected'].replace(chr(39), '').replace(' or ', ', ')}"
    if {"ge", "le"} <= bounds.keys() and bounds["le"] != LARGE:
        return f"{key}={value} must lie between {bounds['ge']} and {bounds['le']}"
    words = {"greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}",
             "less_than_equal": "must be at most {le}"}.get(wrong["type"], wrong["msg"])
    return f"{key}={value} {words.format(**context) if context else words}"


def _location(kind: type, path: tuple[int | str, ...]) -> tuple[str, type, dict[str, float]]:
    """A value's dotted key, the section that it is or stands in, and its bounds; list places do not count."""
    section, key, bounds = kind, [], {}
    for part in path:
        if isinstance(part, int):
            continue
        key.append(str(part))
        field = {one.name: one for one in dataclasses.fields(section)}.get(str(part))
        hint = typing.get_type_hints(section, include_extras=True).get(str(part)) if field else None
        if dataclasses.is_dataclass(hint):
            section = hint
        elif hint is not None:
            for extra in getattr(hint, "__metadata__", ()):
                for bound in getattr(extra, "metadata", ()):
                    bounds |= {name: getattr(bound, name) for name in ("gt", "ge", "le") if hasattr(bound, name)}
    return ".".join(key), section, bounds


def shown(value: Any) -> str:
    """A value in a sentence: one line, not too long, whatever it is."""
    try:
        said = str(value) if isinstance(value, (str, int, float, list)) else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; what holds itself
        return f"({type(value).__name__})"
    said = " ".join(said.split()).encode("utf-8", "backslashreplace").decode()
    return said if len(said) <= 80 else f"{said[:77]}..."
