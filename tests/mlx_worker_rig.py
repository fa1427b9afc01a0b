"""Runs the worker's service in this process, on a tiny model, and collects what it sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Call, Event
from forebay.mlx_service.host import default_ceiling
from forebay.mlx_service.models.describe import describe
from forebay.mlx_service.models.identity import Identity
from forebay.mlx_service.worker.cache_layout import Layout
from forebay.mlx_service.worker.engine import Engine
from forebay.mlx_service.worker.grammar import Grammars
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.memory import read_memory
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.prefix_disk import DiskTier, Post
from forebay.mlx_service.worker.pressure import Held
from forebay.mlx_service.worker.runtime import BLAS
from forebay.mlx_service.worker.service import Served, WorkerService
from forebay.mlx_service.worker.speculation import Speculation
from forebay.mlx_service.worker.weights import CpuWeights, plan
from forebay.mlx_service.worker.words import Words

MODEL = "tiny"


@dataclass
class Rig:
    service: WorkerService
    engine: Engine
    words: Words

    async def generate(self, request: pb.GenerateRequest, **call: object) -> Reply:
        reply = Reply()
        await self.service.generate(Call(request=request, **call), reply.send)  # type: ignore[arg-type]  # a test's shorthand
        return reply


@dataclass
class Reply:
    events: list[pb.GenerateResponse] = field(default_factory=list)

    async def send(self, event: Event) -> None:
        assert isinstance(event, pb.GenerateResponse)
        self.events.append(event)

    @property
    def kinds(self) -> list[str]:
        return [event.WhichOneof("event") or "" for event in self.events]

    @property
    def deltas(self) -> list[pb.Delta]:
        return [event.delta for event in self.events if event.WhichOneof("event") == "delta"]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def reasoning(self) -> str:
        return "".join(delta.reasoning for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def started(self) -> pb.Started:
        return next(event.started for event in self.events if event.WhichOneof("event") == "started")

    @property
    def finished(self) -> pb.Finished:
        assert self.kinds[-1] == "finished"
        return self.events[-1].finished


@asynccontextmanager
async def rig(
    path: Path,
    *,
    rows: int = 4,
    queue_rows: int = 16,
    context: int = 512,
    default_max_tokens: int = 64,
    prefill_step: int | None = 32,
    prefixes: PrefixCache | None = None,
    isolates_callers: bool = False,
    ceiling: int | None = None,
    read: Callable[[], Held] = read_memory,
    disk: Callable[[Layout, Post], DiskTier] | None = None,
    speculation: Speculation | None = None,
) -> AsyncIterator[Rig]:
    words = Words(path)
    await words.load()
    facts = describe(path)
    most = ceiling or default_ceiling(psutil.virtual_memory().total)
    how = plan(CpuWeights.AUTO, facts, ceiling=most, blas=BLAS)
    engine = Engine(
        lambda: (load_weights(path, how), words.language.end_tokens),
        rows=rows,
        queue_rows=queue_rows,
        prefill_step=prefill_step,
        prefixes=prefixes,
        ceiling=ceiling,
        read=read,
        disk=disk,
        speculation=speculation,
    )
    identity = Identity(path)
    identity.learn()
    served = Served(
        model_id=MODEL,
        backend="mlx",
        facts=facts,
        identity=identity,
        context_token_count=context,
        default_max_tokens=default_max_tokens,
        rows=rows,
        isolates_callers=isolates_callers,
        detail=how.reason,
    )
    await engine.start()
    try:
        yield Rig(WorkerService(served, engine, words, Grammars(words)), engine, words)
    finally:
        await engine.stop(timeout=20)
        words.close()


def ask(
    text: str = "hi", *, most: int | None = None, stops: Sequence[str] = (), **fields: object
) -> pb.GenerateRequest:
    """A request of one user message; greedy unless `sampling` says otherwise."""
    fields.setdefault("sampling", pb.Sampling(temperature=0))
    request = pb.GenerateRequest(
        model=MODEL,
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
        **fields,  # type: ignore[arg-type]  # a test's shorthand
    )
    if most is not None:
        request.limits.max_output_token_count = most
    request.limits.stop_sequences.extend(stops)
    return request


async def until(condition: object, *, seconds: float = 10.0) -> None:
    """Waits until a condition that another thread makes true is true."""
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
