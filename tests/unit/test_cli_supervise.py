"""The supervisor's promises, over processes that are scripts and a clock that jumps."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from forebay.cli.supervise import Backoff, Keeper, Program, State, Supervisor, describe
from forebay.testing import clock


@dataclass
class Run:
    """What one start of a program does."""

    seconds: float = 3600.0
    code: int = 1
    lines: tuple[str, ...] = ()
    deaf_to_term: bool = False


@dataclass
class World:
    """Starts scripted processes and writes down what happens to them."""

    runs: dict[str, list[Run]]
    events: list[tuple[float, str]] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    alive: set[str] = field(default_factory=set)

    def note(self, text: str) -> None:
        self.events.append((round(asyncio.get_running_loop().time(), 3), text))

    def say(self, name: str, line: str) -> None:
        self.said.append((name, line))

    async def spawn(self, program: Program) -> FakeProcess:
        run = self.runs[program.name].pop(0) if self.runs[program.name] else Run()
        self.note(f"start {program.name}")
        return FakeProcess(self, program.name, run)


class FakeProcess:
    pid = 4711

    def __init__(self, world: World, name: str, run: Run) -> None:
        self._world, self._name, self._run = world, name, run
        self._ended = asyncio.Event()
        self._code = run.code
        world.alive.add(name)

    async def follow(self, line: Callable[[str], None]) -> int:
        for text in self._run.lines:
            line(text)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._run.seconds):
                await self._ended.wait()
        self._world.alive.discard(self._name)
        self._world.note(f"end {self._name}")
        return self._code

    def terminate(self) -> None:
        self._world.note(f"term {self._name}")
        if not self._run.deaf_to_term:
            self._code = 0
            self._ended.set()

    def kill(self) -> None:
        self._world.note(f"kill {self._name}")
        self._code = -9
        self._ended.set()


def program(name: str, *, last: bool = False) -> Program:
    return Program(name=name, command=("true",), last=last)


STEADY = Backoff(first=timedelta(seconds=1), limit=timedelta(seconds=8), random=lambda: 1.0)


def supervisor(world: World, *names: str, kill_after: float = 10.0) -> Supervisor:
    return Supervisor(
        [program(name, last=name == "orchestrator") for name in names],
        say=world.say,
        spawn=world.spawn,
        backoff=STEADY,
        kill_after=timedelta(seconds=kill_after),
    )


def test_a_crashed_process_starts_again_after_waits_that_double_up_to_a_limit() -> None:
    world = World({"a": [Run(seconds=0.0, code=-11) for _ in range(6)]})

    async def body() -> None:
        over = supervisor(world, "a")
        await over.run(lambda: asyncio.sleep(32.0))
        assert over.keepers["a"].restarts == 6

    clock.run(body())
    starts = [at for at, what in world.events if what == "start a"]
    assert [b - a for a, b in itertools.pairwise(starts)] == [1, 2, 4, 8, 8, 8]
    assert ("a", "ended with signal SIGSEGV; starts again in 1.0 s") in world.said


def test_half_of_a_wait_is_random() -> None:
    low = Backoff(first=timedelta(seconds=4), random=lambda: 0.0)
    high = Backoff(first=timedelta(seconds=4), random=lambda: 0.999)
    assert low.seconds(1) == 2.0
    assert 3.9 < high.seconds(1) < 4.0
    assert low.seconds(10_000) == 15.0


def test_a_process_that_ran_long_counts_its_crashes_anew() -> None:
    world = World({"a": [Run(seconds=0.0), Run(seconds=0.0), Run(seconds=100.0), Run(seconds=0.0)]})

    async def body() -> None:
        await supervisor(world, "a").run(lambda: asyncio.sleep(110.0))

    clock.run(body())
    assert [at for at, what in world.events if what == "start a"][:5] == [0, 1, 3, 104, 106]


@pytest.mark.parametrize("code", [64, 69])
def test_a_process_that_refuses_is_not_started_again_and_its_reason_is_kept(code: int) -> None:
    world = World({"a": [Run(seconds=0.0, code=code, lines=("no mlx on this machine", ""))], "b": []})

    async def body() -> None:
        over = supervisor(world, "a", "b")

        async def work() -> None:
            while not over.keepers["a"].ended:
                await over.changed()
            assert over.keepers["a"].state is State.REFUSED
            assert over.keepers["a"].last_line == "no mlx on this machine"
            assert over.keepers["a"].exit_code == code
            await asyncio.sleep(100)
            assert world.alive == {"b"}

        await over.run(work)

    clock.run(body())
    assert [what for _, what in world.events if what == "start a"] == ["start a"]


def test_a_program_that_cannot_be_started_is_refused_with_the_reason() -> None:
    async def spawn(program: Program) -> FakeProcess:
        raise FileNotFoundError(2, "No such file or directory")

    async def body() -> None:
        keeper = Keeper(program("a"), say=lambda name, line: None, spawn=spawn)
        await keeper.run()
        assert keeper.state is State.REFUSED
        assert keeper.last_line == "cannot be started: No such file or directory"

    clock.run(body())


def test_the_orchestrator_stops_before_the_backends_it_uses() -> None:
    world = World({"mlx": [], "ollama": [], "orchestrator": []})

    async def body() -> str:
        async def work() -> str:
            await asyncio.sleep(5)
            return "done"

        return await supervisor(world, "mlx", "ollama", "orchestrator").run(work)

    assert clock.run(body()) == "done"
    order = [what for at, what in world.events if at == 5]
    assert order == [
        "term orchestrator",
        "end orchestrator",
        "term mlx",
        "term ollama",
        "end mlx",
        "end ollama",
    ]
    assert not world.alive


def test_a_process_that_does_not_stop_is_killed() -> None:
    world = World({"a": [Run(deaf_to_term=True)]})

    async def body() -> None:
        await supervisor(world, "a", kill_after=10).run(lambda: asyncio.sleep(1))

    clock.run(body())
    assert world.events[-2:] == [(11.0, "kill a"), (11.0, "end a")]
    assert ("a", "does not stop and is killed") in world.said


def test_kill_ends_everything_at_once() -> None:
    world = World({"a": [Run(deaf_to_term=True)], "orchestrator": [Run(deaf_to_term=True)]})

    async def body() -> None:
        over = supervisor(world, "a", "orchestrator")
        asyncio.get_running_loop().call_later(3, over.kill)
        await over.run(lambda: asyncio.sleep(1))

    clock.run(body())
    assert world.events[-1][0] == 3.0
    assert not world.alive


def test_a_wait_for_a_restart_ends_at_once_when_told_to_stop() -> None:
    world = World({"a": [Run(seconds=0.0)]})

    async def body() -> None:
        over = supervisor(world, "a")

        async def work() -> None:
            while over.keepers["a"].state is not State.WAITING:
                await over.changed()

        await over.run(work)
        assert over.keepers["a"].state is State.STOPPED

    clock.run(body())
    assert [what for _, what in world.events] == ["start a", "end a"]


def test_a_process_told_to_stop_while_it_starts_is_stopped() -> None:
    world = World({"a": []})

    async def body() -> None:
        gate = asyncio.Event()

        async def spawn(program: Program) -> FakeProcess:
            await gate.wait()
            return await world.spawn(program)

        keeper = Keeper(program("a"), say=world.say, spawn=spawn)
        async with asyncio.TaskGroup() as group:
            group.create_task(keeper.run())
            await asyncio.sleep(0)
            keeper.stop()
            gate.set()
        assert keeper.state is State.STOPPED

    clock.run(body())
    assert [what for _, what in world.events] == ["start a", "term a", "end a"]


def test_the_work_s_own_failure_comes_out_as_it_is_after_everything_stopped() -> None:
    world = World({"a": []})

    async def work() -> None:
        raise LookupError("as is")

    async def body() -> None:
        await supervisor(world, "a").run(work)

    with pytest.raises(LookupError, match="as is"):
        clock.run(body())
    assert not world.alive


def test_a_cancelled_supervisor_leaves_nothing_even_if_nothing_obeys() -> None:
    world = World({"a": [Run(deaf_to_term=True)]})

    async def body() -> None:
        over = supervisor(world, "a")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(over.run(lambda: asyncio.sleep(100)))
            await asyncio.sleep(1)
            task.cancel()
            await asyncio.sleep(1)
            task.cancel()  # while it waits for the process to stop

    clock.run(body())
    assert (2.0, "kill a") in world.events


def test_an_address_is_known_from_the_moment_it_is_announced_until_the_end() -> None:
    line = "forebay mlx listening on 127.0.0.1:50151"
    world = World({"mlx": [Run(seconds=5.0, lines=("loading", line))]})

    async def body() -> None:
        over = supervisor(world, "mlx")
        keeper = over.keepers["mlx"]

        async def work() -> None:
            while keeper.state is not State.LISTENING:
                await over.changed()
            assert keeper.address == "127.0.0.1:50151"
            assert repr(over) == "<Supervisor [mlx LISTENING]>"
            assert repr(keeper) == "<Keeper mlx LISTENING restarts 0>"
            while keeper.state is State.LISTENING:
                await over.changed()
            assert not keeper.address

        await over.run(work)

    clock.run(body())
    assert world.said[:2] == [("mlx", "loading"), ("mlx", line)]


def test_a_kill_without_a_process_keeps_it_from_starting_again() -> None:
    world = World({"a": [Run(seconds=0.0)]})

    async def body() -> None:
        keeper = Keeper(program("a"), say=world.say, spawn=world.spawn, backoff=STEADY)
        async with asyncio.TaskGroup() as group:
            group.create_task(keeper.run())
            while keeper.state is not State.WAITING:
                await asyncio.sleep(0)
            keeper.kill()
        assert keeper.restarts == 0
        assert keeper.state is State.STOPPED

    clock.run(body())
    assert [what for _, what in world.events] == ["start a", "end a"]


def test_exit_codes_are_put_into_words() -> None:
    assert describe(1) == "code 1"
    assert describe(-9) == "signal SIGKILL"
    assert describe(-99) == "signal 99"
