"""However a call ends, each of its spans ends once, says how, and holds no text."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from contract.orchestrator_mesh import Mesh, until
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.telemetry import Telemetry
from forebay.testing.calls import ask, with_options
from forebay.testing.scripted import ScriptedEngine

GENERATE = "forebay.inference.v1.InferenceService/Generate"
SECRET = "swordfish-7391"
TRACE = "0af7651916cd43dd8448eb211c80319c"
TOLERANCE = 20_000_000
"""Nanoseconds by which the clocks of two processes of one machine may seem to differ."""


class Counted(SpanProcessor):
    """Counts beginnings and ends of each span."""

    def __init__(self) -> None:
        self.started: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.spans: list[ReadableSpan] = []

    def on_start(self, span: ReadableSpan, parent_context: object = None) -> None:
        assert span.context is not None
        self.started[span.context.span_id] += 1

    def on_end(self, span: ReadableSpan) -> None:
        assert span.context is not None
        self.ended[span.context.span_id] += 1
        self.spans.append(span)

    def one(self, name: str, kind: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name and span.kind.name == kind]
        return found


@dataclass(frozen=True)
class Expected:
    """What the three spans of a call say at its end: `error.type`, and whether it is an error."""

    chat: tuple[str, bool] = ("", False)
    attempt: tuple[str, bool] = ("", False)
    code: str = "OK"
    options: dict[str, str | float] = field(default_factory=dict)
    first_delta: bool = True


CANCELLED = ("CANCELLED", False)
SLOW = {"token_count": 5000, "token_delay": "5ms"}
ENDINGS = {
    "ok": Expected(),
    "error": Expected(
        ("BACKEND_UNAVAILABLE", True), ("BACKEND_UNAVAILABLE", True), "UNAVAILABLE",
        {"fault": "UNAVAILABLE@before"}, first_delta=False,
    ),
    "cancelled before the first token": Expected(
        CANCELLED, CANCELLED, "CANCELLED", {"first_delay": "1h"}, first_delta=False
    ),
    "cancelled after the first token": Expected(CANCELLED, CANCELLED, "CANCELLED", SLOW),
    "task cancelled": Expected(CANCELLED, CANCELLED, "CANCELLED", SLOW),
    "deadline": Expected(
        ("DEADLINE_EXCEEDED", False), CANCELLED, "DEADLINE_EXCEEDED", {"first_delay": "1h"}, first_delta=False
    ),
    "never read": Expected(("DEADLINE_EXCEEDED", False), CANCELLED, "DEADLINE_EXCEEDED", SLOW),
    "peer died": Expected(("STREAM_INTERRUPTED", True), ("STREAM_INTERRUPTED", True), "ABORTED", SLOW),
}  # fmt: skip


async def play(mesh: Mesh, ending: str, request: pb.GenerateRequest) -> None:
    """Makes a call end in a way."""
    # Long enough for a margin before it that is longer than a loaded machine may stall.
    timeout = 2.0 if ending in {"deadline", "never read"} else 20
    call = mesh.client.Generate(request, timeout=timeout)

    async def read() -> None:
        async for event in call:
            if not event.HasField("delta"):
                continue
            if ending == "cancelled after the first token":
                call.cancel()
            elif ending == "task cancelled":
                reading.set()
            elif ending == "peer died":
                dying.set()

    reading, dying = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        if ending == "task cancelled":
            task = tasks.create_task(read())
            await reading.wait()
            task.cancel()
            return
        if ending == "cancelled before the first token":
            tasks.create_task(_later(call, mesh))
        if ending == "peer died":
            tasks.create_task(_die(dying, mesh))
        try:
            if ending == "never read":
                await call.code()
            else:
                await read()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            assert ending != "ok"


async def _later(call: grpc.aio.UnaryStreamCall[object, object], mesh: Mesh) -> None:
    await until(lambda: mesh.fleet["a"].active > 0)
    call.cancel()


async def _die(dying: asyncio.Event, mesh: Mesh) -> None:
    await dying.wait()
    up = mesh["a"].up
    assert up is not None
    await up._server.stop(0)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_however_a_call_ends_each_span_ends_once_and_says_how(tmp_path: Path, ending: str) -> None:
    expected = ENDINGS[ending]
    counted = Counted()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(counted)
    telemetry = Telemetry(provider.get_tracer("test"), provider)
    engine = ScriptedEngine(name="a", models=["m"])
    async with Mesh(
        tmp_path, engine, telemetry=telemetry, retry={"max_attempts": 1}, deadline_margin="1s"
    ) as mesh:
        await play(mesh, ending, with_options(ask(SECRET, model="m"), **expected.options))
        await until(
            lambda: any(span.name == GENERATE and span.kind.name == "SERVER" for span in counted.spans)
        )
        server, chat = counted.one(GENERATE, "SERVER"), counted.one("chat m", "CLIENT")
        attempt = counted.one(GENERATE, "CLIENT")
    assert set(counted.started) == set(counted.ended)
    assert {*counted.started.values(), *counted.ended.values()} == {1}
    for span, (error, is_error) in ((chat, expected.chat), (attempt, expected.attempt)):
        assert span.attributes is not None
        assert span.attributes.get("error.type", "") == error, span.name
        assert (span.status.status_code.name == "ERROR") is is_error
    assert server.attributes is not None
    assert server.attributes["rpc.response.status_code"] == expected.code
    assert ("forebay.first_delta" in [event.name for event in chat.events]) is expected.first_delta
    assert SECRET not in "".join(span.to_json() for span in counted.spans)
