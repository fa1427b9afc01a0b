"""Promises of the prefix cache, on a real engine with a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import tiny_models
from forebay.kit.failure import InvalidRequest
from forebay.mlx_service.worker import prefix_cache
from forebay.mlx_service.worker.engine import Engine, Over, Reading, Row, Written
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.runtime import KVCache, mx
from forebay.mlx_service.worker.sampling import SamplingParams
from mlx_worker_rig import Rig, ask, rig, until

pytestmark = pytest.mark.mlx

SECRET = tuple(range(100, 160))
LAYERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("prefixes") / "m")


@pytest.fixture
async def tiny(model: Path) -> AsyncIterator[Rig]:
    async with rig(model, prefixes=PrefixCache(max_bytes=64 << 20, min_tokens=4)) as made:
        yield made


def row(tokens: tuple[int, ...], most: int = 12, **fields: object) -> Row:
    return Row(tokens=tokens, most=most, sampling=SamplingParams(temperature=0), **fields)  # type: ignore[arg-type]


async def finish(engine: Engine, wanted: Row) -> tuple[list[int], int]:
    """The row's tokens, and how many of its prompt were found."""
    ticket = engine.submit(wanted)
    tokens: list[int] = []
    cached = 0
    while True:
        for happening in await ticket.next():
            if isinstance(happening, Written):
                tokens.append(happening.token)
            elif isinstance(happening, Reading):
                cached = happening.cached
            elif isinstance(happening, Over):
                assert happening.failure is None
                return tokens, cached


