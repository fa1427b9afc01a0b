"""One reading of the many ways in which servers say no.

An upstream's text may hold the prompt it choked on, or the first characters of
a token. So it is used to decide what happened and never repeated: a failure
carries our sentence, the status, the upstream's type and code where they look
like identifiers, and those of its sentences that are listed here because they
cannot hold anything of the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from forebay.kit.failure import (
    BackendBusy,
    BackendError,
    BackendUnavailable,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    InvalidRequest,
    MemoryExhausted,
    ModelLoadFailed,
    ModelNotFound,
    StreamInterrupted,
    UpstreamUnauthenticated,
)
from forebay.upstream.values import JsonObject, JsonValue, array, integer, obj, parse, text

BUSY_RETRY: Final = timedelta(seconds=1)
"""When to try again after a busy server that does not say: a short reply takes about that."""

LOADING_RETRY: Final = timedelta(seconds=2)
"""When to try again while a model loads: most small models are there after one or two such waits."""

_NESTING = 8  # levels; an error in a string in an error, as Ollama wraps llama-server, takes five
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.\-]{1,64}")

_CONTEXT = (
    "exceed_context_size_error",
    "exceeds the available context size",
    "exceeds the context length",
    "longer than the context length",
    "trying to keep the first",
    "tokens to keep from the initial prompt is greater",
    "context length of only",
    "context size has been exceeded",
    "too large to process",
    "context_length_exceeded",
    "maximum context length",
)
_MEMORY = (
    "out of memory",
    "outofmemory",
    "insufficient memory",
    "not enough memory",
    "requires more system memory",
    "failed to allocate",
    "unable to allocate",
    "insufficient system resources",
)
_UNSUPPORTED = (
    "does not support",
    "not_supported_error",
    "is not supported",
    "not_implemented",
    "image input is not supported",
)
_BUSY = ("busy", "maximum pending requests", "overloaded", "too many requests", "rate limit")
_NO_ENDPOINT = ("unexpected endpoint or method", "404 page not found", "405 method not")
_NO_MODEL = (
    "model_not_found",
    "no models loaded",
    "please specify a valid model",
    "no such model",
    "manifest: file does not exist",
)
_MODEL_NAMED_MISSING = re.compile(r"\bmodel\b[^\n]{0,300}? not found")
_MODEL_GONE = ("model unloaded", "modelunloaded", "model has been unloaded")
_LOAD = ("failed to load model", "error loading model", "unable to load model", "model failed to load")
_BAD_VALUE = (
    "must be of type",
    "invalid format",
    "json schema",
    "failed to parse grammar",
    "failed to initialize samplers",
    "cannot unmarshal",
    "invalid_request_error",
)

# Sentences that hold nothing but our option names and numbers.
_SAFE = (
    re.compile(r'option "[a-z_]{1,40}" must be of type [a-z ]{1,20}'),
    re.compile(r"top_logprobs must be between \d{1,3} and \d{1,3}"),
    re.compile(r"'[a-z_]{1,32}' (?:is required|must be an? [a-z]{1,16})"),
    re.compile(r"(?:does not support|doesn't support) [a-z_]{1,24}"),
    re.compile(r"request \(\d{1,9} tokens\) exceeds the available context size \(\d{1,9} tokens\)"),
    re.compile(r"input \(\d{1,9} tokens\) is too large to process"),
    re.compile(r"context length of only \d{1,9} tokens"),
    re.compile(r"maximum context length is \d{1,9} tokens"),
    re.compile(r"image input is not supported"),
    re.compile(r"Loading model"),
)
_PROMPT_TOKENS = re.compile(r"(?:request|input) \((\d{1,9}) tokens\)|keep the first (\d{1,9}) tokens")
_CONTEXT_TOKENS = re.compile(
    r"context size \((\d{1,9}) tokens\)|length of only (\d{1,9}) tokens|context length is (\d{1,9}) tokens"
)


@dataclass(eq=False)
class UpstreamError(Exception):
    """A server answered with an error. Its `str` is safe to log, its `text` is not."""

    status: int
    """HTTP status. 200 where the error came in the body of a good answer or in its stream."""
    code: str = ""
    """The server's own code, as text. Empty if it gave none."""
    type: str = ""
    """The server's type of error. Empty if it gave none."""
    text: str = field(default="", repr=False)
    """What the server said. May hold prompts and secrets: never to be logged or passed on."""
    fields: Mapping[str, JsonValue] = field(default_factory=dict, repr=False)
    """The error object, where there was one."""
    retry_after: timedelta | None = None
    """What the server's `Retry-After` says."""

    def __str__(self) -> str:
        words = [f"HTTP {self.status}"]
        words += [w for w in (self.type, self.code) if _IDENTIFIER.fullmatch(w)]
        return " ".join(words)

    @property
    def haystack(self) -> str:
        """Everything the server said, in lower case, for comparing."""
        return f"{self.text}\n{self.type}\n{self.code}".lower()

    @property
    def no_such_endpoint(self) -> bool:
        """Whether the server does not know the path or the method, whatever status it gave that."""
        if self.status == 404 and self.text.strip() in {"", "Not Found", "File Not Found"}:
            return True
        return self.status in {404, 405, 200} and self.says(*_NO_ENDPOINT)

    def says(self, *patterns: str) -> bool:
        """Whether the server's text holds one of the patterns, given in lower case."""
        return any(pattern in self.haystack for pattern in patterns)


