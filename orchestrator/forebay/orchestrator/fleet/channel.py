"""The bottom of an endpoint's stack: the gRPC call to the backend."""

from __future__ import annotations

from typing import cast

import grpc.aio

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.failure import BackendError, Failure, Internal
from forebay.kit.pipeline import Call, Request, Send
from forebay.kit.relay import Pairs, relay_generate, relay_unary


class Channel:
    """Sends calls to a backend.

    Args:
        channel: the connection.
        backend: the backend's name.
        credentials: metadata that proves who we are.
    """

    def __init__(self, channel: grpc.aio.Channel, backend: str, *, credentials: Pairs = ()) -> None:
        self._credentials = credentials
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._backend = backend

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call.

        Raises:
            BackendError: the backend met a fault of its own.
        """
        request = call.request
        metadata = self._credentials
        try:
            if isinstance(request, pb.GenerateRequest):
                generate = cast("Call[pb.GenerateRequest]", call)
                await relay_generate(
                    self._stub.Generate, request, generate, send, self._backend, metadata=metadata
                )
            elif isinstance(request, pb.EmbedRequest):
                vectors = await relay_unary(self._stub.Embed, request, call, self._backend, metadata=metadata)
                await send(vectors)
            else:
                count = await relay_unary(
                    self._stub.CountTokens, request, call, self._backend, metadata=metadata
                )
                await send(count)
        except Failure as failure:
            if failure.reason != Internal.reason or "backend" not in failure.metadata:
                raise
            # "A fault of ours" was said over there. Here it is the backend's, and another may do better.
            raise BackendError(
                failure.message, metadata=failure.metadata, retry_after=failure.retry_after
            ) from failure
