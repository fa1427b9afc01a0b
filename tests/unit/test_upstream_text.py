"""Think tags and stop sequences are found wherever a text was cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.upstream.reasoning import ThinkSplitter
from forebay.upstream.stops import StopSplitter


def pieces(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


def split(parts: list[str], *, opened: bool = False) -> tuple[str, str]:
    splitter = ThinkSplitter(opened=opened)
    found = [piece for part in parts for piece in splitter.feed(part)] + splitter.finish()
    assert all(text for _, text in found)
    return tuple("".join(t for k, t in found if k == kind) for kind in ("reasoning", "text"))  # type: ignore[return-value]


CUTS = st.lists(st.integers(0, 1000), max_size=20)

CASES = [
    ("<think>a b</think>c", False, ("a b", "c")),
    ("\n <think>\na\n</think>\n\nc", False, ("a\n", "c")),
    ("plain", False, ("", "plain")),
    ("  plain <think>no</think>", False, ("", "  plain <think>no</think>")),
    ("<think>never closed </thin", False, ("never closed </thin", "")),
    ("<thinkless", False, ("", "<thinkless")),
    ("<thi", False, ("", "<thi")),
    ("<thinking>a</thinking>b", False, ("a", "b")),
    ("[THINK]a[/THINK]b", False, ("a", "b")),
    ("<think></think>b", False, ("", "b")),
    ("<think>a</think>\n<think>b</think>c", False, ("ab", "c")),
    ("<think>a</think>  \n", False, ("a", "")),
    ("a</think>b", True, ("a", "b")),
    ("a", True, ("a", "")),
    (" \n", False, ("", " \n")),
    ("", False, ("", "")),
    ("<think>1 < 2 </ think</think>ok", False, ("1 < 2 </ think", "ok")),
]


@pytest.mark.parametrize(("text", "opened", "expected"), CASES)
@given(cuts=CUTS)
def test_reasoning_is_split_off_whatever_the_cuts(
    text: str, opened: bool, expected: tuple[str, str], cuts: list[int]
) -> None:
    assert split(pieces(text, cuts), opened=opened) == expected
    assert split(list(text), opened=opened) == expected


def stopped(parts: list[str], stops: list[str]) -> tuple[str, str]:
    splitter = StopSplitter(stops)
    text = "".join(splitter.feed(part) for part in parts)
    return text + ("" if splitter.found else splitter.finish()), splitter.found


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), CUTS)
def test_a_text_ends_before_the_stop_sequence_that_is_complete_first(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    got, found = stopped(list(text), stops)
    ends = [(text.index(stop) + len(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert (got, found) == (text, "")
    else:
        assert found in stops
        assert text.startswith(got + found)
        assert not any(stop in got for stop in stops)
    by_pieces, by_found = stopped(pieces(text, cuts), stops)
    assert bool(by_found) == bool(found)
    assert text.startswith(by_pieces + by_found)


def test_nothing_comes_after_a_stop_sequence() -> None:
    splitter = StopSplitter(["end"])
    assert splitter.feed("the e") == "the "
    assert splitter.feed("nd and more") == ""
    assert splitter.feed("more") == ""
    assert splitter.finish() == ""
    assert splitter.found == "end"
    assert StopSplitter([]).feed("all") == "all"
