"""Requests into the OpenAI dialect. Pure: no I/O, no clock.

Whatever a flavor is known to ignore is refused, or left out with a
`Degradation` where the caller accepts that. Nothing is left out in silence.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from google.protobuf import json_format

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import CapabilityUnsupported, InvalidRequest
from forebay.openai_bridge.flavors import Flavor
from forebay.upstream.values import JsonObject, JsonValue, obj, parse

OPTIONS_KEY: Final = "openai"
"""Our key in `backend_options`."""

RESERVED: Final = frozenset(
    {
        "model",
        "messages",
        "stream",
        "stream_options",
        "n",
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "response_format",
        "json_schema",
        "grammar",
        "stop",
        "logprobs",
        "top_logprobs",
        "n_probs",
        "seed",
        "temperature",
        "max_tokens",
        "max_completion_tokens",
        "n_predict",
        "continue_final_message",
        "add_generation_prompt",
        "input",
        "encoding_format",
        "dimensions",
    }
)
"""Options that a request has fields for, or that would change what the bridge reads."""

_ALWAYS_FLOAT: Final = frozenset({"xtc_probability", "xtc_threshold"})  # mlx_lm.server refuses an integer 0
_ROLES: Final = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}
_EFFORTS: Final = {
    pb.REASONING_EFFORT_NONE: "none",
    pb.REASONING_EFFORT_LOW: "low",
    pb.REASONING_EFFORT_MEDIUM: "medium",
    pb.REASONING_EFFORT_HIGH: "high",
}
_CHOICES: Final = {pb.ToolChoice.MODE_NONE: "none", pb.ToolChoice.MODE_REQUIRED: "required"}
_SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "typical_p",
)


@dataclass(slots=True)
class Shortfalls:
    """Collects what a reply will lack, and refuses what its caller does not accept to lack."""

    accepted: Sequence[pb.DegradationKind.ValueType]
    backend: str
    found: list[pb.Degradation] = field(default_factory=list)

    def lack(self, kind: pb.DegradationKind.ValueType, path: str, *, missing: str, instead: str) -> None:
        """Notes a shortfall.

        Args:
            kind: what kind it is.
            path: the field that is not honoured.
            missing: what the backend cannot do, as the end of "<backend> cannot ...".
            instead: what is done, in one sentence.

        Raises:
            CapabilityUnsupported: the caller does not accept shortfalls of this kind.
        """
        if kind not in self.accepted:
            name = pb.DegradationKind.Name(kind)
            raise CapabilityUnsupported(
                f"{self.backend} cannot {missing}; leave {path} out, or accept {name}",
                metadata={"backend": self.backend, "field": path},
                violations=[(path, f"cannot be honoured: {self.backend} cannot {missing}")],
            )
        self.found.append(pb.Degradation(kind=kind, field=path, detail=instead))


def chat_body(
    request: pb.GenerateRequest, *, model: str, flavor: Flavor, vision: bool, shortfalls: Shortfalls
) -> JsonObject:
    """Returns the body of a chat completion request.

    Args:
        request: what is asked for.
        model: the model's name as the server knows it.
        flavor: what the server is.
        vision: whether the model may take images.
        shortfalls: takes what cannot be honoured.

    Raises:
        CapabilityUnsupported: something cannot be honoured and the caller does not accept that.
        InvalidRequest: `backend_options` holds what it must not.
    """
    body: JsonObject = {
        "model": model,
        "messages": messages(request.messages, flavor=flavor, vision=vision, shortfalls=shortfalls),
        "stream": True,
        # Never an empty object: mlx_lm.server then ends the stream without its [DONE].
        "stream_options": {"include_usage": True},
    }
    _sampling(body, request.sampling, flavor, shortfalls)
    if request.limits.HasField("max_output_token_count"):
        body["max_tokens"] = request.limits.max_output_token_count
    if request.limits.stop_sequences and flavor.stops:
        body["stop"] = list(request.limits.stop_sequences)
    if request.limits.stop_token_ids:
        shortfalls.lack(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "limits.stop_token_ids",
            missing="end a reply at a token's identifier",
            instead="No further token ends the reply.",
        )
    _tools(body, request, flavor, shortfalls)
    _output_format(body, request.output_format, flavor, shortfalls)
    _logprobs(body, request, flavor, shortfalls)
    _reasoning(body, request.reasoning_effort, flavor)
    _continue(body, request, flavor, shortfalls)
    if flavor.progress:
        body["return_progress"] = True
    _options(body, request.backend_options)
    return body


def count_body(request: pb.CountTokensRequest, *, model: str, flavor: Flavor, backend: str) -> JsonObject:
    """Returns the body that asks for the token count of a conversation."""
    strict = Shortfalls(accepted=(), backend=backend)
    body: JsonObject = {
        "model": model,
        "messages": messages(request.messages, flavor=flavor, vision=flavor.images, shortfalls=strict),
    }
    if request.tools:
        body["tools"] = [_tool(tool, index) for index, tool in enumerate(request.tools)]
    return body


def embed_body(request: pb.EmbedRequest, texts: Sequence[str], *, model: str, flavor: Flavor) -> JsonObject:
    """Returns the body of a request for embeddings. Floats are asked for: base64 is not always honoured."""
    body: JsonObject = {"model": model, "input": list(texts), "encoding_format": "float"}
    if request.HasField("dimension_count") and flavor.dimensions:
        body["dimensions"] = request.dimension_count
    _options(body, request.backend_options)
    return body


def messages(
    conversation: Iterable[pb.Message], *, flavor: Flavor, vision: bool, shortfalls: Shortfalls
) -> list[JsonValue]:
    """Returns a conversation in the OpenAI dialect."""
    result: list[JsonValue] = []
    for index, message in enumerate(conversation):
        if message.role == pb.ROLE_TOOL:
            result += [_tool_result(part.tool_result) for part in message.parts]
        elif message.role == pb.ROLE_ASSISTANT:
            result.append(_assistant(message, flavor))
        else:
            can_see = vision and flavor.images
            result.append(_said(message, f"messages[{index}]", can_see=can_see, shortfalls=shortfalls))
    return result


def _said(message: pb.Message, path: str, *, can_see: bool, shortfalls: Shortfalls) -> JsonObject:
    parts: list[JsonValue] = []
    texts: list[str] = []
    for index, part in enumerate(message.parts):
        if part.WhichOneof("kind") == "image":
            if not can_see:
                shortfalls.lack(
                    pb.DEGRADATION_KIND_IMAGE_DROPPED,
                    f"{path}.parts[{index}].image",
                    missing="show an image to this model",
                    instead="The image is left out.",
                )
                continue
            data = base64.b64encode(part.image.data).decode("ascii")
            url = f"data:{part.image.media_type};base64,{data}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            texts.append(part.text)
            parts.append({"type": "text", "text": part.text})
    only_text = len(texts) == len(parts)
    return {"role": _ROLES[message.role], "content": "".join(texts) if only_text else parts}


def _assistant(message: pb.Message, flavor: Flavor) -> JsonObject:
    calls: list[JsonValue] = [
        {
            "id": part.tool_call.id,
            "type": "function",
            "function": {"name": part.tool_call.name, "arguments": part.tool_call.arguments_json or "{}"},
        }
        for part in message.parts
        if part.WhichOneof("kind") == "tool_call"
    ]
    # Always a string: beside tool calls some servers refuse null and some refuse to find none.
    said: JsonObject = {"role": "assistant", "content": "".join(part.text for part in message.parts)}
    reasoning = "".join(part.reasoning for part in message.parts)
    if reasoning and flavor.reasoning_history:
        said["reasoning_content"] = reasoning
    if calls:
        said["tool_calls"] = calls
    return said


def _tool_result(result: pb.ToolResult) -> JsonObject:
    said: JsonObject = {"role": "tool", "tool_call_id": result.id, "content": result.text}
    if result.name:
        said["name"] = result.name
    return said


def _sampling(body: JsonObject, sampling: pb.Sampling, flavor: Flavor, shortfalls: Shortfalls) -> None:
    given = {descriptor.name for descriptor, _ in sampling.ListFields()}
    for name in (*_SAMPLING, "logit_bias"):
        if name not in given:
            continue
        key = flavor.sampling.get(name)
        if key is None:
            shortfalls.lack(
                pb.DEGRADATION_KIND_OPTION_IGNORED,
                f"sampling.{name}",
                missing=f"be told {name}",
                instead="The server's own setting is used.",
            )
        elif name == "logit_bias":
            body[key] = {str(token): _short(bias) for token, bias in sorted(sampling.logit_bias.items())}
        else:
            value: int | float = getattr(sampling, name)
            body[key] = value if isinstance(value, int) else _short(value)


def _short(value: float) -> float:
    """Returns a float32 as people wrote it: 0.7 and not 0.699999988079071."""
    return float(f"{value:.7g}")


def _tools(body: JsonObject, request: pb.GenerateRequest, flavor: Flavor, shortfalls: Shortfalls) -> None:
    choice = request.tool_choice
    if not request.tools:
        return
    if choice.mode == pb.ToolChoice.MODE_NONE and not flavor.tool_choice:
        return  # tools that are not offered are not called, which is what is asked
    body["tools"] = [_tool(tool, index) for index, tool in enumerate(request.tools)]
    mode = _CHOICES.get(choice.mode)
    if mode is None:
        return
    if not flavor.tool_choice:
        shortfalls.lack(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "tool_choice",
            missing="make the model call a tool",
            instead="The model decides whether it calls a tool.",
        )
    elif choice.tool_name:
        body["tool_choice"] = {"type": "function", "function": {"name": choice.tool_name}}
    else:
        body["tool_choice"] = mode


def _tool(tool: pb.Tool, index: int) -> JsonObject:
    path = f"tools[{index}].parameters_json_schema"
    schema = _json(tool.parameters_json_schema, path) if tool.parameters_json_schema else None
    function: JsonObject = {
        "name": tool.name,
        "parameters": schema if schema is not None else {"type": "object", "properties": {}},
    }
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _output_format(body: JsonObject, wanted: pb.OutputFormat, flavor: Flavor, shortfalls: Shortfalls) -> None:
    kind = wanted.WhichOneof("constraint")
    if kind is None or (kind == "any_json" and not wanted.any_json):
        return
    if kind in {"regex", "lark_grammar"} or not flavor.output_format:
        shortfalls.lack(
            pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
            f"output_format.{kind}",
            missing=f"enforce {kind}",
            instead="The format is not enforced.",
        )
    elif kind == "any_json":
        body["response_format"] = {"type": "json_object"}
    else:
        schema = _json(wanted.json_schema, "output_format.json_schema")
        named: JsonObject = {"name": "reply", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": named}


def _logprobs(body: JsonObject, request: pb.GenerateRequest, flavor: Flavor, shortfalls: Shortfalls) -> None:
    ignored = pb.DEGRADATION_KIND_OPTION_IGNORED
    top = 0
    if request.HasField("logprobs"):
        top = request.logprobs.top_logprob_count
        if flavor.top_logprobs is None or top > flavor.top_logprobs:
            shortfalls.lack(
                ignored, "logprobs", missing="stream log probabilities", instead="None are given."
            )
            top = 0
        else:
            body["logprobs"] = True
    if request.include_token_ids:
        if flavor.token_ids:
            body["logprobs"] = True  # that is where it names them
        else:
            shortfalls.lack(
                ignored, "include_token_ids", missing="name token identifiers", instead="None are given."
            )
    if "logprobs" in body:
        # At least one: for none, llama-server leaves the log probabilities out.
        body["top_logprobs"] = max(1, top)


def _reasoning(body: JsonObject, effort: pb.ReasoningEffort.ValueType, flavor: Flavor) -> None:
    word = _EFFORTS.get(effort)
    if word is None:
        return
    if not flavor.reasoning_kwargs:
        body["reasoning_effort"] = word
    elif effort == pb.REASONING_EFFORT_NONE:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    else:
        body["chat_template_kwargs"] = {"enable_thinking": True, "reasoning_effort": word}


def _continue(body: JsonObject, request: pb.GenerateRequest, flavor: Flavor, shortfalls: Shortfalls) -> None:
    if not request.HasField("continue_from"):
        return
    prefix = request.continue_from
    if not prefix.text and not prefix.reasoning:
        return  # nothing is there yet
    if not flavor.continues:
        raise CapabilityUnsupported(
            f"{shortfalls.backend} cannot go on from the start of a reply",
            metadata={"backend": shortfalls.backend, "field": "continue_from"},
        )
    said: JsonObject = {"role": "assistant", "content": prefix.text}
    if prefix.reasoning and flavor.reasoning_history:
        said["reasoning_content"] = prefix.reasoning
    conversation = body["messages"]
    assert isinstance(conversation, list)
    conversation.append(said)
    body["continue_final_message"] = True
    body["add_generation_prompt"] = False


def _options(body: JsonObject, options: Mapping[str, object]) -> None:
    if OPTIONS_KEY not in options:
        return
    given = obj(json_format.MessageToDict(options[OPTIONS_KEY]))  # type: ignore[arg-type]  # it is a Struct
    taken = sorted(key for key in given if key in RESERVED)
    if taken:
        raise InvalidRequest(
            f"backend_options[{OPTIONS_KEY!r}] must not set {', '.join(taken)}; the request has fields",
            violations=[
                (f"backend_options.{OPTIONS_KEY}.{key}", "set the request's own field") for key in taken
            ],
        )
    for key, value in given.items():
        kept = body.get(key)
        fitted = value if key in _ALWAYS_FLOAT else _whole(value)
        body[key] = {**kept, **fitted} if isinstance(kept, dict) and isinstance(fitted, dict) else fitted


def _whole(value: JsonValue) -> JsonValue:
    """Returns a value of a Struct, where every number is a float, with whole numbers as integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


def _json(text: str, path: str) -> JsonValue:
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON", violations=[(path, "must be JSON")]) from error
