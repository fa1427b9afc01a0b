"""What Ollama accepts and how it answers: request parsing, refusals and framing.

The real server is a Go program, and clients lean on the texts and codes that
Go's decoder and its own handlers produce. This module reproduces them, apart
from the state of any server, so that a request can be judged on its own.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiohttp import web

FOREVER = float("inf")
"""`keep_alive` of a model that is never unloaded, in seconds."""

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]*\.?[0-9]+)([a-zµ]*)")
_NAME_PART = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,79}$")
_NAMESPACE = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_\-]{0,79}$")
_HOST = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,349}$")
# `xhigh` is not in every server's list; the official client of 2026 sends it.
_THINK_LEVELS = ("high", "medium", "low", "max", "xhigh")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")
_DIGEST = re.compile(r"^sha256[:-][0-9a-fA-F]{64}$")

REQUEST_OPTIONS: Mapping[str, str] = {
    "num_keep": "integer",
    "seed": "integer",
    "num_predict": "integer",
    "top_k": "integer",
    "top_p": "float32",
    "min_p": "float32",
    "typical_p": "float32",
    "repeat_last_n": "integer",
    "temperature": "float32",
    "repeat_penalty": "float32",
    "presence_penalty": "float32",
    "frequency_penalty": "float32",
    "stop": "array",
}
"""Options that change one answer, with the type the server wants."""

LOAD_OPTIONS: Mapping[str, str] = {
    "num_ctx": "integer",
    "num_batch": "integer",
    "num_gpu": "integer",
    "main_gpu": "integer",
    "use_mmap": "boolean",
    "num_thread": "integer",
    "draft_num_predict": "integer",
}
"""Options that change how a model is loaded, with the type the server wants."""


class WireError(Exception):
    """The server refuses a request.

    Args:
        status: HTTP status.
        text: what stands in the body's `error` key.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def go_json(value: object) -> bytes:
    """Encodes a value as the server does: compact, and with markup escaped inside strings."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        if char in text:
            text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", "surrogatepass")


def timestamp(moment: datetime | None = None) -> str:
    """Writes a moment, by default now, as RFC 3339 with nine digits of fraction."""
    moment = moment or datetime.now(UTC)
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"


def without_zeros(pairs: Mapping[str, object]) -> dict[str, object]:
    """Drops the keys whose value is zero or empty, as the server's encoder does."""
    return {key: value for key, value in pairs.items() if value or value is False}


# Names


@dataclass(frozen=True, slots=True)
class Name:
    """A model's name in all its parts."""

    host: str
    namespace: str
    model: str
    tag: str

    def short(self) -> str:
        """Returns the name as the server lists it: defaults left out, the tag always there."""
        text = f"{self.model}:{self.tag}"
        if self.host != "registry.ollama.ai":
            return f"{self.host}/{self.namespace}/{text}"
        return text if self.namespace == "library" else f"{self.namespace}/{text}"

    def full(self) -> str:
        """Returns the name with its registry and namespace."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    def key(self) -> str:
        """Returns what two spellings of one model have in common."""
        return self.full().lower()


def parse_name(text: str) -> Name | None:
    """Takes a name apart; None if it is not a valid one."""
    rest = text.partition("://")[2] or text
    head, slash, last = rest.rpartition("/")
    model, colon, tag = last.partition(":")
    host, namespace = "registry.ollama.ai", "library"
    if slash:
        host_part, two, namespace_part = head.rpartition("/")
        namespace = namespace_part
        if two:
            host = host_part
    if colon and not tag:
        return None
    tag = tag or "latest"
    if not (_NAME_PART.match(model) and _NAME_PART.match(tag) and _NAMESPACE.match(namespace)):
        return None
    return Name(host, namespace, model, tag) if _HOST.match(host) else None


def strip_source(text: str) -> str:
    """Takes the suffix that picks a source off a name.

    Raises:
        WireError: the name asks for both sources.
    """
    base, source = text, ""
    for suffix, kind in ((":cloud", "cloud"), ("-cloud", "cloud"), (":local", "local")):
        if base.endswith(suffix):
            base, source = base[: -len(suffix)], kind
            break
    other = {"cloud": (":local",), "local": (":cloud", "-cloud")}.get(source, ())
    if base.endswith(other or ("\0",)):
        raise WireError(400, f'use either :local or :cloud, not both: "{text}"')
    return base if source == "local" else text


def check_digest(text: str) -> str:
    """Returns a digest in its usual spelling.

    Raises:
        WireError: it is not one.
    """
    if not _DIGEST.match(text):
        raise WireError(400, "invalid digest format")
    return text.replace("-", ":", 1).lower()


# Values


def parse_duration(text: str) -> float:
    """Reads a duration such as `1h30m` in seconds; negative ones too.

    Raises:
        WireError: it is not one.
    """
    body = text.lstrip("+-")
    if body == "0":
        return 0.0
    seconds, at = 0.0, 0
    while at < len(body):
        part = _DURATION_PART.match(body, at)
        if part is None:
            break
        if not part[2]:
            raise WireError(400, f'time: missing unit in duration "{text}"')
        if part[2] not in _UNITS:
            raise WireError(400, f'time: unknown unit "{part[2]}" in duration "{text}"')
        seconds += float(part[1]) * _UNITS[part[2]]
        at = part.end()
    if not body or at < len(body):
        raise WireError(400, f'time: invalid duration "{text}"')
    return -seconds if text.startswith("-") else seconds


def parse_keep_alive(value: object) -> float | None:
    """Reads `keep_alive` in seconds; None if absent, `FOREVER` if negative.

    Raises:
        WireError: it is neither a number nor a duration.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        names = {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}
        raise WireError(400, f"Unsupported type: '{names.get(type(value), 'unknown')}'")
    seconds = parse_duration(value) if isinstance(value, str) else float(value)
    return FOREVER if seconds < 0 else seconds


