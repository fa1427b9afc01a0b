"""Calls an orchestrator very often and watches its memory."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from promise_rig import Member, mesh, request

CALLERS = 8


@dataclass
class Run:
    """What a run found."""

    calls: int = 0
    """Calls that were completed after the first sample."""
    samples: list[tuple[int, int]] = field(default_factory=list)
    """Calls completed, and bytes resident."""

    @property
    def grown(self) -> int:
        """Bytes by which it grew."""
        return self.samples[-1][1] - self.samples[0][1]

    @property
    def slope(self) -> float:
        """Bytes a call in the second half of the run, by least squares."""
        late = self.samples[len(self.samples) // 2 :]
        mean_x = sum(x for x, _ in late) / len(late)
        mean_y = sum(y for _, y in late) / len(late)
        spread = sum((x - mean_x) ** 2 for x, _ in late)
        return sum((x - mean_x) * (y - mean_y) for x, y in late) / spread if spread else 0.0


async def run(
    folder: Path, *, calls: int, warm: int, samples: int = 40, progress: bool = False, seconds: float = 1e9
) -> Run:
    """Makes calls, each of a conversation of its own, and samples the memory of the orchestrator.

    Args:
        folder: for its files.
        calls: how many.
        warm: calls before the first sample, which fill what is bounded: caches, windows, pools.
        samples: how often to look.
        progress: whether each look is printed.
        seconds: when to stop though calls are left.
    """
    made = Run()
    numbers = itertools.count()
    async with mesh(folder, Member("a", folder)) as rig:
        process = psutil.Process(rig.process.pid)
        stub = rig.peer.inference

        async def some(count: int) -> None:
            left = iter(range(count))

            async def one() -> None:
                for _ in left:
                    events = [e async for e in stub.Generate(request(1, f"call {next(numbers)}"))]
                    assert events[-1].HasField("finished")

            async with asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(one())

        await some(warm)
        made.samples.append((0, process.memory_info().rss))
        begin = time.monotonic()
        for _ in range(samples):
            await some(calls // samples)
            made.calls += calls // samples
            made.samples.append((made.calls, process.memory_info().rss))
            took = time.monotonic() - begin
            if progress:
                print(
                    f"{made.calls:>9,} calls, {made.calls / took:,.0f} a second, "
                    f"{made.samples[-1][1] / 2**20:.1f} MiB, {made.grown / 2**20:+.1f} since the start",
                    flush=True,
                )
            if took > seconds:
                break
    return made
