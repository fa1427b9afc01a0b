"""Promises of the embedding engine: callers share batches, and none fails or holds up another."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager

import pytest

from forebay.kit.failure import BackendError, DeadlineExceeded, Draining, QueueFull
from forebay.mlx_service import requirements

if requirements.missing():
    pytest.skip(requirements.missing(), allow_module_level=True)

from forebay.mlx_service.worker.embedding import engine as module
from forebay.mlx_service.worker.embedding.engine import BUDGETS, EmbeddingEngine, pack
from forebay.mlx_service.worker.runtime import mx

pytestmark = pytest.mark.mlx

BAD = 13
"""A token that makes a batch fail."""
NAN = 14
"""A token that makes a vector that is none."""


class Model:
    """Gives the sum and the number of a text's tokens, and waits where it is told to."""

    def __init__(self):
        self.threads = set()
        self.batches: list[list[list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def load(self):
        self.threads.add(threading.get_ident())
        return self

    def __call__(self, ids, mask):
        self.threads.add(threading.get_ident())
        counts = mask.sum(axis=1).tolist()
        rows = [row[:count] for row, count in zip(ids.tolist(), counts, strict=True)]
        self.batches.append(rows)
        self.entered.set()
        assert self.gate.wait(20)
        if any(BAD in row for row in rows):
            raise ValueError("a bad token")
        return mx.array([[float("nan") if NAN in row else sum(row), len(row)] for row in rows])


@asynccontextmanager
async def running(model: Model | None = None, **settings):
    model = model or Model()
    engine = EmbeddingEngine(
        model.load, longest=settings.pop("longest", 64), **{"budget": 512, "lanes": 1, **settings}
    )
    await engine.start()
    model.batches.clear()
    model.entered.clear()
    try:
        yield engine, model
    finally:
        model.gate.set()
        await engine.stop(timeout=20)


async def embed(engine: EmbeddingEngine, *texts: list[int], **more):
    packed = [pack(text) for text in texts]
    job = engine.submit(packed, **more)
    try:
        results = await job.results()
    finally:
        engine.leave(job)
    return [results[text] for text in packed]


@asynccontextmanager
async def held(engine: EmbeddingEngine, model: Model):
    """Keeps the engine in a batch, as long as the block runs."""
    model.gate.clear()
    model.entered.clear()
    first = asyncio.ensure_future(embed(engine, [1]))
    await asyncio.to_thread(model.entered.wait, 20)
    yield
    model.gate.set()
    await first


async def settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_texts_of_all_callers_are_embedded_together_and_each_gets_its_own():
    async with running() as (engine, model):
        async with held(engine, model):
            tasks = [asyncio.ensure_future(embed(engine, [i, 2, 3], [i])) for i in range(20, 70)]
            await settled()
        for i, task in enumerate(tasks, 20):
            assert await task == [[i + 5, 3], [i, 1]]
        assert len(model.batches) <= 4
        assert engine.stats().texts == 101


async def test_every_array_belongs_to_one_thread():
    async with running() as (engine, model):
        await embed(engine, [1], [2])
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


async def test_equal_texts_of_many_callers_are_embedded_once():
    async with running() as (engine, model):
        async with held(engine, model):
            tasks = [asyncio.ensure_future(embed(engine, [7, 8])) for _ in range(10)]
            await settled()
        assert [await task for task in tasks] == [[[15, 2]]] * 10
        assert model.batches[1:] == [[[7, 8]]]


async def test_a_bad_text_fails_alone():
    async with running() as (engine, model):
        async with held(engine, model):
            task = asyncio.ensure_future(embed(engine, [1, 2], [BAD, 2], [3, 2], [NAN, 2]))
            await settled()
        good, bad, fine, none = await task
        assert (good, fine) == ([3, 2], [5, 2])
        assert isinstance(bad, BackendError)
        assert bad.message == "embedding the text failed: ValueError"
        assert isinstance(none, BackendError)
        assert engine.stats().faults >= 2
        assert await embed(engine, [4]) == [[4, 1]]


async def test_what_nobody_waits_for_is_never_embedded():
    async with running() as (engine, model):
        async with held(engine, model):
            left = asyncio.ensure_future(embed(engine, *([i, 50] for i in range(500))))
            stays = asyncio.ensure_future(embed(engine, [0, 50]))
            await settled()
            left.cancel()
            await settled()
        assert await stays == [[50, 2]]
        assert model.batches[1:] == [[[0, 50]]]
        with pytest.raises(asyncio.CancelledError):
            await left
        assert engine.stats().waiting == 0


async def test_one_who_left_before_the_engine_looked_costs_nothing():
    async with running() as (engine, model):
        async with held(engine, model):
            job = engine.submit([pack([9])])
            engine.leave(job)
            engine.leave(job)
        await embed(engine, [2])
        assert [[9]] not in model.batches


async def test_a_text_whose_time_is_up_is_not_embedded():
    async with running() as (engine, model):
        async with held(engine, model):
            late = asyncio.ensure_future(embed(engine, [9], [10], deadline=time.monotonic() - 1))
            fine = asyncio.ensure_future(embed(engine, [10], deadline=time.monotonic() + 60))
            await settled()
        with pytest.raises(DeadlineExceeded):
            await late
        assert await fine == [[10, 1]]
        assert [[9]] not in model.batches


async def test_the_urgent_go_first():
    async with running(budget=1) as (engine, model):
        async with held(engine, model):
            tasks = [asyncio.ensure_future(embed(engine, [i], urgency=i % 3)) for i in (20, 21, 22)]
            await settled()
        await asyncio.gather(*tasks)
        assert model.batches[1:] == [[[21]], [[22]], [[20]]]


async def test_a_full_queue_says_when_to_come_back():
    async with running(queue_tokens=4) as (engine, model):
        async with held(engine, model):
            first = asyncio.ensure_future(embed(engine, [1, 2, 3], [4, 5]))
            await settled()
            with pytest.raises(QueueFull) as caught:
                engine.submit([pack([1])])
            assert caught.value.metadata == {"waiting_tokens": "6"}
            assert caught.value.retry_after is not None
        await first
        assert await embed(engine, [1]) == [[1, 1]]


async def test_nothing_to_embed_is_done_at_once():
    async with running() as (engine, _):
        assert await embed(engine) == []


async def test_batches_are_padded_to_few_shapes_and_never_beyond_the_longest_text():
    shapes = []

    class Shapes(Model):
        def __call__(self, ids, mask):
            shapes.append(ids.shape)
            return super().__call__(ids, mask)

    async with running(Shapes(), longest=20) as (engine, _):
        shapes.clear()
        for length in (1, 8, 9, 17, 20):
            await embed(engine, [1] * length)
    assert [width for _, width in shapes] == [1, 8, 9, 20, 20]


async def test_the_budget_is_measured_and_idle_memory_given_back(monkeypatch):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)
    cleared = threading.Event()
    async with running(budget=None) as (engine, _):
        assert engine._batcher.budget in BUDGETS
        monkeypatch.setattr(mx, "clear_cache", cleared.set)
        assert await asyncio.to_thread(cleared.wait, 20)
        monkeypatch.undo()
        assert await embed(engine, [5]) == [[5, 1]]


async def test_a_batch_is_computed_in_parts_and_comes_back_in_order():
    async with running(lanes=3) as (engine, model):
        texts = [[i] * (1 + i % 40) for i in range(20, 80)]
        wanted = [[sum(text), len(text)] for text in texts]
        assert await embed(engine, *texts) == wanted
        assert len(model.batches) > engine.stats().steps
        model.batches.clear()
        await embed(engine, [20])
        assert len(model.batches) == 1


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[1], [5] * 100, [1, 1, 1, 100], [100, 1], list(range(1, 60))])
def test_parts_are_neighbours_and_no_more_than_there_are_lanes(lanes, lengths):
    texts = [pack([i] * length) for i, length in enumerate(lengths)]
    parts = module._parts(texts, lanes)
    assert [tokens for part in parts for tokens in part] == texts
    assert all(parts)
    assert len(parts) <= lanes


