"""Runs a program that does one thing and ends: a download, a conversion."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from forebay.kit.failure import printable

TAIL_LINES = 20
"""Most lines kept of what a program said last: enough for an error and its cause."""

TAIL_CHARACTERS = 400
"""Most characters kept of one such line."""

LINE_BYTES = 1 << 16
"""Most bytes of a line of output; a longer one is cut in pieces."""

_KILL_AFTER = 5.0
"""Seconds between asking a program to end and ending it. Downloads and conversions have nothing to save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a program ended."""

    code: int
    """Its exit code; negative is the signal that ended it."""
    tail: tuple[str, ...]
    """What it said last on stderr, without control characters, oldest line first."""

    @property
    def last(self) -> str:
        """The last thing it said, or else its exit code."""
        return self.tail[-1] if self.tail else f"exit code {self.code}"


class Tail:
    """The last lines of a stream, fit to be shown."""

    def __init__(self, lines: int = TAIL_LINES) -> None:
        self._lines: deque[str] = deque(maxlen=lines)

    def add(self, line: str) -> None:
        """Keeps a line, unless it is blank."""
        text = printable(line.strip())[:TAIL_CHARACTERS]
        if text:
            self._lines.append(text)

    def __call__(self) -> tuple[str, ...]:
        """Returns the lines kept, oldest first."""
        return tuple(self._lines)


async def read_lines(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    """Calls `on_line` with each line of a stream until it ends. Nothing a program prints can break this."""
    pending = b""
    while chunk := await stream.read(LINE_BYTES):
        *lines, pending = (pending + chunk).replace(b"\r", b"\n").split(b"\n")
        if len(pending) > LINE_BYTES:
            lines.append(pending)
            pending = b""
        for line in lines:
            on_line(line.decode("utf-8", "replace"))
    if pending:
        on_line(pending.decode("utf-8", "replace"))


async def run_tool(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Runs a program to its end; when cancelled, ends it and everything it started.

    Args:
        argv: program and arguments.
        env: variables that differ from this process's.
        on_line: is called with each line of its standard output.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(env or {})},
        start_new_session=True,  # so that its children can be ended with it
    )
    assert process.stdout is not None
    assert process.stderr is not None
    tail = Tail()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read_lines(process.stdout, on_line))
            tasks.create_task(read_lines(process.stderr, tail.add))
            code = await process.wait()
    finally:
        await _end(process)
    return Ended(code=code, tail=tail())


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends the program's whole session, and collects it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _KILL_AFTER)
