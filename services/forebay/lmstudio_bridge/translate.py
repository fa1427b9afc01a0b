"""A request of ours as LM Studio's `/v1/chat/completions` wants it.

Pure: no I/O. What LM Studio would ignore or refuse is refused here, or left
out and said, if the caller accepts that.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.struct_pb2 import Struct

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import CapabilityUnsupported, InvalidRequest
from forebay.lmstudio_bridge.listing import Entry
from forebay.upstream.values import JsonObject, JsonValue, obj, parse

FRAMEWORK: Final = "lmstudio"
"""Our key in `backend_options`."""

_SAMPLING: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_NOT_SAMPLED: Final = ("min_p", "typical_p")
_EFFORTS: Final = {
    pb.REASONING_EFFORT_NONE: "none",
    pb.REASONING_EFFORT_LOW: "low",
    pb.REASONING_EFFORT_MEDIUM: "medium",
    pb.REASONING_EFFORT_HIGH: "high",
}


class Shortfalls:
    """What a reply will lack, if the caller accepts that.

    Args:
        accepted: kinds of shortfall that the caller accepts.
        backend: the backend's name, for the metadata.
        model: the model that is asked.
    """

    def __init__(self, accepted: Sequence[pb.DegradationKind.ValueType], *, backend: str, model: str) -> None:
        self._accepted = frozenset(accepted)
        self._metadata = {"backend": backend, "model": model}
        self.found: list[pb.Degradation] = []

    def add(self, kind: pb.DegradationKind.ValueType, path: str, lacking: str, instead: str) -> None:
        """Takes a shortfall.

        Args:
            kind: its kind.
            path: path of the field.
            lacking: what cannot be done, a sentence without its end.
            instead: what is done instead, one sentence.

        Raises:
            CapabilityUnsupported: the caller does not accept it.
        """
        if kind not in self._accepted:
            raise CapabilityUnsupported(
                f"{path}: {lacking}; leave it unset or accept {pb.DegradationKind.Name(kind)}",
                metadata={**self._metadata, "field": path},
            )
        self.found.append(pb.Degradation(kind=kind, field=path, detail=instead))

    def note(self, kind: pb.DegradationKind.ValueType, path: str, instead: str) -> None:
        """Takes a shortfall that is no error, and is told to callers who accept its kind."""
        if kind in self._accepted and not any(one.field == path for one in self.found):
            self.found.append(pb.Degradation(kind=kind, field=path, detail=instead))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `backend_options["lmstudio"]` of a request holds."""

    ttl: float | None = None
    """Seconds the model stays in memory after this use. None is the bridge's own setting."""
    draft_model: str = ""
    """Smaller model that drafts tokens for the larger to check. Empty is none."""


def read_options(backend_options: Mapping[str, Struct], *, draft: bool = True) -> Options:
    """Returns our own options of a request.

    Args:
        backend_options: all frameworks' options.
        draft: whether `draft_model` makes sense.

    Raises:
        InvalidRequest: an option is not known or has the wrong type; violations name each one.
    """
    bad: list[tuple[str, str]] = []
    ttl: float | None = None
    draft_model = ""
    for name, value in _struct(backend_options).items():
        path = f"backend_options[{FRAMEWORK}].{name}"
        if name == "ttl":
            if isinstance(value, float) and value >= 0 and math.isfinite(value):
                ttl = value
            else:
                bad.append((path, "must be a number of seconds, 0 or more"))
        elif name == "draft_model" and draft:
            if isinstance(value, str) and value:
                draft_model = value
            else:
                bad.append((path, "must be the key of a model"))
        else:
            known = "ttl, draft_model" if draft else "ttl"
            bad.append((path, f"is no option; there are {known}"))
    _refuse(bad)
    return Options(ttl=ttl, draft_model=draft_model)


_LOAD_OPTIONS: Final = {
    "context_length": int,
    "eval_batch_size": int,
    "num_experts": int,
    "flash_attention": bool,
    "offload_kv_cache_to_gpu": bool,
}


def read_load_options(backend_options: Mapping[str, Struct]) -> dict[str, int | bool]:
    """Returns how a request wants its model loaded.

    Raises:
        InvalidRequest: an option is not known or has the wrong type; violations name each one.
    """
    bad: list[tuple[str, str]] = []
    options: dict[str, int | bool] = {}
    for name, value in _struct(backend_options).items():
        path = f"backend_options[{FRAMEWORK}].{name}"
        kind = _LOAD_OPTIONS.get(name)
        if kind is None:
            bad.append((path, f"is no option; there are {', '.join(sorted(_LOAD_OPTIONS))}"))
        elif kind is bool and isinstance(value, bool):
            options[name] = value
        elif kind is int and isinstance(value, float) and value.is_integer() and value >= 1:
            options[name] = int(value)
        else:
            bad.append((path, "must be true or false" if kind is bool else "must be a whole number from 1"))
    _refuse(bad)
    return options


