"""A whole mesh in one process, over real gRPC: scripted backends, an orchestrator before them, a client."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc.aio
from google.rpc import status_pb2

from forebay.fleet.v1 import fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect
from forebay.kit.config import ServerSettings
from forebay.kit.failure import from_status
from forebay.kit.server import Serving, serving
from forebay.kit.telemetry import Telemetry
from forebay.models.v1 import models_pb2_grpc
from forebay.orchestrator.build import Orchestrator
from forebay.orchestrator.config import OrchestratorSettings
from forebay.testing.scripted import ScriptedEngine

WAIT_SECONDS = 20.0
"""Longest wait for something that is due within a second or two; only a hang takes as long."""

QUICK = {"grace": "1s", "notice": "0s"}


class Backend:
    """A scripted backend that can be stopped and started anew at the same address."""

    def __init__(self, engine: ScriptedEngine, address: str) -> None:
        self.engine = engine
        self.address = address
        self.up: Serving | None = None
        self._stack = AsyncExitStack()

    async def start(self, *, ready: bool = True) -> None:
        settings = ServerSettings.model_validate({"address": self.address, **QUICK})
        self.up = await self._stack.enter_async_context(
            serving(settings, inference=self.engine, models=self.engine)
        )
        await self.up.set_ready(ready)

    async def stop(self) -> None:
        await self._stack.aclose()
        self.up = None


class Mesh:
    """Starts everything on `async with`, and stops it after.

    Args:
        folder: for the backends' sockets.
        engines: the backends; their names are the endpoints' names too.
        absent: names of backends that are not started yet.
        backend: settings of every backend.
        telemetry: of the orchestrator.
        settings: settings of the orchestrator.
    """

    def __init__(
        self,
        folder: Path,
        *engines: ScriptedEngine,
        absent: tuple[str, ...] = (),
        backend: dict[str, object] | None = None,
        telemetry: Telemetry | None = None,
        **settings: object,
    ) -> None:
        self.backends = {engine.name: Backend(engine, f"unix:{folder}/{engine.name}") for engine in engines}
        self._absent = absent
        self._telemetry = telemetry
        self._settings = OrchestratorSettings.model_validate(
            {
                "address": "127.0.0.1:0",
                "probe": {"models_interval": "200ms"},
                "backends": [
                    {"name": name, "address": each.address, **(backend or {})}
                    for name, each in self.backends.items()
                ],
                **QUICK,
                **settings,
            }
        )
        self._stack = AsyncExitStack()

    def __getitem__(self, name: str) -> Backend:
        return self.backends[name]

    async def __aenter__(self) -> Self:
        for name, backend in self.backends.items():
            self._stack.push_async_callback(backend.stop)
            if name not in self._absent:
                await backend.start()
        self.orchestrator = Orchestrator(self._settings, source=random.Random(0), telemetry=self._telemetry)
        self.fleet = await self._stack.enter_async_context(self.orchestrator.fleet)
        self.up = await self._stack.enter_async_context(
            serving(
                self._settings,
                inference=self.orchestrator.inference,
                models=self.orchestrator.models,
                more=[self.orchestrator.register],
                model_required=False,
                telemetry=self._telemetry,
            )
        )
        await self.up.set_ready(True)
        self.address = self.up.address
        channel = await self._stack.enter_async_context(connect(self.up.address))
        self.client = inference_pb2_grpc.InferenceServiceStub(channel)
        self.models = models_pb2_grpc.ModelServiceStub(channel)
        self.control = fleet_pb2_grpc.FleetServiceStub(channel)
        for name in self.backends:
            if name not in self._absent:
                await self.until(lambda name=name: bool(self.fleet[name].models))  # type: ignore[misc]  # bound
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits until something holds."""
        await until(holds, lambda: repr(self.fleet))

    async def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        """Returns a whole reply."""
        return [event async for event in self.client.Generate(request, timeout=WAIT_SECONDS)]


async def until(
    holds: Callable[[], bool], show: Callable[[], str] = lambda: "", *, seconds: float = WAIT_SECONDS
) -> None:
    """Waits until something holds, with a bound."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not holds():
        assert loop.time() < end, f"did not come true: {show()}"
        await asyncio.sleep(0.005)


def reason(error: grpc.aio.AioRpcError) -> str:
    """Returns the reason in an error's details."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    failure = from_status(status)
    return failure.reason if failure is not None else ""
