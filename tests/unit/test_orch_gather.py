"""What `Gather` promises: calls that wait go together, and each gets exactly what it would have got alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendError, BrokenStream, Draining, Failure, Internal, InvalidRequest
from forebay.kit.pipeline import Call, Event, Request, Send
from forebay.orchestrator.layers.gather import Gather
from forebay.testing.calls import Sink, ask, serve
from forebay.testing.clock import now, virtual


def texts(*values: str, **fields: object) -> pb.EmbedRequest:
    return pb.EmbedRequest(model="m", texts=values, **fields)  # type: ignore[arg-type]  # its fields


class Backend:
    """Embeds a text as its length, a second a call."""

    def __init__(self) -> None:
        self.calls: list[Call[Request]] = []
        self.cancelled = 0
        self.error: Exception | None = None
        self.counts_tokens = True
        self.bad = "bad"
        self.lost = 0

    async def __call__(self, call: Call[Request], send: Send) -> None:
        self.calls.append(call)
        try:
            await asyncio.sleep(1.0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        request = call.request
        if not isinstance(request, pb.EmbedRequest):
            await send(pb.CountTokensResponse(token_count=1))
            return
        answer = pb.EmbedResponse(backend="x", model="m", dimension_count=1, normalized=True)
        for index, text in enumerate(request.texts):
            if text == self.bad:
                if not request.allow_partial:
                    raise InvalidRequest("texts: too long", violations=[("texts", "too long")])
                answer.embeddings.add()
                answer.failures.add(index=index, reason="CONTEXT_EXCEEDED", message="too long")
                continue
            count = len(text) if self.counts_tokens else 0
            answer.embeddings.add(values=[float(len(text))], token_count=count)
        answer.usage.prompt_token_count = sum(map(len, request.texts))
        for _ in range(self.lost):
            answer.embeddings.pop()
        await send(answer)

    def asked(self) -> list[list[str]]:
        return [list(call.request.texts) for call in self.calls if isinstance(call.request, pb.EmbedRequest)]


class Rig:
    def __init__(self, group: asyncio.TaskGroup, **settings: object) -> None:
        self.backend = Backend()
        self.tasks: list[asyncio.Task[None]] = []
        self.sent: list[asyncio.Task[Sink]] = []
        self.gathered: list[int] = []
        self._group = group
        arguments = {"window": timedelta(milliseconds=3), "max_texts": 8} | settings
        self.layer = Gather(
            self.backend,
            spawn=self._spawn,
            on_gathered=self.gathered.append,
            **arguments,  # type: ignore[arg-type]  # its settings
        )

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        self.tasks.append(self._group.create_task(work, name=name))
        return self.tasks[-1]

    def send(self, request: Request, caller: str = "", deadline: float | None = None) -> asyncio.Task[Sink]:
        task = asyncio.ensure_future(self._one(request, caller, deadline))
        self.sent.append(task)  # not the group's: what fails is looked at by the test
        return task

    async def _one(self, request: Request, caller: str, deadline: float | None) -> Sink:
        sink = Sink()
        await self.layer(Call(request=request, caller=caller, deadline=deadline), sink)
        return sink


@asynccontextmanager
async def rig(**settings: object) -> AsyncIterator[Rig]:
    async with asyncio.TaskGroup() as group:
        yield Rig(group, **settings)


def answer(task: asyncio.Task[Sink]) -> pb.EmbedResponse:
    (event,) = task.result().events
    assert isinstance(event, pb.EmbedResponse)
    return event


def values(task: asyncio.Task[Sink]) -> list[list[float]]:
    return [list(embedding.values) for embedding in answer(task).embeddings]


async def failure_of(task: asyncio.Task[Sink]) -> Failure:
    with pytest.raises(Failure) as raised:
        await task
    return raised.value


@virtual
async def test_a_call_that_comes_alone_does_not_wait() -> None:
    async with rig() as found:
        await found.send(texts("a"))
        assert now() == 1.0
    assert found.gathered == []
    assert repr(found.layer) == "<Gather 0 lanes>"


@virtual
async def test_calls_that_come_while_others_are_served_go_together() -> None:
    async with rig() as found:
        sent = [found.send(texts("a"), "ann")]
        await asyncio.sleep(0.1)
        sent += [found.send(texts("bb", "ccc"), "ann"), found.send(texts("dddd"), "bob")]
        await asyncio.wait(sent)
        assert now() == pytest.approx(1.103)
    assert found.backend.asked() == [["a"], ["bb", "ccc", "dddd"]]
    assert [values(task) for task in sent] == [[[1.0]], [[2.0], [3.0]], [[4.0]]]
    assert found.gathered == [2]
    assert found.backend.calls[1].caller == ""  # neither of them answers for the other


@virtual
async def test_each_part_is_an_answer_as_if_it_had_been_asked_for_alone() -> None:
    async with rig() as found:
        sent = [found.send(texts(text)) for text in ("first", "second", "a third one")]
        await asyncio.wait(sent)
        alone = await found.send(texts("second"))
    assert found.backend.asked()[1] == ["second", "a third one"]
    (expected,) = alone.events
    assert answer(sent[1]) == expected


@virtual
async def test_tokens_of_a_part_are_counted_or_not_told_at_all() -> None:
    async with rig() as found:
        found.backend.counts_tokens = False
        sent = [found.send(texts(text)) for text in ("a", "bb", "ccc")]
        await asyncio.wait(sent)
        assert answer(sent[0]).usage.prompt_token_count == 1
        assert [answer(task).HasField("usage") for task in sent[1:]] == [False, False]


@virtual
async def test_only_calls_that_differ_in_nothing_else_go_together() -> None:
    urgent = texts("d", routing=pb.RoutingHints(priority=pb.PRIORITY_INTERACTIVE))
    async with rig() as found:
        first = found.send(texts("a"))
        await asyncio.sleep(0.1)
        others = [
            found.send(texts("b", dimension_count=3)),
            found.send(pb.EmbedRequest(model="n", texts=["c"])),
            found.send(urgent),
        ]
        await asyncio.wait([first, *others])
        assert now() == pytest.approx(1.1)
    assert len(found.backend.calls) == 4


@virtual
async def test_a_full_group_begins_another() -> None:
    async with rig(max_texts=4) as found:
        sent = [found.send(texts("a"))]
        await asyncio.sleep(0.1)
        sent += [found.send(texts(text, text)) for text in ("b", "c", "d")]
        sent.append(found.send(texts(*"efgh")))
        await asyncio.wait(sent)
    assert sorted(found.backend.asked()) == [["a"], ["b", "b", "c", "c"], ["d", "d"], ["e", "f", "g", "h"]]


@virtual
async def test_other_calls_pass() -> None:
    async with rig() as found:
        found.send(texts("a"))
        await found.send(pb.CountTokensRequest(model="m"))
        await serve(found.layer, pb.CountTokensRequest(model="m"))
    assert len(found.backend.calls) == 3


@virtual
async def test_a_text_that_cannot_be_embedded_costs_only_its_own_caller() -> None:
    async with rig() as found:
        first = found.send(texts("a"))
        await asyncio.sleep(0.1)
        good = found.send(texts("bb"))
        partial = found.send(texts("bad", "ccc", allow_partial=True))
        bad = asyncio.ensure_future(failure_of(found.send(texts("bad"))))
        await asyncio.wait([first, good, partial, bad])
    assert values(good) == [[2.0]]
    assert [(each.index, each.reason) for each in answer(partial).failures] == [(0, "CONTEXT_EXCEEDED")]
    assert isinstance(bad.result(), InvalidRequest)
    assert found.backend.asked()[-1] == ["bad"]  # asked again alone, for the failure of its own


@virtual
async def test_a_fault_of_the_backend_is_told_to_each_with_a_failure_of_their_own() -> None:
    async with rig() as found:
        found.backend.error = BackendError("out of order", metadata={"backend": "x"})
        first = asyncio.ensure_future(failure_of(found.send(texts("a"))))
        await asyncio.sleep(0.1)
        others = [asyncio.ensure_future(failure_of(found.send(texts(text)))) for text in "bc"]
        await asyncio.wait([first, *others])
        one, other = (task.result() for task in others)
        assert isinstance(one, BackendError)
        assert one is not other
        assert one.metadata is not other.metadata
        assert len(found.backend.calls) == 2


@virtual
async def test_what_a_caller_did_wrong_is_found_by_asking_for_each_alone() -> None:
    async with rig() as found:
        found.backend.error = InvalidRequest("no", violations=[("texts", "no")])
        tasks = [asyncio.ensure_future(failure_of(found.send(texts(text)))) for text in "abc"]
        await asyncio.wait(tasks)
    assert found.backend.asked() == [["a"], ["b", "c"], ["b"], ["c"]]


@virtual
async def test_a_fault_of_ours_is_told_and_not_hidden() -> None:
    async with rig() as found:
        first = found.send(texts("a"))
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(failure_of(found.send(texts("b"))))
        await first
        found.backend.error = RuntimeError("a bug")
        await asyncio.wait([second])
        assert isinstance(second.result(), Internal)


@virtual
async def test_embeddings_that_are_missing_are_a_broken_answer_for_all() -> None:
    async with rig() as found:
        first = found.send(texts("a"))
        await asyncio.sleep(0.1)
        found.backend.lost = 1
        tasks = [asyncio.ensure_future(failure_of(found.send(texts(text)))) for text in "bc"]
        await asyncio.wait(tasks)
        assert {type(task.result()) for task in tasks} == {BrokenStream}
        await first


@virtual
async def test_an_answer_that_does_not_come_is_a_broken_one() -> None:
    async def silent(call: Call[Request], send: Send) -> None:
        await asyncio.sleep(1.0)

    async with asyncio.TaskGroup() as group:
        layer = Gather(
            silent,
            spawn=lambda work, name: group.create_task(work, name=name),
            window=timedelta(milliseconds=3),
            max_texts=8,
        )

        async def one() -> None:
            async def nowhere(event: Event) -> None:
                raise AssertionError("nothing was sent")

            await layer(Call(request=texts("a")), nowhere)

        alone = group.create_task(one())
        await asyncio.sleep(0.1)
        with pytest.raises(BrokenStream, match="sent 0 answers"):
            await one()
        await alone


@virtual
async def test_who_leaves_takes_only_their_own_call_along() -> None:
    async with rig() as found:
        first = found.send(texts("a"))
        await asyncio.sleep(0.1)
        leaver, stayer = found.send(texts("b")), found.send(texts("c"))
        await asyncio.sleep(0.0)
        leaver.cancel()
        await asyncio.wait([first, leaver, stayer])
    assert leaver.cancelled()
    assert found.backend.asked() == [["a"], ["c"]]  # what nobody waits for is not asked
    assert values(stayer) == [[1.0]]


@virtual
async def test_when_all_have_left_the_backend_is_told() -> None:
    async with rig() as found:
        first = found.send(texts("a"))
        await asyncio.sleep(0.1)
        both = [found.send(texts("b")), found.send(texts("c"))]
        await asyncio.sleep(0.1)
        for task in both:
            task.cancel()
        await asyncio.wait([first, *both])
    assert found.backend.cancelled == 1
    assert repr(found.layer) == "<Gather 0 lanes>"


@virtual
async def test_the_longest_deadline_counts_for_all() -> None:
    async with rig() as found:
        first = found.send(texts("a"), deadline=9.0)
        await asyncio.sleep(0.1)
        sent = [found.send(texts("b"), deadline=5.0), found.send(texts("c"), deadline=7.0)]
        await asyncio.wait([first, *sent])
        endless = [found.send(texts("d")), found.send(texts("e")), found.send(texts("f"), deadline=9.0)]
        await asyncio.wait(endless)
    assert [call.deadline for call in found.backend.calls] == [9.0, 7.0, None, None]


@pytest.mark.parametrize("delay", [0.0, 0.1])
@virtual
async def test_when_the_orchestrator_stops_everyone_is_told(delay: float) -> None:
    async with rig() as found:
        first = found.send(texts("a"))
        await asyncio.sleep(0.1)
        waiting = asyncio.ensure_future(failure_of(found.send(texts("b"))))
        await asyncio.sleep(delay)
        found.tasks[0].cancel()
        await asyncio.wait([first, waiting])
        assert isinstance(waiting.result(), Draining)


@virtual
async def test_replies_are_not_gathered() -> None:
    seen: list[Request] = []

    async def inner(call: Call[Request], send: Send) -> None:
        seen.append(call.request)

    async with rig() as found:
        layer = Gather(inner, spawn=found._spawn, window=timedelta(milliseconds=3), max_texts=8)
        await layer(Call(request=ask()), Sink())
    assert seen == [ask()]
