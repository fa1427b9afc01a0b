"""One worker process: started, spoken to over a unix socket, and gone when its block ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import grpc.aio
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect
from forebay.kit.failure import BackendUnavailable, printable
from forebay.kit.process import STDIN_VARIABLE
from forebay.kit.relay import is_cancelled_here
from forebay.mlx.v1 import worker_pb2 as worker_pb
from forebay.mlx.v1 import worker_pb2_grpc
from forebay.mlx_service.tool import Tail, read_lines
from forebay.models.v1 import models_pb2_grpc

if TYPE_CHECKING:
    from forebay.inference.v1.inference_pb2_grpc import InferenceServiceAsyncStub
    from forebay.mlx.v1.worker_pb2_grpc import WorkerServiceAsyncStub
    from forebay.models.v1.models_pb2_grpc import ModelServiceAsyncStub

logger = logging.getLogger(__name__)

LOAD_FAILED = 3
"""Exit code of a worker that could not load its model; any other end is a crash."""

_SOCKET_BYTES = 100
"""Longest path of a unix socket that every system takes (`sockaddr_un` holds 104 bytes on macOS)."""

_ENVIRONMENT = {STDIN_VARIABLE: "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
"""Variables that every worker gets, whatever is configured."""

_DESCRIBE_TIMEOUT = 2.0
"""Seconds a worker gets to describe its model. A busy one answers late, and what it said before will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a worker is to load, and how."""

    model_id: str
    folder: Path
    context_token_count: int | None = None
    memory_limit: int = 0
    """Bytes that its weights and requests may take. 0 is what the machine has."""


class Worker(Protocol):
    """A worker process, as its supervisor sees it."""

    pid: int

    @property
    def stub(self) -> InferenceServiceAsyncStub:
        """Where it takes calls."""

    @property
    def models(self) -> ModelServiceAsyncStub:
        """Where its adapters are loaded and unloaded."""

    @property
    def exit_code(self) -> int | None:
        """How it ended; negative is the signal. None while it runs."""

    @property
    def channel(self) -> grpc.aio.Channel:
        """Leads to it."""

    def tail(self) -> tuple[str, ...]:
        """Returns what it said last on stderr."""

    def is_stopped(self) -> bool:
        """Returns whether the system has stopped it, as SIGSTOP does, so that it cannot do anything."""

    async def is_well(self, timeout: float) -> bool:
        """Returns whether it says within so many seconds that it serves."""

    async def describe(self) -> pb.Model | None:
        """Returns its model as it is loaded, or None if it does not say so soon."""

    async def adjust(self, limit: int | None) -> worker_pb.AdjustResponse | None:
        """Sets what memory it may take; None changes nothing. Returns what it takes, if it says so soon."""

    async def stop(self, grace: float) -> None:
        """Asks it to end, kills it if it does not within so many seconds, and returns when it is gone."""


Launch: TypeAlias = Callable[[Spec, Callable[[], None]], AbstractAsyncContextManager[Worker]]
"""Starts a worker for the length of a block. The second argument is called when the worker ends by itself."""


class WorkerProcess:
    """A worker that is a process of this machine.

    Args:
        process: the process.
        channel: leads to it.
        on_exit: is called when it ends.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, channel: grpc.aio.Channel, on_exit: Callable[[], None]
    ) -> None:
        self.pid = process.pid
        self.is_bound = False
        """Whether its socket is there. Connecting too early fails, and then gRPC waits before it retries."""
        self.stub: InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._control: WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        self.models: ModelServiceAsyncStub = models_pb2_grpc.ModelServiceStub(channel)
        self.tail = Tail()
        self._check: grpc.aio.UnaryUnaryMultiCallable[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ] = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # stubs know no health stub
        self._process = process
        self._channel = channel
        self._is_closed = False
        self._on_exit = on_exit

    def __repr__(self) -> str:
        return f"<Worker pid {self.pid}{'' if self.exit_code is None else f' ended {self.exit_code}'}>"

    @property
    def exit_code(self) -> int | None:
        """How it ended; negative is the signal. None while it runs."""
        return self._process.returncode

    @property
    def channel(self) -> grpc.aio.Channel:
        """Leads to it.

        Raises:
            BackendUnavailable: it has ended. A stub that is made on a closed channel aborts this process.
        """
        if self._is_closed:
            raise BackendUnavailable("this model's worker has ended")
        return self._channel

    def is_stopped(self) -> bool:
        """Returns whether the system has stopped it. A debugger may hold it: that is another state."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:  # it has ended
            return False

    async def is_well(self, timeout: float) -> bool:
        """Returns whether it says within so many seconds that it serves."""
        if not self.is_bound:
            return False
        try:
            answer = await self._check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return False
        except asyncio.CancelledError:
            if is_cancelled_here():
                raise
            return False  # the channel was closed because the process ended
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def describe(self) -> pb.Model | None:
        """Returns its model as it is loaded, or None if it does not say so soon."""
        try:
            answer = await self.stub.ListModels(pb.ListModelsRequest(), timeout=_DESCRIBE_TIMEOUT)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return None
        except asyncio.CancelledError:
            if is_cancelled_here():
                raise
            return None
        return answer.models[0] if answer.models else None

    async def adjust(self, limit: int | None) -> worker_pb.AdjustResponse | None:
        """Sets what memory it may take; None changes nothing. Returns what it takes, if it says so soon."""
        try:
            return await self._control.Adjust(
                worker_pb.AdjustRequest(limit_bytes=limit), timeout=_DESCRIBE_TIMEOUT
            )
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return None
        except asyncio.CancelledError:
            if is_cancelled_here():
                raise
            return None

    async def stop(self, grace: float) -> None:
        """Asks it to end, kills it if it does not within so many seconds, and returns when it is gone."""
        await self._close()
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await self._process.wait()
        except TimeoutError:
            logger.warning("worker %d did not end within %gs and is killed", self.pid, grace)
            self._signal(signal.SIGKILL)
            await self._process.wait()

    async def watch(self) -> None:
        """Waits for its end. Whatever is still asked of it then fails at once."""
        await self._process.wait()
        await self._close()
        self._on_exit()

    async def _close(self) -> None:
        self._is_closed = True
        await self._channel.close()

    def kill(self) -> None:
        """Ends it at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


