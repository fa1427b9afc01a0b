"""What a test can make a fake server do on the wire, byte by byte.

A `Reply` is a list of steps. Headers go out with the first byte of the body,
so that a delay, a stall or a reset placed first happens before them. Every
step is plain data and can be sent to a fake in another process as JSON.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson
from aiohttp import web


@dataclass(frozen=True, slots=True)
class Send:
    """Sends bytes of the body, in pieces of `every` bytes if given."""

    data: bytes
    every: int = 0


@dataclass(frozen=True, slots=True)
class Raw:
    """Writes bytes to the socket as they are, without any HTTP framing."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Headers:
    """Sends the headers now."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Waits for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Waits until the client is gone, or the named gate is released."""

    gate: str = ""


@dataclass(frozen=True, slots=True)
class Close:
    """Closes the connection without ending the body."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Resets the connection (TCP RST)."""


Step = Send | Raw | Headers | Delay | Stall | Close | Reset

JSON_TYPE = "application/json; charset=utf-8"
SSE_TYPE = "text/event-stream"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A scripted reply to one request."""

    status: int = 200
    """HTTP status."""
    content_type: str = JSON_TYPE
    """Content-Type of the reply. Empty sends none."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers."""
    steps: Sequence[Step] = ()
    """What happens, in order."""
    chunked: bool = True
    """False declares no length and ends the body by closing, as HTTP/1.0 servers do."""

    @classmethod
    def json(cls, body: object, *, status: int = 200) -> Reply:
        """Returns a reply that is one JSON document."""
        return cls(status=status, steps=(Send(orjson.dumps(body)),))

    @classmethod
    def text(cls, body: str, *, status: int = 200, content_type: str = "text/plain") -> Reply:
        """Returns a reply that is plain text."""
        return cls(status=status, content_type=content_type, steps=(Send(body.encode()),))

    @classmethod
    def sse(
        cls,
        *frames: object,
        done: bool = True,
        then: Sequence[Step] = (),
        every: int = 0,
        newline: str = "\n",
    ) -> Reply:
        """Returns a reply that is a stream of events.

        Args:
            frames: a `str` or `bytes` is sent as it is; a `Step` is a step; anything else is
                sent as `data:` and JSON.
            done: whether `[DONE]` follows.
            then: steps after the last frame, such as `Close()`.
            every: bytes a write, to split frames anywhere. 0 writes each frame at once.
            newline: how lines end.
        """
        steps: list[Step] = []
        for frame in frames:
            if isinstance(frame, Send | Raw | Headers | Delay | Stall | Close | Reset):
                steps.append(frame)
            elif isinstance(frame, bytes):
                steps.append(Send(frame, every))
            elif isinstance(frame, str):
                steps.append(Send(frame.encode(), every))
            else:
                steps.append(Send(b"data: " + orjson.dumps(frame) + (newline * 2).encode(), every))
        if done:
            steps.append(Send(f"data: [DONE]{newline}{newline}".encode(), every))
        return cls(content_type=SSE_TYPE, steps=(*steps, *then))

    @classmethod
    def from_json(cls, body: Mapping[str, object]) -> Reply:
        """Returns the reply described by JSON, as a control request carries it.

        Each step is an object with one key: `send` or `raw` (text), `send64` or `raw64` (base64),
        `delay` (seconds), `stall` (name of a gate), `headers`, `close` or `reset` (any value).

        Raises:
            ValueError: a step is not one of these.
        """
        steps: list[Step] = []
        raw_steps = body.get("steps", [])
        for entry in raw_steps if isinstance(raw_steps, list) else []:
            match entry:
                case {"send": str(text)}:
                    steps.append(Send(text.encode()))
                case {"send64": str(text)}:
                    steps.append(Send(base64.b64decode(text)))
                case {"raw": str(text)}:
                    steps.append(Raw(text.encode()))
                case {"raw64": str(text)}:
                    steps.append(Raw(base64.b64decode(text)))
                case {"delay": int() | float() as seconds}:
                    steps.append(Delay(float(seconds)))
                case {"stall": str(gate)}:
                    steps.append(Stall(gate))
                case {"headers": _}:
                    steps.append(Headers())
                case {"close": _}:
                    steps.append(Close())
                case {"reset": _}:
                    steps.append(Reset())
                case _:
                    raise ValueError(f"not a step: {entry!r}")
        status = body.get("status", 200)
        content_type = body.get("content_type", JSON_TYPE)
        return cls(
            status=status if isinstance(status, int) else 200,
            content_type=content_type if isinstance(content_type, str) else JSON_TYPE,
            steps=tuple(steps),
        )


