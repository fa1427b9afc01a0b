"""What stands in for a model: answers that depend on the prompt and the seed and on nothing else.

A token is a word with the space before it, so that counts can be checked by eye.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from forebay.testing.fake_ollama_wire import WireMessage

_TOKEN = re.compile(r"\s*\S+")

_WORDS = re.findall(
    r"\S+",
    "water gathers behind the gate and every turbine takes what it can while quiet hands keep levels even "
    "so no blade runs dry nor does any spill find an open field below this old stone wall where "
    "caf\u00e9 lamps \U0001f600 glow",
)


def tokens_of(text: str) -> list[str]:
    """Cuts text into tokens; together they are the text, but for spaces at its end."""
    return _TOKEN.findall(text)


def _number(*parts: object) -> int:
    seed = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def speak(prompt: str, seed: int, length: int) -> list[str]:
    """Returns that many tokens of text. Equal prompts and seeds give equal texts."""
    picks = [_WORDS[_number(prompt, seed, at) % len(_WORDS)] for at in range(length)]
    return [word.capitalize() if at == 0 else f" {word}" for at, word in enumerate(picks)]


def embed(model: str, text: str, size: int) -> list[float]:
    """Returns a vector of norm 1 that depends on the model and the text."""
    raw = [(_number(model, text, at) / 2**63) - 1.0 for at in range(size)]
    return normalized(raw)


def normalized(vector: Sequence[float]) -> list[float]:
    """Scales a vector to norm 1."""
    norm = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / norm for value in vector]


def render(messages: Sequence[WireMessage], tools: Sequence[Mapping[str, object]] = ()) -> str:
    """Returns the prompt behind a chat, in the way a chat template would."""
    parts = [f"<|tools|> {json.dumps(list(tools))}"] if tools else []
    for message in messages:
        text = message.content
        for call in message.tool_calls:
            text += f" {json.dumps(call.get('function'))}"
        parts.append(f"<|{message.role}|> {text}")
    return "\n".join([*parts, "<|assistant|>"])


def fit(
    messages: Sequence[WireMessage], tools: Sequence[Mapping[str, object]], context: int
) -> tuple[list[WireMessage], bool]:
    """Drops the oldest messages that are not the system's until the prompt fits, as the server does.

    Returns:
        What is left, and whether that fits.
    """
    kept = list(messages)
    while len(tokens_of(render(kept, tools))) > context:
        oldest = next((at for at, m in enumerate(kept[:-1]) if m.role != "system"), None)
        if oldest is None:
            return kept, False
        del kept[oldest]
    return kept, True


def instance(schema: Mapping[str, object], prompt: str = "") -> object:
    """Returns a value that matches a simple JSON schema."""
    if "const" in schema:
        return schema["const"]
    choices = schema.get("enum") or schema.get("anyOf") or schema.get("oneOf")
    if isinstance(choices, list):
        first = choices[0]
        return instance(first, prompt) if isinstance(first, dict) and "enum" not in schema else first
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object" or (kind is None and "properties" in schema):
        properties = schema.get("properties")
        pairs = properties.items() if isinstance(properties, dict) else ()
        return {key: instance(value, prompt) for key, value in pairs if isinstance(value, dict)}
    if kind == "array":
        item = schema.get("items")
        least = schema.get("minItems")
        count = max(1, least if isinstance(least, int) else 1)
        return [instance(item, prompt) if isinstance(item, dict) else "item" for _ in range(count)]
    low = schema.get("minimum", 1)
    plain: dict[object, object] = {"integer": low, "number": low, "boolean": True, "null": None}
    return plain.get(kind, _WORDS[_number(prompt, "string") % 8])


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Everything a model says to one prompt."""

    thinking: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, object]] = field(default_factory=list)
    reason: str = "stop"

    @property
    def token_count(self) -> int:
        """Tokens generated."""
        return len(self.thinking) + len(self.pieces) + 4 * len(self.tool_calls)


def cut_at_stop(pieces: Sequence[str], stops: Sequence[str]) -> list[str]:
    """Ends the text before the first stop string in it, wherever its pieces are cut."""
    text = "".join(pieces)
    found = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
    if not found:
        return list(pieces)
    left, kept = min(found), []
    for piece in pieces:
        if left <= 0:
            break
        kept.append(piece[:left])
        left -= len(piece)
    return kept


def call_tools(tools: Sequence[Mapping[str, object]], text: str) -> list[dict[str, object]]:
    """Returns a call of every tool whose name stands in the text."""
    calls: list[dict[str, object]] = []
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or str(function.get("name")) not in text:
            continue
        parameters = function.get("parameters")
        schema = {"type": "object", **parameters} if isinstance(parameters, dict) else {"type": "object"}
        name = str(function["name"])
        calls.append(
            {
                "id": f"call_{_number(name, text) % 16**8:08x}",
                "function": {"index": len(calls), "name": name, "arguments": instance(schema, text)},
            }
        )
    return calls


def logprobs_of(piece: str, top: int) -> dict[str, object]:
    """Returns the log probability of a token and of its rivals, best first."""

    def entry(token: str, value: float) -> dict[str, object]:
        return {"token": token, "logprob": value, "bytes": list(token.encode())}

    found = entry(piece, -0.125)
    if top:
        rivals = [entry(f" {_WORDS[at % len(_WORDS)]}", -2.0 - at) for at in range(top - 1)]
        found["top_logprobs"] = [entry(piece, -0.125), *rivals]
    return found
