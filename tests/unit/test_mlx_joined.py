"""Tokens of short steps leave together, and nobody waits for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny_models
from forebay.mlx_service.worker import engine as engines
from forebay.mlx_service.worker.engine import Engine, Happening, Over, Row, Ticket, Written
from forebay.mlx_service.worker.sampling import SamplingParams
from mlx_worker_rig import ask, rig, until

pytestmark = pytest.mark.mlx

MOST = 5000
"""More than a row writes while a test is late."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("joined") / "m", plain=True)


@pytest.fixture(autouse=True)
def for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "JOIN_SECONDS", 1000.0)


def row(first: int) -> Row:
    return Row(tokens=(first, 4, 5), most=MOST, sampling=SamplingParams(temperature=0))


async def begun(engine: Engine, row: Row) -> Ticket:
    """Submits a row, and returns when its first token has come."""
    ticket = engine.submit(row)
    while not any(isinstance(happening, Written) for happening in await ticket.next()):
        pass
    return ticket


def waiting(ticket: Ticket) -> list[Happening]:
    """What a row's reader would get at once."""
    return list(ticket._happenings)


async def steps(engine: Engine, count: int) -> None:
    enough = engine.stats().steps + count
    await until(lambda: engine.stats().steps >= enough)


async def test_the_first_token_comes_at_once_and_the_end_brings_the_rest(folder: Path, monkeypatch) -> None:
    request = ask(most=60, include_token_ids=True)
    async with rig(folder) as tiny:
        joined = await tiny.generate(request)
        monkeypatch.setattr(engines, "JOIN_SECONDS", 0.0)
        plain = await tiny.generate(request)
    assert len(joined.deltas) <= 2
    assert joined.deltas[0].token_count == 1 or len(joined.deltas) == 1  # one, if the loop was late itself
    assert joined.token_ids == plain.token_ids
    assert joined.text == plain.text
    assert joined.finished.usage.output_token_count == 60


async def test_tokens_are_held_only_until_something_else_happens(folder: Path) -> None:
    async with rig(folder) as tiny:
        engine = tiny.engine
        ticket = await begun(engine, row(3))
        await steps(engine, 10)
        assert not waiting(ticket)
        await engine.run(lambda: None)  # whatever the thread is asked to do may take long
        assert len(waiting(ticket)) >= 9
        await ticket.next()
        await steps(engine, 10)
        other = await begun(engine, row(7))  # and so does a prompt
        assert len(waiting(ticket)) >= 9
        assert not any(isinstance(happening, Over) for happening in waiting(ticket))
        ticket.cancel()
        other.cancel()


async def test_a_step_that_takes_longer_holds_nothing(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "JOIN_SECONDS", 1e-9)
    async with rig(folder) as tiny:
        ticket = await begun(tiny.engine, row(3))
        for _ in range(5):
            await steps(tiny.engine, 1)
            await asyncio.wait_for(ticket.next(), 10)
        ticket.cancel()
