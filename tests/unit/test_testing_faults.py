"""The fault proxy does to a connection exactly what it was told, and leaves none open."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from forebay.testing.faults import FaultProxy

BOUND = 10.0
"""Most seconds to wait for anything."""


class Echo:
    """A server that sends back what it gets, and says goodbye when it is half-closed."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.ended = asyncio.Event()
        self.error: Exception | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                self.received += data
                writer.write(data)
                await writer.drain()
            writer.write(b"bye")
            await writer.drain()
        except ConnectionError as error:
            self.error = error
        finally:
            self.ended.set()
            writer.close()


@asynccontextmanager
async def through_proxy() -> AsyncIterator[tuple[FaultProxy, Echo]]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with asyncio.timeout(BOUND), FaultProxy(f"127.0.0.1:{port}") as proxy:
            yield proxy, echo
        assert proxy.connections == 0
    finally:
        server.close()


async def connect(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = proxy.address.split(":")
    return await asyncio.open_connection(host, int(port))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND):
        while not true():
            await asyncio.sleep(0.005)


async def test_bytes_pass_both_ways_and_are_counted() -> None:
    async with through_proxy() as (proxy, echo):
        reader, writer = await connect(proxy)
        writer.write(b"x" * 100_000)
        writer.write_eof()
        assert await reader.read(-1) == b"x" * 100_000 + b"bye"
        assert (proxy.up.byte_count, proxy.down.byte_count) == (100_000, 100_003)
        assert len(echo.received) == 100_000
        assert proxy.accepted == 1
        writer.close()
        await until(lambda: proxy.connections == 0)


@pytest.mark.parametrize("count", [0, 1, 1000, 70_001])
async def test_a_cut_downwards_is_exact(count: int) -> None:
    async with through_proxy() as (proxy, _):
        proxy.down.cut_after = count
        reader, writer = await connect(proxy)
        writer.write(b"x" * 100_000)
        assert await reader.read(-1) == b"x" * count
        writer.close()


@pytest.mark.parametrize("count", [1, 1000, 70_001])
async def test_a_cut_upwards_is_exact(count: int) -> None:
    async with through_proxy() as (proxy, echo):
        proxy.up.cut_after = count
        _, writer = await connect(proxy)
        writer.write(b"x" * 100_000)
        await echo.ended.wait()
        assert len(echo.received) == count
        writer.close()


async def test_a_cut_can_be_a_reset() -> None:
    async with through_proxy() as (proxy, _):
        proxy.down.cut_after = 10
        proxy.down.cut_with_reset = True
        reader, writer = await connect(proxy)
        writer.write(b"x" * 100)
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        writer.close()


async def test_a_cut_counts_each_connection_by_itself() -> None:
    async with through_proxy() as (proxy, _):
        proxy.down.cut_after = 5
        for _ in range(3):
            reader, writer = await connect(proxy)
            writer.write(b"x" * 100)
            assert await reader.read(-1) == b"x" * 5
            writer.close()


async def test_a_reset_is_seen_by_both_sides() -> None:
    async with through_proxy() as (proxy, echo):
        reader, writer = await connect(proxy)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        await echo.ended.wait()
        assert isinstance(echo.error, ConnectionResetError)
        writer.close()


async def test_a_close_is_in_good_order_on_both_sides() -> None:
    async with through_proxy() as (proxy, echo):
        reader, writer = await connect(proxy)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        proxy.close()
        assert await reader.read(-1) == b""
        await echo.ended.wait()
        writer.close()


async def test_half_closing_ends_one_direction_only() -> None:
    async with through_proxy() as (proxy, echo):
        reader, writer = await connect(proxy)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        proxy.half_close("up")  # the server sees the end and says goodbye
        assert await reader.read(-1) == b"bye"
        assert echo.error is None
        writer.close()


async def test_half_closing_downwards_leaves_the_way_up_open() -> None:
    async with through_proxy() as (proxy, echo):
        reader, writer = await connect(proxy)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        proxy.half_close("down")
        assert await reader.read(-1) == b""
        writer.write(b"b")
        await until(lambda: bytes(echo.received) == b"ab")
        proxy.half_close("down")  # again, which changes nothing
        writer.close()


async def test_a_frozen_connection_is_silent_and_goes_on_when_it_thaws() -> None:
    async with through_proxy() as (proxy, _):
        reader, writer = await connect(proxy)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        proxy.freeze()
        writer.write(b"b")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.read(1)
        proxy.thaw()
        assert await reader.readexactly(1) == b"b"
        writer.close()


async def test_a_frozen_proxy_can_be_left() -> None:
    async with through_proxy() as (proxy, _):
        _, writer = await connect(proxy)
        proxy.freeze()
        writer.write(b"a")
        await until(lambda: proxy.connections == 1)
    writer.close()


async def test_refusing_refuses_new_connections_and_accepting_takes_them_on_the_same_port() -> None:
    async with through_proxy() as (proxy, _):
        reader, writer = await connect(proxy)
        address = proxy.address
        await proxy.refuse()
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await connect(proxy)
        writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"
        await proxy.accept()
        await proxy.accept()
        assert proxy.address == address
        _, second = await connect(proxy)
        second.close()
        writer.close()


async def test_latency_jitter_and_bandwidth_delay() -> None:
    async with through_proxy() as (proxy, _):
        loop = asyncio.get_running_loop()
        reader, writer = await connect(proxy)
        proxy.up.latency, proxy.down.latency, proxy.down.jitter = 0.05, 0.05, 0.02
        since = loop.time()
        writer.write(b"a")
        await reader.readexactly(1)
        assert loop.time() - since >= 0.1
        proxy.up.latency = proxy.down.latency = proxy.down.jitter = 0.0
        proxy.down.bandwidth = 100_000
        since = loop.time()
        writer.write(b"x" * 10_000)
        await reader.readexactly(10_000)
        assert loop.time() - since >= 0.09
        writer.close()


async def test_a_dead_upstream_is_a_reset() -> None:
    async with asyncio.timeout(BOUND), FaultProxy("127.0.0.1:1") as proxy:
        reader, writer = await connect(proxy)
        with pytest.raises(ConnectionError):
            await reader.read(1)
        writer.close()


async def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        async with FaultProxy("127.0.0.1:1"):
            raise KeyError("mine")
    assert raised.group_contains(KeyError)
