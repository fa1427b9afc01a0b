"""What a fake model says to a request, decided before its first token.

The plan of a reply depends only on the request and the model, so that a
stream and a whole reply to one request say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import orjson

from forebay.testing import fake_lmstudio_text as text
from forebay.testing.fake_lmstudio_state import FakeModel, Instance, Json, bare, native

IMAGE_TOKENS = 64
"""Tokens an image counts for."""

_OVERFLOW = (
    "Trying to keep the first {kept} tokens when context the overflows. However, the model is loaded with "
    "context length of only {context} tokens, which is not enough. Try to load the model with a larger "
    "context length, or provide a shorter input"
)


class TooLongError(Exception):
    """The prompt does not fit the context."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a reply."""

    kind: Literal["reasoning", "content", "tool_start", "tool_arguments"]
    text: str
    index: int = 0
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A reply before it is told."""

    pieces: Sequence[Piece]
    finish: Literal["stop", "length", "tool_calls"]
    stop_reason: str
    prompt_tokens: int
    reasoning_tokens: int = 0
    logprobs: int | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens of the whole reply."""
        return len(self.pieces)

    def joined(self, kind: str) -> str:
        """Returns the text of one kind."""
        return "".join(piece.text for piece in self.pieces if piece.kind == kind)

    def usage(self) -> Json:
        """Returns the usage as the OpenAI-compatible API shows it."""
        usage: Json = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }
        if self.reasoning_tokens:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation as a request holds it, checked."""

    text: str
    last_user: str = ""
    last_role: str = "user"
    images: int = 0

    @property
    def tokens(self) -> int:
        """Tokens it counts."""
        return text.count(self.text) + IMAGE_TOKENS * self.images


@dataclass(kw_only=True)
class _Reader:
    """Reads and checks the messages of a request."""

    model: FakeModel
    lines: list[str] = field(default_factory=list)
    last_user: str = ""
    last_role: str = ""
    images: int = 0

    def read(self, messages: object) -> Prompt:
        if not isinstance(messages, list) or not messages:
            raise bare("'messages' field is required")
        for message in messages:
            if not isinstance(message, Mapping):
                raise bare("'messages' must be an array of objects")
            self._message(message)
        return Prompt(
            text="\n".join(self.lines),
            last_user=self.last_user,
            last_role=self.last_role,
            images=self.images,
        )

    def _message(self, message: Mapping[str, object]) -> None:
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise bare("Invalid 'messages': 'role' must be one of 'user', 'assistant', 'system' or 'tool'")
        content = message.get("content")
        if not isinstance(content, str | list):
            raise bare("Invalid 'content': 'content' field must be a string or an array of objects")
        said = content if isinstance(content, str) else "".join(self._part(part) for part in content)
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if not isinstance(call, Mapping) or not call.get("id"):
                raise bare("Invalid 'tool_calls': 'id' must be a non-empty string")
            said += " " + orjson.dumps(call.get("function")).decode()
        if role == "tool" and not message.get("tool_call_id"):
            raise bare("Invalid 'messages': 'tool_call_id' is required for role 'tool'")
        if role == "user":
            self.last_user = said
        self.last_role = str(role)
        self.lines.append(f"{role}: {said}")

    def _part(self, part: object) -> str:
        match part:
            case {"type": "text", "text": str(said)}:
                return said
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                if not url.startswith("data:image/") or ";base64," not in url:
                    raise bare("'url' field must be a base64 encoded image.")
                if not self.model.vision:
                    raise bare("Model does not support images. Please use a model that does.")
                self.images += 1
                return f"<image {url[-16:]}>"
            case _:
                raise bare("Invalid 'content': 'content' objects must have a 'type' of 'text' or 'image_url'")


def read_messages(messages: object, model: FakeModel) -> Prompt:
    """Returns the conversation of a request.

    Raises:
        RefusedError: the server would not take it.
    """
    return _Reader(model=model).read(messages)


def overflow_message(instance: Instance, tokens: int) -> str:
    """Returns what the server says of a prompt that is too long."""
    return _OVERFLOW.format(kept=tokens, context=instance.context_length)


def plan(body: Json, prompt: Prompt, instance: Instance, *, logprobs: bool) -> Plan:
    """Returns what is said to a request.

    Raises:
        RefusedError: the request is malformed.
        TooLongError: the prompt is too long.
    """
    tools = _tools(body)
    schema = _schema(body)
    prompt_tokens = prompt.tokens
    if prompt_tokens >= instance.context_length:
        raise TooLongError
    pieces = [*_reasoning(body, prompt, instance.model), *_body(body, prompt, instance.model, tools, schema)]
    finish: Literal["stop", "length", "tool_calls"] = "stop"
    reason = "eosFound"
    if any(piece.kind == "tool_start" for piece in pieces):
        finish, reason = "tool_calls", "toolCalls"
    stopped = _stop(pieces, body.get("stop"))
    if stopped is not None:
        pieces, reason = stopped, "stopStringFound"
    limit = body.get("max_tokens", -1)
    if limit is not None and not isinstance(limit, int):
        raise bare("'max_tokens' must be an integer")
    room = instance.context_length - prompt_tokens
    if isinstance(limit, int) and 0 <= limit < min(len(pieces), room):
        pieces, finish, reason = pieces[:limit], "length", "maxPredictedTokensReached"
    elif len(pieces) > room:
        pieces, finish, reason = pieces[:room], "length", "contextLengthReached"
    top = body.get("top_logprobs")
    return Plan(
        pieces=pieces,
        finish=finish,
        stop_reason=reason,
        prompt_tokens=prompt_tokens,
        reasoning_tokens=sum(piece.kind == "reasoning" for piece in pieces),
        logprobs=(top if isinstance(top, int) else 0) if logprobs and body.get("logprobs") is True else None,
    )


def _seed(body: Json) -> int | None:
    seed = body.get("seed")
    greedy = body.get("temperature") == 0
    return seed if isinstance(seed, int) and not greedy else None


def _tools(body: Json) -> list[Mapping[str, object]]:
    tools = body.get("tools")
    choice = body.get("tool_choice", "auto")
    if choice not in (None, "auto", "none", "required"):
        raise bare("Invalid tool_choice type: 'object'. Supported string values: none, auto, required")
    if tools is None or choice == "none":
        return []
    if not isinstance(tools, list):
        raise bare("'tools' must be an array")
    found: list[Mapping[str, object]] = []
    for tool in tools:
        match tool:
            case {"type": "function", "function": {"name": str()} as function}:
                found.append(function)
            case _:
                raise bare(
                    "Invalid 'tools': each tool must have 'type' 'function' and a 'function' with a 'name'"
                )
    return found


def _schema(body: Json) -> object:
    shape = body.get("response_format")
    if shape is None:
        return None
    match shape:
        case {"type": "text"}:
            return None
        case {"type": "json_schema", "json_schema": {"schema": Mapping() as schema}}:
            return schema
        case {"type": "json_schema"}:
            raise bare("'response_format.json_schema.schema' must be an object")
        case _:
            raise bare("'response_format.type' must be 'json_schema' or 'text'")


def _reasoning(body: Json, prompt: Prompt, model: FakeModel) -> list[Piece]:
    if not model.reasoning or body.get("reasoning_effort") == "none":
        return []
    words = text.answer(prompt.text, model=model.key, seed=_seed(body), kind="reasoning")
    if model.reasoning == "inline":
        inline = ["<thi", "nk>\n", *words, "\n</", "think>", "\n\n"]
        return [Piece("content", word) for word in inline]
    return [Piece("reasoning", word) for word in words]


def _body(
    body: Json, prompt: Prompt, model: FakeModel, tools: Sequence[Mapping[str, object]], schema: object
) -> list[Piece]:
    required = body.get("tool_choice") == "required"
    if tools and (required or prompt.last_role != "tool"):
        named = [one for one in tools if re.search(rf"\b{re.escape(str(one['name']))}\b", prompt.last_user)]
        called = named or (list(tools[:1]) if required else [])
        if called:
            return _calls(called, prompt)
    if schema is not None:
        value = orjson.dumps(text.instance(schema)).decode()
        return [Piece("content", value[at : at + 4]) for at in range(0, len(value), 4)]
    words = text.answer(prompt.text, model=model.key, seed=_seed(body))
    return [Piece("content", word) for word in words]


def _calls(called: Sequence[Mapping[str, object]], prompt: Prompt) -> list[Piece]:
    pieces: list[Piece] = []
    for index, function in enumerate(called):
        name = str(function["name"])
        arguments = orjson.dumps(text.instance(function.get("parameters", {"type": "object"}))).decode()
        pieces.append(Piece("tool_start", name, index, text.digits(f"{prompt.text}{index}{name}")))
        pieces += [
            Piece("tool_arguments", arguments[at : at + 5], index) for at in range(0, len(arguments), 5)
        ]
    return pieces


def _stop(pieces: Sequence[Piece], stop: object) -> list[Piece] | None:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list):
        return None
    said = "".join(piece.text for piece in pieces if piece.kind == "content")
    places = [said.find(one) for one in stops if isinstance(one, str) and one and one in said]
    if not places:
        return None
    room = min(places)
    kept: list[Piece] = []
    for piece in pieces:
        if piece.kind != "content":
            kept.append(piece)
        elif room > 0:
            kept.append(Piece("content", piece.text[:room]))
            room -= len(piece.text)
    return kept


def read_native_input(value: object, *, item: str, model: FakeModel) -> Prompt:
    """Returns the conversation of a native chat request.

    Args:
        value: the `input` of the request.
        item: type of text items that this version knows.
        model: model that is asked.

    Raises:
        RefusedError: the server would not take it.
    """
    if isinstance(value, str):
        return Prompt(text=f"user: {value}", last_user=value)
    if not isinstance(value, list) or not value:
        raise native('"input" is required', code="missing_required_parameter", param="input")
    said: list[str] = []
    images = 0
    for part in value:
        match part:
            case {"type": kind, "content": str(words)} if kind == item:
                said.append(words)
            case {"type": "image", "data_url": str(url)} if url.startswith("data:image/"):
                if not model.vision:
                    raise native("Model does not support images", param="input")
                images += 1
                said.append(f"<image {url[-16:]}>")
            case _:
                raise native(
                    f"Invalid discriminator value. Expected '{item}' | 'image'",
                    code="invalid_union",
                    param="input",
                )
    joined = "\n".join(said)
    return Prompt(text=f"user: {joined}", last_user=joined, images=images)