class Gates:
    """Named places where the fake waits while a test holds them.

    A held place gives a test a moment that does not depend on time: it waits
    until somebody is there, does what it wants to do then, and lets go.
    """

    def __init__(self) -> None:
        self._closed: dict[str, asyncio.Event] = {}
        self._waiting: dict[str, int] = {}
        self._arrived = asyncio.Event()

    def hold(self, name: str) -> None:
        """Makes everyone who comes to the place wait."""
        self._closed.setdefault(name, asyncio.Event())

    def release(self, name: str) -> None:
        """Lets everyone pass the place."""
        event = self._closed.pop(name, None)
        if event is not None:
            event.set()

    def release_all(self) -> None:
        """Lets everyone pass every place."""
        for name in list(self._closed):
            self.release(name)

    def waiting(self, name: str) -> int:
        """Returns how many wait at the place."""
        return self._waiting.get(name, 0)

    async def arrived(self, name: str, count: int = 1) -> None:
        """Returns when at least `count` wait at the place."""
        while self.waiting(name) < count:
            self._arrived.clear()
            await self._arrived.wait()

    async def pass_(self, name: str) -> None:
        """Passes the place, after its release if it is held."""
        event = self._closed.get(name)
        if event is None:
            return
        self._waiting[name] = self.waiting(name) + 1
        self._arrived.set()
        try:
            await event.wait()
        finally:
            self._waiting[name] -= 1


def is_gone(request: web.Request) -> bool:
    """Whether the client of a request has hung up."""
    return request.transport is None or request.transport.is_closing()


async def wait_gone(request: web.Request) -> None:
    """Returns when the client of a request has hung up."""
    while not is_gone(request):  # noqa: ASYNC110 - aiohttp tells no one that a client left
        await asyncio.sleep(0.005)


def reset(request: web.Request) -> None:
    """Resets the connection of a request."""
    transport = request.transport
    if transport is None:
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _pieces(step: Send) -> Iterable[bytes]:
    if step.every <= 0:
        return (step.data,)
    return (step.data[at : at + step.every] for at in range(0, len(step.data), step.every))


class _Player:
    """Plays one reply to one request."""

    def __init__(self, reply: Reply, request: web.Request, gates: Gates) -> None:
        self._reply = reply
        self._request = request
        self._gates = gates
        self._response: web.StreamResponse | None = None
        self._raw = False

    async def play(self) -> web.StreamResponse:
        for step in self._reply.steps:
            if not await self._step(step):
                return self._response or web.Response(status=500)  # to nobody: the connection is gone
        if self._raw:
            transport = self._request.transport
            if transport is not None:
                transport.close()
            return web.Response(status=500)
        response = await self._open()
        await response.write_eof()
        return response

    async def _step(self, step: Step) -> bool:
        request = self._request
        match step:
            case Send():
                response = await self._open()
                for piece in _pieces(step):
                    await response.write(piece)
                    await asyncio.sleep(0)  # gives the piece a packet of its own
            case Raw():
                self._raw = True
                if request.transport is not None:
                    request.transport.write(step.data)
            case Headers():
                await self._open()
            case Delay():
                await asyncio.sleep(step.seconds)
            case Stall():
                await self._stall(step)
            case Close():
                if request.transport is not None:
                    request.transport.close()
                return False
            case Reset():
                reset(request)
                return False
        return True

    async def _stall(self, step: Stall) -> None:
        if not step.gate:
            await wait_gone(self._request)
            return
        self._gates.hold(step.gate)
        await self._gates.pass_(step.gate)

    async def _open(self) -> web.StreamResponse:
        if self._response is None:
            reply = self._reply
            response = web.StreamResponse(status=reply.status, headers=reply.headers)
            if reply.content_type:
                response.headers["Content-Type"] = reply.content_type
            if reply.chunked:
                response.enable_chunked_encoding()
            else:
                response.force_close()
            self._response = response
            await response.prepare(self._request)
        return self._response


async def play(reply: Reply, request: web.Request, gates: Gates) -> web.StreamResponse:
    """Plays a reply to a request."""
    return await _Player(reply, request, gates).play()
