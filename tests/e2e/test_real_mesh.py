"""The whole mesh, with the real default model, as a newcomer and as an accident meets it.

One `forebay up` serves all tests of this module: processes of their own for the
orchestrator, mlx-service and its worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.client import CallError, Client, client
from forebay.testing.processes import ServiceProcess

pytestmark = [pytest.mark.mlx, pytest.mark.model, pytest.mark.timeout(300)]

pytest.importorskip("mlx.core", reason="MLX has no build for this machine")

MODEL = "smollm2-135m-instruct"
PATIENCE = 5
"""How many times 0.1 s a machine that runs other things too may take longer than it does by itself."""
QUESTION = "What is the capital of France?"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def configuration(folder: Path) -> tuple[Path, str]:
    orchestrator, mlx = free_ports(2)
    path = folder / "forebay.toml"
    path.write_text(
        f'[up]\nservices = ["mlx", "orchestrator"]\n'
        f'[mlx]\naddress = "127.0.0.1:{mlx}"\n'
        f'[orchestrator]\naddress = "127.0.0.1:{orchestrator}"\n'
        f'[[orchestrator.backends]]\nname = "mlx"\nframework = "mlx"\naddress = "127.0.0.1:{mlx}"\n'
    )
    return path, f"127.0.0.1:{orchestrator}"


class Mesh:
    """A running `forebay up`."""

    def __init__(self, config: Path, address: str, up: subprocess.Popen[bytes]) -> None:
        self.config = config
        self.address = address
        self.up = up

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.up.pid).children(recursive=True)

    def worker(self) -> psutil.Process | None:
        for process in self.family():
            try:
                if "forebay.mlx_service.worker" in process.cmdline() and process.status() != "zombie":
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    async def new_worker(self, old: int, *, within: float) -> psutil.Process:
        async with asyncio.timeout(within):
            while (found := self.worker()) is None or found.pid == old:
                await asyncio.sleep(0.05)
        return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def start(config: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "forebay.cli", "up", "--config", str(config), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    config, address = configuration(folder)
    up = start(config, folder / "log")
    running = Mesh(config, address, up)
    try:
        until = time.monotonic() + 180
        while f"forebay is up on {address}" not in (folder / "log").read_text():
            assert up.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.1)
        yield running
        family = running.family()
        os.kill(up.pid, signal.SIGINT)
        assert up.wait(60) == 0, (folder / "log").read_text()
        assert [process for process in family if process.is_running()] == []
    finally:
        for process in [*([] if up.poll() is not None else running.family())]:
            process.kill()
        up.kill()


@pytest.fixture
async def caller(mesh: Mesh) -> AsyncIterator[Client]:
    async with client(mesh.address, timeout=120) as found:
        # A test before this one may have killed the worker: the fleet must have it back first.
        await found.text(ask("Hi", 1))
        yield found


def ask(text: str = QUESTION, most: int = 200) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
        sampling=pb.Sampling(temperature=0),
        limits=pb.GenerationLimits(max_output_token_count=most),
    )


async def test_a_streamed_answer_from_a_real_model_names_paris(caller: Client) -> None:
    events = await caller.generate(ask())
    assert "Paris" in grammar.text(events)
    assert sum(1 for event in events if event.HasField("delta")) > 3
    started = next(event.started for event in events if event.HasField("started"))
    assert (started.backend, started.model, started.weights.size_label) == ("mlx", MODEL, "135M")
    finished = events[-1].finished
    assert finished.reason == pb.FINISH_REASON_STOP
    assert finished.usage.prompt_token_count > 10
    assert finished.usage.output_token_count > 3
    assert finished.timings.first_delta_duration.ToTimedelta().total_seconds() > 0


async def test_a_stranger_lists_services_and_calls_them_by_reflection(caller: Client, mesh: Mesh) -> None:
    async def buf(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "buf"),
            *("curl", "--protocol", "grpc", "--http2-prior-knowledge"),
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        return output.decode()

    listed = await buf("--list-services", f"http://{mesh.address}")
    for name in ("inference.v1.InferenceService", "models.v1.ModelService", "fleet.v1.FleetService"):
        assert f"forebay.{name}" in listed
    service = f"http://{mesh.address}/forebay.inference.v1.InferenceService"
    models = json.loads(await buf("-d", "{}", f"{service}/ListModels"))
    assert MODEL in [model["id"] for model in models["models"]]
    question = {
        "messages": [{"role": "ROLE_USER", "parts": [{"text": QUESTION}]}],
        "sampling": {"temperature": 0},
    }
    output = await buf("-d", json.dumps(question), f"{service}/Generate")
    events = [
        json.loads(text) for text in re.split(r"(?<=^\})\n", output, flags=re.MULTILINE) if text.strip()
    ]
    assert "Paris" in "".join(event.get("delta", {}).get("text", "") for event in events)
    assert "finished" in events[-1]


async def interrupted(caller: Client, mesh: Mesh, number: signal.Signals) -> tuple[str, CallError, float]:
    """Signals the worker after a few deltas; returns the text, the error and the seconds between."""
    text = ""
    deltas = 0
    events: list[pb.GenerateResponse] = []
    hit = 0.0
    async with caller.stream(ask("Count from one to one hundred in words.", 40)) as stream:
        try:
            async for event in stream:
                events.append(event)
                text += event.delta.text
                deltas += event.HasField("delta")
                if deltas == 3 and not hit:
                    worker = mesh.worker()
                    assert worker is not None
                    hit = time.monotonic()
                    worker.send_signal(number)
        except grpc.aio.AioRpcError as error:
            took = time.monotonic() - hit
            grammar.check(events, complete=False)
            return text, CallError(error, events), took
    raise AssertionError("the stream ended well")


async def test_killing_the_worker_leaves_a_strict_prefix_and_the_next_call_is_served(
    caller: Client, mesh: Mesh
) -> None:
    whole = await caller.text(ask("Count from one to one hundred in words.", 40))
    old = mesh.worker()
    assert old is not None
    text, error, took = await interrupted(caller, mesh, signal.SIGKILL)
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "STREAM_INTERRUPTED")
    print(f"the caller had the error {took * 1000:.0f} ms after the kill")
    assert took < 0.1 * PATIENCE
    assert whole.startswith(text)
    assert 0 < len(text) < len(whole)
    assert "Paris" in await caller.text(ask())
    assert (await mesh.new_worker(old.pid, within=30)).pid != old.pid


async def test_a_frozen_worker_is_an_error_within_three_seconds(caller: Client, mesh: Mesh) -> None:
    old = mesh.worker()
    assert old is not None
    text, error, took = await interrupted(caller, mesh, signal.SIGSTOP)
    assert error.code is grpc.StatusCode.ABORTED
    assert error.reason in {"STREAM_INTERRUPTED", "STREAM_STALLED"}
    assert text
    print(f"the caller had the error {took:.2f} s after the freeze")
    assert took < 3 + 0.1 * PATIENCE
    await mesh.new_worker(old.pid, within=30)
    assert "Paris" in await caller.text(ask())


async def test_a_caller_who_leaves_frees_the_row(caller: Client, mesh: Mesh) -> None:
    async with caller.stream(ask("Count from one to one hundred in words.", 200)) as stream:
        async for event in stream:
            if event.HasField("delta"):
                break
    worker = mesh.worker()
    assert worker is not None
    async with asyncio.timeout(10):  # a worker with nothing to do uses no processor
        while True:
            before = sum(worker.cpu_times()[:2])
            await asyncio.sleep(0.3)
            if sum(worker.cpu_times()[:2]) - before < 0.05:
                break


async def test_a_second_up_says_which_port_is_taken_and_by_what(mesh: Mesh, tmp_path: Path) -> None:
    second = start(mesh.config, tmp_path / "log")
    async with asyncio.timeout(30):
        code = await asyncio.to_thread(second.wait)
    said = (tmp_path / "log").read_text()
    assert code != 0
    assert re.search(rf"{re.escape(mesh.address)} is taken by forebay\.orchestrator \(pid \d+\)", said)
    assert "Traceback" not in said


async def test_a_drained_backend_takes_no_calls_until_it_is_resumed(caller: Client, mesh: Mesh) -> None:
    async def forebay(*arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "forebay.cli", *arguments, "--address", mesh.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment(),
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    assert (await forebay("drain", "mlx"))[0] == 0
    with pytest.raises(CallError) as caught:
        await caller.text(ask())
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert "mlx" in caught.value.details
    assert (await forebay("resume", "mlx"))[0] == 0
    code, said = await forebay("chat", QUESTION, "--temperature", "0")
    assert code == 0
    assert "Paris" in said


async def test_a_service_alone_starts_and_stops_cleanly(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text("[mlx]\npreload = []\n")
    async with ServiceProcess(
        "forebay.mlx_service", ["--address", "127.0.0.1:0", "--config", str(tmp_path / "f.toml")]
    ) as service:
        async with client(service.address) as caller:
            assert MODEL in [model.id for model in await caller.list_models()]
        assert await service.stop() == 0
