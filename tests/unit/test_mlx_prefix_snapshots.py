"""Models whose caches cannot be cut go on from snapshots, and say what a cold run says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny_models
import tiny_stateful
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import prefixes
from forebay.mlx_service import front
from forebay.mlx_service.worker.cache_layout import Layout
from forebay.mlx_service.worker.engine import Engine, Over, Reading, Row, Written
from forebay.mlx_service.worker.prefix_cache import SNAPSHOT_GAP, SNAPSHOT_TOKENS, PrefixCache, Stretch
from forebay.mlx_service.worker.runtime import ArraysCache, CacheList, KVCache, RotatingKVCache, mx
from forebay.mlx_service.worker.sampling import SamplingParams
from mlx_worker_rig import MODEL, ask, rig, until

pytestmark = pytest.mark.mlx

Mark = tuple[int, int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stateful")
    return {family: tiny_stateful.build(folder / family, family) for family in tiny_stateful.CONFIGS}


def text_of(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((i * i + 7 * i + seed * 31) % 250 for i in range(count))


async def finish(
    engine: Engine, tokens: tuple[int, ...], beginnings: tuple[Mark, ...] = (), most: int = 12
) -> tuple[list[int], int]:
    """The reply's tokens, and how many of the prompt were found."""
    row = Row(tokens=tokens, most=most, sampling=SamplingParams(temperature=0), beginnings=beginnings)
    ticket = engine.submit(row)
    reply: list[int] = []
    cached = 0
    while True:
        for happening in await ticket.next():
            if isinstance(happening, Written):
                reply.append(happening.token)
            elif isinstance(happening, Reading):
                cached = happening.cached
            elif isinstance(happening, Over):
                assert happening.failure is None
                return reply, cached


@pytest.mark.parametrize("family", sorted(tiny_stateful.CONFIGS))
async def test_what_goes_on_from_a_snapshot_says_what_a_cold_run_says(
    models: dict[str, Path], family: str
) -> None:
    system = text_of(70)
    first = (*system, *text_of(60, 3))
    async with (
        rig(models[family]) as plain,
        rig(models[family], prefixes=PrefixCache(max_bytes=64 << 20, min_tokens=4)) as made,
    ):
        reply, _ = await finish(made.engine, first, ((1, 70), (2, 126)))
        second = (*first, *reply, *text_of(20, 5))
        other = (*system, *text_of(30, 7))
        asked = [(second, len(first) + len(reply)), (other, 70), (first, 126), (second, len(second) - 3)]
        assert reply == (await finish(plain.engine, first))[0]
        for tokens, known in asked:
            marks = ((1, 70), (3, len(tokens) - 3))
            said, cached = await finish(made.engine, tokens, marks)
            assert said == (await finish(plain.engine, tokens))[0]
            assert cached == known
        assert made.engine.stats().prefix.hit_tokens == sum(known for _, known in asked)


@pytest.mark.parametrize("family", ["gemma3_text", "mamba"])
async def test_rows_that_share_a_batch_share_no_state(models: dict[str, Path], family: str) -> None:
    texts = [(*text_of(70), *text_of(20 + 9 * n, n)) for n in range(4)]
    async with (
        rig(models[family]) as plain,
        rig(models[family], prefixes=PrefixCache(max_bytes=64 << 20, min_tokens=4)) as made,
    ):
        expected = [(await finish(plain.engine, text))[0] for text in texts]
        await finish(made.engine, text_of(90), ((1, 70),))
        together = await asyncio.gather(*(finish(made.engine, text, ((1, 70),)) for text in texts))
    assert [reply for reply, _ in together] == expected
    assert all(cached >= 70 for _, cached in together)


