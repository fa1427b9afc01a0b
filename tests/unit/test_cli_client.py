"""The command's client: checks every event, translates every error, and cancels what it leaves."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest

from forebay.cli.client import Client, StreamCheck, connected
from forebay.cli.problems import ExitCode, Problem
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import failure
from forebay.kit.config import ServerSettings
from forebay.kit.server import serving
from forebay.models.v1 import models_pb2 as models_pb
from forebay.testing.scripted import ScriptedEngine, raw


def event(sequence: int, kind: str) -> pb.GenerateResponse:
    made = pb.GenerateResponse(sequence=sequence)
    getattr(made, kind).SetInParent()
    return made


def seen(*kinds: str) -> StreamCheck:
    check = StreamCheck()
    for sequence, kind in enumerate(kinds):
        check.see(event(sequence, kind))
    return check


def test_a_whole_answer_is_fine() -> None:
    seen("progress", "started", "progress", "delta", "continued", "delta", "finished").end()


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        (("delta",), "before it began"),
        (("started", "started"), "began twice"),
        (("started", "finished", "delta"), "after the end"),
    ],
)
def test_events_out_of_order_are_found(kinds: tuple[str, ...], why: str) -> None:
    with pytest.raises(failure.BrokenStream, match=why):
        seen(*kinds)


def test_a_lost_event_is_found() -> None:
    check = seen("started", "delta")
    with pytest.raises(failure.BrokenStream, match="event 2 was expected and event 3 came"):
        check.see(event(3, "delta"))


def test_an_answer_without_its_end_is_found() -> None:
    with pytest.raises(failure.BrokenStream, match="without its last event, after 2 events"):
        seen("started", "delta").end()


def test_events_of_kinds_to_come_are_let_through() -> None:
    check = seen("started")
    check.see(pb.GenerateResponse(sequence=1))
    check.see(event(2, "finished"))
    check.end()


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine(name="scripted", models=["a"], pullable=["new"])


@pytest.fixture
async def client(engine: ScriptedEngine) -> AsyncIterator[Client]:
    settings = ServerSettings(address="127.0.0.1:0")
    async with (
        serving(settings, inference=engine, models=engine) as up,
        connected(up.address) as client,
    ):
        yield client


def ask(text: str = "hi", model: str = "a") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model, messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])]
    )


async def test_an_answer_is_shown_event_by_event(client: Client, engine: ScriptedEngine) -> None:
    events: list[pb.GenerateResponse] = []
    await client.generate(ask(), events.append)
    text = "".join(e.delta.text for e in events)
    assert text == engine.expected(ask())


async def test_the_other_methods_reach_their_service(client: Client) -> None:
    assert [m.id for m in (await client.models(["x"])).models] == ["a"]
    assert len((await client.embed(pb.EmbedRequest(model="a", texts=["x", "y"]))).embeddings) == 2
    loads: list[models_pb.LoadModelResponse] = []
    await client.load(models_pb.LoadModelRequest(model="a"), loads.append)
    assert loads[-1].loaded.model.id == "a"
    pulls: list[models_pb.PullModelResponse] = []
    await client.pull(models_pb.PullModelRequest(model="new"), pulls.append)
    assert pulls[-1].pulled.model.id == "new"
    assert (await client.unload(models_pb.UnloadModelRequest(model="a"))).model.id == "a"
    await client.delete(models_pb.DeleteModelRequest(model="a"))


async def test_a_failure_comes_back_as_the_class_that_was_raised(client: Client) -> None:
    with pytest.raises(failure.ModelNotFound):
        await client.generate(ask(model="nope"), lambda event: None)
    with pytest.raises(failure.ModelNotFound):
        await client.embed(pb.EmbedRequest(model="nope", texts=["x"]))


async def test_what_a_single_backend_has_not_is_a_readable_failure(client: Client) -> None:
    for call in (
        client.backends(),
        client.drain("x"),
        client.resume("x"),
        client.explain(fleet_pb.ExplainRouteRequest()),
        client.watch(lambda backend: None),
    ):
        with pytest.raises(failure.CapabilityUnsupported):
            await call


async def test_nothing_that_listens_is_a_problem_with_a_remedy() -> None:
    async with connected("127.0.0.1:1") as client:
        with pytest.raises(Problem, match=r"nothing answers on 127\.0\.0\.1:1") as caught:
            await client.models()
    assert caught.value.code is ExitCode.UNAVAILABLE
    assert "forebay up" in caught.value.remedy


async def test_a_peer_that_hangs_up_gets_a_hint_of_tls() -> None:
    def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with connected(f"127.0.0.1:{port}") as client:
            with pytest.raises(Problem, match="nothing answers"):
                await client.models()


async def test_a_cancelled_answer_is_cancelled_at_the_other_end(
    client: Client, engine: ScriptedEngine
) -> None:
    slow = ask()
    slow.backend_options["scripted"].update({"token_delay": "60s"})
    first = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(client.generate(slow, lambda event: first.set()))
        await first.wait()
        assert len(engine.active) == 1
        task.cancel()
    async with asyncio.timeout(5):
        while engine.active:
            await asyncio.sleep(0.01)


async def test_a_lost_event_on_the_wire_is_told_and_the_call_cancelled(engine: ScriptedEngine) -> None:
    noisy = ScriptedEngine(numbered=True)
    async with (
        serving(ServerSettings(address="127.0.0.1:0"), more=[raw(noisy)]) as up,
        connected(up.address) as client,
    ):
        with pytest.raises(failure.BrokenStream):
            await client.generate(ask(model="fail:SKIP@2"), lambda event: None)


async def test_a_peer_lost_midway_is_an_interrupted_answer(engine: ScriptedEngine) -> None:
    slow = ask()
    slow.backend_options["scripted"].update({"token_delay": "60s"})
    first = asyncio.Event()
    settings = ServerSettings(address="127.0.0.1:0", grace=0, notice=0)
    async with (
        asyncio.TaskGroup() as group,
        serving(settings, inference=engine) as up,
        connected(up.address) as client,
    ):

        async def call() -> None:
            with pytest.raises(failure.StreamInterrupted, match="went away"):
                await client.generate(slow, lambda event: first.set())

        task = group.create_task(call())
        await first.wait()
        await up.drain()
        await task


async def test_a_token_from_the_environment_is_sent(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"open sesame").hexdigest()
    settings = ServerSettings(address="127.0.0.1:0", auth_token_digests=(digest,))
    async with serving(settings, inference=engine) as up:
        async with connected(up.address) as client:
            with pytest.raises(failure.Unauthenticated):
                await client.models()
        monkeypatch.setenv("FOREBAY_TOKEN", "open sesame")
        async with connected(up.address) as client:
            assert (await client.models()).models


async def test_roots_that_cannot_be_read_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_TLS_ROOTS", "/no/such/file.pem")
    with pytest.raises(Problem, match=r"/no/such/file\.pem cannot be read"):
        async with connected("127.0.0.1:1"):
            pass
