"""The orchestrator's memory does not grow with the calls it has completed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import memory_run

MIB = 2**20


async def test_completed_calls_leave_no_memory_behind(tmp_path: Path) -> None:
    found = await memory_run.run(tmp_path, calls=800, warm=300, samples=4)
    # So few calls cannot tell a small leak from a pool that fills; what a call needs is about 20 KiB.
    assert found.grown < 8 * MIB, found.samples


@pytest.mark.soak(minutes=32)
@pytest.mark.timeout(3 * 3600)
async def test_a_million_completed_calls_leave_no_memory_behind(tmp_path: Path) -> None:
    calls = int(os.environ.get("FOREBAY_SOAK_CALLS", "1000000"))
    # What is bounded is full by then: the conversations that affinity remembers are the most, 16,384.
    found = await memory_run.run(tmp_path, calls=calls, warm=20_000, progress=True)
    print(f"{found.grown / MIB:+.1f} MiB after {found.calls:,} calls, at last {found.slope:+.1f} bytes each")
    assert found.grown <= 20 * MIB, found.samples
    assert found.slope * 1_000_000 <= 20 * MIB, found.samples
