"""Promises of `forebay.mlx_service.process`: what a worker's supervisor can rely on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from forebay.mlx_service.process import Launcher, Spec, WorkerProcess

FAKE = (sys.executable, str(Path(__file__).parents[1] / "mlx_fake_worker.py"))


@pytest.fixture
def launcher():
    made = Launcher(name="mlx", grace=0.3, command=FAKE)
    yield made
    made.close()


def spec(folder: Path, **behaviour: object) -> Spec:
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return Spec(model_id="m", folder=folder)


async def well(worker: WorkerProcess) -> None:
    async with asyncio.timeout(20):
        while not await worker.is_well(1.0):
            await asyncio.sleep(0.02)


async def test_a_worker_that_is_gone_answers_nothing_and_says_how_it_ended(tmp_path, launcher):
    gone = asyncio.Event()
    async with launcher(spec(tmp_path), gone.set) as worker:
        await well(worker)
        assert (await worker.describe()).id == "m"
        assert worker.exit_code is None
        os.kill(worker.pid, signal.SIGKILL)
        await gone.wait()
        assert worker.exit_code == -signal.SIGKILL
        assert repr(worker) == f"<Worker pid {worker.pid} ended -9>"
        assert not worker.is_stopped()
        assert not await worker.is_well(1.0)
        assert await worker.describe() is None


async def test_questions_to_a_worker_that_dies_meanwhile_are_answered_with_no(tmp_path, launcher):
    gone = asyncio.Event()
    async with launcher(spec(tmp_path), gone.set) as worker:
        await well(worker)
        assert repr(worker) == f"<Worker pid {worker.pid}>"
        os.kill(worker.pid, signal.SIGSTOP)
        asked = asyncio.gather(worker.is_well(30.0), worker.describe())
        await asyncio.sleep(0)
        await worker._channel.close()
        assert await asked == [False, None]
        os.kill(worker.pid, signal.SIGKILL)
        await gone.wait()


async def test_a_question_to_a_frozen_worker_has_its_time(tmp_path, launcher):
    async with launcher(spec(tmp_path), lambda: None) as worker:
        await well(worker)
        assert not worker.is_stopped()
        os.kill(worker.pid, signal.SIGSTOP)
        assert not await worker.is_well(0.05)
        assert worker.is_stopped()
        os.kill(worker.pid, signal.SIGCONT)
        await well(worker)
        assert not worker.is_stopped()


@pytest.mark.parametrize("question", ["is_well", "describe"])
async def test_who_asks_can_be_cancelled(tmp_path, launcher, question):
    async with launcher(spec(tmp_path), lambda: None) as worker:
        await well(worker)
        os.kill(worker.pid, signal.SIGSTOP)
        task = asyncio.ensure_future(worker.is_well(30.0) if question == "is_well" else worker.describe())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_block_that_fails_or_is_cancelled_leaves_no_worker(tmp_path, launcher):
    pids = []

    async def hold(error: Exception | None) -> None:
        async with launcher(spec(tmp_path, stubborn=True), lambda: None) as worker:
            pids.append(worker.pid)
            await well(worker)
            if error is not None:
                raise error
            entered.set()
            await asyncio.Event().wait()

    entered = asyncio.Event()
    with suppress(BaseExceptionGroup, ZeroDivisionError):
        await hold(ZeroDivisionError())
    task = asyncio.ensure_future(hold(None))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
