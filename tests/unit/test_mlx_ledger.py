"""Promises of the memory ledger over all workers, in virtual time, on a machine that is only told of."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import metrics
from forebay.kit.failure import MemoryExhausted
from forebay.mlx.v1 import worker_pb2
from forebay.mlx_service import host as host_module
from forebay.mlx_service import steward
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.fetch import Progress
from forebay.mlx_service.host import Host, footprint, this_host, weights_in
from forebay.mlx_service.ledger import (
    MIB,
    PROCESS_BYTES,
    ROOM_LEAST,
    UNPACKED_ROOM,
    Candidate,
    Ledger,
    choose,
)
from forebay.mlx_service.supervisor import Options, State, Supervisor
from forebay.testing.clock import now, run, virtual

GIB = 1024 * MIB
BESIDE = 100 * MIB
"""What the process of a fake worker takes beside its model."""


class FakeWorker:
    """A worker whose requests are numbers: what they can come to need, and what is kept of prompts."""

    stub = None

    def __init__(self, spec, machine, on_exit):
        self.spec, self.machine, self.on_exit = spec, machine, on_exit
        self.limit = spec.memory_limit
        self.weights = machine.sizes[spec.model_id]
        self.reserved = 0
        self.prefixes = 0
        self.wanted = 0
        self.preempted = 0
        self.device = 0
        self.silent = False
        self.told: list[int] = []
        self.exit_code = None
        self.pid = next(machine.pids)
        self.ready_at = now() + machine.load_seconds[spec.model_id]
        machine.running[self.pid] = self

    @property
    def held(self):
        return BESIDE + self.weights + self.prefixes

    def tail(self):
        return ()

    def is_stopped(self):
        return False

    async def is_well(self, timeout):
        return self.exit_code is None and now() >= self.ready_at

    async def describe(self):
        return pb.Model(id=self.spec.model_id)

    async def adjust(self, limit):
        await asyncio.sleep(0.001)
        if self.silent:
            return None
        if limit is not None:
            self.told.append(limit)
            self.limit = max(limit, self.weights + self.reserved)
            self.prefixes = min(self.prefixes, self.limit - self.weights - self.reserved)
        return worker_pb2.AdjustResponse(
            limit_bytes=self.limit,
            weights_bytes=self.weights,
            memory_bytes=self.weights + self.prefixes,
            reserved_bytes=self.reserved,
            wanted_bytes=self.wanted,
            preemption_count=self.preempted,
            device_bytes=self.device,
            live_count=int(self.reserved > 0),
        )

    def die(self):
        self.exit_code = -9
        self.machine.running.pop(self.pid, None)
        self.on_exit()

    async def stop(self, grace):
        if self.exit_code is None:
            await asyncio.sleep(0.01)
            self.exit_code = 0
            self.machine.leave(self)


class Machine:
    """A machine with so much memory, and workers that take it. It checks what must hold at every moment."""

    def __init__(self, total=64 * GIB, sizes=None, load=1.0, lag=0.0):
        self.total = total
        self.sizes = defaultdict(lambda: GIB, sizes or {})
        self.load_seconds = defaultdict(lambda: load)
        self.lag = lag
        self.others = 0
        self.late = 0
        self.unpacked = 0
        self.pids = itertools.count(1000)
        self.running: dict[int, FakeWorker] = {}
        self.started: list[FakeWorker] = []
        self.host = Host(
            identity="here",
            total=total,
            available=lambda: total - self.others - self.late - sum(w.held for w in self.running.values()),
            footprint=lambda pid: self.running[pid].held if pid in self.running else 0,
        )

    def leave(self, worker):
        """Lets a process end, and its memory come back a little later."""
        if self.running.pop(worker.pid, None) is not None:
            self.late += worker.held
            asyncio.get_running_loop().call_later(self.lag, self._return, worker.held)

    def _return(self, size):
        self.late -= size

    @asynccontextmanager
    async def __call__(self, spec, on_exit) -> AsyncIterator[FakeWorker]:
        worker = FakeWorker(spec, self, on_exit)
        self.started.append(worker)
        try:
            yield worker
        finally:
            await worker.stop(0.0)

    def worker(self, model):
        return next(w for w in self.running.values() if w.spec.model_id == model)

    def promised(self):
        """All that workers may take by what they were told."""
        return sum(w.limit + BESIDE for w in self.running.values())


@asynccontextmanager
async def service(machine, *, measured=None, **settings):
    settings = {"memory_ceiling": "10GiB", "max_loaded_models": 8, **settings}
    made = Supervisor(
        MlxSettings.model_validate(settings), launch=machine, jitter=lambda: 0.0, host=machine.host,
        measured=measured,
    )  # fmt: skip
    made._steward._weigh = lambda folder: (machine.sizes[folder.name], machine.unpacked)
    async with made as s:
        yield s


async def use(s, model, *, hold=0.0):
    async def prepare(report):
        return Path("/models") / model

    async def waiting(residence):
        pass

    async with s.lease(model, prepare, waiting) as worker:
        await asyncio.sleep(hold)
        return worker


async def pin(s, model):
    async def prepare(report):
        return Path("/models") / model

    async def waiting(residence):
        pass

    await s.load(model, prepare, waiting, Options(pinned=True))


def loaded(s):
    return {id_ for id_, r in s._residences.items() if r.state is State.ACTIVE}


@virtual
async def test_a_model_alone_gets_the_whole_ceiling_and_others_are_told_to_give_back():
    machine = Machine(sizes={"a": 2 * GIB, "b": 2 * GIB})
    async with service(machine) as s:
        await use(s, "a")
        assert machine.worker("a").limit == pytest.approx(10 * GIB - BESIDE, rel=0.01)
        machine.worker("a").prefixes = 7 * GIB
        await use(s, "b")
        await asyncio.sleep(2)
        assert machine.worker("a").prefixes < 4 * GIB
        assert machine.worker("a").limit == pytest.approx(machine.worker("b").limit, rel=0.01)
        assert 9.5 * GIB < machine.promised() <= 10 * GIB
        await s.unload("b", force=False)
        await asyncio.sleep(2)
        assert machine.worker("a").limit == pytest.approx(10 * GIB - BESIDE, rel=0.01)


@virtual
async def test_a_load_tells_how_much_of_the_model_is_in_memory_already():
    machine = Machine(sizes={"a": 2 * GIB})
    async with service(machine) as s:
        told = []

        async def prepare(report):
            report(Progress(what="converting", done=1, total=4))
            await asyncio.sleep(2.5)
            return Path("/models/a")

        async def waiting(residence):
            told.append(s.progress(residence))

        loading = asyncio.create_task(s.load("a", prepare, waiting, Options()))
        await asyncio.sleep(2.6)
        held = iter((0, GIB // 2, GIB, 9 * GIB))
        s._steward._used = lambda account: next(held, 9 * GIB)
        arrived = [s.progress(s.residence("a")) for _ in range(4)]
        await loading
        assert s.progress(s.residence("a")) is None
    expected = 2 * GIB * 1.02 + PROCESS_BYTES
    assert told[1:3] == [0.25, 0.25]
    assert arrived == pytest.approx([0, GIB / 2 / expected, GIB / expected, 0.99], rel=0.02)


@virtual
async def test_what_is_left_is_dealt_by_weight():
    machine = Machine(sizes={"chat": 4 * GIB, "embed": 100 * MIB})
    async with service(machine) as s:
        await use(s, "embed")
        await use(s, "chat")
        await asyncio.sleep(2)
        room = {w.spec.model_id: w.limit - w.weights for w in machine.running.values()}
        assert room["chat"] > 20 * room["embed"]
        assert room["embed"] >= ROOM_LEAST
        assert machine.promised() <= 10 * GIB


@virtual
async def test_a_model_that_never_fits_is_refused_with_figures_and_nobody_leaves_for_it():
    machine = Machine(sizes={"small": GIB, "huge": 20 * GIB})
    async with service(machine) as s:
        await use(s, "small")
        with pytest.raises(MemoryExhausted, match="never fits") as caught:
            await use(s, "huge")
        figures = {k: int(v) for k, v in caught.value.metadata.items() if k.endswith("_bytes")}
        assert figures["needed_bytes"] > 20 * GIB
        assert figures["ceiling_bytes"] == 10 * GIB
        assert 8 * GIB < figures["free_bytes"] < 9 * GIB
        assert caught.value.retry_after is None
        assert "small" in caught.value.metadata["held_by"]
        assert loaded(s) == {"small"}
        assert s.residence("huge").state is State.AVAILABLE
        assert s.memory().reserved_bytes == 0


@virtual
async def test_idle_models_leave_until_the_new_one_fits_and_no_more_than_it_takes():
    machine = Machine(sizes={"a": 3 * GIB, "b": 3 * GIB, "c": GIB, "new": 4 * GIB})
    async with service(machine) as s:
        for model in "abc":
            await use(s, model)
            await asyncio.sleep(10)
        await use(s, "new")
        assert loaded(s) == {"b", "c", "new"}
        assert machine.promised() <= 10 * GIB


@virtual
async def test_whoever_holds_memory_and_stays_is_named_with_the_reason():
    machine = Machine(sizes={"pinned": 4 * GIB, "busy": 4 * GIB, "new": 4 * GIB})
    async with service(machine) as s, asyncio.TaskGroup() as tasks:
        await pin(s, "pinned")
        await use(s, "busy")
        tasks.create_task(use(s, "busy", hold=20.0))
        await asyncio.sleep(1)
        with pytest.raises(MemoryExhausted) as caught:
            await use(s, "new")
        assert caught.value.retry_after is not None
        assert "(pinned)" in caught.value.message
        assert "(in use)" in caught.value.message
        assert loaded(s) == {"pinned", "busy"}
        await asyncio.sleep(20)
        await use(s, "new")
        assert loaded(s) == {"pinned", "new"}


@virtual
async def test_a_model_that_loads_slowly_stays_longer_than_one_that_loads_fast():
    machine = Machine(sizes={"slow": 3 * GIB, "fast": 3 * GIB, "new": 5 * GIB})
    machine.load_seconds["slow"] = 60.0
    async with service(machine) as s:
        await use(s, "slow")
        await asyncio.sleep(5)
        await use(s, "fast")
        await asyncio.sleep(5)
        await use(s, "new")
        assert loaded(s) == {"slow", "new"}


@virtual
async def test_loads_that_come_together_never_count_the_same_memory_twice():
    machine = Machine(sizes={"a": 4 * GIB, "b": 4 * GIB, "c": 4 * GIB}, load=5.0)
    async with service(machine) as s:
        async with asyncio.TaskGroup() as tasks:
            jobs = [tasks.create_task(_attempt(s, m)) for m in "abc"]
            await asyncio.sleep(1)
            memory = s.memory()
            assert memory.used_bytes + memory.reserved_bytes <= 10 * GIB
            assert memory.reserved_bytes > 0
            assert machine.promised() <= 10 * GIB
        results = sorted(str(job.result()) for job in jobs)
        assert results == ["True", "True", "refused"]
        assert len(loaded(s)) == 2


async def _attempt(s, model):
    try:
        await use(s, model, hold=10.0)
    except MemoryExhausted:
        return "refused"
    return True


@virtual
async def test_callers_of_one_model_share_one_reservation():
    machine = Machine(sizes={"a": 6 * GIB}, load=5.0)
    async with service(machine) as s:
        await asyncio.gather(*(use(s, "a") for _ in range(5)))
        assert len(machine.started) == 1


@virtual
async def test_a_load_begins_only_when_the_memory_is_really_back():
    machine = Machine(total=12 * GIB, sizes={"a": 6 * GIB, "b": 6 * GIB}, lag=2.0)
    async with service(machine) as s:
        await use(s, "a")
        began = now()
        await use(s, "b")
        assert machine.started[1].spec.model_id == "b"
        assert now() - began >= 3.0  # what the memory took to come back, and the load
        assert loaded(s) == {"b"}


@virtual
async def test_memory_that_does_not_come_back_refuses_the_load_after_a_while():
    machine = Machine(total=12 * GIB, sizes={"a": 6 * GIB, "b": 6 * GIB}, lag=60.0)
    async with service(machine) as s:
        await use(s, "a")
        began = now()
        with pytest.raises(MemoryExhausted) as caught:
            await use(s, "b")
        assert 4.0 < now() - began < 8.0
        assert caught.value.retry_after is not None
        await asyncio.sleep(60)
        await use(s, "b")


@virtual
async def test_what_other_programs_take_lowers_the_ceiling_while_they_do():
    machine = Machine(total=16 * GIB, sizes={"a": 2 * GIB, "b": 4 * GIB})
    async with service(machine) as s:
        await use(s, "a")
        machine.others = 11 * GIB
        await asyncio.sleep(3)
        assert machine.worker("a").limit + BESIDE <= 5 * GIB
        assert s.memory().limit_bytes <= 5 * GIB
        assert s.memory().available_bytes == pytest.approx(3 * GIB, rel=0.05)
        machine.others = 13 * GIB
        await pin(s, "a")
        with pytest.raises(MemoryExhausted):
            await use(s, "b")
        machine.others = 0
        await use(s, "b")


@virtual
async def test_a_worker_in_use_keeps_what_its_requests_can_come_to_need():
    machine = Machine(sizes={"a": 2 * GIB, "b": 5 * GIB})
    async with service(machine) as s, asyncio.TaskGroup() as tasks:
        await use(s, "a")
        machine.worker("a").reserved = 5 * GIB
        task = tasks.create_task(use(s, "a", hold=30.0))
        await asyncio.sleep(1)
        with pytest.raises(MemoryExhausted, match="in use"):
            await use(s, "b")
        assert machine.worker("a").limit >= 7 * GIB
        machine.worker("a").reserved = GIB
        await use(s, "b")
        assert machine.promised() <= 10 * GIB
        assert machine.worker("a").limit >= 3 * GIB
        task.cancel()


@virtual
async def test_a_worker_that_does_not_answer_keeps_its_share_and_the_load_is_refused_in_the_end():
    machine = Machine(sizes={"a": 2 * GIB, "b": 2 * GIB})
    async with service(machine) as s:
        await pin(s, "a")
        await asyncio.sleep(2)
        machine.worker("a").silent = True
        with pytest.raises(MemoryExhausted):
            await use(s, "b")
        machine.worker("a").silent = False
        await use(s, "b")


@virtual
async def test_a_request_that_found_too_little_gets_more_and_idle_models_leave_for_it():
    machine = Machine(sizes={"a": 2 * GIB, "b": 2 * GIB, "c": 2 * GIB})
    async with service(machine) as s:
        for model in "abc":
            await use(s, model)
        assert await s.widen("a", machine.worker("a").limit - 1)
        assert loaded(s) == {"a", "b", "c"}
        assert await s.widen("a", 4 * GIB)
        assert machine.worker("a").limit >= 4 * GIB
        assert loaded(s) == {"a", "b", "c"}
        assert await s.widen("a", 6 * GIB)
        assert len(loaded(s)) == 2
        assert machine.promised() <= 10 * GIB
        assert not await s.widen("a", 11 * GIB)
        assert not await s.widen("nowhere", 1)


@virtual
async def test_a_worker_that_has_to_set_rows_aside_is_given_more_without_being_asked():
    machine = Machine(sizes={"a": 2 * GIB, "b": 2 * GIB})
    async with service(machine) as s, asyncio.TaskGroup() as tasks:
        await use(s, "b")
        await use(s, "a")
        task = tasks.create_task(use(s, "a", hold=30.0))
        await asyncio.sleep(1)
        machine.worker("a").reserved = GIB
        machine.worker("a").wanted = 7 * GIB
        await asyncio.sleep(3)
        assert machine.worker("a").limit >= 7 * GIB
        task.cancel()


@virtual
async def test_a_crashed_worker_is_started_again_with_its_share():
    machine = Machine(sizes={"a": 2 * GIB, "b": 2 * GIB})
    async with service(machine, restart_backoff_min="0s") as s:
        await use(s, "a")
        await use(s, "b")
        machine.worker("a").die()
        await asyncio.sleep(3)
        assert loaded(s) == {"a", "b"}
        assert machine.promised() <= 10 * GIB


@virtual
async def test_a_device_that_recommends_less_lowers_the_ceiling_where_none_is_set():
    machine = Machine(total=64 * GIB)
    async with service(machine, memory_ceiling=None) as s:
        assert s.memory().limit_bytes == 52 * GIB
        await use(s, "a")
        machine.worker("a").device = 40 * GIB
        await asyncio.sleep(5)
        assert s.memory().limit_bytes == int(40 * GIB * 0.95)
        assert machine.worker("a").limit + BESIDE <= 38 * GIB


@virtual
async def test_a_model_that_is_stopped_while_it_waits_for_room_takes_none():
    machine = Machine(sizes={"a": 6 * GIB, "b": 6 * GIB})
    async with service(machine) as s, asyncio.TaskGroup() as tasks:
        await use(s, "a")
        busy = tasks.create_task(use(s, "a", hold=30.0))
        await asyncio.sleep(0.1)
        s.residence("a").stop(force=False)
        waiting = tasks.create_task(use(s, "b"))
        await asyncio.sleep(1)
        waiting.cancel()
        unloading = tasks.create_task(s.unload("b", force=False))
        await asyncio.gather(busy, unloading)
        assert s.memory().used_bytes == s.memory().reserved_bytes == 0


@virtual
async def test_the_service_can_end_while_a_load_waits_for_room():
    machine = Machine(sizes={"a": 6 * GIB, "b": 6 * GIB})
    async with service(machine) as s:
        await use(s, "a")
        keep = asyncio.ensure_future(use(s, "a", hold=3.0))
        await asyncio.sleep(0.1)
        s.residence("a").stop(force=False)
        wait = asyncio.ensure_future(use(s, "b"))
        await asyncio.sleep(0.1)
    await asyncio.gather(keep, wait, return_exceptions=True)
    assert not machine.running


@virtual
async def test_the_memory_of_the_host_and_of_all_models_is_told():
    machine = Machine(total=32 * GIB, sizes={"a": 2 * GIB}, load=5.0)
    async with service(machine) as s, asyncio.TaskGroup() as tasks:
        memory = s.memory()
        assert (memory.host, memory.total_bytes, memory.limit_bytes) == ("here", 32 * GIB, 10 * GIB)
        assert memory.used_bytes == memory.reserved_bytes == 0
        assert s.takes("a", 2 * GIB) > 2 * GIB + PROCESS_BYTES
        assert s.takes("a", 0) == 0
        task = tasks.create_task(use(s, "a", hold=20.0))
        await asyncio.sleep(1)
        loading = s.memory()
        assert loading.used_bytes + loading.reserved_bytes >= 2 * GIB + PROCESS_BYTES
        await asyncio.sleep(6)
        machine.worker("a").reserved = GIB
        await asyncio.sleep(2)
        assert s.memory().used_bytes == 2 * GIB + BESIDE
        assert s.memory().reserved_bytes == GIB
        assert s.takes("a", 2 * GIB) == 3 * GIB + BESIDE
        task.cancel()


@virtual
async def test_of_a_model_that_machines_share_only_the_parts_here_count():
    machine = Machine(total=32 * GIB, sizes={"a": 6 * GIB})
    shards = {"a": {"hosts": ["127.0.0.1", "10.0.0.2"], "port": 50300}}
    async with service(machine, shards=shards) as s:
        s._steward._weigh = lambda folder: (12 * GIB, 0)  # more than the ceiling
        assert s.takes("a", 12 * GIB) < 8 * GIB
        await use(s, "a")
        assert s.takes("a", 12 * GIB) == 6 * GIB + BESIDE


@virtual
async def test_a_draft_model_is_reserved_with_the_model_that_it_guesses_for():
    machine = Machine(total=32 * GIB, sizes={"a": 5 * GIB, "small": 3 * GIB})
    async with service(machine) as s:
        s._steward._beside = {"a": Path("/models/small")}.get
        await use(s, "a")
        (worker,) = machine.started
        assert worker.spec.memory_limit > 8 * GIB


@virtual
async def test_all_ranks_of_a_model_that_are_here_count():
    machine = Machine(total=32 * GIB, sizes={"a": 3 * GIB})
    footprint = machine.host.footprint
    machine.host = replace(
        machine.host,
        children=lambda pid: [7] if pid in machine.running else [],
        footprint=lambda pid: 3 * GIB if pid == 7 else footprint(pid),
    )
    async with service(machine, shards={"a": {"hosts": ["127.0.0.1", "127.0.0.1"]}}) as s:
        s._steward._weigh = lambda folder: (6 * GIB, 0)
        await use(s, "a")
        assert s.memory().used_bytes == 6 * GIB + BESIDE
        assert s.takes("a", 6 * GIB) == 6 * GIB + BESIDE


def test_children_of_a_process_are_found_and_of_none_there_are_none():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in this_host().children(os.getpid())
        assert child.stdin is not None
        child.stdin.close()
    assert child.pid not in this_host().children(os.getpid())
    assert this_host().children(child.pid) == []


class Recorder:
    """Stands in for the metrics of a process."""

    def __init__(self):
        self.counted = defaultdict(int)
        self.gauges = {}

    def add(self, metric, labels, value=1):
        self.counted[(metric.name, *sorted(labels.values()))] += value

    def record(self, metric, value, labels):
        pass

    def observe(self, metric, samples):
        self.gauges[metric.name] = samples

    def admit(self, model):
        return model

    label = admit


@virtual
async def test_the_ledger_is_measured():
    machine = Machine(sizes={"a": 3 * GIB, "b": 3 * GIB, "c": 6 * GIB})
    seen = Recorder()
    async with service(machine, measured=seen, keep_alive="60s") as s:
        await use(s, "a")
        machine.worker("a").preempted = 3
        await asyncio.sleep(2)
        machine.worker("a").preempted = 5
        await use(s, "b")
        await asyncio.sleep(2)
        await use(s, "c")
        await asyncio.sleep(1)
        host = {next(iter(labels.values())): value for value, labels in seen.gauges["forebay.memory"]()}
        assert host["ceiling"] == 10 * GIB
        assert host["used"] == 6 * GIB + 3 * GIB + 2 * BESIDE or host["used"] == 6 * GIB + BESIDE
        parts = {
            (x["gen_ai.request.model"], x["forebay.memory"]): v
            for v, x in seen.gauges["forebay.model.memory"]()
        }
        assert parts["c", "weights"] == 6 * GIB
        assert parts["c", "share"] > 6 * GIB
        assert {"reserved", "cache", "prefix", "peak"} <= {part for model, part in parts if model == "c"}
        rows = {tuple(x.values()): v for v, x in seen.gauges[metrics.ROWS.name]()}
        assert rows["c", "live"] == 0
        await asyncio.sleep(120)
        assert loaded(s) == set()
    assert seen.counted["forebay.preemptions", "a"] == 5
    assert seen.counted["forebay.model.evictions", "a", "room"] == 1
    assert seen.counted["forebay.model.evictions", "c", "unused"] == 1


@virtual
async def test_whatever_comes_shares_never_exceed_the_ceiling():
    """A random hour: loads, unloads, crashes, requests and other programs."""
    seed = int(os.environ.get("FOREBAY_SEED") or random.SystemRandom().randrange(10**6))
    print("seed", seed)
    chance = random.Random(seed)
    models = {name: chance.randrange(100, 4000) * MIB for name in "abcdefgh"}
    machine = Machine(total=16 * GIB, sizes=models, lag=0.2)
    async with service(machine, max_loaded_models=4, restart_backoff_min="0s", quarantine_crashes=1000) as s:

        async def act():
            model = chance.choice(list(models))
            deed = chance.random()
            if deed < 0.6:
                await _attempt(s, model)
            elif deed < 0.7:
                await s.unload(model, force=chance.random() < 0.5)
            elif deed < 0.8:
                await s.widen(model, chance.randrange(8000) * MIB)
            elif machine.running:
                worker = chance.choice(list(machine.running.values()))
                if deed < 0.84:
                    worker.die()
                elif deed < 0.95:
                    room = worker.limit - worker.weights
                    worker.reserved = chance.randrange(max(1, room))
                    worker.prefixes = chance.randrange(max(1, room - worker.reserved))
                else:
                    worker.reserved = 0

        async with asyncio.TaskGroup() as tasks:
            for _ in range(300):
                tasks.create_task(act())
                await asyncio.sleep(chance.random() * 2)
                dealt = s._steward.ledger.dealt
                assert dealt <= 10 * GIB, (seed, dealt)
                assert machine.promised() <= 10 * GIB * 1.01 + BESIDE, (seed, machine.promised())
                assert sum(w.held for w in machine.running.values()) <= 10 * GIB + BESIDE, seed
        for worker in machine.running.values():
            worker.reserved = worker.prefixes = 0
        await asyncio.sleep(10)
        assert s.memory().reserved_bytes == 0


@virtual
async def test_weights_are_unpacked_only_where_that_makes_nobody_leave(monkeypatch):
    monkeypatch.setattr(steward.sys, "platform", "linux")
    machine = Machine(sizes={"a": GIB, "b": GIB})
    machine.unpacked = 4 * GIB
    async with service(machine) as s:
        await use(s, "a")
        await use(s, "b")
        assert loaded(s) == {"a", "b"}
        limits = [worker.spec.memory_limit for worker in machine.started]
        assert limits[0] >= 4 * GIB / UNPACKED_ROOM
        await s.unload("a", force=False)
        await s.unload("b", force=False)
        machine.unpacked = 7 * GIB
        await use(s, "a")
        assert machine.started[-1].spec.memory_limit < 2 * GIB


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 4 * GIB / UNPACKED_ROOM),
        ({"cpu_blas": "off"}, GIB),
        ({"cpu_weights": "stored"}, GIB),
        ({"cpu_weights": "float32"}, 4 * GIB),
    ],
    ids=["auto", "no blas", "stored", "float32"],
)
def test_what_is_reserved_for_weights_follows_the_settings(settings, expected, monkeypatch):
    monkeypatch.setattr(steward.sys, "platform", "linux")
    machine = Machine(sizes={"a": GIB})
    machine.unpacked = 4 * GIB

    async def started():
        async with service(machine, **settings) as s:
            await use(s, "a")

    run(started())
    limit = machine.started[0].spec.memory_limit
    assert expected <= limit <= expected * 1.15 + ROOM_LEAST


def test_nobody_is_chosen_in_vain():
    def idle(name, frees, seconds=10.0, load=1.0):
        return Candidate(model_id=name, frees=frees, idle_seconds=seconds, load_seconds=load)

    small, large = idle("small", 1, 30.0), idle("large", 5, 20.0)
    assert choose([small, large], lacking=5, places=0) == [large]
    assert choose([small, large], lacking=6, places=0) == [small, large]
    assert choose([small, large], lacking=7, places=0) is None
    assert choose([small, large], lacking=0, places=1) == [small]
    assert choose([small, large], lacking=0, places=3) is None
    assert choose([small, large], lacking=0, places=0) == []
    assert choose([idle("a", 2, 20.0, 10.0), idle("b", 2, 10.0, 1.0)], lacking=1, places=0)[0].model_id == "b"


def test_firm_needs_are_met_before_wishes_even_beyond_the_ceiling():
    ledger = Ledger(10 * GIB)
    for name in "ab":
        account = ledger.open(name, 4 * GIB)
        account.note(
            worker_pb2.AdjustResponse(weights_bytes=4 * GIB, memory_bytes=4 * GIB, reserved_bytes=GIB), 0
        )
    shares = ledger.deal()
    assert all(share >= 5 * GIB for share in shares.values())
    assert ledger.free < 0
    assert "10240.0 MiB" in repr(ledger)


def test_this_machine_has_an_identity_and_memory(tmp_path):
    here = this_host()
    assert here.identity == this_host().identity
    assert len(here.identity) == 16
    assert 0 < here.available() <= here.total

    assert 0 < here.footprint(os.getpid()) < here.total
    assert here.footprint(2**22 + 12345) == 0
    assert weights_in(tmp_path) == (0, 0)
    stored, unpacked = weights_in(tiny_models.build_random(tmp_path / "m"))
    assert 0 < unpacked < stored < unpacked * 1.1  # it is float32 already


def test_on_macos_the_physical_footprint_is_what_counts(monkeypatch):
    def query(pid, version, usage):
        if pid != 7:
            return -1
        for place in range(12):
            usage[place] = place * 1000
        return 0

    monkeypatch.setattr(host_module.sys, "platform", "darwin")
    monkeypatch.setattr(host_module, "_mac_query", lambda: query)
    assert footprint(7) == 9000
    assert footprint(2**22 + 12345) == 0


def test_where_nothing_better_is_known_the_resident_size_is_taken(monkeypatch):

    monkeypatch.setattr(host_module.sys, "platform", "darwin")
    monkeypatch.setattr(host_module, "_BOOT", Path("/nowhere"))
    host_module._mac_query.cache_clear()
    assert footprint(os.getpid()) > MIB
    assert len(this_host().identity) == 16
