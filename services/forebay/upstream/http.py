"""An HTTP client for one server on this machine or near it, and for nothing else.

- It reaches only the paths it was given, under the base URL it was given; no
  redirect is followed and no proxy of the environment is used, so neither a
  client nor a server can send it, or its token, elsewhere.
- Reads that may be repeated share a small pool. Everything else gets a
  connection of its own: local servers close idle connections after 5 seconds,
  and a request sent into a closing one is lost without a word whether it was
  begun. A connection to this machine costs a tenth of a millisecond. It also
  leaves no idle connection behind, each of which holds one of the few threads
  of llama-server.
- Leaving a stream closes its socket. Giving the connection back would read the
  rest of the reply, and the server would go on generating it.
"""

from __future__ import annotations

import asyncio
import io
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

import aiohttp
from opentelemetry.trace import Span, SpanKind, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from yarl import URL

from forebay.kit import telemetry
from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    Failure,
    FirstEventTimeout,
    StreamInterrupted,
    StreamStalled,
)
from forebay.kit.spans import Attributes, traced
from forebay.upstream.errors import UpstreamError, error_in, read_error
from forebay.upstream.framing import LINE_LIMIT, LineSplitter, SseEvent, SseSplitter
from forebay.upstream.values import JsonValue, dump, parse

CONNECT_TIMEOUT: Final = 5.0
"""Seconds to connect. A server on this machine answers in microseconds or never."""

REPLY_TIMEOUT: Final = 30.0
"""Seconds for a whole reply to a call that does no inference."""

_KEEPALIVE = 4.0  # llama-server and LM Studio close idle connections after 5 seconds
_RETRY_AFTER = timedelta(seconds=1)  # a local server that was started again listens after about that
_LONG_BODY = 1024 * 1024  # aiohttp warns of longer ones that are sent at once
_ERROR_BODY = 64 * 1024  # an error that takes more room than this is no error message
_SUFFIXES = ("/api/v1", "/api/v0", "/v1", "/api")


def normalize_base_url(url: str, *, strip: Iterable[str] = _SUFFIXES) -> str:
    """Returns a base URL without what people add to it: slashes at the end, doubled ones, `/v1` and the like.

    Args:
        url: such as `http://127.0.0.1:1234/v1/` or `localhost:11434`, which is taken for http.
        strip: suffixes of the path to take away.

    Raises:
        ValueError: it is no http or https URL, or it holds a password, a query or a fragment.
    """
    url = url.strip()
    if "://" not in url:
        url = f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"}:
        raise ValueError(f"the base URL must begin with http:// or https://, not {parts.scheme}://")
    if parts.username or parts.password:
        raise ValueError("the base URL must hold no user name or password; set `token` instead")
    if parts.query or parts.fragment:
        raise ValueError("the base URL must hold no query and no fragment")
    host = parts.hostname
    if not host:
        raise ValueError("the base URL must name a host")
    # Servers print the address they listen on; 0.0.0.0 and [::] are no addresses to call.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # read, not bound
    netloc = f"[{host}]" if ":" in host else host
    if parts.port is not None:
        netloc = f"{netloc}:{parts.port}"
    path = "/".join(["", *(p for p in parts.path.split("/") if p)])
    for suffix in sorted(strip, key=len, reverse=True):
        if path.endswith(suffix):
            path = path.removesuffix(suffix)
            break
    return urlunsplit((parts.scheme, netloc, path, "", ""))


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    status: int
    """HTTP status."""
    content_type: str
    """Media type without parameters, in lower case."""
    body: bytes
    """The body."""
    server: str = ""
    """The `Server` header, which says what answers."""


