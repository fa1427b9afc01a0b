"""The example clients do what they are there to show, in every language, against real processes.

Python runs always. The others are built first, which takes a tool chain and a package registry:
`make polyglot`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from forebay.testing.calls import ask
from forebay.testing.processes import ServiceProcess
from forebay.testing.script import Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine
from promise_rig import Member, Rig, mesh

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Tell me of the größer river."
TOKEN_COUNT = 400
WAIT_SECONDS = 60.0
BUILD_SECONDS = 1500.0


@dataclass(frozen=True)
class Language:
    """How an example is built and run, in its own folder."""

    name: str
    run: tuple[str, ...]
    build: tuple[tuple[str, ...], ...] = ()
    tools: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return ROOT / "examples" / self.name


LANGUAGES = [
    Language("python", (sys.executable, "ask.py")),
    Language("go", ("./ask",), (("go", "generate"), ("go", "build", "-o", "ask")), ("go", "buf")),
    Language("node", ("node", "ask.js"), (("npm", "ci"),), ("node", "npm")),
    Language("java", ("java", "-jar", "target/ask.jar"), (("mvn", "-B", "-q", "package"),), ("java", "mvn")),
    Language("rust", ("target/debug/ask",), (("cargo", "build", "--locked"),), ("cargo",)),
]

# What an example finds: the stubs and nothing else of ours, and buf, which is installed beside Python.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT / "protos"),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
}


@functools.cache
def built(language: Language) -> None:
    for tool in language.tools:
        if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None:
            pytest.skip(f"there is no {tool} here to build the example in {language.name} with")
    for command in language.build:
        done = subprocess.run(
            command, cwd=language.folder, env=ENVIRONMENT, timeout=BUILD_SECONDS, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"


@pytest.fixture(
    params=[
        pytest.param(each, id=each.name, marks=[pytest.mark.polyglot] if each.build else [])
        for each in LANGUAGES
    ]
)
def language(request: pytest.FixtureRequest) -> Language:
    built(request.param)
    return request.param


@dataclass(frozen=True)
class Ended:
    """What a program left behind."""

    code: int
    output: str
    log: str

    def names(self, code: str) -> bool:
        """Returns whether its first line names a gRPC code, in whatever spelling its language has for it."""
        return self.log.strip().partition(":")[0].replace("_", "").upper() == code.replace("_", "")


class Program:
    """A running example."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = b""

    async def until_printed(self, length: int) -> None:
        """Reads on until so many bytes of the answer were printed."""
        assert self.process.stdout is not None
        async with asyncio.timeout(WAIT_SECONDS):
            while len(self.output) < length:
                data = await self.process.stdout.read(4096)
                assert data, f"ended after {self.output!r}"
                self.output += data

    async def end(self) -> Ended:
        async with asyncio.timeout(WAIT_SECONDS):
            rest, log = await self.process.communicate()
        assert self.process.returncode is not None
        return Ended(self.process.returncode, (self.output + rest).decode(), log.decode())


