"""The scripted model: pure functions from a request to what the model says.

There is nothing random here. A token depends on the weights, the prompt, the
seed and its position, so a test can compute the reply it must see, another
process gives the same one, and a reply can be taken up at any position.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forebay.inference.v1 import inference_pb2 as pb

_WORDS = """
river stone light water slow turn mill wheel gate channel bank reed lock flow deep still north rain source
delta bridge weir spring current pool shore ford basin drift cool clear wide bend falls mist moss trout heron
willow ferry anchor tide pebble sluice Öl façade naïve größer 水 река ποτάμι 🌊 leaf cloud valley meadow hill
path lamp bell oak ash fern wren hazel
"""

VOCABULARY = tuple(_WORDS.split())
"""Words of the scripted model, some of them more bytes than characters. A token is one word."""


def tokens_for(weights: str, prompt: str, *, seed: int = 0, count: int, first: int = 0) -> list[int]:
    """Returns identifiers of the tokens at positions `first` to `first + count - 1` of a reply."""
    key = f"{weights}\x00{seed}\x00{prompt}"
    return [_number(f"{key}\x00{position}") % len(VOCABULARY) for position in range(first, first + count)]


def piece(token: int, position: int) -> str:
    """Returns the text of a token at a position: every word but the first has a space before it."""
    return f" {VOCABULARY[token]}" if position else VOCABULARY[token]


def text_of(tokens: Iterable[int]) -> str:
    """Returns the text of a reply from its beginning."""
    return "".join(piece(token, position) for position, token in enumerate(tokens))


def prompt_of(messages: Sequence[pb.Message], tools: Sequence[pb.Tool] = ()) -> str:
    """Returns what the scripted model reads: all that can make a difference to a reply."""
    return hashlib.blake2b(
        b"\x00".join(part.SerializeToString(deterministic=True) for part in (*messages, *tools)),
        digest_size=16,
    ).hexdigest()


def count_tokens(messages: Sequence[pb.Message], tools: Sequence[pb.Tool] = ()) -> int:
    """Returns the tokens of a conversation: a token a word, and three around each message."""
    total = sum(3 + sum(_words(part) for part in message.parts) for message in messages)
    return total + sum(len(f"{t.name} {t.description} {t.parameters_json_schema}".split()) for t in tools)


def words(text: str) -> int:
    """Returns the tokens of a text by itself."""
    return len(text.split())


def vector_for(weights: str, text: str, *, dimension_count: int) -> list[float]:
    """Returns the embedding of a text: Euclidean norm 1, and the same for the same text."""
    raw = [_number(f"{weights}\x00{text}\x00{i}") / 2**63 - 1.0 for i in range(dimension_count)]
    norm = math.sqrt(math.fsum(x * x for x in raw)) or 1.0
    return [x / norm for x in raw]


def logprob_for(token: int, position: int, *, top_count: int) -> pb.TokenLogprob:
    """Returns a made-up log probability of a token, and those of the next best ones."""
    best = -0.25 - (_number(f"{token}\x00{position}") % 1000) / 1000
    entry = pb.TokenLogprob(token=piece(token, position), token_id=token, logprob=best)
    entry.raw_bytes = entry.token.encode()
    for rank in range(top_count):
        other = (token + rank) % len(VOCABULARY)
        word = piece(other, position)
        entry.top_logprobs.add(token=word, raw_bytes=word.encode(), token_id=other, logprob=best - rank)
    return entry


def digest_of(weights: str) -> str:
    """Returns the digest under which weights are known."""
    return "sha256:" + hashlib.sha256(weights.encode()).hexdigest()


def json_for(schema: str) -> str:
    """Returns a small JSON value that matches a JSON Schema, as text. Empty is any value.

    It knows `const`, `enum`, `type`, `properties`, `required`, `items`, `minItems`, `minimum` and
    `minLength`, which is what the tests' schemas use.
    """
    return json.dumps(_example(json.loads(schema)) if schema else {"ok": True})


def _example(schema: Mapping[str, Any]) -> object:
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "null")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: _example(properties.get(name, {})) for name in schema.get("required", properties)}
    if kind == "array":
        return [_example(schema.get("items", {}))] * schema.get("minItems", 1)
    simple = {
        "string": "x" * schema.get("minLength", 1),
        "integer": schema.get("minimum", 1),
        "number": schema.get("minimum", 1),
        "boolean": True,
    }
    return simple.get(kind)


def _words(part: pb.Part) -> int:
    match part.WhichOneof("kind"):
        case "text":
            return words(part.text)
        case "reasoning":
            return words(part.reasoning)
        case "tool_call":
            return words(f"{part.tool_call.name} {part.tool_call.arguments_json}")
        case "tool_result":
            return words(part.tool_result.text)
        case _:
            return 16  # an image


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