async def test_a_cancelled_reply_leaves_the_snapshots_of_its_prompt(models: dict[str, Path]) -> None:
    prompt = text_of(100)
    async with rig(models["mamba"], prefixes=PrefixCache(max_bytes=64 << 20, min_tokens=4)) as made:
        row = Row(tokens=prompt, most=400, sampling=SamplingParams(temperature=0), beginnings=((5, 60),))
        ticket = made.engine.submit(row)
        async with asyncio.timeout(10):
            while not any(isinstance(happening, Written) for happening in await ticket.next()):
                pass
        ticket.cancel()
        await until(lambda: made.engine.stats().prefix.snapshots == 3)
        _, cached = await finish(made.engine, (*prompt[:60], *text_of(30, 4)))
        assert cached == 60
        assert made.engine.marks == (5,)


async def test_the_service_lists_the_beginnings_it_holds_and_no_others(models: dict[str, Path]) -> None:
    family = models["gemma3_text"]
    async with rig(family, prefixes=PrefixCache(max_bytes=64 << 20, min_tokens=4)) as made:
        request = ask("What is written on the first page of the book that nobody reads?", most=4)
        request.messages.insert(0, pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="Be brief. " * 5)]))
        await made.generate(request)
        chain = prefixes.digests(request, model=MODEL)
        listed = (await made.service.list_models(pb.ListModelsRequest())).models[0].prefix_digests
        assert sorted(listed) == sorted(chain)
        longer = pb.GenerateRequest()
        longer.CopyFrom(request)
        longer.messages.append(pb.Message(role=pb.ROLE_ASSISTANT, parts=[pb.Part(text="Nothing.")]))
        longer.messages.append(pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="And on the second?")]))
        asked = prefixes.digests(longer, model=MODEL)
        assert prefixes.longest(asked, listed) == 2
        reply = await made.generate(longer)
        assert reply.finished.usage.cached_token_count > 0
        listed = (await made.service.list_models(pb.ListModelsRequest())).models[0].prefix_digests
        assert prefixes.longest(asked, listed) == len(asked)
        assert listed[0] == asked[-1], "the newest comes first"


@pytest.mark.parametrize("isolates", [True, False])
async def test_digests_of_callers_who_are_kept_apart_are_their_own(tmp_path: Path, isolates: bool) -> None:
    model = tiny_models.build_random(tmp_path / "m")
    cache = PrefixCache(max_bytes=64 << 20, min_tokens=4)
    async with rig(model, prefixes=cache, isolates_callers=isolates) as made:
        request = ask("a text that is long enough to be found again by the next one", most=2)
        await made.generate(request, caller="ann")
        await until(lambda: made.engine.marks)
        listed = (await made.service.list_models(pb.ListModelsRequest())).models[0].prefix_digests
    anns = prefixes.digests(request, model=MODEL, caller="ann")
    assert (list(listed) == anns) is isolates
    assert (list(listed) == prefixes.digests(request, model=MODEL)) is not isolates


def test_the_front_passes_on_what_its_worker_lists() -> None:
    assert list(front._facts(pb.Model(prefix_digests=[3, 1])).prefix_digests) == [3, 1]


# The tree itself, on caches whose every entry tells its token.

ROOM = 1 << 30


def stateful(tokens: tuple[int, ...], *, size: int = 8) -> list[object]:
    """Caches of a layer that can be cut, and of one that holds a sum over all its tokens."""
    run = KVCache()
    told = mx.broadcast_to(mx.array(tokens, mx.float32)[None, None, :, None], (1, 1, len(tokens), size))
    run.update_and_fetch(told, told)
    state = ArraysCache(1)
    state[0] = mx.full((1, 1024), float(sum(tokens)))
    return [CacheList(state, run)]


def told(found: list[KVCache] | None) -> tuple[list[int], int]:
    assert found is not None
    state, run = found[0].caches
    return [int(token) for token in run.keys[0, 0, :, 0].tolist()], int(state[0][0, 0].item())


def put(cache: PrefixCache, tokens: tuple[int, ...], *marks: Mark, key: str = "k", pin: int = 0) -> None:
    cache.store(key, tokens, stateful(tokens), marks=marks, pin=pin)


