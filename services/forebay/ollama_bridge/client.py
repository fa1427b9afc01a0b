"""Ollama's HTTP interface, as far as the bridge uses it, and nothing that it does not."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from forebay.kit.failure import BackendUnavailable, BrokenStream
from forebay.upstream.errors import UpstreamError, error_in, translated
from forebay.upstream.http import Upstream
from forebay.upstream.values import JsonObject, array, obj, parse, text

ALLOWED: Final = (
    "GET /api/version",
    "GET /api/tags",
    "GET /api/ps",
    "POST /api/show",
    "POST /api/generate",
    "POST /api/chat",
    "POST /api/embed",
    "POST /api/pull",
    "DELETE /api/delete",
)
"""All that the bridge can reach. Push, create and copy are not among it: no call needs them."""

_NUMBERS = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Version:
    """What a server says it is. A server built from source says 0.0.0, which is taken for the newest."""

    text: str
    numbers: tuple[int, int, int]

    @classmethod
    def of(cls, said: str) -> Version:
        """Reads a version such as `0.33.0-rc2`; one that cannot be read is taken for the newest."""
        found = _NUMBERS.match(said)
        numbers = (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)
        return cls(said, numbers)

    def since(self, *numbers: int) -> bool:
        """Whether it has what came with a version."""
        return self.numbers == (0, 0, 0) or self.numbers >= numbers

    @property
    def thinks(self) -> bool:
        """Whether reasoning is told from the answer."""
        return self.since(0, 9, 0)

    @property
    def has_schemas(self) -> bool:
        """Whether `format` takes a schema."""
        return self.since(0, 5, 0)

    @property
    def has_logprobs(self) -> bool:
        """Whether log probabilities are given."""
        return self.since(0, 12, 11)

    @property
    def counts_cached(self) -> bool:
        """Whether the count of the prompt's tokens has those found in the cache too."""
        return self.since(0, 30, 0)

    @property
    def warning(self) -> str:
        """What an operator should know of it. Empty if nothing."""
        if self.since(0, 17, 1):
            return ""
        return (
            f"Ollama {self.text} gives anyone who reaches it parts of its memory (CVE-2026-7482); "
            "update it to 0.17.1 or newer"
        )


class Client:
    """One Ollama server.

    Every method raises a `Failure`, except where it says `UpstreamError`.

    Args:
        upstream: the HTTP client, with `ALLOWED`.
        name: the backend's name, for messages.
        timeout: seconds for a call that does no inference.
    """

    def __init__(self, upstream: Upstream, *, name: str, timeout: float) -> None:
        self._upstream = upstream
        self._name = name
        self._timeout = timeout

    async def version(self) -> Version:
        """Returns the server's version.

        Raises:
            BackendUnavailable: what answers is not Ollama, or it says that it cannot serve.
        """
        try:
            said = obj(await self._upstream.get_json("/api/version", timeout=self._timeout))
        except UpstreamError as error:
            hint = "; it may refuse the name it is called by: set host_header" if error.status == 403 else ""
            raise BackendUnavailable(
                f"what listens at {self._upstream.base_url} does not answer as Ollama does ({error}){hint}",
                metadata={"backend": self._name},
            ) from error
        if not isinstance(said.get("version"), str):
            raise BackendUnavailable(
                f"what listens at {self._upstream.base_url} gives no version, so it is not Ollama",
                metadata={"backend": self._name},
            )
        return Version.of(text(said, "version"))

    async def tags(self) -> list[JsonObject]:
        """Returns the models on disk."""
        return await self._models("/api/tags")

    async def processes(self) -> list[JsonObject]:
        """Returns the models in memory."""
        return await self._models("/api/ps")

    async def _models(self, path: str) -> list[JsonObject]:
        with translated(backend=self._name):
            said = obj(await self._upstream.get_json(path, timeout=self._timeout))
        return [obj(entry) for entry in array(said.get("models")) if entry]

    async def show(self, model: str) -> JsonObject:
        """Returns what the server knows of a model."""
        with translated(backend=self._name, model=model):
            return obj(
                await self._upstream.post_json("/api/show", json={"model": model}, timeout=self._timeout)
            )

    async def post(self, path: str, body: JsonObject, *, timeout: float | None) -> JsonObject:
        """Returns the one object that a call answers.

        Raises:
            UpstreamError: the server refused.
            Failure: it did not answer.
        """
        return obj(await self._upstream.post_json(path, json=body, timeout=timeout))

    async def delete(self, model: str) -> None:
        """Removes a model from disk."""
        with translated(backend=self._name, model=model):
            await self._upstream.request(
                "DELETE", "/api/delete", json={"model": model}, timeout=self._timeout
            )

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        body: JsonObject,
        *,
        first_byte: float | None = None,
        between_bytes: float | None = None,
    ) -> AsyncIterator[AsyncIterator[JsonObject]]:
        """Opens a stream of objects. Leaving closes the socket, which stops the server's work.

        Raises:
            UpstreamError: the server refused, at once or in a later object.
            BrokenStream: a line is not a JSON object.
            Failure: it did not answer, or fell silent.
        """
        async with self._upstream.stream_lines(
            path, json=body, first_byte=first_byte, between_bytes=between_bytes
        ) as lines:
            yield self._objects(lines)

    async def _objects(self, lines: AsyncIterator[bytes]) -> AsyncIterator[JsonObject]:
        async for line in lines:
            try:
                value = parse(line)
            except ValueError as error:
                raise BrokenStream(
                    f"{self._name} sent a line that is not JSON", metadata={"backend": self._name}
                ) from error
            if found := error_in(value):
                raise found
            if not isinstance(value, dict):
                raise BrokenStream(
                    f"{self._name} sent a line that is no JSON object", metadata={"backend": self._name}
                )
            yield value
