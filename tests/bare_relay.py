"""A relay of grpc.aio and nothing else: what a hop in Python costs before any of ours is added.

`python -m bare_relay BACKEND` passes calls on, as they are, until it is asked to stop.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator

import grpc

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import SERVER_OPTIONS, connect
from forebay.kit.process import announce, until_stopped


class Relay(inference_pb2_grpc.InferenceServiceServicer):
    """Passes on what the benchmark of the hop calls."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
        self._stub = stub

    async def Generate(
        self, request: pb.GenerateRequest, context: object
    ) -> AsyncIterator[pb.GenerateResponse]:
        async for event in self._stub.Generate(request):
            yield event

    async def CountTokens(self, request: pb.CountTokensRequest, context: object) -> pb.CountTokensResponse:
        return await self._stub.CountTokens(request)


async def main(backend: str) -> None:
    async with connect(backend) as channel:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        relay = Relay(inference_pb2_grpc.InferenceServiceStub(channel))  # type: ignore[abstract]  # the rest is refused
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(relay, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        gc.freeze()  # as the services do
        announce("relay", f"127.0.0.1:{port}")
        await until_stopped()
        await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