def test_a_snapshot_is_good_at_its_end_and_nowhere_else() -> None:
    cache = PrefixCache(max_bytes=ROOM, min_tokens=4)
    text = text_of(40)
    put(cache, text[:20])
    put(cache, text)
    assert cache.find("k", text[:19]) == (None, 0)
    for asked, known in ((20, 0), (21, 20), (40, 20), (41, 40)):
        found, count = cache.find("k", (*text, 1)[:asked])
        assert count == known
        if known:
            assert told(found) == (list(text[:known]), sum(text[:known]))
    assert cache.find("k", (*text[:30], 251, 252))[1] == 20
    assert cache.find("other", (*text, 1)) == (None, 0)


def test_a_text_that_parts_within_a_run_keeps_both_ends() -> None:
    cache = PrefixCache(max_bytes=ROOM, min_tokens=4)
    one, other = text_of(40), (*text_of(30), *text_of(10, 9))
    put(cache, one)
    put(cache, other)
    put(cache, one[:30])
    for text in (one, other):
        found, count = cache.find("k", (*text, 1))
        assert count == 40
        assert told(found) == (list(text), sum(text))
    assert cache.find("k", (*one[:30], 251))[1] == 30
    assert (cache.stats.nodes, cache.stats.snapshots) == (3, 3)


def test_caches_of_another_length_than_their_text_are_left_out() -> None:
    cache = PrefixCache(max_bytes=ROOM, min_tokens=4)
    text = text_of(40)
    cache.store("k", text, stateful(text[:39]))
    hollow = stateful(text)
    hollow[0].caches[0][0] = None  # type: ignore[attr-defined]  # a list of caches
    cache.store("k", text, hollow)
    cache.store("k", text[:3], stateful(text[:3]))
    assert cache.stats.nodes == 0


def test_the_snapshot_that_nobody_went_on_from_leaves_first_and_its_mark_with_it() -> None:
    text = text_of(60)
    one = 4096  # bytes of a snapshot
    run = 2 * 8 * 4  # bytes of a token
    cache = PrefixCache(max_bytes=60 * run + 3 * one, min_tokens=4)
    spilled: list[Stretch] = []
    cache.spill = spilled.append
    for end in (20, 40, 60):
        put(cache, text[:end], (end, end))
    assert cache.marks == (60, 40, 20)
    cache.find("k", text[:21])
    cache.find("k", (*text, 1))
    cache.shrink(60 * run + 2 * one)
    assert cache.marks == (60, 20)
    assert [(stretch.begin, len(stretch.tokens)) for stretch in spilled] == [(20, 40)]
    assert cache.find("k", text[:50])[1] == 20
    assert cache.stats.bytes == 60 * run + 2 * one
    cache.shrink(60 * run)
    assert (cache.stats.snapshots, cache.stats.bytes, cache.marks) == (0, 0, ())
    assert cache.stats.nodes == 0


def test_runs_that_lead_to_no_snapshot_leave_with_the_last_one() -> None:
    cache = PrefixCache(max_bytes=ROOM, min_tokens=4)
    spilled: list[Stretch] = []
    cache.spill = spilled.append
    put(cache, text_of(40))
    put(cache, (*text_of(30), *text_of(10, 9)))
    cache.shrink(0)
    assert cache.stats.nodes == 0
    assert {(stretch.begin, len(stretch.tokens), stretch.rest is None) for stretch in spilled} == {
        (30, 40, False),
        (0, 30, True),
    }


def test_a_pinned_beginning_keeps_its_snapshot() -> None:
    cache = PrefixCache(max_bytes=100_000, min_tokens=4)
    text = text_of(60)
    put(cache, text[:20])
    put(cache, text, pin=30)
    cache.shrink(0)
    assert cache.find("k", (*text, 1))[1] == 20


