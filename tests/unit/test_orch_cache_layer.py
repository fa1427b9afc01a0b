"""What `Remember` promises: a hit is the same answer without a backend, and nobody sees another's."""

from __future__ import annotations

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendError, BrokenStream
from forebay.kit.pipeline import Call, Request, Send
from forebay.orchestrator.layers.remember import Lookup, Remember
from forebay.orchestrator.replies import MemoryStore
from forebay.testing import grammar
from forebay.testing.calls import Sink, ask, serve
from forebay.testing.clock import now, virtual


class Backend:
    """Answers with what it was asked and how often it was; embeds a text as its length."""

    def __init__(self) -> None:
        self.calls: list[Request] = []
        self.digest = "d1"
        self.fail = False
        self.lose_one = False
        self.degraded = False

    async def __call__(self, call: Call[Request], send: Send) -> None:
        self.calls.append(call.request)
        request = call.request
        if isinstance(request, pb.EmbedRequest):
            await send(self._embed(request))
            return
        if isinstance(request, pb.CountTokensRequest):
            await send(pb.CountTokensResponse(token_count=1))
            return
        await send(pb.GenerateResponse(started=pb.Started(backend="x", request_id=call.request_id)))
        await send(pb.GenerateResponse(delta=pb.Delta(text=f"answer {len(self.calls)}", token_count=2)))
        if self.fail:
            raise BackendError("x")
        await send(
            pb.GenerateResponse(
                finished=pb.Finished(reason=pb.FINISH_REASON_STOP, usage=pb.Usage(output_token_count=2))
            )
        )

    def _embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        answer = pb.EmbedResponse(
            backend="x", model="m", dimension_count=1, weights=pb.WeightIdentity(digest=self.digest)
        )
        for index, text in enumerate(request.texts):
            if text == "bad":
                answer.embeddings.add()
                answer.failures.add(index=index, reason="CONTEXT_EXCEEDED", message="too long")
            else:
                answer.embeddings.add(values=[float(len(text))])
        if self.lose_one:
            del answer.embeddings[-1]
        if self.degraded:
            answer.degradations.add(kind=pb.DEGRADATION_KIND_PROMPT_TRUNCATED)
        return answer


class Rig:
    def __init__(self, *, is_shared: bool = False) -> None:
        self.backend = Backend()
        self.weights = "w1"
        self.told: list[Lookup] = []
        self.store = MemoryStore(max_bytes=2**20, ttl=60, clock=now)
        self.layer = Remember(
            self.backend,
            store=self.store,
            weights=lambda model: self.weights,
            is_shared=is_shared,
            on_lookup=self.told.append,
        )

    async def ask(self, request: Request, caller: str = "c", **fields: object) -> Sink:
        return await serve(self.layer, request, caller=caller, **fields)

    async def embed(
        self, *texts: str, policy: pb.CachePolicy.ValueType = pb.CACHE_POLICY_USE, caller: str = "c"
    ) -> pb.EmbedResponse:
        request = pb.EmbedRequest(model="m", texts=texts, routing=pb.RoutingHints(cache=policy))
        (answer,) = (await self.ask(request, caller)).events
        assert isinstance(answer, pb.EmbedResponse)
        assert len(answer.embeddings) == len(texts)
        return answer

    @property
    def asked_texts(self) -> list[list[str]]:
        return [list(call.texts) for call in self.backend.calls if isinstance(call, pb.EmbedRequest)]


def greedy(policy: pb.CachePolicy.ValueType = pb.CACHE_POLICY_USE) -> pb.GenerateRequest:
    request = ask(model="m")
    request.sampling.temperature = 0.0
    request.routing.cache = policy
    return request


@virtual
async def test_the_second_time_the_same_reply_comes_without_a_backend() -> None:
    rig = Rig()
    first = await rig.ask(greedy(), request_id="1")
    second = await rig.ask(greedy(), request_id="2")
    assert len(rig.backend.calls) == 1
    assert second.kinds == first.kinds
    assert second.text == first.text == "answer 1"
    started = second.events[0]
    assert isinstance(started, pb.GenerateResponse)
    assert (started.started.replayed, started.started.request_id) == (True, "2")
    assert [(each.hits, each.misses) for each in rig.told] == [(0, 1), (1, 0)]
    for number, event in enumerate(second.events):
        event.sequence = number  # type: ignore[union-attr]  # replies only
    grammar.check(second.events)  # type: ignore[arg-type]  # replies only


@virtual
async def test_a_replay_cannot_be_spoilt_by_who_got_it() -> None:
    rig = Rig()
    for _ in range(3):
        sink = await rig.ask(greedy())
        assert sink.text == "answer 1"
        sink.events[1].delta.text = "spoilt"  # type: ignore[union-attr]  # a reply


@virtual
async def test_who_does_not_ask_for_it_gets_a_fresh_reply() -> None:
    rig = Rig()
    await rig.ask(greedy())
    for policy in (pb.CACHE_POLICY_UNSPECIFIED, pb.CACHE_POLICY_BYPASS):
        assert (await rig.ask(greedy(policy))).text != "answer 1"
    warm = greedy()
    warm.sampling.temperature = 0.5
    assert (await rig.ask(warm)).text == "answer 4"
    assert (await rig.ask(warm)).text == "answer 5"
    assert (await rig.ask(greedy())).text == "answer 1"


