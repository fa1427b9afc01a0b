"""Routers that speak `mlx.grpc.engine.MlxEngine` get from the service what they ask for."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc as rpc
from forebay.kit.config import ServerSettings
from forebay.kit.failure import from_rpc_error
from forebay.kit.server import serving
from forebay.mlx_service import smg, smg_api
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.process import WorkerProcess
from forebay.mlx_service.service import model_arguments
from forebay.mlx_service.smg_api import SERVICE, WORKER_FLAG, Api
from forebay.mlx_service.supervisor import State
from forebay.mlx_service.worker import smg as worker_smg
from forebay.testing.processes import ServiceProcess
from mlx_worker_rig import Rig, rig

messages = pytest.importorskip(
    "smg_grpc_proto.generated.mlx_engine_pb2", reason="smg-grpc-proto is not installed"
)
services = pytest.importorskip("smg_grpc_proto.generated.mlx_engine_pb2_grpc")
common = pytest.importorskip("smg_grpc_proto.generated.common_pb2")

pytestmark = pytest.mark.mlx

API = Api(messages, services, common)
CONTEXT = 512


@dataclass
class Running:
    rig: Rig
    stub: object
    channel: grpc.aio.Channel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("smg") / "tiny", plain=True)


@asynccontextmanager
async def serve(model: Path, **options: object) -> AsyncIterator[Running]:
    """Serves the interface as a worker does, in this process."""
    settings = ServerSettings(address="127.0.0.1:0", grace="0s", notice="0s")
    async with rig(model, context=CONTEXT, **options) as running:  # type: ignore[arg-type]  # a test's shorthand
        more = [worker_smg.register(API, *running.service.parts)]
        async with (
            serving(settings, inference=running.service, more=more) as up,
            grpc.aio.insecure_channel(up.address) as channel,
        ):
            yield Running(running, services.MlxEngineStub(channel), channel)


def ask(*tokens: int, stream: bool = True, id_: str = "r", **sampling: object):
    sampling.setdefault("temperature", 0.0)
    sampling.setdefault("max_tokens", 8)
    stops = sampling.pop("stop_token_ids", ())
    params = messages.SamplingParams(**{k: v for k, v in sampling.items() if v is not None})
    params.stop_token_ids.extend(stops)
    prompt = messages.TokenizedInput(input_ids=tokens or (5, 6, 7))
    return messages.GenerateRequest(request_id=id_, tokenized=prompt, sampling_params=params, stream=stream)


async def replies(running: Running, request) -> list:
    async with asyncio.timeout(60):
        return [event async for event in running.stub.Generate(request)]


def ids(events: list) -> list[int]:
    return [token for event in events for token in event.chunk.token_ids]


async def our_tokens(running: Running, text: str, most: int) -> tuple[list[int], list[int]]:
    """Returns a prompt's tokens and those of its reply, by our own interface."""
    prompt = await running.rig.words.prompt([pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])], ())
    request = pb.GenerateRequest(
        model="tiny",
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
        sampling=pb.Sampling(temperature=0),
        limits=pb.GenerationLimits(max_output_token_count=most),
        include_token_ids=True,
    )
    return list(prompt.tokens), (await running.rig.generate(request)).token_ids


async def test_a_prompt_s_tokens_get_the_tokens_that_our_own_interface_gives(model: Path) -> None:
    async with serve(model) as running:
        prompt, expected = await our_tokens(running, "what then?", 8)
        events = await replies(running, ask(*prompt))
        assert ids(events) == expected
        assert [event.WhichOneof("response") for event in events[:-1]] == ["chunk"] * (len(events) - 1)
        complete = events[-1].complete
        assert (complete.finish_reason, complete.completion_tokens) == ("length", 8)
        assert complete.prompt_tokens == len(prompt)
        assert not complete.output_ids
        counts = [event.chunk.completion_tokens for event in events[:-1]]
        assert counts == sorted(counts)
        (whole,) = await replies(running, ask(*prompt, stream=False))
        assert list(whole.complete.output_ids) == expected
        seeded = [ids(await replies(running, ask(temperature=1.5, seed=3))) for _ in range(2)]
        assert seeded[0] == seeded[1]
        unset = ask(temperature=None, max_tokens=None)
        unset.sampling_params.stop_token_ids.extend(range(300))
        assert (await replies(running, unset))[-1].complete.finish_reason == "stop"


async def test_a_stop_token_ends_the_reply_and_is_named(model: Path) -> None:
    async with serve(model) as running:
        full = ids(await replies(running, ask(max_tokens=12)))
        stop = full[5]
        events = await replies(running, ask(max_tokens=12, stop_token_ids=[stop]))
        assert ids(events) == full[: full.index(stop)]
        complete = events[-1].complete
        assert (complete.finish_reason, complete.matched_stop_token_id) == ("stop", stop)
        assert complete.completion_tokens == full.index(stop)