async def test_the_age_of_the_batch_that_runs_is_known():
    async with running() as (engine, model):
        assert engine.stats().last_step_age == 0.0
        async with held(engine, model):
            assert engine.stats().last_step_age > 0.0


async def test_stopping_ends_jobs_and_refuses_new_ones():
    model = Model()
    engine = EmbeddingEngine(model.load, longest=64, budget=512)
    await engine.stop(timeout=1)  # never started: nothing to end
    engine = EmbeddingEngine(model.load, longest=64, budget=512)
    await engine.start()
    async with held(engine, model):
        waiting = asyncio.ensure_future(embed(engine, [9]))
        await settled()
        stop = asyncio.ensure_future(engine.stop(timeout=20))
        await settled()
        with pytest.raises(Draining):
            engine.submit([pack([1])])
    await stop
    with pytest.raises(Draining):
        await waiting
    assert engine.has_ended


async def test_a_stop_that_takes_too_long_is_told():
    async with running() as (engine, model), held(engine, model):
        with pytest.raises(TimeoutError):
            await engine.stop(timeout=0.01)


async def test_a_model_that_cannot_be_loaded_is_told():
    def load():
        raise ValueError("no weights")

    engine = EmbeddingEngine(load, longest=64)
    with pytest.raises(ValueError, match="no weights"):
        await engine.start()
    await engine.stop(timeout=20)


