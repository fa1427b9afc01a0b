"""What the benchmarks of the orchestrator's promises share: a mesh of processes, what they tell, a table.

Times are those of the machine's monotonic clock, which all its processes share.
FOREBAY_BENCH_SCALE shortens or lengthens every run: 0.1 makes a tenth of the calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import failure
from forebay.testing.client import Client, client
from forebay.testing.processes import ServiceProcess

SCALE = float(os.environ.get("FOREBAY_BENCH_SCALE", "1"))

WAIT_SECONDS = 60.0
"""Longest wait for something that is due within seconds."""

now = time.monotonic

Backend = fleet_pb2.Backend


def scaled(count: int, least: int = 1) -> int:
    """Returns how many of something a run makes that makes `count` at full length."""
    return max(least, round(count * SCALE))


def quantile(values: Iterable[float], share: float) -> float:
    """Returns the value that a share of them does not exceed; NaN if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def millis(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    figure: str
    target: str
    is_met: bool | None = None


def show(rows: Sequence[Row]) -> None:
    """Prints a table that `docs/benchmarks.md` can take over."""
    load = " ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"\n\n(scale {SCALE:g}; load averages {load})")
    print("| promise | figure | target | |\n| --- | --- | --- | --- |")
    for row in rows:
        verdict = {True: "met", False: "**missed**", None: ""}[row.is_met]
        print(f"| {row.what} | {row.figure} | {row.target} | {verdict} |", flush=True)


@dataclass(slots=True)
class Call:
    """A call as a backend's journal tells it."""

    request_id: str
    began: float
    ended: float | None = None
    fate: str = "active"


class Member:
    """A scripted backend with the journals of all its lives.

    Args:
        name: its name.
        folder: for journals.
        arguments: more of its command line.
    """

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        self.name = name
        self._folder = folder
        self._arguments = arguments
        self._lives = 0
        self._read = 0
        self.calls: list[Call] = []
        """The calls of its present life, as far as `look` has read."""
        self._open: dict[str, list[Call]] = {}
        self.process = self._made("127.0.0.1:0")

    async def start(self, stack: AsyncExitStack) -> None:
        await self.process.start()
        stack.push_async_callback(self._end)

    async def revive(self) -> float:
        """Starts it anew at the same address, and returns when it listened."""
        address = self.process.address
        await self.process.kill()
        self.process = self._made(address)
        await self.process.start()
        return now()

    def look(self) -> list[Call]:
        """Reads on in the journal, and returns the calls of its present life."""
        if not self._journal.exists():
            return self.calls
        with self._journal.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                told = json.loads(line)
                key = told["request_id"]
                if told["fate"] == "active":
                    call = Call(key, told["time"])
                    self.calls.append(call)
                    self._open.setdefault(key, []).append(call)
                else:
                    call = self._open[key].pop(0)
                    call.ended, call.fate = told["time"], told["fate"]
        return self.calls

    @property
    def active(self) -> int:
        """Calls that it serves now."""
        return sum(call.ended is None for call in self.look())

    async def _end(self) -> None:
        await self.process.kill()

    def _made(self, address: str) -> ServiceProcess:
        self._lives += 1
        self._read = 0
        self.calls, self._open = [], {}
        self._journal = self._folder / f"{self.name}{self._lives}.journal"
        arguments = ["--name", self.name, "--models", "m", "--weights", "same", "--address", address]
        arguments += ["--grace", "1s", "--journal", str(self._journal), *self._arguments]
        return ServiceProcess("forebay.testing.scripted", arguments)


@dataclass(frozen=True, slots=True)
class Sighting:
    """A backend as a watcher was told of it."""

    time: float
    """When the watcher was told: some 50 ms late, so that a busy fleet does not drown its watchers."""
    changed: float
    """When it came into its state."""
    state: Backend.State.ValueType
    share: float


class Rig:
    """A running mesh and a client of it."""

    def __init__(self, members: dict[str, Member], process: ServiceProcess, peer: Client) -> None:
        self.members = members
        self.process = process
        self.peer = peer
        self.fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)
        self._seen: dict[str, list[Sighting]] = {name: [] for name in members}
        self._news = asyncio.Event()

    async def follow(self) -> None:
        """Notes what a watcher of the backends is told."""
        async for answer in self.fleet.WatchBackends(fleet_pb2.WatchBackendsRequest()):
            told = answer.backend
            changed = told.state_change_time.ToNanoseconds() / 1e9 - time.time() + now()
            self._seen[told.name].append(Sighting(now(), changed, told.state, told.share))
            self._news.set()

    async def sighted(self, name: str, holds: Callable[[Sighting], bool], *, since: float) -> Sighting:
        """Returns what a watcher was told of a backend when something first held of it after a moment."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                for sighting in self._seen[name]:
                    if sighting.time >= since and holds(sighting):
                        return sighting
                self._news.clear()
                await self._news.wait()

    def forget(self) -> None:
        """Drops what was sighted so far, but for the latest."""
        for seen in self._seen.values():
            del seen[:-1]

    async def backends(self) -> dict[str, Backend]:
        listed = await self.fleet.ListBackends(fleet_pb2.ListBackendsRequest())
        return {backend.name: backend for backend in listed.backends}

    async def until_active(self) -> None:
        """Waits until every backend takes its full share of calls."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                backends = (await self.backends()).values()
                if all(b.state == Backend.STATE_ACTIVE and b.models and b.share >= 1.0 for b in backends):
                    return
                if any(b.state == Backend.STATE_EJECTED for b in backends):
                    await self.ask(request(1))  # it is back as soon as a call was served
                await asyncio.sleep(0.02)

    async def until_quiet(self, *, seconds: float = 10.0) -> int:
        """Waits until no backend serves a call, and returns how many are still served when time is up."""
        until = now() + seconds
        while (left := sum(member.active for member in self.members.values())) and now() < until:
            await asyncio.sleep(0.02)
        return left

    async def ask(self, asked: pb.GenerateRequest, *, timeout: float = WAIT_SECONDS) -> Answer:
        """Makes a call and returns how it went."""
        answer = Answer(now())
        stream = self.peer.inference.Generate(asked, timeout=timeout)
        try:
            async for event in stream:
                kind = event.WhichOneof("event")
                answer.was_queued |= kind == "progress"
                if kind == "delta" and answer.first is None:
                    answer.first = now()
                if kind == "started":
                    answer.backend = event.started.backend
        except grpc.aio.AioRpcError as error:
            answer.code = error.code()
            answer.reason = failure.from_rpc_error(error, backend="").reason
        finally:
            stream.cancel()
            answer.ended = now()
        return answer


