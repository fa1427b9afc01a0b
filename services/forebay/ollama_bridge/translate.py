"""From a request to the body of `/api/chat`, and what of it cannot be had.

Ollama ignores what it does not know, so everything it would ignore is found
here, before it is sent: a shortfall is an error unless the caller accepted it.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from google.protobuf import json_format, struct_pb2

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import CapabilityUnsupported, ContextExceeded, InvalidRequest
from forebay.ollama_bridge.client import Version
from forebay.ollama_bridge.config import keep_alive_value
from forebay.ollama_bridge.models import Facts
from forebay.upstream.values import JsonObject, JsonValue, array, obj, parse

REQUEST_OPTIONS: Final[Mapping[str, str]] = {
    "num_keep": "an integer",
    "seed": "an integer",
    "num_predict": "an integer",
    "top_k": "an integer",
    "repeat_last_n": "an integer",
    "top_p": "a number",
    "min_p": "a number",
    "typical_p": "a number",
    "temperature": "a number",
    "repeat_penalty": "a number",
    "presence_penalty": "a number",
    "frequency_penalty": "a number",
    "stop": "a list of strings",
}
"""Options that a request may set, with the type that the server wants. It ignores other names."""

LOAD_OPTIONS: Final[Mapping[str, str]] = {
    "num_ctx": "an integer",
    "num_batch": "an integer",
    "num_gpu": "an integer",
    "main_gpu": "an integer",
    "num_thread": "an integer",
    "draft_num_predict": "an integer",
    "use_mmap": "a boolean",
}
"""Options that are fixed when a model is loaded."""

_SEED_LIMIT: Final = 2**31 - 1  # the server takes larger ones modulo 2^32, where one means `random`
_ZERO: Final = re.compile(r"-?(0+(\.0+)?[a-z]*)+")
_DATA_URI: Final = re.compile(rb"data:[\w.+/-]{1,64};base64,")
_EFFORTS: Final[Mapping[int, str]] = {
    pb.REASONING_EFFORT_LOW: "low",
    pb.REASONING_EFFORT_MEDIUM: "medium",
    pb.REASONING_EFFORT_HIGH: "high",
}
_SAMPLING: Final = (
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("min_p", "min_p"),
    ("typical_p", "typical_p"),
    ("repetition_penalty", "repeat_penalty"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
)


class Shortfalls:
    """What of a request is not honoured, as far as its caller accepts that.

    Args:
        accepted: kinds that the caller accepts.
        backend: the backend's name, for messages.
        model: the model, for messages.
    """

    def __init__(self, accepted: Iterable[pb.DegradationKind.ValueType], *, backend: str, model: str) -> None:
        self._accepted = frozenset(accepted)
        self._metadata = {"backend": backend, "model": model}
        self._backend = backend
        self.degradations: list[pb.Degradation] = []

    def note(self, kind: pb.DegradationKind.ValueType, path: str, *, lacks: str, instead: str) -> None:
        """Notes a shortfall.

        Args:
            kind: its kind.
            path: of the field that is not honoured.
            lacks: what cannot be done, as the end of a sentence that begins with the backend's name.
            instead: what is done, as a sentence.

        Raises:
            CapabilityUnsupported: the caller does not accept it.
        """
        if kind not in self._accepted:
            raise CapabilityUnsupported(
                f"{self._backend} {lacks}; leave {path} unset or accept {pb.DegradationKind.Name(kind)}",
                metadata={**self._metadata, "field": path},
            )
        self.degradations.append(pb.Degradation(kind=kind, field=path, detail=instead))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a model is to be run, whoever asks."""

    load_options: Mapping[str, JsonValue] = field(default_factory=dict)
    """Options that are sent with every request, as a change loads the model anew."""
    keep_alive: str = ""
    """How long the model stays; empty leaves it to the server."""
    shift: bool | None = False
    """Whether the server may drop old tokens; None is not said, for servers that do not know it."""

    def body(self, model: str) -> JsonObject:
        """Returns what every request for the model has in common."""
        body: JsonObject = {"model": model, "options": dict(self.load_options)}
        if self.keep_alive:
            body["keep_alive"] = keep_alive_value(self.keep_alive)
        if self.shift is not None:
            body["shift"] = self.shift
        return body

    def load_body(self, model: str) -> JsonObject:
        """Returns the request that loads the model. With a `keep_alive` of 0 it would unload it."""
        zero = _ZERO.fullmatch(self.keep_alive) is not None
        return (replace(self, keep_alive="") if zero else self).body(model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A chat that is ready to be sent."""

    body: JsonObject
    """What is sent to `/api/chat`."""
    degradations: tuple[pb.Degradation, ...] = ()
    """What is not honoured."""
    words: int = 0
    """Words in the prompt: it has at least as many tokens."""

    def with_(self, degradation: pb.Degradation, **changes: JsonValue) -> Plan:
        """Returns a plan with a changed body that falls short in one more way."""
        return replace(self, body={**self.body, **changes}, degradations=(*self.degradations, degradation))


def plan(
    request: pb.GenerateRequest, *, facts: Facts, setting: Setting, version: Version, backend: str
) -> Plan:
    """Returns the chat that serves a request.

    Raises:
        InvalidRequest: a value cannot be sent.
        CapabilityUnsupported: something cannot be done and the caller does not accept that.
    """
    short = Shortfalls(request.accepted_degradations, backend=backend, model=request.model)
    if not facts.can("completion"):
        raise CapabilityUnsupported(
            f"{request.model} embeds text and cannot generate it",
            metadata={"backend": backend, "model": request.model},
        )
    if request.HasField("continue_from"):
        # Some chat templates continue a trailing assistant message and some begin a new turn, and which
        # one a model does is nowhere said.
        raise CapabilityUnsupported(
            f"{backend} cannot be made to go on from a prefix", metadata={"backend": backend}
        )
    options, extra = _options(request, setting=setting)
    body = setting.body(request.model)
    body["options"] = {**obj(body["options"]), **_sampling(request, short), **options}
    body |= extra
    body["stream"] = True
    body["truncate"] = False
    shows = _images(request, facts, short)
    body["messages"] = _messages(request.messages, images=shows)
    tools = _tools(request, facts, short)
    if tools:
        body["tools"] = tools
    _think(request, facts, version, short, body)
    _format(request, version, short, body)
    _logprobs(request, version, short, body)
    if request.include_token_ids:
        short.note(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "include_token_ids",
            lacks="does not tell the identifiers of tokens",
            instead="No identifiers of tokens are given.",
        )
    return Plan(body=body, degradations=tuple(short.degradations), words=_words(request.messages))


def check_fits(words: int, context: int, *, backend: str) -> None:
    """Refuses a prompt that is certainly too long.

    Tokens do not cross the white space between words in any tokenizer that
    these servers run, so a prompt has at least as many tokens as words.

    Args:
        words: in the prompt.
        context: tokens that fit; 0 is not known.
        backend: the backend's name.

    Raises:
        ContextExceeded: there are more words than tokens fit.
    """
    if 0 < context < words:
        raise ContextExceeded(
            f"the prompt has at least {words} tokens and the model's context on {backend} holds {context}; "
            "shorten it or load the model with more context",
            metadata={
                "backend": backend,
                "prompt_token_count": str(words),
                "context_token_count": str(context),
            },
        )


def load_options(options: struct_pb2.Struct, path: str) -> JsonObject:
    """Returns the load-time options in a request to load a model.

    Raises:
        InvalidRequest: one is not known, or has the wrong type.
    """
    found: JsonObject = {}
    for key, value in _plain(options).items():
        if key not in LOAD_OPTIONS:
            raise _invalid(f"{path}.{key}", f"is not an option of loading{_closest(key, LOAD_OPTIONS)}")
        found[key] = _typed(value, LOAD_OPTIONS[key], f"{path}.{key}")
    return found


def embed_options(options: struct_pb2.Struct, setting: Setting, path: str) -> str:
    """Checks the options of a request for embeddings, and returns its `keep_alive` if it has one.

    Raises:
        InvalidRequest: one cannot be sent.
    """
    keep_alive = ""
    for key, value in _plain(options).items():
        if key == "keep_alive":
            keep_alive = _keep_alive(value, f"{path}.{key}")
        elif key in LOAD_OPTIONS:
            _pinned(key, value, setting, f"{path}.{key}")
        else:
            known = (*LOAD_OPTIONS, "keep_alive")
            raise _invalid(f"{path}.{key}", f"is not an option of embedding{_closest(key, known)}")
    return keep_alive


# Options


def _options(request: pb.GenerateRequest, *, setting: Setting) -> tuple[JsonObject, JsonObject]:
    """Returns `options`, and what of `backend_options` stands beside them."""
    options: JsonObject = {}
    extra: JsonObject = {}
    if "ollama" not in request.backend_options:
        return options, extra
    prefix = "backend_options[ollama]"
    for key, value in _plain(request.backend_options["ollama"]).items():
        path = f"{prefix}.{key}"
        if key == "keep_alive":
            extra[key] = keep_alive_value(_keep_alive(value, path))
        elif key in LOAD_OPTIONS:
            options[key] = _pinned(key, value, setting, path)
        elif key in REQUEST_OPTIONS:
            if twin := _twin(key, request):
                raise _invalid(path, f"is set by {twin} too; set one of them")
            options[key] = _typed(value, REQUEST_OPTIONS[key], path)
        else:
            known = (*REQUEST_OPTIONS, *LOAD_OPTIONS, "keep_alive")
            raise _invalid(path, f"is not an option of Ollama{_closest(key, known)}")
    return options, extra


def _twin(key: str, request: pb.GenerateRequest) -> str:
    """Returns the field of the request that sets the same option, if it is set."""
    for ours, theirs in _SAMPLING:
        if theirs == key and _has(request.sampling, ours):
            return f"sampling.{ours}"
    if key == "seed" and request.sampling.HasField("seed"):
        return "sampling.seed"
    if key == "num_predict" and request.limits.HasField("max_output_token_count"):
        return "limits.max_output_token_count"
    return "limits.stop_sequences" if key == "stop" and request.limits.stop_sequences else ""


def _has(sampling: pb.Sampling, name: str) -> bool:
    return sampling.HasField(name)  # type: ignore[arg-type]  # every name in _SAMPLING is a field


def _sampling(request: pb.GenerateRequest, short: Shortfalls) -> JsonObject:
    sampling, limits = request.sampling, request.limits
    options: JsonObject = {}
    for ours, theirs in _SAMPLING:
        if _has(sampling, ours):
            value = getattr(sampling, ours)
            # A float of 32 bits is sent as people wrote it: 0.7, and not 0.699999988079071.
            options[theirs] = float(f"{value:.7g}") if isinstance(value, float) else value
    if sampling.HasField("seed"):
        options["seed"] = sampling.seed if 0 <= sampling.seed < _SEED_LIMIT else sampling.seed % _SEED_LIMIT
    if limits.HasField("max_output_token_count"):
        options["num_predict"] = limits.max_output_token_count
    if limits.stop_sequences:
        options["stop"] = list(limits.stop_sequences)
    if limits.stop_token_ids:
        short.note(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "limits.stop_token_ids",
            lacks="cannot end a reply at a token's identifier",
            instead="No further token ends the reply.",
        )
    if sampling.logit_bias:
        short.note(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "sampling.logit_bias",
            lacks="has no logit bias",
            instead="No token's logit is changed.",
        )
    return options


def _plain(options: struct_pb2.Struct) -> JsonObject:
    value: JsonValue = json_format.MessageToDict(options)
    return obj(value)


def _typed(value: JsonValue, wanted: str, path: str) -> JsonValue:
    """Returns a value of a Struct, whose numbers are all floats, in the type that is wanted."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted == "an integer" and number and float(value) == int(value):  # type: ignore[arg-type]  # a number
        return int(value)  # type: ignore[arg-type]  # likewise
    if wanted == "a number" and number:
        return value
    if wanted == "a boolean" and isinstance(value, bool):
        return value
    if wanted == "a list of strings":
        items: list[JsonValue] = [value] if isinstance(value, str) else array(value)
        if isinstance(value, str | list) and all(isinstance(item, str) for item in items):
            return items
    raise _invalid(path, f"must be {wanted}")


def _pinned(key: str, value: JsonValue, setting: Setting, path: str) -> JsonValue:
    typed = _typed(value, LOAD_OPTIONS[key], path)
    if key not in setting.load_options or setting.load_options[key] != typed:
        pinned = setting.load_options.get(key)
        state = "is not set" if pinned is None else f"is set to {pinned}"
        raise _invalid(
            path,
            f"is fixed when the model is loaded and {state} for it; a change would load it anew for all. "
            "Load the model with it, or set it in the bridge's settings",
        )
    return typed


def _keep_alive(value: JsonValue, path: str) -> str:
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"-?\d+(\.\d+)?|-?(\d+(\.\d+)?(ns|us|ms|s|m|h))+", text):
        raise _invalid(path, 'must be a number of seconds, or a duration such as "5m"')
    return text


