"""What makes a request malformed, whichever backend it is for.

Only what no framework could serve is refused here. Each finding names the
field and says what would be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import orjson

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Request
from forebay.models.v1 import models_pb2 as models_pb

FRAMEWORKS = frozenset({"mlx", "ollama", "lmstudio", "openai", "scripted"})
"""Keys that `backend_options` may have."""

MAX_STOP_SEQUENCES = 16
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
MAX_REQUEST_ID = 128
MAX_SCHEMA_BYTES = 256 * 1024
MAX_EMBED_TEXTS = 10_000

MAX_SECONDS = 315_576_000_000
"""Most seconds that a Duration of protobuf may have."""

Violation = tuple[str, str]
"""Path of a field, and what is wrong with it."""

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_REQUEST_ID = re.compile(r"[\x21-\x7e]*")

_RANGES: tuple[tuple[str, float, float, bool, str], ...] = (
    ("temperature", 0.0, 2.0, False, "in [0.0, 2.0]"),
    ("top_p", 0.0, 1.0, True, "in (0.0, 1.0]"),
    ("typical_p", 0.0, 1.0, True, "in (0.0, 1.0]"),
    ("min_p", 0.0, 1.0, False, "in [0.0, 1.0]"),
    ("repetition_penalty", 0.0, 10.0, True, "in (0.0, 10.0]"),
    ("presence_penalty", -2.0, 2.0, False, "in [-2.0, 2.0]"),
    ("frequency_penalty", -2.0, 2.0, False, "in [-2.0, 2.0]"),
)

_PARTS_OF_ROLE = {
    pb.ROLE_SYSTEM: {"text"},
    pb.ROLE_USER: {"text", "image"},
    pb.ROLE_ASSISTANT: {"text", "tool_call", "reasoning"},
    pb.ROLE_TOOL: {"tool_result"},
}


def violations(request: Request, *, model_required: bool = True) -> list[Violation]:
    """Returns everything that is wrong with a request; empty if nothing is.

    Args:
        request: what a caller sent.
        model_required: whether `model` may be empty.
    """
    return list(_violations(request, model_required=model_required))


def load_violations(request: models_pb.LoadModelRequest) -> list[Violation]:
    """Returns everything that is wrong with how a model is to be loaded; empty if nothing is."""
    found = []
    if request.HasField("context_token_count") and request.context_token_count < 1:
        found.append(("context_token_count", "must be at least 1"))
    keep = request.keep_alive_duration
    if not (0 <= keep.seconds <= MAX_SECONDS and 0 <= keep.nanos < 1_000_000_000):
        found.append(("keep_alive_duration", f"must be more than 0s and at most {MAX_SECONDS}s"))
    elif request.HasField("keep_alive_duration") and not keep.seconds + keep.nanos:
        # To some frameworks this is never and to others at once.
        found.append(("keep_alive_duration", "must be more than 0; set `pinned` to keep the model for ever"))
    return found


def _violations(request: Request, *, model_required: bool) -> Iterator[Violation]:
    if model_required and not request.model:
        yield "model", "name a model; ListModels lists them"
    if len(request.request_id) > MAX_REQUEST_ID or not _REQUEST_ID.fullmatch(request.request_id):
        yield "request_id", f"use at most {MAX_REQUEST_ID} printable ASCII characters without spaces"
    if isinstance(request, pb.GenerateRequest):
        yield from _generate(request)
    elif isinstance(request, pb.EmbedRequest):
        yield from _embed(request)
    else:
        yield from _messages(request.messages)
        yield from _tools(request.tools)
    if request.HasField("routing"):
        yield from _routing(request.routing)


def _generate(request: pb.GenerateRequest) -> Iterator[Violation]:
    yield from _messages(request.messages)
    # Nothing is wrong with what is not set, and most requests set little.
    if request.HasField("sampling"):
        yield from _sampling(request.sampling)
    if request.HasField("limits"):
        yield from _limits(request.limits)
    if request.tools:
        yield from _tools(request.tools)
    if request.HasField("tool_choice"):
        yield from _tool_choice(request)
    if request.HasField("output_format"):
        yield from _output_format(request.output_format)
    if request.HasField("logprobs") and not 0 <= request.logprobs.top_logprob_count <= MAX_TOP_LOGPROBS:
        yield "logprobs.top_logprob_count", f"must be in [0, {MAX_TOP_LOGPROBS}]"
    yield from _options(request.backend_options)


def _embed(request: pb.EmbedRequest) -> Iterator[Violation]:
    if not request.texts:
        yield "texts", "give at least one text"
    if len(request.texts) > MAX_EMBED_TEXTS:
        yield "texts", f"give at most {MAX_EMBED_TEXTS} texts; split the batch"
    if request.HasField("dimension_count") and request.dimension_count < 1:
        yield "dimension_count", "must be at least 1"
    yield from _options(request.backend_options)


def _messages(messages: Sequence[pb.Message]) -> Iterator[Violation]:
    if not messages:
        yield "messages", "give at least one message"
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        allowed = _PARTS_OF_ROLE.get(message.role)
        if allowed is None:
            yield f"{path}.role", "must be ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT or ROLE_TOOL"
            continue
        if not message.parts:
            yield f"{path}.parts", "give at least one part"
        for j, part in enumerate(message.parts):
            yield from _part(part, f"{path}.parts[{j}]", pb.Role.Name(message.role), allowed)


def _part(part: pb.Part, path: str, role: str, allowed: set[str]) -> Iterator[Violation]:
    kind = part.WhichOneof("kind")
    if kind is None:
        yield path, "set text, image, tool_call, tool_result or reasoning"
    elif kind not in allowed:
        yield path, f"a message of {role} can hold {', '.join(sorted(allowed))}, not {kind}"
    elif kind == "image":
        if not part.image.data:
            yield f"{path}.image.data", "holds no bytes"
        if not part.image.media_type.startswith("image/"):
            yield f"{path}.image.media_type", "must be an image type such as image/png"
    elif kind == "tool_call":
        if not part.tool_call.id:
            yield f"{path}.tool_call.id", "must not be empty"
        if not part.tool_call.name:
            yield f"{path}.tool_call.name", "must not be empty"
        if not _is_object(part.tool_call.arguments_json or "{}"):
            yield f"{path}.tool_call.arguments_json", "must be a JSON object"
    elif kind == "tool_result" and not part.tool_result.id:
        yield f"{path}.tool_result.id", "must be the identifier of the call it answers"


def _sampling(sampling: pb.Sampling) -> Iterator[Violation]:
    for name, low, high, open_low, text in _RANGES:
        if not sampling.HasField(name):  # type: ignore[arg-type]  # every name in _RANGES is a field
            continue
        value = float(getattr(sampling, name))
        inside = low < value <= high if open_low else low <= value <= high
        if not inside:  # also for NaN, which compares false
            yield f"sampling.{name}", f"must be {text}"
    if sampling.HasField("top_k") and sampling.top_k < 1:
        yield "sampling.top_k", "must be at least 1"
    for token, bias in sampling.logit_bias.items():
        if token < 0:
            yield f"sampling.logit_bias[{token}]", "a token identifier cannot be negative"
        if not math.isfinite(bias) or abs(bias) > 100:
            yield f"sampling.logit_bias[{token}]", "must be in [-100.0, 100.0]"


def _limits(limits: pb.GenerationLimits) -> Iterator[Violation]:
    if limits.HasField("max_output_token_count") and limits.max_output_token_count < 1:
        yield "limits.max_output_token_count", "must be at least 1"
    if len(limits.stop_sequences) > MAX_STOP_SEQUENCES:
        yield "limits.stop_sequences", f"give at most {MAX_STOP_SEQUENCES}"
    for i, stop in enumerate(limits.stop_sequences):
        if not stop:
            yield f"limits.stop_sequences[{i}]", "must not be empty"
    if len(limits.stop_token_ids) > MAX_STOP_SEQUENCES:
        yield "limits.stop_token_ids", f"give at most {MAX_STOP_SEQUENCES}"
    for i, token in enumerate(limits.stop_token_ids):
        if token < 0:
            yield f"limits.stop_token_ids[{i}]", "a token identifier cannot be negative"


def _tools(tools: Sequence[pb.Tool]) -> Iterator[Violation]:
    if len(tools) > MAX_TOOLS:
        yield "tools", f"give at most {MAX_TOOLS}"
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if not _TOOL_NAME.fullmatch(tool.name):
            yield f"tools[{i}].name", "must be 1 to 128 letters, digits, underscores, dots or hyphens"
        elif tool.name in names:
            yield f"tools[{i}].name", "is the name of another tool too"
        names.add(tool.name)
        if tool.parameters_json_schema and not _is_object(tool.parameters_json_schema):
            yield f"tools[{i}].parameters_json_schema", "must be a JSON object"


def _tool_choice(request: pb.GenerateRequest) -> Iterator[Violation]:
    choice = request.tool_choice
    if choice.mode == pb.ToolChoice.MODE_REQUIRED and not request.tools:
        yield "tool_choice", "requires a call, and `tools` is empty"
    if choice.tool_name:
        if choice.mode != pb.ToolChoice.MODE_REQUIRED:
            yield "tool_choice.tool_name", "is only for MODE_REQUIRED"
        elif choice.tool_name not in {tool.name for tool in request.tools}:
            yield "tool_choice.tool_name", "is none of `tools`"


def _output_format(output_format: pb.OutputFormat) -> Iterator[Violation]:
    kind = output_format.WhichOneof("constraint")
    if kind == "json_schema":
        if len(output_format.json_schema) > MAX_SCHEMA_BYTES:
            yield "output_format.json_schema", f"must be at most {MAX_SCHEMA_BYTES} bytes"
        elif not _is_object(output_format.json_schema):
            yield "output_format.json_schema", "must be a JSON Schema that is a JSON object"
    elif kind in {"regex", "lark_grammar"} and not getattr(output_format, kind):
        yield f"output_format.{kind}", "must not be empty"
    elif kind == "any_json" and not output_format.any_json:
        yield "output_format.any_json", "must be true, or leave output_format unset"


def _options(options: Iterable[str]) -> Iterator[Violation]:
    for key in sorted(options):
        if key not in FRAMEWORKS:
            yield f"backend_options[{key}]", f"must be one of {', '.join(sorted(FRAMEWORKS))}"


def _routing(routing: pb.RoutingHints) -> Iterator[Violation]:
    if routing.HasField("max_attempt_count") and routing.max_attempt_count < 1:
        yield "routing.max_attempt_count", "must be at least 1"
    for i, model in enumerate(routing.fallback_models):
        if not model:
            yield f"routing.fallback_models[{i}]", "must not be empty"


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False