@dataclass(slots=True)
class Answer:
    """How a call went."""

    began: float
    ended: float = 0.0
    first: float | None = None
    """When its first delta came."""
    backend: str = ""
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    was_queued: bool = False
    """Whether it was told that it waits."""

    @property
    def is_ok(self) -> bool:
        return self.code is grpc.StatusCode.OK


def request(token_count: int, text: str = "hello", **options: str | float) -> pb.GenerateRequest:
    """Returns a request for that many tokens, with options for the scripted engine."""
    made = pb.GenerateRequest(
        model="m",
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
        limits=pb.GenerationLimits(max_output_token_count=token_count),
    )
    made.backend_options["scripted"].update({"token_count": token_count, **options})
    return made


@dataclass
class Callers:
    """Callers who call one after another until they are told to stop."""

    rig: Rig
    make: Callable[[int], pb.GenerateRequest]
    count: int
    pause: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    _stopped: bool = False
    _number: int = 0

    async def run(self, most: int | None = None) -> None:
        """Calls until `stop`, or so many times."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self.count):
                group.create_task(self._one(most))

    def stop(self) -> None:
        self._stopped = True

    async def _one(self, most: int | None) -> None:
        while not self._stopped and (most is None or self._number < most):
            self._number += 1
            self.answers.append(await self.rig.ask(self.make(self._number)))
            if self.pause:
                await asyncio.sleep(self.pause)


@asynccontextmanager
async def mesh(
    folder: Path, *members: Member, orchestrator: str = "", backend: str = ""
) -> AsyncIterator[Rig]:
    """Runs backends and an orchestrator before them.

    Args:
        folder: for its configuration.
        members: the backends.
        orchestrator: lines of its section.
        backend: lines of the section of every backend.
    """
    async with AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as group:
            for member in members:
                group.create_task(member.start(stack))
        lines = ["[orchestrator]", 'address = "127.0.0.1:0"', orchestrator]
        for member in members:
            lines += ["[[orchestrator.backends]]", f'name = "{member.name}"']
            lines += [f'address = "{member.process.address}"', backend]
        config = folder / "forebay.toml"
        config.write_text("\n".join(lines))
        process = await stack.enter_async_context(
            ServiceProcess("forebay.orchestrator", ["--config", str(config)])
        )
        peer = await stack.enter_async_context(client(process.address, timeout=WAIT_SECONDS))
        rig = Rig({member.name: member for member in members}, process, peer)
        await rig.until_active()
        watch = asyncio.create_task(rig.follow())
        try:
            yield rig
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
