"""A TCP proxy that does to a connection what networks do.

It stands between a client and a server and can be told at any time to delay,
throttle, cut, reset, freeze or refuse. A cut at byte N is exact, so the same
stream breaks at the same place every time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

Direction = Literal["up", "down"]
"""`up` is from the client to the server, `down` from the server to the client."""

_CHUNK_BYTES = 16 * 1024
_LINGER_AND_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of zero seconds: closing sends RST instead of FIN."""

_LINGER_SECONDS = 2.0
"""How long a peer may go on after its connection was closed: many times what a loaded machine needs to
notice, and short beside any test's bound."""


@dataclass(slots=True)
class Toxics:
    """What happens to the bytes of one direction. May be changed while they flow."""

    latency: float = 0.0
    """Seconds by which bytes are late."""
    jitter: float = 0.0
    """Most seconds added to the latency by chance."""
    bandwidth: float | None = None
    """Bytes in a second. None is no limit."""
    cut_after: int | None = None
    """Bytes of a connection that pass before it is closed on both sides. None is never."""
    cut_with_reset: bool = False
    """Whether that cut is a RST. The peer may then lose bytes that it has not read yet."""
    byte_count: int = 0
    """Bytes that passed, over all connections."""


class FaultProxy:
    """Forwards connections to a server and ill-treats them. Use it with `async with`.

    Args:
        upstream: the server's `host:port`.
        seed: of the jitter.
    """

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host.strip("[]"), int(port))
        self._chance = random.Random(seed)  # noqa: S311  # a schedule and no secret
        self._links: set[_Link] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._tasks = asyncio.TaskGroup()
        self._port = 0
        self.up = Toxics()
        """What happens to bytes from client to server."""
        self.down = Toxics()
        """What happens to bytes from server to client."""
        self.accepted = 0
        """Connections taken so far."""

    @property
    def address(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.refuse()
        for link in self._links:
            link.abandon()
        await self._tasks.__aexit__(kind, error, trace)

    async def refuse(self) -> None:
        """Refuses new connections, as a machine does where nobody listens. Open ones go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """Takes new connections again, on the same port."""
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    def freeze(self) -> None:
        """Lets no byte pass and says nothing, as a network does whose cable was pulled."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Lets the bytes flow again."""
        self._flowing.set()

    def reset(self) -> None:
        """Resets every open connection, on both sides."""
        for link in self._links:
            link.cut(reset=True)

    def close(self) -> None:
        """Closes every open connection, on both sides, in good order."""
        for link in self._links:
            link.cut(reset=False)

    def half_close(self, direction: Direction) -> None:
        """Ends one direction of every open connection; the other one goes on."""
        for link in self._links:
            link.end(direction)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._tasks.create_task(self._link(reader, writer))

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            _linger(writer)
            writer.transport.abort()
            return
        link = _Link(writer, up_writer)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as pumps:
                link.pumps = [
                    pumps.create_task(self._pump(link, "up", reader, up_writer)),
                    pumps.create_task(self._pump(link, "down", up_reader, writer)),
                ]
        finally:
            link.shut()
            self._links.discard(link)

    async def _pump(
        self, link: _Link, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        toxics = self.up if direction == "up" else self.down
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK_BYTES):
                delay = toxics.latency + toxics.jitter * self._chance.random()
                if toxics.bandwidth is not None:
                    delay += len(data) / toxics.bandwidth
                await asyncio.sleep(delay)
                await self._flowing.wait()
                if direction in link.ended:
                    continue
                room = len(data) if toxics.cut_after is None else max(0, toxics.cut_after - passed)
                writer.write(data[:room])
                await writer.drain()
                passed += min(room, len(data))
                toxics.byte_count += min(room, len(data))
                if toxics.cut_after is not None and passed >= toxics.cut_after:
                    link.cut(reset=toxics.cut_with_reset)
            await self._flowing.wait()
        link.end(direction)


class _Link:
    """One connection: the client's side and the server's."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._sides = {"down": client, "up": server}
        self._linger: asyncio.TimerHandle | None = None
        self.pumps: list[asyncio.Task[None]] = []
        self.ended: set[Direction] = set()

    def cut(self, *, reset: bool) -> None:
        """Ends the connection.

        In good order that is: FIN to both sides, and reading on until they end too. Closing at once would
        send RST where bytes are unread, and a RST takes from a peer what it has not read yet.
        """
        if reset:
            self.ended |= {"up", "down"}
            for side in self._sides.values():
                _linger(side)
                side.transport.abort()
            return
        self.end("down")
        self.end("up")
        self._linger = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.shut)

    def shut(self) -> None:
        """Closes both sides, whatever is unread."""
        if self._linger is not None:
            self._linger.cancel()
        for side in self._sides.values():
            side.close()

    def end(self, direction: Direction) -> None:
        """Ends one direction; what still comes in it is thrown away."""
        self.ended.add(direction)
        side = self._sides[direction]
        if not side.is_closing() and side.can_write_eof():
            with contextlib.suppress(OSError):  # the peer has closed it already
                side.write_eof()

    def abandon(self) -> None:
        self.cut(reset=True)
        for pump in self.pumps:
            pump.cancel()


def _linger(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):  # closed already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_AND_RESET)
