"""Does one thing again and again, and prints what that took.

`python mlx_leak_probe.py workers 1000 FOLDER` has a supervisor load and unload
the model in FOLDER, four at a time, each time in a worker process. `engines` loads and drops it
in this process: there mlx leaves a thread of its own for each that ever used it,
so only what mlx holds and open files are to be looked at. `requests` serves
requests of all kinds, some of them cancelled in the middle.

It prints one line of JSON each tenth of the way: bytes that the process holds,
those that MLX holds, open files, child processes, and how workers ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil

from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.host import footprint
from forebay.mlx_service.process import Launcher, Spec, Worker
from forebay.mlx_service.supervisor import Supervisor
from forebay.mlx_service.worker.engine import Engine, Over, Row, Written
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.runtime import leave_thread, mx
from forebay.mlx_service.worker.sampling import SamplingParams
from forebay.testing.calls import ask

ROWS = 4
MODELS = 4
"""Models that are loaded side by side. The count is a multiple of it."""
GRACE = 60.0
"""Seconds that a worker gets to end: on a machine with more to do than it can, one took more than ten."""

VOCABULARY = 256
SEED = 20


async def finish(engine: Engine, row: Row, *, leave_after: int | None = None) -> int:
    """Returns how many tokens were written until the row was over, or its caller left."""
    ticket = engine.submit(row)
    written = 0
    try:
        while True:
            for happening in await ticket.next():
                written += isinstance(happening, Written)
                if isinstance(happening, Over):
                    assert happening.failure is None, happening.failure
                    return written
            if leave_after is not None and written >= leave_after:
                return written
    finally:
        ticket.cancel()


def engine(folder: Path) -> Engine:
    return Engine(
        lambda: (load_weights(folder), [0]),
        rows=ROWS,
        prefill_step=32,
        prefixes=PrefixCache(max_bytes=4 << 20),
        ceiling=1 << 30,
    )


def any_row(chance: random.Random) -> Row:
    shared = tuple(range(1, 41))
    tokens = tuple(chance.randrange(1, VOCABULARY) for _ in range(chance.randrange(1, 60)))
    return Row(
        tokens=shared + tokens if chance.random() < 0.3 else tokens,
        most=chance.randrange(1, 8),
        sampling=SamplingParams(
            temperature=chance.choice((0.0, 0.7, round(chance.random() + 0.1, 3))),
            top_p=chance.choice((1.0, 0.9)),
            seed=chance.choice((None, 7)),
            presence_penalty=chance.choice((0.0, 0.5)),
        ),
        top_logprobs=chance.choice((None, 2)),
        cache_key=chance.choice("ab"),
    )


def tell(done: int, **more: object) -> None:
    gc.collect()
    this = psutil.Process()
    figures = {
        "done": done,
        "held": footprint(this.pid),
        "active": int(mx.get_active_memory()),
        "files": this.num_fds(),
        "children": len(this.children(recursive=True)),
        **more,
    }
    print(json.dumps(figures), flush=True)


async def workers(count: int, folder: Path) -> None:
    launcher = Launcher(name="mlx", grace=GRACE)
    codes: list[int | None] = []

    @contextlib.asynccontextmanager
    async def launch(spec: Spec, on_exit: Callable[[], None]) -> AsyncIterator[Worker]:
        async with launcher(spec, on_exit) as worker:
            yield worker
        codes.append(worker.exit_code)

    async def prepare(report: object) -> Path:
        return folder

    async def waiting(residence: object) -> None:
        pass

    async def once(supervisor: Supervisor, model: str) -> None:
        async with supervisor.lease(model, prepare, waiting) as worker:
            request = ask(model=model, token_count=2)
            events = [event async for event in worker.stub.Generate(request)]
            assert events[-1].HasField("finished")
        await supervisor.unload(model, force=False)

    settings = MlxSettings(stop_grace=GRACE, max_loaded_models=MODELS)
    async with Supervisor(settings, launch=launch) as supervisor:
        for done in range(MODELS, count + 1, MODELS):
            async with asyncio.TaskGroup() as tasks:
                for number in range(MODELS):
                    tasks.create_task(once(supervisor, f"m{number}"))
            if done // max(1, count // 10) > (done - MODELS) // max(1, count // 10):
                memory = supervisor.memory()
                assert not memory.used_bytes
                assert not memory.reserved_bytes
                tell(done, codes=sorted(set(codes)), ended=len(codes))
    launcher.close()


async def engines(count: int, folder: Path) -> None:
    for i in range(count):
        one = engine(folder)
        await one.start()
        await finish(one, Row(tokens=(1, 2, 3), most=2, sampling=SamplingParams(temperature=0)))
        await one.stop(timeout=20)
        if (i + 1) % max(1, count // 10) == 0:
            tell(i + 1)


async def requests(count: int, folder: Path) -> None:
    chance = random.Random(SEED)
    one = engine(folder)
    await one.start()
    for i in range(0, count, ROWS * 2):
        async with asyncio.TaskGroup() as tasks:
            for _ in range(ROWS * 2):
                leaves = chance.randrange(1, 3) if chance.random() < 0.2 else None
                tasks.create_task(finish(one, any_row(chance), leave_after=leaves))
        done = i + ROWS * 2
        if done // max(1, count // 10) > i // max(1, count // 10):
            tell(done)
    await one.stop(timeout=20)


def main() -> None:
    what, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    asyncio.run({"workers": workers, "engines": engines, "requests": requests}[what](count, folder))
    leave_thread()


if __name__ == "__main__":
    main()