def test_what_was_spilled_can_be_taken_in_again() -> None:
    spilled: list[Stretch] = []
    cache = PrefixCache(max_bytes=ROOM, min_tokens=4)
    cache.spill = spilled.append
    text = text_of(60)
    for end in (20, 40, 60):
        put(cache, text[:end], (end, end))
    assert cache.known("k", (*text, 1)) == (60, [20, 40, 60])
    cache.shrink(0)
    cache.spill = None
    assert cache.known("k", (*text, 1)) == (0, [])
    parts = {len(stretch.tokens): stretch for stretch in spilled if stretch.rest is not None}
    assert not cache.adopt(parts[60]), "what comes before it is not there"
    assert all(cache.adopt(parts[end]) for end in (20, 40, 60, 60))
    assert told(cache.find("k", (*text, 1))[0]) == (list(text), sum(text))
    assert set(cache.marks) == {20, 40, 60}
    small = PrefixCache(max_bytes=100, min_tokens=4)
    assert not small.adopt(parts[20])


def test_stretches_tell_all_that_is_kept_of_a_text() -> None:
    cache = PrefixCache(max_bytes=ROOM, min_tokens=4)
    text = text_of(60)
    for end in (20, 40, 60):
        put(cache, text[:end])
    put(cache, text_of(30, 8))
    assert [len(stretch.tokens) for stretch in cache.stretches("k", text[:50])] == [20, 40]
    assert sorted(len(stretch.tokens) for stretch in cache.stretches()) == [20, 30, 40, 60]


def test_reading_stops_where_texts_part() -> None:
    cache = PrefixCache(max_bytes=ROOM, min_tokens=32)
    text = tuple(range(3 * SNAPSHOT_TOKENS))
    last = len(text) - 1
    put(cache, text_of(40))
    assert cache.stops(text[:100], 0, [(1, 10), (2, 50), (3, 90)]) == [50, 90]
    assert cache.stops(text[:100], 60, [(1, 50), (2, 70)]) == [70, 99]
    assert cache.stops(text[:100], 99, [(1, 50)]) == []
    assert cache.stops(text[:100], 0, [(1, 100 - SNAPSHOT_GAP), (2, 99)]) == [100 - SNAPSHOT_GAP]
    stops = cache.stops(text, 100, [])
    assert stops == [100 + SNAPSHOT_TOKENS, 100 + 2 * SNAPSHOT_TOKENS, last]
    plain = PrefixCache(max_bytes=ROOM)
    assert plain.stops(text, 0, [(1, 50)]) == []


def test_a_window_is_kept_in_the_order_of_time_and_no_wider_than_it_is() -> None:
    window = RotatingKVCache(8)
    for token in range(20):
        told = mx.full((1, 1, 1, 4), float(token))
        window.update_and_fetch(told, told)
    layout = Layout([window])
    rest = layout.rest([window])
    assert [int(token) for token in rest[0][0, 0, :, 0].tolist()] == list(range(12, 20))
    assert layout.covers([window], 20)
    assert not layout.covers([window], 19)
    assert layout.least([window]) == 0
    (again,) = layout.build([], rest, 20)
    assert (again.offset, again.max_size, again.keys.shape[2]) == (20, 8, 8)
    assert "window" in repr(layout)


def test_marks_of_runs_part_with_them_and_the_oldest_are_not_told() -> None:
    cache = PrefixCache(max_bytes=ROOM, min_tokens=4)

    def plain(tokens: tuple[int, ...], *marks: Mark) -> None:
        run = KVCache()
        keys = mx.zeros((1, 1, len(tokens), 4))
        run.update_and_fetch(keys, keys)
        cache.store("k", tokens, [run], marks=marks)

    one, other = text_of(40), (*text_of(30), *text_of(10, 9))
    plain(one, (1, 10), (2, 30), (3, 40))
    plain(other, (2, 30), (4, 35))
    plain(one[:30], (5, 8))
    assert set(cache.marks) == {1, 2, 3, 4, 5}
    cache.find("k", (*one[:12], 251))
    assert set(cache.marks[:2]) == {1, 5}, "those in use come first"
    cache.shrink(cache.stats.bytes - 1)
    assert 3 not in cache.marks
    assert {1, 2, 4, 5} == set(cache.marks)
    plain(other, *((100 + n, 35) for n in range(80)))
    assert len(cache.marks) == 64
    assert cache.marks[0] == 179
    cache.clear()
    assert cache.marks == ()
