"""A gRPC client for tests, which checks every stream it reads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar

import grpc

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit import failure
from forebay.kit.channel import connect
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc
from forebay.testing import grammar

if TYPE_CHECKING:
    from forebay.inference.v1.inference_pb2_grpc import InferenceServiceAsyncStub
    from forebay.models.v1.models_pb2_grpc import ModelServiceAsyncStub


Step = TypeVar("Step", models_pb.LoadModelResponse, models_pb.PullModelResponse)


class CallError(Exception):
    """A call failed. What came before it is a prefix of a reply, and was checked as such.

    Args:
        error: what gRPC raised.
        events: what came before it.
    """

    def __init__(self, error: grpc.aio.AioRpcError, events: list[pb.GenerateResponse]) -> None:
        super().__init__(f"{error.code().name}: {error.details()}")
        self.code = error.code()
        self.details = error.details() or ""
        self.failure = failure.from_rpc_error(error, backend="")
        """The failure that the other side raised."""
        self.events = events

    @property
    def reason(self) -> str:
        """The reason of the failure, such as `MODEL_NOT_FOUND`."""
        return self.failure.reason

    @property
    def fields(self) -> list[str]:
        """Paths of the fields that are at fault."""
        return [path for path, _ in self.failure.violations]


class Client:
    """Calls one address. Use `client(...)` to make one.

    Args:
        channel: where to.
        timeout: deadline of each call, in seconds, unless the call is given its own.
    """

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float) -> None:
        self.channel = channel
        self.timeout = timeout
        self.inference: InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.models: ModelServiceAsyncStub = models_pb2_grpc.ModelServiceStub(channel)

    @asynccontextmanager
    async def stream(
        self, request: pb.GenerateRequest, *, timeout: float | None = None
    ) -> AsyncIterator[grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]]:
        """Gives the open stream of a reply, and cancels it at the end of the block."""
        call = self.inference.Generate(request, timeout=timeout or self.timeout)
        try:
            yield call
        finally:
            call.cancel()

    async def generate(
        self, request: pb.GenerateRequest, *, timeout: float | None = None
    ) -> list[pb.GenerateResponse]:
        """Returns the events of a complete reply.

        Raises:
            CallError: the call failed.
            forebay.testing.grammar.GrammarError: the events are no reply.
        """
        checker = grammar.Grammar()
        events: list[pb.GenerateResponse] = []
        async with self.stream(request, timeout=timeout) as call:
            try:
                async for event in call:
                    checker.feed(event)
                    events.append(event)
            except grpc.aio.AioRpcError as error:
                raise CallError(error, events) from error
        checker.end()
        return events

    async def text(self, request: pb.GenerateRequest, *, timeout: float | None = None) -> str:
        """Returns the text of a complete reply."""
        return grammar.text(await self.generate(request, timeout=timeout))

    async def embed(self, request: pb.EmbedRequest, *, timeout: float | None = None) -> pb.EmbedResponse:
        """Embeds a batch of texts.

        Raises:
            CallError: the call failed.
        """
        with _told():
            return await self.inference.Embed(request, timeout=timeout or self.timeout)

    async def count_tokens(
        self, request: pb.CountTokensRequest, *, timeout: float | None = None
    ) -> pb.CountTokensResponse:
        """Counts the tokens of a conversation.

        Raises:
            CallError: the call failed.
        """
        with _told():
            return await self.inference.CountTokens(request, timeout=timeout or self.timeout)

    async def list_models(self) -> list[pb.Model]:
        """Lists the models.

        Raises:
            CallError: the call failed.
        """
        with _told():
            return list(
                (await self.inference.ListModels(pb.ListModelsRequest(), timeout=self.timeout)).models
            )

    async def get_model(self, model: str) -> pb.Model:
        """Describes a model.

        Raises:
            CallError: the call failed.
        """
        with _told():
            request = models_pb.GetModelRequest(model=model)
            return (await self.models.GetModel(request, timeout=self.timeout)).model

    async def load(self, request: models_pb.LoadModelRequest) -> models_pb.ModelLoaded:
        """Loads a model and returns what the last event says.

        Raises:
            CallError: the call failed.
            AssertionError: the events are not `progress* loaded`.
        """
        with _told():
            call = self.models.LoadModel(request, timeout=self.timeout)
            try:
                return _last([event async for event in call], "loaded").loaded
            finally:
                call.cancel()

    async def pull(self, request: models_pb.PullModelRequest) -> list[models_pb.PullModelResponse]:
        """Fetches a model and returns the events.

        Raises:
            CallError: the call failed.
            AssertionError: the events are not `progress* pulled`, or bytes went down.
        """
        with _told():
            call = self.models.PullModel(request, timeout=self.timeout)
            try:
                events = [event async for event in call]
            finally:
                call.cancel()
        _last(events, "pulled")
        done: dict[str, int] = {}
        for event in events[:-1]:
            progress = event.progress
            assert progress.completed_bytes >= done.get(progress.digest, 0), "bytes that were here are gone"
            done[progress.digest] = progress.completed_bytes
        return events

    async def unload(self, model: str, *, force: bool = False) -> pb.Model:
        """Removes a model from memory.

        Raises:
            CallError: the call failed.
        """
        with _told():
            request = models_pb.UnloadModelRequest(model=model, force=force)
            return (await self.models.UnloadModel(request, timeout=self.timeout)).model

    async def delete(self, model: str) -> None:
        """Removes a model from disk.

        Raises:
            CallError: the call failed.
        """
        with _told():
            await self.models.DeleteModel(models_pb.DeleteModelRequest(model=model), timeout=self.timeout)


@asynccontextmanager
async def client(address: str, *, timeout: float = 30.0) -> AsyncIterator[Client]:
    """Gives a client of an address.

    Args:
        address: `host:port` or `unix:/path`.
        timeout: deadline of each call, in seconds.
    """
    async with connect(address) as channel:
        yield Client(channel, timeout=timeout)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise CallError(error, []) from error


def _last(events: Sequence[Step], kind: str) -> Step:
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["progress"] * (len(kinds) - 1) + [kind], f"not progress* {kind}: {kinds}"
    return events[-1]
