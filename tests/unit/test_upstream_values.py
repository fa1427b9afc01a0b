"""Foreign JSON is read without surprises."""

import math

import pytest

from forebay.upstream import values


def test_what_python_servers_write_is_read() -> None:
    value = values.obj(values.parse('{"a": NaN, "b": [-Infinity, "\\ud83d"], "c\\udc00": 1}'))
    assert isinstance(value["a"], float)
    assert math.isnan(value["a"])
    assert value["b"] == [-math.inf, "\N{REPLACEMENT CHARACTER}"]
    assert value["c\N{REPLACEMENT CHARACTER}"] == 1


def test_pairs_of_surrogates_are_one_character() -> None:
    assert values.parse(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert values.parse(b'["\\ud83d\\ude00", NaN]') != values.parse(b'["x"]')


@pytest.mark.parametrize("text", [b"", b"{", b"<html>", b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # its text is the parser's
        values.parse(text)


def test_readers_return_the_default_for_every_other_kind() -> None:
    odd: values.JsonObject = {
        "s": "x",
        "i": 3,
        "f": 2.9,
        "b": True,
        "n": None,
        "inf": math.inf,
        "l": [1],
        "o": {"k": 1},
    }
    assert [values.text(odd, key) for key in odd] == ["x", "", "", "", "", "", "", ""]
    assert [values.integer(odd, key, -1) for key in odd] == [-1, 3, 2, -1, -1, -1, -1, -1]
    assert [values.number(odd, key, -1.0) for key in odd] == [-1, 3, 2.9, -1, -1, -1, -1, -1]
    assert [values.flag(odd, key) for key in odd] == [False, False, False, True, False, False, False, False]
    assert [values.obj(v) for v in odd.values()][-1] == {"k": 1}
    assert [values.array(v) for v in odd.values()] == [[], [], [], [], [], [], [1], []]
    assert values.integer(odd, "absent", 5) == 5
    assert values.dump({"b": 1, "a": [None]}) == b'{"b":1,"a":[null]}'
