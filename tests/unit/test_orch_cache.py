"""Which replies are given again, and what the memory they are kept in promises."""

from __future__ import annotations

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator import replies
from forebay.orchestrator.replies import MemoryStore, Recording, Respite
from forebay.testing.calls import ask


def greedy(text: str = "q", **fields: object) -> pb.GenerateRequest:
    request = ask(text, model="m")
    request.sampling.temperature = 0.0
    request.routing.cache = pb.CACHE_POLICY_USE
    request.MergeFrom(pb.GenerateRequest(**fields))  # type: ignore[arg-type]  # fields by name
    return request


def key(request: pb.GenerateRequest, *, caller: str = "c", weights: str = "w") -> bytes:
    return replies.reply_key(request, caller=caller, weights=weights)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (pb.Sampling(temperature=0.0), True),
        (pb.Sampling(temperature=0.7, seed=1), True),
        (pb.Sampling(seed=0), True),
        (pb.Sampling(temperature=0.7), False),
        (pb.Sampling(), False),
    ],
)
def test_only_greedy_and_seeded_replies_are_repeatable(sampling: pb.Sampling, expected: bool) -> None:
    request = ask()
    request.sampling.CopyFrom(sampling)
    assert replies.is_repeatable(request) is expected


@pytest.mark.parametrize(
    "part",
    [pb.Part(tool_call=pb.ToolCall(name="f")), pb.Part(tool_result=pb.ToolResult(text="x"))],
)
def test_a_conversation_with_tools_is_never_repeatable(part: pb.Part) -> None:
    assert not replies.is_repeatable(greedy(messages=[pb.Message(role=pb.ROLE_TOOL, parts=[part])]))
    assert not replies.is_repeatable(greedy(tools=[pb.Tool(name="f")]))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (pb.CACHE_POLICY_UNSPECIFIED, False),
        (pb.CACHE_POLICY_BYPASS, False),
        (pb.CACHE_POLICY_USE, True),
        (pb.CACHE_POLICY_REFRESH, True),
    ],
)
def test_nothing_is_kept_of_who_did_not_ask(policy: pb.CachePolicy.ValueType, expected: bool) -> None:
    request = ask()
    request.routing.cache = policy
    assert replies.is_asked_for(request) is expected


def test_a_key_holds_no_text_and_says_nothing_but_whether_two_are_equal() -> None:
    assert key(greedy("a secret")) == key(greedy("a secret"))
    assert len(key(greedy("a secret"))) == 32
    assert b"secret" not in key(greedy("a secret"))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.messages[0].parts.add(text="more"),
        lambda r: setattr(r, "model", "other"),
        lambda r: setattr(r.sampling, "top_k", 3),
        lambda r: setattr(r.limits, "max_output_token_count", 3),
        lambda r: r.limits.stop_sequences.append("x"),
        lambda r: r.limits.stop_token_ids.append(3),
        lambda r: setattr(r.output_format, "json_schema", "{}"),
        lambda r: setattr(r.continue_from, "text", "x"),
        lambda r: r.accepted_degradations.append(pb.DEGRADATION_KIND_OPTION_IGNORED),
        lambda r: r.backend_options["x"].update({"a": 1}),
        lambda r: r.routing.backends.append("mlx"),
        lambda r: r.routing.fallback_models.append("n"),
        lambda r: setattr(r.routing, "continuation", pb.CONTINUATION_POLICY_ANY_MODEL),
    ],
)
def test_whatever_can_change_the_answer_changes_the_key(change: object) -> None:
    changed = greedy()
    change(changed)  # type: ignore[operator]  # one of the lambdas
    assert key(changed) != key(greedy())


def test_callers_and_weights_have_keys_of_their_own() -> None:
    keys = {
        key(greedy(), caller=caller, weights=weights)
        for caller, weights in [("a", "b"), ("ab", ""), ("", "ab"), ("a", "c")]
    }
    assert len(keys) == 4


def test_how_a_call_is_served_does_not_change_the_key() -> None:
    changed = greedy(request_id="7")
    changed.routing.priority = pb.PRIORITY_BATCH
    changed.routing.cache = pb.CACHE_POLICY_REFRESH
    changed.routing.max_attempt_count = 2
    assert key(changed) == key(greedy())


def test_each_text_has_the_key_it_has_in_any_batch() -> None:
    def keys(*texts: str, **fields: object) -> list[bytes]:
        request = pb.EmbedRequest(model="m", texts=texts, **fields)  # type: ignore[arg-type]  # by name
        return replies.embedding_keys(request, caller="c", weights="")

    a, b = keys("a", "b")
    assert keys("b", "a") == [b, a]
    assert keys("a", allow_partial=True, request_id="1") == [a]
    assert keys("a", dimension_count=8) != [a]