async def test_the_model_s_own_end_is_a_stop(tmp_path: Path) -> None:
    scripted = tiny_models.build_scripted(tmp_path / "tiny", ["one ", "two "])
    async with serve(scripted) as running:
        prompt, expected = await our_tokens(running, "x", 9)
        complete = (await replies(running, ask(*prompt, max_tokens=9)))[-1].complete
        assert complete.finish_reason == "stop"
        assert complete.completion_tokens == len(expected) == 2
        assert complete.matched_stop_token_id in running.rig.words.language.end_tokens


async def test_log_probabilities_come_with_their_tokens(model: Path) -> None:
    async with serve(model) as running:
        (whole,) = await replies(running, ask(stream=False, logprobs=3, max_tokens=4))
        said = whole.complete.output_logprobs
        assert list(said.token_ids) == list(whole.complete.output_ids)
        assert all(value <= 0 for value in said.token_logprobs)
        assert [len(top.token_ids) for top in said.top_logprobs] == [3] * 4
        assert said.top_logprobs[0].token_ids[0] == said.token_ids[0]  # greedy
        assert not (await replies(running, ask(stream=False)))[0].complete.HasField("output_logprobs")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda r: r.ClearField("tokenized"), "tokenized.input_ids"),
        (lambda r: setattr(r, "text", "hi"), "tokenized.input_ids"),
        (lambda r: r.tokenized.ClearField("input_ids"), "tokenized.input_ids"),
        (lambda r: r.tokenized.input_ids.append(1 << 31), "tokenized.input_ids"),
        (lambda r: setattr(r.sampling_params, "ignore_eos", True), "sampling_params.ignore_eos"),
        (lambda r: setattr(r.sampling_params, "max_tokens", 0), "sampling_params.max_tokens"),
        (lambda r: setattr(r.sampling_params, "temperature", -1.0), "sampling_params.temperature"),
        (lambda r: setattr(r.sampling_params, "temperature", float("nan")), "sampling_params.temperature"),
        (lambda r: setattr(r.sampling_params, "top_p", 1.5), "sampling_params.top_p"),
        (
            lambda r: setattr(r.sampling_params, "repetition_penalty", -1.0),
            "sampling_params.repetition_penalty",
        ),
        (lambda r: r.sampling_params.logit_bias.update({1 << 30: 1.0}), "sampling_params.logit_bias"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_field(model: Path, change, path: str) -> None:
    async with serve(model) as running:
        request = ask()
        change(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replies(running, request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert path in (caught.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replies(running, ask(max_tokens=CONTEXT))
        assert from_rpc_error(caught.value, backend="mlx").reason == "CONTEXT_EXCEEDED"


async def test_abort_ends_the_named_replies_and_frees_their_rows(model: Path) -> None:
    async with serve(model) as running:
        call = running.stub.Generate(ask(id_="a", max_tokens=400))
        other = running.stub.Generate(ask(id_="b", max_tokens=300))
        first = await call.read()
        assert first.HasField("chunk")
        await running.stub.Abort(messages.AbortRequest(request_ids=["a", "nobody"]))
        async with asyncio.timeout(60):
            while (event := await call.read()) is not grpc.aio.EOF:
                assert not event.HasField("complete")
            assert await call.code() is grpc.StatusCode.OK
            assert [event async for event in other][-1].complete.completion_tokens == 300
            while running.rig.engine.stats().live:
                await asyncio.sleep(0.01)


async def test_a_caller_that_leaves_or_is_late_frees_its_row(model: Path) -> None:
    async with serve(model) as running:
        call = running.stub.Generate(ask(max_tokens=500))
        await call.read()
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in running.stub.Generate(ask(max_tokens=500), timeout=0.05):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(60):
            while running.rig.engine.stats().live:
                await asyncio.sleep(0.01)


async def test_the_model_its_tokenizer_and_its_health_are_told(model: Path) -> None:
    async with serve(model) as running:
        info = await running.stub.GetModelInfo(messages.GetModelInfoRequest())
        assert (info.served_model_name, info.is_generation) == ("tiny", True)
        assert info.max_context_length == CONTEXT
        assert info.vocab_size == running.rig.engine.vocabulary_size
        assert (info.model_type, list(info.architectures)) == ("llama", ["LlamaForCausalLM"])
        assert set(info.eos_token_ids) == set(running.rig.words.language.end_tokens)
        config = json.loads((model / "config.json").read_text())
        assert info.bos_token_id == config["bos_token_id"]
        assert info.pad_token_id == 0
        server = await running.stub.GetServerInfo(messages.GetServerInfoRequest())
        assert (server.server_type, server.active_requests) == ("mlx-grpc", 0)
        assert server.uptime_seconds > 0
        health = await running.stub.HealthCheck(messages.HealthCheckRequest())
        assert (health.healthy, health.message) == (True, "active")
        chunks = [part async for part in running.stub.GetTokenizer(common.GetTokenizerRequest())]
        archive = b"".join(part.data for part in chunks)
        assert [bool(part.sha256) for part in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].sha256 == hashlib.sha256(archive).hexdigest()
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            assert set(files.namelist()) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
            assert files.read("tokenizer.json") == (model / "tokenizer.json").read_bytes()


async def test_while_the_model_is_loaded_it_is_not_healthy_and_calls_are_refused(model: Path) -> None:
    async with serve(model) as running:
        running.rig.engine.vocabulary_size = 0
        assert not (await running.stub.HealthCheck(messages.HealthCheckRequest())).healthy
        for call in (replies(running, ask()), running.stub.GetModelInfo(messages.GetModelInfoRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    values = {
        "address": "127.0.0.1:0",
        "model_folders": json.dumps([str(tmp_path / "models")]),
        "cache_dir": str(tmp_path / "cache"),
        "huggingface_cache": "false",
        "ollama_models": "false",
        "fetch_default_model": "false",
        "preload": "[]",
        "default_model": "tiny",
        "restart_backoff_min": "0s",
        "health_timeout": "30s",
        **more,
    }
    return {f"FOREBAY_MLX__{key.upper()}": value for key, value in values.items()}


async def test_the_service_loads_the_model_for_the_first_call_and_passes_all_on(tmp_path: Path) -> None:
    tiny_models.build_random(tmp_path / "models" / "tiny", plain=True)
    async with (
        ServiceProcess("forebay.mlx_service", environment=environment(tmp_path), folder=tmp_path) as process,
        grpc.aio.insecure_channel(process.address) as channel,
    ):
        running = Running(rig=None, stub=services.MlxEngineStub(channel), channel=channel)  # type: ignore[arg-type]  # it is in another process
        health = await running.stub.HealthCheck(messages.HealthCheckRequest())
        assert (health.healthy, health.message) == (True, "available")
        await running.stub.Abort(messages.AbortRequest(request_ids=["a"]))
        watched = health_pb2.HealthCheckRequest(service=SERVICE)
        assert (await health_pb2_grpc.HealthStub(channel).Check(watched)).status == 1
        events = await replies(running, ask(max_tokens=20))
        assert events[-1].complete.completion_tokens == 20
        assert (await running.stub.GetModelInfo(messages.GetModelInfoRequest())).vocab_size > 0
        assert (await running.stub.GetServerInfo(messages.GetServerInfoRequest())).uptime_seconds > 0
        assert [part async for part in running.stub.GetTokenizer(common.GetTokenizerRequest())]
        await running.stub.Abort(messages.AbortRequest(request_ids=["a"]))
        assert (await running.stub.HealthCheck(messages.HealthCheckRequest())).message == "active"
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # what the worker says passes through
            await replies(running, ask(max_tokens=100_000))
        assert from_rpc_error(caught.value, backend="mlx").reason == "CONTEXT_EXCEEDED"
        (listed,) = (await rpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())).models
        assert listed.state == pb.Model.STATE_ACTIVE


class LostWorker:
    """An engine whose worker is nowhere."""

    def __init__(self, worker: WorkerProcess, state: State) -> None:
        self._worker = worker
        self._state = state

    @asynccontextmanager
    async def leased(self, name: str) -> AsyncIterator[WorkerProcess]:
        yield self._worker

    def residence(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(state=self._state, detail="it crashed", usable=object())


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_lost_worker_is_unavailable_and_a_model_that_failed_is_not_healthy(is_known: bool) -> None:
    """Whether or not its end has been noticed. A stub on a channel that is closed would abort the process."""
    settings = ServerSettings(address="127.0.0.1:0", grace="0s", notice="0s")
    async with grpc.aio.insecure_channel("127.0.0.1:1") as nowhere:
        worker = WorkerProcess(await asyncio.create_subprocess_exec("true"), nowhere, lambda: None)
        if is_known:
            await worker.watch()
        engine = LostWorker(worker, State.QUARANTINED)
        more = [smg.register(API, engine, "tiny", "mlx")]  # type: ignore[arg-type]  # all of it that is used
        async with serving(settings, more=more) as up, grpc.aio.insecure_channel(up.address) as channel:
            stub = services.MlxEngineStub(channel)
            health = await stub.HealthCheck(messages.HealthCheckRequest())
            assert (health.healthy, health.message) == (False, "quarantined: it crashed")
            running = Running(rig=None, stub=stub, channel=channel)  # type: ignore[arg-type]  # there is none
            for call in (replies(running, ask()), stub.Abort(messages.AbortRequest())):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        if not is_known:
            await worker.watch()


def test_without_the_package_or_with_one_that_does_not_fit_the_interface_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert smg_api.api() is not None
    monkeypatch.setattr(
        smg_api.importlib, "import_module", lambda name: (_ for _ in ()).throw(RuntimeError("old"))
    )
    assert smg_api.api() is None
    assert "is not served: old" in caplog.text
    monkeypatch.setattr(smg_api.importlib.util, "find_spec", lambda name: None)
    assert smg_api.api() is None


def test_only_the_worker_of_its_model_serves_the_interface() -> None:
    settings = MlxSettings.model_validate({"default_model": "a", "aliases": {"chat": "b"}})
    assert model_arguments(settings, "a", API) == [WORKER_FLAG]
    assert model_arguments(settings, "b", API) == []
    assert model_arguments(settings, "a", None) == []
    named = MlxSettings.model_validate({"smg_model": "chat", "aliases": {"chat": "b"}})
    assert model_arguments(named, "b", API) == [WORKER_FLAG]
    assert MlxSettings.model_validate({"smg_model": ""}).smg == ""