def parse_think(value: object) -> bool | str | None:
    """Reads `think`.

    Raises:
        WireError: it is not a level the server knows.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _THINK_LEVELS:
        return value
    levels = ", ".join(f'"{level}"' for level in _THINK_LEVELS)
    raise WireError(400, f'invalid think value: "{value}" (must be {levels}, true, or false)')


def check_options(options: Mapping[str, object]) -> dict[str, object]:
    """Returns the options the server heeds, each in its type; unknown ones are dropped.

    Raises:
        WireError: one has the wrong type, for which the server's code is 500.
    """
    checked: dict[str, object] = {}
    for key, value in options.items():
        kind = REQUEST_OPTIONS.get(key) or LOAD_OPTIONS.get(key)
        if kind is None or value is None:
            continue
        if not _option_fits(value, kind):
            raise WireError(500, f'option "{key}" must be of type {kind}')
        checked[key] = int(value) if kind == "integer" and isinstance(value, (int, float)) else value
    return checked


def _option_fits(value: object, kind: str) -> bool:
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "array":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_format(value: object) -> str | dict[str, object] | None:
    """Returns the asked output format: None, `json` or a schema.

    Raises:
        WireError: it is anything else, for which the server's code is 500.
    """
    if value is None or value == "":
        return None
    if value == "json":
        return "json"
    if isinstance(value, dict):
        return value
    shown = go_json(value).decode()
    raise WireError(500, f'invalid format: {shown}; expected "json" or a valid JSON Schema object')


# Bodies

_GO_KINDS = {bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object"}
_GO_TYPES = {
    "string": "string",
    "bool": "bool",
    "int": "int",
    "list": "[]interface {}",
    "object": "map[string]interface {}",
}


@dataclass(frozen=True, slots=True)
class Fields:
    """A decoded JSON object that refuses values of the wrong type in the server's words."""

    struct: str
    values: Mapping[str, object]

    @classmethod
    def of(cls, struct: str, body: bytes) -> Fields:
        """Decodes a request body.

        Raises:
            WireError: it is missing, no JSON, or no object.
        """
        if not body.strip():
            raise WireError(400, "missing request body")
        try:
            value = json.loads(body)
        except ValueError as error:
            raise WireError(400, _go_syntax_error(body)) from error
        if not isinstance(value, dict):
            kind = _GO_KINDS.get(type(value), "null")
            raise WireError(400, f"json: cannot unmarshal {kind} into Go value of type api.{struct}")
        return cls(struct, value)

    def _refuse(self, key: str, value: object, wanted: str) -> WireError:
        kind = _GO_KINDS[type(value)]
        return WireError(
            400, f"json: cannot unmarshal {kind} into Go struct field {self.struct}.{key} of type {wanted}"
        )

    def text(self, key: str) -> str:
        """Returns a string, empty if absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._refuse(key, value, "string")
        return value or ""

    def flag(self, key: str, default: bool | None = None) -> bool | None:
        """Returns a boolean, or the default if absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._refuse(key, value, "bool")
        return default if value is None else value

    def integer(self, key: str) -> int:
        """Returns an integer, 0 if absent."""
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._refuse(key, value, "int")
        return value or 0

    def items(self, key: str) -> list[object]:
        """Returns a list, empty if absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise self._refuse(key, value, "[]interface {}")
        return value or []

    def mapping(self, key: str) -> dict[str, object]:
        """Returns an object, empty if absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._refuse(key, value, "map[string]interface {}")
        return value or {}

    def each(self, key: str, struct: str) -> list[Fields]:
        """Returns a list of objects, empty if absent."""
        found: list[Fields] = []
        for value in self.items(key):
            if not isinstance(value, dict):
                raise self._refuse(key, value, f"api.{struct}")
            found.append(Fields(struct, value))
        return found


