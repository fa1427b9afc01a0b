"""What a watcher of a real orchestrator sees: a queue, a kill, a fallback, a cached answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from contract.orchestrator_mesh import WAIT_SECONDS, Mesh, reason
from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.calls import ask, with_options
from forebay.testing.script import Fault, Script
from forebay.testing.scripted import ScriptedEngine

A = fleet_pb2.RequestActivity
Message = fleet_pb2.WatchActivityResponse


def engine(name: str) -> ScriptedEngine:
    return ScriptedEngine(name=name, models=("m",))


class Watch:
    """A client that watches, and keeps what it saw."""

    def __init__(self, mesh: Mesh, *, interval_ms: int = 50) -> None:
        request = fleet_pb2.WatchActivityRequest()
        request.interval.FromMilliseconds(interval_ms)
        self.stream = mesh.control.WatchActivity(request)
        self.ended: list[A] = []

    async def until(self, holds: Callable[[Message], bool]) -> Message:
        """Returns the first message of which something holds."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                message = await self.stream.read()
                assert isinstance(message, Message), "the stream ended"
                self.ended += message.ended_requests
                if holds(message):
                    return message

    async def end_of(self, request_id: str) -> A:
        """Returns how a request ended."""
        await self.until(lambda _: any(each.request_id == request_id for each in self.ended))
        return next(each for each in self.ended if each.request_id == request_id)


def named(name: str, **options: str | float) -> pb.GenerateRequest:
    request = with_options(ask(model="m"), **options)
    request.request_id = name
    return request


async def test_a_queue_is_seen_and_so_is_who_gave_up_waiting(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a"), backend={"slots": 1}) as mesh:
        watch = Watch(mesh)
        running = mesh.client.Generate(named("first", token_count=10_000, token_delay="5ms"))
        await watch.until(lambda seen: any(each.phase == A.PHASE_DECODE for each in seen.active_requests))
        waiting = mesh.client.Generate(named("second"))
        seen = await watch.until(lambda seen: seen.queue.waiting_normal_count == 1)
        assert (seen.queue.admitted_count, seen.queue.permit_count) == (1, 1)
        phases = {each.request_id: each.phase for each in seen.active_requests}
        assert phases == {"first": A.PHASE_DECODE, "second": A.PHASE_QUEUED}
        waiting.cancel()
        assert (await watch.end_of("second")).phase == A.PHASE_CANCELLED
        seen = await watch.until(lambda seen: seen.queue.waiting_normal_count == 0)
        (first,) = seen.active_requests
        assert first.output_tokens_per_second > 0
        assert 0 < first.output_token_count <= seen.totals.output_token_count
        running.cancel()
        ended = await watch.end_of("first")
        assert (ended.phase, ended.error_reason) == (A.PHASE_CANCELLED, "")
        assert ended.output_token_count >= first.output_token_count
        assert not (await watch.until(lambda seen: not seen.active_requests)).queue.admitted_count


async def test_a_fallback_shows_why_the_first_was_left(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a"), engine("b")) as mesh:
        watch = Watch(mesh)
        mesh["a"].engine.then(Script(fault=Fault.parse("UNAVAILABLE@before")))
        request = named("moved")
        request.routing.backends.extend(["a", "b"])
        await mesh.generate(request)
        ended = await watch.end_of("moved")
        assert (ended.phase, ended.backend, ended.attempt_count) == (A.PHASE_SUCCEEDED, "b", 2)
        assert [(each.backend, each.refused_by) for each in ended.candidates] == [("b", ""), ("a", "tried")]
        assert (await watch.until(lambda seen: True)).totals.retry_count == 1


async def test_a_killed_backend_is_seen_in_the_request_it_broke(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a"), engine("b")) as mesh:
        watch = Watch(mesh)
        request = named("broken", token_count=10_000, token_delay="5ms")
        request.routing.backends.append("a")
        stream = mesh.client.Generate(request)
        await watch.until(lambda seen: any(each.phase == A.PHASE_DECODE for each in seen.active_requests))
        await mesh["a"].stop()
        ended = await watch.end_of("broken")
        assert (ended.phase, ended.error_reason) == (A.PHASE_FAILED, "STREAM_INTERRUPTED")
        assert (ended.backend, ended.served_model) == ("a", "m")
        assert ended.output_token_count > 0
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stream:
                pass
        assert (await watch.until(lambda seen: True)).totals.failed_request_count == 1


async def test_a_cached_answer_is_told_apart(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a")) as mesh:
        for name in ("asked", "again"):
            request = named(name)
            request.sampling.temperature = 0.0
            request.routing.cache = pb.CACHE_POLICY_USE
            await mesh.generate(request)
        watch = Watch(mesh)
        seen = await watch.until(lambda seen: len(seen.ended_requests) == 2)
        assert [(each.request_id, each.cached) for each in seen.ended_requests] == [
            ("asked", False),
            ("again", True),
        ]
        assert seen.totals.cache_hit_count == 1


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(0, 0), (0, 49_999_999), (60, 1), (-1, 0), (2**62, 0), (0, -(2**31))]
)
async def test_an_interval_out_of_range_is_refused_by_its_field(
    tmp_path: Path, seconds: int, nanos: int
) -> None:
    async with Mesh(tmp_path, engine("a")) as mesh:
        request = fleet_pb2.WatchActivityRequest()
        request.interval.seconds, request.interval.nanos = seconds, nanos
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.control.WatchActivity(request).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason(caught.value) == "INVALID_REQUEST"
        assert violated(caught.value) == ["interval"]


def violated(error: grpc.aio.AioRpcError) -> list[str]:
    status, found = status_pb2.Status(), error_details_pb2.BadRequest()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    for detail in status.details:
        if detail.Unpack(found):
            return [each.field for each in found.field_violations]
    return []


async def test_watching_asks_for_the_token_that_everything_asks_for(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"swordfish").hexdigest()
    async with Mesh(tmp_path, engine("a"), auth_token_digests=[digest]) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.control.WatchActivity(fleet_pb2.WatchActivityRequest()).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        token = (("authorization", "Bearer swordfish"),)
        stream = mesh.control.WatchActivity(fleet_pb2.WatchActivityRequest(), metadata=token)
        assert isinstance(await stream.read(), Message)
        stream.cancel()


async def test_a_watch_does_not_hold_up_a_drain(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a"), grace="10m") as mesh:
        watch = Watch(mesh)
        await watch.until(lambda seen: True)
        async with asyncio.timeout(WAIT_SECONDS):
            await mesh.up.drain()
        with pytest.raises(grpc.aio.AioRpcError):
            await watch.until(lambda seen: False)