class Body:
    """The body of a reply that is being streamed."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        *,
        name: str,
        first_byte: float | None,
        between_bytes: float | None,
        line_limit: int,
    ) -> None:
        self._response = response
        self._name = name
        self._first_byte = first_byte
        self._between_bytes = between_bytes
        self._line_limit = line_limit
        self._chunks = response.content.iter_any().__aiter__()
        self.received = 0
        """Bytes received so far."""

    @property
    def content_type(self) -> str:
        """Media type without parameters, in lower case."""
        return self._response.content_type.lower()

    @property
    def server(self) -> str:
        """The `Server` header."""
        return self._response.headers.get("Server", "")

    @property
    def status(self) -> int:
        """HTTP status, from 200 to 299."""
        return self._response.status

    async def read(self) -> bytes:
        """Returns the next bytes, empty at the end.

        Raises:
            FirstEventTimeout: no byte came in time.
            StreamStalled: no more bytes came in time.
            BackendUnavailable: the connection was lost before the first byte.
            StreamInterrupted: the connection was lost later.
        """
        limit = self._between_bytes if self.received else self._first_byte
        try:
            async with asyncio.timeout(limit):
                chunk = await anext(self._chunks, b"")
        except TimeoutError as error:
            if self.received:
                raise StreamStalled(
                    f"{self._name} sent nothing for {limit:g} s in the middle of its reply",
                    metadata={"backend": self._name},
                ) from error
            raise _late(self._name, limit) from error
        except (aiohttp.ClientError, OSError) as error:
            if self.received:
                raise StreamInterrupted(
                    f"{self._name} broke the connection in the middle of its reply",
                    metadata={"backend": self._name},
                ) from error
            raise _lost(self._name) from error
        self.received += len(chunk)
        return chunk

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """Yields the lines of NDJSON, without their ends and without blank ones. To be iterated once."""
        splitter = LineSplitter(limit=self._line_limit)
        while chunk := await self.read():
            for line in splitter.feed(chunk):
                yield line
        for line in splitter.finish():
            yield line

    async def events(self, *, comments: bool = False) -> AsyncGenerator[SseEvent, None]:
        """Yields server-sent events, with `comments` also comments. To be iterated once."""
        splitter = SseSplitter(limit=self._line_limit, comments=comments)
        while chunk := await self.read():
            for event in splitter.feed(chunk):
                yield event
        for event in splitter.finish():
            yield event

    async def json(self) -> JsonValue:
        """Reads the rest of the body as one JSON value.

        Raises:
            UpstreamError: it is not JSON, or it describes an error.
        """
        return _json(await self.all(), self.status)

    async def all(self) -> bytes:
        """Reads the rest of the body.

        Raises:
            BackendError: it is longer than a line may be.
        """
        parts: list[bytes] = []
        size = 0
        while chunk := await self.read():
            parts.append(chunk)
            size += len(chunk)
            if size > self._line_limit:
                raise BackendError(
                    f"{self._name} sent a reply of more than {self._line_limit} bytes",
                    metadata={"backend": self._name, "limit_bytes": str(self._line_limit)},
                )
        return b"".join(parts)


class Upstream:
    """Calls one server's HTTP interface.

    Used as `async with Upstream(...) as upstream`. Paths are templates whose
    `{}` are filled with quoted arguments: `get_json("/v1/models/{}", name)`.

    Every call raises `UpstreamError` where the server answered with an error,
    and a `Failure` where it did not answer.

    Args:
        base_url: as `normalize_base_url` returns it.
        allowed: what may be called, such as `GET /api/tags` or `HEAD /api/blobs/{}`.
        name: the backend's name, for messages.
        token: sent as `Authorization: Bearer`. Never shown or logged.
        host: sent as the `Host` header in place of the base URL's. Ollama on a loopback address
            refuses names it does not know.
        connect_timeout: seconds to connect.
        line_limit: most bytes of a line, of an event and of a whole reply.
        keepalive: seconds an idle connection for reads is kept. 0 gives every read its own, as servers
            need that hold a thread for each open connection.
    """

    def __init__(
        self,
        base_url: str,
        *,
        allowed: Iterable[str],
        name: str,
        token: str = "",
        host: str = "",
        connect_timeout: float = CONNECT_TIMEOUT,
        line_limit: int = LINE_LIMIT,
        keepalive: float = _KEEPALIVE,
    ) -> None:
        self._base = base_url
        self._allowed = frozenset(allowed)
        self._name = name
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "forebay"}
        if token:
            if not token.isprintable() or " " in token:
                raise ValueError("the token holds characters that cannot be sent")
            self._headers["Authorization"] = f"Bearer {token}"
        if host:
            self._headers["Host"] = host
        self._connect_timeout = connect_timeout
        self._line_limit = line_limit
        self._keepalive = keepalive
        self._reads: aiohttp.ClientSession | None = None
        self._others: aiohttp.ClientSession | None = None
        self._exit = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<Upstream {self._name} {self._base}>"

    @property
    def base_url(self) -> str:
        """Where the server is."""
        return self._base

    @property
    def name(self) -> str:
        """The backend's name."""
        return self._name

    async def __aenter__(self) -> Upstream:
        # No limit on connections: admission decides how many calls there are. The pool for reads is
        # bounded, and apart, so that long streams never stand before a health check.
        self._reads = await self._open(
            aiohttp.TCPConnector(limit=8, keepalive_timeout=self._keepalive)
            if self._keepalive
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        self._others = await self._open(aiohttp.TCPConnector(limit=0, force_close=True))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exit.aclose()

    async def get_json(
        self,
        path: str,
        *args: str,
        query: Mapping[str, str] | None = None,
        timeout: float | None = REPLY_TIMEOUT,
    ) -> JsonValue:
        """Returns the JSON that `GET path` answers.

        Raises:
            UpstreamError: an error, or no JSON.
            Failure: no answer.
        """
        return await self.request_json("GET", path, *args, query=query, timeout=timeout)

    async def post_json(
        self, path: str, *args: str, json: object, timeout: float | None = REPLY_TIMEOUT
    ) -> JsonValue:
        """Returns the JSON that `POST path` answers to `json`. See `get_json`."""
        return await self.request_json("POST", path, *args, json=json, timeout=timeout)

    async def request_json(
        self,
        method: str,
        path: str,
        *args: str,
        json: object = None,
        query: Mapping[str, str] | None = None,
        timeout: float | None = REPLY_TIMEOUT,
        empty: bool = False,
    ) -> JsonValue:
        """Returns the JSON of a whole reply.

        Args:
            method: HTTP method.
            path: template of a path.
            args: what fills the template.
            json: body to send. None sends none.
            query: query to send.
            timeout: seconds for the whole reply; None waits without end.
            empty: whether an empty body is good; it is returned as None.

        Raises:
            UpstreamError: an error, also one under status 200, or no JSON.
            Failure: no answer.
        """
        reply = await self.request(method, path, *args, json=json, query=query, timeout=timeout)
        if empty and not reply.body.strip():
            return None
        return _json(reply.body, reply.status)

    async def request(
        self,
        method: str,
        path: str,
        *args: str,
        json: object = None,
        query: Mapping[str, str] | None = None,
        timeout: float | None = REPLY_TIMEOUT,
    ) -> Reply:
        """Returns a whole reply of status 200 to 299. See `request_json`."""
        try:
            async with (
                asyncio.timeout(timeout),
                self.stream(method, path, *args, json=json, query=query) as body,
            ):
                return Reply(body.status, body.content_type, await body.all(), body.server)
        except TimeoutError as error:
            raise _late(self._name, timeout) from error
        except StreamInterrupted as error:
            # Of a whole reply nothing was passed on yet, so another backend may still serve it.
            raise BackendUnavailable(error.message, metadata=error.metadata) from error

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *args: str,
        json: object = None,
        query: Mapping[str, str] | None = None,
        first_byte: float | None = None,
        between_bytes: float | None = None,
    ) -> AsyncIterator[Body]:
        """Opens a reply of status 200 to 299 to be read while it comes. Leaving closes the socket.

        Args:
            method: HTTP method.
            path: template of a path.
            args: what fills the template.
            json: body to send. None sends none.
            query: query to send.
            first_byte: seconds until headers and a first byte; None waits without end, as loading a
                model and reading a long prompt may take minutes without a byte.
            between_bytes: seconds between bytes; None waits without end.

        Raises:
            UpstreamError: the server answered with another status.
            Failure: no answer.
        """
        url = self._url(method, path, args, query)
        with self._traced(method, path, url) as span:
            response = await self._send(method, url, json=json, first_byte=first_byte, trace=_trace_of(span))
            try:
                body = Body(
                    response,
                    name=self._name,
                    first_byte=first_byte,
                    between_bytes=between_bytes,
                    line_limit=self._line_limit,
                )
                span.set_attribute("http.response.status_code", response.status)
                if not 200 <= response.status < 300:
                    raise await _error(response, body)
                yield body
            finally:
                response.close()  # nothing to close where the reply was read to its end

    @asynccontextmanager
    async def stream_lines(
        self,
        path: str,
        *args: str,
        json: object,
        first_byte: float | None = None,
        between_bytes: float | None = None,
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Opens the NDJSON that `POST path` answers, as its lines. See `stream`."""
        async with self.stream(
            "POST", path, *args, json=json, first_byte=first_byte, between_bytes=between_bytes
        ) as body:
            yield body.lines()

    def _traced(self, method: str, path: str, url: URL) -> AbstractContextManager[Span]:
        """Gives the span of a call that is part of one of ours; what a bridge asks by itself has none.

        It holds the path's template: an argument may be a name that nobody else should see.
        """

        def describe() -> tuple[str, Attributes]:
            return f"{method} {path}", {
                "http.request.method": method,
                "url.template": path,
                "server.address": url.host or "",
                "server.port": url.port or 0,
                "forebay.backend": self._name,
            }

        # Not the current one: the block may be left by another task than entered it.
        return traced(telemetry.current().tracer, SpanKind.CLIENT, describe, is_current=False)

    async def _send(
        self, method: str, url: URL, *, json: object, first_byte: float | None, trace: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        session = self._reads if method in {"GET", "HEAD"} else self._others
        if session is None:
            raise RuntimeError("an Upstream is used as `async with Upstream(...) as upstream`")
        headers = {**trace, **({} if json is None else {"Content-Type": "application/json"})}
        try:
            async with asyncio.timeout(first_byte):
                return await session.request(
                    method,
                    url,
                    data=None if json is None else _payload(dump(json)),
                    headers=headers,
                    allow_redirects=False,
                )
        except aiohttp.ServerTimeoutError as error:  # a TimeoutError too, so it comes first
            raise BackendUnavailable(
                f"{self._name} at {self._base} does not accept connections",
                metadata={"backend": self._name},
                retry_after=_RETRY_AFTER,
            ) from error
        except TimeoutError as error:
            raise _late(self._name, first_byte) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from error

    def _url(self, method: str, path: str, args: tuple[str, ...], query: Mapping[str, str] | None) -> URL:
        if f"{method} {path}" not in self._allowed:
            raise ValueError(f"{method} {path} is not among the paths of {self._name}")
        if any(arg in {"", ".", ".."} for arg in args):
            raise ValueError("an argument of a path must not be empty, `.` or `..`")
        filled = path.format(*(quote(arg, safe="") for arg in args))
        suffix = f"?{urlencode(query)}" if query else ""
        return URL(f"{self._base}{filled}{suffix}", encoded=True)

    def _unreachable(self, error: Exception) -> Failure:
        metadata = {"backend": self._name}
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            why = "its host name is not known"
        elif isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
            why = "TLS failed: check the scheme of the base URL and the server's certificate"
        elif isinstance(error, aiohttp.ClientConnectorError):
            why = os.strerror(error.os_error.errno).lower() if error.os_error.errno else "no connection"
        elif isinstance(error, aiohttp.ClientResponseError):
            return BackendError(f"{self._name} at {self._base} does not speak HTTP", metadata=metadata)
        else:
            return _lost(self._name)
        return BackendUnavailable(
            f"cannot reach {self._name} at {self._base}: {why}", metadata=metadata, retry_after=_RETRY_AFTER
        )

    async def _open(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return await self._exit.enter_async_context(
            aiohttp.ClientSession(
                connector=connector,
                headers=self._headers,
                # Without `total`: aiohttp's default ends every generation after 5 minutes.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
                trust_env=False,
                auto_decompress=True,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        )


def _trace_of(span: Span) -> dict[str, str]:
    """Returns the headers that make a span the parent of what the server does. Some servers do trace.

    The trace alone: whatever else a caller sent along, such as baggage, is not meant for them.
    """
    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers, set_span_in_context(span))
    return headers


def _payload(body: bytes) -> bytes | io.BytesIO:
    """Returns what to send. A long body is sent in parts, so that the loop turns between them."""
    return body if len(body) < _LONG_BODY else io.BytesIO(body)


def _json(body: bytes, status: int) -> JsonValue:
    try:
        value = parse(body)
    except ValueError as error:
        raise UpstreamError(status, type="unreadable_body", text="the body is not JSON") from error
    if found := error_in(value):
        raise found
    return value


async def _error(response: aiohttp.ClientResponse, body: Body) -> UpstreamError:
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(REPLY_TIMEOUT):
            while sum(map(len, parts)) < _ERROR_BODY and (chunk := await body.read()):
                parts.append(chunk)
    except (Failure, TimeoutError):
        pass  # the status says enough
    after = response.headers.get("Retry-After", "")
    seconds = int(after) if after.isascii() and after.isdigit() else 0
    return read_error(
        response.status,
        b"".join(parts),
        retry_after=timedelta(seconds=min(seconds, 3600)) if seconds else None,
    )


def _late(name: str, limit: float | None) -> FirstEventTimeout:
    return FirstEventTimeout(f"{name} did not answer within {limit:g} s", metadata={"backend": name})


def _lost(name: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"{name} closed the connection before it answered",
        metadata={"backend": name},
        retry_after=_RETRY_AFTER,
    )
