"""Lines and events are the same wherever their bytes were cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.kit.failure import BrokenStream
from forebay.upstream.framing import LineSplitter, LineTooLong, SseEvent, SseSplitter


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


def lines(pieces: list[bytes]) -> list[bytes]:
    splitter = LineSplitter()
    return [line for piece in pieces for line in splitter.feed(piece)] + splitter.finish()


def events(pieces: list[bytes], *, comments: bool = False) -> list[SseEvent]:
    splitter = SseSplitter(comments=comments)
    return [event for piece in pieces for event in splitter.feed(piece)] + splitter.finish()


ANY_TEXT = st.text(st.characters(codec="utf-8"))
CUTS = st.lists(st.integers(0, 10_000), max_size=30)


@given(
    st.lists(st.dictionaries(ANY_TEXT, ANY_TEXT), max_size=5),
    CUTS,
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
)
def test_ndjson_survives_every_cut(values: list[dict[str, str]], cuts: list[int], end: bytes) -> None:
    data = b"".join(json.dumps(value, ensure_ascii=False).encode() + end for value in values)
    assert [json.loads(line) for line in lines(cut(data, cuts))] == values


def test_ndjson_survives_single_bytes_a_missing_end_and_a_mark() -> None:
    data = '\ufeff{"a":"\u00e9\U0001f600\u0e01"}\r\n\n  \n{"b":1}'.encode()
    expected = ['{"a":"\u00e9\U0001f600\u0e01"}'.encode(), b'{"b":1}']
    assert lines([data[i : i + 1] for i in range(len(data))]) == expected
    assert lines([data]) == expected
    assert lines([]) == []


def test_a_line_of_megabytes_passes_and_one_over_the_limit_fails() -> None:
    big = b"x" * 2_000_000
    assert lines([big[:700_000], big[700_000:] + b"\n"]) == [big]
    splitter = LineSplitter(limit=10)
    assert splitter.feed(b"123456789\n") == [b"123456789"]
    with pytest.raises(LineTooLong) as raised:
        splitter.feed(b"12345678901")
    assert isinstance(raised.value, BrokenStream)
    assert raised.value.metadata == {"limit_bytes": "10"}


ONE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))


@given(
    st.lists(st.lists(ONE_LINE, min_size=1, max_size=3), max_size=4),
    CUTS,
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_events_survive_every_cut_and_every_end_of_line(
    said: list[list[str]], cuts: list[int], end: str
) -> None:
    text = "".join("".join(f"data: {line}{end}" for line in event) + end for event in said)
    assert [event.data for event in events(cut(text.encode(), cuts))] == ["\n".join(event) for event in said]


@given(CUTS)
def test_fields_comments_and_other_lines_survive_every_cut(cuts: list[int]) -> None:
    data = (
        "\ufeff: hello\r\nevent: delta\nid: 7\ndata:a\ndata\ndata:  b\nretry: 5\n\n"
        ":\n\nerror: {1}\n\nevent: lonely\n\ndata: \u00e9\r\rdata: last"
    ).encode()
    expected = [
        SseEvent(data="a\n\n b", event="delta", id="7"),
        SseEvent(error="{1}"),
        SseEvent(data="\u00e9"),
        SseEvent(data="last"),
    ]
    pieces = cut(data, cuts)
    assert events(pieces) == expected
    with_comments = [
        event.comment for event in events(pieces, comments=True) if not event.data and not event.error
    ]
    assert with_comments == ["hello", ""]


def test_comments_are_counted_and_give_nothing() -> None:
    splitter = SseSplitter()
    assert splitter.feed(b": one\n\n:two\n") == []
    assert splitter.feed(b"") == []
    assert splitter.comments == 2
    assert splitter.finish() == []


def test_an_event_over_the_limit_fails_in_one_line_and_in_many() -> None:
    with pytest.raises(LineTooLong):
        SseSplitter(limit=20).feed(b"data: " + b"x" * 30)
    splitter = SseSplitter(limit=20)
    splitter.feed(b"data: 123456789\n")
    with pytest.raises(LineTooLong):
        splitter.feed(b"data: 123456789\n")
    splitter = SseSplitter(limit=20)
    for _ in range(5):
        assert splitter.feed(b"data: 123456789\n\n") == [SseEvent(data="123456789")]
