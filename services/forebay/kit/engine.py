"""The interfaces behind the gRPC edge: what a framework's adapter has to offer.

An engine knows nothing of gRPC. It is given calls whose requests were checked
at the edge, pushes protobuf events, and raises `Failure`s.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Call, Send
from forebay.models.v1 import models_pb2 as models_pb

SendLoad: TypeAlias = Callable[[models_pb.LoadModelResponse], Awaitable[None]]
"""Passes an event of a load towards the client."""

SendPull: TypeAlias = Callable[[models_pb.PullModelResponse], Awaitable[None]]
"""Passes an event of a fetch towards the client."""


class InferenceEngine(Protocol):
    """Serves `forebay.inference.v1.InferenceService`.

    Every method may raise any `Failure`. Each is cancelled when its caller
    leaves and must then free what it holds before it lets the cancellation out.
    """

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """Sends `started progress* delta* finished`. The edge numbers the events."""

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """Embeds the texts, in order."""

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """Counts the tokens of a conversation."""

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Lists the models that can be served now. Never loads one."""


class ModelEngine(Protocol):
    """Serves `forebay.models.v1.ModelService`.

    Loads and pulls outlive their callers: cancelling `load_model` stops the
    reporting, not the load.
    """

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        """Describes one model."""

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """Sends `progress* loaded`."""

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """Sends `progress* pulled`."""

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Removes a model from memory."""

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Removes a model from disk."""
