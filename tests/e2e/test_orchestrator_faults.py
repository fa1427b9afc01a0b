"""Token exactness: whatever breaks a stream, it is whole, or a strict prefix that says so."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from fault_campaign import KINDS, campaign

STREAMS = 20
"""Streams under each fault: what two shared cores relay at 100 tokens a second each."""


def seed_of_today() -> int:
    """Returns FOREBAY_SEED, or a new one; a failure names it."""
    return int(os.environ.get("FOREBAY_SEED") or random.SystemRandom().randrange(10**6))


async def test_a_hundred_broken_streams_are_gone_on_with_or_strict_prefixes(tmp_path: Path) -> None:
    async with campaign(tmp_path, seed_of_today()) as running:
        for kind in KINDS:
            await running.round(kind, STREAMS)
        print(running.tally)
        assert running.tally.faults.total() >= 100
        assert set(running.tally.faults) == set(KINDS)


@pytest.mark.soak(minutes=4)
@pytest.mark.timeout(1800)
async def test_a_thousand_broken_streams_are_gone_on_with_or_strict_prefixes(tmp_path: Path) -> None:
    async with campaign(tmp_path, seed_of_today()) as running:
        while running.tally.faults.total() < 1000:
            for kind in KINDS:
                await running.round(kind, STREAMS)
            print(f"{running.tally.faults.total():>9,} of 1,000 streams broken", flush=True)
        print(running.tally)
