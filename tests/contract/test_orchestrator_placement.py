"""One account of memory over real gRPC: two backends that share a host with room for one model."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from contract.orchestrator_mesh import Mesh, reason
from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.models.v1 import models_pb2 as models_pb
from forebay.testing import grammar
from forebay.testing.calls import ask, with_options
from forebay.testing.script import Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine

MIB = 2**20
"""What a scripted model takes."""


def engine(name: str, model: str, *, load: float = 0.0, loaded: bool = False) -> ScriptedEngine:
    script = Script(load_delay=load)
    return ScriptedEngine(name=name, models=[ScriptedModel(name=model, loaded=loaded, script=script)])


def room_for_one(**more: object) -> dict[str, object]:
    return {"memory": "1536KiB", **more}


def states(mesh: Mesh) -> dict[str, int]:
    return {model.id: model.state for each in mesh.backends.values() for model in _models(each.engine)}


def _models(engine: ScriptedEngine) -> list[pb.Model]:
    return [engine._describe(model) for model in engine.models.values()]


async def memory(mesh: Mesh, name: str) -> pb.Memory:
    listed = await mesh.control.ListBackends(fleet_pb2.ListBackendsRequest())
    return next(backend.memory for backend in listed.backends if backend.name == name)


async def test_a_cold_model_is_loaded_with_progress_and_the_idle_one_of_another_framework_leaves(
    tmp_path: Path,
) -> None:
    one, two = engine("one", "m", load=0.1), engine("two", "n", load=0.1)
    async with Mesh(tmp_path, one, two, placement=room_for_one()) as mesh:
        for model in ("m", "n", "m"):
            events = await mesh.generate(ask(model=model))
            grammar.check(events)
            loading = [e.progress for e in events if e.progress.stage == pb.Progress.STAGE_LOADING]
            assert any(each.HasField("fraction") for each in loading), "how far it is, is passed on"
            loaded = {name for name, state in states(mesh).items() if state == pb.Model.STATE_ACTIVE}
            assert loaded == {model}, "never both"
            shown = await memory(mesh, "two")
            assert (shown.limit_bytes, shown.used_bytes, shown.reserved_bytes) == (3 * MIB // 2, MIB, 0)
            listed = await mesh.client.ListModels(pb.ListModelsRequest())
            assert (listed.memory.host, listed.memory.used_bytes) == ("", MIB)


async def test_what_can_never_fit_is_refused_with_figures(tmp_path: Path) -> None:
    one = engine("one", "m")
    async with Mesh(tmp_path, one, placement={"memory": "512KiB"}) as mesh:
        for call in (
            mesh.generate(ask(model="m")),
            anext(aiter(mesh.models.LoadModel(models_pb.LoadModelRequest(model="m")))),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert reason(caught.value) == "MEMORY_EXHAUSTED"
            assert "needs" in (caught.value.details() or "")
        assert one.records == []
        explained = await mesh.control.ExplainRoute(fleet_pb2.ExplainRouteRequest(request=ask(model="m")))
        assert explained.candidates[0].refused_by == "memory"


async def test_a_pinned_model_is_there_from_the_start_and_never_leaves(tmp_path: Path) -> None:
    one, two = engine("one", "m"), engine("two", "n")
    placed = room_for_one(models=[{"model": "m", "pinned": True}])
    async with Mesh(tmp_path, one, two, placement=placed) as mesh:
        await mesh.until(lambda: states(mesh)["m"] == pb.Model.STATE_ACTIVE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.generate(ask(model="n"))
        assert reason(caught.value) == "MEMORY_EXHAUSTED"
        await mesh["one"].stop()
        await mesh.until(lambda: not mesh.fleet["one"].is_reachable)
        one._unloaded.add("m")
        await mesh["one"].start()
        await mesh.until(lambda: states(mesh)["m"] == pb.Model.STATE_ACTIVE)


async def test_a_model_in_use_stays_until_its_call_is_over(tmp_path: Path) -> None:
    one, two = engine("one", "m"), engine("two", "n")
    async with Mesh(tmp_path, one, two, placement=room_for_one()) as mesh:
        slow = mesh.client.Generate(
            with_options(ask(model="m"), token_count=8, token_delay="50ms"), timeout=20.0
        )
        async for event in slow:
            if event.HasField("delta"):
                break
        waiting = aiter(mesh.client.Generate(ask(model="n"), timeout=20.0))
        assert (await anext(waiting)).progress.stage == pb.Progress.STAGE_LOADING
        assert states(mesh)["m"] == pb.Model.STATE_ACTIVE
        rest = [event async for event in slow]
        assert rest[-1].HasField("finished"), "nobody was thrown out"
        assert [event async for event in waiting][-1].HasField("finished")
        assert states(mesh) == {"m": pb.Model.STATE_AVAILABLE, "n": pb.Model.STATE_ACTIVE}


async def test_without_placement_each_framework_does_as_it_likes(tmp_path: Path) -> None:
    one, two = engine("one", "m"), engine("two", "n")
    async with Mesh(tmp_path, one, two, placement=room_for_one(enabled=False)) as mesh:
        for model in ("m", "n"):
            await mesh.generate(ask(model=model))
        assert set(states(mesh).values()) == {pb.Model.STATE_ACTIVE}
        assert not (await memory(mesh, "one")).limit_bytes