def read_error(status: int, body: bytes, *, retry_after: timedelta | None = None) -> UpstreamError:
    """Returns the error that a reply's body describes: JSON of any shape, HTML, plain text or nothing."""
    try:
        value = parse(body)
    except ValueError:
        value = body[:4096].decode("utf-8", "replace")
    error = from_value(value, status=status)
    error.retry_after = retry_after
    return error


def from_value(value: JsonValue, *, status: int = 200) -> UpstreamError:
    """Returns the error that a JSON value describes: a string, an object, a list, or JSON inside a string."""
    found: JsonObject = {}
    words: list[str] = []
    _collect(value, found, words, depth=_NESTING)
    code = found.get("code")
    error = UpstreamError(
        status=status,
        code=str(code) if isinstance(code, str | int) and not isinstance(code, bool) else "",
        type=text(found, "type"),
        text="\n".join(words),
        fields=found,
    )
    if status == 200 and error.code.isdigit() and 400 <= int(error.code) < 600:
        # An error in a stream under a good status: what it says inside is the truer status.
        error.status = int(error.code)
    return error


def error_in(value: JsonValue) -> UpstreamError | None:
    """Returns the error in the body of a good answer, or None if there is none.

    A key `error` with anything but null, false or an empty value is one.
    """
    if isinstance(value, dict) and value.get("error"):
        return from_value(value)
    return None


def to_failure(error: UpstreamError, *, backend: str, model: str = "", started: bool = False) -> Failure:
    """Returns the failure that names what a server said.

    Args:
        error: what it said.
        backend: name of the backend, for the message and the metadata.
        model: the model asked for, if one was.
        started: whether part of the reply was passed on; what would send the caller elsewhere
            becomes `StreamInterrupted`.
    """
    failure = _classify(error, backend, model)
    if started and failure.elsewhere:
        lost = StreamInterrupted(
            f"{backend} broke the reply off: {failure.message}",
            metadata={**failure.metadata, "cause": failure.reason},
        )
        lost.__cause__ = failure
        return lost
    return failure


@contextmanager
def translated(*, backend: str, model: str = "") -> Iterator[None]:
    """Turns an `UpstreamError` of the block into its `Failure`."""
    try:
        yield
    except UpstreamError as error:
        raise to_failure(error, backend=backend, model=model) from error


def safe_text(error: UpstreamError) -> str:
    """Returns the part of a server's text that is known to hold nothing of the caller's. May be empty."""
    for pattern in _SAFE:
        if found := pattern.search(error.text):
            return found.group()
    return ""