def read_quantization(backend_options: Mapping[str, Struct]) -> str:
    """Returns the quantisation that a fetch asks for, empty for LM Studio's choice.

    Raises:
        InvalidRequest: an option is not known or has the wrong type.
    """
    bad: list[tuple[str, str]] = []
    quantization = ""
    for name, value in _struct(backend_options).items():
        path = f"backend_options[{FRAMEWORK}].{name}"
        if name != "quantization":
            bad.append((path, "is no option; there is quantization"))
        elif isinstance(value, str) and value:
            quantization = value
        else:
            bad.append((path, "must be the name of a quantisation, such as Q4_K_M"))
    _refuse(bad)
    return quantization


def chat_body(
    request: pb.GenerateRequest,
    *,
    entry: Entry,
    model: str,
    options: Options,
    shortfalls: Shortfalls,
    backend: str,
    jit: bool,
) -> dict[str, object]:
    """Returns the body for `/v1/chat/completions`.

    Args:
        request: what is asked for.
        entry: the model that is to answer.
        model: what reaches it.
        options: our own options of the request.
        shortfalls: takes what the reply will lack.
        backend: the backend's name, for messages.
        jit: whether LM Studio may have to load the model for this request.

    Raises:
        CapabilityUnsupported: LM Studio or the model cannot do what is asked.
    """
    body: dict[str, object] = {
        "model": model,
        "messages": messages(request.messages, entry=entry, shortfalls=shortfalls),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.HasField("continue_from"):
        raise CapabilityUnsupported(
            "continue_from: LM Studio cannot go on from the start of a reply",
            metadata={"backend": backend, "model": entry.key, "field": "continue_from"},
        )
    body |= sampling(request.sampling, shortfalls)
    body |= _limits(request.limits)
    body |= _tools(request, entry, shortfalls)
    body |= _output_format(request.output_format, shortfalls)
    body |= _reasoning(request.reasoning_effort, entry, shortfalls)
    if request.HasField("logprobs"):
        body["logprobs"] = True
        if request.logprobs.top_logprob_count:
            body["top_logprobs"] = request.logprobs.top_logprob_count
    if request.include_token_ids:
        shortfalls.add(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "include_token_ids",
            "LM Studio does not tell the identifiers of tokens",
            "No token identifiers are given.",
        )
    if request.limits.stop_token_ids:
        shortfalls.add(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "limits.stop_token_ids",
            "LM Studio cannot end a reply at a token's identifier",
            "No further token ends the reply.",
        )
    if options.draft_model:
        body["draft_model"] = options.draft_model
    if jit and options.ttl is not None:
        body["ttl"] = int(options.ttl)
    return body


def messages(
    conversation: Sequence[pb.Message], *, entry: Entry, shortfalls: Shortfalls
) -> list[dict[str, object]]:
    """Returns a conversation as LM Studio wants it."""
    return [
        message
        for position, one in enumerate(conversation)
        for message in _message(one, f"messages[{position}]", entry, shortfalls)
    ]


def _message(
    message: pb.Message, path: str, entry: Entry, shortfalls: Shortfalls
) -> Iterator[dict[str, object]]:
    if message.role == pb.ROLE_TOOL:
        for part in message.parts:
            result = part.tool_result
            yield {"role": "tool", "tool_call_id": result.id, "content": result.text}
    elif message.role == pb.ROLE_ASSISTANT:
        yield _assistant(message, path, shortfalls)
    elif message.role == pb.ROLE_SYSTEM:
        yield {"role": "system", "content": _text(message)}
    else:
        yield {"role": "user", "content": _user(message, path, entry, shortfalls)}


def _assistant(message: pb.Message, path: str, shortfalls: Shortfalls) -> dict[str, object]:
    # The content is there even if it is empty: LM Studio refuses a message without it.
    found: dict[str, object] = {"role": "assistant", "content": _text(message)}
    calls = [part.tool_call for part in message.parts if part.WhichOneof("kind") == "tool_call"]
    if calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json or "{}"},
            }
            for call in calls
        ]
    if any(part.WhichOneof("kind") == "reasoning" for part in message.parts):
        shortfalls.note(
            pb.DEGRADATION_KIND_PROMPT_TRUNCATED,
            f"{path}.parts",
            "Earlier reasoning is left out, as the chat templates of reasoning models do too.",
        )
    return found


def _user(message: pb.Message, path: str, entry: Entry, shortfalls: Shortfalls) -> object:
    parts: list[dict[str, object]] = []
    for position, part in enumerate(message.parts):
        if part.WhichOneof("kind") == "text":
            parts.append({"type": "text", "text": part.text})
        elif entry.vision is False:
            shortfalls.add(
                pb.DEGRADATION_KIND_IMAGE_DROPPED,
                f"{path}.parts[{position}].image",
                f"{entry.key} does not read images",
                "The image is left out.",
            )
        else:
            parts.append({"type": "image_url", "image_url": {"url": data_uri(part.image)}})
    if all(part["type"] == "text" for part in parts):
        return "".join(str(part["text"]) for part in parts)
    return parts


