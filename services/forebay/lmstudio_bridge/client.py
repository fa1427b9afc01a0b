"""LM Studio's REST APIs as typed calls, whichever of them a server has.

A server is asked which APIs it has, newest first, and remembered for it. Only
a path it does not know sends us to the next: a refused token is a fault to
report, and the older API would refuse it too. LM Studio answers unknown paths
with 200 and an error, so nothing counts as an answer before it has the shape
of one.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final

from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    BrokenStream,
    CapabilityUnsupported,
    FirstEventTimeout,
    ModelLoadFailed,
    UpstreamUnauthenticated,
)
from forebay.lmstudio_bridge import listing, native
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.listing import Dialect, Entry
from forebay.upstream.embeds import Batch
from forebay.upstream.errors import UpstreamError, to_failure, translated
from forebay.upstream.framing import SseEvent
from forebay.upstream.http import Upstream
from forebay.upstream.values import JsonObject, JsonValue, array, integer, number, obj, text

_ALLOWED: Final = (
    "GET /lmstudio-greeting",
    "GET /api/v1/models",
    "POST /api/v1/models/load",
    "POST /api/v1/models/unload",
    "POST /api/v1/models/download",
    "GET /api/v1/models/download/status/{}",
    "POST /api/v1/chat",
    "GET /api/v0/models",
    "GET /v1/models",
    "POST /v1/chat/completions",
    "POST /v1/embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Where a download is."""

    job_id: str
    """Identifies it. Empty if there is nothing to wait for."""
    status: str
    """`downloading`, `paused`, `completed`, `failed`, `already_downloaded`, or a word of a later version."""
    total_bytes: int = 0
    """Bytes of the model. 0 is unknown."""
    completed_bytes: int = 0
    """Bytes that are here. 0 is unknown."""


