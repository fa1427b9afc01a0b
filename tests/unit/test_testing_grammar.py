"""The grammar finds every way in which a stream can be no reply."""

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import clock, grammar
from forebay.testing.calls import Sink

P = pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED))
S = pb.GenerateResponse(started=pb.Started(backend="b", model="m"))
D = pb.GenerateResponse(delta=pb.Delta(text="x"))
R = pb.GenerateResponse(delta=pb.Delta(reasoning="hm"))
C = pb.GenerateResponse(continued=pb.Continued(backend="c"))
F = pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))


def tool(index: int, arguments: str = "", *, id: str = "", name: str = "") -> pb.GenerateResponse:  # noqa: A002
    part = pb.ToolCallDelta(index=index, id=id, name=name, arguments_json=arguments)
    return pb.GenerateResponse(delta=pb.Delta(tool_call=part))


def numbered(*events: pb.GenerateResponse) -> list[pb.GenerateResponse]:
    copies = []
    for sequence, event in enumerate(events):
        copy = pb.GenerateResponse()
        copy.CopyFrom(event)
        copy.sequence = sequence
        copies.append(copy)
    return copies


@pytest.mark.parametrize(
    "events",
    [
        [S, F],
        [S, D, F],
        [P, P, S, P, R, D, C, D, P, F],
        [S, tool(0, id="1", name="f"), tool(0, "{"), tool(0, "}"), tool(1, id="2", name="f"), F],
    ],
)
def test_replies_are_replies(events: list[pb.GenerateResponse]) -> None:
    grammar.check(numbered(*events))
    grammar.check(events, numbered=False)


@pytest.mark.parametrize("length", range(6))
def test_every_prefix_of_a_reply_is_one(length: int) -> None:
    grammar.check(numbered(P, S, D, C, D, F)[:length], complete=False)


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([], "event 0: the end, and no finished"),
        ([S, D], "event 2: the end, and no finished"),
        ([D], "event 0: delta before started"),
        ([F], "event 0: finished before started"),
        ([C], "event 0: continued before started"),
        ([S, S], "event 1: a second started"),
        ([S, F, F], "event 2: finished after finished"),
        ([S, F, P], "event 2: progress after finished"),
        ([S, pb.GenerateResponse()], "event 1: an empty event"),
        ([pb.EmbedResponse()], "event 0: a EmbedResponse, which is no event of a reply"),
        ([pb.GenerateResponse(progress=pb.Progress(fraction=1.5))], "event 0: progress with fraction 1.5"),
        ([S, tool(0, "{}")], "event 1: a first part of tool call 0 without id or name"),
        ([S, tool(0, id="1")], "event 1: a first part of tool call 0 without id or name"),
        ([S, tool(1, id="1", name="f")], "event 1: a part of tool call 1 while at tool call -1"),
        ([S, tool(-1)], "event 1: a part of tool call -1 while at tool call -1"),
        (
            [S, tool(0, id="1", name="f"), tool(0, "{}", name="f")],
            "event 2: a later part of tool call 0 with id or name",
        ),
        (
            [S, tool(0, id="1", name="f"), tool(1, id="2", name="f"), tool(0, "{}")],
            "event 3: a part of tool call 0 while at tool call 1",
        ),
    ],
)
def test_what_is_no_reply_is_found_with_its_position(events: list[pb.GenerateResponse], error: str) -> None:
    with pytest.raises(grammar.GrammarError) as raised:
        grammar.check(events, numbered=False)
    assert str(raised.value) == error


@pytest.mark.parametrize("broken", ["lost", "repeated", "swapped"])
def test_events_that_are_lost_repeated_or_reordered_are_found(broken: str) -> None:
    events = numbered(S, D, D, D, F)
    changed = {
        "lost": [*events[:2], *events[3:]],
        "repeated": [*events[:3], *events[2:]],
        "swapped": [*events[:2], events[3], events[2], events[4]],
    }[broken]
    with pytest.raises(grammar.GrammarError, match="with sequence"):
        grammar.check(changed)


def test_a_grammar_stands_in_front_of_a_send() -> None:
    sink = Sink()
    checked = grammar.Grammar(sink)

    async def body() -> None:
        for event in numbered(S, D):
            await checked(event)
        with pytest.raises(grammar.GrammarError):
            await checked(S)

    clock.run(body())
    assert sink.kinds == ["started", "delta"]
    assert checked.started
    assert not checked.finished


def test_a_grammar_alone_only_checks() -> None:
    checked = grammar.Grammar()

    async def body() -> None:
        for event in numbered(S, F):
            await checked(event)

    clock.run(body())
    checked.end()


def test_text_reasoning_and_tool_calls_are_put_together() -> None:
    events = [
        P,
        S,
        R,
        R,
        D,
        D,
        tool(0, id="1", name="f"),
        tool(0, '{"a"'),
        tool(0, ": 1}"),
        tool(1, "{}", id="2", name="g"),
        F,
        pb.EmbedResponse(),
    ]
    assert grammar.text(events) == "xx"
    assert grammar.reasoning(events) == "hmhm"
    assert grammar.tool_calls(events) == [
        pb.ToolCall(id="1", name="f", arguments_json='{"a": 1}'),
        pb.ToolCall(id="2", name="g", arguments_json="{}"),
    ]