def _invalid(path: str, text: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {text}", violations=[(path, text)])


def _closest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# Messages


def _images(request: pb.GenerateRequest, facts: Facts, short: Shortfalls) -> bool:
    """Returns whether images are sent."""
    for i, message in enumerate(request.messages):
        for j, part in enumerate(message.parts):
            if part.WhichOneof("kind") == "image" and not facts.can("vision"):
                short.note(
                    pb.DEGRADATION_KIND_IMAGE_DROPPED,
                    f"messages[{i}].parts[{j}].image",
                    lacks=f"cannot show images to {request.model}",
                    instead="The image is left out.",
                )
    return facts.can("vision")


def _messages(messages: Iterable[pb.Message], *, images: bool) -> list[JsonValue]:
    found: list[JsonValue] = []
    names: dict[str, str] = {}
    for i, message in enumerate(messages):
        if message.role == pb.ROLE_TOOL:
            found.extend(_result(part.tool_result, names) for part in message.parts)
        elif message.role == pb.ROLE_ASSISTANT:
            found.append(_assistant(message, names))
        else:
            role = "system" if message.role == pb.ROLE_SYSTEM else "user"
            entry: JsonObject = {"role": role, "content": _text(message)}
            pictures: list[JsonValue] = [
                _base64(part.image.data, f"messages[{i}].parts[{j}].image.data")
                for j, part in enumerate(message.parts)
                if images and part.WhichOneof("kind") == "image"
            ]
            if pictures:
                entry["images"] = pictures
            found.append(entry)
    return found


def _text(message: pb.Message) -> str:
    return "\n".join(part.text for part in message.parts if part.WhichOneof("kind") == "text")


def _assistant(message: pb.Message, names: dict[str, str]) -> JsonObject:
    entry: JsonObject = {"role": "assistant", "content": _text(message)}
    reasoning = "\n".join(part.reasoning for part in message.parts if part.WhichOneof("kind") == "reasoning")
    if reasoning:
        entry["thinking"] = reasoning
    calls: list[JsonValue] = []
    for part in message.parts:
        if part.WhichOneof("kind") == "tool_call":
            call = part.tool_call
            names[call.id] = call.name
            arguments = parse(call.arguments_json or "{}")
            function: JsonObject = {"index": len(calls), "name": call.name, "arguments": arguments}
            calls.append({"id": call.id, "function": function})
    if calls:
        entry["tool_calls"] = calls
    return entry


def _result(result: pb.ToolResult, names: Mapping[str, str]) -> JsonObject:
    name = result.name or names.get(result.id, "")
    entry: JsonObject = {"role": "tool", "content": result.text, "tool_call_id": result.id}
    return {**entry, "tool_name": name} if name else entry


def _base64(data: bytes, path: str) -> str:
    """Returns bytes in bare base64. A data URI, which callers sometimes give, is opened first."""
    head = _DATA_URI.match(data[:128])
    if head is not None:
        try:
            data = base64.b64decode(data[head.end() :], validate=True)
        except binascii.Error as error:
            raise _invalid(path, "is a data URI whose base64 cannot be read; give the bytes") from error
    return base64.b64encode(data).decode("ascii")


def _words(messages: Iterable[pb.Message]) -> int:
    return sum(len(_text(message).split()) for message in messages)


# What stands beside the messages


def _tools(request: pb.GenerateRequest, facts: Facts, short: Shortfalls) -> list[JsonValue]:
    choice = request.tool_choice
    if not request.tools or choice.mode == pb.ToolChoice.MODE_NONE:
        return []  # a model that is offered no tool calls none
    if not facts.can("tools"):
        short.note(
            pb.DEGRADATION_KIND_TOOLS_DROPPED,
            "tools",
            lacks=f"cannot offer tools to {request.model}",
            instead="No tool is offered to the model.",
        )
        return []
    if choice.mode == pb.ToolChoice.MODE_REQUIRED:
        short.note(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "tool_choice",
            lacks="cannot make a model call a tool",
            instead="The model decides whether it calls a tool.",
        )
    tools: list[JsonValue] = []
    for tool in request.tools:
        schema = obj(parse(tool.parameters_json_schema or "{}"))
        parameters: JsonObject = {"type": "object", "properties": {}, **schema}
        function: JsonObject = {
            "name": tool.name,
            "description": tool.description,
            "parameters": parameters,
        }
        tools.append({"type": "function", "function": function})
    return tools


def _think(
    request: pb.GenerateRequest, facts: Facts, version: Version, short: Shortfalls, body: JsonObject
) -> None:
    effort = request.reasoning_effort
    if effort == pb.REASONING_EFFORT_UNSPECIFIED:
        return
    if effort == pb.REASONING_EFFORT_NONE:
        if facts.can("thinking") and version.thinks:
            body["think"] = False
        return
    if not facts.can("thinking") or not version.thinks:
        short.note(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "reasoning_effort",
            lacks=f"cannot make {request.model} reason",
            instead="The model does as it does by itself.",
        )
        return
    body["think"] = _EFFORTS.get(effort, "high")


def _format(request: pb.GenerateRequest, version: Version, short: Shortfalls, body: JsonObject) -> None:
    kind = request.output_format.WhichOneof("constraint")
    if kind == "any_json":
        body["format"] = "json"
    elif kind == "json_schema" and version.has_schemas:
        body["format"] = parse(request.output_format.json_schema)
    elif kind is not None:
        short.note(
            pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
            f"output_format.{kind}",
            lacks=f"cannot enforce a {kind}",
            instead="The reply has any form.",
        )


def _logprobs(request: pb.GenerateRequest, version: Version, short: Shortfalls, body: JsonObject) -> None:
    if not request.HasField("logprobs"):
        return
    if not version.has_logprobs:
        short.note(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "logprobs",
            lacks=f"of version {version.text} gives no log probabilities",
            instead="No log probabilities are given.",
        )
        return
    body["logprobs"] = True
    if request.logprobs.top_logprob_count:
        body["top_logprobs"] = request.logprobs.top_logprob_count
