"""Reading JSON that somebody else wrote: nothing in it is where, or what, it was said to be.

The readers below never raise on a value of the wrong kind; they return the
default, so that a server's odd field costs that field and not the answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TypeAlias

import orjson

JsonValue: TypeAlias = "dict[str, JsonValue] | list[JsonValue] | str | int | float | bool | None"
"""Any JSON value. Floats may be infinite or NaN: Python servers write them."""

JsonObject: TypeAlias = dict[str, JsonValue]
"""A JSON object."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(data: bytes | str) -> JsonValue:
    """Returns the value of a JSON text.

    Accepts `NaN` and `Infinity`, and lone surrogates, which become U+FFFD: a
    protobuf string cannot hold them.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        value: JsonValue = orjson.loads(data)
    except ValueError:
        text = data if isinstance(data, str) else data.decode("utf-8", "replace")
        try:
            value = _scrubbed(json.loads(text))
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
    return value


def dump(value: object) -> bytes:
    """Returns the JSON text of a value, compact, keys in order."""
    return orjson.dumps(value)


def obj(value: JsonValue) -> JsonObject:
    """Returns `value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def array(value: JsonValue) -> list[JsonValue]:
    """Returns `value` if it is an array, else an empty one."""
    return value if isinstance(value, list) else []


def text(source: Mapping[str, JsonValue], key: str, default: str = "") -> str:
    """Returns the string at `key`, else `default`."""
    value = source.get(key)
    return value if isinstance(value, str) else default


def integer(source: Mapping[str, JsonValue], key: str, default: int = 0) -> int:
    """Returns the number at `key` as an int, else `default`. A float is truncated."""
    value = source.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    return int(value) if math.isfinite(value) else default


def number(source: Mapping[str, JsonValue], key: str, default: float = 0.0) -> float:
    """Returns the finite number at `key`, else `default`."""
    value = source.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    return float(value) if math.isfinite(value) else default


def flag(source: Mapping[str, JsonValue], key: str, *, default: bool = False) -> bool:
    """Returns the boolean at `key`, else `default`."""
    value = source.get(key)
    return value if isinstance(value, bool) else default


def _scrubbed(value: JsonValue) -> JsonValue:
    if isinstance(value, str):
        # json.loads joins proper pairs, so any that are left are alone.
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [_scrubbed(item) for item in value]
    if isinstance(value, dict):
        return {str(_scrubbed(key)): _scrubbed(item) for key, item in value.items()}
    return value
