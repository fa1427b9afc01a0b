"""Serves `mlx.grpc.engine.MlxEngine` beside our own interface, for routers that speak it, such as SMG.

Its messages come from the package smg-grpc-proto, if that is installed; they
are not ours to copy. The interface knows one model and no names, so one of
ours is put behind it. Here in the front calls are only passed on: the worker
has the tokens, see `forebay.mlx_service.worker.smg`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio

from forebay.kit.relay import failure_of, is_cancelled_here, lost
from forebay.kit.rpc import CALLER_KEY, Context, Edge, caller, write
from forebay.kit.server import Register
from forebay.mlx_service.front import MlxEngine
from forebay.mlx_service.smg_api import SERVICE, Api, Message
from forebay.mlx_service.supervisor import State

_TRANSPORT = (grpc.aio.AioRpcError, grpc.aio.UsageError, grpc.aio.InternalError)

Method: TypeAlias = Callable[..., Any]


def register(found: Api, engine: MlxEngine, model: str, backend: str) -> Register:
    """Returns what adds the interface to the front's server.

    Args:
        found: the interface.
        engine: has the models.
        model: the one behind the interface.
        backend: name of this backend, for failures.
    """

    def add(server: grpc.aio.Server, edge: Edge) -> Sequence[str]:
        servicer = SmgFront(found, engine, edge, model=model, backend=backend)
        found.services.add_MlxEngineServicer_to_server(servicer, server)
        return [SERVICE]

    return add


class SmgFront:
    """Passes calls on to the worker of one model, which is loaded for them if it is not in memory.

    Args:
        found: the interface.
        engine: has the models.
        edge: what is around every call.
        model: the model.
        backend: name of this backend.
    """

    def __init__(self, found: Api, engine: MlxEngine, edge: Edge, *, model: str, backend: str) -> None:
        self._api = found
        self._engine = engine
        self._edge = edge
        self._model = model
        self._backend = backend

    async def Generate(self, request: Message, context: Context) -> None:
        """Streams a reply."""
        await self._stream("Generate", request, context)

    async def GetTokenizer(self, request: Message, context: Context) -> None:
        """Streams the model's tokenizer."""
        await self._stream("GetTokenizer", request, context)

    async def GetModelInfo(self, request: Message, context: Context) -> Message:
        """Describes the model."""
        return await self._unary("GetModelInfo", request, context)

    async def GetServerInfo(self, request: Message, context: Context) -> Message:
        """Says how busy the model's worker is."""
        return await self._unary("GetServerInfo", request, context)

    async def Abort(self, request: Message, context: Context) -> Message:
        """Ends replies by their identifiers. Without a worker there are none."""
        if self._engine.residence(self._model).usable is None:
            async with self._edge.serve(context, f"{SERVICE}/Abort"):
                return self._api.messages.AbortResponse()
        return await self._unary("Abort", request, context)

    async def HealthCheck(self, request: Message, context: Context) -> Message:
        """Says whether calls can be served, if need be after loading the model."""
        async with self._edge.serve(context, f"{SERVICE}/HealthCheck", is_routine=True):
            residence = self._engine.residence(self._model)
            word = residence.state.name.lower()
            return self._api.messages.HealthCheckResponse(
                healthy=residence.state not in {State.FAILED, State.QUARANTINED},
                message=f"{word}: {residence.detail}" if residence.detail else word,
            )

    @contextlib.asynccontextmanager
    async def _worker(self, name: str, context: Context) -> AsyncIterator[Method]:
        """Gives a method of the model's worker."""
        async with (
            self._edge.serve(context, f"{SERVICE}/{name}"),
            self._engine.leased(self._model) as worker,
        ):
            yield getattr(self._api.services.MlxEngineStub(worker.channel), name)

    async def _stream(self, name: str, request: Message, context: Context) -> None:
        async with self._worker(name, context) as method:
            began = False
            try:
                stream = method(request, **_along(context))
            except grpc.aio.UsageError as error:  # the channel is closed
                raise failure_of(error, self._backend, committed=False) from error
            try:
                while True:
                    with self._named(committed=began):
                        event = await stream.read()
                    if event is grpc.aio.EOF:
                        return
                    began = True
                    await write(context, event)
            finally:
                stream.cancel()

    async def _unary(self, name: str, request: Message, context: Context) -> Message:
        async with self._worker(name, context) as method:
            with self._named(committed=False):
                return await method(request, **_along(context))

    @contextlib.contextmanager
    def _named(self, *, committed: bool) -> Any:  # a generator; the decorator gives it its type
        try:
            yield
        except _TRANSPORT as error:
            raise failure_of(error, self._backend, committed=committed) from error
        except asyncio.CancelledError as error:
            if is_cancelled_here():
                raise
            raise lost(self._backend, "its connection was closed", committed=committed) from error


def _along(context: Context) -> dict[str, object]:
    """What goes along with a call: what is left of its time, and who asks."""
    who = caller(context).encode("ascii", "replace").decode()
    return {"timeout": context.time_remaining(), "metadata": ((CALLER_KEY, who),)}
