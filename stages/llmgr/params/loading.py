"""params.yaml read strictly into the dataclasses of `schema`: types coerced, unknown keys refused."""
from __future__ import annotations

import copy
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from llmgr.params.derived import Derived, derived
from llmgr.params.schema import Params
from llmgr.runtime.errors import UserError


def load(path: str | Path) -> Params:
    """The parameters of a file that can be carried out (`llmgr.params.derived`)."""
    return read(path).params


def read(path: str | Path) -> Derived:
    """Read and check a parameter file; UserError names the key as one types it after `-S`."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not here: run the stage from the repository's root folder") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no sections: restore it with `git checkout {path}`")
    return whole(content)


def whole(content: dict[str, Any]) -> Derived:
    """The parameters of a file's content, checked, with what follows from them."""
    return derived(build(Params, content, ""))


def build(kind: type, content: dict[str, Any], prefix: str) -> Any:
    """A dataclass from a mapping, strictly: unknown keys and values of a wrong type are refused."""
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)
            raise UserError(f"params.yaml: unknown key {prefix}{key}; the nearest known one is {prefix}{near[0]}")
    for key in known:
        if key not in content:
            raise UserError(f"params.yaml: {prefix}{key} is missing; add it (the committed file has every key)")
    values = {key: _coerced(hints[key], value, prefix + key) for key, value in content.items()}
    result = kind(**values)
    result.check()
    return result


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


def _coerced(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{key}={value!r} must be a section with keys, such as {key}."
                            f"{dataclasses.fields(hint)[0].name}")
        return build(hint, value, key + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{key}={value} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None or value in ("null", ""):
            return None
        word = next((a for a in arguments if typing.get_origin(a) is Literal), None)
        if word and value in typing.get_args(word):
            return value
        return _coerced(next(a for a in arguments if a not in (type(None), word)), value, key)
    if origin is list:
        if isinstance(value, (str, int, float)):
            value = [value]
        if not isinstance(value, list):
            raise UserError(f"{key}={value!r} must be a list, such as '{key}=[a,b]'")
        return [_coerced(arguments[0], v, key) for v in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}={value!r} must map names to values")
        return {str(k): _coerced(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    return _scalar(hint, value, key)


def _scalar(hint: type, value: Any, key: str) -> Any:
    wants = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
    refusal = UserError(f"{key}={value} must be {wants}; set it with -S {key}=VALUE")
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise refusal
    if hint is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise refusal
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise refusal
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise refusal from None
    if number != number or number in (float("inf"), float("-inf")) or (hint is int and number != int(number)):
        raise refusal
    return int(value if isinstance(value, int) else number) if hint is int else number
