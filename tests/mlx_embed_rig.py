"""An embedding model's worker without its process, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Call
from forebay.mlx_service.models.describe import describe
from forebay.mlx_service.models.identity import Identity
from forebay.mlx_service.worker.embedding.engine import EmbeddingEngine
from forebay.mlx_service.worker.embedding.service import EmbeddingService, assemble

MODEL = "tiny"


@dataclass
class Rig:
    service: EmbeddingService
    engine: EmbeddingEngine

    async def embed(
        self, *texts: str, call: dict[str, object] | None = None, **fields: object
    ) -> pb.EmbedResponse:
        request = pb.EmbedRequest(model=MODEL, texts=texts, **fields)  # type: ignore[arg-type]  # a test's shorthand
        return await self.service.embed(Call(request=request, **(call or {})))  # type: ignore[arg-type]  # the same

    async def vectors(self, *texts: str, **fields: object) -> list[list[float]]:
        return [list(e.values) for e in (await self.embed(*texts, **fields)).embeddings]


def learned(path: Path) -> Identity:
    identity = Identity(path)
    identity.learn()
    return identity


@asynccontextmanager
async def rig(path: Path, *, token_count: int | None = None) -> AsyncIterator[Rig]:
    service, engine, texts = assemble(
        path, describe(path), identity=learned(path), model_id=MODEL, backend="mlx", token_count=token_count
    )
    try:
        await texts.load()
        await engine.start()
        yield Rig(service, engine)
    finally:
        await engine.stop(timeout=20)
        texts.close()
