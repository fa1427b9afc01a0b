"""What a worker serves to its supervisor: it takes a memory limit, and says what it takes."""

from __future__ import annotations

from typing import TypeAlias

import grpc.aio

from forebay.kit.rpc import Edge
from forebay.kit.server import Register
from forebay.mlx.v1 import worker_pb2 as pb
from forebay.mlx.v1 import worker_pb2_grpc
from forebay.mlx_service.worker.embedding.engine import EmbeddingEngine
from forebay.mlx_service.worker.engine import Engine, EngineStats
from forebay.mlx_service.worker.memory import metal_memory

SERVICE = "forebay.mlx.v1.WorkerService"

_Context: TypeAlias = "grpc.aio.ServicerContext[pb.AdjustRequest, pb.AdjustResponse]"


class Control(worker_pb2_grpc.WorkerServiceServicer):
    """Adjusts an engine.

    Args:
        engine: the engine.
        limit: bytes that it was given at the start.
    """

    def __init__(self, engine: Engine | EmbeddingEngine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._device = metal_memory() or 0

    async def Adjust(self, request: pb.AdjustRequest, context: _Context) -> pb.AdjustResponse:
        """Takes a limit, and says what the worker takes."""
        if request.HasField("limit_bytes"):
            self._limit = self._engine.limit(max(1, request.limit_bytes))
        stats = self._engine.stats()
        said = pb.AdjustResponse(
            limit_bytes=self._limit,
            weights_bytes=stats.weights_bytes,
            memory_bytes=stats.memory_bytes,
            freed_bytes=stats.freed_bytes,
            peak_bytes=stats.peak_bytes,
            waiting_count=stats.waiting,
            device_bytes=self._device,
        )
        if isinstance(stats, EngineStats):
            said.cache_bytes = stats.cache_bytes
            said.prefix_bytes = stats.prefix.bytes
            said.reserved_bytes = stats.reserved_bytes
            said.wanted_bytes = stats.wanted_bytes
            said.live_count = stats.live
            said.preemption_count = stats.preempted
        return said


def controlled(engine: Engine | EmbeddingEngine, limit: int) -> Register:
    """Returns what adds the service to a server."""

    def register(server: grpc.aio.Server, edge: Edge) -> list[str]:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(Control(engine, limit), server)
        return [SERVICE]

    return register
