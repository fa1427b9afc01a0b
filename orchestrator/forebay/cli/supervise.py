"""Keeps processes running: starts them, passes on what they print, starts them again, stops them in order.

Each process leads a group of its own, so that Ctrl-C at the terminal reaches
only us and the order of stopping stays ours. Each holds the other end of a
pipe: should we die without a chance to say so, the pipe's end tells them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import IO, Protocol, TypeAlias, TypeVar

from forebay.kit.failure import printable
from forebay.kit.process import EX_UNAVAILABLE, EX_USAGE, STDIN_VARIABLE

FINAL_CODES = frozenset({EX_USAGE, EX_UNAVAILABLE})
"""Exit codes that say that another start would end the same way: a wrong setting, something missing."""

STEADY_SECONDS = 60.0
"""A process that ran for this long has started well; its next crash is counted as the first."""

LINE_CHARACTERS = 8192
"""Most characters of one line of a process; the rest is cut."""

_PIPE_SECONDS = 1.0
"""How long a dead process's output is still read. A grandchild can hold the pipe open for ever."""

_LISTENING = re.compile(r"forebay \S+ listening on (\S+)")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A process to keep running."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's own environment."""
    last: bool = False
    """Whether it stops before all others: it uses them."""


class Process(Protocol):
    """A process that was started."""

    pid: int

    async def follow(self, line: Callable[[str], None]) -> int:
        """Shows each line of output and returns the exit code, negative for a signal."""

    def terminate(self) -> None:
        """Asks it to stop."""

    def kill(self) -> None:
        """Ends it and its group at once."""


Spawn: TypeAlias = Callable[[Program], Awaitable[Process]]


class Child:
    """A real process, the leader of its own group.

    Its pipes are ours and not asyncio's: asyncio tells of a process's end only
    when nobody holds its pipes any more, and a grandchild can hold them for ever.

    Args:
        process: as asyncio started it.
        output: where its output can be read.
        leash: descriptor whose closing tells it that we are gone.
    """

    def __init__(self, process: asyncio.subprocess.Process, *, output: IO[bytes], leash: int) -> None:
        self.pid = process.pid
        self._process = process
        self._output = output
        self._leash = leash

    @classmethod
    async def spawn(cls, program: Program) -> Child:
        """Starts a program.

        Raises:
            OSError: it cannot be started.
        """
        env = {**os.environ, **program.env, STDIN_VARIABLE: "1", "PYTHONUNBUFFERED": "1"}
        stdin, leash = os.pipe()
        output, stdout = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *program.command,
                stdin=stdin,
                stdout=stdout,
                stderr=asyncio.subprocess.STDOUT,
                env=env,
                process_group=0,
            )
        except BaseException:
            os.close(leash)
            os.close(output)
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        return cls(process, output=os.fdopen(output, "rb", buffering=0), leash=leash)

    async def follow(self, line: Callable[[str], None]) -> int:
        """Shows each line of output and returns the exit code. Its group is empty then. Once only."""
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read(line))
                code = await self._process.wait()
                await asyncio.wait({reading}, timeout=_PIPE_SECONDS)
                reading.cancel()
            return code
        finally:
            self.kill()
            os.close(self._leash)

    def terminate(self) -> None:
        """Asks it to stop with SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """Kills its group, which is itself and whatever it left behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _read(self, line: Callable[[str], None]) -> None:
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), self._output
        )
        rest = b""
        try:
            while data := await stream.read(65536):
                *lines, rest = (rest + data).split(b"\n")
                for item in lines:
                    line(_decode(item))
                # A process that prints no line ends would otherwise fill our memory.
                rest = rest[:LINE_CHARACTERS]
        finally:
            transport.close()
            if rest:
                line(_decode(rest))


def _decode(data: bytes) -> str:
    return printable(data.decode("utf-8", "replace").rstrip("\r"))[:LINE_CHARACTERS]


class State(Enum):
    """Where a kept process is in its life."""

    STARTING = "starting"
    LISTENING = "listening"
    """It said that it listens."""
    WAITING = "waiting to start again"
    REFUSED = "not started"
    """It ended with a code that says that another start is no use."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before a crashed process is started again."""

    first: timedelta = timedelta(milliseconds=500)
    limit: timedelta = timedelta(seconds=30)
    random: Callable[[], float] = random.random
    """In [0, 1). Half of a wait is random, so that processes that fell together do not rise together."""

    def seconds(self, crashes: int) -> float:
        """Returns the wait after so many crashes in a row, the first being 1."""
        longest = min(self.limit.total_seconds(), self.first.total_seconds() * 2.0 ** min(crashes - 1, 32))
        return longest * (0.5 + self.random() / 2)


