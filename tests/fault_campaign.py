"""Breaks streams by the dozen: real processes, real faults, and a count of what became of each stream.

Three scripted backends, each behind a fault proxy, and an orchestrator before
them. In each round many streams are read from one of the backends, and that one
is killed, frozen or cut off while they are under way. Half of the streams allow
continuation. Everything by chance comes from one seed.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.calls import ask
from forebay.testing.client import Client, client
from forebay.testing.faults import FaultProxy
from forebay.testing.processes import ServiceProcess
from forebay.testing.script import Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine

TOKENS = 60
WAIT_SECONDS = 30.0
NAMES = ("a", "b", "c")
KINDS = ("kill", "freeze", "reset", "close", "half-close", "goaway", "cut")

ORCHESTRATOR = """
[orchestrator]
address = "127.0.0.1:0"
probe.models_interval = "500ms"
# What is counted here is what becomes of streams, not how an overload is kept small.
retry.budget_per_second = 10000
retry.continue_wait = "10s"
"""
BACKEND = """
[[orchestrator.backends]]
name = "{name}"
address = "{address}"
between_events_timeout = "1s"
"""


@dataclass
class Tally:
    """What became of the streams."""

    seed: int
    streams: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """Streams that were broken in the middle, by kind of fault."""
    prefixes: int = 0
    """Streams that ended not OK, with a strict prefix."""
    joined: int = 0
    """Streams that were gone on with, and are whole and equal."""
    undisturbed: int = 0
    """Streams that the fault did not meet after their first delta; they are whole and equal."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between the last delta before a splice and the first one after it."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        gaps = sorted(self.gaps) or [0.0]
        return (
            f"seed {self.seed}: {self.streams} streams, {self.faults.total()} broken ({kinds}): "
            f"{self.joined} gone on with, {self.prefixes} strict prefixes, {self.undisturbed} undisturbed; "
            f"gap p50 {gaps[len(gaps) // 2] * 1e3:.0f} ms, max {gaps[-1] * 1e3:.0f} ms"
        )


