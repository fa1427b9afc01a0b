"""Text, arguments and vectors that look generated and depend on nothing but their input."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_WORDS = (
    "amber",
    "basin",
    "calm",
    "drift",
    "eddy",
    "flume",
    "gate",
    "harbour",
    "inlet",
    "jetty",
    "keel",
    "lagoon",
    "marsh",
    "narrows",
    "outlet",
    "pier",
    "quay",
    "reach",
    "sluice",
    "tide",
    "upland",
    "valley",
    "weir",
    "yield",
    "zone",
    "brook",
    "canal",
    "delta",
    "estuary",
    "ford",
    "gorge",
    "headwater",
    "island",
    "lock",
    "millrace",
    "oxbow",
    "penstock",
    "rapids",
    "spillway",
    "turbine",
)

_WANTED = re.compile(r"\b(\d{1,5}) words\b")
_TOKEN = re.compile(r"\s*\S+|\s+")


def tokens(text: str) -> list[str]:
    """Splits text into what this fake calls tokens: words with the space before them."""
    return _TOKEN.findall(text)


def count(text: str) -> int:
    """Returns how many tokens a text has."""
    return len(tokens(text))


def _bytes(*parts: object) -> Iterator[int]:
    key = "\x1f".join(str(part) for part in parts).encode("utf-8", "surrogatepass")
    block = 0
    while True:
        yield from hashlib.sha256(key + block.to_bytes(4, "big")).digest()
        block += 1


def answer(prompt: str, *, model: str, seed: int | None, kind: str = "answer") -> list[str]:
    """Returns the tokens of an answer: words that depend on prompt, model and seed.

    There are 8 to 16 of them, or as many as the prompt asks for in words such as `200 words`.
    """
    source = _bytes(kind, model, seed, prompt)
    wanted = _WANTED.findall(prompt)
    length = max(2, int(wanted[-1])) if wanted else 8 + next(source) % 9
    words = [_WORDS[next(source) % len(_WORDS)] for _ in range(length)]
    return [words[0].capitalize(), *(f" {word}" for word in words[1:-1]), f" {words[-1]}."]


def logprob(token: str, position: int) -> float:
    """Returns a log probability for a token, in (-4, 0)."""
    return -next(_bytes("logprob", token, position)) / 64 - 0.001


def digits(source: str) -> str:
    """Returns nine digits that depend only on the text."""
    return "".join(str(byte % 10) for byte, _ in zip(_bytes("digits", source), range(9), strict=False))


def vector(text: str, *, model: str, size: int) -> list[float]:
    """Returns a vector of norm 1 for a text."""
    source = _bytes("vector", model, text)
    raw = [next(source) - 127.5 for _ in range(size)]
    norm = math.sqrt(sum(value * value for value in raw))
    return [value / norm for value in raw]


def instance(schema: object, root: object = None, depth: int = 0) -> object:
    """Returns a small value that matches a JSON Schema.

    It knows type, const, enum, properties, items, minItems, minimum, minLength, anyOf, oneOf,
    allOf and local `$ref`; other keywords are not looked at.
    """
    root = schema if root is None else root
    if not isinstance(schema, Mapping) or depth > 16:
        return None
    if "const" in schema:
        return schema["const"]
    if isinstance(schema.get("enum"), Sequence) and schema["enum"]:
        return schema["enum"][0]
    if isinstance(schema.get("$ref"), str):
        return instance(_resolve(schema["$ref"], root), root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(key)
        if isinstance(choices, Sequence) and choices:
            return instance(choices[0], root, depth + 1)
    return _typed(schema, root, depth)


def _typed(schema: Mapping[str, object], root: object, depth: int) -> object:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind == "object" or (kind is None and "properties" in schema):
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            return {}
        return {name: instance(sub, root, depth + 1) for name, sub in properties.items()}
    if kind == "array":
        least = schema.get("minItems")
        size = max(1, least if isinstance(least, int) else 1)
        return [instance(schema.get("items", {}), root, depth + 1) for _ in range(size)]
    return _plain(schema, kind)


def _plain(schema: Mapping[str, object], kind: object) -> object:
    if kind == "string":
        least = schema.get("minLength")
        return "weir".ljust(least if isinstance(least, int) else 0, "x")
    if kind in ("integer", "number"):
        least = schema.get("minimum")
        return least if isinstance(least, int | float) else 7
    if kind == "boolean":
        return True
    return {} if kind is None else None


def _resolve(reference: str, root: object) -> object:
    found = root
    for part in reference.removeprefix("#").split("/"):
        if part and isinstance(found, Mapping):
            found = found.get(part.replace("~1", "/").replace("~0", "~"))
    return found
