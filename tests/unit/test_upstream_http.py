# ruff: noqa: E501, SIM117 - servers write long lines, and who serves stands before who calls
"""The client reaches what it may, says what went wrong, and closes what it leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    Failure,
    FirstEventTimeout,
    StreamInterrupted,
    StreamStalled,
)
from forebay.upstream.errors import UpstreamError
from forebay.upstream.framing import LineTooLong
from forebay.upstream.http import Upstream, normalize_base_url

ALLOWED = ("GET /a", "POST /a", "GET /a/{}", "DELETE /a", "HEAD /a/{}", "GET /models")

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, list[str]], Awaitable[None]]


@dataclass
class Raw:
    """A server made of sockets."""

    port: int = 0
    heads: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    connections: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def raw(*answers: bytes | None, keep: bool = False, wait: bool = False) -> AsyncIterator[Raw]:
    """Serves answers, the last one for ever; None closes without one. `wait` holds the connection open."""
    server = Raw()
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (int(x[16:]) for x in head.split("\r\n") if x.lower().startswith("content-length: ")), 0
                )
                server.heads.append(head)
                server.bodies.append(await reader.readexactly(length))
                answer = left.pop(0) if len(left) > 1 else left[0]
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
                if wait:
                    await reader.read()
                    server.gone.set()
                if not keep:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            server.gone.set()
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield server


def http(body: bytes, status: str = "200 OK", *more: str) -> bytes:
    head = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(body)}",
        "Content-Type: Application/JSON; charset=x",
        *more,
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def upstream(url: str, **settings: object) -> Upstream:
    return Upstream(url, allowed=ALLOWED, name="b", **settings)  # type: ignore[arg-type]  # settings by name


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("http://127.0.0.1:1234", "http://127.0.0.1:1234"),
        ("http://127.0.0.1:1234/", "http://127.0.0.1:1234"),
        ("http://127.0.0.1:1234//v1//", "http://127.0.0.1:1234"),
        ("localhost:11434/api", "http://localhost:11434"),
        (" https://Host.example/api/v1 ", "https://host.example"),
        ("http://host/api/v0/", "http://host"),
        ("http://host/proxy/v1", "http://host/proxy"),
        ("http://host/v1/models", "http://host/v1/models"),
        ("http://0.0.0.0:11434", "http://127.0.0.1:11434"),
        ("http://[::]:1", "http://[::1]:1"),
        ("http://[fe80::1]:1/v1", "http://[fe80::1]:1"),
    ],
)
def test_edge_65_base_urls_lose_what_people_add(given: str, normal: str) -> None:
    assert normalize_base_url(given) == normal
    assert normalize_base_url(normal) == normal


@pytest.mark.parametrize(
    "given",
    [
        "ftp://host",
        "http://",
        "http://user:pass@host",
        "http://host?x=1",
        "http://host#x",
        "http://host:port",
    ],
)
def test_base_urls_that_make_no_sense_or_hold_secrets_are_refused(given: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # several sentences
        normalize_base_url(given)
    assert "pass@" not in str(raised.value)


async def test_only_allowed_paths_are_reached_and_arguments_stay_arguments() -> None:
    async with raw(http(b"{}"), keep=True) as server, upstream(server.url + "/base") as client:
        await client.get_json("/a/{}", "x/../y?z#\u00e9 %2e", query={"q": "a b&c"})
        assert server.heads[0].startswith(
            "GET /base/a/x%2F..%2Fy%3Fz%23%C3%A9%20%252e?q=a+b%26c HTTP/1.1\r\n"
        )
        for path, *args in (("/b",), ("/a/x",), ("/a/{}", ".."), ("/a/{}", "."), ("/a/{}", "")):
            with pytest.raises(ValueError, match="path"):
                await client.get_json(path, *args)
        assert len(server.heads) == 1


async def test_a_redirect_is_an_error_and_the_token_goes_nowhere_else() -> None:
    async with raw(http(b"{}")) as other:
        moved = http(b"", "307 Temporary Redirect", f"Location: {other.url}/a")
        async with raw(moved) as server, upstream(server.url, token="secret") as client:
            for send in (client.get_json("/a"), client.post_json("/a", json={})):
                with pytest.raises(UpstreamError) as raised:
                    await send
                assert raised.value.status == 307
            assert "Authorization: Bearer secret" in server.heads[0]
            assert "secret" not in f"{client!r} {raised.value!r}"
        assert other.connections == 0


async def test_a_token_that_cannot_be_sent_is_refused_without_showing_it() -> None:
    for token in ("a\nb", "a b", "a\x00"):
        with pytest.raises(ValueError, match="characters") as raised:
            upstream("http://x", token=token)
        assert token not in str(raised.value)


async def test_edge_36_the_host_header_can_be_replaced() -> None:
    async with raw(http(b"{}")) as server, upstream(server.url, host="localhost:11434") as client:
        await client.get_json("/a")
        assert "\r\nHost: localhost:11434\r\n" in server.heads[0]
        assert server.heads[0].lower().count("\r\nhost:") == 1


async def test_a_delete_has_its_body_and_an_empty_answer_may_be_good() -> None:
    async with raw(http(b""), keep=True) as server, upstream(server.url) as client:
        assert await client.request_json("DELETE", "/a", json={"model": "m"}, empty=True) is None
        assert server.bodies == [b'{"model":"m"}']
        with pytest.raises(UpstreamError) as raised:
            await client.request_json("DELETE", "/a", json={})
        assert raised.value.type == "unreadable_body"
        reply = await client.request("HEAD", "/a/{}", "sha256:1")
        assert (reply.status, reply.content_type) == (200, "application/json")


async def test_edge_66_an_idle_connection_that_the_server_closes_is_no_failure() -> None:
    """Reads are repeated on a new connection; whatever else is sent never meets an old one."""
    connections = 0
    answered = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections, answered
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http(b"{}"))
        answered += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            # The second request on this connection is read, and never answered: the race, every time.
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening, upstream(f"http://127.0.0.1:{port}") as client:
        for _ in range(3):
            assert await client.get_json("/a") == {}
        for _ in range(3):
            assert await client.post_json("/a", json={}) == {}
    assert answered == 6
    assert connections == 6


async def test_reads_share_a_connection_and_others_have_their_own() -> None:
    async with raw(http(b"{}"), keep=True) as server, upstream(server.url) as client:
        for _ in range(3):
            await client.get_json("/a")
        assert server.connections == 1
        for _ in range(3):
            await client.post_json("/a", json={})
        assert server.connections == 4
    async with raw(http(b"{}"), keep=True) as server, upstream(server.url, keepalive=0) as client:
        for _ in range(3):
            await client.get_json("/a")
        assert server.connections == 3


async def test_a_hundred_streams_do_not_stand_before_a_read() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: x\n\n"
    async with raw(head, wait=True) as server, upstream(server.url) as client, asyncio.timeout(20):
        async with asyncio.TaskGroup() as tasks:
            opened = 0
            free = asyncio.Event()

            async def stream() -> None:
                nonlocal opened
                async with client.stream("POST", "/a", json={}) as body:
                    await body.read()
                    opened += 1
                    await free.wait()

            for _ in range(120):
                tasks.create_task(stream())
            while opened < 120:
                await asyncio.sleep(0.01)
            async with client.stream("GET", "/a") as body:
                assert await body.read()
            free.set()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (None, BackendUnavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", BackendUnavailable),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", BackendUnavailable),
        (b"SSH-2.0-OpenSSH_9.7\r\n\r\n", BackendError),
    ],
)
async def test_an_answer_that_is_none_has_its_name(answer: bytes | None, kind: type[Failure]) -> None:
    async with raw(answer) as server, upstream(server.url) as client:
        for send in (client.get_json("/a"), client.post_json("/a", json={})):
            with pytest.raises(kind) as raised:
                await send
            assert raised.value.metadata == {"backend": "b"}


async def test_a_server_that_is_not_there_is_unavailable_and_says_where() -> None:
    async with raw(None) as server:
        url = server.url
    async with upstream(url) as client:
        with pytest.raises(BackendUnavailable, match="connection refused") as raised:
            await client.get_json("/a")
        assert url in raised.value.message
        assert raised.value.retry_after is not None
    async with upstream("http://no-such-host.invalid") as client:
        with pytest.raises(BackendUnavailable):
            await client.get_json("/a")


async def test_tls_that_fails_says_so() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"no TLS here, and never was\r\n")
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening, upstream(f"https://127.0.0.1:{port}") as client:
        with pytest.raises(BackendUnavailable, match="TLS"):
            await client.get_json("/a")


async def test_a_connection_that_is_never_accepted_is_given_up() -> None:
    # A socket that listens with a full backlog takes no more connections.
    import socket

    with socket.socket() as listening, socket.socket() as first, socket.socket() as second:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        port = listening.getsockname()[1]
        async with upstream(f"http://127.0.0.1:{port}", connect_timeout=0.2) as client:
            with pytest.raises(BackendUnavailable, match="does not accept"):
                await client.get_json("/a")


async def test_an_answer_that_is_late_is_given_up() -> None:
    async with raw(b"", wait=True) as server, upstream(server.url) as client:
        with pytest.raises(FirstEventTimeout):
            await client.get_json("/a", timeout=0.1)
        with pytest.raises(FirstEventTimeout, match=r"0\.1 s"):
            async with client.stream("POST", "/a", json={}, first_byte=0.1):
                pass
        async with asyncio.timeout(5):
            await server.gone.wait()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_silence_before_the_first_byte_and_after_it_have_their_names() -> None:
    async with raw(HEAD, wait=True) as server, upstream(server.url) as client:
        async with client.stream("POST", "/a", json={}, first_byte=0.1, between_bytes=50) as body:
            with pytest.raises(FirstEventTimeout):
                await body.read()
    async with raw(HEAD + b"2\r\na\n\r\n", wait=True) as server, upstream(server.url) as client:
        async with client.stream("POST", "/a", json={}, first_byte=50, between_bytes=0.1) as body:
            assert (await body.read(), body.received) == (b"a\n", 2)
            with pytest.raises(StreamStalled):
                await body.read()


async def test_a_break_before_the_first_byte_and_after_it_have_their_names() -> None:
    async with raw(HEAD) as server, upstream(server.url) as client:
        async with client.stream("POST", "/a", json={}) as body:
            with pytest.raises(BackendUnavailable):
                await body.read()
    async with raw(HEAD + b"2\r\na\n\r\n") as server, upstream(server.url) as client:
        async with client.stream_lines("/a", json={}) as lines:
            assert await anext(lines) == b"a"
            with pytest.raises(StreamInterrupted):
                await anext(lines)


async def test_lines_of_megabytes_arrive_and_over_the_limit_fail() -> None:
    big = b"x" * 2_000_000
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + big + b"\n\nend"
    async with raw(answer) as server, upstream(server.url) as client:
        async with client.stream_lines("/a", json={}) as lines:
            assert [line async for line in lines] == [big, b"end"]
    async with raw(answer) as server, upstream(server.url, line_limit=1000) as client:
        async with client.stream_lines("/a", json={}) as lines:
            with pytest.raises(LineTooLong):
                await anext(lines)
        with pytest.raises(BackendError, match="1000 bytes"):
            await client.get_json("/a")


async def test_leaving_a_stream_closes_its_socket_at_once() -> None:
    async with raw(HEAD + b"2\r\na\n\r\n", wait=True) as server, upstream(server.url) as client:
        async with client.stream("POST", "/a", json={}) as body:
            await body.read()
            assert (body.status, body.content_type, body.server) == (200, "application/x-ndjson", "")
        async with asyncio.timeout(0.2):
            await server.gone.wait()


async def test_events_are_read_and_json_in_their_place_too() -> None:
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n: c\n\ndata: 1\n\ndata: 2"
    async with raw(stream) as server, upstream(server.url) as client:
        async with client.stream("POST", "/a", json={}) as body:
            assert [event.data async for event in body.events()] == ["1", "2"]
        async with client.stream("POST", "/a", json={}) as body:
            assert [event.comment async for event in body.events(comments=True)] == ["c", "", ""]
    async with raw(http(b'{"error":{"type":"x"}}')) as server, upstream(server.url) as client:
        async with client.stream("POST", "/a", json={}) as body:
            with pytest.raises(UpstreamError) as raised:
                await body.json()
            assert raised.value.type == "x"


async def test_a_compressed_answer_is_read_and_compression_is_not_asked_for() -> None:
    import gzip

    packed = gzip.compress(b'{"a":1}')
    async with (
        raw(http(packed, "200 OK", "Content-Encoding: gzip")) as server,
        upstream(server.url) as client,
    ):
        assert await client.get_json("/a") == {"a": 1}
        assert "\r\nAccept-Encoding: identity\r\n" in server.heads[0]


async def test_when_to_come_back_is_read_and_an_endless_error_is_cut() -> None:
    async with raw(http(b"busy", "503 X", "Retry-After: 7")) as server, upstream(server.url) as client:
        with pytest.raises(UpstreamError) as raised:
            await client.get_json("/a")
        assert raised.value.retry_after is not None
        assert raised.value.retry_after.total_seconds() == 7
    endless = b"HTTP/1.1 500 X\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 200_000
    async with raw(endless, wait=True) as server, upstream(server.url) as client, asyncio.timeout(10):
        with pytest.raises(UpstreamError) as raised:
            await client.get_json("/a")
        assert raised.value.status == 500
    cut = b"HTTP/1.1 500 X\r\nContent-Length: 99\r\n\r\nshort"
    async with raw(cut) as server, upstream(server.url) as client:
        with pytest.raises(UpstreamError, match="HTTP 500"):
            await client.get_json("/a")


async def test_an_upstream_that_is_not_open_is_a_fault_of_ours() -> None:
    client = upstream("http://127.0.0.1:1")
    assert (client.base_url, client.name) == ("http://127.0.0.1:1", "b")
    with pytest.raises(RuntimeError, match="async with"):
        await client.get_json("/a")


async def test_it_speaks_with_a_real_web_server() -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.json_response({"got": await request.json(), "kind": request.content_type})

    app = web.Application()
    app.router.add_post("/a", echo)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with upstream(f"http://127.0.0.1:{port}") as client:
            answer = await client.post_json("/a", json={"\u00e9": [1, None]})
        assert answer == {"got": {"\u00e9": [1, None]}, "kind": "application/json"}
    finally:
        await runner.cleanup()
