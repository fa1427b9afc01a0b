"""The command's own gRPC client: typed, cancels what it leaves, and trusts no stream.

Every stream is cancelled in a `finally`, since grpc.aio neither collects nor
cancels a call that nobody reads any more, and a forgotten one keeps a GPU
busy. Answers are checked for lost, repeated and reordered events while they
are read.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import grpc

from forebay.cli.problems import ExitCode, Problem, unreachable
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.fleet.v1 import fleet_pb2_grpc as fleet_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc as inference_grpc
from forebay.kit.channel import connect
from forebay.kit.failure import BrokenStream, StreamInterrupted, from_rpc_error
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc as models_grpc

if TYPE_CHECKING:  # the aliases exist in the stubs' type files only
    from forebay.fleet.v1.fleet_pb2_grpc import FleetServiceAsyncStub
    from forebay.inference.v1.inference_pb2_grpc import InferenceServiceAsyncStub
    from forebay.models.v1.models_pb2_grpc import ModelServiceAsyncStub

DEFAULT_ADDRESS = "127.0.0.1:50150"
"""Where an orchestrator listens unless it is told otherwise."""

CONTROL_TIMEOUT = 15.0
"""Seconds that a question about the mesh itself may take. A backend that has to be asked first is given
some seconds by the orchestrator, so this is longer than that and shorter than patience."""

TOKEN_VARIABLE = "FOREBAY_TOKEN"  # noqa: S105  # the variable's name, not a token
"""Environment variable with the bearer token to send."""

TLS_ROOTS_VARIABLE = "FOREBAY_TLS_ROOTS"
"""Environment variable that names a PEM file with the roots to trust; set, it asks for TLS."""

Handle: TypeAlias = Callable[[pb.GenerateResponse], None]
"""Is shown each event of an answer."""

T = TypeVar("T")


class StreamCheck:
    """Checks that the events of one answer are all there, once, in order."""

    def __init__(self) -> None:
        self.seen = 0
        """Events so far."""
        self.finished = False
        """Whether the last event said that the answer is complete."""
        self._started = False

    def see(self, event: pb.GenerateResponse) -> None:
        """Checks the next event.

        Raises:
            BrokenStream: an event is missing, repeated or out of order.
        """
        if event.sequence != self.seen:
            raise BrokenStream(f"event {self.seen} was expected and event {event.sequence} came")
        self.seen += 1
        if self.finished:
            raise BrokenStream("an event came after the end of the answer")
        kind = event.WhichOneof("event")
        if kind == "started":
            if self._started:
                raise BrokenStream("the answer began twice")
            self._started = True
        elif kind in ("delta", "continued", "finished") and not self._started:
            raise BrokenStream("the answer went on before it began")
        self.finished = kind == "finished"

    def end(self) -> None:
        """Checks that the stream may end here.

        Raises:
            BrokenStream: the answer is not complete.
        """
        if not self.finished:
            raise BrokenStream(f"the answer ended without its last event, after {self.seen} events")


class Client:
    """Calls one orchestrator, or one backend: both speak the same interface.

    Args:
        channel: where to. Its owner closes it.
        address: what the channel is connected to, for messages.
        token: bearer token that proves who asks. Empty is none.
    """

    def __init__(self, channel: grpc.aio.Channel, address: str, *, token: str = "") -> None:
        self.address = address
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._inference: InferenceServiceAsyncStub = inference_grpc.InferenceServiceStub(channel)
        self._models: ModelServiceAsyncStub = models_grpc.ModelServiceStub(channel)
        self._fleet: FleetServiceAsyncStub = fleet_grpc.FleetServiceStub(channel)

    async def generate(
        self, request: pb.GenerateRequest, handle: Handle, *, timeout: float | None = None
    ) -> None:
        """Asks for an answer, shows each event to `handle`, and returns when it is complete.

        Raises:
            Failure: the call failed; what was shown is the beginning of an answer.
            Problem: nothing answers.
        """
        check = StreamCheck()

        def checked(event: pb.GenerateResponse) -> None:
            check.see(event)
            handle(event)

        await self._read(self._inference.Generate(request, timeout=timeout, metadata=self._metadata), checked)
        check.end()

    async def embed(self, request: pb.EmbedRequest, *, timeout: float | None = None) -> pb.EmbedResponse:
        """Embeds texts."""
        return await self._ask(self._inference.Embed(request, timeout=timeout, metadata=self._metadata))

    async def models(self, backends: Sequence[str] = ()) -> pb.ListModelsResponse:
        """Lists the models that can be served now."""
        request = pb.ListModelsRequest(backends=backends)
        return await self._ask(
            self._inference.ListModels(request, timeout=CONTROL_TIMEOUT, metadata=self._metadata)
        )

    async def load(
        self, request: models_pb.LoadModelRequest, handle: Callable[[models_pb.LoadModelResponse], None]
    ) -> None:
        """Loads a model and shows each event to `handle`."""
        await self._read(self._models.LoadModel(request, metadata=self._metadata), handle)

    async def pull(
        self, request: models_pb.PullModelRequest, handle: Callable[[models_pb.PullModelResponse], None]
    ) -> None:
        """Fetches a model to disk and shows each event to `handle`."""
        await self._read(self._models.PullModel(request, metadata=self._metadata), handle)

    async def unload(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Removes a model from memory. Waits for the calls it serves."""
        return await self._ask(self._models.UnloadModel(request, metadata=self._metadata))

    async def delete(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Removes a model from disk."""
        return await self._ask(self._models.DeleteModel(request, metadata=self._metadata))

    async def backends(self) -> list[fleet_pb.Backend]:
        """Lists the backends and their states."""
        request = fleet_pb.ListBackendsRequest()
        return list(
            (
                await self._ask(
                    self._fleet.ListBackends(request, timeout=CONTROL_TIMEOUT, metadata=self._metadata)
                )
            ).backends
        )

    async def watch(
        self,
        handle: Callable[[fleet_pb.Backend], None],
        on_removed: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Shows every backend to `handle`, then each again when it changes, until it is cancelled.

        Args:
            handle: is shown each backend.
            on_removed: is told the name of each that the configuration no longer has.
        """

        def take(event: fleet_pb.WatchBackendsResponse) -> None:
            if event.removed:
                on_removed(event.backend.name)
            else:
                handle(event.backend)

        await self._read(
            self._fleet.WatchBackends(fleet_pb.WatchBackendsRequest(), metadata=self._metadata), take
        )

    async def reload(self, *, validate_only: bool) -> fleet_pb.ReloadConfigurationResponse:
        """Has the orchestrator read its configuration again."""
        request = fleet_pb.ReloadConfigurationRequest(validate_only=validate_only)
        return await self._ask(
            self._fleet.ReloadConfiguration(request, timeout=CONTROL_TIMEOUT, metadata=self._metadata)
        )

    async def activity(
        self, handle: Callable[[fleet_pb.WatchActivityResponse], None], *, interval: float
    ) -> None:
        """Shows to `handle` what the orchestrator is doing, every `interval` seconds, until cancelled."""
        request = fleet_pb.WatchActivityRequest()
        request.interval.FromTimedelta(timedelta(seconds=interval))
        await self._read(self._fleet.WatchActivity(request, metadata=self._metadata), handle)

    async def drain(self, backend: str) -> fleet_pb.Backend:
        """Keeps new calls away from a backend."""
        request = fleet_pb.DrainBackendRequest(backend=backend)
        return (
            await self._ask(
                self._fleet.DrainBackend(request, timeout=CONTROL_TIMEOUT, metadata=self._metadata)
            )
        ).backend

    async def resume(self, backend: str) -> fleet_pb.Backend:
        """Lets calls go to a backend again."""
        request = fleet_pb.ResumeBackendRequest(backend=backend)
        return (
            await self._ask(
                self._fleet.ResumeBackend(request, timeout=CONTROL_TIMEOUT, metadata=self._metadata)
            )
        ).backend

    async def explain(self, request: fleet_pb.ExplainRouteRequest) -> fleet_pb.ExplainRouteResponse:
        """Says where a request would go."""
        return await self._ask(
            self._fleet.ExplainRoute(request, timeout=CONTROL_TIMEOUT, metadata=self._metadata)
        )

    async def _ask(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._translated(error, begun=False) from error

    async def _read(self, call: grpc.aio.UnaryStreamCall[_Request, T], handle: Callable[[T], None]) -> None:
        begun = False
        try:
            async for event in call:
                begun = True
                handle(event)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error, begun=begun) from error
        finally:
            call.cancel()

    def _translated(self, error: grpc.aio.AioRpcError, *, begun: bool) -> Exception:
        """Returns what a failed call means to a person at a terminal."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE or _has_details(error):
            return from_rpc_error(error, backend=self.address)
        if begun:
            return StreamInterrupted(f"{self.address} went away in the middle of its answer")
        # Plain text sent to a port that wants TLS, or no client certificate, look just like this.
        closed = "Socket closed" in (error.details() or "")
        return unreachable(self.address, hint="it hung up; does it want TLS?" if closed else "")


_Request = TypeVar("_Request")


def _has_details(error: grpc.aio.AioRpcError) -> bool:
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())


@asynccontextmanager
async def connected(address: str, *, tls_roots: Path | None = None) -> AsyncIterator[Client]:
    """Connects to an address, lazily: nothing is sent before the first call.

    A token is taken from the environment and not from an option, which everyone on the machine could read.

    Args:
        address: `host:port` or `unix:/path`.
        tls_roots: PEM file with the roots to trust. None takes FOREBAY_TLS_ROOTS; without it there is no TLS.

    Raises:
        Problem: the file with the roots cannot be read.
    """
    if tls_roots is None and (named := os.environ.get(TLS_ROOTS_VARIABLE)):
        tls_roots = Path(named)
    try:
        channel = connect(address, tls_roots=tls_roots)
    except OSError as error:
        raise Problem(f"{tls_roots} cannot be read: {error.strerror}", code=ExitCode.CONFIG) from error
    try:
        yield Client(channel, address, token=os.environ.get(TOKEN_VARIABLE, ""))
    finally:
        await channel.close()
