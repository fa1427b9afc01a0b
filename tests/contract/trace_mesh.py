"""Meshes of real processes that report one trace, and who collects it: a receiver here, or a real Jaeger."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import aiohttp
import grpc.aio

from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.client import Client, client
from forebay.testing.otlp import OtlpReceiver, Span, Value
from forebay.testing.processes import ServiceProcess

GENERATE = "forebay.inference.v1.InferenceService/Generate"
JAEGER = os.environ.get("FOREBAY_JAEGER_URL", "").rstrip("/")
CALLER = "00f067aa0ba902b7"
"""The caller's own span, which is not in the collector."""
TOLERANCE = 20_000_000
"""Nanoseconds by which the clocks of two processes of one machine may seem to differ."""
LATE = 5_000_000_000
"""Nanoseconds by which a span may outlast the one above it: who has sent the last word of a reply may be
kept from ending its span for as long as a busy machine likes, and the caller does not wait for that."""
WAIT_SECONDS = 60.0
"""Longest wait for processes, and for spans of a call that has ended."""


class Collector(Protocol):
    """Takes spans over OTLP and gives them back."""

    endpoint: str

    async def trace(self, trace_id: str, count: int) -> list[Span]:
        """Returns the spans of a trace in the order in which they began, once there are so many."""

    def others(self, trace_id: str) -> list[Span]:
        """Returns what it knows of other traces."""


class Receiver(OtlpReceiver):
    """A collector of the test's own, which sees the bytes that left."""

    async def trace(self, trace_id: str, count: int) -> list[Span]:
        return await self.wait_for(count, trace_id=trace_id, timeout=WAIT_SECONDS)

    def others(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans() if span.trace_id != trace_id]


class Jaeger:
    """A real Jaeger: asked at FOREBAY_JAEGER_URL, told at FOREBAY_OTLP_ENDPOINT or on port 4317."""

    def __init__(self) -> None:
        self.endpoint = os.environ.get("FOREBAY_OTLP_ENDPOINT", f"http://{urlsplit(JAEGER).hostname}:4317")
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def trace(self, trace_id: str, count: int) -> list[Span]:
        found: list[Span] = []
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while len(found) < count:
                    await asyncio.sleep(0.2)
                    async with self._session.get(f"{JAEGER}/api/traces/{trace_id}") as answer:
                        # It knows nothing of a trace until its first span has come.
                        body = await answer.json() if answer.status == 200 else {}
                    found = [span for trace in body.get("data") or () for span in _spans(trace)]
        except TimeoutError as error:
            raise AssertionError(f"{count} spans did not arrive; there are {found}") from error
        return sorted(found, key=lambda span: span.start)

    def others(self, trace_id: str) -> list[Span]:
        return []  # whoever else reports to it is not ours


def _spans(trace: Mapping[str, Any]) -> list[Span]:
    """Returns the spans of a trace as the API of Jaeger's web view gives it."""
    services = {key: process["serviceName"] for key, process in trace["processes"].items()}
    found = []
    for span in trace["spans"]:
        attributes = _attributes(span["tags"])
        kind = str(attributes.pop("span.kind", "internal")).upper()
        status = str(attributes.pop("otel.status_code", "UNSET"))
        assert attributes.pop("error", False) is (status == "ERROR")
        (parent,) = [each["spanID"] for each in span["references"]] or [""]
        events = [_attributes(log["fields"]) for log in span["logs"]]
        start = int(span["startTime"]) * 1000
        found.append(
            Span(
                name=span["operationName"],
                service=services[span["processID"]],
                trace_id=span["traceID"],
                span_id=span["spanID"],
                parent=parent,
                kind=kind,
                attributes=attributes,
                status=status,
                status_text=str(attributes.pop("otel.status_description", "")),
                events=tuple((str(fields.pop("event")), fields) for fields in events),
                start=start,
                end=start + int(span["duration"]) * 1000,
            )
        )
    return found


