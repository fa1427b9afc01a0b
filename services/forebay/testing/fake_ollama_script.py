"""Steps that play an answer byte by byte, for every way in which a server can misbehave.

A script is a list of steps. The first step that writes decides the kind of
answer: `Raw` speaks to the socket itself, everything else goes through a
well-formed chunked response that can still be cut anywhere.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from forebay.testing.fake_ollama_wire import go_json


class Proceed(Exception):
    """The script is over and the server answers as it normally would."""


class Reset(Exception):
    """The script is over and the connection is torn down."""


class Player:
    """Writes the answer of one scripted request."""

    def __init__(self, request: web.Request) -> None:
        self.request = request
        self.status = 200
        self.headers: dict[str, str] = {"Content-Type": "application/x-ndjson"}
        self._response: web.StreamResponse | None = None

    async def write(self, data: bytes) -> None:
        """Writes one chunk of the body, after the head."""
        await self.begin()
        assert self._response is not None
        await self._response.write(data)

    async def begin(self) -> None:
        """Writes the head, once."""
        if self._response is None:
            self._response = web.StreamResponse(status=self.status, headers=self.headers)
            if "Content-Length" not in self.headers:
                self._response.enable_chunked_encoding()
            await self._response.prepare(self.request)

    async def end(self) -> web.StreamResponse:
        """Ends the body in good order."""
        await self.begin()
        assert self._response is not None
        await self._response.write_eof()
        return self._response


class Step(Protocol):
    """One thing that happens in an answer."""

    async def play(self, player: Player) -> None:
        """Makes it happen."""


@dataclass(frozen=True, slots=True)
class Head:
    """Sets status and headers of the answer; to be played before anything is written."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    async def play(self, player: Player) -> None:
        """Sets them."""
        player.status = self.status
        player.headers.update(self.headers)


@dataclass(frozen=True, slots=True)
class Flush:
    """Sends the head now, without any body."""

    async def play(self, player: Player) -> None:
        """Sends it."""
        await player.begin()


@dataclass(frozen=True, slots=True)
class Line:
    """Writes an object as one line."""

    value: object
    ending: bytes = b"\n"

    async def play(self, player: Player) -> None:
        """Writes it."""
        await player.write(go_json(self.value) + self.ending)


@dataclass(frozen=True, slots=True)
class Body:
    """Writes bytes, cut at the given offsets into writes of their own."""

    data: bytes
    cuts: Sequence[int] = ()

    async def play(self, player: Player) -> None:
        """Writes them, with a turn of the loop between the parts so that they travel apart."""
        edges = [0, *sorted(self.cuts), len(self.data)]
        for start, stop in itertools.pairwise(edges):
            if stop > start:
                await player.write(self.data[start:stop])
                await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Pause:
    """Waits."""

    seconds: float

    async def play(self, player: Player) -> None:
        """Waits."""
        await asyncio.sleep(self.seconds)


@dataclass(frozen=True, slots=True)
class Until:
    """Waits until the test says so. One that is never set is a stall."""

    event: asyncio.Event = field(default_factory=asyncio.Event)

    async def play(self, player: Player) -> None:
        """Waits."""
        await self.event.wait()


@dataclass(frozen=True, slots=True)
class Cut:
    """Tears the connection down with a reset."""

    async def play(self, player: Player) -> None:
        """Leaves the script."""
        raise Reset


@dataclass(frozen=True, slots=True)
class Normal:
    """Goes on as the server normally would; only before anything is written."""

    async def play(self, player: Player) -> None:
        """Leaves the script."""
        raise Proceed


@dataclass(frozen=True, slots=True)
class Raw:
    """Writes to the socket itself, head and all, and closes it."""

    data: bytes

    async def play(self, player: Player) -> None:
        """Writes and leaves the script."""
        transport = player.request.transport
        if transport is not None:
            transport.write(self.data)
            transport.close()
        raise Reset


async def play(steps: Sequence[Step], request: web.Request) -> web.StreamResponse | None:
    """Plays a script; None if the server is to answer itself."""
    player = Player(request)
    try:
        for step in steps:
            await step.play(player)
        return await player.end()
    except Proceed:
        return None
    except Reset:
        transport = request.transport
        if transport is not None and not transport.is_closing():
            raw = transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        return web.Response()


def lines(*values: object) -> list[Step]:
    """Returns a script that answers with these objects, a line each."""
    return [Line(value) for value in values]


def reply(status: int, body: object, content_type: str = "application/json; charset=utf-8") -> list[Step]:
    """Returns a script that answers with a status and one body, JSON or text."""
    data = body.encode() if isinstance(body, str) else go_json(body)
    headers = {"Content-Type": content_type, "Content-Length": str(len(data))}
    return [Head(status, headers), Body(data)]