class Keeper:
    """Keeps one program running until it is told to stop.

    Args:
        program: what to run.
        spawn: starts it.
        say: is given a line the program printed, or one about it.
        changed: is called after each change of `state`.
        backoff: how long to wait between starts.
    """

    def __init__(
        self,
        program: Program,
        *,
        say: Callable[[str, str], None],
        spawn: Spawn = Child.spawn,
        changed: Callable[[], None] = lambda: None,
        backoff: Backoff | None = None,
    ) -> None:
        self.program = program
        self.state = State.STARTING
        self.address = ""
        """Where it listens, once it said so."""
        self.restarts = 0
        self.last_line = ""
        """The last line it printed: the reason, where it refused to start."""
        self.exit_code: int | None = None
        """What it last ended with."""
        self._say = say
        self._spawn = spawn
        self._changed = changed
        self._backoff = backoff or Backoff()
        self._process: Process | None = None
        self._stop = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Keeper {self.program.name} {self.state.name} restarts {self.restarts}>"

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return self.state in (State.REFUSED, State.STOPPED)

    async def run(self) -> None:
        """Runs the program, again and again, until `stop` or until another start is no use."""
        loop = asyncio.get_running_loop()
        crashes = 0
        while not self._stop.is_set():
            began = loop.time()
            self._move(State.STARTING)
            code = await self._once()
            self.exit_code = code
            if self._stop.is_set():
                break
            if code in FINAL_CODES:
                self._move(State.REFUSED)
                return
            crashes = 1 if loop.time() - began >= STEADY_SECONDS else crashes + 1
            delay = self._backoff.seconds(crashes)
            self._move(State.WAITING)
            self._say(self.program.name, f"ended with {describe(code)}; starts again in {delay:.1f} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop.wait()
            self.restarts += not self._stop.is_set()
        self._move(State.STOPPED)

    def stop(self) -> None:
        """Asks the program to stop, and does not start it again."""
        self._stop.set()
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Ends the program at once, and does not start it again."""
        self._stop.set()
        if self._process is not None:
            self._process.kill()

    async def _once(self) -> int:
        try:
            self._process = await self._spawn(self.program)
        except OSError as error:
            self._line(f"cannot be started: {error.strerror or error}")
            return EX_UNAVAILABLE
        try:
            if self._stop.is_set():  # told to stop while it was being started
                self._process.terminate()
            return await self._process.follow(self._line)
        finally:
            self._process = None
            self.address = ""

    def _line(self, line: str) -> None:
        if line.strip():
            self.last_line = line
        found = _LISTENING.fullmatch(line)
        if found is not None:
            self.address = found[1]
            self._move(State.LISTENING)
        self._say(self.program.name, line)

    def _move(self, state: State) -> None:
        self.state = state
        self._changed()


class Supervisor:
    """Keeps several programs running around some work, and leaves none behind.

    Args:
        programs: what to run.
        say: is given each line, with the name of its program.
        spawn: starts a program.
        backoff: how long to wait between starts.
        kill_after: how long a program may take to stop.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        say: Callable[[str, str], None],
        spawn: Spawn = Child.spawn,
        backoff: Backoff | None = None,
        kill_after: timedelta = timedelta(seconds=40),
    ) -> None:
        self._change = asyncio.Event()
        self._kill_after = kill_after.total_seconds()
        self._say = say
        self._killed = False
        self.keepers = {
            program.name: Keeper(program, say=say, spawn=spawn, changed=self._change.set, backoff=backoff)
            for program in programs
        }

    def __repr__(self) -> str:
        inside = " | ".join(f"{k.program.name} {k.state.name}" for k in self.keepers.values())
        return f"<Supervisor [{inside}]>"

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Starts the programs, does `work`, stops them in order, and returns what the work returned.

        If it is cancelled while it stops them, it kills what is left.
        """
        results: list[T] = []
        failed: Exception | None = None
        async with asyncio.TaskGroup() as group:
            tasks = {keeper: group.create_task(keeper.run()) for keeper in self.keepers.values()}
            try:
                results.append(await work())
            except Exception as error:  # noqa: BLE001  # raised below: the group would wrap it in another
                failed = error
            finally:
                await self._stop(tasks)
        if failed is not None:
            raise failed
        return results[0]

    def kill(self) -> None:
        """Ends every program at once."""
        self._killed = True
        for keeper in self.keepers.values():
            keeper.kill()

    async def changed(self) -> None:
        """Waits until a program's state changes."""
        self._change.clear()
        await self._change.wait()

    async def _stop(self, tasks: Mapping[Keeper, asyncio.Task[None]]) -> None:
        try:
            for last in (True, False):
                some = [keeper for keeper in tasks if keeper.program.last is last]
                for keeper in some:
                    keeper.stop()
                waiting = {tasks[keeper] for keeper in some}
                if not waiting:
                    continue
                _, late = await asyncio.wait(waiting, timeout=self._kill_after)
                for keeper in some:
                    if tasks[keeper] in late:
                        self._say(keeper.program.name, "does not stop and is killed")
                        keeper.kill()
        except asyncio.CancelledError:
            self.kill()
            raise


def describe(code: int) -> str:
    """Returns an exit code in words: `code 1` or `signal SIGKILL`."""
    if code >= 0:
        return f"code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Returns the command that runs a module with this Python."""
    return (sys.executable, "-m", module, *arguments)
