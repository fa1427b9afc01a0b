"""Promises of the embedding batcher: which texts go together, and whose turn it is."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from forebay.mlx_service.worker.embedding.batcher import WASTE, Batcher, padded


def text(length: int, mark: int = 0) -> bytes:
    return array("i", [mark, *range(1, length)]).tobytes()


def drained(batcher: Batcher[str]) -> list[list[bytes]]:
    batches = []
    while batch := batcher.take():
        batches.append([entry.tokens for entry in batch])
    return batches


@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(0, 2)), max_size=12
    ),
    budget=st.integers(64, 2000),
)
def test_every_text_is_taken_once_within_the_budget_and_with_little_padding(requests, budget):
    batcher: Batcher[str] = Batcher(budget)
    wanted = set()
    for number, (lengths, urgency) in enumerate(requests):
        texts = list(dict.fromkeys(text(length, number % 3) for length in lengths))
        wanted |= set(texts)
        batcher.add(f"r{number}", texts, urgency=urgency)
    assert len(batcher) == len(wanted)
    batches = drained(batcher)
    taken = [tokens for batch in batches for tokens in batch]
    assert len(taken) == len(set(taken))
    assert set(taken) == wanted
    for batch in batches:
        lengths = [len(tokens) // 4 for tokens in batch]
        assert lengths == sorted(lengths)
        if len(batch) > 1:
            assert len(batch) * padded(lengths[-1]) <= budget
            assert sum(lengths) >= (1 - WASTE) * len(batch) * lengths[-1]
    assert not batcher.take()
    assert len(batcher) == 0


def test_texts_of_many_callers_share_a_batch():
    batcher: Batcher[str] = Batcher(512)
    for caller in range(50):
        batcher.add(f"c{caller}", [text(8, caller)], urgency=1)
    (batch,) = drained(batcher)
    assert len(batch) == 50


def test_equal_texts_are_taken_once_for_all_who_wait():
    batcher: Batcher[str] = Batcher(512)
    batcher.add("a", [text(8), text(9)], urgency=1)
    batcher.add("b", [text(8)], urgency=1)
    batch = batcher.take()
    assert [(entry.length, entry.waiters) for entry in batch] == [(8, {"a", "b"}), (9, {"a"})]


def test_one_text_does_not_wait_behind_ten_thousand():
    batcher: Batcher[str] = Batcher(64)
    batcher.add("many", [text(8, i) for i in range(10_000)], urgency=1)
    batcher.take()
    batcher.add("one", [text(60)], urgency=1)
    batches = [batcher.take() for _ in range(2)]
    assert any("one" in entry.waiters for batch in batches for entry in batch)


def test_the_more_urgent_go_first_and_of_equals_the_earlier():
    batcher: Batcher[str] = Batcher(64)
    for name, length, urgency in (("later", 60, 2), ("first", 20, 1), ("second", 40, 1), ("now", 5, 0)):
        batcher.add(name, [text(length)], urgency=urgency)
    assert [[w for e in batcher.take() for w in e.waiters] for _ in range(4)] == [
        ["now"],
        ["first"],
        ["second"],
        ["later"],
    ]


def test_a_text_that_somebody_urgent_wants_too_is_urgent():
    batcher: Batcher[str] = Batcher(64)
    batcher.add("patient", [text(20), text(60)], urgency=2)
    batcher.add("urgent", [text(60)], urgency=0)
    assert [entry.length for entry in batcher.take()] == [60]


def test_what_nobody_waits_for_is_forgotten_and_the_rest_is_not():
    batcher: Batcher[str] = Batcher(64)
    batcher.add("a", [text(8), text(20)], urgency=1)
    batcher.add("b", [text(8)], urgency=1)
    batcher.remove("a", [text(8), text(20), text(30)])
    assert repr(batcher) == "<Batcher 1 texts, budget 64>"
    assert [entry.waiters for entry in batcher.take()] == [{"b"}]
    assert not batcher.take()


def test_a_text_over_the_budget_goes_alone():
    batcher: Batcher[str] = Batcher(64)
    batcher.add("a", [text(100), text(100, 1)], urgency=1)
    assert [len(batch) for batch in drained(batcher)] == [1, 1]