STARTED = pb.GenerateResponse(started=pb.Started(backend="x", request_id="first"), sequence=1)
PROGRESS = pb.GenerateResponse(progress=pb.Progress())
DELTA = pb.GenerateResponse(delta=pb.Delta(text="a", token_count=1), sequence=2)
DONE = pb.GenerateResponse(
    finished=pb.Finished(reason=pb.FINISH_REASON_STOP, usage=pb.Usage(output_token_count=1))
)
DONE.finished.timings.queue_duration.FromSeconds(1)


def recorded(*events: pb.GenerateResponse, largest: int = 10_000) -> bytes | None:
    recording = Recording(largest=largest)
    for event in events:
        recording.take(event)
    return recording.value()


def test_a_replay_is_the_reply_and_says_that_it_is_one() -> None:
    value = recorded(PROGRESS, STARTED, DELTA, DELTA, DONE)
    assert value is not None
    found = replies.events(value)
    assert found is not None
    assert [event.WhichOneof("event") for event in found] == ["started", "delta", "delta", "finished"]
    assert found[0].started.replayed
    assert found[1].delta == DELTA.delta
    assert found[-1].finished.usage == DONE.finished.usage
    assert not found[-1].finished.HasField("timings")
    assert all(event.sequence == 0 for event in found)


@pytest.mark.parametrize(
    "events",
    [
        (STARTED, DELTA),
        (STARTED, pb.GenerateResponse(continued=pb.Continued(backend="y")), DONE),
        (STARTED, pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_TOOL_CALLS))),
        (STARTED, pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_CONTENT_FILTER))),
        (STARTED, *[DELTA] * 2000, DONE),
    ],
)
def test_a_reply_that_is_not_whole_or_not_to_be_repeated_is_not_kept(
    events: tuple[pb.GenerateResponse, ...],
) -> None:
    assert recorded(*events) is None


@pytest.mark.parametrize(
    "value",
    [b"", b"\0", b"\0\0\0\5ab", b"\0\0\0\2\xff\xff", b"\0\0\0\0", recorded(DELTA, DONE), b"\0\0\0\0" * 3],
)
def test_bytes_that_are_no_reply_are_no_reply(value: bytes) -> None:
    assert replies.events(value) is None


@pytest.mark.parametrize("value", [b"\xff", b"", pb.EmbedResponse(embeddings=[{}]).SerializeToString()])
def test_bytes_that_are_no_embedding_are_none(value: bytes) -> None:
    assert replies.embedding(value) is None


def test_embeddings_are_comparable_if_they_are_of_the_same_weights() -> None:
    def origin(backend: str, digest: str = "", normalized: bool = True) -> object:
        return replies.origin(
            pb.EmbedResponse(
                backend=backend, model="m", weights=pb.WeightIdentity(digest=digest), normalized=normalized
            )
        )

    assert origin("a", "d") == origin("b", "d")
    assert origin("a", "d") != origin("a", "e")
    assert origin("a") != origin("b")
    assert origin("a", "d") != origin("a", "d", normalized=False)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_the_least_recently_used_goes_first_when_the_bytes_are_spent() -> None:
    store = MemoryStore(max_bytes=10 * 1000, ttl=60, clock=Clock())
    for number in range(10):
        await store.put({bytes([number]): bytes(488)})
    assert (len(store), store.used) == (10, 10_000)
    assert await store.get([b"\0"]) == [bytes(488)]
    await store.put({b"new": bytes(488)})
    assert await store.get([b"\0", b"\1", b"\2"]) == [bytes(488), None, bytes(488)]
    assert store.used <= 10_000
    assert repr(store) == "<MemoryStore 10 entries, 10000/10000 bytes>"


async def test_no_entry_lives_longer_than_its_time_or_takes_all_the_room() -> None:
    clock = Clock()
    store = MemoryStore(max_bytes=8000, ttl=60, clock=clock)
    await store.put({b"a": b"x", b"large": bytes(2000)})
    assert await store.get([b"a", b"large"]) == [b"x", None]
    clock.now = 61.0
    assert await store.get([b"a"]) == [None]


def test_a_store_that_fails_is_left_alone_for_ever_longer_times_and_tried_by_one() -> None:
    clock = Clock()
    respite = Respite(clock=clock)
    assert [respite.fail() for _ in range(3)] == [False, False, True]
    for length in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        assert not respite.may_try()
        clock.now += length - 0.01
        assert not respite.may_try()
        clock.now += 0.02
        assert respite.may_try()
        assert not respite.may_try(), "one at a time"
        assert respite.fail()
    clock.now += 60.0
    assert respite.may_try()
    respite.forget()
    assert respite.may_try()
    respite.succeed()
    assert [respite.may_try(), respite.may_try(), respite.fail()] == [True, True, False]
