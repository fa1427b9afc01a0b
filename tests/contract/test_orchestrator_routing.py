"""Routing over real gRPC: names, conversations and measurements, as a client meets them."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from contract.orchestrator_mesh import Mesh, reason
from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import ModelNotFound
from forebay.testing.calls import ask, message
from forebay.testing.scripted import ScriptedEngine

OLLAMAS, LMSTUDIOS = "llama3.2:3b-instruct-q4_K_M", "lmstudio-community/Llama-3.2-3B-Instruct-Q4_K_M-GGUF"
MLXS = "mlx-community/Llama-3.2-3B-Instruct-4bit"


def engine(name: str, *models: str) -> ScriptedEngine:
    return ScriptedEngine(name=name, models=models)


def chat(model: str, *texts: str) -> pb.GenerateRequest:
    request = pb.GenerateRequest(model=model)
    for place, text in enumerate(texts):
        request.messages.append(message(text))
        request.messages[-1].role = pb.ROLE_ASSISTANT if place % 2 else pb.ROLE_USER
    return request


async def explain(mesh: Mesh, request: pb.GenerateRequest) -> list[fleet_pb2.Candidate]:
    answer = await mesh.control.ExplainRoute(fleet_pb2.ExplainRouteRequest(request=request))
    return list(answer.candidates)


async def test_one_name_is_served_by_each_framework_under_its_own(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("ollama", OLLAMAS), engine("lmstudio", LMSTUDIOS)) as mesh:
        told = await explain(mesh, ask(model=OLLAMAS))
        assert {(each.backend, each.model, each.match) for each in told} == {
            ("ollama", OLLAMAS, "exact"),
            ("lmstudio", LMSTUDIOS, "name"),
        }
        request = ask(model=OLLAMAS)
        request.routing.backends.append("lmstudio")
        started = (await mesh.generate(request))[0].started
        assert (started.backend, started.model, len(started.degradations)) == ("lmstudio", LMSTUDIOS, 0)


@pytest.mark.parametrize("like", [True, False])
async def test_another_quantisation_answers_only_where_it_may_and_says_so(tmp_path: Path, like: bool) -> None:
    async with Mesh(tmp_path, engine("mlx", MLXS), matching={"like": like}) as mesh:
        request = ask(model=OLLAMAS)
        with pytest.raises(grpc.aio.AioRpcError, match="its quantisation is 4bit") as caught:
            await mesh.generate(request)
        assert reason(caught.value) == ModelNotFound.reason
        request.accepted_degradations.append(pb.DEGRADATION_KIND_MODEL_SUBSTITUTED)
        if not like:
            with pytest.raises(grpc.aio.AioRpcError, match="no backend has a model"):
                await mesh.generate(request)
            return
        started = (await mesh.generate(request))[0].started
        assert started.model == MLXS
        assert [each.kind for each in started.degradations] == [pb.DEGRADATION_KIND_MODEL_SUBSTITUTED]
        [told] = await explain(mesh, request)
        assert (told.match, told.match_detail) == (
            "like",
            f"its quantisation is 4bit, and that of {OLLAMAS} is q4_k_m",
        )


async def test_matching_can_be_switched_off(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("lmstudio", LMSTUDIOS), matching={"automatic": False}) as mesh:
        with pytest.raises(grpc.aio.AioRpcError, match="no backend has a model"):
            await mesh.generate(ask(model=OLLAMAS))


async def test_a_conversation_stays_where_it_was_read(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a", "m"), engine("b", "m"), engine("c", "m")) as mesh:
        for number in range(6):
            texts = [f"conversation {number}"]
            places = set()
            for turn in range(4):
                request = chat("m", *texts)
                if turn:
                    told = await explain(mesh, request)
                    assert told[0].scores["affinity"] > 0.0
                    assert [each.scores["affinity"] for each in told[1:]] == [0.0, 0.0]
                places.add((await mesh.generate(request))[0].started.backend)
                texts += [f"reply {turn}", f"question {turn}"]
            assert len(places) == 1, f"conversation {number}"


async def test_what_was_measured_is_shown_and_outlives_the_process(tmp_path: Path) -> None:
    state = {"performance": {"state_dir": str(tmp_path / "state")}}
    (tmp_path / "one").mkdir()
    async with Mesh(tmp_path / "one", engine("a", "m"), **state) as mesh:  # type: ignore[arg-type]  # settings
        for _ in range(3):
            await mesh.generate(ask(model="m"))
        before = (await mesh.control.ListBackends(fleet_pb2.ListBackendsRequest())).backends[0]
        [measured] = before.performance
        assert (measured.model, measured.call_count, measured.error_ratio) == ("m", 3, 0.0)
        assert measured.first_deltas[0].call_count == 3
        assert before.share == 1.0
    (tmp_path / "two").mkdir()
    async with Mesh(tmp_path / "two", engine("a", "m"), **state) as mesh:  # type: ignore[arg-type]  # settings
        after = (await mesh.control.ListBackends(fleet_pb2.ListBackendsRequest())).backends[0]
        assert list(after.performance) == [measured]
