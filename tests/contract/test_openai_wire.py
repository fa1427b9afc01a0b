# ruff: noqa: E501 - servers write long lines
"""What servers do on the wire, played byte by byte, and what the OpenAI bridge makes of it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendBusy,
    BackendError,
    BackendUnavailable,
    BrokenStream,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    InvalidRequest,
    MemoryExhausted,
    ModelNotFound,
    QueueFull,
    StreamInterrupted,
    StreamStalled,
    UpstreamUnauthenticated,
    WrongModel,
)
from forebay.kit.pipeline import Call
from forebay.kit.server import serving
from forebay.models.v1 import models_pb2 as models_pb
from forebay.openai_bridge.config import OpenAiSettings
from forebay.openai_bridge.engine import OpenAiEngine
from forebay.testing import grammar
from forebay.testing.calls import Sink, ask, message, serve
from forebay.testing.client import CallError, client
from forebay.testing.contract import TOOL
from promptly import promptly

CHAT = "POST /v1/chat/completions"
MODELS = "GET /v1/models"
EMBED = "POST /v1/embeddings"


@dataclass
class Script:
    """What the server plays to one path: pieces of bytes, waits, and how it ends."""

    body: Sequence[bytes | float] = ()
    status: str = "200 OK"
    type: str = "text/event-stream"
    headers: str = ""
    chunked: bool = True
    version: str = "HTTP/1.1"
    raw: bool = False
    reset: bool = False
    hold: bool = False


@dataclass
class Server:
    """A server that plays scripts."""

    port: int = 0
    scripts: dict[str, list[Script]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    open: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bodies(self, path: str = CHAT) -> list[Any]:
        return [body for asked, _, body in self.asked if asked == path]

    def play(self, path: str, *scripts: Script) -> None:
        """Plays scripts to a path, one a request, the last one for ever."""
        self.scripts[path] = list(scripts)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while await self._serve(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            self.open -= 1
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        length = int(headers.get("content-length", "0"))
        body = await reader.readexactly(length)
        path = head[0].rpartition(" ")[0]
        self.asked.append((path, headers, json.loads(body) if body else None))
        scripts = self.scripts.get(path) or [
            Script([b'{"error":"Not Found"}'], "404 Not Found", "application/json")
        ]
        script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        watch = asyncio.create_task(self._watch(reader))
        try:
            await self._play(script, writer)
            if script.hold:
                await watch
        finally:
            watch.cancel()
        if script.reset:
            writer.transport.abort()
        return False

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        if not await reader.read(1):
            self.left.set()

    async def _play(self, script: Script, writer: asyncio.StreamWriter) -> None:
        if not script.raw:
            head = f"{script.version} {script.status}\r\nContent-Type: {script.type}\r\n{script.headers}"
            head += "Connection: close\r\n"
            chunked = script.chunked and script.version == "HTTP/1.1"
            writer.write((head + ("Transfer-Encoding: chunked\r\n\r\n" if chunked else "\r\n")).encode())
        else:
            chunked = False
        for piece in script.body:
            if isinstance(piece, float):
                await writer.drain()
                await asyncio.sleep(piece)
            elif piece:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                await writer.drain()
        if chunked and not script.reset and not script.hold:
            writer.write(b"0\r\n\r\n")
        await writer.drain()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    fake = Server()
    listening = await asyncio.start_server(fake, "127.0.0.1", 0)
    fake.port = listening.sockets[0].getsockname()[1]
    fake.play(MODELS, models("m"))
    async with listening:
        yield fake


@pytest.fixture
async def engine(server: Server) -> AsyncIterator[OpenAiEngine]:
    async with OpenAiEngine(OpenAiSettings(base_url=server.url, flavor="generic")) as engine:
        yield engine


def models(*names: str, **more: object) -> Script:
    listed = {"object": "list", "data": [{"id": name, "object": "model", **more} for name in names]}
    return Script([json.dumps(listed).encode()], type="application/json")


def reply(value: object, status: str = "200 OK", headers: str = "") -> Script:
    return Script([json.dumps(value).encode()], status, "application/json", headers)


def chunk(delta: object = None, finish: str | None = None, **more: object) -> bytes:
    value = {
        "id": "x",
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        **more,
    }
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def text(piece: str) -> bytes:
    return chunk({"content": piece})


DONE = b"data: [DONE]\n\n"
STOP = chunk({}, "stop")


async def generate(engine: OpenAiEngine, request: pb.GenerateRequest | None = None) -> Sink:
    sink = await serve(engine.generate, request or ask(model="m"))
    grammar.check(sink.events, numbered=False)
    return sink


def finished(sink: Sink) -> pb.Finished:
    last = sink.events[-1]
    assert isinstance(last, pb.GenerateResponse)
    return last.finished


def started(sink: Sink) -> pb.Started:
    return next(
        e.started for e in sink.events if isinstance(e, pb.GenerateResponse) and e.HasField("started")
    )


async def failing(
    engine: OpenAiEngine, kind: type[Failure], request: pb.GenerateRequest | None = None
) -> tuple[Failure, Sink]:
    sink = Sink()
    with pytest.raises(kind) as raised:
        await serve(engine.generate, request or ask(model="m"), sink=sink)
    assert type(raised.value) is kind
    grammar.check(sink.events, complete=False, numbered=False)
    return raised.value, sink


async def test_edge_67_loading_is_unavailable_with_a_retry_then_ok(server: Server) -> None:
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    server.play(MODELS, reply(loading, "503 Service Unavailable"), models("m"))
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    async with OpenAiEngine(OpenAiSettings(base_url=server.url)) as engine:
        failure, _ = await failing(engine, BackendUnavailable)
        assert failure.retry_after is not None
        assert (await generate(engine)).text == "a"


async def test_edge_68_comments_between_any_two_lines_are_no_events(
    server: Server, engine: OpenAiEngine
) -> None:
    server.play(
        CHAT,
        Script([b": ping\n\n:\n\n", text("a"), b":\n", b":x\n\n", text("b"), b": p\n\n", STOP, b":\n", DONE]),
    )
    assert (await generate(engine)).text == "ab"


async def test_edge_68_comments_are_a_sign_of_life(server: Server) -> None:
    pings: list[bytes | float] = []
    for _ in range(12):
        pings += [b":\n\n", 0.05]
    server.play(CHAT, Script([text("a"), *pings, STOP, DONE]))
    settings = OpenAiSettings(base_url=server.url, flavor="generic", between_bytes_timeout=0.3)
    async with OpenAiEngine(settings) as engine:
        assert (await generate(engine)).text == "a"


async def test_silence_in_the_middle_is_a_stall(server: Server) -> None:
    server.play(CHAT, Script([text("a")], hold=True))
    settings = OpenAiSettings(base_url=server.url, flavor="generic", between_bytes_timeout=0.1)
    async with OpenAiEngine(settings) as engine:
        await failing(engine, StreamStalled)


@pytest.mark.parametrize(
    "said",
    [
        b'error: {"code":500,"message":"failed","type":"server_error"}\n\n' + DONE,
        b'data: {"error":{"code":500,"message":"failed","type":"server_error"}}\n\n',
        b'data: {"error":"failed"}\n\n' + DONE,
        b'event: error\ndata: {"message":"failed"}\n\n',
        b"event: error\ndata: failed\n\n",
        b"error: failed\n\n",
    ],
)
async def test_edge_69_an_error_in_the_stream_fails_the_call(
    server: Server, engine: OpenAiEngine, said: bytes
) -> None:
    server.play(CHAT, Script([said]))
    await failing(engine, BackendError)
    server.play(CHAT, Script([text("a"), text("b"), said]))
    failure, sink = await failing(engine, StreamInterrupted)
    assert sink.text == "ab"
    assert failure.metadata["cause"] == "BACKEND_ERROR"


async def test_edge_69_a_400_before_the_stream_is_an_invalid_request(
    server: Server, engine: OpenAiEngine
) -> None:
    server.play(CHAT, reply({"error": {"message": "secret prompt", "code": 400}}, "400 Bad Request"))
    failure, sink = await failing(engine, InvalidRequest)
    assert not sink.events
    assert "secret" not in failure.message


@pytest.mark.parametrize(
    "odd",
    [
        chunk({"role": "assistant", "content": None}),
        chunk({}),
        chunk(None),
        b'data: {"model":"m","choices":[]}\n\n',
        b'data: {"model":"m"}\n\n',
        b'data: {"model":"m","choices":null}\n\n',
        b'data: {"model":"m","choices":[null]}\n\n',
        b"data: []\n\n",
        b"data:\n\n",
        b"event: message\n\n",
    ],
)
async def test_edge_70_chunks_without_text_add_nothing(
    server: Server, engine: OpenAiEngine, odd: bytes
) -> None:
    server.play(CHAT, Script([odd, text("a"), odd, STOP, odd, DONE]))
    assert (await generate(engine)).text == "a"


USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


@pytest.mark.parametrize(
    "parts",
    [
        [text("a"), chunk({}, "stop", usage=USAGE)],
        [
            text("a"),
            STOP,
            b"data: " + json.dumps({"model": "m", "choices": [], "usage": USAGE}).encode() + b"\n\n",
        ],
        [chunk({"content": "a"}, usage={**USAGE, "completion_tokens": 1}), chunk({}, "stop", usage=USAGE)],
        [text("a"), chunk({}, "stop", usage=USAGE), chunk({}, usage=None)],
    ],
    ids=["finish", "own", "every", "then-null"],
)
async def test_edge_71_usage_is_found_wherever_it_is(
    server: Server, engine: OpenAiEngine, parts: list[bytes]
) -> None:
    server.play(CHAT, Script([*parts, DONE]))
    usage = finished(await generate(engine)).usage
    assert (usage.prompt_token_count, usage.output_token_count) == (5, 2)


async def test_edge_71_usage_that_is_not_told_is_zero(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    assert finished(await generate(engine)).usage == pb.Usage()


@pytest.mark.parametrize(
    "done", [b"data:[DONE]\n\n", b"data: [DONE]", b"data: [DONE]\r\n\r\n", b"data: [DONE]\r\r"]
)
async def test_edge_72_done_is_seen_in_every_spelling(
    server: Server, engine: OpenAiEngine, done: bytes
) -> None:
    server.play(CHAT, Script([text("a"), STOP, done]))
    assert (await generate(engine)).text == "a"


async def test_edge_72_what_follows_done_is_ignored(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("a"), STOP, DONE, text("b"), b"nonsense"]))
    assert (await generate(engine)).text == "a"


async def test_edge_72_text_that_says_done_is_text(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("[DONE]"), text("data: [DONE]\n\n"), STOP, DONE]))
    assert (await generate(engine)).text == "[DONE]data: [DONE]\n\n"


async def test_edge_72_a_reply_without_done_is_never_whole(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("a"), STOP]))
    failure, sink = await failing(engine, BrokenStream)
    assert failure.code.name == "ABORTED"
    assert sink.text == "a"
    for body in ([], [DONE]):
        server.play(CHAT, Script(body))
        await failing(engine, BrokenStream)


async def test_edge_73_a_body_that_ends_with_its_connection_is_whole_only_with_done(
    server: Server, engine: OpenAiEngine
) -> None:
    server.play(CHAT, Script([text("a"), STOP, DONE], version="HTTP/1.0"))
    assert (await generate(engine)).text == "a"
    server.play(CHAT, Script([text("a"), text("b")], version="HTTP/1.0"))
    failure, sink = await failing(engine, BrokenStream)
    assert failure.code.name == "ABORTED"
    assert sink.text == "ab"


async def test_a_reset_in_the_middle_interrupts_and_before_it_is_unavailable(
    server: Server, engine: OpenAiEngine
) -> None:
    server.play(CHAT, Script([text("a"), 0.05], reset=True))
    await failing(engine, StreamInterrupted)
    server.play(CHAT, Script([chunk({"role": "assistant"}), 0.05], reset=True))
    await failing(engine, BackendUnavailable)
    server.play(CHAT, Script(raw=True, reset=True))
    await failing(engine, BackendUnavailable)


async def test_edge_75_a_body_has_no_nulls_no_empty_stream_options_and_floats_are_floats(
    server: Server,
) -> None:
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    async with OpenAiEngine(OpenAiSettings(base_url=server.url, flavor="mlx-lm")) as engine:
        server.play("GET /health", reply({"status": "ok"}))
        request = ask(model="m", token_count=1)
        request.sampling.temperature = 0
        request.backend_options["openai"].update({"xtc_probability": 0, "num_draft_tokens": 2})
        await generate(engine, request)
    (body,) = server.bodies()
    assert body["stream_options"] == {"include_usage": True}
    assert None not in body.values()
    assert isinstance(body["temperature"], float)
    assert isinstance(body["xtc_probability"], float)
    assert isinstance(body["num_draft_tokens"], int)
    assert body["max_tokens"] == 1


async def test_edge_76_every_body_has_its_length(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    await generate(engine, ask("river " * 300_000, model="m"))
    headers = next(headers for path, headers, _ in server.asked if path == CHAT)
    assert int(headers["content-length"]) > 1_800_000
    assert "transfer-encoding" not in headers


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        ({"error": {"code": 400, "message": "x"}}, "400 Bad Request", InvalidRequest),
        ({"error": {"code": "400", "message": "x", "type": "never_heard_of"}}, "400 Bad Request", InvalidRequest),
        ({"error": ["a", {"message": "b"}]}, "422 Unprocessable", InvalidRequest),
        ([{"msg": "x"}], "422 Unprocessable", InvalidRequest),
        ({"detail": [{"loc": ["body"], "msg": "x"}]}, "422 Unprocessable", InvalidRequest),
        ({"error": "token sk-secret refused"}, "401 Unauthorized", UpstreamUnauthenticated),
        ({}, "403 Forbidden", UpstreamUnauthenticated),
        ({"error": "slow down"}, "429 Too Many Requests", BackendBusy),
        ({"error": "server busy, please try again"}, "503 Service Unavailable", BackendBusy),
        ({"error": "CUDA out of memory"}, "500 Internal Server Error", MemoryExhausted),
        ({"error": {"code": 501, "type": "not_supported_error"}}, "501 Not Implemented", CapabilityUnsupported),
        ({"error": "boom"}, "500 Internal Server Error", BackendError),
        ({"error": "bad gateway"}, "502 Bad Gateway", BackendUnavailable),
        ({"error": {"message": "The model `m` does not exist", "code": "model_not_found"}}, "404 Not Found", ModelNotFound),
        ({"error": "gone"}, "302 Found", BackendError),
    ],
)  # fmt: skip
async def test_edge_77_errors_of_every_shape_have_their_name(
    server: Server, engine: OpenAiEngine, error: object, status: str, kind: type[Failure]
) -> None:
    server.play(CHAT, reply(error, status, "Location: http://127.0.0.1:1/\r\n"))
    failure, sink = await failing(engine, kind)
    assert not sink.events
    assert "sk-secret" not in failure.message


async def test_edge_78_vectors_come_nested_out_of_order_and_as_base64(
    server: Server, engine: OpenAiEngine
) -> None:
    request = pb.EmbedRequest(model="m", texts=["a", "b"])

    async def embed() -> pb.EmbedResponse:
        return await engine.embed(Call(request=request))

    server.play(
        EMBED, reply({"data": [{"index": 1, "embedding": [0.0, 1.0]}, {"index": 0, "embedding": [1.0, 0.0]}]})
    )
    assert [list(e.values) for e in (await embed()).embeddings] == [[1.0, 0.0], [0.0, 1.0]]
    assert server.bodies(EMBED)[0]["encoding_format"] == "float"
    request.texts[:] = ["c", "d"]
    server.play(
        EMBED, reply([{"index": 0, "embedding": [[3.0, 4.0]]}, {"index": 1, "embedding": [[0.0, 2.0]]}])
    )
    nested = await embed()
    assert [list(e.values) for e in nested.embeddings] == [[3.0, 4.0], [0.0, 2.0]]
    assert not nested.normalized
    request.texts[:] = ["e"]
    packed = base64.b64encode(b"\0\0\0\0").decode()
    one = {"index": 0, "embedding": [1.0]}
    for odd in (
        {"data": [{"index": 0, "embedding": packed}]},
        {"data": []},
        {"data": [one, one]},
        {"data": [{"index": 7, "embedding": [1.0]}]},
        {"data": [{"index": 0, "embedding": ["x"]}]},
        {"data": [{"index": 0, "embedding": []}]},
    ):
        server.play(EMBED, reply(odd))
        with pytest.raises(BackendError):
            await embed()


async def test_edge_79_other_choices_than_the_first_are_not_ours(
    server: Server, engine: OpenAiEngine
) -> None:
    other = json.dumps(
        {"model": "m", "choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": "length"}]}
    )
    server.play(CHAT, Script([text("yes"), b"data: " + other.encode() + b"\n\n", STOP, DONE]))
    sink = await generate(engine)
    assert sink.text == "yes"
    assert finished(sink).reason == pb.FINISH_REASON_STOP


async def test_edge_80_timings_stand_in_for_usage(server: Server, engine: OpenAiEngine) -> None:
    timings = {"cache_n": 10, "prompt_n": 5, "prompt_ms": 12.5, "predicted_n": 3, "predicted_ms": 7}
    server.play(CHAT, Script([text("a"), chunk({}, "stop", timings=timings), DONE]))
    end = finished(await generate(engine))
    assert (end.usage.prompt_token_count, end.usage.cached_token_count, end.usage.output_token_count) == (
        15,
        10,
        3,
    )
    assert end.timings.prefill_duration.ToMicroseconds() == 12_500
    details = {
        **USAGE,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    server.play(CHAT, Script([text("a"), chunk({}, "stop", usage=details), DONE]))
    usage = finished(await generate(engine)).usage
    assert (usage.cached_token_count, usage.reasoning_token_count) == (4, 1)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (None, pb.FINISH_REASON_UNSPECIFIED),
        ("content_filter", pb.FINISH_REASON_CONTENT_FILTER),
        ("function_call", pb.FINISH_REASON_TOOL_CALLS),
        ("length", pb.FINISH_REASON_LENGTH),
        ("never_heard_of", pb.FINISH_REASON_UNSPECIFIED),
    ],
)
async def test_edge_81_every_reason_has_its_name(
    server: Server, engine: OpenAiEngine, word: str | None, reason: int
) -> None:
    server.play(CHAT, Script([text("a"), chunk({}, word), DONE]))
    assert finished(await generate(engine)).reason == reason


async def test_edge_81_a_reply_that_was_aborted_is_not_whole(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("a"), chunk({}, "abort"), DONE]))
    await failing(engine, BrokenStream)


async def test_edge_83_a_server_that_hides_its_properties_is_served(server: Server) -> None:
    server.play(MODELS, models("m", owned_by="llamacpp", meta={"n_ctx": 64, "n_params": 5}))
    server.play("GET /health", reply({"status": "ok"}))
    server.play(
        "GET /props", reply({"error": {"code": 501, "type": "not_supported_error"}}, "501 Not Implemented")
    )
    server.play(EMBED, reply({"error": {"code": 501}}, "501 Not Implemented"))
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    async with OpenAiEngine(OpenAiSettings(base_url=server.url)) as engine:
        assert (await generate(engine)).text == "a"
        (model,) = (await engine.list_models(pb.ListModelsRequest())).models
    assert (model.loaded_context_token_count, model.weights.parameter_count, model.slot_count) == (64, 5, 0)
    assert not [path for path, _, _ in server.asked if "slots" in path or "metrics" in path]


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\ud83d", "\N{REPLACEMENT CHARACTER}"),
        ("\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"),
        (r"a\u0000b", "a\0b"),
        ("e\u0301\u0e01\U0001f468\u200d\U0001f469", "e\u0301\u0e01\U0001f468\u200d\U0001f469"),
    ],
)
async def test_edge_84_odd_characters_arrive(
    server: Server, engine: OpenAiEngine, wire: str, said: str
) -> None:
    line = ('data: {"model":"m","choices":[{"index":0,"delta":{"content":"' + wire + '"}}]}\n\n').encode()
    server.play(CHAT, Script([*(line[i : i + 1] for i in range(len(line))), STOP, DONE]))
    assert (await generate(engine)).text == said


@pytest.mark.parametrize(
    "said",
    [
        {"error": {"code": 400, "message": "request (1204 tokens) exceeds the available context size (256 tokens), try increasing it", "type": "exceed_context_size_error", "n_prompt_tokens": 1204, "n_ctx": 256}},
        {"error": "the input length exceeds the context length"},
        {"error": "Trying to keep the first 9000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens, which is not enough."},
        {"error": {"message": "This model's maximum context length is 4096 tokens.", "code": "context_length_exceeded"}},
        {"error": "{\"error\":{\"code\":400,\"message\":\"tokens to keep from the initial prompt is greater than the context length\"}}"},
        {"error": {"code": 500, "message": "Context size has been exceeded."}},
        {"error": {"code": 500, "message": "input (1802 tokens) is too large to process. increase the physical batch size"}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error", "200 OK"])
async def test_edge_85_a_full_context_has_one_name_in_every_wording(
    server: Server, engine: OpenAiEngine, said: object, status: str
) -> None:
    server.play(CHAT, reply(said, status))
    await failing(engine, ContextExceeded)


async def test_edge_86_cancelling_closes_the_socket_within_200_ms_in_every_phase(
    server: Server, engine: OpenAiEngine
) -> None:
    phases = (
        Script(raw=True, hold=True),  # before the headers
        Script(hold=True),  # before the first byte
        Script([text("a")], hold=True),  # in the middle
    )
    loop = asyncio.get_running_loop()

    async def left(script: Script) -> float:
        server.play(CHAT, script)
        server.left.clear()
        before = len(server.bodies())
        call = asyncio.create_task(serve(engine.generate, ask(model="m")))
        async with asyncio.timeout(10):
            while len(server.bodies()) == before:
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        begin = loop.time()
        call.cancel()
        async with asyncio.timeout(10):
            await server.left.wait()
        took = loop.time() - begin
        with pytest.raises(asyncio.CancelledError):
            await call
        return took

    for script in phases:
        await promptly(0.2, partial(left, script))


async def test_edge_89_a_deadline_and_a_client_that_vanishes_reach_the_server(server: Server) -> None:
    server.play(CHAT, Script([text("a")], hold=True))
    settings = OpenAiSettings(address="127.0.0.1:0", base_url=server.url, flavor="generic")
    async with OpenAiEngine(settings) as engine, serving(settings, inference=engine) as up:
        async with client(up.address) as peer:
            with pytest.raises(CallError) as raised:
                await peer.generate(ask(model="m"), timeout=0.3)
            assert raised.value.code.name == "DEADLINE_EXCEEDED"
            async with asyncio.timeout(5):
                await server.left.wait()
            server.left.clear()
            call = peer.inference.Generate(ask(model="m"))
            async for event in call:
                if event.WhichOneof("event") == "delta":
                    break
        async with asyncio.timeout(5):  # the channel was closed and nobody said cancel
            await server.left.wait()


async def test_edge_90_secrets_and_prompts_are_in_no_log_and_no_error(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = {
        "error": {
            "message": "bad key sk-TOPSECRET for PROMPTWORD",
            "type": "sk-TOPSECRET leaked",
            "code": "PROMPTWORD said",
        }
    }
    server.play(CHAT, *(reply(echo, s) for s in ("401 X", "400 X", "404 X", "500 X", "503 X", "200 OK")))
    settings = OpenAiSettings.model_validate(
        {"base_url": server.url, "token": "sk-TOPSECRET", "flavor": "generic"}
    )
    async with OpenAiEngine(settings, token=settings.read_token()) as engine:
        for _ in range(6):
            with pytest.raises(Failure) as raised:
                await serve(engine.generate, ask("PROMPTWORD", model="m"))
            said = f"{raised.value!r} {raised.value} {raised.value.metadata} {raised.value.to_status()}"
            assert "TOPSECRET" not in said
            assert "PROMPTWORD" not in said
        assert "TOPSECRET" not in f"{engine!r} {settings!r}"
    assert {h["authorization"] for _, h, _ in server.asked} == {"Bearer sk-TOPSECRET"}
    assert "TOPSECRET" not in caplog.text
    assert "PROMPTWORD" not in caplog.text


async def test_edge_91_proxies_of_the_environment_are_not_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    async with OpenAiEngine(OpenAiSettings(base_url=server.url, flavor="generic")) as engine:
        assert (await generate(engine)).text == "a"


@pytest.mark.parametrize("created", [-1, 0, 1e99, "yesterday", None, {"a": 1}])
async def test_edge_92_a_strange_clock_changes_nothing(
    server: Server, engine: OpenAiEngine, created: object
) -> None:
    server.play(CHAT, Script([chunk({"content": "a"}, created=created), STOP, DONE]))
    end = finished(await generate(engine))
    assert 0 <= end.timings.first_delta_duration.ToTimedelta().total_seconds() < 5
    assert 0 <= end.timings.generation_duration.ToTimedelta().total_seconds() < 5


# What a reply holds.


@pytest.mark.parametrize(
    "parts",
    [
        [chunk({"reasoning_content": "I th"}), chunk({"reasoning_content": "ink"}), text("so")],
        [chunk({"reasoning": "I think"}), text("so")],
        [text("<thi"), text("nk>I th"), text("ink</th"), text("ink>\n\nso")],
        [text("\n<think>\nI think</think>so")],
    ],
)
async def test_reasoning_comes_in_three_styles(
    server: Server, engine: OpenAiEngine, parts: list[bytes]
) -> None:
    server.play(CHAT, Script([*parts, STOP, DONE]))
    sink = await generate(engine)
    assert (grammar.reasoning(sink.events), sink.text) == ("I think", "so")


async def test_tool_calls_are_put_together(server: Server, engine: OpenAiEngine) -> None:
    def call(index: int, arguments: str, name: str = "", identifier: str = "") -> bytes:
        function = {"name": name, "arguments": arguments}
        return chunk({"tool_calls": [{"index": index, "id": identifier, "function": function}]})

    parts = [
        call(0, "", "f", "one"),
        call(1, '{"b"', "g"),
        call(0, '{"a":', "f"),
        call(1, ":2}", "g"),
        call(0, "1}"),
    ]
    server.play(CHAT, Script([*parts, STOP, DONE]))
    sink = await generate(engine)
    first, second = grammar.tool_calls(sink.events)
    assert (first.id, first.name, first.arguments_json) == ("one", "f", '{"a":1}')
    assert second.id.startswith("call_")
    assert (second.name, second.arguments_json) == ("g", '{"b":2}')
    assert finished(sink).reason == pb.FINISH_REASON_TOOL_CALLS
    server.play(CHAT, Script([call(0, '{"a":', "f", "one"), STOP, DONE]))
    await failing(engine, BrokenStream)
    server.play(CHAT, Script([call(0, '{"a":', "f", "one"), chunk({}, "length"), DONE]))
    assert finished(await generate(engine)).reason == pb.FINISH_REASON_LENGTH


async def test_an_old_function_call_is_a_tool_call(server: Server, engine: OpenAiEngine) -> None:
    old = [
        chunk({"function_call": {"name": "f", "arguments": ""}}),
        chunk({"function_call": {"arguments": {"a": 1}}}),
    ]
    server.play(CHAT, Script([*old, chunk({}, "function_call"), DONE]))
    (call,) = grammar.tool_calls((await generate(engine)).events)
    assert (call.name, json.loads(call.arguments_json)) == ("f", {"a": 1})


async def test_a_server_that_does_not_stream_is_read_all_the_same(
    server: Server, engine: OpenAiEngine
) -> None:
    whole = {
        "model": "m",
        "choices": [
            {"index": 0, "message": {"content": [{"type": "text", "text": "a"}]}, "finish_reason": "stop"}
        ],
        "usage": USAGE,
    }
    server.play(CHAT, reply(whole))
    sink = await generate(engine)
    assert (sink.text, finished(sink).usage.output_token_count) == ("a", 2)


async def test_html_and_other_replies_are_no_success(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([b"<html>hello</html>"], type="text/html"))
    await failing(engine, BrokenStream)
    server.play(CHAT, Script([b"data: <html>\n\n"]))
    await failing(engine, BrokenStream)
    server.play(CHAT, Script([b"not json"], type="application/json"))
    await failing(engine, BackendError)
    server.play(CHAT, reply({"error": "Unexpected endpoint or method. (POST /v1/chat/completions)"}))
    await failing(engine, CapabilityUnsupported)


async def test_log_probabilities_are_read_whatever_they_are(server: Server, engine: OpenAiEngine) -> None:
    line = (
        b'data: {"model":"m","choices":[{"index":0,"delta":{"content":"%s"},"logprobs":{"content":'
        b'[{"token":"a","id":7,"logprob":%s,"bytes":[97,300,"x"],"top_logprobs":[{"token":"a","id":7,"logprob":-0.5},{"token":"b","logprob":-1}]}]}}]}\n\n'
    )
    server.play(
        CHAT, Script([line % (b"", b"-Infinity"), line % (b"aa", b"NaN"), line % (b"", b"0.001"), STOP, DONE])
    )
    request = ask(model="m")
    request.logprobs.top_logprob_count = 1
    sink = await generate(engine, request)
    first, last = grammar.deltas(sink.events)
    assert first.text == "aa"
    assert [entry.raw_bytes for entry in first.logprobs] == [b"a", b"a"]
    assert all(math.isfinite(e.logprob) and e.logprob <= 0 for d in (first, last) for e in d.logprobs)
    assert (first.token_count, last.token_count, last.text) == (2, 1, "")
    assert [top.token_id for top in first.logprobs[0].top_logprobs] == [7]


async def test_another_model_that_answers_is_refused_or_told(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("a").replace(b'"m"', b'"other"'), STOP, DONE]))
    failure, sink = await failing(engine, WrongModel)
    assert not sink.events
    assert failure.metadata["answered_by"] == "other"
    request = ask(model="m")
    request.accepted_degradations.append(pb.DEGRADATION_KIND_MODEL_SUBSTITUTED)
    begun = started(await generate(engine, request))
    assert begun.model == "other"
    assert [d.kind for d in begun.degradations] == [pb.DEGRADATION_KIND_MODEL_SUBSTITUTED]


async def test_an_unknown_model_is_never_asked_for(server: Server, engine: OpenAiEngine) -> None:
    failure, _ = await failing(engine, ModelNotFound, ask(model="nowhere"))
    assert "it has m" in failure.message
    assert not server.bodies()


async def test_a_model_that_appears_is_found_at_once(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    await generate(engine)
    server.play(MODELS, models("m", "new"))
    server.play(CHAT, Script([text("a").replace(b'"m"', b'"new"'), STOP, DONE]))
    assert (await generate(engine, ask(model="new"))).text == "a"


async def test_only_the_models_of_the_settings_are_offered(server: Server) -> None:
    server.play(MODELS, models("m", "hidden"))
    async with OpenAiEngine(OpenAiSettings(base_url=server.url, flavor="generic", models=("m",))) as engine:
        assert [m.id for m in (await engine.list_models(pb.ListModelsRequest())).models] == ["m"]
        assert not (await engine.list_models(pb.ListModelsRequest(backends=["elsewhere"]))).models
        await failing(engine, ModelNotFound, ask(model="hidden"))


async def test_a_list_that_is_none_is_an_error_and_odd_entries_are_skipped(
    server: Server, engine: OpenAiEngine
) -> None:
    for odd in ({"models": []}, []):
        server.play(MODELS, reply(odd))
        with pytest.raises(BackendError):
            await engine.list_models(pb.ListModelsRequest())
    server.play(MODELS, reply({"data": None}))
    assert not (await engine.list_models(pb.ListModelsRequest())).models
    server.play(MODELS, reply({"data": [{"id": 5}, None, {"id": "m", "aliases": ["n", 5]}]}))
    (model,) = (await engine.list_models(pb.ListModelsRequest())).models
    assert list(model.aliases) == ["n"]


async def test_calls_beyond_slots_and_queue_are_refused_with_a_time(server: Server) -> None:
    server.play(CHAT, Script([text("a")], hold=True))
    settings = OpenAiSettings(base_url=server.url, flavor="generic", slots=1, queue=1)
    async with OpenAiEngine(settings) as engine, asyncio.timeout(10):
        sinks = [Sink(), Sink()]
        calls = [asyncio.create_task(serve(engine.generate, ask(model="m"), sink=sink)) for sink in sinks]
        while "delta" not in sinks[0].kinds or not sinks[1].kinds:
            await asyncio.sleep(0.005)
        queued = sinks[1].events[0]
        assert isinstance(queued, pb.GenerateResponse)
        assert (queued.progress.stage, queued.progress.queue_position) == (pb.Progress.STAGE_QUEUED, 0)
        failure, _ = await failing(engine, QueueFull)
        assert failure.retry_after is not None
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert engine.stats.snapshot().outcomes == {"QUEUE_FULL": 1, "cancelled": 2}


# What a request becomes.


async def test_every_field_of_a_request_has_its_place(server: Server) -> None:
    server.play(MODELS, models("m", owned_by="llamacpp"))
    server.play("GET /health", reply({"status": "ok"}))
    server.play("GET /props", reply({"total_slots": 3, "modalities": {"vision": True}}))
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    request = pb.GenerateRequest(
        model="m",
        messages=[
            message("be brief", pb.ROLE_SYSTEM),
            pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="see"), pb.Part(image=pb.Blob(media_type="image/png", data=b"\x89P"))]),
            pb.Message(
                role=pb.ROLE_ASSISTANT,
                parts=[
                    pb.Part(reasoning="hm"),
                    pb.Part(tool_call=pb.ToolCall(id="c1", name="f", arguments_json='{"b":1,"a":2}')),
                    pb.Part(tool_call=pb.ToolCall(id="c2", name="f")),
                ],
            ),
            pb.Message(
                role=pb.ROLE_TOOL,
                parts=[
                    pb.Part(tool_result=pb.ToolResult(id="c1", text="one", name="f")),
                    pb.Part(tool_result=pb.ToolResult(id="c2", text="two")),
                ],
            ),
        ],
        tools=[TOOL, pb.Tool(name="bare")],
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, tool_name="bare"),
        output_format=pb.OutputFormat(json_schema='{"type":"object","properties":{"z":{},"a":{}}}'),
        reasoning_effort=pb.REASONING_EFFORT_LOW,
        continue_from=pb.ReplyPrefix(text="so far", reasoning="thought"),
        include_token_ids=True,
    )  # fmt: skip
    sampling = request.sampling
    sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, sampling.min_p = (
        0.7,
        0.9,
        5,
        2**40,
        0.1,
    )
    sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty = 1.1, 0.5, -0.5
    sampling.typical_p = 0.8
    sampling.logit_bias[3] = -1.5
    request.limits.max_output_token_count = 9
    request.limits.stop_sequences.extend(["x", "y"])
    request.backend_options["openai"].update(
        {"mirostat": 2, "dry_multiplier": 0.5, "lora": [{"id": 0, "scale": 0.5}]}
    )
    request.backend_options["ollama"].update({"num_ctx": 5})
    async with OpenAiEngine(OpenAiSettings(base_url=server.url)) as engine:
        await generate(engine, request)
    (body,) = server.bodies()
    tool = body.pop("tools")
    assert [t["function"]["name"] for t in tool] == [TOOL.name, "bare"]
    assert tool[1]["function"]["parameters"] == {"type": "object", "properties": {}}
    schema = body.pop("response_format")
    assert schema["type"] == "json_schema"
    assert list(schema["json_schema"]["schema"]["properties"]) == ["z", "a"]
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVA="}}]},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b":1,"a":2}'}},
                {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "one", "name": "f"},
            {"role": "tool", "tool_call_id": "c2", "content": "two"},
            {"role": "assistant", "content": "so far", "reasoning_content": "thought"},
        ],
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 2**40, "min_p": 0.1, "typical_p": 0.8,
        "repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"3": -1.5},
        "max_tokens": 9, "stop": ["x", "y"],
        "tool_choice": {"type": "function", "function": {"name": "bare"}},
        "logprobs": True, "top_logprobs": 1,
        "reasoning_effort": "low",
        "continue_final_message": True, "add_generation_prompt": False,
        "mirostat": 2, "dry_multiplier": 0.5, "lora": [{"id": 0, "scale": 0.5}],
    }  # fmt: skip


@pytest.mark.parametrize("key", ["model", "messages", "stream", "stream_options", "n", "max_tokens", "tools"])
async def test_an_option_that_would_replace_a_field_is_refused(
    server: Server, engine: OpenAiEngine, key: str
) -> None:
    request = ask(model="m")
    request.backend_options["openai"].update({key: 1})
    failure, _ = await failing(engine, InvalidRequest, request)
    assert [path for path, _ in failure.violations] == [f"backend_options.openai.{key}"]
    assert not server.bodies()
    embed = pb.EmbedRequest(model="m", texts=["a"])
    embed.backend_options["openai"].update({"input": "b"})
    with pytest.raises(InvalidRequest):
        await engine.embed(Call(request=embed))


async def test_what_a_generic_server_may_ignore_is_refused_or_told(
    server: Server, engine: OpenAiEngine
) -> None:
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    request = ask(model="m")
    request.sampling.top_k = 5
    request.include_token_ids = True
    request.limits.stop_token_ids.append(2)
    request.output_format.regex = "a+"
    kinds = (pb.DEGRADATION_KIND_OPTION_IGNORED, pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED)
    for kind in kinds:
        await failing(engine, CapabilityUnsupported, request)
        request.accepted_degradations.append(kind)
    told = started(await generate(engine, request)).degradations
    assert [d.field for d in told] == [
        *("sampling.top_k", "limits.stop_token_ids", "output_format.regex", "include_token_ids"),
    ]
    assert "top_k" not in server.bodies()[0]
    request.continue_from.text = "so far"
    await failing(engine, CapabilityUnsupported, request)


async def test_nothing_is_asked_for_where_nothing_is_set(server: Server, engine: OpenAiEngine) -> None:
    server.play(CHAT, Script([text("a"), STOP, DONE]))
    request = ask(model="m")
    request.continue_from.text = ""
    request.output_format.any_json = False
    request.tool_choice.mode = pb.ToolChoice.MODE_NONE
    await generate(engine, request)
    assert set(server.bodies()[0]) == {"model", "messages", "stream", "stream_options"}
    request.output_format.any_json = True
    request.tools.append(TOOL)
    await generate(engine, request)
    body = server.bodies()[1]
    assert (body["response_format"], body["tool_choice"]) == ({"type": "json_object"}, "none")


async def test_the_template_of_mlx_is_told_how_much_to_reason(server: Server) -> None:
    server.play(
        CHAT, Script([b": keepalive 3/6\n\n: keepalive 6/6\n\n", text("a b"), text(" stop"), text("ped")])
    )
    server.play("GET /health", reply({"status": "ok"}))
    async with OpenAiEngine(OpenAiSettings(base_url=server.url, flavor="mlx-lm")) as engine:
        request = ask(model="m")
        request.tools.append(TOOL)
        request.tool_choice.mode = pb.ToolChoice.MODE_NONE
        request.limits.stop_sequences.append("b stop")
        for effort in (pb.REASONING_EFFORT_NONE, pb.REASONING_EFFORT_HIGH):
            request.reasoning_effort = effort
            request.backend_options["openai"].update({"chat_template_kwargs": {"own": 1}})
            sink = await generate(engine, request)
            assert sink.text == "a "
            end = finished(sink)
            assert (end.reason, end.stop_sequence) == (pb.FINISH_REASON_STOP, "b stop")
            assert (end.usage.prompt_token_count, end.usage.output_token_count) == (6, 2)
        with pytest.raises(CapabilityUnsupported):
            await engine.embed(Call(request=pb.EmbedRequest(model="m", texts=["a"])))
        with pytest.raises(CapabilityUnsupported):
            await engine.count_tokens(Call(request=pb.CountTokensRequest(model="m", messages=[message("a")])))
    none, high = server.bodies()
    assert none["chat_template_kwargs"] == {"enable_thinking": False, "own": 1}
    assert high["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "high", "own": 1}
    assert "tools" not in none
    assert "stop" not in none


async def test_the_text_held_back_for_a_stop_sequence_comes_at_the_end(server: Server) -> None:
    server.play(CHAT, Script([text("a b"), STOP, DONE]))
    server.play("GET /health", reply({"status": "ok"}))
    async with OpenAiEngine(OpenAiSettings(base_url=server.url, flavor="mlx-lm")) as engine:
        request = ask(model="m")
        request.limits.stop_sequences.append("b stop")
        assert (await generate(engine, request)).text == "a b"


async def test_vllm_is_recognised_and_counts(server: Server) -> None:
    server.play(MODELS, models("m", owned_by="vllm", max_model_len=77))
    server.play("GET /health", Script([]))
    server.play("POST /tokenize", reply({"count": 12}))
    server.play(EMBED, reply({"data": [{"index": 0, "embedding": [1.0]}], "usage": {"prompt_tokens": 3}}))
    async with OpenAiEngine(OpenAiSettings(base_url=server.url)) as engine:
        request = pb.CountTokensRequest(model="m", messages=[message("a")], tools=[TOOL])
        assert (await engine.count_tokens(Call(request=request))).token_count == 12
        assert server.bodies("POST /tokenize")[0]["tools"]
        embed = pb.EmbedRequest(model="m", texts=["a"], dimension_count=1)
        embed.backend_options["openai"].update({"truncate_prompt_tokens": 5})
        for _ in range(2):  # with options of its own, nothing is kept
            response = await engine.embed(Call(request=embed))
            assert (response.usage.prompt_token_count, response.cached_embedding_count) == (3, 0)
        (model,) = (await engine.list_models(pb.ListModelsRequest())).models
        assert model.loaded_context_token_count == 77
    assert server.bodies(EMBED)[0]["dimensions"] == 1


async def test_an_old_llama_server_counts_in_two_steps(server: Server) -> None:
    server.play(MODELS, models("m", owned_by="llamacpp"))
    server.play("GET /health", reply({"status": "ok"}))
    missing = {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}
    server.play("POST /v1/chat/completions/input_tokens", reply(missing, "404 Not Found"))
    server.play("POST /apply-template", reply({"prompt": "<a>"}))
    server.play("POST /tokenize", reply({"tokens": [1, 2, 3]}))
    request = pb.CountTokensRequest(model="m", messages=[message("a")])
    async with OpenAiEngine(OpenAiSettings(base_url=server.url)) as engine:
        assert (await engine.count_tokens(Call(request=request))).token_count == 3
        refused = reply({"error": {"code": 500, "message": "template"}}, "500 Internal Server Error")
        server.play("POST /v1/chat/completions/input_tokens", refused)
        with pytest.raises(BackendError):
            await engine.count_tokens(Call(request=request))


# Routers.


def router_models(value: str, **status: object) -> Script:
    return models("m", status={"value": value, **status}, owned_by="llamacpp")


@pytest.fixture
async def router(server: Server) -> AsyncIterator[OpenAiEngine]:
    server.play("GET /health", reply({"status": "ok"}))
    server.play("GET /props", reply({"role": "router"}))
    server.play(MODELS, router_models("unloaded"))
    server.play("POST /models/load", reply({"success": True}))
    server.play("POST /models/unload", reply({"success": True}))
    settings = OpenAiSettings(base_url=server.url, load_timeout="1s")
    async with OpenAiEngine(settings) as engine:
        await engine.list_models(pb.ListModelsRequest())
        yield engine


async def load(
    engine: OpenAiEngine, request: models_pb.LoadModelRequest | None = None
) -> list[models_pb.LoadModelResponse]:
    events: list[models_pb.LoadModelResponse] = []

    async def send(event: models_pb.LoadModelResponse) -> None:
        events.append(event)

    await engine.load_model(request or models_pb.LoadModelRequest(model="m"), send)
    return events


async def test_edge_82_a_load_is_followed_to_its_end(server: Server, router: OpenAiEngine) -> None:
    server.play(MODELS, router_models("unloaded"), router_models("loading"), router_models("loaded"))
    events = await load(router)
    assert [e.WhichOneof("event") for e in events] == ["progress", "progress", "loaded"]
    assert events[-1].loaded.model.state == pb.Model.STATE_ACTIVE
    assert not events[-1].loaded.model.HasField("expire_time")


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (
            [("unloaded", {}), ("loading", {}), ("unloaded", {"failed": True, "exit_code": 137})],
            "exit code 137",
        ),
        ([("unloaded", {}), ("loading", {}), ("unloaded", {})], "could not load"),
        ([("unloaded", {}), ("loading", {})], "within 1 s"),
    ],
)
async def test_edge_82_a_load_that_fails_says_how(
    server: Server, router: OpenAiEngine, states: list[tuple[str, dict[str, object]]], words: str
) -> None:
    server.play(MODELS, *(router_models(value, **more) for value, more in states))
    with pytest.raises(Failure, match=words) as raised:
        await load(router)
    assert raised.value.reason == "MODEL_LOAD_FAILED"


async def test_edge_82_a_model_that_is_gone_while_it_loads_has_failed(
    server: Server, router: OpenAiEngine
) -> None:
    server.play(MODELS, router_models("unloaded"), models("other"))
    with pytest.raises(Failure, match="It is gone"):
        await load(router)


async def test_edge_82_already_running_and_not_running_are_no_errors(
    server: Server, router: OpenAiEngine
) -> None:
    def refusal(why: str) -> Script:
        return reply(
            {"error": {"code": 400, "message": why, "type": "invalid_request_error"}}, "400 Bad Request"
        )

    server.play("POST /models/load", refusal("model is already running"))
    server.play(MODELS, router_models("unloaded"), router_models("loaded"))
    await load(router)
    server.play("POST /models/unload", refusal("model is not running"))
    server.play(MODELS, router_models("loaded"), router_models("unloaded"))
    answer = await router.unload_model(models_pb.UnloadModelRequest(model="m"))
    assert answer.model.state == pb.Model.STATE_AVAILABLE
    for path, call in (
        ("POST /models/load", load(router)),
        ("POST /models/unload", router.unload_model(models_pb.UnloadModelRequest(model="m"))),
    ):
        server.play(path, refusal("no"))
        with pytest.raises(InvalidRequest):
            await call


async def test_unloading_waits_for_calls_unless_it_is_forced(server: Server, router: OpenAiEngine) -> None:
    server.play(MODELS, router_models("loaded"))
    server.play(CHAT, Script([text("a"), 0.3, STOP, DONE]))
    sink = Sink()
    async with asyncio.timeout(10):
        call = asyncio.create_task(serve(router.generate, ask(model="m"), sink=sink))
        while "delta" not in sink.kinds:
            await asyncio.sleep(0.005)
        unload = asyncio.create_task(router.unload_model(models_pb.UnloadModelRequest(model="m")))
        await asyncio.sleep(0.05)
        assert not server.bodies("POST /models/unload")
        await call
        server.play(MODELS, router_models("unloaded"))
        await unload
        assert len(server.bodies("POST /models/unload")) == 1
        server.play(MODELS, router_models("loaded"))
        sink = Sink()
        call = asyncio.create_task(serve(router.generate, ask(model="m"), sink=sink))
        while "delta" not in sink.kinds:
            await asyncio.sleep(0.005)
        force = asyncio.create_task(router.unload_model(models_pb.UnloadModelRequest(model="m", force=True)))
        while len(server.bodies("POST /models/unload")) < 2:
            await asyncio.sleep(0.005)
        assert not call.done()
        server.play(MODELS, router_models("unloaded"))
        await asyncio.gather(call, force)


async def test_what_a_load_cannot_honour_is_refused(router: OpenAiEngine) -> None:
    with pytest.raises(CapabilityUnsupported):
        await load(router, models_pb.LoadModelRequest(model="m", context_token_count=512))
    options = models_pb.LoadModelRequest(model="m")
    options.backend_options["openai"].update({"a": 1})
    with pytest.raises(InvalidRequest):
        await load(router, options)


async def test_a_lease_that_cannot_be_ended_is_tried_again(server: Server, router: OpenAiEngine) -> None:
    server.play(MODELS, router_models("unloaded"), router_models("loaded"))
    refused = reply({"error": "no"}, "500 Internal Server Error")
    server.play("POST /models/unload", refused)
    request = models_pb.LoadModelRequest(model="m")
    request.keep_alive_duration.FromMilliseconds(10)
    await load(router, request)
    async with asyncio.timeout(10):
        while not server.bodies("POST /models/unload"):
            await asyncio.sleep(0.01)


# Presence.


async def test_the_server_s_coming_and_going_is_told(server: Server) -> None:
    states: list[tuple[bool, str]] = []

    async def tell(ready: bool, detail: str) -> None:
        states.append((ready, detail))

    async def reaches(count: int) -> None:
        async with asyncio.timeout(10):
            while len(states) < count:
                await asyncio.sleep(0.01)

    settings = OpenAiSettings(base_url=server.url, flavor="generic", probe_interval=0.02)
    server.play(MODELS, reply({"error": "no"}, "500 Internal Server Error"))
    async with OpenAiEngine(settings) as engine:
        engine.watch(tell)
        await reaches(1)
        server.play(MODELS, models("m"))
        await reaches(2)
        server.play(MODELS, reply({"error": "no"}, "401 Unauthorized"))
        await reaches(3)
    assert [ready for ready, _ in states] == [False, True, False]
    assert "cannot serve" in states[0][1]
    assert "token" in states[2][1]
    assert not server.bodies()


async def test_the_bridge_runs_without_its_server_and_says_not_serving(
    tmp_path: Callable[..., object],
) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from forebay.testing.processes import ServiceProcess

    fake = Server()
    reserved = await asyncio.start_server(fake, "127.0.0.1", 0)
    port = reserved.sockets[0].getsockname()[1]
    reserved.close()
    await reserved.wait_closed()
    environment = {
        "FOREBAY_OPENAI__BASE_URL": f"http://127.0.0.1:{port}",
        "FOREBAY_OPENAI__PROBE_INTERVAL": "50ms",
        "FOREBAY_OPENAI__FLAVOR": "generic",
    }
    process = ServiceProcess(
        "forebay.openai_bridge", ["--address", "127.0.0.1:0"], environment=environment, folder=tmp_path
    )
    async with process as up, client(up.address) as peer, asyncio.timeout(30):
        health = health_pb2_grpc.HealthStub(peer.channel)
        request = health_pb2.HealthCheckRequest()
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(CallError) as raised:
            await peer.generate(ask(model="m"))
        assert raised.value.reason == "BACKEND_UNAVAILABLE"
        fake.play(MODELS, models("m"))
        fake.play(CHAT, Script([text("a"), STOP, DONE]))
        async with await asyncio.start_server(fake, "127.0.0.1", port):
            while (await health.Check(request)).status != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.05)
            assert await peer.text(ask(model="m")) == "a"


async def test_a_token_file_that_is_missing_is_one_readable_line(
    tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from forebay.kit.server import StartError
    from forebay.kit.telemetry import off
    from forebay.openai_bridge.__main__ import serve as run

    with pytest.raises(StartError, match="token_file"):
        await run(OpenAiSettings(token_file=tmp_path / "none"), off())
