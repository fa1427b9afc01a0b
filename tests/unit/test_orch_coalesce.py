"""What `Coalesce` promises: one reply for identical calls, whoever comes late and whoever leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Literal

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendError, Draining, Internal
from forebay.kit.pipeline import Call, Request, Send
from forebay.orchestrator.layers import coalesce
from forebay.orchestrator.layers.coalesce import Coalesce
from forebay.testing.calls import Sink, ask, serve
from forebay.testing.clock import now, virtual


class Backend:
    """Says a word a second, five in all."""

    def __init__(self) -> None:
        self.calls: list[Call[Request]] = []
        self.words = 5
        self.said = 0
        self.cancelled = 0
        self.error: Exception | None = None

    async def __call__(self, call: Call[Request], send: Send) -> None:
        self.calls.append(call)
        try:
            await send(pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED)))
            await asyncio.sleep(0.1)
            await send(pb.GenerateResponse(started=pb.Started(backend="x", request_id=call.request_id)))
            for number in range(self.words):
                await asyncio.sleep(1.0)
                self.said += 1
                await send(pb.GenerateResponse(delta=pb.Delta(text=f"{number} ", token_count=1)))
            if self.error is not None:
                raise self.error
            await send(pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP)))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class Rig:
    def __init__(self, group: asyncio.TaskGroup, when: str, is_shared: bool) -> None:
        self.backend = Backend()
        self.tasks: list[asyncio.Task[None]] = []
        self.joined: list[Call[Request]] = []
        self.asked: list[asyncio.Task[Sink]] = []
        self._group = group
        mode: Literal["asked", "always", "never"] = when  # type: ignore[assignment]  # one of them
        self.layer = Coalesce(
            self.backend,
            spawn=self._spawn,
            when=mode,
            longest=timedelta(hours=1),
            is_shared=is_shared,
            on_join=self.joined.append,
        )

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        self.tasks.append(self._group.create_task(work, name=name))
        return self.tasks[-1]

    def ask(
        self,
        request: Request | None = None,
        *,
        caller: str = "c",
        request_id: str = "",
        sink: Sink | None = None,
        deadline: float | None = None,
    ) -> asyncio.Task[Sink]:
        work = serve(
            self.layer,
            request or greedy(),
            sink=sink,
            caller=caller,
            request_id=request_id,
            deadline=deadline,
        )
        self.asked.append(asyncio.ensure_future(work))
        return self.asked[-1]


@asynccontextmanager
async def rig(when: str = "asked", *, is_shared: bool = False) -> AsyncIterator[Rig]:
    async with asyncio.TaskGroup() as group:
        made = Rig(group, when, is_shared)
        yield made
        await asyncio.gather(*made.asked, return_exceptions=True)
    assert repr(made.layer) == "<Coalesce 0 flights>"
    assert all(task.done() for task in made.tasks)


def greedy(
    policy: pb.CachePolicy.ValueType = pb.CACHE_POLICY_USE,
    priority: pb.Priority.ValueType = pb.PRIORITY_UNSPECIFIED,
) -> pb.GenerateRequest:
    request = ask(model="m")
    request.sampling.temperature = 0.0
    request.routing.cache = policy
    request.routing.priority = priority
    return request


WHOLE = "0 1 2 3 4 "


@virtual
async def test_identical_calls_are_one_call_and_everyone_gets_all_of_it() -> None:
    async with rig() as r:
        early = r.ask(request_id="1")
        await asyncio.sleep(2.5)
        late = r.ask(request_id="2")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert r.joined[0].request_id == "2"
        sinks = [await early, await late]
        assert now() == pytest.approx(5.1)
    assert len(r.backend.calls) == 1
    for number, sink in enumerate(sinks, 1):
        assert sink.text == WHOLE
        (started,) = [event.started for event in sink.events if event.HasField("started")]  # type: ignore[union-attr]  # replies
        assert started.request_id == str(number)
        assert not started.replayed
    assert sinks[0].kinds[:2] == ["progress", "started"]
    assert sinks[1].kinds[:1] == ["started"], "a queue that is over is no news"
    assert sinks[0].events[2] is not sinks[1].events[1]


@virtual
async def test_who_comes_late_gets_at_once_what_was_said() -> None:
    async with rig() as r:
        r.ask()
        await asyncio.sleep(3.5)
        sink = Sink()
        r.ask(sink=sink)
        await asyncio.sleep(0.1)
        assert sink.text == "0 1 2 "


@virtual
async def test_the_first_caller_may_leave_and_the_others_get_their_reply() -> None:
    async with rig() as r:
        leader = r.ask()
        await asyncio.sleep(1.5)
        follower = r.ask()
        await asyncio.sleep(1)
        leader.cancel()
        assert (await follower).text == WHOLE
    assert (len(r.backend.calls), r.backend.cancelled) == (1, 0)


@virtual
async def test_with_the_last_caller_the_backend_is_let_go_at_once() -> None:
    async with rig() as r:
        tasks = [r.ask(), r.ask()]
        await asyncio.sleep(2.5)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert r.backend.cancelled == 1
        assert (await r.ask()).text == WHOLE, "and the next one begins anew"
    assert len(r.backend.calls) == 2


@virtual
async def test_a_caller_who_leaves_before_anything_began_leaves_nothing() -> None:
    async with rig() as r:
        task = r.ask()
        await asyncio.sleep(0)
        task.cancel()


@virtual
async def test_a_reply_that_is_over_is_not_joined() -> None:
    async with rig() as r:
        await r.ask()
        await r.ask()
    assert len(r.backend.calls) == 2


@pytest.mark.parametrize(
    ("when", "one", "two", "calls"),
    [
        ("asked", greedy(), greedy(), 1),
        ("asked", greedy(pb.CACHE_POLICY_REFRESH), greedy(), 1),
        ("asked", greedy(pb.CACHE_POLICY_UNSPECIFIED), greedy(pb.CACHE_POLICY_UNSPECIFIED), 2),
        ("always", greedy(pb.CACHE_POLICY_UNSPECIFIED), greedy(pb.CACHE_POLICY_UNSPECIFIED), 1),
        ("always", greedy(pb.CACHE_POLICY_BYPASS), greedy(pb.CACHE_POLICY_BYPASS), 2),
        ("always", ask(model="m"), ask(model="m"), 2),
        ("never", greedy(), greedy(), 2),
        ("asked", greedy(), greedy(priority=pb.PRIORITY_BATCH), 2),
    ],
)
@virtual
async def test_what_is_shared_is_repeatable_and_wanted(
    when: str, one: pb.GenerateRequest, two: pb.GenerateRequest, calls: int
) -> None:
    async with rig(when) as r:
        tasks = [r.ask(one), r.ask(two)]
        for task in tasks:
            assert (await task).text == WHOLE
    assert len(r.backend.calls) == calls


@pytest.mark.parametrize(("is_shared", "calls"), [(False, 2), (True, 1)])
@virtual
async def test_callers_share_only_if_they_may(is_shared: bool, calls: int) -> None:
    async with rig(is_shared=is_shared) as r:
        r.ask(caller="one")
        r.ask(caller="two")
    assert len(r.backend.calls) == calls


@virtual
async def test_the_first_callers_deadline_is_not_that_of_the_reply() -> None:
    async with rig() as r:
        await r.ask(deadline=1.0)
        assert r.backend.calls[0].deadline == 3600.0


@virtual
async def test_a_failure_reaches_everyone_after_the_same_prefix_each_their_own() -> None:
    async with rig() as r:
        r.backend.error = BackendError("x", metadata={"backend": "x"})
        sinks = [Sink(), Sink()]
        failures = []
        for answer in await asyncio.gather(*(r.ask(sink=sink) for sink in sinks), return_exceptions=True):
            assert isinstance(answer, BackendError)
            failures.append(answer)
    assert [sink.text for sink in sinks] == [WHOLE, WHOLE]
    failures[0].metadata["mine"] = "1"
    assert failures[1].metadata == {"backend": "x"}


@virtual
async def test_a_fault_of_ours_is_told_and_ends_no_one_else() -> None:
    async with rig() as r:
        r.backend.error = ZeroDivisionError("x")
        (answer,) = await asyncio.gather(r.ask(), return_exceptions=True)
        assert isinstance(answer, Internal)


@pytest.mark.parametrize("when", [0.0, 2.5])
@virtual
async def test_whoever_follows_when_the_orchestrator_stops_is_told(when: float) -> None:
    async with rig() as r:
        task = r.ask()
        await asyncio.sleep(when)
        while not r.tasks:
            await asyncio.sleep(0)
        r.tasks[0].cancel()
        (answer,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(answer, Draining)


@virtual
async def test_one_slow_client_does_not_hold_up_a_quick_one_and_alone_slows_the_backend() -> None:
    async with rig() as r:
        r.backend.words = 300
        slow = r.ask(sink=Sink(delay=10.0))
        await asyncio.sleep(1000)
        assert r.backend.said <= 100 + coalesce.WINDOW + 2
        quick = await r.ask()
        assert quick.text.endswith("299 ")
        assert now() < 2000.0
        slow.cancel()


@virtual
async def test_a_long_reply_is_not_joined_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalesce, "LONGEST_LOG", 30)
    async with rig() as r:
        first = r.ask()
        await asyncio.sleep(4.5)
        second = r.ask()
        assert (await first).text == (await second).text == WHOLE
    assert len(r.backend.calls) == 2


@virtual
async def test_embeddings_and_counts_pass() -> None:
    seen: list[Request] = []

    async def inner(call: Call[Request], send: Send) -> None:
        seen.append(call.request)

    layer = Coalesce(inner, spawn=lambda work, name: pytest.fail("no task"), longest=timedelta(hours=1))
    await serve(layer, pb.EmbedRequest(model="m", texts=["a"], routing={"cache": pb.CACHE_POLICY_USE}))
    await serve(layer, pb.CountTokensRequest(model="m"))
    assert len(seen) == 2