def tokens_of(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((i * i + 7 * i + seed * 31) % 250 for i in range(count))


async def test_what_is_cached_gives_the_very_tokens_of_what_is_read(model: Path, tiny: Rig) -> None:
    prompts = [tokens_of(70), tokens_of(70), tokens_of(70)[:40] + tokens_of(30, 5), tokens_of(300)]
    async with rig(model) as plain:
        expected = [(await finish(plain.engine, row(prompt)))[0] for prompt in prompts]
    found = [await finish(tiny.engine, row(prompt)) for prompt in prompts]
    assert [tokens for tokens, _ in found] == expected
    assert [cached for _, cached in found] == [0, 69, 40, 70]
    stats = tiny.engine.stats().prefix
    assert (stats.hits, stats.hit_tokens, stats.misses) == (3, 179, 1)


async def test_the_next_turn_reads_only_what_is_new(tiny: Rig) -> None:
    first = tokens_of(50)
    reply, _ = await finish(tiny.engine, row(first, most=10))
    _, cached = await finish(tiny.engine, row((*first, *reply, *tokens_of(20, 3))))
    assert cached == len(first) + len(reply)


async def test_a_prompt_equal_to_a_stored_sequence_is_answered(tiny: Rig) -> None:
    first = tokens_of(40)
    reply, _ = await finish(tiny.engine, row(first, most=1))
    whole = (*first, *reply)
    for _ in range(3):
        _, cached = await finish(tiny.engine, row(whole, most=3))
        assert cached == len(whole) - 1


async def test_a_cancelled_reply_leaves_what_it_read(tiny: Rig) -> None:
    prompt = tokens_of(60)
    ticket = tiny.engine.submit(row(prompt, most=400))
    async with asyncio.timeout(10):
        while not any(isinstance(h, Written) for h in await ticket.next()):
            pass
    ticket.cancel()
    await until(lambda: tiny.engine.stats().prefix.nodes)
    _, cached = await finish(tiny.engine, row(prompt))
    assert cached == len(prompt) - 1


async def test_a_row_cancelled_before_it_read_anything_leaves_nothing(tiny: Rig) -> None:
    ticket = tiny.engine.submit(row(tokens_of(60)))
    ticket.cancel()
    await finish(tiny.engine, row(tokens_of(5, 1), most=1))
    assert tiny.engine.stats().live == 0


async def test_usage_counts_cached_tokens_through_the_service(tiny: Rig) -> None:
    text = "a text that is long enough to be found again by the next one who asks"
    first = await tiny.generate(ask(text, most=4))
    again = await tiny.generate(ask(text, most=4))
    assert first.finished.usage.cached_token_count == 0
    assert again.finished.usage.cached_token_count == again.finished.usage.prompt_token_count - 1
    assert again.text == first.text


@pytest.mark.parametrize("isolates", [True, False])
async def test_callers_share_nothing_where_they_are_kept_apart(model: Path, isolates: bool) -> None:
    text = "a text that is long enough to be found again by the next one who asks"
    async with rig(
        model, prefixes=PrefixCache(max_bytes=64 << 20, min_tokens=4), isolates_callers=isolates
    ) as made:
        await made.generate(ask(text, most=4), caller="ann")
        other = await made.generate(ask(text, most=4), caller="bob")
        same = await made.generate(ask(text, most=4), caller="ann")
    assert (other.finished.usage.cached_token_count == 0) is isolates
    assert same.finished.usage.cached_token_count > 0


async def test_a_planted_secret_reaches_nobody_who_shares_only_what_came_before(
    model: Path, tiny: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tokens_of(40)
    await finish(tiny.engine, row((*shared, *SECRET)))
    handed: list[tuple[list[KVCache], int]] = []
    find = PrefixCache.find

    def noting(cache: PrefixCache, key: str, tokens: tuple[int, ...]) -> object:
        found = find(cache, key, tokens)
        if found[0] is not None:
            handed.append((found[0], found[1]))
        return found

    monkeypatch.setattr(PrefixCache, "find", noting)
    asks = [(*shared, *tokens_of(n, n)) for n in (1, 7, 30)]
    answers = [(await finish(tiny.engine, row(prompt)))[0] for prompt in asks]
    async with rig(model) as plain:
        assert answers == [(await finish(plain.engine, row(prompt)))[0] for prompt in asks]
    assert [count for _, count in handed] == [40, 40, 40]
    for caches, count in handed:
        for cache in caches:
            assert cache.keys.shape[2] == cache.values.shape[2] == cache.offset == count


async def test_the_prompt_can_be_pinned_by_an_option_that_must_be_a_flag(tiny: Rig) -> None:
    request = ask("a text that is long enough to be found again by the next one", most=2)
    request.backend_options["mlx"].update({"pin_prompt": True})
    await tiny.generate(request)
    await until(lambda: tiny.engine.stats().prefix.nodes)
    request.backend_options["mlx"].update({"pin_prompt": "yes"})
    with pytest.raises(InvalidRequest, match="pin_prompt"):
        await tiny.generate(request)


async def test_a_cache_that_fails_costs_no_reply(tiny: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    await finish(tiny.engine, row(tokens_of(40)))
    monkeypatch.setattr(PrefixCache, "store", failing)
    tokens, _ = await finish(tiny.engine, row(tokens_of(40, 2)))
    assert tokens
    await until(lambda: tiny.engine.stats().prefix.nodes == 0)


async def test_a_model_with_caches_of_an_unknown_kind_is_left_out_and_serves(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strange(KVCache):
        pass

    def strange(_: object) -> list[KVCache]:
        return [Strange(), KVCache()]

    monkeypatch.setattr(prefix_cache, "make_prompt_cache", strange)
    assert "Strange" in (prefix_cache.why_not(load_weights(model)) or "")
    async with rig(model, prefixes=PrefixCache(max_bytes=1 << 20, min_tokens=4)) as made:
        first, _ = await finish(made.engine, row(tokens_of(40)))
        again, cached = await finish(made.engine, row(tokens_of(40)))
        assert not made.engine.keeps_prefixes
        assert made.engine.marks == ()
    assert (again, cached) == (first, 0)


def caches(tokens: tuple[int, ...]) -> list[KVCache]:
    """Caches whose every entry tells its token."""
    made = [KVCache() for _ in range(LAYERS)]
    values = mx.broadcast_to(mx.array(tokens, mx.float32)[None, None, :, None], (1, 2, len(tokens), 4))
    for cache in made:
        cache.update_and_fetch(values, values + 1000)
    return made


def spelled(found: list[KVCache] | None) -> list[int]:
    assert found is not None
    keys = [[int(token) for token in cache.keys[0, 0, :, 0].tolist()] for cache in found]
    values = [[int(token) - 1000 for token in cache.values[0, 1, :, 3].tolist()] for cache in found]
    assert all(one == keys[0] for one in (*keys, *values))
    return keys[0]


ONE = 2 * LAYERS * 2 * 4 * 4  # bytes of a token


def test_a_shared_beginning_is_held_once_and_outlives_those_who_share_it() -> None:
    cache = PrefixCache(max_bytes=80 * ONE, min_tokens=4)
    system = tuple(range(40))
    for end in ((90, 91, 92, 93), (80, 81, 82, 83)):
        cache.store("k", system + end, caches(system + end))
    assert cache.stats.bytes == 48 * ONE
    assert cache.stats.nodes == 3
    cache.store("k", tuple(range(200, 230)), caches(tuple(range(200, 230))))
    cache.shrink(75 * ONE)
    found, count = cache.find("k", (*system, 90, 91, 92, 93, 1))
    assert count == 40
    assert spelled(found) == list(system)
    assert spelled(cache.find("k", (*system, 80, 81, 82, 83, 1))[0]) == [*system, 80, 81, 82, 83]


def test_what_was_found_last_leaves_last() -> None:
    cache = PrefixCache(max_bytes=30 * ONE, min_tokens=4)
    texts = [tuple(range(i, i + 10)) for i in (0, 100, 200)]
    for text in texts:
        cache.store("k", text, caches(text))
    cache.find("k", (*texts[0], 1))
    fourth = tuple(range(300, 310))
    cache.store("k", fourth, caches(fourth))
    assert [cache.find("k", (*text, 1))[1] for text in (*texts, fourth)] == [10, 0, 10, 10]
    assert cache.stats.evicted == 1


def test_what_exceeds_the_budget_is_left_out_and_drives_nothing_out() -> None:
    cache = PrefixCache(max_bytes=20 * ONE, min_tokens=4)
    small, big = tuple(range(10)), tuple(range(100, 130))
    cache.store("k", small, caches(small))
    cache.store("k", big, caches(big))
    assert cache.find("k", (*small, 1))[1] == 10
    assert cache.find("k", (*big, 1))[1] == 0


def test_the_number_of_buffers_is_bound_too() -> None:
    cache = PrefixCache(max_bytes=1 << 30, max_buffers=3, min_tokens=4)
    for i in range(0, 100, 10):
        text = tuple(range(i, i + 10))
        cache.store("k", text, caches(text))
    assert cache.stats.nodes == 3


def test_pinned_beginnings_stay_within_their_share() -> None:
    cache = PrefixCache(max_bytes=40 * ONE, min_tokens=4)
    pinned, greedy = tuple(range(14)), tuple(range(50, 68))
    cache.store("k", pinned, caches(pinned), pin=10)
    cache.store("k", greedy, caches(greedy), pin=18)  # with the first it would take more than half
    cache.shrink(0)
    assert cache.find("k", (*pinned, 1))[1] == 10
    assert cache.find("k", (*greedy, 1))[1] == 0
    cache.clear()
    assert cache.stats.bytes == cache.stats.nodes == 0


def test_keys_share_nothing_and_are_forgotten_with_their_last_text() -> None:
    cache = PrefixCache(max_bytes=10 * ONE, min_tokens=4)
    text = tuple(range(10))
    cache.store("ann", text, caches(text))
    assert cache.find("bob", (*text, 1)) == (None, 0)
    cache.store("bob", text, caches(text))
    assert cache.find("ann", (*text, 1)) == (None, 0)
    assert list(cache._roots) == ["bob"]


def test_short_texts_and_texts_known_already_add_nothing() -> None:
    cache = PrefixCache(max_bytes=1 << 30, min_tokens=8)
    cache.store("k", (1, 2, 3), caches((1, 2, 3)))
    cache.store("k", tuple(range(20)), caches(tuple(range(20))))
    cache.store("k", tuple(range(12)), caches(tuple(range(12))))
    assert (cache.stats.nodes, cache.stats.bytes) == (1, 20 * ONE)
    assert cache.find("k", tuple(range(8))) == (None, 0)


def test_what_is_kept_holds_no_more_memory_than_it_says() -> None:
    whole = tuple(range(2000))
    big = caches(whole)
    cache = PrefixCache(max_bytes=1 << 30, min_tokens=4)
    mx.eval([c.state[:2] for c in big])
    cache.store("k", whole, [_first(c, 10) for c in big])
    del big
    mx.clear_cache()
    before = mx.get_active_memory()
    cache.clear()
    mx.clear_cache()
    assert before - mx.get_active_memory() <= 64 << 10


def test_what_is_left_of_a_run_that_was_cut_holds_no_more_memory_than_it_says() -> None:
    cache = PrefixCache(max_bytes=1 << 30, min_tokens=4)
    cache.store("k", tuple(range(4000)), caches(tuple(range(4000))))
    other = (*range(10), *range(5000, 5010))
    cache.store("k", other, caches(other))
    cache.find("k", (*other, 1))
    mx.clear_cache()
    before = mx.get_active_memory()
    cache.shrink(20 * ONE)
    assert cache.stats.bytes == 20 * ONE
    mx.clear_cache()
    assert before - mx.get_active_memory() >= 3900 * ONE


def _first(cache: KVCache, count: int) -> KVCache:
    cut = KVCache()
    cut.keys, cut.values, cut.offset = cache.keys[:, :, :count], cache.values[:, :, :count], count
    return cut