@contextlib.contextmanager
def heeding_interrupts() -> Iterator[None]:
    """A shell has what it starts in the background ignore Ctrl-C, and a child inherits that."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@asynccontextmanager
async def running(language: Language, *arguments: str) -> AsyncIterator[Program]:
    with heeding_interrupts():
        process = await asyncio.create_subprocess_exec(
            *language.run, *arguments, cwd=language.folder, env=ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    try:
        yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def outcome(language: Language, *arguments: str) -> Ended:
    async with running(language, *arguments) as program:
        return await program.end()


def whole() -> str:
    """Returns the text of an undisturbed reply."""
    model = ScriptedModel(name="m", weights="same", script=Script(token_count=TOKEN_COUNT))
    return ScriptedEngine(models=[model]).expected(ask(PROMPT, model="m"))


@asynccontextmanager
async def one_backend(folder: Path, *, token_delay: str = "0s") -> AsyncIterator[tuple[Member, Rig]]:
    member = Member("a", folder, "--token-count", str(TOKEN_COUNT), "--token-delay", token_delay)
    async with mesh(folder, member) as rig:
        yield member, rig


async def test_an_example_prints_the_answer_and_nothing_else(language: Language, tmp_path: Path) -> None:
    async with one_backend(tmp_path) as (_, rig):
        ended = await outcome(language, rig.process.address, "m", PROMPT)
    assert (ended.code, ended.output) == (0, whole()), ended.log
    assert ended.log.strip() == (
        f"backend a, FINISH_REASON_STOP, {3 + len(PROMPT.split())} prompt tokens, {TOKEN_COUNT} output tokens"
    )


async def test_an_example_says_why_a_model_is_not_there(language: Language, tmp_path: Path) -> None:
    async with one_backend(tmp_path) as (_, rig):
        ended = await outcome(language, rig.process.address, "none-such", PROMPT)
    assert (ended.code, ended.output) == (1, "")
    assert ended.names("NOT_FOUND"), ended.log
    assert "\nreason MODEL_NOT_FOUND\n" in ended.log
    assert "\n  model: none-such\n" in ended.log


async def test_an_example_names_the_field_that_is_wrong(language: Language) -> None:
    async with ServiceProcess("forebay.testing.scripted") as backend:
        ended = await outcome(language, backend.address, "", PROMPT)  # only an orchestrator has a default
    assert (ended.code, ended.output) == (1, "")
    assert ended.names("INVALID_ARGUMENT"), ended.log
    assert "\nreason INVALID_REQUEST\n" in ended.log
    assert "\nfield model: " in ended.log


async def test_an_example_says_when_to_come_back(language: Language) -> None:
    arguments = ["--models", "m", "--slots", "1", "--queue", "0", "--token-delay", "50ms"]
    async with (
        ServiceProcess("forebay.testing.scripted", [*arguments, "--token-count", "4000"]) as busy,
        running(language, busy.address, "m", PROMPT) as first,
    ):
        await first.until_printed(1)
        ended = await outcome(language, busy.address, "m", PROMPT)
    assert (ended.code, ended.output) == (1, "")
    assert ended.names("RESOURCE_EXHAUSTED"), ended.log
    assert "\nreason QUEUE_FULL\n" in ended.log
    (line,) = [line for line in ended.log.splitlines() if line.startswith("retry after ")]
    assert float(line.removeprefix("retry after ").removesuffix(" s")) > 0


async def test_an_example_prints_a_prefix_and_fails_when_its_backend_dies(
    language: Language, tmp_path: Path
) -> None:
    async with (
        one_backend(tmp_path, token_delay="20ms") as (member, rig),
        running(language, rig.process.address, "m", PROMPT) as program,
    ):
        await program.until_printed(40)
        member.process.signal(signal.SIGKILL)
        ended = await program.end()
    assert ended.code == 1
    assert whole().startswith(ended.output)
    assert 0 < len(ended.output) < len(whole())
    assert ended.names("ABORTED"), ended.log
    assert "\nreason STREAM_INTERRUPTED\n" in ended.log


async def test_a_stream_that_ends_well_without_its_last_event_is_no_answer(language: Language) -> None:
    arguments = ["--models", "m", "--raw", "--fault", "TRUNCATE@3"]
    async with ServiceProcess("forebay.testing.scripted", arguments) as backend:
        ended = await outcome(language, backend.address, "m", PROMPT)
    assert ended.code == 1
    assert len(ended.output.split()) == 3
    assert "without `finished`" in ended.log


async def test_interrupting_an_example_ends_the_generation(language: Language, tmp_path: Path) -> None:
    async with one_backend(tmp_path, token_delay="50ms") as (member, rig):
        async with running(language, rig.process.address, "m", PROMPT) as program:
            await program.until_printed(40)
            program.process.send_signal(signal.SIGINT)
            ended = await program.end()
        assert await rig.until_quiet() == 0
        (call,) = member.look()
        assert call.fate == "cancelled"
    assert ended.code == 130, ended.log
    assert whole().startswith(ended.output)
    assert len(ended.output) < len(whole())


def test_lock_files_name_no_address_of_a_package() -> None:
    locked = json.loads((ROOT / "examples/node/package-lock.json").read_text())
    assert [name for name, package in locked["packages"].items() if "resolved" in package] == []
