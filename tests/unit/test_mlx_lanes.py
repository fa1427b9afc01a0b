"""Promises of the lanes, on a real engine with a tiny model: nobody pays for another's length."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import tiny_models
from forebay.mlx_service.worker.batch import Generated
from forebay.mlx_service.worker.engine import Engine, Over, Row, Written
from forebay.mlx_service.worker.lanes import MAX_LANES, Lanes
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.sampling import SamplingParams
from mlx_worker_rig import rig, until

pytestmark = pytest.mark.mlx

TOKEN_BYTES = tiny_models.LAYERS * 2 * 64 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("lanes") / "m")


def tokens_of(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((i * i + 7 * i + seed * 31) % 250 for i in range(count))


def row(tokens: tuple[int, ...], most: int = 12) -> Row:
    return Row(tokens=tokens, most=most, sampling=SamplingParams(temperature=0))


async def finish(engine: Engine, wanted: Row, *, leave_after: int | None = None) -> list[int]:
    """The row's tokens. It is cancelled after so many."""
    ticket = engine.submit(wanted)
    tokens: list[int] = []
    while True:
        for happening in await ticket.next():
            if isinstance(happening, Written):
                tokens.append(happening.token)
                if len(tokens) == leave_after:
                    ticket.cancel()
                    return tokens
            elif isinstance(happening, Over):
                assert happening.failure is None
                return tokens


@pytest.mark.parametrize("seed", [None, 1, 2])
async def test_any_mix_of_rows_gives_the_very_tokens_they_get_alone(model: Path, seed: int | None) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    draw = random.Random(seed)
    shared = tokens_of(200, seed=9)
    prompts = [
        (
            *shared[: draw.choice((0, 40, 200))],
            *tokens_of(draw.choice((1, 3, 12, 90, 300)), seed=draw.randrange(3)),
        )
        for _ in range(10)
    ]
    asks = [
        (row(draw.choice(prompts), draw.randint(1, 20)), draw.choice((None, None, None, 1, 4)))
        for _ in range(24)
    ]
    alone: dict[Row, list[int]] = {}
    async with rig(model, context=2048) as plain:
        for wanted, _ in asks:
            if wanted not in alone:
                alone[wanted] = await finish(plain.engine, wanted)
    cache = PrefixCache(max_bytes=400 * TOKEN_BYTES, min_tokens=8)
    async with rig(model, rows=5, queue_rows=32, context=2048, prefixes=cache) as made:

        async def one(wanted: Row, leave_after: int | None, hops: int) -> list[int]:
            for _ in range(hops):
                await asyncio.sleep(0)
            return await finish(made.engine, wanted, leave_after=leave_after)

        running = []
        async with asyncio.TaskGroup() as tasks:
            for wanted, leave_after in asks:
                running.append(tasks.create_task(one(wanted, leave_after, draw.randrange(50))))
                if draw.random() < 0.3:
                    await running[draw.randrange(len(running))]
        for (wanted, leave_after), task in zip(asks, running, strict=True):
            assert task.result() == alone[wanted][:leave_after]
        stats = made.engine.stats()
        assert stats.faults == 0
        assert stats.prefix.hits > 0
        assert stats.prefix.bytes <= 400 * TOKEN_BYTES


async def test_a_long_row_beside_seven_short_ones_holds_no_more_than_twice_what_is_useful(
    model: Path,
) -> None:
    async with rig(model, rows=8, context=2048) as made:
        lengths = [720, *[12] * 7]
        tickets = [made.engine.submit(row(tokens_of(n, i), 1000)) for i, n in enumerate(lengths)]
        written = [0] * len(tickets)

        async def follow(i: int) -> None:
            while True:
                for happening in await tickets[i].next():
                    assert not isinstance(happening, Over)
                    written[i] += 1
                    if all(written):
                        return

        tasks = [asyncio.create_task(follow(i)) for i in range(len(tickets))]
        await until(lambda: all(written), seconds=60)
        await until(lambda: sum(made.engine.stats().lanes) == 8)
        before = sum(written)
        held = made.engine.stats().cache_bytes
        for task in tasks:
            task.cancel()
        assert 0 < held <= 2 * (sum(lengths) + before) * TOKEN_BYTES
        assert sorted(made.engine.stats().lanes) == [1, 7]
        for ticket in tickets:
            ticket.cancel()


