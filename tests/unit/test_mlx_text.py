"""From tokens to text: whole characters, stop sequences, reasoning and tool calls."""

from __future__ import annotations

import json

import pytest

from forebay.mlx_service.worker.text import Kind, Markers, Segment, Spelling, Splitter, spelling

MARKERS = Markers("<think>", "</think>", "<tool>", "</tool>")


class Words:
    """A tokenizer that decodes tokens with a space between them, but none before the first."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(self.texts[token] for token in token_ids)


def spell(pieces: list[str], decoder: object, **more: object) -> Spelling:
    return spelling(
        pieces,
        decoder=json.dumps(decoder),
        added=more.get("added", {}),  # type: ignore[arg-type]
        silent=more.get("silent", ()),  # type: ignore[arg-type]
        vocabulary=Words(*pieces),
    )


def feed(splitter: Splitter, *chunks: str) -> list[Segment]:
    return [segment for chunk in chunks for segment in splitter.feed(chunk)]


def joined(segments: list[Segment], kind: Kind) -> str:
    return "".join(segment.text for segment in segments if segment.kind is kind)


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    stream = spell(["Ã", "©", "x"], {"type": "ByteLevel"}).stream()
    assert [stream.add(0), stream.add(1), stream.add(2), stream.end()] == ["", "é", "x", ""]


def test_bytes_that_are_no_character_become_replacement_characters() -> None:
    stream = spell(["Ã", "x"], {"type": "ByteLevel"}).stream()
    assert stream.add(0) + stream.add(1) + stream.add(0) + stream.end() == "\ufffdx\ufffd"


def test_added_tokens_are_spelled_as_they_are_and_silent_ones_not_at_all() -> None:
    spelled = spell(
        ["a", "<b c>", "<eos>"], {"type": "ByteLevel"}, added={1: "<b c>", 2: "<eos>"}, silent=[2]
    )
    stream = spelled.stream()
    assert [stream.add(token) for token in (0, 1, 2, 99)] == ["a", "<b c>", "", ""]
    assert [spelled.bytes_of(token) for token in (0, 1, 99)] == [b"a", b"<b c>", b""]


def test_a_continued_reply_keeps_the_space_it_begins_with() -> None:
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    spelled = spell(["▁Hi", "<0xC3>", "<0xA9>"], decoder)
    first, later = spelled.stream(), spelled.stream(at_start=False)
    assert [first.add(0), first.add(0)] == ["Hi", " Hi"]
    assert later.add(0) == " Hi"
    assert first.add(1) + first.add(2) == "é"


def test_a_byte_level_vocabulary_never_loses_a_leading_space() -> None:
    assert spell(["ĠHi"], {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}).stream().add(0) == " Hi"


@pytest.mark.parametrize(("scheme", "text"), [("always", "Hi"), ("never", " Hi")])
def test_metaspace_strips_the_first_space_if_it_added_one(scheme: str, text: str) -> None:
    assert spell(["▁Hi"], {"type": "Metaspace", "prepend_scheme": scheme}).stream().add(0) == text


def test_other_tokenizers_are_decoded_in_context() -> None:
    spelled = spell(["one", "two", "\ufffd", "x"], None)
    stream = spelled.stream()
    assert [stream.add(0), stream.add(1)] == ["one", " two"]
    assert stream.add(2) == ""
    assert stream.add(3) == " \ufffd x"
    assert stream.add(2) + stream.end() == " \ufffd"
    assert spelled.bytes_of(1) == b"two"


@pytest.mark.parametrize("chunks", [["abSTOPcd"], ["ab", "ST", "OP", "cd"], list("abSTOPcd")])
def test_a_stop_sequence_is_found_however_it_is_cut(chunks: list[str]) -> None:
    splitter = Splitter(MARKERS, ["STOP"])
    assert joined(feed(splitter, *chunks), Kind.ANSWER) == "ab"
    assert splitter.stopped == "STOP"
    assert splitter.end() == []


def test_what_looked_like_a_stop_sequence_is_sent_when_it_is_none() -> None:
    splitter = Splitter(MARKERS, ["STOP"])
    assert joined(feed(splitter, "aSTO"), Kind.ANSWER) == "a"
    assert joined(feed(splitter, "ne"), Kind.ANSWER) == "STOne"


def test_what_is_held_back_at_the_end_is_not_lost() -> None:
    splitter = Splitter(MARKERS, ["STOP"])
    assert joined(feed(splitter, "a <"), Kind.ANSWER) == "a "
    assert splitter.end() == [Segment(Kind.ANSWER, "<")]


def test_of_two_stop_sequences_the_first_wins_and_then_the_longer() -> None:
    early, longer = Splitter(MARKERS, ["b", "abc"]), Splitter(MARKERS, ["ab", "abc"])
    feed(early, "xabc")
    feed(longer, "xabc")
    assert (early.stopped, longer.stopped) == ("abc", "abc")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_reasoning_is_told_from_the_answer_however_tags_are_cut(size: int) -> None:
    text = "a<think>b STOP</think>c"
    splitter = Splitter(MARKERS, ["STOP"])
    segments = feed(splitter, *(text[i : i + size] for i in range(0, len(text), size))) + splitter.end()
    assert joined(segments, Kind.ANSWER) == "ac"
    assert joined(segments, Kind.REASONING) == "b STOP"


def test_a_reply_can_begin_inside_reasoning() -> None:
    splitter = Splitter(MARKERS, begins_in=Kind.REASONING)
    segments = feed(splitter, "hm</think>yes")
    assert segments == [Segment(Kind.REASONING, "hm"), Segment(Kind.ANSWER, "yes")]
    assert splitter.kind is Kind.ANSWER


def test_a_tool_call_comes_whole() -> None:
    splitter = Splitter(MARKERS)
    assert feed(splitter, "x<tool>{", '"a"') == [Segment(Kind.ANSWER, "x")]
    assert feed(splitter, "}</tool>y") == [Segment(Kind.TOOL, '{"a"}'), Segment(Kind.ANSWER, "y")]


def test_a_tool_call_without_end_mark_goes_on_to_the_end() -> None:
    splitter = Splitter(Markers(tool_start="[CALLS]"))
    assert feed(splitter, "[CALLS]f()") == []
    assert splitter.end() == [Segment(Kind.TOOL, "f()")]
