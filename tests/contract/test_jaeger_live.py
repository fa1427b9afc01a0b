"""A real Jaeger, at FOREBAY_JAEGER_URL, shows one request as one trace."""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import grpc.aio
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.calls import ask, with_options
from forebay.testing.client import client
from forebay.testing.processes import ServiceProcess

JAEGER = os.environ.get("FOREBAY_JAEGER_URL", "")
COLLECTOR = os.environ.get("FOREBAY_OTLP_ENDPOINT", f"http://{urlsplit(JAEGER).hostname}:4317")
SECRET = "nobody may read this"

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not JAEGER, reason="FOREBAY_JAEGER_URL names no Jaeger"),
]


def flat(trace: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns service, name and name of the parent of each span of a trace as Jaeger's own API gives it."""
    names = {span["spanID"]: span["operationName"] for span in trace["spans"]}
    services = {key: process["serviceName"] for key, process in trace["processes"].items()}
    found = []
    for span in sorted(trace["spans"], key=lambda span: int(span["startTime"])):
        parents = [names.get(each["spanID"], "the caller") for each in span.get("references", ())]
        found.append((services[span["processID"]], span["operationName"], *(parents or [""])))
    return found  # type: ignore[return-value]  # a span has one parent at most


async def fetched(session: aiohttp.ClientSession, trace_id: str, count: int) -> dict[str, Any]:
    """Returns a trace once it has so many spans."""
    async with asyncio.timeout(30):
        while True:
            async with session.get(f"{JAEGER.rstrip('/')}/api/traces/{trace_id}") as answer:
                body = await answer.json() if answer.status == 200 else {}
            for trace in body.get("data") or ():
                if len(trace["spans"]) >= count:
                    return dict(trace)
            await asyncio.sleep(0.2)


async def test_a_fallback_is_one_trace_in_jaeger_with_the_failed_attempt_and_the_good_one(
    tmp_path: Path,
) -> None:
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100", "FOREBAY_TELEMETRY__OTLP_ENDPOINT": COLLECTOR}
    trace_id = secrets.token_hex(16)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        backends = [
            await enter(
                ServiceProcess(
                    "forebay.testing.scripted",
                    ["--name", name, "--models", "m", *more],
                    environment=environment,
                )
            )
            for name, more in (("a", ["--fault", "UNAVAILABLE@before"]), ("b", []))
        ]
        (tmp_path / "o.toml").write_text(
            '[orchestrator]\naddress = "127.0.0.1:0"\n'
            + "".join(
                f'[[orchestrator.backends]]\nname = "{name}"\naddress = "{backend.address}"\n'
                for name, backend in zip("ab", backends, strict=True)
            )
        )
        orchestrator = await enter(
            ServiceProcess(
                "forebay.orchestrator", ["--config", str(tmp_path / "o.toml")], environment=environment
            )
        )
        peer = await enter(client(orchestrator.address, timeout=60))
        session = await enter(aiohttp.ClientSession())
        async with asyncio.timeout(30):
            while len((await peer.inference.ListModels(pb.ListModelsRequest())).models) < 2:
                await asyncio.sleep(0.05)
        request = with_options(ask(SECRET, model="m"))
        request.routing.backends.extend(["a", "b"])
        metadata = grpc.aio.Metadata(("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"))
        events = [event async for event in peer.inference.Generate(request, timeout=60, metadata=metadata)]
        assert events[-1].HasField("finished")
        trace = await fetched(session, trace_id, 4)
    generate = "forebay.inference.v1.InferenceService/Generate"
    ours = [span for span in flat(trace) if span[0] == "forebay-orchestrator"]
    assert ours == [
        ("forebay-orchestrator", generate, "the caller"),
        ("forebay-orchestrator", "chat m", generate),
        ("forebay-orchestrator", generate, "chat m"),
        ("forebay-orchestrator", generate, "chat m"),
    ]
    assert SECRET not in str(trace)
