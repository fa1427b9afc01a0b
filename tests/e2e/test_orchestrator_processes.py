"""Real processes that are killed, frozen, drained and started late, behind a real orchestrator."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.calls import ask, with_options
from forebay.testing.client import CallError, Client, client
from forebay.testing.otlp import OtlpReceiver
from forebay.testing.processes import ServiceProcess
from forebay.testing.scripted import ScriptedEngine

WAIT_SECONDS = 20.0
"""Longest wait for what is due within a second or two; a loaded machine is slower."""

BACKEND = fleet_pb2.Backend


def backend(name: str, *arguments: str, address: str = "127.0.0.1:0") -> ServiceProcess:
    """Returns a scripted backend whose replies are long enough to be caught in the middle."""
    return ServiceProcess(
        "forebay.testing.scripted",
        [
            *("--name", name, "--models", "m", "--address", address, "--weights", "same"),
            *("--token-count", "200", "--token-delay", "10ms", *arguments),
        ],
    )


class Running:
    """An orchestrator process and a client of it."""

    def __init__(self, process: ServiceProcess, peer: Client) -> None:
        self.process = process
        self.peer = peer
        self.fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)

    async def backend(self, name: str) -> fleet_pb2.Backend:
        listed = await self.fleet.ListBackends(fleet_pb2.ListBackendsRequest())
        return next(backend for backend in listed.backends if backend.name == name)

    async def until(self, name: str, holds: Callable[[fleet_pb2.Backend], bool]) -> float:
        """Waits until something holds of a backend, and returns how long that took."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while not holds(backend := await self.backend(name)):
            assert loop.time() - since < WAIT_SECONDS, f"did not come true: {backend}"
            await asyncio.sleep(0.02)
        return loop.time() - since


@asynccontextmanager
async def orchestrator(folder: Path, more: str = "", **addresses: str) -> AsyncIterator[Running]:
    """Runs an orchestrator in front of the named backends, with more lines of configuration."""
    lines = [more, "[orchestrator]", 'address = "127.0.0.1:0"']
    for name, address in addresses.items():
        lines += [
            "[[orchestrator.backends]]",
            f'name = "{name}"',
            f'address = "{address}"',
        ]
    config = folder / "forebay.toml"
    config.write_text("\n".join(lines))
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(
            ServiceProcess("forebay.orchestrator", ["--config", str(config)])
        )
        peer = await stack.enter_async_context(client(process.address, timeout=WAIT_SECONDS))
        yield Running(process, peer)


def is_active(backend: fleet_pb2.Backend) -> bool:
    return backend.state == BACKEND.STATE_ACTIVE and bool(backend.models)


def whole() -> str:
    """Returns the text of an undisturbed reply, which is the same from every backend here."""
    from forebay.testing.script import Script, ScriptedModel

    model = ScriptedModel(name="m", weights="same", script=Script(token_count=200))
    return ScriptedEngine(models=[model]).expected(ask(model="m"))


def preferring(*names: str) -> pb.GenerateRequest:
    request = ask(model="m")
    request.routing.backends.extend(names)
    return request


async def read(
    running: Running, request: pb.GenerateRequest, on_delta: Callable[[], None] | None = None
) -> list[pb.GenerateResponse]:
    """Reads a reply, and calls `on_delta` once after the third delta."""
    events: list[pb.GenerateResponse] = []
    deltas = 0
    async with running.peer.stream(request) as stream:
        try:
            async for event in stream:
                events.append(event)
                deltas += event.HasField("delta")
                if deltas == 3 and on_delta is not None:
                    on_delta()
                    on_delta = None
        except grpc.aio.AioRpcError as error:
            raise CallError(error, events) from error
    return events


async def test_a_backend_that_is_killed_in_the_middle_ends_the_reply_as_aborted(tmp_path: Path) -> None:
    async with backend("a") as a, orchestrator(tmp_path, a=a.address) as running:
        await running.until("a", is_active)
        with pytest.raises(CallError) as caught:
            await read(running, ask(model="m"), lambda: a.signal(signal.SIGKILL))
        assert caught.value.code is grpc.StatusCode.ABORTED
        assert caught.value.reason == "STREAM_INTERRUPTED"
        grammar.check(caught.value.events, complete=False)
        text = grammar.text(caught.value.events)
        assert text
        assert text != whole()
        assert whole().startswith(text)
        assert await running.until("a", lambda b: b.state == BACKEND.STATE_UNREACHABLE) < 3.0


