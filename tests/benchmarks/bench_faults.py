"""What breaking a backend costs its streams: a thousand of them, and how long a splice takes.

Correctness is asserted by the campaign itself; the times are printed, since a
shared machine has no opinion on them. FOREBAY_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from fault_campaign import KINDS, campaign

STREAMS = 20
ROUNDS = int(os.environ.get("FOREBAY_ROUNDS", "8"))


async def main() -> None:
    gaps: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        async with campaign(Path(folder), int(os.environ.get("FOREBAY_SEED", "1"))) as running:
            for _ in range(ROUNDS):
                for kind in KINDS:
                    before = len(running.tally.gaps)
                    await running.round(kind, STREAMS)
                    gaps[kind] += running.tally.gaps[before:]
            print(running.tally)
    print("\n| fault | splices | p50 | p99 |\n| --- | --- | --- | --- |")
    for kind, found in gaps.items():
        if found:
            ordered = sorted(found)
            worst = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
            print(
                f"| {kind} | {len(found)} | {statistics.median(found) * 1e3:.0f} ms | {worst * 1e3:.0f} ms |"
            )


if __name__ == "__main__":
    asyncio.run(main())
