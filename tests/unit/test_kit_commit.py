"""An attempt that told the client nothing can be taken back; one that did cannot."""

import asyncio

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.commit import CommitGate
from forebay.kit.failure import BackendUnavailable
from forebay.kit.pipeline import Call
from forebay.testing import clock, grammar
from forebay.testing.calls import Sink, ask, with_options
from forebay.testing.scripted import ScriptedEngine

STARTED = pb.GenerateResponse(started=pb.Started(backend="b"))
PROGRESS = pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_LOADING))
DELTA = pb.GenerateResponse(delta=pb.Delta(text="x"))
FINISHED = pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))


def push(*events: pb.GenerateResponse | pb.EmbedResponse) -> tuple[CommitGate, Sink]:
    sink = Sink()
    gate = CommitGate(sink)

    async def body() -> None:
        for event in events:
            await gate(event)

    clock.run(body())
    return gate, sink


def test_progress_passes_and_started_waits() -> None:
    gate, sink = push(PROGRESS, STARTED, PROGRESS)
    assert sink.kinds == ["progress", "progress"]
    assert not gate.committed


def test_the_first_delta_lets_everything_through_in_order() -> None:
    gate, sink = push(PROGRESS, STARTED, PROGRESS, DELTA, DELTA, PROGRESS, FINISHED)
    assert sink.kinds == ["progress", "progress", "started", "delta", "delta", "progress", "finished"]
    assert gate.committed


def test_an_empty_answer_commits_with_finished() -> None:
    gate, sink = push(STARTED, FINISHED)
    assert sink.kinds == ["started", "finished"]
    assert gate.committed


def test_a_unary_answer_commits() -> None:
    gate, sink = push(pb.EmbedResponse(backend="b"))
    assert sink.kinds == ["EmbedResponse"]
    assert gate.committed


def test_commit_is_told_once_and_before_the_client_sees_anything() -> None:
    seen: list[str] = []
    sink = Sink()
    gate = CommitGate(sink, on_commit=lambda: seen.append(f"commit after {len(sink.events)}"))

    async def body() -> None:
        for event in (STARTED, DELTA, DELTA, FINISHED):
            await gate(event)

    clock.run(body())
    assert seen == ["commit after 0"]


def test_a_refused_commit_sends_nothing() -> None:
    def refuse() -> None:
        raise asyncio.CancelledError

    sink = Sink()
    gate = CommitGate(sink, on_commit=refuse)

    async def body() -> None:
        await gate(STARTED)
        with pytest.raises(asyncio.CancelledError):
            await gate(DELTA)

    clock.run(body())
    assert sink.events == []


def test_a_send_that_was_cancelled_counts_as_sent() -> None:
    sink = Sink(delay=10)
    gate = CommitGate(sink)

    async def body() -> None:
        await gate(STARTED)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await gate(DELTA)

    clock.run(body())
    assert gate.committed


def test_a_failed_attempt_leaves_nothing_and_the_next_ones_started_is_the_only_one() -> None:
    engine = ScriptedEngine(numbered=False)

    async def body() -> Sink:
        sink = Sink()
        first = CommitGate(sink)
        with pytest.raises(BackendUnavailable):
            await engine.service(Call(request=with_options(ask(), fault="UNAVAILABLE@0")), first)
        assert not first.committed
        second = CommitGate(sink)
        await engine.service(Call(request=ask()), second)
        assert second.committed
        return sink

    sink = clock.run(body())
    grammar.check(sink.events, numbered=False)
    assert sink.text == engine.expected(ask())


def test_an_attempt_that_fails_after_a_delta_is_committed() -> None:
    engine = ScriptedEngine()

    async def body() -> None:
        sink = Sink()
        gate = CommitGate(sink)
        with pytest.raises(BackendUnavailable):
            await engine.service(Call(request=with_options(ask(), fault="UNAVAILABLE@1")), gate)
        assert gate.committed
        assert sink.kinds == ["started", "delta"]

    clock.run(body())
