"""The worker as a process: it serves over its socket, and ends cleanly whatever happens around it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc

pytestmark = pytest.mark.mlx

pytest.importorskip("mlx.core", reason="MLX has no build for this machine")

SECONDS = 40.0


@dataclass
class Worker:
    process: asyncio.subprocess.Process
    socket: Path
    channel: grpc.aio.Channel

    @property
    def stub(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)  # type: ignore[return-value]  # one class for both

    async def ready(self) -> None:
        watch = health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(SECONDS):
            async for update in watch:
                if update.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        watch.cancel()

    async def code(self) -> int:
        async with asyncio.timeout(SECONDS):
            return await self.process.wait()

    async def errors(self) -> list[str]:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode().splitlines()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def worker(model: Path, *arguments: str) -> AsyncIterator[Worker]:
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        socket = Path(folder) / "w.sock"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "forebay.mlx_service.worker", "--model", str(model), "--model-id", "m"),
            *("--address", f"unix:{socket}", "--grace", "5", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert process.stdout is not None
        async with asyncio.timeout(SECONDS):
            line = (await process.stdout.readline()).decode()
        if line:
            assert line == f"forebay mlx-worker listening on unix:{socket}\n"
        channel = grpc.aio.insecure_channel(f"unix:{socket}")
        try:
            yield Worker(process, socket, channel)
        finally:
            await channel.close()
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            assert process.stdin is not None
            process.stdin.close()


def request(most: int, text: str = "hi") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="m",
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
        sampling=pb.Sampling(temperature=0),
        limits=pb.GenerationLimits(max_output_token_count=most),
    )


async def test_it_serves_only_once_the_model_is_loaded_and_ends_with_0_on_sigterm(model: Path) -> None:
    async with worker(model) as running:
        assert running.socket.stat().st_mode & 0o077 == 0
        await running.ready()
        kinds = [event.WhichOneof("event") async for event in running.stub.Generate(request(5))]
        assert (kinds[0], kinds[-1]) == ("started", "finished")
        (listed,) = (await running.stub.ListModels(pb.ListModelsRequest())).models
        assert (listed.id, listed.slot_count, listed.loaded_context_token_count) == ("m", 8, 2048)
        running.process.send_signal(signal.SIGTERM)
        assert await running.code() == 0
        assert not running.socket.exists()


async def test_a_stop_lets_a_reply_end_and_then_exits_with_0(model: Path) -> None:
    async with worker(model) as running:
        await running.ready()
        call = running.stub.Generate(request(300))
        assert (await call.read()).WhichOneof("event") == "started"
        running.process.send_signal(signal.SIGTERM)
        last = pb.GenerateResponse()
        while (event := await call.read()) is not grpc.aio.EOF:
            last = event
        assert last.finished.usage.output_token_count == 300
        assert await running.code() == 0


async def test_it_ends_with_0_when_its_parent_lets_go_of_it(model: Path) -> None:
    async with worker(model) as running:
        await running.ready()
        call = running.stub.Generate(request(2000))
        await call.read()
        call.cancel()
        assert running.process.stdin is not None
        running.process.stdin.close()
        assert await running.code() == 0


async def test_it_ends_when_its_parent_is_another_than_said(model: Path) -> None:
    async with worker(model, "--parent-pid", "1") as running:
        assert await running.code() == 0


async def test_a_stop_while_it_loads_exits_with_0(model: Path) -> None:
    async with worker(model) as running:
        running.process.send_signal(signal.SIGTERM)
        assert await running.code() == 0


@pytest.mark.parametrize("broken", ["no config", "no tokenizer", "weights do not fit"])
async def test_a_model_that_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, broken: str) -> None:
    tiny_models.build_random(tmp_path / "m")
    if broken == "no config":
        (tmp_path / "m" / "config.json").unlink()
    elif broken == "no tokenizer":
        (tmp_path / "m" / "tokenizer.json").write_text("{")
    else:
        config = (tmp_path / "m" / "config.json").read_text()
        (tmp_path / "m" / "config.json").write_text(
            config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
        )
    async with worker(tmp_path / "m") as running:
        assert await running.code() == 3
        last = (await running.errors())[-1]
    assert last.startswith("forebay mlx-worker: ")
    assert "m" in last


async def test_a_wrong_setting_is_a_usage_error(model: Path) -> None:
    async with worker(model, "--address", "0.0.0.0:0") as running:
        assert await running.code() == 64
        assert "insecure_listen" in (await running.errors())[-1]


async def test_an_address_that_is_taken_is_said(model: Path, tmp_path: Path) -> None:
    async with worker(model, "--address", f"unix:{tmp_path}/no/such/folder/w.sock") as running:
        assert await running.code() == 69


async def test_a_caller_that_leaves_frees_its_place(model: Path) -> None:
    async with worker(model, "--max-rows", "1", "--queue", "0") as running:
        await running.ready()
        call = running.stub.Generate(request(2000))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.stub.Generate(request(1)).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        call.cancel()
        async with asyncio.timeout(10):
            while (last := await attempt(running)) is grpc.StatusCode.RESOURCE_EXHAUSTED:
                await asyncio.sleep(0.01)
        assert last == "finished"


async def attempt(running: Worker) -> grpc.StatusCode | str | None:
    try:
        return [event async for event in running.stub.Generate(request(1))][-1].WhichOneof("event")
    except grpc.aio.AioRpcError as error:
        return error.code()


async def test_a_context_can_be_set_and_is_never_more_than_the_model_has(model: Path) -> None:
    for wanted, served in (("100", 100), ("100000", 2048)):
        async with worker(model, "--context", wanted) as running:
            await running.ready()
            (listed,) = (await running.stub.ListModels(pb.ListModelsRequest())).models
            assert listed.loaded_context_token_count == served


async def test_an_engine_that_is_stuck_turns_health_off(model: Path) -> None:
    async with worker(model, "--stall-limit", "0") as running:
        await running.ready()
        call = running.stub.Generate(request(1900))
        watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(SECONDS):
            async for update in watch:
                if update.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    break
        watch.cancel()
        call.cancel()


def test_importing_mlx_lowers_no_limit_of_the_process() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    import forebay.mlx_service.worker.runtime  # noqa: F401

    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


async def test_a_model_that_exceeds_the_ceiling_is_not_loaded(model: Path) -> None:
    async with worker(model, "--memory-ceiling", "1000") as running:
        assert await running.code() == 3
        assert "memory_ceiling is 1000" in (await running.errors())[-1]


async def test_what_was_read_before_is_found_through_the_process(model: Path) -> None:
    async with worker(model, "--prefix-cache", str(1 << 20)) as running:
        await running.ready()
        asked = request(2)
        asked.messages[0].parts[0].text = "a text that is long enough to be found again " * 3
        counts = []
        for _ in range(2):
            events = [event async for event in running.stub.Generate(asked)]
            counts.append(events[-1].finished.usage.cached_token_count)
        assert counts[0] == 0
        assert counts[1] > 32
