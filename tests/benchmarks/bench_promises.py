"""What the orchestrator promises beside what it does: real processes, real faults, and a table.

Wall times are printed and not asserted, for a shared machine has no opinion on
them. What cannot depend on the machine is asserted: no orphan, every call ends.
FOREBAY_BENCH_SCALE=0.1 makes a short run.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import grpc.aio
import psutil
import pytest

import forebay
import memory_run
from forebay.inference.v1 import inference_pb2 as pb
from promise_rig import (
    SCALE,
    Answer,
    Backend,
    Callers,
    Member,
    Rig,
    Row,
    mesh,
    millis,
    now,
    quantile,
    request,
    scaled,
    show,
)

pytestmark = pytest.mark.timeout(1200)


def various(token_count: int, **options: str | float) -> Callable[[int], pb.GenerateRequest]:
    """Returns what makes requests of which no two belong to one conversation."""
    return lambda number: request(token_count, f"{number} {uuid.uuid4()}", **options)


# Ejection and return.


async def _ejection(rig: Rig, kind: str, chance: random.Random) -> tuple[float, int, int, float]:
    """Breaks one backend under calls and mends it.

    Returns seconds until it was out, calls that came later and failed, calls in flight that failed, and how
    long its process took to end, which the system needs before it closes what a killed one had open.
    """
    victim = rig.members["a"]
    callers = Callers(rig, various(1, first_delay="20ms"), 4, pause=0.03)
    calling = asyncio.create_task(callers.run())
    await asyncio.sleep(chance.uniform(0.3, 0.5))
    rig.forget()
    since = now()
    victim.process.signal(
        {"killed": signal.SIGKILL, "NOT_SERVING": signal.SIGTERM, "frozen": signal.SIGSTOP}[kind]
    )
    gone = 0.0
    if kind == "killed":
        await victim.process.wait()
        gone = now() - since
    seen = await rig.sighted("a", lambda seen: seen.state != Backend.STATE_ACTIVE, since=since)
    took = seen.changed - since
    await asyncio.sleep(0.5)
    callers.stop()
    await calling
    if kind == "frozen":
        victim.process.thaw()
    else:
        if kind == "NOT_SERVING":
            await victim.process.wait()
        await victim.revive()
    await rig.until_active()
    failed = [answer for answer in callers.answers if not answer.is_ok]
    later = sum(answer.began >= since for answer in failed)
    return took, later, len(failed) - later, gone


async def test_eject(tmp_path: Path) -> None:
    rows = []
    chance = random.Random(1)
    members = [Member(name, tmp_path) for name in "abc"]
    async with mesh(tmp_path, *members, orchestrator='slow_start.window = "500ms"') as rig:
        for kind, most, rounds in (("killed", 0.05, 20), ("NOT_SERVING", 0.05, 20), ("frozen", 3.0, 8)):
            rounds = scaled(rounds, 2)  # noqa: PLW2901
            found = [await _ejection(rig, kind, chance) for _ in range(rounds)]
            took = [each[0] for each in found]
            later, lost = max(each[1] for each in found), sum(each[2] for each in found)
            worst = max(took)
            gone = quantile([each[3] for each in found], 0.5)
            rows.append(
                Row(
                    f"eject: {kind}, {rounds} times",
                    f"p50 {millis(quantile(took, 0.5))}, worst {millis(worst)}"
                    + (f"; the process was gone after {millis(gone)}" if gone else ""),
                    f"<= {millis(most)}",
                    worst <= most,
                )
            )
            rows.append(
                Row(
                    f"eject: {kind}, calls that failed",
                    f"{later} of those that came later, at most in one round; {lost} in flight, in all",
                    "<= 1 each time",
                    later <= 1,
                )
            )
    show(rows)


async def test_recover(tmp_path: Path) -> None:
    firsts, fulls, resting = [], [], 0
    parts: dict[str, list[float]] = {"1 to 2 s": [], "4 to 5 s": [], "9 to 11 s": []}
    windows = {"1 to 2 s": (1.0, 2.0), "4 to 5 s": (4.0, 5.0), "9 to 11 s": (9.0, 11.0)}
    members = [Member(name, tmp_path) for name in "abc"]
    rounds = scaled(6, 1)
    chance = random.Random(2)
    async with mesh(tmp_path, *members) as rig:
        victim = rig.members["a"]
        for _ in range(rounds):
            # So many are in flight, and say nothing yet, that their loss opens the breaker.
            callers = Callers(rig, various(1, first_delay="200ms"), 30, pause=0.01)
            calling = asyncio.create_task(callers.run())
            await asyncio.sleep(1.0)
            rig.forget()
            since = now()
            victim.process.signal(signal.SIGKILL)
            await rig.sighted("a", lambda seen: seen.state != Backend.STATE_ACTIVE, since=since)
            await asyncio.sleep(chance.uniform(1.0, 8.0))  # so that attempts to connect have become rare
            resting += bool((await rig.backends())["a"].breakers)
            since = await victim.revive()
            full = await rig.sighted(
                "a", lambda seen: seen.state == Backend.STATE_ACTIVE and seen.share >= 1.0, since=since
            )
            fulls.append(full.time - since)
            while now() < since + 11.5:
                await asyncio.sleep(0.1)
            callers.stop()
            await calling
            firsts.append(max(0.0, min(call.began for call in victim.look()) - since))
            for name, (begin, end) in windows.items():
                counts = Counter(
                    answer.backend for answer in callers.answers if begin <= answer.began - since < end
                )
                parts[name].append(counts["a"] / max(1, counts.total()))
            await rig.until_active()
    mean = ", ".join(f"{name} {sum(part) / len(part):.0%}" for name, part in parts.items())
    show(
        [
            Row(
                f"recover: first call after SERVING, {rounds} times",
                f"p50 {millis(quantile(firsts, 0.5))}, worst {millis(max(firsts))}",
                "<= 1 s",
                max(firsts) <= 1.0,
            ),
            Row(
                f"recover: full share, {resting} of {rounds} times with an open breaker",
                f"p50 {quantile(fulls, 0.5):.1f} s, worst {max(fulls):.1f} s",
                "<= 10 s",
                max(fulls) <= 10.0,
            ),
            Row("recover: its part of the calls to three", mean, "from 3 % to a third"),
        ]
    )


# Errors.


async def _errors(
    folder: Path, faulty: str, chaos: str, calls: int, make: Callable[[int], pb.GenerateRequest]
) -> tuple[float, int, float, int]:
    """Returns the share of successes, attempts, seconds, and calls made."""
    folder.mkdir()
    members = [
        Member(name, folder, *(("--chaos", f"{seed}:{chaos}") if name in faulty else ()))
        for seed, name in enumerate("abc")
    ]
    async with mesh(folder, *members) as rig:
        before = sum(len(member.look()) for member in members)
        callers = Callers(rig, make, 12)
        since = now()
        await callers.run(calls)
        seconds = now() - since
        assert await rig.until_quiet() == 0
        attempts = sum(len(member.look()) for member in members) - before
        good = sum(answer.is_ok for answer in callers.answers)
        print(Counter(answer.reason for answer in callers.answers))
        return good / len(callers.answers), attempts, seconds, len(callers.answers)


async def test_errors(tmp_path: Path) -> None:
    rows = []
    calls = scaled(3000, 100)

    def joined(number: int) -> pb.GenerateRequest:
        made = various(12)(number)
        made.routing.continuation = pb.CONTINUATION_POLICY_SAME_WEIGHTS
        return made

    for what, faulty, chaos, make in (
        ("half of one backend's calls fail before a token", "a", "0.5:0", various(4, token_delay="5ms")),
        ("half of one's fail anywhere, continuation allowed", "a", "0.5:8", joined),
        ("half of all three's fail before a token", "abc", "0.5:0", various(4, token_delay="5ms")),
    ):
        good, attempts, seconds, made = await _errors(tmp_path / f"{len(rows)}", faulty, chaos, calls, make)
        allowed = 1.2 * made + 10 * seconds
        alone = faulty == "a"
        rows.append(
            Row(
                f"errors: {what}, {made} calls",
                f"{good:.2%} succeed",
                ">= 99.9 %" if alone else "told as it is",
                good >= 0.999 if alone else None,
            )
        )
        rows.append(
            Row(
                "errors: attempts",
                f"{attempts} = {attempts / made:.2f} a call in {seconds:.0f} s",
                f"<= 1.2 a call + 10/s = {allowed:.0f}",
                attempts <= allowed,
            )
        )
    show(rows)


# Overload.


async def test_overload(tmp_path: Path) -> None:
    seconds = max(3.0, 20.0 * SCALE)
    members = [Member(name, tmp_path, "--slots", "4") for name in "ab"]
    async with mesh(
        tmp_path, *members, orchestrator="admission.queue = 64", backend="slots = 4\nqueue = 0"
    ) as rig:
        make = various(5, token_delay="40ms")
        peak = Callers(rig, make, 8)
        since = now()
        running = asyncio.create_task(peak.run())
        await asyncio.sleep(seconds / 2)
        peak.stop()
        await running
        best = len(peak.answers) / (now() - since)
        answers: dict[str, list[Answer]] = {"interactive": [], "normal": [], "batch": []}
        priorities = {
            "interactive": pb.PRIORITY_INTERACTIVE,
            "normal": pb.PRIORITY_UNSPECIFIED,
            "batch": pb.PRIORITY_BATCH,
        }
        rates = {"interactive": 0.5 * best, "normal": 1.5 * best, "batch": 1.0 * best}

        async def one(kind: str) -> None:
            asked = make(0)
            asked.routing.priority = priorities[kind]
            answers[kind].append(await rig.ask(asked, timeout=30.0))

        async def come(kind: str, group: asyncio.TaskGroup) -> None:
            begin, number = now(), 0
            while now() - begin < seconds:
                number += 1
                await asyncio.sleep(max(0.0, begin + number / rates[kind] - now()))
                group.create_task(one(kind))

        since = now()
        async with asyncio.TaskGroup() as group:
            for kind in rates:
                group.create_task(come(kind, group))
        every = [answer for each in answers.values() for answer in each]
        until = since + seconds
        goodput = sum(a.is_ok and a.ended <= until for a in every) / seconds
        refused = [a for a in every if a.code is grpc.StatusCode.RESOURCE_EXHAUSTED]
        at_once = [a.ended - a.began for a in refused if not a.was_queued]
        odd = Counter(a.reason for a in every if not a.is_ok and a not in refused)
        assert await rig.until_quiet() == 0
    good = {kind: sum(a.is_ok for a in each) / max(1, len(each)) for kind, each in answers.items()}
    firsts = [a.first - a.began for a in answers["interactive"] if a.first is not None]
    show(
        [
            Row(
                f"3x overload: goodput, peak {best:.1f} calls/s, {len(every)} calls in {seconds:.0f} s",
                f"{goodput:.1f} calls/s, {goodput / best:.0%} of peak",
                ">= 90 %",
                goodput >= 0.9 * best,
            ),
            Row(
                f"3x overload: refused at once, {len(at_once)} calls",
                f"p50 {millis(quantile(at_once, 0.5))}, p99 {millis(quantile(at_once, 0.99))}",
                "p99 <= 10 ms",
                quantile(at_once, 0.99) <= 0.01,
            ),
            Row(
                "3x overload: refused after a place was given up to the urgent",
                f"{len(refused) - len(at_once)} calls",
                "",
            ),
            Row(
                f"3x overload: interactive, {len(answers['interactive'])} calls, half of the capacity",
                f"{good['interactive']:.1%} succeed, first token p99 {millis(quantile(firsts, 0.99))}",
                ">= 99 %",
                good["interactive"] >= 0.99,
            ),
            Row(
                "3x overload: normal and batch",
                f"{good['normal']:.0%} and {good['batch']:.0%} succeed; other failures {dict(odd) or 'none'}",
                "",
            ),
        ]
    )


# Endings.


class Endings:
    """Ends calls in every way there is, and notes when each should have stopped.

    Args:
        rig: the mesh.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.due: dict[str, float] = {}

    def asked(self, token_count: int, **options: str | float) -> pb.GenerateRequest:
        made = various(token_count, **options)(0)
        made.request_id = str(uuid.uuid4())
        return made

    async def ok(self) -> None:
        assert (await self._rig.ask(self.asked(4))).is_ok

    async def error(self) -> None:
        fault = random.choice(("INTERNAL@before", "INTERNAL@2"))
        assert not (await self._rig.ask(self.asked(8, fault=fault))).is_ok

    async def cancel_before(self) -> None:
        await self._cancel(self.asked(8, first_delay="60s", progress_delay="20ms"), "progress", 1)

    async def cancel_after(self) -> None:
        await self._cancel(self.asked(3000, token_delay="10ms"), "delta", 3)

    async def _cancel(self, asked: pb.GenerateRequest, kind: str, count: int) -> None:
        stream = self._rig.peer.inference.Generate(asked, timeout=60.0)
        async for event in stream:
            count -= event.HasField(kind)
            if count == 0:
                break
        self.due[asked.request_id] = now()
        stream.cancel()

    async def deadline(self) -> None:
        asked = self.asked(3000, token_delay="20ms")
        self.due[asked.request_id] = now() + 0.3
        assert not (await self._rig.ask(asked, timeout=0.3)).is_ok

    async def never_read(self) -> None:
        # Some talk faster than anyone could read, so that they are stuck when their time is up.
        asked = self.asked(3000, token_delay="0ms" if random.random() < 0.05 else "20ms")
        self.due[asked.request_id] = now() + 1.0
        stream = self._rig.peer.inference.Generate(asked, timeout=1.0)
        await asyncio.sleep(1.1)
        del stream

    async def killed(self, count: int) -> None:
        """Kills a process that reads so many streams."""
        name = str(uuid.uuid4())
        path = os.pathsep.join(str(Path(each).parent) for each in forebay.__path__)
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).parents[1] / "promise_client.py"),
            *(self._rig.process.address, name, str(count)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert child.stdout is not None
        try:
            assert await asyncio.wait_for(child.stdout.readline(), 60) == b"ready\n"
            moment = now()
        finally:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
        self.due.update((f"{name}-{number}", moment) for number in range(count))

    def delays(self) -> list[float]:
        """Returns the seconds from when calls should have stopped until each did, and forgets them."""
        found = []
        for member in self._rig.members.values():
            for call in member.look():
                due = self.due.get(call.request_id)
                if due is not None and call.ended is not None:
                    found.append(call.ended - due)
        self.due.clear()
        return found


async def _many(count: int, width: int, end: Callable[[], Awaitable[None]]) -> None:
    left = iter(range(count))

    async def one() -> None:
        for _ in left:
            await end()

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(one())


async def test_endings(tmp_path: Path) -> None:
    rows = []
    count = scaled(1000, 20)
    members = [Member(name, tmp_path) for name in "ab"]
    # Breakers would keep calls away from backends that are told to fail every time.
    patient = "breaker = { consecutive_failures = 1000000, success_rate = 0.0 }"
    async with mesh(tmp_path, *members, backend=patient) as rig:
        process = psutil.Process(rig.process.pid)
        endings = Endings(rig)
        await _many(200, 4, endings.ok)
        before = process.memory_info().rss
        made = orphans = 0
        for what, end, width in (
            ("done", endings.ok, 8),
            ("error", endings.error, 8),
            ("cancelled before the first token", endings.cancel_before, 4),
            ("cancelled after it", endings.cancel_after, 4),
            ("deadline", endings.deadline, 8),
            ("never read, until its deadline", endings.never_read, 25),
        ):
            await _many(count, width, end)
            left = await rig.until_quiet()
            made, orphans = made + count, orphans + left
            delays = endings.delays()
            is_cancel = what.startswith("cancelled")
            worst = quantile(delays, 0.99)
            rows.append(
                Row(
                    f"{count} calls {what}",
                    f"{left} orphans"
                    + (
                        f"; stopped p50 {millis(quantile(delays, 0.5))}, p99 {millis(worst)}"
                        if delays
                        else ""
                    ),
                    "0; p99 <= 50 ms" if is_cancel else "0",
                    left == 0 and (worst <= 0.05 or not is_cancel),
                )
            )
        each = 20
        for _ in range(count // each):
            await endings.killed(each)
        left = await rig.until_quiet()
        delays = endings.delays()
        made, orphans = made + count, orphans + left
        worst = quantile(delays, 0.99)
        rows.append(
            Row(
                f"{count} calls of clients that were killed, {each} at once",
                f"{left} orphans; stopped p50 {millis(quantile(delays, 0.5))}, p99 {millis(worst)}",
                "0; p99 <= 50 ms",
                left == 0 and worst <= 0.05,
            )
        )
        grown = (process.memory_info().rss - before) / 2**20
        in_progress = sum(backend.active_call_count for backend in (await rig.backends()).values())
        rows.append(
            Row(
                f"after {made} endings",
                f"{in_progress} calls in progress; memory grew by {grown:.1f} MiB",
                "0; <= 20 MiB",
                in_progress == 0 and grown <= 20,
            )
        )
    show(rows)
    assert orphans == 0
    assert in_progress == 0


# Memory.


async def test_memory(tmp_path: Path) -> None:
    calls = scaled(100_000, 1000)
    run = await memory_run.run(tmp_path, calls=calls, warm=min(10_000, calls // 4))
    show(
        [
            Row(
                f"memory after {run.calls:,} completed calls",
                f"{run.grown / 2**20:+.1f} MiB, {run.slope:+.0f} bytes a call",
                "<= 20 MiB",
                run.grown <= 20 * 2**20,
            )
        ]
    )
