"""Promises of `forebay.mlx_service.supervisor`, in virtual time, over workers that are only told of."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    Internal,
    MemoryExhausted,
    ModelLoadFailed,
    ModelQuarantined,
)
from forebay.mlx.v1 import worker_pb2
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.fetch import Progress
from forebay.mlx_service.host import Host
from forebay.mlx_service.supervisor import Options, State, Supervisor
from forebay.testing.clock import now, virtual


class FakeWorker:
    """A worker that loads, dies and falls silent when it is told to."""

    stub = None

    def __init__(self, spec, on_exit, *, load=1.0, dies=None, code=-6, said=(), pid=1):
        self.spec, self.on_exit, self.pid = spec, on_exit, pid
        self.exit_code = None
        self.silent = self.stopped = False
        self.said = said
        self.ready_at = now() + load
        self.graces: list[float] = []
        self.stop_takes = 0.0
        self.stop_code = 0
        if dies is not None:
            asyncio.get_running_loop().call_later(dies, self.die, code)

    def tail(self):
        return tuple(self.said)

    def is_stopped(self):
        return self.stopped and self.exit_code is None

    def die(self, code=-9):
        if self.exit_code is None:
            self.exit_code = code
            self.on_exit()

    async def is_well(self, timeout):
        late = now() + timeout
        while self.silent and now() < late:
            await asyncio.sleep(min(0.05, timeout))
        return not self.silent and self.exit_code is None and now() >= self.ready_at

    async def describe(self):
        return pb.Model(id=self.spec.model_id)

    async def adjust(self, limit):
        return worker_pb2.AdjustResponse(limit_bytes=limit or self.spec.memory_limit, weights_bytes=1)

    async def stop(self, grace):
        self.graces.append(grace)
        await asyncio.sleep(self.stop_takes)
        if self.exit_code is None:
            self.exit_code = self.stop_code


class Launcher:
    """Starts fake workers by a plan: one entry of keyword arguments for each start."""

    def __init__(self, *plans):
        self.plans = deque(plans)
        self.workers: list[FakeWorker] = []
        self.started_at: list[float] = []

    @asynccontextmanager
    async def __call__(self, spec, on_exit) -> AsyncIterator[FakeWorker]:
        plan = self.plans.popleft() if self.plans else {}
        worker = FakeWorker(spec, on_exit, pid=len(self.workers) + 1, **plan)
        self.workers.append(worker)
        self.started_at.append(now())
        try:
            yield worker
        finally:
            await worker.stop(0.0)

    @property
    def running(self):
        return [w for w in self.workers if w.exit_code is None]


async def prepare(report):
    return Path("/models/m")


async def no_one(residence):
    pass


def supervisor(launch, **settings):
    host = Host(identity="h", total=1 << 40, available=lambda: 1 << 40, footprint=lambda pid: 0)
    return Supervisor(MlxSettings.model_validate(settings), launch=launch, jitter=lambda: 0.0, host=host)


async def use(s, model="m", *, hold=0.0, waiting=no_one, prepare=prepare):
    async with s.lease(model, prepare, waiting) as worker:
        await asyncio.sleep(hold)
        return worker


@virtual
async def test_a_model_is_loaded_when_it_is_asked_for_and_stays():
    launch = Launcher()
    async with supervisor(launch) as s:
        assert await use(s) is await use(s)
        assert s.residence("m").state is State.ACTIVE
        assert s.residence("m").load_seconds == pytest.approx(1.0, abs=0.1)
        assert "m ACTIVE calls 0" in repr(s)
    assert len(launch.workers) == 1


@virtual
async def test_a_worker_that_aborts_when_it_is_asked_to_end_is_told_of(caplog):
    launch = Launcher()
    async with supervisor(launch) as s:
        for code in (0, -6):
            (await use(s)).stop_code = code
            await s.unload("m", force=False)
            assert ("did not stop in peace" in caplog.text) is (code != 0)
    assert "it was ended by SIGABRT" in caplog.text


@virtual
async def test_nothing_is_left_when_the_supervisor_ends():
    launch = Launcher()
    async with supervisor(launch) as s:
        await use(s, "a")
        await use(s, "b")
        assert len(launch.running) == 2
    assert not launch.running
    with pytest.raises(BackendUnavailable):
        await use(s, "c")


@virtual
async def test_ending_while_a_model_loads_ends_the_load():
    launch = Launcher({"load": 100.0})
    async with supervisor(launch) as s, asyncio.TaskGroup() as tasks:
        task = tasks.create_task(use(s))
        await asyncio.sleep(1)
        task.cancel()
    assert not launch.running


@virtual
async def test_callers_that_come_together_share_one_load():
    launch = Launcher()
    async with supervisor(launch) as s:
        workers = await asyncio.gather(*(use(s) for _ in range(10)))
        assert len(set(map(id, workers))) == 1
    assert len(launch.workers) == 1


@virtual
async def test_a_load_goes_on_when_its_caller_leaves():
    launch = Launcher({"load": 10.0})
    async with supervisor(launch) as s:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await use(s)
        await asyncio.sleep(10)
        assert s.residence("m").state is State.ACTIVE


@virtual
async def test_a_caller_that_waits_is_told_at_least_every_second():
    launch = Launcher({"load": 5.0})
    told = []

    async def waiting(residence):
        told.append((now(), residence.state))

    async with supervisor(launch) as s:
        await use(s, waiting=waiting)
    assert {state for _, state in told} == {State.LOADING}
    assert max(b - a for (a, _), (b, _) in itertools.pairwise(told)) <= 1.0


@virtual
async def test_preparation_is_part_of_the_load_and_tells_how_far_it_is():
    steps = []

    async def fetch(report):
        report(Progress(what="downloading", done=1, total=2))
        await asyncio.sleep(3)
        return Path("/models/fetched")

    async def waiting(residence):
        steps.append((residence.step, residence.detail))

    launch = Launcher()
    async with supervisor(launch) as s:
        worker = await use(s, waiting=waiting, prepare=fetch)
    assert worker.spec.folder == Path("/models/fetched")
    assert (Progress(what="downloading", done=1, total=2), "downloading") in steps


@virtual
async def test_a_crashed_worker_is_started_again_and_the_next_call_waits_for_it():
    launch = Launcher({}, {})
    async with supervisor(launch, restart_backoff_min="1s") as s:
        first = await use(s)
        first.die(-6)
        began = now()
        second = await use(s)
        assert second is not first
        assert now() - began == pytest.approx(1.0, abs=0.1)  # the load: a first restart does not wait


@virtual
async def test_restarts_back_off_and_end_in_quarantine():
    launch = Launcher(*({"dies": 0.0, "said": ("[metal] out of memory",)} for _ in range(9)))
    async with supervisor(
        launch, restart_backoff_min="1s", quarantine_crashes=4, quarantine_window="1m"
    ) as s:
        with pytest.raises(ModelQuarantined) as caught:
            await use(s)
        assert [round(t) for t in launch.started_at] == [0, 0, 1, 3]
        residence = s.residence("m")
        assert residence.state is State.QUARANTINED
        assert "lost 4 times" in caught.value.message
        assert "SIGABRT" in caught.value.message
        assert "[metal] out of memory" in caught.value.message
        with pytest.raises(ModelQuarantined):
            await use(s)
        assert len(launch.workers) == 4


@virtual
async def test_the_longest_wait_between_restarts_is_bounded():
    launch = Launcher(*({"dies": 0.0} for _ in range(5)))
    async with supervisor(
        launch,
        restart_backoff_min="1s",
        restart_backoff_max="2s",
        quarantine_crashes=5,
        quarantine_window="10m",
    ) as s:
        with pytest.raises(ModelQuarantined):
            await use(s)
    assert [round(t) for t in launch.started_at] == [0, 0, 1, 3, 5]


@virtual
async def test_loading_by_name_ends_a_quarantine():
    launch = Launcher({"dies": 0.0})
    async with supervisor(launch, quarantine_crashes=1) as s:
        with pytest.raises(ModelQuarantined):
            await use(s)
        await s.load("m", prepare, no_one, Options())
        assert s.residence("m").state is State.ACTIVE


@virtual
async def test_crashes_from_before_a_load_by_name_count_no_more():
    launch = Launcher({"dies": 0.0}, {"dies": 0.0}, {})
    async with supervisor(launch, quarantine_crashes=2, restart_backoff_min="1s") as s:
        with pytest.raises(ModelQuarantined):
            await use(s)
        await s.load("m", prepare, no_one, Options())
        launch.running[0].die()
        assert await use(s) is launch.running[0]
    assert len(launch.workers) == 4


@virtual
async def test_crashes_far_apart_are_no_reason_for_a_quarantine():
    launch = Launcher()
    async with supervisor(launch, quarantine_crashes=2, quarantine_window="10s") as s:
        for _ in range(5):
            (await use(s)).die()
            await asyncio.sleep(30)
        assert s.residence("m").state is State.ACTIVE


@virtual
async def test_a_call_waits_for_a_restart_no_longer_than_it_may():
    launch = Launcher({}, {"load": 100.0})
    async with supervisor(launch, restart_wait="5s") as s:
        (await use(s)).die()
        began = now()
        with pytest.raises(BackendUnavailable) as caught:
            await use(s)
        assert 4.0 <= now() - began <= 6.5
        assert caught.value.retry_after is not None
        await asyncio.sleep(100)
        await use(s)


@virtual
async def test_a_model_that_cannot_be_loaded_says_why_and_is_not_tried_at_once():
    said = ("a log line", "forebay mlx-worker: the weights are cut short")
    launch = Launcher({"dies": 0.5, "code": 3, "said": said})
    async with supervisor(launch, failed_retry="30s") as s:
        for _ in range(2):
            with pytest.raises(ModelLoadFailed) as caught:
                await use(s)
            assert caught.value.message == "m cannot be loaded: the weights are cut short"
        assert s.residence("m").state is State.FAILED
        assert len(launch.workers) == 1
        await asyncio.sleep(31)
        await use(s)
        assert len(launch.workers) == 2


@virtual
async def test_everybody_who_waits_for_a_failing_load_is_told():
    launch = Launcher({"dies": 0.5, "code": 3})
    async with supervisor(launch) as s:
        results = await asyncio.gather(*(use(s) for _ in range(3)), return_exceptions=True)
    assert [type(r) for r in results] == [ModelLoadFailed] * 3
    assert len({id(r) for r in results}) == 3
    assert "exit code 3" in results[0].message


@virtual
async def test_loading_by_name_tries_a_failed_model_at_once():
    launch = Launcher({"dies": 0.5, "code": 3})
    async with supervisor(launch) as s:
        with pytest.raises(ModelLoadFailed):
            await use(s)
        await s.load("m", prepare, no_one, Options())


@virtual
async def test_a_load_that_takes_too_long_fails():
    launch = Launcher({"load": 1000.0})
    async with supervisor(launch, load_timeout="5s") as s:
        with pytest.raises(ModelLoadFailed, match="not ready within 5s"):
            await use(s)
        assert not launch.running


@virtual
async def test_a_preparation_that_fails_fails_the_load_under_its_own_name():
    async def fetch(report):
        raise BackendError("no disk")

    launch = Launcher()
    async with supervisor(launch) as s:
        with pytest.raises(BackendError, match="no disk"):
            await use(s, prepare=fetch)
        assert s.residence("m").state is State.FAILED


@virtual
async def test_a_fault_of_ours_fails_the_load_and_not_the_supervisor():
    async def fetch(report):
        raise ZeroDivisionError

    async with supervisor(Launcher()) as s:
        with pytest.raises(Internal, match="ZeroDivisionError"):
            await use(s, prepare=fetch)
        await use(s, "other")


@virtual
async def test_a_silent_worker_is_replaced_and_calls_wait_meanwhile():
    launch = Launcher()
    async with supervisor(launch, health_interval="1s", health_timeout="5s", restart_backoff_min="0s") as s:
        first = await use(s)
        first.silent = True
        began = now()
        await asyncio.sleep(2.0 + 5.0)
        second = await use(s)
        assert second is not first
        assert now() - began < 9.0
        assert first.graces[0] == 0.0  # a process that does not answer is not asked to leave


@virtual
async def test_a_frozen_worker_is_replaced_long_before_a_slow_one_would_be():
    launch = Launcher()
    async with supervisor(launch, health_interval="1s", health_timeout="1h") as s:
        first = await use(s)
        first.silent = first.stopped = True
        began = now()
        await asyncio.sleep(1.2)
        second = await use(s)  # it waits from the first look at the frozen one
        assert second is not first
        assert now() - began <= 1.0 + 0.6 + 1.0 + 0.1  # the interval, the looks, and the load
        assert first.graces[0] == 0.0


@virtual
async def test_a_worker_that_is_stopped_again_and_again_for_a_moment_is_kept():
    launch = Launcher()
    async with supervisor(launch, health_interval="1s", health_timeout="10s") as s:
        first = await use(s)
        first.silent = True
        for _ in range(10):
            first.stopped = not first.stopped
            await asyncio.sleep(0.4)
        first.silent = False
        assert await use(s) is first
    assert len(launch.workers) == 1


@virtual
async def test_a_worker_that_is_frozen_while_it_loads_is_replaced():
    launch = Launcher({"load": 100.0})
    async with supervisor(launch, load_timeout="1h") as s:
        waiting = asyncio.ensure_future(use(s))
        await asyncio.sleep(10)
        launch.workers[0].stopped = True
        assert await waiting is launch.workers[1]
        assert now() == pytest.approx(10 + 0.6 + 1.0, abs=0.2)


@virtual
async def test_a_worker_that_a_call_lost_sight_of_is_asked_at_once():
    launch = Launcher()
    async with supervisor(launch, health_interval="1h") as s:
        first = await use(s)
        first.silent = True
        s.residence("m").doubt(first)
        assert "suspect" in repr(s.residence("m"))
        second = await use(s)
        assert second is not first
        s.residence("m").doubt(first)  # news of a worker that is gone
        assert not s.residence("m").suspect


@virtual
async def test_a_worker_that_answers_again_is_kept():
    launch = Launcher()
    async with supervisor(launch, health_interval="1s", health_timeout="5s") as s:
        first = await use(s)
        first.ready_at = now() + 2.5
        s.residence("m").doubt(first)
        assert await use(s) is first
        assert now() > 2.5


@virtual
async def test_a_worker_that_dies_while_it_is_asked_is_a_crash():
    launch = Launcher()
    async with supervisor(launch, health_interval="1s", restart_backoff_min="0s") as s:
        first = await use(s)
        first.ready_at = now() + 100
        first.exit_code = 70  # and nobody was told: the question finds out
        await asyncio.sleep(1.5)
        assert await use(s) is not first


@virtual
async def test_unloading_waits_for_calls_and_returns_when_the_worker_is_gone():
    launch = Launcher()
    async with supervisor(launch) as s:
        await use(s)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(use(s, hold=5.0))
            await asyncio.sleep(0.1)
            began = now()
            await s.unload("m", force=False)
            assert now() - began == pytest.approx(4.9, abs=0.1)
        assert not launch.running
        assert s.residence("m").state is State.AVAILABLE


@virtual
async def test_a_forced_unload_waits_for_nobody():
    launch = Launcher()
    async with supervisor(launch) as s:
        await use(s)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(use(s, hold=5.0))
            await asyncio.sleep(0.1)
            began = now()
            await s.unload("m", force=True)
            assert now() == began
        assert not launch.running


@virtual
async def test_an_unload_that_waits_can_be_forced():
    launch = Launcher()
    async with supervisor(launch) as s:
        await use(s)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(use(s, hold=50.0))
            await asyncio.sleep(0.1)
            tasks.create_task(s.unload("m", force=False))
            await asyncio.sleep(1)
            assert s.residence("m").state is State.UNLOADING
            await s.unload("m", force=True)
            assert now() < 5


@virtual
async def test_unloading_what_is_not_loaded_succeeds():
    async with supervisor(Launcher()) as s:
        await s.unload("m", force=False)


@virtual
async def test_unloading_during_a_load_or_a_restart_ends_it():
    launch = Launcher({"load": 100.0}, {}, {})
    async with supervisor(launch, restart_backoff_min="10s") as s, asyncio.TaskGroup() as tasks:

        async def give_up():
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await use(s)

        tasks.create_task(give_up())
        await asyncio.sleep(1)
        await s.unload("m", force=False)
        assert s.residence("m").state is State.AVAILABLE
        (await use(s)).die()
        await asyncio.sleep(1)
        assert s.residence("m").state is State.LOADING
        await s.unload("m", force=False)
        assert s.residence("m").state is State.AVAILABLE
        assert not launch.running


@virtual
async def test_a_call_during_an_unload_loads_the_model_again():
    launch = Launcher()
    async with supervisor(launch) as s:
        first = await use(s)
        first.stop_takes = 2.0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(s.unload("m", force=False))
            await asyncio.sleep(0.1)
            task = tasks.create_task(use(s))
        assert task.result() is not first


@virtual
async def test_an_unused_model_leaves_after_its_time_and_a_pinned_one_does_not():
    launch = Launcher()
    async with supervisor(launch, keep_alive="10s") as s:
        await s.load("pinned", prepare, no_one, Options(keep_alive=10.0, pinned=True))
        await use(s, "idle")
        left = s.residence("idle").expires_in(now())
        assert left == pytest.approx(10.0, abs=0.1)
        assert s.residence("pinned").expires_in(now()) is None
        await use(s, "idle", hold=20.0)
        assert s.residence("idle").state is State.ACTIVE
        await asyncio.sleep(12)
        assert s.residence("idle").state is State.AVAILABLE
        assert s.residence("pinned").state is State.ACTIVE
        assert "pinned" in repr(s.residence("pinned"))


@virtual
async def test_models_of_the_pin_list_stay_and_others_leave_for_room():
    launch = Launcher()
    lists = {"pinned": ("alias", "b"), "aliases": {"alias": "a"}}
    async with supervisor(launch, max_loaded_models=3, keep_alive="10s", **lists) as s:
        for model in "abcd":
            await use(s, model)
        assert s.residence("c").state is State.AVAILABLE
        await asyncio.sleep(12)
        states = {id_: s.residence(id_).state for id_ in "abd"}
        assert states == {"a": State.ACTIVE, "b": State.ACTIVE, "d": State.AVAILABLE}
        await s.unload("a", force=False)
        assert s.residence("a").state is State.AVAILABLE


@virtual
async def test_the_longest_unused_model_makes_room():
    launch = Launcher()
    async with supervisor(launch, max_loaded_models=2) as s:
        for model in "abac":
            await use(s, model, hold=0.1)
        states = {id_: s.residence(id_).state for id_ in "abc"}
        assert states == {"a": State.ACTIVE, "b": State.AVAILABLE, "c": State.ACTIVE}


@virtual
async def test_there_is_no_room_while_all_models_are_in_use_and_room_afterwards():
    launch = Launcher()
    async with supervisor(launch, max_loaded_models=1) as s:
        await use(s, "a")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(use(s, "a", hold=3.0))
            await asyncio.sleep(0.1)
            with pytest.raises(MemoryExhausted) as caught:
                await use(s, "b")
            assert caught.value.retry_after is not None
            assert s.residence("b").state is State.AVAILABLE
        await use(s, "b")


@virtual
async def test_room_is_taken_only_when_the_other_worker_is_gone():
    launch = Launcher()
    async with supervisor(launch, max_loaded_models=1) as s:
        first = await use(s, "a")
        first.stop_takes = 5.0
        began = now()
        await use(s, "b")
        assert launch.started_at[1] - began >= 5.0
        assert len(launch.running) == 1


@virtual
async def test_another_context_loads_the_model_anew():
    launch = Launcher()
    async with supervisor(launch) as s:
        await use(s)
        await s.load("m", prepare, no_one, Options(context_token_count=512))
        assert [w.spec.context_token_count for w in launch.workers] == [None, 512]
        await s.load("m", prepare, no_one, Options(context_token_count=512, pinned=True))
        assert len(launch.workers) == 2


@virtual
async def test_an_end_without_a_word_is_told_by_its_code():
    launch = Launcher({"dies": 0.1, "code": -250}, {"dies": 0.1, "code": 70, "said": ("bye",)})
    async with supervisor(launch, quarantine_crashes=2) as s:
        with pytest.raises(ModelQuarantined, match=r"exit code 70 \(bye\)"):
            await use(s)
