"""Every row is told how it ended, whenever the engine's thread ends."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

import tiny_models
from forebay.kit.failure import BackendError, Draining
from forebay.mlx_service.worker.engine import Engine, Over, Row
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.sampling import SamplingParams

pytestmark = pytest.mark.mlx


class _DiedError(Exception):
    """What the thread dies of."""


@pytest.mark.parametrize("dies", [True, False])
async def test_a_row_that_comes_as_the_thread_ends_is_told_so(tmp_path: Path, dies: bool) -> None:
    folder = tiny_models.build_random(tmp_path / "m", hidden=16, layers=1)
    engine = Engine(lambda: (load_weights(folder), ()), rows=1)
    await engine.start()
    seen, go = threading.Event(), threading.Event()

    def end() -> None:
        seen.set()
        go.wait()
        if dies:
            raise _DiedError
        engine._stopped = True

    engine._commands.put(end)
    await asyncio.to_thread(seen.wait, 20)
    ticket = engine.submit(Row(tokens=(1, 2, 3), most=4, sampling=SamplingParams()))
    go.set()
    async with asyncio.timeout(20):
        while not isinstance(last := (await ticket.next())[-1], Over):
            pass  # it may have begun to read the prompt
    assert isinstance(last.failure, BackendError if dies else Draining)
    assert ticket.is_over
    assert engine.stats().reserved_bytes == 0
    await engine.stop(timeout=20)
