"""Real processes in tests: started, waited for with a bound, stopped, and none left over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

import forebay
from forebay.kit.process import STDIN_VARIABLE

START_SECONDS = 30.0
"""Longest wait for a process to listen. Starting Python and gRPC takes 1 s; a loaded CI machine is slower."""

STOP_SECONDS = 20.0
"""Longest wait for a process to end after SIGTERM."""

_LISTENING = re.compile(r"^forebay \S+ listening on (?P<address>\S+)\n", re.MULTILINE)


class ServiceProcess:
    """A `python -m forebay.…` process, for `async with`: inside, it listens; after it, nothing of it is left.

    Args:
        module: what to run, such as `forebay.testing.scripted`.
        arguments: its command line.
        environment: variables to set for it.
        folder: where it runs; None is here.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._folder = folder
        # The end of our pipe stops it too, so that a test run that is killed leaves nothing behind.
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(Path(path).parent) for path in forebay.__path__),
            STDIN_VARIABLE: "1",
            **(environment or {}),
        }
        self._readers: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._family: set[psutil.Process] = set()
        self._process: asyncio.subprocess.Process | None = None
        self.output = ""
        """What it wrote to standard output so far, since it was last started."""
        self.log = ""
        """What it wrote to standard error so far, since it was last started."""
        self.address = ""
        """Where it listens."""

    def __repr__(self) -> str:
        return f"<ServiceProcess {self._command[2]} pid {self.pid} at {self.address or 'nowhere yet'}>"

    @property
    def pid(self) -> int:
        """Its process identifier; 0 before it was started."""
        return self._process.pid if self._process is not None else 0

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.returncode if self._process is not None else None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts the process and returns when it listens.

        Raises:
            AssertionError: it ended, or did not listen in time.
        """
        await self.launch()
        try:
            self.address = (await self.wait_for_output(_LISTENING))["address"]
        except BaseException:
            await self.kill()
            raise

    async def launch(self) -> None:
        """Starts the process and does not wait for it to listen."""
        self.output = self.log = ""  # of an earlier run: what it said of its address is not true any more
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            cwd=self._folder,
            start_new_session=True,  # so that its whole family can be found
        )
        # They end with the process's pipes, and `_wait` waits for them.
        self._readers = [
            asyncio.create_task(self._read(self._process.stdout, "output")),
            asyncio.create_task(self._read(self._process.stderr, "log")),
        ]

    async def wait_for_output(
        self, pattern: re.Pattern[str], *, timeout: float = START_SECONDS
    ) -> re.Match[str]:
        """Waits until standard output has a match, and returns it.

        Raises:
            AssertionError: the process ended, or the time did.
        """
        try:
            async with asyncio.timeout(timeout):
                while (match := pattern.search(self.output)) is None:
                    if all(reader.done() for reader in self._readers):
                        await self._wait()
                        raise AssertionError(self._complain(f"ended with {self.returncode}"))
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise AssertionError(
                self._complain(f"did not write {pattern.pattern!r} in {timeout} s")
            ) from error
        return match

    async def wait(self, *, timeout: float = STOP_SECONDS) -> int:
        """Waits until the process ends by itself, and returns its exit code.

        Raises:
            AssertionError: it did not in time.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._wait()
        except TimeoutError as error:
            raise AssertionError(self._complain(f"did not end in {timeout} s")) from error

    async def stop(self, *, timeout: float = STOP_SECONDS) -> int:
        """Asks the process to end with SIGTERM and returns its exit code.

        Raises:
            AssertionError: it, or a process that it started, did not end in time. What is left is killed.
        """
        self._note_family()
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            code = await self.wait(timeout=timeout)
            left = await self._left(timeout=5.0)
            if left:
                raise AssertionError(self._complain(f"left processes behind: {left}"))
        finally:
            await self.kill()
        return code

    async def kill(self) -> None:
        """Ends the process and all that it started, at once."""
        self._note_family()
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            await self._wait()
            await self._left(timeout=5.0)

    def signal(self, number: signal.Signals) -> None:
        """Sends the process a signal.

        Raises:
            ProcessLookupError: it has ended.
        """
        if self._process is None or self._process.returncode is not None:
            raise ProcessLookupError(f"{self!r} does not run")
        self._process.send_signal(number)

    def freeze(self) -> None:
        """Stops the process where it is, as a debugger would."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets a frozen process go on."""
        self.signal(signal.SIGCONT)

    async def _wait(self) -> int:
        assert self._process is not None
        code = await self._process.wait()
        await asyncio.wait(self._readers)  # and not gather: a wait that times out must not cancel them
        if self._process.stdin is not None:
            self._process.stdin.close()
        return code

    async def _read(self, stream: asyncio.StreamReader | None, name: str) -> None:
        assert stream is not None
        while data := await stream.read(64 * 1024):
            setattr(self, name, getattr(self, name) + data.decode("utf-8", "replace"))
            self._changed.set()
        self._changed.set()

    def _note_family(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            if self._process.returncode is None:  # the number may be another process's by now
                self._family |= {process, *process.children(recursive=True)}
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == self._process.pid:
                    self._family.add(process)

    async def _left(self, *, timeout: float) -> list[psutil.Process]:
        """Returns what still runs of the family, after giving it a moment to end."""
        self._note_family()
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while (left := [p for p in self._family if _runs(p)]) and loop.time() < until:  # noqa: ASYNC110 - see below
            await asyncio.sleep(0.02)  # no event of ours tells that a grandchild has ended
        return left

    def _complain(self, what: str) -> str:
        return f"{self!r} {what}\nits output:\n{self.output}\nits log:\n{self.log[-8000:]}"


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
