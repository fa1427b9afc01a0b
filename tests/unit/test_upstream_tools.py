"""Tool calls come out in order and whole, however a server sends them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BrokenStream
from forebay.testing import grammar
from forebay.upstream.tools import ToolCalls


def calls(parts: list[pb.ToolCallDelta]) -> list[pb.ToolCall]:
    events = [pb.GenerateResponse(started=pb.Started())]
    events += [pb.GenerateResponse(delta=pb.Delta(tool_call=part)) for part in parts]
    grammar.check(events, complete=False, numbered=False)
    return grammar.tool_calls(events)


def short(found: list[pb.ToolCall]) -> list[tuple[str, str, str]]:
    return [(call.id, call.name, call.arguments_json) for call in found]


def test_pieces_with_the_name_repeated_are_one_call() -> None:
    tools = ToolCalls(backend="b")
    parts = tools.feed(0, call_id="x", name="f", arguments="")
    for piece in ('{"a"', ":", '"' + "y" * 600_000 + '"', "}"):
        parts += tools.feed(0, call_id="x", name="f", arguments=piece)
    parts += tools.finish()
    ((identifier, name, arguments),) = short(calls(parts))
    assert (identifier, name, len(json.loads(arguments)["a"])) == ("x", "f", 600_000)
    assert len(tools) == 1


@given(st.data())
def test_interleaved_calls_come_out_one_after_the_other(data: st.DataObject) -> None:
    wanted = [{"n": n, "text": "x" * n} for n in range(data.draw(st.integers(1, 4)))]
    rest = {n: json.dumps(arguments) for n, arguments in enumerate(wanted)}
    tools = ToolCalls(backend="b")
    parts: list[pb.ToolCallDelta] = []
    for n in rest:  # they begin in order; after that everything goes
        parts += tools.feed(n + 5, call_id=f"c{n}", name=f"f{n}")
    while left := [n for n, text in rest.items() if text]:
        n = data.draw(st.sampled_from(left))
        size = data.draw(st.integers(1, len(rest[n])))
        parts += tools.feed(n + 5, arguments=rest[n][:size])
        rest[n] = rest[n][size:]
    parts += tools.finish()
    assert [(c.id, c.name, json.loads(c.arguments_json)) for c in calls(parts)] == [
        (f"c{n}", f"f{n}", arguments) for n, arguments in enumerate(wanted)
    ]


def test_a_name_that_comes_late_is_waited_for() -> None:
    tools = ToolCalls(backend="b")
    assert tools.feed(0, arguments='{"a":') == []
    parts = tools.feed(0, name="f", arguments="1}") + tools.finish()
    (call,) = calls(parts)
    assert call.id.startswith("call_")
    assert (call.name, call.arguments_json) == ("f", '{"a":1}')


def test_a_call_that_never_gets_a_name_breaks_the_stream() -> None:
    tools = ToolCalls(backend="b")
    tools.feed(0, arguments="{}")
    with pytest.raises(BrokenStream, match="without a name"):
        tools.finish()


def test_one_index_for_all_calls_is_told_apart_by_identifiers() -> None:
    tools = ToolCalls(backend="b")
    parts = tools.feed(0, call_id="x", name="f", arguments="{}")
    parts += tools.feed(0, call_id="y", name="f", arguments='{"a":1}')
    assert short(calls(parts + tools.finish())) == [("x", "f", "{}"), ("y", "f", '{"a":1}')]


def test_pieces_without_an_index_continue_the_call_or_begin_one() -> None:
    tools = ToolCalls(backend="b")
    parts = tools.feed(None, call_id="x", name="f", arguments='{"a":')
    parts += tools.feed(None, arguments="1")
    parts += tools.feed(None, name="f", arguments="}")
    parts += tools.feed(None, name="f", arguments="{}")
    parts += tools.feed(None, call_id="z", name="g")
    found = calls(parts + tools.finish())
    assert [(c.name, c.arguments_json) for c in found] == [("f", '{"a":1}'), ("f", "{}"), ("g", "{}")]
    assert len({c.id for c in found}) == 3


def test_whole_calls_keep_their_order_and_get_identifiers() -> None:
    tools = ToolCalls(backend="b")
    parts = tools.whole(name="f", arguments="") + tools.whole(
        name="f", arguments='{"z":1,"a":2}', call_id="k"
    )
    found = calls(parts + tools.finish())
    assert [(c.name, c.arguments_json) for c in found] == [("f", "{}"), ("f", '{"z":1,"a":2}')]
    assert found[1].id == "k"


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"', "{} {}", "nothing"])
def test_arguments_that_are_no_object_break_the_stream_unless_a_limit_cut_them(arguments: str) -> None:
    tools = ToolCalls(backend="b")
    parts = tools.feed(0, name="f", arguments=arguments)
    with pytest.raises(BrokenStream, match="no JSON object"):
        tools.finish()
    assert tools.finish(cut=True) == []
    assert calls(parts)[0].arguments_json == arguments
    tools.feed(1, name="g")
    with pytest.raises(BrokenStream):
        tools.finish(cut=True)  # only the last one can have been cut