def _classify(  # noqa: PLR0911, PLR0912  # a table, read from its top
    error: UpstreamError, backend: str, model: str
) -> Failure:
    status, says = error.status, error.says
    metadata = {"backend": backend, "http_status": str(status)}
    if model:
        metadata["model"] = model
    said = {"upstream_type": error.type, "upstream_code": error.code}
    metadata |= {key: word for key, word in said.items() if _IDENTIFIER.fullmatch(word)}
    quoted = safe_text(error)
    because = f": {quoted}" if quoted else f" ({error})"
    if status in {401, 403}:
        return UpstreamUnauthenticated(
            f"{backend} refused our credentials (HTTP {status}): check the token in the bridge's settings",
            metadata=metadata,
        )
    if says(*_CONTEXT):
        return _context(error, backend, metadata, because)
    if says(*_MEMORY):
        return MemoryExhausted(
            f"{backend} has not enough memory for {model or 'this'}; unload another model or use a smaller",
            metadata=metadata,
            retry_after=error.retry_after,
        )
    missing = says(*_NO_MODEL) or (status in {200, 400, 404} and _MODEL_NAMED_MISSING.search(error.haystack))
    if missing or (status == 404 and not error.no_such_endpoint):
        return ModelNotFound(f"{backend} has no model {model!r}", metadata=metadata)
    if error.no_such_endpoint:
        return CapabilityUnsupported(f"{backend} has no such operation{because}", metadata=metadata)
    if status == 503 and says("loading model"):
        return BackendUnavailable(
            f"{backend} is still loading its model",
            metadata=metadata,
            retry_after=error.retry_after or LOADING_RETRY,
        )
    if status == 429 or (status in {200, 503, 529} and says(*_BUSY)):
        return BackendBusy(
            f"{backend} is busy", metadata=metadata, retry_after=error.retry_after or BUSY_RETRY
        )
    if status in {502, 503, 504}:
        return BackendUnavailable(
            f"{backend} cannot serve now{because}", metadata=metadata, retry_after=error.retry_after
        )
    if status == 499:
        # We are still here, so something between us and the server gave up.
        return BackendUnavailable(f"{backend} was told that we had left", metadata=metadata)
    if status == 501 or says(*_UNSUPPORTED):
        return CapabilityUnsupported(f"{backend} cannot do what is asked{because}", metadata=metadata)
    if says(*_MODEL_GONE):
        return BackendUnavailable(f"{backend} unloaded {model or 'the model'} in use", metadata=metadata)
    if says(*_LOAD):
        return ModelLoadFailed(f"{backend} could not load {model or 'the model'}", metadata=metadata)
    if 400 <= status < 500 or says(*_BAD_VALUE):
        return InvalidRequest(f"{backend} refused the request{because}", metadata=metadata)
    return BackendError(f"{backend} failed{because}", metadata=metadata)


def _context(error: UpstreamError, backend: str, metadata: dict[str, str], because: str) -> Failure:
    prompt = integer(error.fields, "n_prompt_tokens") or _first(_PROMPT_TOKENS, error.text)
    room = integer(error.fields, "n_ctx") or _first(_CONTEXT_TOKENS, error.text)
    if prompt:
        metadata["prompt_token_count"] = str(prompt)
    if room:
        metadata["context_token_count"] = str(room)
    return ContextExceeded(
        f"the prompt does not fit the model's context on {backend}{because}; shorten it or load the model "
        "with more context",
        metadata=metadata,
    )


def _first(pattern: re.Pattern[str], said: str) -> int:
    found = pattern.search(said)
    return int(next(g for g in found.groups() if g)) if found else 0


def _collect(value: JsonValue, found: JsonObject, words: list[str], *, depth: int) -> None:
    """Gathers the fields and texts of an error, innermost fields last so that they win."""
    if depth == 0:
        return
    if isinstance(value, str):
        stripped = value.strip()
        if stripped[:1] in {"{", "["}:
            try:
                _collect(parse(stripped), found, words, depth=depth - 1)
            except ValueError:
                pass
            else:
                return
        words.append(value)
    elif isinstance(value, list):
        for item in array(value)[:8]:
            _collect(item, found, words, depth=depth - 1)
    elif isinstance(value, dict):
        own = obj(value)
        found.update({k: v for k, v in own.items() if k not in {"error", "message", "detail"}})
        for key in ("message", "error", "detail", "msg"):
            if own.get(key):
                _collect(own[key], found, words, depth=depth - 1)