def _attributes(tags: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    return {tag["key"]: _value(tag["value"]) for tag in tags}


def _value(value: str | bool | float) -> Value:
    # It has no lists, and writes them as JSON.
    if isinstance(value, str) and value.startswith("["):
        return tuple(json.loads(value))
    return value


def reporting(collector: Collector) -> dict[str, str]:
    """Returns the variables of a process that reports to the collector, and soon."""
    return {"OTEL_BSP_SCHEDULE_DELAY": "100", "FOREBAY_TELEMETRY__OTLP_ENDPOINT": collector.endpoint}


@asynccontextmanager
async def processes(
    folder: Path, collector: Collector, *, cold: bool = False, **backends: ServiceProcess
) -> AsyncIterator[Client]:
    """Runs backends, named by their frameworks, and an orchestrator before them, once each can serve.

    Unless it is `cold`, that is once their models are in memory.
    """
    async with AsyncExitStack() as stack:
        lines = ['[orchestrator]\naddress = "127.0.0.1:0"\n']
        for name, process in backends.items():
            await stack.enter_async_context(process)
            framework = f'framework = "{name}"\n' if name in {"mlx", "openai"} else ""
            lines.append(
                f'[[orchestrator.backends]]\nname = "{name}"\n{framework}address = "{process.address}"\n'
            )
        (folder / "o.toml").write_text("".join(lines))
        orchestrator = await stack.enter_async_context(
            ServiceProcess(
                "forebay.orchestrator",
                ["--config", str(folder / "o.toml")],
                environment=reporting(collector),
            )
        )
        peer = await stack.enter_async_context(client(orchestrator.address, timeout=WAIT_SECONDS))
        fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                found = (await fleet.ListBackends(fleet_pb2.ListBackendsRequest())).backends
                models = [model for each in found for model in each.models]
                if all(each.state == fleet_pb2.Backend.STATE_ACTIVE and each.models for each in found) and (
                    cold or all(model.state == pb.Model.STATE_ACTIVE for model in models)
                ):
                    break
                await asyncio.sleep(0.05)
        yield peer


@dataclass(frozen=True)
class Reply:
    """What a caller got who has a trace of its own."""

    trace_id: str
    events: list[pb.GenerateResponse]
    error: grpc.aio.AioRpcError | None


async def traced(
    peer: Client, request: pb.GenerateRequest, *, on_delta: int = 0, kill: Callable[[], None] | None = None
) -> Reply:
    """Reads a reply to a caller that has a trace of its own.

    Args:
        peer: whom to ask.
        request: for what.
        on_delta: after how many deltas to `kill`.
        kill: ends something that the reply needs.
    """
    trace_id = secrets.token_hex(16)
    metadata = grpc.aio.Metadata(("traceparent", f"00-{trace_id}-{CALLER}-01"))
    events: list[pb.GenerateResponse] = []
    call = peer.inference.Generate(request, timeout=WAIT_SECONDS, metadata=metadata)
    count = 0
    try:
        async for event in call:
            events.append(event)
            if event.HasField("delta"):
                count += 1
                if kill is not None and count == on_delta:  # once: more may be on their way already
                    kill()
    except grpc.aio.AioRpcError as error:
        return Reply(trace_id, events, error)
    finally:
        call.cancel()
    return Reply(trace_id, events, None)


def chain(spans: Sequence[Span]) -> list[Span]:
    """Returns the spans from the root down, which must be a single line without a branch."""
    below = {span.parent: span for span in spans}
    assert len(below) == len(spans), [(span.service, span.name, span.parent) for span in spans]
    line = [below[CALLER]]
    while (found := below.get(line[-1].span_id)) is not None:
        line.append(found)
    assert len(line) == len(spans)
    for outer, inner in itertools.pairwise(line):
        assert outer.start - TOLERANCE <= inner.start <= outer.end + TOLERANCE
        assert inner.start <= inner.end <= outer.end + LATE
    return line


def shape(spans: Sequence[Span]) -> list[tuple[str, str, str]]:
    """Returns service, kind and `error.type` of each span; a span is an error where it says so itself."""
    for span in spans:
        assert (span.status == "ERROR") is (span.attributes.get("error.type", "") not in {"", "CANCELLED"})
    return [
        (span.service.removeprefix("forebay-"), span.kind, str(span.attributes.get("error.type", "")))
        for span in spans
    ]


def says_nothing_of(spans: Sequence[Span], *texts: str) -> None:
    """Checks that no text is anywhere in the spans."""
    shown = repr(spans)
    for text in texts:
        assert text
        assert text not in shown