class Launcher:
    """Starts worker processes, with their sockets in a folder that nobody else can enter.

    Args:
        name: name of the backend, which workers put into their answers.
        arguments: command-line arguments that all workers get.
        environment: variables that all workers get.
        grace: seconds a worker may take to end before it is killed.
        command: program that is a worker.
        more: returns arguments that one worker gets.
    """

    def __init__(
        self,
        *,
        name: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        grace: float,
        command: Sequence[str] = (sys.executable, "-m", "forebay.mlx_service.worker"),
        more: Callable[[Spec], Sequence[str]] = lambda _: (),
    ) -> None:
        self._more = more
        self._name = name
        self._arguments = tuple(arguments)
        self._environment = dict(environment or {})
        self._grace = grace
        self._command = tuple(command)
        self._more = more
        self._numbers = itertools.count(1)
        self._sockets = _private_folder()

    def close(self) -> None:
        """Removes the sockets' folder."""
        shutil.rmtree(self._sockets, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def __call__(self, spec: Spec, on_exit: Callable[[], None]) -> AsyncIterator[Worker]:
        """Starts a worker and makes sure that it is gone when the block ends."""
        socket = self._sockets / f"{next(self._numbers)}.sock"
        argv = [*self._command, *self._arguments_for(spec, socket)]
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,  # its end is how a worker learns that we are gone, however we went
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment, **_ENVIRONMENT},
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle: calls end before workers do
        )
        assert process.stdout is not None
        assert process.stderr is not None
        worker = WorkerProcess(process, connect(f"unix:{socket}"), on_exit)
        logger.info("worker %d starts for %s", worker.pid, spec.model_id)

        def on_line(line: str) -> None:
            worker.tail.add(line)
            sys.stderr.write(f"{printable(line)}\n")  # it is a log line already

        def on_output(line: str) -> None:
            worker.is_bound = worker.is_bound or " listening on " in line

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(read_lines(process.stdout, on_output))
                tasks.create_task(read_lines(process.stderr, on_line))
                tasks.create_task(worker.watch())
                try:
                    yield worker
                except BaseException:
                    worker.kill()  # there may be no time for manners
                    raise
                finally:
                    await worker.stop(self._grace)
        finally:
            worker.kill()  # a second cancellation may have broken off the wait above
            socket.unlink(missing_ok=True)

    def _arguments_for(self, spec: Spec, socket: Path) -> list[str]:
        argv = ["--model", str(spec.folder), "--model-id", spec.model_id]
        argv += ["--address", f"unix:{socket}", "--name", self._name, *self._arguments]
        if spec.context_token_count is not None:
            argv += ["--context", str(spec.context_token_count)]
        if spec.memory_limit:
            argv += ["--memory-ceiling", str(spec.memory_limit)]
        return [*argv, *self._more(spec)]


def _private_folder() -> Path:
    """Returns a new folder for sockets. It is its owner's alone: who reaches a socket can use the model."""
    folder = Path(tempfile.mkdtemp(prefix="forebay-mlx-"))
    if len(os.fsencode(folder)) + len("/999999.sock") <= _SOCKET_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="forebay-mlx-", dir="/tmp"))
