"""A real Jaeger, at FOREBAY_JAEGER_URL, shows one request as one trace."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import grpc.aio
import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.calls import ask
from forebay.testing.client import Client, client
from forebay.testing.processes import ServiceProcess

JAEGER = os.environ.get("FOREBAY_JAEGER_URL", "")
COLLECTOR = os.environ.get("FOREBAY_OTLP_ENDPOINT", f"http://{urlsplit(JAEGER).hostname}:4317")
SECRET = "nobody may read this"
GENERATE = "forebay.inference.v1.InferenceService/Generate"
REPORTING = {"OTEL_BSP_SCHEDULE_DELAY": "100", "FOREBAY_TELEMETRY__OTLP_ENDPOINT": COLLECTOR}

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


@asynccontextmanager
async def before(folder: Path, **backends: ServiceProcess) -> AsyncIterator[Client]:
    """Runs an orchestrator before backends; gives a client once all of them list their models."""
    lines = ['[orchestrator]\naddress = "127.0.0.1:0"\n']
    for name, process in backends.items():
        lines.append(f'[[orchestrator.backends]]\nname = "{name}"\naddress = "{process.address}"\n')
    (folder / "o.toml").write_text("".join(lines))
    async with (
        ServiceProcess(
            "forebay.orchestrator", ["--config", str(folder / "o.toml")], environment=REPORTING
        ) as orchestrator,
        client(orchestrator.address, timeout=60) as peer,
    ):
        async with asyncio.timeout(60):
            while len((await peer.inference.ListModels(pb.ListModelsRequest())).models) < len(backends):
                await asyncio.sleep(0.05)
        yield peer


async def traced(peer: Client, request: pb.GenerateRequest) -> str:
    """Reads a reply to a caller that has a trace of its own, and returns the trace."""
    trace_id = secrets.token_hex(16)
    metadata = grpc.aio.Metadata(("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"))
    events = [event async for event in peer.inference.Generate(request, timeout=60, metadata=metadata)]
    assert events[-1].HasField("finished")
    return trace_id


async def test_a_fallback_is_one_trace_in_jaeger_with_the_failed_attempt_and_the_good_one(
    tmp_path: Path,
) -> None:
    def backend(name: str, *more: str) -> ServiceProcess:
        return ServiceProcess(
            "forebay.testing.scripted", ["--name", name, "--models", "m", *more], environment=REPORTING
        )

    async with (
        backend("a", "--fault", "UNAVAILABLE@before") as a,
        backend("b") as b,
        before(tmp_path, a=a, b=b) as peer,
        aiohttp.ClientSession() as session,
    ):
        request = ask(SECRET, model="m")
        request.routing.backends.extend(["a", "b"])
        trace = await fetched(session, await traced(peer, request), 4)
    assert [span for span in flat(trace) if span[0] == "forebay-orchestrator"] == [
        ("forebay-orchestrator", GENERATE, "the caller"),
        ("forebay-orchestrator", "chat m", GENERATE),
        ("forebay-orchestrator", GENERATE, "chat m"),
        ("forebay-orchestrator", GENERATE, "chat m"),
    ]
    assert SECRET not in str(trace)


@pytest.mark.mlx
async def test_a_chat_through_orchestrator_service_and_worker_is_one_trace_in_jaeger(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="MLX has no build for this machine")
    tiny_models.build_random(tmp_path / "models" / "tiny", plain=True)
    (tmp_path / "m.toml").write_text(
        f'[mlx]\nmodel_folders = ["{tmp_path / "models"}"]\npreload = ["tiny"]\nfetch_default_model = false\n'
        f'cache_dir = "{tmp_path / "cache"}"\nhuggingface_cache = false\n'
    )
    async with (
        ServiceProcess(
            "forebay.mlx_service",
            ["--config", str(tmp_path / "m.toml"), "--address", "127.0.0.1:0"],
            environment=REPORTING,
        ) as mlx,
        before(tmp_path, mlx=mlx) as peer,
        aiohttp.ClientSession() as session,
    ):
        request = ask(SECRET, model="tiny")
        request.limits.max_output_token_count = 8
        trace = await fetched(session, await traced(peer, request), 6)
    assert flat(trace) == [
        ("forebay-orchestrator", GENERATE, "the caller"),
        ("forebay-orchestrator", "chat tiny", GENERATE),
        ("forebay-orchestrator", GENERATE, "chat tiny"),
        ("forebay-mlx", GENERATE, GENERATE),
        ("forebay-mlx", GENERATE, GENERATE),
        ("forebay-mlx-worker", GENERATE, GENERATE),
    ]
    assert SECRET not in str(trace)