async def test_a_backend_that_is_killed_before_its_first_token_is_replaced_unnoticed(tmp_path: Path) -> None:
    async with (
        backend("a") as a,
        backend("b") as b,
        orchestrator(tmp_path, a=a.address, b=b.address) as running,
    ):
        await running.until("a", is_active)
        await running.until("b", is_active)
        request = with_options(preferring("a", "b"), first_delay="500ms")
        async with asyncio.TaskGroup() as group:
            reply = group.create_task(read(running, request))
            await running.until("a", lambda b: b.active_call_count == 1)
            a.signal(signal.SIGKILL)
        events = reply.result()
        grammar.check(events)
        assert [e.started.backend for e in events if e.HasField("started")] == ["b"]
        assert grammar.text(events) == whole()


async def test_a_backend_that_starts_late_joins_by_itself(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    async with orchestrator(tmp_path, a=address) as running:
        await running.until("a", lambda b: b.detail == f"nothing listens at {address}")
        with pytest.raises(CallError) as caught:
            await running.peer.generate(ask(model="m"))
        assert caught.value.reason == "NO_BACKEND"
        async with backend("a", address=address):
            assert await running.until("a", is_active) < 5.0
            assert await running.peer.text(ask(model="m")) == whole()


async def test_a_frozen_backend_fails_its_call_within_three_seconds_and_gets_no_more(tmp_path: Path) -> None:
    async with (
        backend("a") as a,
        backend("b") as b,
        orchestrator(tmp_path, a=a.address, b=b.address) as running,
    ):
        await running.until("a", is_active)
        await running.until("b", is_active)
        loop = asyncio.get_running_loop()
        frozen: list[float] = []

        def freeze() -> None:
            a.freeze()
            frozen.append(loop.time())

        with pytest.raises(CallError) as caught:
            await read(running, preferring("a"), freeze)
        assert loop.time() - frozen[0] < 3.0
        assert caught.value.reason == "STREAM_INTERRUPTED"
        await running.until("a", lambda b: b.state == BACKEND.STATE_UNREACHABLE)
        assert (await running.backend("a")).detail == "it stopped answering, as if frozen"
        for _ in range(3):
            events = await running.peer.generate(with_options(ask(model="m"), token_count=3))
            assert events[0].started.backend == "b"
        a.thaw()
        await running.until("a", is_active)


async def test_a_drained_backend_gets_no_calls_and_finishes_those_it_has(tmp_path: Path) -> None:
    async with (
        backend("a") as a,
        backend("b") as b,
        orchestrator(tmp_path, a=a.address, b=b.address) as running,
    ):
        await running.until("a", is_active)
        await running.until("b", is_active)
        async with asyncio.TaskGroup() as group:
            reply = group.create_task(read(running, preferring("a", "b")))
            await running.until("a", lambda b: b.active_call_count == 1)
            await running.fleet.DrainBackend(fleet_pb2.DrainBackendRequest(backend="a"))
            events = await running.peer.generate(preferring("a", "b"))
            assert events[0].started.backend == "b"
        grammar.check(reply.result())
        assert reply.result()[0].started.backend == "a"
        await running.fleet.ResumeBackend(fleet_pb2.ResumeBackendRequest(backend="a"))
        events = await running.peer.generate(with_options(preferring("a", "b"), token_count=3))
        assert events[0].started.backend == "a"


async def test_a_backend_that_is_told_to_stop_finishes_its_calls_and_gets_no_more(tmp_path: Path) -> None:
    async with (
        backend("a") as a,
        backend("b") as b,
        orchestrator(tmp_path, a=a.address, b=b.address) as running,
    ):
        await running.until("a", is_active)
        await running.until("b", is_active)
        async with asyncio.TaskGroup() as group:
            begun = asyncio.Event()  # a call that is counted here may not have reached the backend yet
            reply = group.create_task(read(running, preferring("a", "b"), begun.set))
            await begun.wait()
            a.signal(signal.SIGTERM)
            await running.until("a", lambda b: b.state == BACKEND.STATE_DRAINING)
            events = await running.peer.generate(preferring("a", "b"))
            assert events[0].started.backend == "b"
        grammar.check(reply.result())
        assert await a.wait() == 0
        await running.until("a", lambda b: b.state == BACKEND.STATE_UNREACHABLE)


async def test_a_cancelled_call_stops_at_the_backend(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    async with backend("a", "--journal", str(journal)) as a, orchestrator(tmp_path, a=a.address) as running:
        await running.until("a", is_active)
        async with running.peer.stream(ask(model="m")) as stream:
            async for event in stream:
                if event.HasField("delta"):
                    break
        await running.until("a", lambda b: b.active_call_count == 0)
        loop = asyncio.get_running_loop()
        until = loop.time() + WAIT_SECONDS
        while (last := json.loads(journal.read_text().splitlines()[-1]))["fate"] == "active":
            assert loop.time() < until
            await asyncio.sleep(0.01)
        assert last["fate"] == "cancelled"
        assert last["delta_count"] < 200


async def test_an_orchestrator_before_an_orchestrator_is_a_backend_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    async with (
        backend("a") as a,
        orchestrator(tmp_path / "inner", a=a.address) as inner,
        orchestrator(tmp_path, far=inner.process.address) as running,
    ):
        await running.until("far", is_active)
        events = await running.peer.generate(preferring("far"))
        grammar.check(events)
        assert events[0].started.backend == "far"
        with pytest.raises(CallError) as caught:
            await read(running, ask(model="m"), lambda: a.signal(signal.SIGKILL))
        assert caught.value.reason == "STREAM_INTERRUPTED"


async def test_an_orchestrator_that_is_told_to_stop_finishes_its_calls(tmp_path: Path) -> None:
    async with backend("a") as a, orchestrator(tmp_path, a=a.address) as running:
        await running.until("a", is_active)
        watch = running.fleet.WatchBackends(fleet_pb2.WatchBackendsRequest())
        await watch.read()
        events = await read(running, ask(model="m"), lambda: running.process.signal(signal.SIGTERM))
        grammar.check(events)
        assert await running.process.wait(timeout=5.0) == 0
        watch.cancel()


async def test_each_attempt_is_a_span_between_the_orchestrators_and_the_backends(tmp_path: Path) -> None:
    async with (
        OtlpReceiver() as otlp,
        backend("a", "--otlp", otlp.endpoint, "--fault", "UNAVAILABLE@before") as a,
        backend("b", "--otlp", otlp.endpoint) as b,
        orchestrator(
            tmp_path, f'[telemetry]\notlp_endpoint = "{otlp.endpoint}"', a=a.address, b=b.address
        ) as running,
    ):
        await running.until("a", is_active)
        await running.until("b", is_active)
        request = preferring("a", "b")
        request.limits.max_output_token_count = 3
        await running.peer.generate(request)
        spans = await otlp.wait_for(6)
        assert len({span.trace_id for span in spans}) == 1
        by_id = {span.span_id: span for span in spans}
        chains = [
            (span.service, span.kind, by_id[span.parent].name if span.parent else "", span.status)
            for span in spans
        ]
        generate = "forebay.inference.v1.InferenceService/Generate"
        assert sorted(chains) == [
            ("forebay-a", "SERVER", generate, "ERROR"),
            ("forebay-b", "SERVER", generate, "UNSET"),
            ("forebay-orchestrator", "CLIENT", "chat m", "ERROR"),
            ("forebay-orchestrator", "CLIENT", "chat m", "UNSET"),
            ("forebay-orchestrator", "CLIENT", generate, "UNSET"),
            ("forebay-orchestrator", "SERVER", "", "UNSET"),
        ]


async def test_mistakes_in_the_configuration_are_all_told_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "forebay.toml"
    config.write_text(
        "[orchestrator]\npicker = 'worst'\n[[orchestrator.backends]]\nname = 'A B'\naddress = 'nowhere'\n"
    )
    process = ServiceProcess("forebay.orchestrator", ["--config", str(config)])
    await process.launch()
    assert await process.wait() == 64
    assert len(process.log.splitlines()) == 3
    assert process.output == ""
