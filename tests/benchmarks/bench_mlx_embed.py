"""What batching across callers is worth: 1,000 short texts from 50 callers against the same ones one by one.

Both go to the same running service, over gRPC, with the default embedding
model, in turns within one run. Every request holds one text, so whatever is
gained is gained by putting texts of different callers together. Figures are
printed and nothing is asserted but that the vectors are equal: how much a
batch gains is the processor's to say.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect
from forebay.mlx_service.default_model import DEFAULT_EMBEDDING_MODEL
from forebay.mlx_service.fetch import default_cache_dir, ensure_packaged_folder
from forebay.testing.processes import ServiceProcess

TEXTS = 1000
CALLERS = 50
ROUNDS = 3
SHARE = 5
"""One of so many texts is also embedded one by one: all of them take a minute on a CPU."""

SUBJECTS = (
    "the mill",
    "a river",
    "our house",
    "that law",
    "the ship",
    "my car",
    "a bird",
    "the tax",
    "rain",
    "bread",
)
VERBS = ("needs", "has", "loses", "finds", "costs", "makes", "wants", "breaks", "sells", "hides")
OBJECTS = ("water", "a name", "money", "time", "old stone", "two doors", "no end", "glass", "a song", "salt")

pytestmark = pytest.mark.timeout(600)


def texts() -> list[str]:
    return [" ".join(words) for words in itertools.product(SUBJECTS, VERBS, OBJECTS)]


async def embed(stub: inference_pb2_grpc.InferenceServiceAsyncStub, *batch: str) -> pb.EmbedResponse:
    return await stub.Embed(pb.EmbedRequest(model=DEFAULT_EMBEDDING_MODEL.id, texts=batch))


async def test_embeddings_across_callers(tmp_path: Path) -> None:
    cache = default_cache_dir()
    await ensure_packaged_folder(cache, lambda step: None)
    environment = {
        "FOREBAY_MLX__ADDRESS": "127.0.0.1:0",
        "FOREBAY_MLX__CACHE_DIR": str(cache),
        "FOREBAY_MLX__HUGGINGFACE_CACHE": "false",
        "FOREBAY_MLX__PRELOAD": "[]",
    }
    wanted = texts()
    assert len(wanted) == TEXTS
    async with (
        ServiceProcess("forebay.mlx_service", environment=environment, folder=tmp_path) as service,
        connect(service.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await embed(stub, "warm up")
        vectors: dict[str, np.ndarray] = {}

        async def caller(number: int) -> None:
            for text in wanted[number::CALLERS]:
                vectors[text] = np.array((await embed(stub, text)).embeddings[0].values)

        rows = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            alone = {
                text: np.array((await embed(stub, text)).embeddings[0].values) for text in wanted[::SHARE]
            }
            one_by_one = (time.perf_counter() - begin) * SHARE
            begin = time.perf_counter()
            await asyncio.gather(*(caller(number) for number in range(CALLERS)))
            together = time.perf_counter() - begin
            begin = time.perf_counter()
            await embed(stub, *wanted)
            in_one = time.perf_counter() - begin
            rows.append((one_by_one, together, in_one))
            assert min(float(vectors[text] @ vector) for text, vector in alone.items()) >= 0.9999
    one_by_one, together, in_one = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(a / b for a, b, _ in rows)
    print(f"\n{TEXTS} short texts, {ROUNDS} rounds, medians")
    print(f"one by one        {one_by_one:8.2f} s  {TEXTS / one_by_one:8.1f} texts/s")
    print(f"{CALLERS} callers        {together:8.2f} s  {TEXTS / together:8.1f} texts/s  ratio {ratio:.2f}")
    print(f"one call of all   {in_one:8.2f} s  {TEXTS / in_one:8.1f} texts/s")
