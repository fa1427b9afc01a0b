"""What a stored reply saves, over real gRPC: a model of 50 tokens a second against its replay.

Run it with `make bench`. Both ways pass through the orchestrator and send the same hundred events.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from contract.orchestrator_mesh import Mesh
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.calls import ask, with_options
from forebay.testing.scripted import ScriptedEngine

ROUNDS = 50
TOKENS = 100


async def test_a_replay(tmp_path: Path) -> None:
    engine = ScriptedEngine(name="a", models=("m",))
    async with Mesh(tmp_path, engine) as mesh:
        request = with_options(ask(model="m", token_count=TOKENS), token_count=TOKENS, token_delay="20ms")
        request.sampling.temperature = 0.0
        request.routing.cache = pb.CACHE_POLICY_USE
        since = time.perf_counter()
        fresh = await mesh.generate(request)
        first = time.perf_counter() - since
        times = []
        for _ in range(ROUNDS):
            since = time.perf_counter()
            stored = await mesh.generate(request)
            times.append(time.perf_counter() - since)
            assert stored[0].started.replayed
        assert grammar.text(stored) == grammar.text(fresh)
    hit = statistics.median(times)
    print(f"\n{'reply of the backend':24}{first * 1000:>10.1f} ms")
    print(f"{'replay, median':24}{hit * 1000:>10.1f} ms{first / hit:>10.0f} times faster")