@virtual
async def test_refresh_replaces_what_is_kept() -> None:
    rig = Rig()
    await rig.ask(greedy())
    assert (await rig.ask(greedy(pb.CACHE_POLICY_REFRESH))).text == "answer 2"
    assert (await rig.ask(greedy())).text == "answer 2"


@virtual
async def test_callers_never_see_each_others_replies_unless_they_share() -> None:
    rig, shared = Rig(), Rig(is_shared=True)
    for each in (rig, shared):
        await each.ask(greedy(), "one")
        await each.ask(greedy(), "two")
    assert (len(rig.backend.calls), len(shared.backend.calls)) == (2, 1)


@virtual
async def test_other_weights_behind_the_name_are_another_model() -> None:
    rig = Rig()
    await rig.ask(greedy())
    rig.weights = "w2"
    assert (await rig.ask(greedy())).text == "answer 2"


@virtual
async def test_a_reply_that_fails_is_not_kept() -> None:
    rig = Rig()
    rig.backend.fail = True
    with pytest.raises(BackendError):
        await rig.ask(greedy())
    rig.backend.fail = False
    assert (await rig.ask(greedy())).text == "answer 2"


@virtual
async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind() -> None:
    rig = Rig()
    with pytest.raises(ConnectionError):
        await rig.ask(greedy(), sink=Sink(error=ConnectionError(), error_at=1))
    assert len(rig.store) == 0


@virtual
async def test_counting_tokens_is_not_kept() -> None:
    rig = Rig()
    request = pb.CountTokensRequest(model="m", routing=pb.RoutingHints(cache=pb.CACHE_POLICY_USE))
    await rig.ask(request)
    await rig.ask(request)
    assert len(rig.backend.calls) == 2


@virtual
async def test_only_texts_that_are_not_known_are_embedded() -> None:
    rig = Rig()
    await rig.embed("a", "bb")
    answer = await rig.embed("ccc", "a", "dddd", "bb")
    assert [list(each.values) for each in answer.embeddings] == [[3.0], [1.0], [4.0], [2.0]]
    assert answer.cached_embedding_count == 2
    assert rig.asked_texts == [["a", "bb"], ["ccc", "dddd"]]
    whole = await rig.embed("dddd", "a")
    assert (whole.cached_embedding_count, whole.backend, whole.dimension_count) == (2, "x", 1)
    assert len(rig.asked_texts) == 2
    assert [(each.hits, each.misses) for each in rig.told] == [(0, 2), (2, 2), (2, 0)]


@virtual
async def test_a_text_that_comes_twice_is_embedded_once() -> None:
    rig = Rig()
    answer = await rig.embed("a", "bb", "a")
    assert [list(each.values) for each in answer.embeddings] == [[1.0], [2.0], [1.0]]
    assert rig.asked_texts == [["a", "bb"]]
    assert answer.cached_embedding_count == 0


@virtual
async def test_failures_are_told_for_every_place_and_not_kept() -> None:
    rig = Rig()
    await rig.embed("a")
    for _ in range(2):
        answer = await rig.embed("bad", "a", "bad")
        assert [failure.index for failure in answer.failures] == [0, 2]
        assert [list(each.values) for each in answer.embeddings] == [[], [1.0], []]
    assert rig.asked_texts == [["a"], ["bad"], ["bad"]]


@virtual
async def test_embeddings_of_two_kinds_are_never_in_one_answer() -> None:
    rig = Rig()
    await rig.embed("a")
    rig.backend.digest = "d2"
    answer = await rig.embed("a", "bb")
    assert (answer.weights.digest, answer.cached_embedding_count) == ("d2", 0)
    assert rig.asked_texts == [["a"], ["bb"], ["a", "bb"]]
    assert (await rig.embed("a", "bb")).cached_embedding_count == 2


@virtual
async def test_stored_embeddings_of_two_kinds_are_not_mixed_either() -> None:
    rig = Rig()
    await rig.embed("a")
    rig.backend.digest = "d2"
    await rig.embed("bb", policy=pb.CACHE_POLICY_REFRESH)
    answer = await rig.embed("a", "bb")
    assert answer.weights.digest == "d2"
    assert [list(each.values) for each in answer.embeddings] == [[1.0], [2.0]]


@virtual
async def test_embeddings_follow_the_policy_and_are_of_one_caller() -> None:
    rig = Rig()
    await rig.embed("a")
    await rig.embed("a", policy=pb.CACHE_POLICY_UNSPECIFIED)
    await rig.embed("a", policy=pb.CACHE_POLICY_REFRESH)
    await rig.embed("a", caller="other")
    assert rig.asked_texts == [["a"]] * 4


@virtual
async def test_embeddings_that_fall_short_are_not_kept() -> None:
    rig = Rig()
    rig.backend.degraded = True
    await rig.embed("a")
    await rig.embed("a")
    assert len(rig.asked_texts) == 2


@virtual
async def test_an_answer_with_too_few_embeddings_is_refused() -> None:
    rig = Rig()
    rig.backend.lose_one = True
    with pytest.raises(BrokenStream):
        await rig.embed("a", "bb")