class LmStudioClient:
    """Calls one LM Studio. Used as `async with LmStudioClient(settings) as client`.

    Every method raises a `Failure` where the server refused or did not answer.

    Args:
        settings: where it is and how long it may take.
        token: API token, empty for none.
    """

    def __init__(self, settings: LmStudioSettings, *, token: str = "") -> None:
        self._settings = settings
        self._name = settings.name
        self._dialect: Dialect | None = None
        self.item = "text"
        """Type of text items in the native chat, which differs by version."""
        self._exit = AsyncExitStack()
        self._upstream = Upstream(
            settings.base_url,
            allowed=_ALLOWED,
            name=settings.name,
            token=token,
            connect_timeout=settings.connect_timeout.total_seconds(),
            line_limit=settings.line_limit,
        )

    def __repr__(self) -> str:
        api = self._dialect.value if self._dialect is not None else "unknown"
        return f"<LmStudioClient {self._name} {self._settings.base_url} {api}>"

    async def __aenter__(self) -> LmStudioClient:
        await self._exit.enter_async_context(self._upstream)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exit.aclose()

    @property
    def dialect(self) -> Dialect | None:
        """The newest API the server has, None if it was not found out yet."""
        return self._dialect

    def forget(self) -> None:
        """Forgets which APIs the server has, as when it went away: another version may come back."""
        self._dialect = None

    async def probe(self) -> None:
        """Returns if LM Studio is there and lets us in. Loads nothing.

        Raises:
            BackendUnavailable: it is not there, or something else is.
            UpstreamUnauthenticated: it refuses our token.
        """
        if self._settings.greeting:
            with translated(backend=self._name):
                try:
                    greeting = await self._upstream.get_json("/lmstudio-greeting")
                except UpstreamError as error:
                    if error.status in {401, 403}:
                        raise
                    raise self._stranger() from error
            if obj(greeting).get("lmstudio") is not True:
                raise self._stranger()
        if self._dialect is None or not self._settings.greeting:
            await self.models()

    async def models(self) -> tuple[Entry, ...]:
        """Returns what LM Studio lists, with what is in memory where its API tells."""
        known = self._dialect
        if known is not None:
            found = await self._listed(known)
            if found is not None:
                return found
        for dialect in Dialect:
            found = await self._listed(dialect)
            if found is not None:
                self._dialect = dialect
                return found
        raise self._stranger()

    async def _listed(self, dialect: Dialect) -> tuple[Entry, ...] | None:
        try:
            value = await self._upstream.get_json(f"{dialect.value}/models")
        except UpstreamError as error:
            if error.no_such_endpoint or error.type == "unreadable_body":
                return None
            failure = to_failure(error, backend=self._name)
            if isinstance(failure, UpstreamUnauthenticated):
                self._dialect = None  # the next probe asks again and reports what it finds
            raise failure from error
        return listing.read(value, dialect)

    def _stranger(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"what answers at {self._settings.base_url} is not LM Studio: start its server there, or correct "
            "base_url",
            metadata={"backend": self._name},
        )

    async def load(self, entry: Entry, options: Mapping[str, int | bool], *, ttl: float | None) -> str:
        """Loads a model, which may take minutes, and returns the instance's identifier.

        A native load always makes a new instance, so callers look first whether there is one. An older
        LM Studio can only be made to load by a request: it gets the smallest there is.

        Args:
            entry: what to load.
            options: how.
            ttl: seconds it stays after its last use, where LM Studio keeps that time itself.

        Raises:
            ModelLoadFailed: it could not be loaded.
            ModelNotFound: there is no such model.
        """
        timeout = self._settings.load_timeout.total_seconds()
        try:
            with translated(backend=self._name, model=entry.key):
                if self._dialect is Dialect.NATIVE:
                    body = {"model": entry.key, "echo_load_config": True, **options}
                    reply = await self._upstream.post_json("/api/v1/models/load", json=body, timeout=timeout)
                    return self._loaded(obj(reply), entry)
                await self._touch(entry, ttl, timeout)
                return entry.key
        except (BackendError, FirstEventTimeout) as failure:
            raise ModelLoadFailed(
                f"{self._name} could not load {entry.key}: {failure.message}", metadata=failure.metadata
            ) from failure

    def _loaded(self, reply: JsonObject, entry: Entry) -> str:
        identifier = text(reply, "instance_id")
        if not identifier or text(reply, "status", "loaded") != "loaded":
            raise BackendError(
                f"{self._name} did not say that {entry.key} is loaded", metadata={"backend": self._name}
            )
        return identifier

    async def _touch(self, entry: Entry, ttl: float | None, timeout: float) -> None:
        body: dict[str, object] = {"model": entry.key}
        if ttl is not None:
            body["ttl"] = int(ttl)
        if entry.kind == "embedding":
            await self._upstream.post_json("/v1/embeddings", json=body | {"input": ["."]}, timeout=timeout)
            return
        body |= {"messages": [{"role": "user", "content": "."}], "max_tokens": 1}
        await self._upstream.post_json("/v1/chat/completions", json=body, timeout=timeout)

    async def unload(self, instance_id: str) -> bool:
        """Removes an instance from memory; returns whether it was there.

        Raises:
            CapabilityUnsupported: this LM Studio is too old for that.
        """
        if self._dialect is not Dialect.NATIVE:
            raise CapabilityUnsupported(
                f"{self._name} cannot unload: LM Studio has that since 0.4.0; update it or unload there",
                metadata={"backend": self._name},
            )
        try:
            await self._upstream.post_json("/api/v1/models/unload", json={"instance_id": instance_id})
        except UpstreamError as error:
            if error.status == 404 and not error.no_such_endpoint:
                return False  # somebody else was faster
            raise to_failure(error, backend=self._name) from error
        return True

    async def download(self, model: str, quantization: str) -> Download:
        """Begins a download, or joins the one that is under way.

        Raises:
            CapabilityUnsupported: this LM Studio is too old for that.
            ModelNotFound: there is no such model in LM Studio's catalogue.
        """
        if self._dialect is not Dialect.NATIVE:
            raise CapabilityUnsupported(
                f"{self._name} cannot download: LM Studio has that since 0.4.0; update it or download there",
                metadata={"backend": self._name},
            )
        body = {"model": model} | ({"quantization": quantization} if quantization else {})
        with translated(backend=self._name, model=model):
            reply = await self._upstream.post_json("/api/v1/models/download", json=body)
        return self._download(obj(reply))

    async def download_status(self, job_id: str) -> Download:
        """Returns where a download is.

        Raises:
            BackendUnavailable: the server knows no such download, as after a restart.
        """
        try:
            reply = await self._upstream.get_json("/api/v1/models/download/status/{}", job_id)
        except UpstreamError as error:
            if error.status == 404:
                raise BackendUnavailable(
                    f"{self._name} forgot the download, as it does when it restarts; ask again to resume",
                    metadata={"backend": self._name},
                ) from error
            raise to_failure(error, backend=self._name) from error
        return self._download(obj(reply))

    def _download(self, reply: JsonObject) -> Download:
        status = text(reply, "status")
        if not status:
            raise BackendError(
                f"{self._name} did not say where the download is", metadata={"backend": self._name}
            )
        total = max(0, integer(reply, "total_size_bytes"))
        done = total if status == "completed" else max(0, integer(reply, "downloaded_bytes"))
        return Download(job_id=text(reply, "job_id"), status=status, total_bytes=total, completed_bytes=done)

    @asynccontextmanager
    async def chat(self, body: Mapping[str, object]) -> AsyncIterator[AsyncIterator[SseEvent]]:
        """Opens the stream of a reply. Leaving closes its socket.

        Raises:
            UpstreamError: the server refused, before its stream or in place of it.
            Failure: it did not answer.
        """
        async with self._stream("/v1/chat/completions", body) as events:
            yield events

    @asynccontextmanager
    async def native_chat(self, body: dict[str, object]) -> AsyncIterator[AsyncIterator[SseEvent]]:
        """Opens the stream of a reply of the native chat. See `chat`."""
        async with AsyncExitStack() as stack:
            try:
                events = await stack.enter_async_context(self._stream("/api/v1/chat", body))
            except UpstreamError as error:
                if not native.refuses_items(error):
                    raise
                self.item = native.OTHER_ITEM[self.item]
                again = native.with_items(body, self.item)
                events = await stack.enter_async_context(self._stream("/api/v1/chat", again))
            yield events

    @asynccontextmanager
    async def _stream(self, path: str, body: Mapping[str, object]) -> AsyncIterator[AsyncIterator[SseEvent]]:
        settings = self._settings
        async with self._upstream.stream(
            "POST",
            path,
            json=body,
            first_byte=seconds(settings.first_byte_timeout),
            between_bytes=seconds(settings.between_bytes_timeout),
        ) as reply:
            if reply.content_type == "application/json":
                await reply.json()
                raise BrokenStream(
                    f"{self._name} answered a whole document where a stream was asked for",
                    metadata={"backend": self._name},
                )
            yield reply.events()

    async def embed(self, model: str, texts: Sequence[str]) -> tuple[str, Batch]:
        """Embeds texts; returns the name of the model that did, and the vectors in order.

        Raises:
            BackendError: the reply does not hold one vector a text.
        """
        body = {"model": model, "input": list(texts), "encoding_format": "float"}
        timeout = seconds(self._settings.first_byte_timeout)
        with translated(backend=self._name, model=model):
            value = await self._upstream.post_json("/v1/embeddings", json=body, timeout=timeout)
        reply = obj(value)
        vectors: dict[int, list[float]] = {}
        data = array(reply.get("data"))
        for position, entry in enumerate(data):
            one = obj(entry)
            vectors[integer(one, "index", position)] = self._vector(one.get("embedding"))
        if len(data) != len(texts) or sorted(vectors) != list(range(len(texts))):
            raise self._misshapen()
        usage = obj(reply.get("usage"))
        batch = Batch(
            vectors=[vectors[index] for index in range(len(texts))],
            prompt_tokens=max(0, integer(usage, "prompt_tokens")),
        )
        return text(reply, "model"), batch

    def _vector(self, value: JsonValue) -> list[float]:
        if isinstance(value, str):  # base64 of little-endian floats: not asked for, and still seen
            try:
                data = base64.b64decode(value, validate=True)
                return list(struct.unpack(f"<{len(data) // 4}f", data))
            except (binascii.Error, struct.error) as error:
                raise self._misshapen() from error
        components = array(value)
        numbers = [number({"x": one}, "x", float("nan")) for one in components]
        if not numbers:
            raise self._misshapen()
        return numbers

    def _misshapen(self) -> BackendError:
        return BackendError(
            f"{self._name} did not answer one vector for each text", metadata={"backend": self._name}
        )


def seconds(duration: timedelta | None) -> float | None:
    """Returns a duration in seconds, None for none."""
    return None if duration is None else duration.total_seconds()