class Victim:
    """A backend process, its proxy, and the journals of all its lives."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        self._lives = 0
        self.process = self._made("127.0.0.1:0")
        self.proxy: FaultProxy

    async def start(self, stack: AsyncExitStack) -> None:
        await self.process.start()
        stack.push_async_callback(self._end)
        self.proxy = await stack.enter_async_context(FaultProxy(self.process.address))

    async def revive(self) -> None:
        """Starts it anew at the same address."""
        address = self.process.address
        await self.process.kill()
        self.process = self._made(address)
        await self.process.start()

    def orphans(self) -> int:
        """Calls that the living process still serves."""
        fates = Counter('"fate": "active"' in line for line in self._journal.read_text().splitlines())
        return fates[True] - fates[False]

    async def _end(self) -> None:
        await self.process.kill()

    def _made(self, address: str) -> ServiceProcess:
        self._lives += 1
        self._journal = self._folder / f"{self.name}{self._lives}.journal"
        return ServiceProcess(
            "forebay.testing.scripted",
            [
                *("--name", self.name, "--models", "m", "--weights", "same", "--address", address),
                *("--token-count", str(TOKENS), "--token-delay", "10ms", "--grace", "0s", "--notice", "0s"),
                *("--journal", str(self._journal)),
            ],
        )


class Campaign:
    """Runs rounds and tallies them.

    Args:
        victims: the backends.
        peer: a client of the orchestrator.
        seed: chooses victims, moments and bytes.
    """

    def __init__(self, victims: dict[str, Victim], peer: Client, seed: int) -> None:
        self.victims = victims
        self.tally = Tally(seed)
        self._peer = peer
        self._chance = random.Random(seed)
        self._fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)
        self._model = ScriptedEngine(
            models=[ScriptedModel(name="m", weights="same", script=Script(token_count=TOKENS))]
        )

    async def round(self, kind: str, streams: int) -> None:
        """Breaks one backend under that many streams, and mends it."""
        victim = self.victims[self._chance.choice(NAMES)]
        if kind == "cut":
            # A new connection, so that the byte at which it is cut is counted from its first.
            victim.proxy.down.cut_after = self._chance.randint(300 * streams, 1_200 * streams)
            victim.proxy.close()
        await self._until_active(*NAMES)
        others = [name for name in NAMES if name != victim.name]
        self._chance.shuffle(others)
        after = self._chance.randint(2, TOKENS // 2)
        under_way = asyncio.Barrier(streams + 1)
        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                request = ask(f"{kind} {number} {self._chance.random()}", model="m")
                request.routing.backends.extend([victim.name, *others])
                if number % 2:
                    request.routing.continuation = pb.CONTINUATION_POLICY_SAME_WEIGHTS
                group.create_task(self._read(request, kind, after, under_way))
            await under_way.wait()
            if kind != "cut":  # which strikes by itself
                await self._strike(kind, victim)
        victim.proxy.down.cut_after = None
        if kind == "freeze":
            victim.process.signal(signal.SIGCONT)
        elif kind in {"kill", "goaway"}:
            await victim.revive()
        await self._until_no_orphans()

    async def _strike(self, kind: str, victim: Victim) -> None:
        match kind:
            case "kill":
                victim.process.signal(signal.SIGKILL)
            case "goaway":
                victim.process.signal(signal.SIGTERM)
            case "freeze":
                victim.process.signal(signal.SIGSTOP)
            case "reset":
                victim.proxy.reset()
            case "close":
                victim.proxy.close()
            case _:
                victim.proxy.half_close(self._chance.choice(("up", "down")))

    async def _read(
        self, request: pb.GenerateRequest, kind: str, after: int, under_way: asyncio.Barrier
    ) -> None:
        """Reads one stream and holds it against what it should be."""
        clock = asyncio.get_running_loop().time
        events: list[pb.GenerateResponse] = []
        times: list[float] = []
        seen, is_ok, code = 0, True, grpc.StatusCode.OK
        async with self._peer.stream(request, timeout=WAIT_SECONDS) as stream:
            try:
                async for event in stream:
                    events.append(event)
                    times.append(clock())
                    seen += event.HasField("delta")
                    if seen == after:
                        seen += 1
                        await under_way.wait()
            except grpc.aio.AioRpcError as error:
                is_ok = False
                code = error.code()
        assert code in {grpc.StatusCode.OK, grpc.StatusCode.ABORTED}, f"{kind}: {code}"
        if seen < after:  # cut before it came so far
            await under_way.wait()
        self._judge(request, kind, events, times, is_ok=is_ok)

    def _judge(
        self,
        request: pb.GenerateRequest,
        kind: str,
        events: list[pb.GenerateResponse],
        times: list[float],
        *,
        is_ok: bool,
    ) -> None:
        whole, said = self._model.expected(request), grammar.text(events)
        told = f"seed {self.tally.seed}, {kind}, {request.messages[0].parts[0].text}"
        grammar.check(events, complete=is_ok)
        splices = [number for number, event in enumerate(events) if event.HasField("continued")]
        self.tally.streams += 1
        if is_ok:
            assert said == whole, f"{told}: OK and not equal"
            assert sum(delta.token_count for delta in grammar.deltas(events)) == TOKENS, told
            assert events[-1].finished.usage.output_token_count == TOKENS, told
        else:
            assert whole.startswith(said), f"{told}: no prefix"
            assert len(said) < len(whole), f"{told}: whole and not OK"
            assert not request.routing.continuation, f"{told}: not gone on with"
        if splices:
            assert request.routing.continuation, f"{told}: gone on with unasked"
            self.tally.joined += 1
            self.tally.gaps.extend(times[number + 1] - times[number - 1] for number in splices)
        elif is_ok:
            self.tally.undisturbed += 1
        else:
            self.tally.prefixes += 1
        if splices or not is_ok:
            self.tally.faults[kind] += 1

    async def _until_active(self, *names: str) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_SECONDS
        while True:
            listed = await self._fleet.ListBackends(fleet_pb2.ListBackendsRequest())
            states = {b.name: b.state for b in listed.backends if b.models}
            # One that rests after its fault is back as soon as a call is sent to it.
            if all(states.get(name) == fleet_pb2.Backend.STATE_ACTIVE for name in names):
                return
            for backend in listed.backends:
                if backend.state == fleet_pb2.Backend.STATE_EJECTED:
                    await self._heal(backend.name)
            assert loop.time() < end, f"not all of {names} are back: {listed}"
            await asyncio.sleep(0.02)

    async def _heal(self, name: str) -> None:
        request = ask(model="m", token_count=1)
        request.routing.backends.append(name)
        async with self._peer.stream(request) as stream:
            try:
                async for _ in stream:
                    pass
            except grpc.aio.AioRpcError:
                pass  # not yet

    async def _until_no_orphans(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_SECONDS
        while left := {victim.name: n for victim in self.victims.values() if (n := victim.orphans())}:
            assert loop.time() < end, f"seed {self.tally.seed}: calls that nobody reads: {left}"
            await asyncio.sleep(0.02)


@asynccontextmanager
async def campaign(folder: Path, seed: int) -> AsyncIterator[Campaign]:
    """Starts the processes, and gives a campaign over them."""
    victims = {name: Victim(name, folder) for name in NAMES}
    async with AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as group:
            for victim in victims.values():
                group.create_task(victim.start(stack))
        config = folder / "forebay.toml"
        config.write_text(
            ORCHESTRATOR
            + "".join(BACKEND.format(name=v.name, address=v.proxy.address) for v in victims.values())
        )
        process = await stack.enter_async_context(
            ServiceProcess("forebay.orchestrator", ["--config", str(config)])
        )
        peer = await stack.enter_async_context(client(process.address, timeout=WAIT_SECONDS))
        yield Campaign(victims, peer, seed)
