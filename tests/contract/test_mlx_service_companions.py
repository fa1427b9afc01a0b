"""Adapters and draft models through the MLX service: real processes, tiny models, real mlx."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc as rpc
from forebay.kit.channel import connect
from forebay.kit.failure import Failure, ModelLoadFailed, ModelNotFound, PermissionDenied, from_rpc_error
from forebay.mlx_service import requirements
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc as models_rpc
from forebay.testing import grammar
from forebay.testing.calls import ask
from forebay.testing.processes import ServiceProcess

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(bool(requirements.missing()), reason=requirements.missing()),
]

ACTIVE, AVAILABLE, FAILED = pb.Model.STATE_ACTIVE, pb.Model.STATE_AVAILABLE, pb.Model.STATE_FAILED


def service(tmp_path: Path, **settings: object) -> ServiceProcess:
    values = {
        "address": "127.0.0.1:0",
        "model_folders": json.dumps([str(tmp_path / "models")]),
        "cache_dir": str(tmp_path / "cache"),
        "huggingface_cache": "false",
        "fetch_default_model": "false",
        "preload": "[]",
        **{name: json.dumps(value) for name, value in settings.items()},
    }
    environment = {f"FOREBAY_MLX__{key.upper()}": str(value) for key, value in values.items()}
    return ServiceProcess("forebay.mlx_service", environment=environment, folder=tmp_path)


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = rpc.InferenceServiceStub(channel)
        self.manage = models_rpc.ModelServiceStub(channel)

    async def models(self) -> dict[str, pb.Model]:
        return {model.id: model for model in (await self.stub.ListModels(pb.ListModelsRequest())).models}

    async def generate(self, model: str, count: int = 30) -> list[pb.GenerateResponse]:
        request = ask("on and on and on and on", model=model, token_count=count)
        request.sampling.temperature = 0
        return [event async for event in self.stub.Generate(request)]

    async def load(self, model: str) -> models_pb.LoadModelResponse:
        return [event async for event in self.manage.LoadModel(models_pb.LoadModelRequest(model=model))][-1]

    async def failing(self, model: str) -> Failure:
        with pytest.raises(grpc.aio.AioRpcError) as found:
            await self.generate(model)
        return from_rpc_error(found.value, backend="mlx")


async def test_adapters_are_served_beside_their_base_model_by_one_worker(tmp_path: Path) -> None:
    from tiny_adapters import make_adapter

    base = tiny_models.build_random(tmp_path / "models" / "tiny", plain=True)
    good = make_adapter(tmp_path / "good", base, seed=1)
    wide = tiny_models.build_random(tmp_path / "wide", hidden=32)
    bad = make_adapter(tmp_path / "bad", wide, seed=1)
    adapters = [
        {"name": "good", "path": str(good), "base": "nick"},
        {"name": "bad", "path": str(bad), "base": "tiny"},
        {"name": "nowhere", "path": str(tmp_path / "no"), "base": "tiny"},
        {"name": "homeless", "path": str(good), "base": "gone"},
    ]
    settings = {"adapters": adapters, "aliases": {"nick": "tiny"}, "preload": ["good", "bad"]}
    async with service(tmp_path, **settings) as process, connect(process.address) as channel:
        client = Client(channel)
        async with asyncio.timeout(60):
            while (listed := await client.models())["good"].state != ACTIVE:
                await asyncio.sleep(0.05)
        states = {name: listed[name].state for name in ("bad", "nowhere", "homeless")}
        assert states == {"bad": AVAILABLE, "nowhere": FAILED, "homeless": FAILED}
        assert "gone" in listed["homeless"].detail
        assert str(tmp_path / "no") in listed["nowhere"].detail

        adapted, plain = await client.generate("good"), await client.generate("tiny")
        for events in (adapted, plain):
            grammar.check(events)
        assert grammar.text(adapted) != grammar.text(plain)
        assert len(psutil.Process(process.pid).children()) == 1
        listed = await client.models()
        assert listed["good"].state == listed["tiny"].state == ACTIVE
        started = next(event.started for event in adapted if event.WhichOneof("event") == "started")
        assert started.model == "good"
        assert listed["good"].weights.digest == started.weights.digest != listed["tiny"].weights.digest
        assert 0 < listed["good"].memory_bytes < listed["tiny"].memory_bytes

        failure = await client.failing("bad")
        assert isinstance(failure, ModelLoadFailed)
        assert str(bad / "adapters.safetensors") in failure.message
        assert isinstance(await client.failing("homeless"), ModelNotFound)

        unloaded = await client.manage.UnloadModel(models_pb.UnloadModelRequest(model="good"))
        assert unloaded.model.state == AVAILABLE
        assert (await client.models())["tiny"].state == ACTIVE
        assert (await client.load("good")).loaded.model.state == ACTIVE
        got = await client.manage.GetModel(models_pb.GetModelRequest(model="good"))
        assert got.model.state == ACTIVE
        assert grammar.text(await client.generate("good")) == grammar.text(adapted)
        with pytest.raises(grpc.aio.AioRpcError) as found:
            await client.load("bad")
        assert isinstance(from_rpc_error(found.value, backend="mlx"), ModelLoadFailed)
        with pytest.raises(grpc.aio.AioRpcError) as found:
            await client.manage.DeleteModel(models_pb.DeleteModelRequest(model="good"))
        assert isinstance(from_rpc_error(found.value, backend="mlx"), PermissionDenied)
        counted = pb.CountTokensRequest(model="good", messages=ask("hi", model="good").messages)
        assert (await client.stub.CountTokens(counted)).model == "good"

        await client.manage.UnloadModel(models_pb.UnloadModelRequest(model="tiny"))
        gone = await client.manage.UnloadModel(models_pb.UnloadModelRequest(model="good"))
        assert gone.model.state == AVAILABLE


async def test_a_draft_model_is_loaded_beside_its_model_or_said_to_be_unfit(tmp_path: Path) -> None:
    for name in ("tiny", "lost", "odd"):
        tiny_models.build_random(tmp_path / "models" / name, plain=True)
    tiny_models.build_random(tmp_path / "models" / "small", hidden=32, layers=1)
    tiny_models.build_scripted(tmp_path / "models" / "foreign", ["some", "other", "words"])
    drafts = {"tiny": "small", "lost": "gone", "odd": "foreign"}
    async with service(tmp_path, draft_models=drafts) as process, connect(process.address) as channel:
        client = Client(channel)
        finished = (await client.generate("tiny", 120))[-1].finished
        assert finished.usage.drafted_token_count > 0
        assert finished.usage.output_token_count == 120
        lost = await client.failing("lost")
        assert isinstance(lost, ModelLoadFailed)
        assert "draft_models" in lost.message
        odd = await client.failing("odd")
        assert isinstance(odd, ModelLoadFailed)
        assert "tokenizers differ" in odd.message
        assert "draft_models" in odd.message