def _go_syntax_error(body: bytes) -> str:
    text = body.decode("utf-8", "replace").lstrip()
    if text[:1] in "{[":
        return "unexpected EOF" if not text.rstrip().endswith(("}", "]")) else "invalid character in value"
    return f"invalid character '{text[:1]}' looking for beginning of value"


def decode_base64(value: object) -> bytes:
    """Decodes standard base64 as the server does.

    Raises:
        WireError: a character is foreign to it; the text names the first.
    """
    text = value if isinstance(value, str) else ""
    if foreign := _NOT_BASE64.search(text):
        raise WireError(400, f"illegal base64 data at input byte {foreign.start()}")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise WireError(400, f"illegal base64 data at input byte {len(text)}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class WireMessage:
    """One message of a chat."""

    role: str
    content: str
    thinking: str = ""
    images: tuple[bytes, ...] = ()
    tool_calls: tuple[Mapping[str, object], ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """What chat and generate have in common."""

    model: str
    stream: bool
    think: bool | str | None
    keep_alive: float | None
    format: object
    options: Mapping[str, object]
    truncate: bool
    shift: bool
    logprobs: bool
    top_logprobs: int
    render_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatBody(Prompted):
    """A request to `/api/chat`."""

    messages: tuple[WireMessage, ...]
    tools: tuple[Mapping[str, object], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateBody(Prompted):
    """A request to `/api/generate`."""

    prompt: str
    suffix: str
    system: str
    template: str
    context: Sequence[object]
    raw: bool
    images: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedBody:
    """A request to `/api/embed`."""

    model: str
    texts: tuple[str, ...]
    truncate: bool
    dimensions: int
    keep_alive: float | None
    options: Mapping[str, object] = field(default_factory=dict)


def parse_chat(body: bytes) -> ChatBody:
    """Reads a request to `/api/chat`.

    Raises:
        WireError: the server would refuse it before it looks for the model.
    """
    fields = Fields.of("ChatRequest", body)
    messages = tuple(_message(item) for item in fields.each("messages", "Message"))
    tools = tuple(_tool(item) for item in fields.each("tools", "Tool"))
    prompted = _prompted(fields)
    if not fields.text("model"):
        raise WireError(400, "model is required")
    return ChatBody(messages=messages, tools=tools, **prompted)  # type: ignore[arg-type]  # built by key below


def parse_generate(body: bytes) -> GenerateBody:
    """Reads a request to `/api/generate`.

    Raises:
        WireError: the server would refuse it before it looks for the model.
    """
    fields = Fields.of("GenerateRequest", body)
    prompted = _prompted(fields)
    request = GenerateBody(
        prompt=fields.text("prompt"),
        suffix=fields.text("suffix"),
        system=fields.text("system"),
        template=fields.text("template"),
        context=fields.items("context"),
        raw=bool(fields.flag("raw")),
        images=tuple(decode_base64(item) for item in fields.items("images")),
        **prompted,  # type: ignore[arg-type]  # built by key below
    )
    if request.raw and (request.template or request.system or request.context):
        raise WireError(400, "raw mode does not support template, system, or context")
    return request


def _prompted(fields: Fields) -> dict[str, object]:
    top = fields.integer("top_logprobs")
    if not 0 <= top <= 20:
        raise WireError(400, "top_logprobs must be between 0 and 20")
    return {
        "model": fields.text("model"),
        "stream": fields.flag("stream", True),
        "think": parse_think(fields.values.get("think")),
        "keep_alive": parse_keep_alive(fields.values.get("keep_alive")),
        "format": fields.values.get("format"),
        "options": fields.mapping("options"),
        "truncate": fields.flag("truncate", True),
        "shift": fields.flag("shift", True),
        "logprobs": bool(fields.flag("logprobs")),
        "top_logprobs": top,
        "render_only": bool(fields.flag("_debug_render_only")),
    }


def _message(fields: Fields) -> WireMessage:
    calls = fields.each("tool_calls", "ToolCall")
    for call in calls:
        function = Fields("ToolCallFunction", call.mapping("function"))
        function.text("name")
        function.mapping("arguments")
    return WireMessage(
        role=fields.text("role").lower(),
        content=fields.text("content"),
        thinking=fields.text("thinking"),
        images=tuple(decode_base64(item) for item in fields.items("images")),
        tool_calls=tuple(call.values for call in calls),
        tool_name=fields.text("tool_name"),
        tool_call_id=fields.text("tool_call_id"),
    )


def _tool(fields: Fields) -> Mapping[str, object]:
    function = Fields("ToolFunction", fields.mapping("function"))
    function.text("name")
    function.text("description")
    parameters = Fields("ToolFunctionParameters", function.mapping("parameters"))
    parameters.text("type")
    parameters.mapping("properties")
    parameters.items("required")
    return fields.values


def parse_embed(body: bytes) -> EmbedBody:
    """Reads a request to `/api/embed`.

    Raises:
        WireError: the server would refuse it before it looks for the model.
    """
    fields = Fields.of("EmbedRequest", body)
    return EmbedBody(
        model=fields.text("model"),
        texts=_embed_input(fields.values.get("input")),
        truncate=bool(fields.flag("truncate", True)),
        dimensions=fields.integer("dimensions"),
        keep_alive=parse_keep_alive(fields.values.get("keep_alive")),
        options=fields.mapping("options"),
    )


def _embed_input(value: object) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise WireError(400, "invalid input type")


def check_body(method: str, path: str, body: bytes) -> None:
    """Judges a request as the server would before it looks for the model.

    Raises:
        WireError: it would be refused, or there is no such route.
    """
    parsers = {
        ("POST", "/api/chat"): parse_chat,
        ("POST", "/api/generate"): parse_generate,
        ("POST", "/api/embed"): parse_embed,
    }
    structs = {
        ("POST", "/api/embeddings"): ("EmbeddingRequest", ("model", "prompt")),
        ("POST", "/api/pull"): ("PullRequest", ("model",)),
        ("POST", "/api/push"): ("PushRequest", ("model",)),
        ("POST", "/api/create"): ("CreateRequest", ("model", "from", "template", "quantize")),
        ("POST", "/api/copy"): ("CopyRequest", ("source", "destination")),
        ("POST", "/api/show"): ("ShowRequest", ("model",)),
        ("DELETE", "/api/delete"): ("DeleteRequest", ("model",)),
    }
    route = (method, path)
    if route in parsers:
        parsed = parsers[route](body)
        if isinstance(parsed, Prompted):
            check_options(parsed.options)
            check_format(parsed.format)
        return
    if route in structs:
        struct, keys = structs[route]
        fields = Fields.of(struct, body)
        for key in keys:
            fields.text(key)
        fields.flag("stream")
        return
    if path.startswith("/api/blobs/") and method in ("HEAD", "POST"):
        check_digest(path.removeprefix("/api/blobs/"))
        return
    if method != "GET" or path not in ("/api/tags", "/api/ps", "/api/version"):
        raise WireError(404, "404 page not found")


# Framing


class Lines:
    """The answer to a streaming request.

    Nothing is written, not even the headers, until the first line: until then
    the handler can still fail with a status of its own.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response: web.StreamResponse | None = None

    @property
    def begun(self) -> bool:
        """Whether the status is out."""
        return self._response is not None

    async def write(self, data: bytes) -> None:
        """Writes bytes as one chunk of the body."""
        if self._response is None:
            self._response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            self._response.enable_chunked_encoding()
            await self._response.prepare(self._request)
        await self._response.write(data)

    async def send(self, value: object) -> None:
        """Writes one object as a line."""
        await self.write(go_json(value) + b"\n")

    async def end(self) -> web.StreamResponse:
        """Ends the body in good order."""
        if self._response is None:
            await self.write(b"")
        assert self._response is not None
        await self._response.write_eof()
        return self._response


def json_reply(value: object, status: int = 200) -> web.Response:
    """Answers with one JSON object, without a trailing newline."""
    return web.Response(
        status=status, body=go_json(value), headers={"Content-Type": "application/json; charset=utf-8"}
    )
