"""The orchestrator over real gRPC: it watches, steers and explains its backends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import grpc.aio
import pytest

from contract.orchestrator_mesh import Mesh, reason, until
from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.models.v1 import models_pb2 as models_pb
from forebay.orchestrator.fleet.endpoint import State
from forebay.testing import grammar
from forebay.testing.calls import ask, message, with_options
from forebay.testing.script import Fault, Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine

BACKEND = fleet_pb2.Backend

Event = TypeVar("Event")


def engine(name: str, *models: str, **fields: object) -> ScriptedEngine:
    return ScriptedEngine(name=name, models=models or ("m",), **fields)  # type: ignore[arg-type]  # as given


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with Mesh(tmp_path, engine("a", "m", "only-a"), engine("b", "m", "only-b")) as up:
        yield up


async def test_a_call_goes_to_the_backend_that_has_the_model(mesh: Mesh) -> None:
    for name in ("a", "b"):
        events = await mesh.generate(ask(model=f"only-{name}"))
        grammar.check(events)
        assert events[0].started.backend == name
        assert grammar.text(events) == mesh[name].engine.expected(ask(model=f"only-{name}"))


async def test_embed_and_count_tokens_go_the_same_way(mesh: Mesh) -> None:
    vectors = await mesh.client.Embed(pb.EmbedRequest(model="only-b", texts=["x"]))
    assert (vectors.backend, len(vectors.embeddings)) == ("b", 1)
    count = await mesh.client.CountTokens(
        pb.CountTokensRequest(model="only-a", messages=[message("two words")])
    )
    assert count.backend == "a"


async def test_the_lists_of_all_backends_are_merged(mesh: Mesh) -> None:
    listed = await mesh.client.ListModels(pb.ListModelsRequest())
    assert sorted((m.backend, m.id) for m in listed.models) == [
        ("a", "m"),
        ("a", "only-a"),
        ("b", "m"),
        ("b", "only-b"),
    ]
    one = await mesh.client.ListModels(pb.ListModelsRequest(backends=["b"]))
    assert {m.backend for m in one.models} == {"b"}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.client.ListModels(pb.ListModelsRequest(backends=["nosuch"]))
    assert reason(caught.value) == "BACKEND_NOT_FOUND"


async def test_a_backend_that_fails_before_its_first_delta_is_replaced(mesh: Mesh) -> None:
    request = ask(model="m")
    request.routing.backends.extend(["a", "b"])
    mesh["a"].engine.then(Script(fault=Fault.parse("UNAVAILABLE@before")))
    events = await mesh.generate(request)
    mesh["a"].engine.assert_used()
    grammar.check(events)
    assert [event.started.backend for event in events if event.HasField("started")] == ["b"]


async def test_a_reply_that_breaks_off_is_aborted_and_a_prefix(mesh: Mesh) -> None:
    request = ask(model="m")
    events: list[pb.GenerateResponse] = []
    stream = mesh.client.Generate(with_options(request, fault="UNAVAILABLE@3"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _keep(stream, events)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert reason(caught.value) == "STREAM_INTERRUPTED"
    grammar.check(events, complete=False)
    assert mesh["a"].engine.expected(request).startswith(grammar.text(events)) or mesh["b"].engine.expected(
        request
    ).startswith(grammar.text(events))
    assert len(mesh["a"].engine.records) + len(mesh["b"].engine.records) == 1


async def test_a_model_that_nobody_has_is_not_found(mesh: Mesh) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate(ask(model="nosuch"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "a: it has no model nosuch" in (caught.value.details() or "")


async def test_a_request_without_a_model_is_refused_by_its_field(mesh: Mesh) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate(ask(model=""))
    assert reason(caught.value) == "INVALID_REQUEST"
    assert "default_model" in (caught.value.details() or "")


async def test_the_operators_names_for_models_are_understood_everywhere(tmp_path: Path) -> None:
    async with Mesh(
        tmp_path,
        engine("a", "Org/Long-Name"),
        engine("b", "x:latest"),
        aliases={"small": {"a": "org/long-name", "b": "x"}},
        default_model="small",
    ) as mesh:
        for name, spelling in (("a", "Org/Long-Name"), ("b", "x:latest")):
            for asked in ("small", ""):
                request = ask(model=asked)
                request.routing.backends.append(name)
                assert (await mesh.generate(request))[0].started.model == spelling
            answer = await mesh.models.GetModel(models_pb.GetModelRequest(model="small", backend=name))
            assert answer.model.id == spelling
        listed = await mesh.client.ListModels(pb.ListModelsRequest())
        assert [list(model.aliases) for model in listed.models] == [["small"], ["small"]]


async def test_a_cancelled_call_stops_at_the_backend(mesh: Mesh) -> None:
    stream = mesh.client.Generate(with_options(ask(model="only-a"), token_count=10_000, token_delay="5ms"))
    async for event in stream:
        if event.HasField("delta"):
            break
    assert len(mesh["a"].engine.active) == 1
    stream.cancel()
    await mesh.until(lambda: not mesh["a"].engine.active)
    await mesh.until(lambda: mesh.fleet["a"].active == 0)
    assert mesh.fleet["a"].state is State.ACTIVE


async def test_a_drained_backend_gets_no_calls_until_it_is_resumed(mesh: Mesh) -> None:
    drained = await mesh.control.DrainBackend(fleet_pb2.DrainBackendRequest(backend="a"))
    assert drained.backend.state == BACKEND.STATE_DRAINING
    for _ in range(10):
        assert (await mesh.generate(ask(model="m")))[0].started.backend == "b"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate(ask(model="only-a"))
    assert reason(caught.value) == "NO_BACKEND"
    listed = await mesh.client.ListModels(pb.ListModelsRequest())
    assert {m.backend for m in listed.models} == {"b"}
    assert not listed.unreachable
    resumed = await mesh.control.ResumeBackend(fleet_pb2.ResumeBackendRequest(backend="a"))
    assert resumed.backend.state == BACKEND.STATE_ACTIVE
    assert (await mesh.generate(ask(model="only-a")))[0].started.backend == "a"


async def test_a_drain_lets_calls_in_progress_end(mesh: Mesh) -> None:
    stream = mesh.client.Generate(with_options(ask(model="only-a"), token_delay="20ms"))
    events: list[pb.GenerateResponse] = []
    async for event in stream:
        if not events:
            await mesh.control.DrainBackend(fleet_pb2.DrainBackendRequest(backend="a"))
        events.append(event)
    grammar.check(events)


@pytest.mark.parametrize("method", ["DrainBackend", "ResumeBackend"])
async def test_steering_an_unknown_backend_is_not_found(mesh: Mesh, method: str) -> None:
    request = getattr(fleet_pb2, f"{method}Request")(backend="nosuch")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(mesh.control, method)(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert reason(caught.value) == "BACKEND_NOT_FOUND"


async def test_a_backend_that_says_not_serving_gets_no_calls(mesh: Mesh) -> None:
    up = mesh["a"].up
    assert up is not None
    await up.set_ready(False)
    await mesh.until(lambda: mesh.fleet["a"].state is State.DRAINING)
    assert (await mesh.generate(ask(model="m")))[0].started.backend == "b"
    await up.set_ready(True)
    await mesh.until(lambda: mesh.fleet["a"].state is State.ACTIVE)


async def test_a_backend_that_stops_is_unreachable_and_joins_again(mesh: Mesh) -> None:
    await mesh["a"].stop()
    await mesh.until(lambda: mesh.fleet["a"].state is State.UNREACHABLE)
    listed = await mesh.client.ListModels(pb.ListModelsRequest())
    assert list(listed.unreachable) == ["a"]
    assert repr(mesh.fleet).startswith("<Fleet [a UNREACHABLE ")
    assert repr(mesh.fleet).endswith("| b ACTIVE 0]>")
    await mesh["a"].start()
    await mesh.until(lambda: mesh.fleet["a"].state is State.ACTIVE)
    assert (await mesh.generate(ask(model="only-a")))[0].started.backend == "a"


async def test_a_backend_that_is_absent_at_the_start_joins_by_itself(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("late"), absent=("late",)) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.generate(ask(model="m"))
        assert reason(caught.value) == "NO_BACKEND"
        await mesh["late"].start()
        await mesh.until(lambda: bool(mesh.fleet["late"].models))
        grammar.check(await mesh.generate(ask(model="m")))


async def test_a_backend_that_keeps_failing_is_ejected_and_comes_back(tmp_path: Path) -> None:
    breaker = {"consecutive_failures": 2, "open_min": "50ms", "jitter": 0}
    async with Mesh(
        tmp_path, engine("a"), engine("b"), backend={"breaker": breaker}, retry={"backoff_min": "1ms"}
    ) as mesh:
        request = ask(model="m")
        request.routing.backends.extend(["a", "b"])
        mesh["a"].engine.then(*[Script(fault=Fault.parse("INTERNAL"))] * 2)
        for _ in range(2):
            assert (await mesh.generate(request))[0].started.backend == "b"
        assert mesh.fleet["a"].state is State.EJECTED
        await asyncio.sleep(0.05)
        await mesh.until(lambda: mesh.fleet["a"].view().can_admit)
        assert (await mesh.generate(ask(model="m")))[0].started.backend == "a"
        assert mesh.fleet["a"].state is State.ACTIVE


async def test_new_models_are_noticed(mesh: Mesh) -> None:
    mesh["a"].engine.models["new"] = ScriptedModel(name="new")
    await mesh.until(lambda: mesh.fleet["a"].find("new") is not None)


async def test_every_backend_is_watched_and_told_of_again_when_it_changes(mesh: Mesh) -> None:
    stream = mesh.control.WatchBackends(fleet_pb2.WatchBackendsRequest())
    first = [(await stream.read()).backend.name for _ in range(2)]
    assert first == ["a", "b"]
    assert len(mesh.fleet.feed) == 1
    await mesh.control.DrainBackend(fleet_pb2.DrainBackendRequest(backend="b"))
    while (changed := (await stream.read()).backend).name != "b":
        pass
    assert changed.state == BACKEND.STATE_DRAINING
    assert changed.detail == "an operator drained it"
    stream.cancel()
    await mesh.until(lambda: len(mesh.fleet.feed) == 0)


async def test_a_watcher_that_does_not_read_blocks_nobody(mesh: Mesh) -> None:
    idle = mesh.control.WatchBackends(fleet_pb2.WatchBackendsRequest())
    reading = mesh.control.WatchBackends(fleet_pb2.WatchBackendsRequest())
    await idle.read()
    for _ in range(20):
        await mesh.generate(ask(model="m"))
    assert (await reading.read()).backend.name == "a"
    idle.cancel()
    reading.cancel()


async def test_backends_are_listed_as_they_are(mesh: Mesh) -> None:
    await mesh.generate(ask(model="only-a"))
    listed = await mesh.control.ListBackends(fleet_pb2.ListBackendsRequest())
    a, b = listed.backends
    assert (a.name, a.state, a.succeeded_call_count) == ("a", BACKEND.STATE_ACTIVE, 1)
    assert a.HasField("first_delta_duration")
    assert not b.HasField("first_delta_duration")
    assert [model.id for model in b.models] == ["m", "only-b"]


async def test_an_explanation_is_what_then_happens(mesh: Mesh) -> None:
    request = ask(model="only-a")
    request.routing.fallback_models.append("only-b")
    told = await mesh.control.ExplainRoute(fleet_pb2.ExplainRouteRequest(request=request))
    assert [(c.backend, c.model, c.refused_by) for c in told.candidates] == [
        ("a", "only-a", ""),
        ("b", "only-b", ""),
        ("b", "", "model"),
        ("a", "", "model"),
    ]
    assert told.request_class == "chat"
    assert told.class_reasons
    assert told.candidates[0].scores["loaded"] == 1.0
    assert told.candidates[2].refusal_detail == "it has no model only-a"
    assert (await mesh.generate(request))[0].started.backend == "a"


async def test_an_embedding_is_explained_too_and_nothing_is_refused(mesh: Mesh) -> None:
    embed = fleet_pb2.ExplainRouteRequest(embed_request=pb.EmbedRequest(model="m", texts=["x"]))
    assert (await mesh.control.ExplainRoute(embed)).request_class == "embedding"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.control.ExplainRoute(fleet_pb2.ExplainRouteRequest())
    assert reason(caught.value) == "INVALID_REQUEST"


# Model management.


async def test_a_model_is_described_by_a_backend_that_has_it(mesh: Mesh) -> None:
    answer = await mesh.models.GetModel(models_pb.GetModelRequest(model="ONLY-B"))
    assert (answer.model.backend, answer.model.id) == ("b", "only-b")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.models.GetModel(models_pb.GetModelRequest(model="nosuch"))
    assert reason(caught.value) == "MODEL_NOT_FOUND"


async def test_a_named_backend_is_asked_even_for_what_it_has_not_listed(mesh: Mesh) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.models.GetModel(models_pb.GetModelRequest(model="only-b", backend="a"))
    assert reason(caught.value) == "MODEL_NOT_FOUND"


async def test_loading_and_unloading_shows_in_the_list_at_once(tmp_path: Path) -> None:
    slow = {"models_interval": "1h"}
    async with Mesh(tmp_path, engine("a"), engine("b", "x"), probe=slow) as mesh:
        done = await mesh.models.UnloadModel(models_pb.UnloadModelRequest(model="m"))
        assert (done.model.backend, done.model.state) == ("a", pb.Model.STATE_AVAILABLE)
        await mesh.until(lambda: mesh.fleet["a"].models[0].state == pb.Model.STATE_AVAILABLE)
        again = await mesh.models.UnloadModel(models_pb.UnloadModelRequest(model="m"))
        assert again.model.state == pb.Model.STATE_AVAILABLE
        events = [event async for event in mesh.models.LoadModel(models_pb.LoadModelRequest(model="M"))]
        assert events[-1].loaded.model.backend == "a"
        await mesh.until(lambda: mesh.fleet["a"].models[0].state == pb.Model.STATE_ACTIVE)


async def test_a_model_is_unloaded_wherever_it_is_loaded(mesh: Mesh) -> None:
    await mesh.models.UnloadModel(models_pb.UnloadModelRequest(model="m"))
    for name in ("a", "b"):
        await mesh.until(lambda name=name: mesh.fleet[name].find("m").state == pb.Model.STATE_AVAILABLE)  # type: ignore[misc, union-attr]  # bound, and there


async def test_a_model_is_fetched_to_the_backend_that_is_named(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a", pullable=["new"]), engine("b", pullable=["new"])) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _drain(mesh.models.PullModel(models_pb.PullModelRequest(model="new")))
        assert reason(caught.value) == "INVALID_REQUEST"
        assert "backend" in (caught.value.details() or "")
        events = await _drain(mesh.models.PullModel(models_pb.PullModelRequest(model="new", backend="b")))
        assert events[-1].pulled.model.backend == "b"
        await mesh.until(lambda: mesh.fleet["b"].find("new") is not None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _drain(mesh.models.PullModel(models_pb.PullModelRequest(model="nosuch", backend="b")))
        assert reason(caught.value) == "MODEL_NOT_FOUND"


async def test_with_one_backend_a_fetch_needs_no_name(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a", pullable=["new"])) as mesh:
        events = await _drain(mesh.models.PullModel(models_pb.PullModelRequest(model="new")))
        assert events[-1].pulled.model.backend == "a"


async def test_a_model_that_several_have_is_deleted_only_by_name(mesh: Mesh) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.models.DeleteModel(models_pb.DeleteModelRequest(model="m"))
    assert reason(caught.value) == "INVALID_REQUEST"
    await mesh.models.DeleteModel(models_pb.DeleteModelRequest(model="m", backend="a"))
    await mesh.until(lambda: mesh.fleet["a"].find("m") is None)
    await mesh.models.DeleteModel(models_pb.DeleteModelRequest(model="m"))
    await mesh.until(lambda: mesh.fleet["b"].find("m") is None)


async def test_managing_what_cannot_be_reached_is_unavailable(mesh: Mesh) -> None:
    await mesh["a"].stop()
    await mesh.until(lambda: mesh.fleet["a"].state is State.UNREACHABLE)
    for request in (
        models_pb.GetModelRequest(model="m", backend="a"),
        models_pb.GetModelRequest(model="only-a"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.models.GetModel(request)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_load_whose_backend_is_lost_is_unavailable(tmp_path: Path) -> None:
    loading = ScriptedModel(name="m", script=Script(load_delay=60.0), loaded=False)
    async with Mesh(tmp_path, ScriptedEngine(name="a", models=[loading])) as mesh:
        stream = mesh.models.LoadModel(models_pb.LoadModelRequest(model="m"))
        await stream.read()
        async with asyncio.TaskGroup() as group:
            group.create_task(mesh["a"].stop())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _read_on(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_caller_that_leaves_a_load_leaves_nothing_behind(tmp_path: Path) -> None:
    loading = ScriptedModel(name="m", script=Script(load_delay=60.0), loaded=False)
    async with Mesh(tmp_path, ScriptedEngine(name="a", models=[loading])) as mesh:
        stream = mesh.models.LoadModel(models_pb.LoadModelRequest(model="m"))
        await stream.read()
        stream.cancel()
        up = mesh["a"].up
        assert up is not None
        await until(lambda: up.inflight.count == 0)


async def _read_on(stream: grpc.aio.UnaryStreamCall[object, object]) -> None:
    """Reads until the stream ends; a stream that was read from cannot be iterated."""
    while await stream.read() is not grpc.aio.EOF:
        pass


async def _keep(stream: AsyncIterator[Event], events: list[Event]) -> None:
    """Keeps what comes, so that it is still there when the stream fails."""
    async for event in stream:
        events.append(event)  # noqa: PERF401  # see above


async def _drain(stream: AsyncIterator[models_pb.PullModelResponse]) -> list[models_pb.PullModelResponse]:
    return [event async for event in stream]
