"""`forebay up` with real processes: it answers, it restarts, it stops, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Self

import aiohttp
import psutil
import pytest

import forebay
from forebay.cli import supervise
from forebay.cli.problems import ExitCode, Problem
from forebay.cli.settings import UpSettings
from forebay.cli.supervise import Program, python
from forebay.cli.up import Plan, Up, plan
from forebay.mlx_service.fetch import default_cache_dir
from forebay.testing.processes import ServiceProcess

PATIENCE = 60.0
"""Longest wait for anything; several test runs may share a machine."""

HOME_CACHE = default_cache_dir()
"""Where the default model is kept between runs."""


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError as error:
        raise AssertionError(f"it never came true: {what}") from error


class Command:
    """A `forebay` command as a process, for `async with`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._folder = folder
        self._arguments = arguments
        self.out = ""
        self.err = ""
        self.family: list[psutil.Process] = []
        self.process: asyncio.subprocess.Process
        self._reading: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
        roots = os.pathsep.join(str(Path(path).parent) for path in forebay.__path__)
        environment |= {"PYTHONPATH": roots, "FOREBAY_CACHE_DIR": str(self._folder / "cache")}
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "forebay.cli", *self._arguments),
            cwd=self._folder,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reading = [
            asyncio.create_task(self._read(self.process.stdout, "out")),
            asyncio.create_task(self._read(self.process.stderr, "err")),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.look()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        for member in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        await self.process.wait()
        await asyncio.gather(*self._reading)

    async def _read(self, stream: asyncio.StreamReader | None, name: str) -> None:
        assert stream is not None
        while data := await stream.read(65536):
            setattr(self, name, getattr(self, name) + data.decode("utf-8", "replace"))

    def look(self) -> list[psutil.Process]:
        """Remembers the processes it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for member in psutil.Process(self.process.pid).children(recursive=True):
                if member not in self.family:
                    self.family.append(member)
        return self.family

    def living(self) -> list[psutil.Process]:
        """Returns those of them that still run."""
        return [m for m in self.family if m.is_running() and m.status() != psutil.STATUS_ZOMBIE]

    async def says(self, pattern: str) -> re.Match[str]:
        """Waits until stderr has a match."""
        await until(
            lambda: re.search(pattern, self.err) is not None or all(task.done() for task in self._reading),
            f"{pattern!r} in\n{self.err}",
        )
        found = re.search(pattern, self.err)
        assert found is not None, self.err
        return found

    async def ends(self) -> int:
        """Waits for its end and returns the exit code."""
        async with asyncio.timeout(PATIENCE):
            code = await self.process.wait()
            await asyncio.gather(*self._reading)
        return code


def configure(
    folder: Path, backend: str, *, address: str = "127.0.0.1:0", more: str = "", web: str = ""
) -> None:
    (folder / "forebay.toml").write_text(
        f"""
[up]
services = ["orchestrator"]
restart_delay = "10ms"
{more}
[orchestrator]
address = "{address}"
default_model = "a"
{f'web_address = "{web}"' if web else ""}
[[orchestrator.backends]]
name = "scripted"
address = "{backend}"
"""
    )


@asynccontextmanager
async def scripted(*arguments: str) -> AsyncIterator[str]:
    words = ["--address", "127.0.0.1:0", "--name", "scripted", "--models", "a,b", *arguments]
    async with ServiceProcess("forebay.testing.scripted", words) as process:
        yield process.address


async def test_once_prints_the_answer_alone_on_stdout_and_leaves_nothing(tmp_path: Path) -> None:
    async with scripted("--token-count", "5") as backend:
        configure(tmp_path, backend)
        async with Command(tmp_path, "up", "--ask", "What is it?", "--once") as command:
            await command.says("forebay is up on")
            command.look()
            assert await command.ends() == 0
            assert len(command.out.split()) == 5
            assert command.out.count("\n") == 1
            assert "scripted · a · first token" in command.err
            assert "5 tokens" in command.err
            assert "\x1b" not in command.out + command.err
            assert command.family
            assert command.living() == []


async def test_where_there_is_a_dashboard_its_address_is_told_and_opens(tmp_path: Path) -> None:
    async with scripted() as backend:
        configure(tmp_path, backend, web="127.0.0.1:0")
        async with Command(tmp_path, "up") as command, aiohttp.ClientSession() as session:
            url = (await command.says(r"its dashboard is at (http://127\.0\.0\.1:\d+/)\n"))[1]
            async with session.get(url) as answer:
                assert answer.status == 200
                assert "<title>" in await answer.text()


async def test_once_fails_with_the_failure_s_code_and_keeps_what_came(tmp_path: Path) -> None:
    async with scripted("--fault", "STREAM_INTERRUPTED@2") as backend:
        configure(tmp_path, backend)
        async with Command(tmp_path, "up", "--ask", "What is it?", "--once") as command:
            assert await command.ends() == ExitCode.INTERRUPTED
            assert len(command.out.split()) == 2
            assert "[the answer stops here: it is not complete]" in command.err
            assert "(STREAM_INTERRUPTED)" in command.err
            assert "Traceback" not in command.err


async def test_without_once_a_failed_question_is_told_and_the_mesh_stays(tmp_path: Path) -> None:
    async with scripted("--fault", "STREAM_INTERRUPTED@2") as backend:
        configure(tmp_path, backend)
        async with Command(tmp_path, "up", "--ask", "What is it?") as command:
            await command.says("Ctrl-C stops everything")
            assert "(STREAM_INTERRUPTED)" in command.err
            assert command.process.returncode is None


async def test_where_nothing_can_serve_it_says_why_and_stops(tmp_path: Path) -> None:
    configure(tmp_path, "127.0.0.1:1")
    async with Command(tmp_path, "up") as command:
        assert await command.ends() == ExitCode.UNAVAILABLE
        assert "error: no backend can serve" in command.err
        assert "  scripted: " in command.err
        assert "forebay doctor" in command.err
        assert command.living() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_stops_everything_in_order_with_exit_0(tmp_path: Path, number: signal.Signals) -> None:
    async with scripted() as backend:
        configure(tmp_path, backend)
        async with Command(tmp_path, "up") as command:
            await command.says("Ctrl-C stops everything")
            assert command.look()
            command.process.send_signal(number)
            assert await command.ends() == 0
            assert "stopping: " in command.err
            assert command.err.rstrip().endswith("stopped")
            assert command.living() == []


async def test_a_second_signal_kills_what_does_not_end(tmp_path: Path) -> None:
    async with scripted("--token-delay", "60s") as backend:
        configure(tmp_path, backend)
        async with Command(tmp_path, "up") as command:
            found = await command.says(r"forebay is up on (\S+)")
            command.look()
            async with Command(tmp_path, "chat", "hi", "-a", found[1]) as chat:
                await until(lambda: bool(chat.out), "a first token")
                command.process.send_signal(signal.SIGINT)
                await command.says("stopping: ")
                command.process.send_signal(signal.SIGINT)
                assert await command.ends() == 0
                assert "killing what is left" in command.err
                assert command.living() == []
                assert await chat.ends() == ExitCode.INTERRUPTED


async def test_a_killed_parent_leaves_no_process_within_seconds(tmp_path: Path) -> None:
    async with scripted() as backend:
        configure(tmp_path, backend)
        async with Command(tmp_path, "up") as command:
            await command.says("Ctrl-C stops everything")
            assert command.look()
            command.process.kill()
            await command.process.wait()
            await until(lambda: not command.living(), "its processes are gone")


async def test_a_killed_service_comes_back_and_answers(tmp_path: Path) -> None:
    address = free_address()
    async with scripted() as backend:
        configure(tmp_path, backend, address=address)
        async with Command(tmp_path, "up") as command:
            await command.says("Ctrl-C stops everything")
            (child,) = command.look()
            child.kill()
            await command.says(r"orchestrator \| ended with signal SIGKILL; starts again in 0\.0 s")
            await command.says("listening on(.|\n)*listening on")
            await command.says(r"(scripted is ACTIVE(.|\n)*){2}")
            async with Command(tmp_path, "chat", "-q", "hi", "-m", "a", "-a", address) as chat:
                assert await chat.ends() == 0, chat.err
                assert chat.out


async def test_of_two_that_start_at_once_one_serves_and_the_other_names_it(tmp_path: Path) -> None:
    address = free_address()
    async with scripted() as backend:
        configure(tmp_path, backend, address=address)
        async with Command(tmp_path, "up") as one, Command(tmp_path, "up") as two:
            await until(
                lambda: (
                    None not in (one.process.returncode, two.process.returncode)
                    or (one.process.returncode is None) != (two.process.returncode is None)
                ),
                "one of them ended",
            )
            loser, winner = (one, two) if one.process.returncode is not None else (two, one)
            assert await loser.ends() == ExitCode.UNAVAILABLE
            assert f"orchestrator: {address} is taken by forebay.orchestrator (pid " in loser.err
            assert "nothing was started" in loser.err
            await winner.says("Ctrl-C stops everything")
            assert winner.process.returncode is None


async def test_colours_appear_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    async with scripted() as backend:
        configure(tmp_path, backend)
        async with Command(tmp_path, "up") as command:
            address = (await command.says(r"forebay is up on (\S+)"))[1]
            await command.says("Ctrl-C stops everything")
            words = [sys.executable, "-m", "forebay.cli", "status", "-a", address]
            environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
            environment.pop("NO_COLOR", None)
            outer, inner = pty.openpty()
            process = await asyncio.create_subprocess_exec(
                *words, stdin=inner, stdout=inner, stderr=inner, env=environment
            )
            os.close(inner)
            seen = b""
            with contextlib.suppress(OSError), os.fdopen(outer, "rb", buffering=0) as terminal:
                while data := await asyncio.to_thread(terminal.read, 65536):
                    seen += data
            assert await process.wait() == 0
            assert b"\x1b[32mactive" in seen
            async with Command(tmp_path, "status", "-a", address) as plain:
                assert await plain.ends() == 0
                assert "\x1b" not in plain.out + plain.err


@pytest.mark.mlx
@pytest.mark.model
async def test_the_first_question_is_answered_over_mlx_by_the_model_that_comes_along(tmp_path: Path) -> None:
    (tmp_path / "forebay.toml").write_text(
        f"""
[mlx]
address = "127.0.0.1:0"
cache_dir = {json.dumps(str(HOME_CACHE))}
[orchestrator]
address = "127.0.0.1:0"
"""
    )
    words = ("--only", "mlx,orchestrator", "--ask", "What is the capital of France?", "--once")
    async with Command(tmp_path, "up", *words) as command:
        await command.says("forebay is up on")
        command.look()
        assert await command.ends() == 0, command.err
        assert "Paris" in command.out
        assert "mlx · smollm2-135m-instruct · first token" in command.err
        assert command.living() == []


# The same in this process, with services that are scripts.

ANNOUNCES = "import sys; print('forebay x listening on 127.0.0.1:1', flush=True); sys.stdin.read()"
REFUSES = "print('x: it is not there'); raise SystemExit(69)"


def script(name: str, code: str) -> Program:
    return Program(name=name, command=(sys.executable, "-c", code), last=name == "orchestrator")


def made(*programs: Program, addresses: dict[str, str] | None = None, **settings: object) -> Plan:
    return Plan(
        up=UpSettings.model_validate({"kill_after": 5, "ready_timeout": 20, **settings}),
        services=tuple(program.name for program in programs),
        addresses=addresses or {},
        programs=programs,
        fetch=None,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOREBAY_CACHE_DIR", str(tmp_path / "cache"))
    roots = os.pathsep.join(str(Path(path).parent) for path in forebay.__path__)
    monkeypatch.setenv("PYTHONPATH", roots)


async def test_an_orchestrator_that_refuses_ends_everything_with_its_reason() -> None:
    running = Up(
        made(
            script("mlx", ANNOUNCES),
            script("orchestrator", REFUSES),
            addresses={"orchestrator": free_address()},
        )
    )
    with pytest.raises(Problem, match="the orchestrator cannot run") as caught:
        await running.run()
    assert caught.value.lines == ("orchestrator: x: it is not there",)


async def test_a_service_that_refuses_is_told_and_the_rest_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with scripted() as backend:
        configure(tmp_path, backend)
        planned = plan(tmp_path / "forebay.toml")
        whole = made(
            script("ollama", REFUSES),
            *planned.programs,
            addresses=dict(planned.addresses),
        )
        assert await Up(whole, question="hi", once=True).run() is ExitCode.OK
    out, err = capsys.readouterr()
    assert out
    assert "ollama: x: it is not there" in err


async def test_a_question_that_fails_with_once_raises_its_problem(tmp_path: Path) -> None:
    async with scripted("--fault", "QUEUE_FULL@before") as backend:
        configure(tmp_path, backend)
        with pytest.raises(Problem) as caught:
            await Up(plan(tmp_path / "forebay.toml"), question="hi", once=True).run()
    assert caught.value.code is ExitCode.BUSY


async def test_without_a_backend_it_can_wait_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(tmp_path, "127.0.0.1:1", more="require_backend = false")
    assert await Up(plan(tmp_path / "forebay.toml"), once=True).run() is ExitCode.OK
    assert "forebay is up on" in capsys.readouterr().err


async def test_without_an_orchestrator_it_keeps_the_services_until_none_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = Up(made(script("mlx", ANNOUNCES), script("ollama", REFUSES), ready_timeout=1), question="hi")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(running.run())
        said = ""

        def heard() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return "nobody to ask" in said

        await until(heard, "it is up")
        os.kill(os.getpid(), signal.SIGINT)
        assert await task is ExitCode.OK
    assert "mlx listens, and does not serve yet, on 127.0.0.1:1" in said
    assert "ollama: x: it is not there" in said
    with pytest.raises(Problem, match="no service is left"):
        await Up(made(script("mlx", REFUSES))).run()


async def test_an_orchestrator_that_ends_for_good_later_ends_everything(tmp_path: Path) -> None:
    """It serves, and its next start is refused."""
    async with scripted() as backend:
        configure(tmp_path, backend)
        planned = plan(tmp_path / "forebay.toml")
        mark = tmp_path / "started"
        words = planned.programs[0].command
        code = (
            "import os, sys, pathlib\n"
            f"mark = pathlib.Path({str(mark)!r})\n"
            "if mark.exists(): print('x: not again'); sys.exit(69)\n"
            "mark.write_text(str(os.getpid()))\n"
            f"os.execv({words[0]!r}, {list(words)!r})\n"
        )
        whole = made(script("orchestrator", code), addresses=dict(planned.addresses), restart_delay="10ms")

        async def crash() -> None:
            await until(lambda: mark.exists() and bool(mark.read_text()), "it started")
            await until(lambda: seen("Ctrl-C"), "it is up")
            os.kill(int(mark.read_text()), signal.SIGKILL)

        said: list[str] = []

        def seen(word: str) -> bool:
            return any(word in text for text in said)

        running = Up(whole)
        real = running._voice.say

        def say(text: str, *, style: str = "bold") -> None:
            said.append(text)
            real(text, style=style)

        running._voice.say = say  # type: ignore[method-assign]  # listens in
        async with asyncio.TaskGroup() as group:
            group.create_task(crash())
            with pytest.raises(Problem, match="the orchestrator has ended") as caught:
                await running.run()
    assert caught.value.lines == ("orchestrator: x: not again",)


async def test_a_signal_while_it_starts_stops_it(tmp_path: Path) -> None:
    slow = script("orchestrator", "import time; print('starting', flush=True); time.sleep(60)")
    running = Up(made(slow, addresses={"orchestrator": free_address()}))
    loop = asyncio.get_running_loop()
    loop.call_later(0.5, os.kill, os.getpid(), signal.SIGTERM)
    assert await running.run() is ExitCode.OK


# One real child.


async def follow(code: str) -> tuple[int, list[str]]:
    child = await supervise.Child.spawn(Program(name="x", command=(sys.executable, "-c", code)))
    lines: list[str] = []
    async with asyncio.timeout(PATIENCE):
        return await child.follow(lines.append), lines


async def test_lines_of_a_child_are_whole_clean_and_bounded() -> None:
    code = (
        "import sys\n"
        "sys.stdout.write('one\\r\\ntw\\x1b[1mo\\n' + 'x' * 100_000 + '\\nlast')\n"
        "sys.stdout.flush()\nsys.stderr.write('!')\nsys.exit(3)\n"
    )
    ended, lines = await follow(code)
    assert ended == 3
    assert lines[0] == "one"
    assert "\x1b" not in lines[1]
    assert len(lines[2]) <= supervise.LINE_CHARACTERS
    assert lines[-1] == "last!"


async def test_a_grandchild_that_holds_the_pipe_is_not_waited_for_and_ends_with_its_group() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
    )
    ended, lines = await follow(code)
    assert ended == 0
    await until(
        lambda: (
            not psutil.pid_exists(int(lines[0]))
            or psutil.Process(int(lines[0])).status() == psutil.STATUS_ZOMBIE
        ),
        "the grandchild is gone",
    )


async def test_a_child_that_is_gone_can_be_stopped_and_killed_again() -> None:
    child = await supervise.Child.spawn(Program(name="x", command=(sys.executable, "-c", "")))
    await child.follow(lambda line: None)
    child.terminate()
    child.kill()


def test_a_module_is_run_with_this_python() -> None:
    assert python("a.b", "--c") == (sys.executable, "-m", "a.b", "--c")
    assert UpSettings().kill_after > timedelta(seconds=30)