async def test_an_engine_that_fails_for_good_ends_its_jobs(monkeypatch):
    async with running() as (engine, _):

        def broken():
            raise RuntimeError

        monkeypatch.setattr(engine._batcher, "take", broken)
        with pytest.raises((BackendError, Draining)):
            await embed(engine, [1])
        await asyncio.shield(engine._ended)
        with pytest.raises(Draining):
            engine.submit([pack([1])])


async def test_a_loop_that_is_gone_ends_the_engine():
    engine = EmbeddingEngine(Model().load, longest=64, budget=512)

    def start() -> None:
        asyncio.run(engine.start())

    await asyncio.to_thread(start)
    engine._commands.put(lambda: engine._post(print))
    await asyncio.to_thread(engine._thread.join, 20)
    assert not engine._thread.is_alive()


async def test_who_was_answered_together_is_awaited_a_moment_and_goes_together_again(monkeypatch):
    monkeypatch.setattr(module, "GATHER_SHARE", 1e9)
    monkeypatch.setattr(module, "GATHER_SECONDS", 20.0)
    async with running() as (engine, model):
        async with held(engine, model):
            tasks = [asyncio.ensure_future(embed(engine, [i, 2])) for i in range(20, 23)]
            await settled()
        await asyncio.gather(*tasks)
        model.batches.clear()
        again = []
        for i in range(30, 33):  # they come back one after the other
            again.append(asyncio.ensure_future(embed(engine, [i, 2])))
            await asyncio.sleep(0.01)
        assert [await task for task in again] == [[[i + 2, 2]] for i in range(30, 33)]
        assert [len(batch) for batch in model.batches] == [3]


async def test_nobody_waits_long_for_callers_who_have_gone():
    async with running() as (engine, model):
        async with held(engine, model):
            tasks = [asyncio.ensure_future(embed(engine, [i, 2])) for i in range(20, 23)]
            await settled()
        await asyncio.gather(*tasks)
        async with asyncio.timeout(10):
            assert await embed(engine, [5, 6]) == [[11, 2]]


async def test_an_engine_that_stops_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(module, "GATHER_SHARE", 1e9)
    monkeypatch.setattr(module, "GATHER_SECONDS", 60.0)
    async with running() as (engine, model):
        async with held(engine, model):
            tasks = [asyncio.ensure_future(embed(engine, [i, 2])) for i in range(20, 23)]
            await settled()
        await asyncio.gather(*tasks)
        left = asyncio.ensure_future(embed(engine, [7]))
        await settled()
        await engine.stop(timeout=20)
        with pytest.raises(Draining):
            await left
