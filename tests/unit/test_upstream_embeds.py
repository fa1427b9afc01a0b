"""Embedding many texts over a server that takes a few."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    InvalidRequest,
)
from forebay.kit.pipeline import Call
from forebay.testing import clock
from forebay.upstream.embeds import Batch, Embedder


class Upstream:
    """A server whose vectors tell the text, and which chokes on some."""

    def __init__(self, *, bad: dict[str, Failure] | None = None, size: int = 2, delay: float = 0.0) -> None:
        self.bad = bad or {}
        self.size = size
        self.delay = delay
        self.batches: list[list[str]] = []
        self.active = self.most = 0

    async def __call__(self, texts: Sequence[str]) -> Batch:
        self.batches.append(list(texts))
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.active -= 1
        for text in texts:
            if text in self.bad:
                raise self.bad[text]
        vectors = [[float(len(text))] + [0.0] * (self.size - 1) for text in texts]
        return Batch(vectors=vectors, prompt_tokens=sum(map(len, texts)))


def embed(
    embedder: Embedder,
    upstream: Upstream,
    texts: Sequence[str],
    *,
    identity: str = "w",
    caller: str = "",
    **more: object,
) -> pb.EmbedResponse:
    request = pb.EmbedRequest(model="m", texts=texts, **more)  # type: ignore[arg-type]  # fields by name
    return clock.run(embedder.embed(Call(request=request, caller=caller), upstream, identity=identity))


def make(**settings: int) -> Embedder:
    return Embedder(backend="b", **settings)  # type: ignore[arg-type]  # numbers all


def firsts(response: pb.EmbedResponse) -> list[float]:
    return [e.values[0] if e.values else -1.0 for e in response.embeddings]


def test_a_thousand_texts_come_back_in_order_in_batches() -> None:
    upstream = Upstream(delay=0.1)
    texts = ["x" * (n % 37 + 1) + str(n) for n in range(1000)]
    response = embed(make(batch_texts=64, concurrency=3), upstream, texts)
    assert firsts(response) == [float(len(text)) for text in texts]
    assert [len(batch) for batch in upstream.batches] == [64] * 15 + [40]
    assert upstream.most == 3
    assert response.usage.prompt_token_count == sum(map(len, texts))
    assert (response.backend, response.model, response.dimension_count) == ("b", "m", 2)


def test_batches_keep_to_their_characters_and_a_long_text_goes_alone() -> None:
    upstream = Upstream()
    embed(make(batch_characters=10, concurrency=1), upstream, ["a" * 4, "b" * 6, "c", "d" * 50, "e"])
    assert [[len(text) for text in batch] for batch in upstream.batches] == [[4, 6], [1], [50], [1]]


def test_equal_texts_are_sent_once() -> None:
    upstream = Upstream()
    response = embed(make(), upstream, ["a", "bb", "a", "", "a"])
    assert upstream.batches == [["a", "bb", ""]]
    assert firsts(response) == [1, 2, 1, 0, 1]


def test_hits_and_misses_are_mixed_and_the_cache_knows_callers_weights_and_dimensions() -> None:
    embedder, upstream = make(), Upstream()
    embed(embedder, upstream, ["a", "bb"])
    mixed = embed(embedder, upstream, ["ccc", "a", "bb", "a"])
    assert firsts(mixed) == [3, 1, 2, 1]
    assert mixed.cached_embedding_count == 3
    assert upstream.batches[-1] == ["ccc"]
    assert (embedder.hits, embedder.misses) == (3, 3)
    for other in ({"caller": "someone"}, {"identity": "others"}, {"dimension_count": 2}, {"identity": ""}):
        assert embed(embedder, upstream, ["a"], **other).cached_embedding_count == 0  # type: ignore[arg-type]  # by name
    assert embed(embedder, upstream, ["a"], identity="").cached_embedding_count == 0
    all_kept = embed(embedder, upstream, ["a", "bb"])
    assert all_kept.cached_embedding_count == 2
    assert all_kept.usage.prompt_token_count == 0


def test_what_is_kept_is_bounded_in_bytes_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, upstream = make(cache_bytes=16), Upstream()
    embed(embedder, upstream, ["a", "bb", "ccc"])
    assert embed(embedder, upstream, ["a"]).cached_embedding_count == 0
    assert embed(make(cache_bytes=4), upstream, ["a"]).dimension_count == 2  # too large to keep is no error
    brief = Embedder(backend="b", cache_ttl=timedelta(microseconds=1))
    embed(brief, upstream, ["a"])
    assert embed(brief, upstream, ["a"]).cached_embedding_count == 0


@pytest.mark.parametrize("kind", [InvalidRequest, ContextExceeded])
def test_the_bad_texts_are_named_and_the_others_survive(kind: type[Failure]) -> None:
    texts = [f"text {n}" for n in range(20)]
    bad = {texts[3]: kind("too odd"), texts[17]: kind("too odd")}
    with pytest.raises(kind) as raised:
        embed(make(), Upstream(bad=bad), texts)
    assert type(raised.value) is kind
    assert [path for path, _ in raised.value.violations] == ["texts[3]", "texts[17]"]
    upstream = Upstream(bad=bad)
    partial = embed(make(), upstream, texts, allow_partial=True)
    assert [(f.index, f.reason, f.message) for f in partial.failures] == [
        (n, kind.reason, "too odd") for n in (3, 17)
    ]
    assert [n for n, e in enumerate(partial.embeddings) if not e.values] == [3, 17]
    assert len(upstream.batches) < 20  # by halves, not one by one


def test_a_bad_text_that_comes_twice_is_named_twice() -> None:
    with pytest.raises(InvalidRequest) as raised:
        embed(make(), Upstream(bad={"no": InvalidRequest("x")}), ["no", "yes", "no"])
    assert [path for path, _ in raised.value.violations] == ["texts[0]", "texts[2]"]


def test_texts_bad_in_different_ways_are_an_invalid_request() -> None:
    bad: dict[str, Failure] = {"a": ContextExceeded("long"), "b": BackendError("boom")}
    with pytest.raises(InvalidRequest, match="2 of 3"):
        embed(make(), Upstream(bad=bad), ["a", "b", "c"])


def test_nothing_left_is_a_failure_even_where_a_part_would_do() -> None:
    with pytest.raises(ContextExceeded):
        embed(make(), Upstream(bad={"a": ContextExceeded("long")}), ["a"], allow_partial=True)


def test_a_server_that_fails_at_everything_is_not_asked_for_ever() -> None:
    texts = [str(n) for n in range(512)]
    upstream = Upstream(bad={text: BackendError("boom") for text in texts})
    with pytest.raises(BackendError, match="boom"):
        embed(make(concurrency=1), upstream, texts)
    assert len(upstream.batches) < 30


def test_a_server_that_is_gone_is_asked_once() -> None:
    texts = [str(n) for n in range(512)]
    upstream = Upstream(bad={text: BackendUnavailable("gone") for text in texts})
    with pytest.raises(BackendUnavailable):
        embed(make(concurrency=1), upstream, texts, allow_partial=True)
    assert len(upstream.batches) == 1


async def odd(*vectors: Sequence[float]) -> Batch:
    return Batch(vectors=vectors)


@pytest.mark.parametrize(
    "vectors",
    [[], [[]], [[float("nan"), 1.0]], [[float("inf"), 1.0]]],
    ids=["none", "empty", "nan", "inf"],
)
def test_vectors_that_are_none_are_an_error(vectors: list[list[float]]) -> None:
    request = pb.EmbedRequest(model="m", texts=["a"])
    with pytest.raises(BackendError):
        clock.run(make().embed(Call(request=request), lambda _: odd(*vectors), identity="w"))


def test_vectors_of_different_lengths_are_an_error() -> None:
    async def fetch(texts: Sequence[str]) -> Batch:
        return Batch(vectors=[[1.0] * len(text) for text in texts])

    request = pb.EmbedRequest(model="m", texts=["a", "bb"])
    with pytest.raises(BackendError, match="lengths"):
        clock.run(make().embed(Call(request=request), fetch, identity="w"))


def test_the_norm_is_told_as_it_is() -> None:
    def normalized(*vectors: Sequence[float]) -> bool:
        request = pb.EmbedRequest(model="m", texts=[str(n) for n in range(len(vectors))])
        return clock.run(make().embed(Call(request=request), lambda _: odd(*vectors), identity="")).normalized

    assert normalized([0.6, 0.8], [1.0, 0.0])
    assert not normalized([0.6, 0.8], [1.0, 1.0])


def test_components_that_are_not_given_are_refused_or_told() -> None:
    with pytest.raises(CapabilityUnsupported):
        embed(make(), Upstream(size=4), ["a"], dimension_count=2)
    accepted = [pb.DEGRADATION_KIND_OPTION_IGNORED]
    response = embed(make(), Upstream(size=4), ["a"], dimension_count=2, accepted_degradations=accepted)
    assert (response.dimension_count, [d.field for d in response.degradations]) == (4, ["dimension_count"])
    assert not embed(make(), Upstream(size=2), ["a"], dimension_count=2).degradations


def test_cancelling_cancels_every_batch() -> None:
    async def body() -> None:
        upstream = Upstream(delay=100)
        request = pb.EmbedRequest(model="m", texts=[str(n) for n in range(10)])
        embedder = make(batch_texts=1, concurrency=2)
        task = asyncio.create_task(embedder.embed(Call(request=request), upstream, identity="w"))
        await asyncio.sleep(1)
        assert upstream.active == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert upstream.active == 0

    clock.run(body())
