"""Forwards model management to one backend."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import grpc.aio
from opentelemetry import propagate
from opentelemetry.trace import SpanKind

from forebay.kit import telemetry
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.failure import BrokenStream
from forebay.kit.genai import model_name
from forebay.kit.relay import Pairs, failure_of, lost, relay_unary
from forebay.kit.spans import Attributes, traced
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc

Q = TypeVar("Q", models_pb.LoadModelRequest, models_pb.PullModelRequest)
A = TypeVar("A", models_pb.LoadModelResponse, models_pb.PullModelResponse)


class Management:
    """The model service of one backend.

    Args:
        channel: the connection.
        backend: the backend's name.
        credentials: metadata that proves who we are.
        held: keeps the connection open for the length of a `with` block.
        on_change: called after anything that may have changed which models there are or are loaded.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        backend: str,
        *,
        on_change: Callable[[], None],
        credentials: Pairs = (),
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._held = held
        self._credentials = credentials
        self._stub = models_pb2_grpc.ModelServiceStub(channel)
        self._backend = backend
        self._on_change = on_change

    async def get(self, model: str) -> models_pb.GetModelResponse:
        """Describes a model."""
        request = models_pb.GetModelRequest(model=model)
        return await relay_unary(
            self._stub.GetModel, request, None, self._backend, metadata=self._credentials
        )

    async def load(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """Loads a model."""
        await self._stream(self._stub.LoadModel, request, send, name="LoadModel", last="loaded")

    async def pull(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """Fetches a model."""
        await self._stream(self._stub.PullModel, request, send, name="PullModel", last="pulled")

    async def unload(self, model: str, *, force: bool) -> models_pb.UnloadModelResponse:
        """Removes a model from memory."""
        request = models_pb.UnloadModelRequest(model=model, force=force)
        try:
            return await relay_unary(
                self._stub.UnloadModel, request, None, self._backend, metadata=self._credentials
            )
        finally:
            self._on_change()

    async def delete(self, model: str) -> models_pb.DeleteModelResponse:
        """Removes a model from disk."""
        request = models_pb.DeleteModelRequest(model=model)
        try:
            return await relay_unary(
                self._stub.DeleteModel, request, None, self._backend, metadata=self._credentials
            )
        finally:
            self._on_change()

    async def _stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Q, A],
        request: Q,
        send: Callable[[A], Awaitable[None]],
        *,
        name: str,
        last: str,
    ) -> None:
        """Passes events on until the last. A loss never cuts anything: asking again joins the work."""
        rpc = f"forebay.models.v1.ModelService/{name}"

        def describe() -> tuple[str, Attributes]:
            return rpc, {
                "rpc.system.name": "grpc",
                "rpc.method": rpc,
                "gen_ai.request.model": model_name(request.model),
                "forebay.backend": self._backend,
            }

        with self._held(), traced(telemetry.current().tracer, SpanKind.CLIENT, describe):
            await self._relay(method, request, send, last=last)

    async def _relay(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Q, A],
        request: Q,
        send: Callable[[A], Awaitable[None]],
        *,
        last: str,
    ) -> None:
        trace: dict[str, str] = {}
        propagate.inject(trace)
        stream = method(request, metadata=grpc.aio.Metadata(*self._credentials, *trace.items()))
        is_done = False
        try:
            while not is_done:
                event = await stream.read()
                if not isinstance(event, models_pb.LoadModelResponse | models_pb.PullModelResponse):
                    raise BrokenStream(
                        f"backend {self._backend}: the stream ended without {last}",
                        metadata={"backend": self._backend},
                    )
                is_done = event.WhichOneof("event") == last
                await send(cast("A", event))
        except grpc.aio.AioRpcError as error:
            raise failure_of(error, self._backend, committed=False) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise lost(self._backend, "its connection was closed", committed=False) from error
        finally:
            stream.cancel()
            self._on_change()