async def test_a_lane_that_breaks_costs_the_others_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(model, rows=4, context=2048) as made:
        long, short = row(tokens_of(700), 30), row(tokens_of(5), 30)
        alone = [await finish(made.engine, one) for one in (long, short)]
        from forebay.mlx_service.worker import batch as batch_module

        step = batch_module.Batch.step
        steps = 0

        def failing(batch: batch_module.Batch) -> object:
            nonlocal steps
            steps += 1
            if steps in {20, 40}:
                raise RuntimeError("the device hiccups")
            return step(batch)

        monkeypatch.setattr(batch_module.Batch, "step", failing)
        async with asyncio.TaskGroup() as tasks:
            together = [tasks.create_task(finish(made.engine, one)) for one in (long, short)]
        assert [task.result() for task in together] == alone
        assert made.engine.stats().faults == 2


class FakeBatch:
    """Ends rows when told, and says how long its steps take."""

    def __init__(self, made: list[FakeBatch], now: list[float]) -> None:
        self.rows: list[int] = []
        self.seconds = 1.0
        self.steps = 0
        self.closed = False
        self.shared: int | None = None
        self.writes: list[Generated] = []
        self._now = now
        made.append(self)

    cache_bytes = 10

    def insert(self, tokens: tuple[int, ...], **_: object) -> int:
        self.rows.append(len(self.rows))
        return self.rows[-1]

    def share_step(self, most: int | None) -> None:
        self.shared = most

    def step(self) -> tuple[list[object], list[object]]:
        self.steps += 1
        self._now[0] += self.seconds
        return [], self.writes

    def remove(self, uid: int) -> None:
        return None

    def close(self) -> None:
        self.closed = True


def lanes(**settings: int) -> tuple[Lanes, list[FakeBatch]]:
    made: list[FakeBatch] = []
    now = [0.0]
    new = lambda view: FakeBatch(made, now)  # noqa: E731
    return Lanes(new, clock=lambda: now[0], **settings), made  # type: ignore[arg-type, return-value]  # what lanes use of it


def add(to: Lanes, length: int) -> int:
    return to.insert((0,) * length, most=5, sampler=lambda x: x, processors=())


def test_rows_of_like_length_share_a_lane_and_others_do_not() -> None:
    to, made = lanes()
    for length in (10, 20, 5000, 4000, 30, 60000):
        add(to, length)
    assert to.widths == [3, 2, 1]
    assert to.cache_bytes == 30
    to.close()
    assert all(batch.closed for batch in made)


def test_there_are_never_too_many_lanes() -> None:
    to, _ = lanes()
    for length in (10, 1000, 10_000, 100_000, 1_000_000):
        add(to, length)
    assert len(to.widths) == MAX_LANES
    assert sum(to.widths) == 5


def test_a_slow_lane_gets_its_share_of_the_time_and_no_more() -> None:
    to, made = lanes()
    add(to, 5000)
    for _ in range(3):
        add(to, 10)
    slow, quick = made
    slow.seconds, quick.seconds = 0.9, 0.1
    for _ in range(280):
        to.step()
    assert slow.steps * slow.seconds == pytest.approx(quick.steps * quick.seconds / 3, rel=0.2)


def test_a_lane_that_stood_still_has_no_claim_on_the_time_that_passed() -> None:
    to, made = lanes()
    short = add(to, 10)
    long = add(to, 5000)
    to.remove(short)
    for _ in range(100):
        to.step()
    assert add(to, 10)
    quick = made[-1]
    for _ in range(10):
        to.step()
    assert quick.steps <= 6
    to.remove(long)
    assert to.widths == [1]


def test_prompts_are_read_in_smaller_steps_only_while_a_row_writes() -> None:
    to, made = lanes(shared_step=16)
    first = add(to, 10)
    to.step()
    assert made[0].shared is None
    made[0].writes = [Generated(0, 5, None, None)]
    to.step()
    to.step()
    assert made[0].shared == 16
    made[0].writes = []
    to.remove(first)
    add(to, 10)
    to.step()
    assert made[0].shared is None