def data_uri(image: pb.Blob) -> str:
    """Returns an image as a `data:` URI."""
    return f"data:{image.media_type};base64,{base64.b64encode(image.data).decode('ascii')}"


def _text(message: pb.Message) -> str:
    return "".join(part.text for part in message.parts if part.WhichOneof("kind") == "text")


def sampling(wanted: pb.Sampling, shortfalls: Shortfalls) -> dict[str, object]:
    """Returns the settings of sampling that LM Studio has."""
    found: dict[str, object] = {}
    for descriptor, value in wanted.ListFields():
        name = descriptor.name
        if name in _SAMPLING:
            found[_SAMPLING[name]] = plain(value)
        elif name in _NOT_SAMPLED:
            shortfalls.add(
                pb.DEGRADATION_KIND_OPTION_IGNORED,
                f"sampling.{name}",
                f"LM Studio has no {name} in its chat API",
                f"The model's own setting of {name} is used.",
            )
    if wanted.logit_bias:
        found["logit_bias"] = {str(token): plain(bias) for token, bias in sorted(wanted.logit_bias.items())}
    return found


def plain(value: float) -> float:
    """Returns a number as it was written: a float32 of 0.7 is 0.7 and not 0.699999988."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _limits(limits: pb.GenerationLimits) -> dict[str, object]:
    found: dict[str, object] = {}
    if limits.HasField("max_output_token_count"):
        found["max_tokens"] = limits.max_output_token_count
    if limits.stop_sequences:
        found["stop"] = list(limits.stop_sequences)
    return found


def _tools(request: pb.GenerateRequest, entry: Entry, shortfalls: Shortfalls) -> dict[str, object]:
    choice = request.tool_choice
    tools = list(request.tools)
    if not tools:
        return {}
    found: dict[str, object] = {}
    if choice.mode == pb.ToolChoice.MODE_REQUIRED:
        if choice.tool_name:
            # LM Studio refuses to be told which tool; with one on offer there is no other.
            tools = [tool for tool in tools if tool.name == choice.tool_name]
        if entry.format == "mlx":
            shortfalls.add(
                pb.DEGRADATION_KIND_OPTION_IGNORED,
                "tool_choice",
                "LM Studio can require a call of its GGUF models only, and this is an MLX model",
                "The model decides whether it calls a tool.",
            )
        else:
            found["tool_choice"] = "required"
    elif choice.mode == pb.ToolChoice.MODE_NONE:
        found["tool_choice"] = "none"
    found["tools"] = [{"type": "function", "function": _function(tool)} for tool in tools]
    return found


def _function(tool: pb.Tool) -> dict[str, object]:
    nothing: JsonObject = {"type": "object", "properties": {}}
    parameters = _schema(tool.parameters_json_schema) if tool.parameters_json_schema else nothing
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


def _output_format(wanted: pb.OutputFormat, shortfalls: Shortfalls) -> dict[str, object]:
    kind = wanted.WhichOneof("constraint")
    if kind == "json_schema":
        return _json_format(_schema(wanted.json_schema))
    if kind == "any_json":
        return _json_format({})  # LM Studio refuses `json_object`; an empty schema is any value
    if kind is not None:
        shortfalls.add(
            pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
            f"output_format.{kind}",
            "LM Studio enforces JSON schemas only",
            "The reply may have any form.",
        )
    return {}


def _json_format(schema: JsonValue) -> dict[str, object]:
    shape = {"name": "reply", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": shape}}


def _reasoning(
    effort: pb.ReasoningEffort.ValueType, entry: Entry, shortfalls: Shortfalls
) -> dict[str, object]:
    word = _EFFORTS.get(effort)
    if word is None:
        return {}
    if entry.reasoning is False:
        if effort != pb.REASONING_EFFORT_NONE:
            shortfalls.add(
                pb.DEGRADATION_KIND_OPTION_IGNORED,
                "reasoning_effort",
                f"{entry.key} does not reason",
                "The model answers without reasoning.",
            )
        return {}
    if effort == pb.REASONING_EFFORT_NONE and entry.efforts and "off" not in entry.efforts:
        shortfalls.add(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "reasoning_effort",
            f"{entry.key} cannot answer without reasoning",
            "The model reasons as much as it does by default.",
        )
        return {}
    if effort != pb.REASONING_EFFORT_NONE and entry.efforts and word not in entry.efforts:
        shortfalls.add(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "reasoning_effort",
            f"{entry.key} knows only {', '.join(entry.efforts)}",
            "The model reasons as much as it does by default.",
        )
        return {}
    return {"reasoning_effort": word}


def _schema(source: str) -> JsonObject:
    return obj(parse(source))  # checked at the edge


def _struct(backend_options: Mapping[str, Struct]) -> dict[str, object]:
    if FRAMEWORK not in backend_options:
        return {}
    return dict(backend_options[FRAMEWORK].items())


def _refuse(bad: list[tuple[str, str]]) -> None:
    if bad:
        raise InvalidRequest("; ".join(f"{path} {text}" for path, text in bad[:3]), violations=bad)
