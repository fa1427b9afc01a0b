"""Promises about memory pressure: what a worker does step by step, and that no reply changes for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest

import mlx_embed_rig
import tiny_encoders
import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import DeadlineExceeded, MemoryExhausted
from forebay.kit.pipeline import Call
from forebay.kit.rpc import Edge, InFlight
from forebay.mlx.v1 import worker_pb2
from forebay.mlx_service.worker import pressure
from forebay.mlx_service.worker.control import Control, controlled
from forebay.mlx_service.worker.engine import Engine, Over, Row, Written
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.memory import is_out_of_memory, read_memory
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.pressure import Held, Level, Pressure
from forebay.mlx_service.worker.sampling import SamplingParams
from mlx_worker_rig import Rig, ask, rig, until

pytestmark = pytest.mark.mlx

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("pressure") / "m")


class Meter:
    """Readings of a memory that is as full as a test wants it: what a Metal device would tell."""

    def __init__(self) -> None:
        self.used: Callable[[], int] = lambda: 0

    def __call__(self) -> Held:
        return Held(self.used(), 0)


class Climb:
    """A ladder over numbers: what is given up really comes free."""

    def __init__(self, *, used: int, freed: int = 0, prefixes: int = 0, limit: int | None = 1000) -> None:
        self.used, self.freed, self.prefixes = used, freed, prefixes
        self.given_back = 0
        self.pressure = Pressure(read=self.read, give_back=self.give_back, shrink=self.shrink)
        self.pressure.limit = limit

    def read(self) -> Held:
        return Held(self.used, self.freed)

    def give_back(self) -> None:
        self.given_back += 1
        self.freed = 0

    def shrink(self, size: int) -> None:
        gone = min(size, self.prefixes)
        self.prefixes -= gone
        self.used -= gone
        self.freed += gone


def test_below_the_soft_mark_nothing_is_given_up() -> None:
    climb = Climb(used=850, freed=50, prefixes=400)
    assert climb.pressure.look() is Level.CALM
    assert (climb.prefixes, climb.given_back) == (400, 0)
    assert climb.pressure.allows(850)
    assert not climb.pressure.allows(851)


def test_freed_memory_goes_back_before_it_reaches_the_hard_mark() -> None:
    climb = Climb(used=800, freed=160)
    assert climb.pressure.look() is Level.CALM
    assert climb.freed == 0


def test_above_the_soft_mark_prefixes_leave_first_and_only_as_much_as_it_takes() -> None:
    climb = Climb(used=980, freed=10, prefixes=300)
    assert climb.pressure.look() is Level.CALM
    assert (climb.used, climb.prefixes, climb.freed) == (850, 170, 0)


@pytest.mark.parametrize(
    ("used", "level"), [(900, Level.SOFT), (950, Level.SOFT), (951, Level.HARD), (1001, Level.OVER)]
)
def test_what_cannot_be_given_up_decides_the_level(used: int, level: Level) -> None:
    climb = Climb(used=used)
    assert climb.pressure.look() is level
    assert not climb.pressure.allows(0)


def test_the_marks_are_shares_of_what_weights_leave() -> None:
    climb = Climb(used=940)
    climb.pressure.weights = 900
    assert (climb.pressure.mark(pressure.SOFT), climb.pressure.mark(pressure.HARD)) == (985, 995)
    assert climb.pressure.look() is Level.CALM


def test_without_a_limit_there_is_no_pressure() -> None:
    climb = Climb(used=1 << 60, limit=None)
    assert climb.pressure.look() is Level.CALM
    assert climb.pressure.allows(1 << 61)
    assert climb.pressure.wanted == 0


def test_the_limit_that_would_do_is_told_only_while_it_is_wanted() -> None:
    climb = Climb(used=980)
    climb.pressure.look()
    wanted = climb.pressure.wanted
    climb.pressure.limit = wanted
    assert climb.pressure.look() is Level.CALM
    assert climb.pressure.wanted == 0


def test_one_row_over_the_limit_has_a_moment_and_a_new_one_has_it_again() -> None:
    climb = Climb(used=1100)
    climb.pressure.look()
    assert not climb.pressure.is_hopeless(10.0)
    assert not climb.pressure.is_hopeless(10.0 + pressure.PATIENCE - 0.1)
    assert climb.pressure.is_hopeless(10.0 + pressure.PATIENCE)
    climb.used = 980
    climb.pressure.look()
    assert not climb.pressure.is_hopeless(99.0)
    climb.used = 1100
    climb.pressure.look()
    assert not climb.pressure.is_hopeless(100.0)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), True),
        (RuntimeError("[malloc] Unable to allocate 1099511627776 bytes."), True),
        (ValueError("shapes (1,2) and (3,4) cannot be broadcast"), False),
    ],
)
def test_errors_that_mean_memory_are_known_by_what_mlx_says(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


# With the engine

ASKS = (
    ask("the man in the other tent", most=40, include_token_ids=True),
    ask("x" * 70, most=40, include_token_ids=True, sampling=pb.Sampling(temperature=0.9, seed=11)),
    ask(
        "What then?",
        most=40,
        include_token_ids=True,
        sampling=pb.Sampling(temperature=0.7, seed=5, top_p=0.9),
    ),
    ask(
        "on a train",
        most=40,
        include_token_ids=True,
        sampling=pb.Sampling(temperature=0, presence_penalty=0.6, repetition_penalty=1.2),
    ),
)


async def alone(made: Rig) -> list[list[int]]:
    return [(await made.generate(request)).token_ids for request in ASKS]


async def together(made: Rig) -> list[asyncio.Task]:
    async with asyncio.TaskGroup() as tasks:
        return [tasks.create_task(made.generate(request)) for request in ASKS]


async def test_rows_set_aside_end_as_if_nothing_had_happened(model: Path) -> None:
    """Greedy, seeded and penalised rows, set aside again and again at every stage."""
    meter = Meter()
    async with rig(model, prefixes=PrefixCache(max_bytes=MIB, min_tokens=8), read=meter) as made:
        expected = await alone(made)
        made.engine.limit(100 * MIB)
        # Each seventh step finds the memory above the hard mark: a row goes out, and comes back.
        meter.used = lambda: 99 * MIB if made.engine.stats().steps % 7 == 0 else 0
        tasks = await together(made)
        replies = [task.result() for task in tasks]
        assert [reply.token_ids for reply in replies] == expected
        assert made.engine.stats().preempted >= 5
        for reply in replies:
            assert reply.kinds[0] == "started"
            assert reply.kinds[-1] == "finished"
            kinds = [kind for kind in reply.kinds if kind in {"progress", "delta"}]
            assert kinds == sorted(kinds, reverse=True), "progress never follows a delta"


async def test_a_format_is_kept_by_a_row_that_is_set_aside(model: Path) -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    meter = Meter()
    async with rig(model, read=meter) as made:
        wanted = ask("x", most=60, output_format=pb.OutputFormat(json_schema=schema), include_token_ids=True)
        expected = (await made.generate(wanted)).token_ids
        made.engine.limit(100 * MIB)
        meter.used = lambda: 99 * MIB if made.engine.stats().steps % 4 == 0 else 0
        async with asyncio.TaskGroup() as tasks:
            other = tasks.create_task(made.generate(ask("a long one", most=100)))
            reply = tasks.create_task(made.generate(wanted))
        assert reply.result().token_ids == expected
        assert made.engine.stats().preempted
        assert other.result().finished.usage.output_token_count == 100


async def test_a_real_shortage_sets_rows_aside_and_all_replies_are_whole(model: Path) -> None:
    """Reservations that fall far short of what rows take: memory, not arithmetic, says when it is full."""
    async with rig(model, rows=6, context=2048) as made:
        rows = [row(5 + i, 120) for i in range(5)]
        expected = [await tokens_of(made.engine, each) for each in rows]
        await until(lambda: made.engine.stats().live == 0)
        made.engine._ledger.cost = made.engine._cost = type(made.engine._cost)()  # nothing costs anything
        base = made.engine.stats().memory_bytes
        made.engine.limit(base + 350 * 1024)
        async with asyncio.TaskGroup() as tasks:
            replies = [tasks.create_task(tokens_of(made.engine, each)) for each in rows]
        assert [reply.result() for reply in replies] == expected
        print(made.engine.stats().preempted, made.engine.stats().peak_bytes - base)
        assert made.engine.stats().preempted
        assert made.engine.stats().peak_bytes < base + 2000 * 1024


async def test_the_least_urgent_and_youngest_row_is_set_aside_and_others_go_on(model: Path) -> None:
    meter = Meter()
    async with rig(model, rows=4, read=meter) as made:
        made.engine.limit(100 * MIB)
        over: list[str] = []

        async def run(name: str, wanted: Row) -> None:
            await tokens_of(made.engine, wanted)
            over.append(name)

        # From the first step on the memory is full: rows leave until one is left, which goes on.
        meter.used = lambda: 99 * MIB if made.engine._live and not over else 0
        async with asyncio.TaskGroup() as tasks:
            for name, urgency in (("batch", 2), ("old", 1), ("young", 1), ("urgent", 0)):
                tasks.create_task(run(name, row(6, 30, urgency=urgency)))
        assert over[0] == "urgent"
        assert over[-1] == "batch"
        assert made.engine.stats().preempted == 3


async def test_a_row_set_aside_can_be_cancelled_and_can_expire(model: Path) -> None:
    meter = Meter()
    async with rig(model, rows=3, read=meter) as made:
        made.engine.limit(100 * MIB)
        first = made.engine.submit(row(4, 1500))
        await begun(first)
        late = made.engine.submit(row(4, 1500, deadline=asyncio.get_running_loop().time() + 1.5))
        left = made.engine.submit(row(4, 1500))
        await begun(late)
        await begun(left)
        meter.used = lambda: 99 * MIB
        await until(lambda: made.engine.stats().preempted == 2)
        assert made.engine.stats().waiting == 2
        left.cancel()
        await until(lambda: made.engine.stats().waiting == 1)
        with pytest.raises(DeadlineExceeded):
            await rest(late)
        assert made.engine.stats().waiting == 0
        first.cancel()


async def test_a_row_that_alone_exceeds_the_limit_fails_with_figures_and_the_next_is_served(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "PATIENCE", 0.0)
    meter = Meter()
    async with rig(model, read=meter) as made:
        made.engine.limit(100 * MIB)
        ticket = made.engine.submit(row(4, 1500))
        await begun(ticket)
        meter.used = lambda: 101 * MIB
        with pytest.raises(MemoryExhausted, match=r"ran out of memory after \d+ tokens") as caught:
            await rest(ticket)
        assert caught.value.metadata["in_use_bytes"] == str(101 * MIB)
        assert caught.value.metadata["ceiling_bytes"] == str(100 * MIB)
        assert made.engine.stats().reserved_bytes == 0
        meter.used = lambda: 0
        await until(lambda: made.engine.stats().memory_bytes < MIB)
        assert len(await tokens_of(made.engine, row(4, 5))) == 5


async def test_what_the_worker_wants_is_told_while_one_row_is_left(model: Path) -> None:
    meter = Meter()
    async with rig(model, read=meter) as made:
        made.engine.limit(100 * MIB)
        assert made.engine.stats().wanted_bytes == 0
        ticket = made.engine.submit(row(4, 1500))
        await begun(ticket)
        meter.used = lambda: 99 * MIB
        await until(lambda: made.engine.stats().wanted_bytes > 100 * MIB)
        assert made.engine.limit(200 * MIB) == 200 * MIB
        await until(lambda: made.engine.stats().wanted_bytes == 0)
        ticket.cancel()


async def test_an_allocation_that_fails_costs_prefixes_and_at_last_its_row_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = PrefixCache(max_bytes=MIB, min_tokens=4)
    async with rig(model, prefixes=prefixes) as made:
        await tokens_of(made.engine, row(40, 3))
        await until(lambda: made.engine.stats().prefix.bytes)
        whole = await tokens_of(made.engine, row(5, 60))
        healthy = made.engine.submit(row(5, 60))
        await begun(healthy)
        step = type(made.engine._lanes).step

        def fail(lanes: object) -> object:
            if any(len(live.row.tokens) == 7 for live in made.engine._live.values()):
                raise RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")
            return step(lanes)  # type: ignore[arg-type]  # the lanes it was taken from

        monkeypatch.setattr(type(made.engine._lanes), "step", fail)
        with pytest.raises(MemoryExhausted, match="ran out of memory"):
            await rest(made.engine.submit(row(7, 50)))
        assert len(whole) == 60
        assert (await rest(healthy))[-1] == whole[-1]


async def test_a_lower_limit_never_falls_below_what_was_accepted(model: Path) -> None:
    async with rig(model, context=2048) as made:
        assert made.engine.limit(100 * MIB) == 100 * MIB
        ticket = made.engine.submit(row(20, 500))
        firm = made.engine.stats().weights_bytes + made.engine.stats().reserved_bytes
        assert made.engine.limit(1) == firm
        ticket.cancel()
        assert made.engine.limit(1) == made.engine.stats().weights_bytes
        with pytest.raises(MemoryExhausted):
            made.engine.submit(row(20, 500))


async def test_a_lower_limit_drives_prefixes_out_at_once(model: Path) -> None:
    async with rig(model, prefixes=PrefixCache(max_bytes=MIB, min_tokens=4), context=2048) as made:
        made.engine.limit(100 * MIB)
        await tokens_of(made.engine, row(300, 5))
        await until(lambda: made.engine.stats().prefix.bytes)
        made.engine.limit(made.engine.stats().weights_bytes + 1024)
        await until(lambda: not made.engine.stats().prefix.bytes)


def test_mlx_is_asked_what_it_holds(model: Path) -> None:
    before = read_memory()
    kept = load_weights(model)
    assert read_memory().used > before.used
    del kept


async def test_count_tokens_and_listing_need_no_memory(model: Path) -> None:
    meter = Meter()
    async with rig(model, read=meter) as made:
        made.engine.limit(100 * MIB)
        meter.used = lambda: 101 * MIB
        request = pb.CountTokensRequest(model="tiny", messages=ASKS[0].messages)
        assert (await made.service.count_tokens(Call(request=request))).token_count


def row(count: int, most: int, *, urgency: int = 1, deadline: float | None = None) -> Row:
    sampling = SamplingParams(temperature=0)
    tokens = tuple(range(1, count + 1))
    return Row(tokens=tokens, most=most, sampling=sampling, urgency=urgency, deadline=deadline)


async def rest(ticket: object) -> list[int]:
    """Returns the tokens that are still written until the row is over."""
    tokens: list[int] = []
    while True:
        for happening in await ticket.next():  # type: ignore[attr-defined]  # a ticket
            if isinstance(happening, Written):
                tokens.append(happening.token)
            if isinstance(happening, Over):
                if happening.failure is not None:
                    raise happening.failure
                return tokens


async def begun(ticket: object) -> None:
    while not any(isinstance(happening, Written) for happening in await ticket.next()):  # type: ignore[attr-defined]  # a ticket
        pass


async def tokens_of(engine: Engine, wanted: Row) -> list[int]:
    return await rest(engine.submit(wanted))


async def test_a_worker_is_adjusted_and_tells_what_it_takes(model: Path) -> None:
    async with rig(model, prefixes=PrefixCache(max_bytes=MIB, min_tokens=4), context=2048) as made:
        await tokens_of(made.engine, row(300, 5))
        await until(lambda: made.engine.stats().prefix.bytes)
        control = Control(made.engine, 7)
        told = await control.Adjust(worker_pb2.AdjustRequest(), None)
        assert told.limit_bytes == 7
        assert told.prefix_bytes > 0
        assert told.weights_bytes + told.prefix_bytes <= told.memory_bytes <= told.peak_bytes
        ticket = made.engine.submit(row(20, 1900))
        await begun(ticket)
        told = await control.Adjust(worker_pb2.AdjustRequest(limit_bytes=1), None)
        assert told.limit_bytes == told.weights_bytes + told.reserved_bytes
        assert told.live_count == 1
        ticket.cancel()
        assert (await control.Adjust(worker_pb2.AdjustRequest(), None)).limit_bytes == told.limit_bytes


async def test_a_worker_that_embeds_is_adjusted_too(tmp_path: Path) -> None:
    tiny_encoders.build(tmp_path / "m")
    async with mlx_embed_rig.rig(tmp_path / "m") as made:
        control = Control(made.engine, 0)
        told = await control.Adjust(worker_pb2.AdjustRequest(limit_bytes=64 * MIB), None)
        assert told.limit_bytes == 64 * MIB
        assert 0 < told.weights_bytes <= told.memory_bytes <= told.peak_bytes
        assert len(await made.vectors("a", "b")) == 2


async def test_registering_adds_the_service_to_a_server(model: Path) -> None:
    async with rig(model) as made:
        server = grpc.aio.server()
        assert controlled(made.engine, 5)(server, Edge(InFlight())) == ["forebay.mlx.v1.WorkerService"]
