"""What `Continue` promises: nothing repeated, nothing left out, and broken where it cannot be joined."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendUnavailable,
    ContextExceeded,
    Failure,
    NoBackend,
    StreamInterrupted,
    StreamStalled,
)
from forebay.kit.pipeline import Call, Event, Request, Send
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import RetrySettings
from forebay.orchestrator.layers.continue_ import Continue
from forebay.orchestrator.layers.fallback import Fallback
from forebay.testing import grammar
from forebay.testing.calls import Sink, ask, serve
from forebay.testing.clock import now, virtual

SAME = pb.CONTINUATION_POLICY_SAME_WEIGHTS
ANY = pb.CONTINUATION_POLICY_ANY_MODEL
Step = pb.GenerateResponse | Failure


def started(backend: str = "a", *, weights: str = "sha256:w") -> pb.GenerateResponse:
    """Returns the first event of a reply; empty weights are not known."""
    event = pb.GenerateResponse(started=pb.Started(backend=backend, model="m"))
    if weights:
        event.started.weights.digest = weights
    return event


def text(said: str, *ids: int, count: int | None = None) -> pb.GenerateResponse:
    counted = count if count is not None else len(ids) or 1
    return pb.GenerateResponse(delta=pb.Delta(text=said, token_ids=ids, token_count=counted))


def thought(said: str, *ids: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(reasoning=said, token_ids=ids, token_count=len(ids) or 1))


def finished(
    output: int = 1, *, prompt: int = 10, reason: pb.FinishReason.ValueType = 1
) -> pb.GenerateResponse:
    usage = pb.Usage(prompt_token_count=prompt, output_token_count=output)
    return pb.GenerateResponse(finished=pb.Finished(reason=reason, usage=usage))


def lost(backend: str = "a") -> Failure:
    return StreamInterrupted("gone", metadata={"backend": backend})


class Parts:
    """What is below: each call in turn does the next of these, and is noted."""

    def __init__(self, *parts: Sequence[Step]) -> None:
        self.parts = list(parts)
        self.calls: list[Call[Request]] = []
        self.cancelled = 0

    @property
    def requests(self) -> list[pb.GenerateRequest]:
        return [call.request for call in self.calls if isinstance(call.request, pb.GenerateRequest)]

    async def __call__(self, call: Call[Request], send: Send) -> None:
        self.calls.append(call)
        try:
            for step in self.parts.pop(0):
                if isinstance(step, Failure):
                    raise step
                copy = pb.GenerateResponse()
                copy.CopyFrom(step)
                await send(copy)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def request(policy: pb.ContinuationPolicy.ValueType = SAME, **limits: object) -> pb.GenerateRequest:
    made = ask(model="m")
    made.routing.continuation = policy
    made.limits.CopyFrom(pb.GenerationLimits(**limits))  # type: ignore[arg-type]  # as the test writes them
    return made


def layer(inner: Parts, *, budget: float = 10.0, **settings: object) -> Continue:
    spare = RetryBudget(ratio=0.0, per_second=budget, clock=now)
    retry = RetrySettings.model_validate(settings)
    below = Fallback(inner, settings=retry, budget=spare, source=random.Random(0))
    return Continue(below, settings=retry, budget=spare, source=random.Random(0))


async def run(parts: Parts, asked: pb.GenerateRequest, **settings: object) -> Sink:
    sink = await serve(layer(parts, **settings), asked)  # type: ignore[arg-type]  # as the test writes them
    grammar.check(sink.events, numbered=False)
    assert not parts.parts
    return sink


async def breaks(parts: Parts, asked: pb.GenerateRequest, **settings: object) -> tuple[Failure, Sink]:
    sink = Sink()
    with pytest.raises((StreamInterrupted, StreamStalled)) as caught:
        await serve(layer(parts, **settings), asked, sink=sink)  # type: ignore[arg-type]  # likewise
    grammar.check(sink.events, complete=False, numbered=False)
    return caught.value, sink


def spliced(sink: Sink) -> pb.Continued:
    (event,) = [e for e in sink.events if isinstance(e, pb.GenerateResponse) and e.HasField("continued")]
    return event.continued


def ending(sink: Sink) -> pb.Finished:
    event = sink.events[-1]
    assert isinstance(event, pb.GenerateResponse)
    return event.finished


@virtual
async def test_another_backend_goes_on_and_the_splice_is_marked() -> None:
    parts = Parts(
        [started("a"), text("one"), text(" two"), lost("a")],
        [started("b"), text(" three"), finished(1, prompt=12)],
    )
    sink = await run(parts, request())
    assert sink.text == "one two three"
    assert sink.kinds == ["started", "delta", "delta", "continued", "delta", "finished"]
    mark = spliced(sink)
    assert (mark.backend, mark.model, mark.lost_backend) == ("b", "m", "a")
    assert (mark.reason, mark.text_length, mark.weights.digest) == ("STREAM_INTERRUPTED", 7, "sha256:w")
    again = parts.calls[1]
    assert parts.requests[1].continue_from.text == "one two"
    assert again.tried == {"a"}
    assert again.resumption is not None
    assert again.resumption.needs_same_weights
    assert again.resumption.weights == "sha256:w"


@virtual
async def test_usage_is_that_of_the_whole_reply() -> None:
    parts = Parts(
        [started(), thought("hm"), text("one"), text(" two"), lost()],
        [started("b"), text(" three"), finished(1, prompt=13)],
    )
    usage = ending(await run(parts, request())).usage
    assert (usage.prompt_token_count, usage.output_token_count, usage.reasoning_token_count) == (10, 4, 1)


@virtual
async def test_token_identifiers_go_along_and_reach_only_callers_who_asked() -> None:
    def made() -> Parts:
        return Parts(
            [started(), text("one", 1), text(" two", 2, 3), lost()],
            [started("b"), text(" three", 4), finished()],
        )

    parts = made()
    sink = await run(parts, request())
    assert list(parts.requests[1].continue_from.token_ids) == [1, 2, 3]
    assert not any(delta.token_ids for delta in grammar.deltas(sink.events))
    parts, asked = made(), request()
    asked.include_token_ids = True
    sink = await run(parts, asked)
    assert [list(delta.token_ids) for delta in grammar.deltas(sink.events)] == [[1], [2, 3], [4]]


@virtual
async def test_identifiers_that_lag_behind_the_text_are_caught_up_without_repeating_any() -> None:
    parts = Parts(
        [started(), text("one", 1), text(" tw", count=0), lost()],
        [started("b"), text(" two", 2), text(" three", 3), finished(2)],
    )
    sink = await run(parts, request())
    prefix = parts.requests[1].continue_from
    assert (prefix.text, list(prefix.token_ids)) == ("one", [1])
    assert sink.text == "one two three"
    assert ending(sink).usage.output_token_count == 3


@virtual
async def test_a_part_that_says_something_else_than_was_sent_breaks_the_reply() -> None:
    for said in (text(" tx"), thought("hm"), finished()):
        parts = Parts(
            [started(), text("one", 1), text(" tw", count=0), lost()],
            [started("b"), said, finished()],
        )
        failure, sink = await breaks(parts, request())
        assert sink.text == "one tw"
        assert "continued" not in sink.kinds
        assert failure.metadata["continuation"]
        assert parts.cancelled == 1


@virtual
async def test_a_tool_call_where_text_is_due_breaks_the_reply() -> None:
    tool = pb.GenerateResponse(delta=pb.Delta(tool_call=pb.ToolCallDelta(id="c", name="t")))
    parts = Parts([started(), text("one", 1), text(" tw", count=0), lost()], [started("b"), tool, finished()])
    await breaks(parts, request())


@virtual
async def test_text_where_reasoning_is_due_breaks_the_reply() -> None:
    half = pb.GenerateResponse(delta=pb.Delta(reasoning=" more"))
    parts = Parts([started(), thought("hm", 1), half, lost()], [started("b"), text("x"), finished()])
    await breaks(parts, request())


@virtual
async def test_reasoning_is_gone_on_with_too() -> None:
    parts = Parts(
        [started(), thought("hm", 1), thought(" well", 2), lost()],
        [started("b"), thought(" so", 3), text("yes", 4), finished(2)],
    )
    sink = await run(parts, request())
    assert grammar.reasoning(sink.events) == "hm well so"
    assert sink.text == "yes"
    assert parts.requests[1].continue_from.reasoning == "hm well"
    assert spliced(sink).text_length == 0


@virtual
async def test_what_is_left_of_a_limit_is_what_the_next_part_may_have() -> None:
    parts = Parts([started(), text("one"), text(" two"), lost()], [started("b"), text(" three"), finished()])
    await run(parts, request(max_output_token_count=5))
    assert parts.requests[1].limits.max_output_token_count == 3


@virtual
async def test_a_reply_lost_at_its_limit_takes_one_step_back_to_learn_how_it_ended() -> None:
    end = finished(1, reason=pb.FINISH_REASON_LENGTH)
    parts = Parts([started(), text("one"), text(" two"), lost()], [started("b"), text(" two"), end])
    sink = await run(parts, request(max_output_token_count=2))
    assert parts.requests[1].limits.max_output_token_count == 1
    assert parts.requests[1].continue_from.text == "one"
    assert sink.text == "one two"
    assert ending(sink).usage.output_token_count == 2


@virtual
async def test_a_reply_of_one_token_is_begun_anew_and_compared() -> None:
    end = finished(1, reason=pb.FINISH_REASON_LENGTH)
    parts = Parts([started(), text("one"), lost()], [started("b"), text("one"), end])
    sink = await run(parts, request(max_output_token_count=1))
    assert not parts.requests[1].HasField("continue_from")
    assert sink.text == "one"
    assert parts.requests[1].limits.max_output_token_count == 1


@virtual
async def test_where_tokens_are_not_counted_a_limited_reply_is_said_again_and_compared() -> None:
    begun = [started(), text("one", count=0), text(" two", count=0), lost()]
    again = [started("b"), text("one two three", count=0), finished(3)]
    parts = Parts(begun, again)
    sink = await run(parts, request(max_output_token_count=3))
    assert not parts.requests[1].HasField("continue_from")
    assert parts.requests[1].limits.max_output_token_count == 3
    assert sink.text == "one two three"
    parts = Parts(begun, [started("b"), text(" three", count=0), finished()])
    assert (await run(parts, request())).text == "one two three"


@virtual
async def test_a_stop_sequence_that_began_before_the_splice_ends_the_reply() -> None:
    parts = Parts(
        [started(), text("one EN"), lost()], [started("b"), text("D"), text(" OF"), text(" two"), finished()]
    )
    sink = await run(parts, request(stop_sequences=["END OF", "ENOUGH"]))
    assert sink.text == "one EN"
    assert ending(sink).reason == pb.FINISH_REASON_STOP
    assert ending(sink).stop_sequence == "END OF"
    assert ending(sink).usage.output_token_count == 3
    assert parts.cancelled == 1


@virtual
async def test_what_only_looked_like_a_stop_sequence_is_sent() -> None:
    parts = Parts([started(), text("one EN"), lost()], [started("b"), text("D"), text("ED"), finished()])
    sink = await run(parts, request(stop_sequences=["END OF"]))
    assert sink.text == "one ENDED"
    parts = Parts([started(), text("one EN"), lost()], [started("b"), text("D"), finished()])
    assert (await run(parts, request(stop_sequences=["END OF"]))).text == "one END"


@virtual
async def test_a_reply_is_spliced_as_often_as_it_may_be_tried() -> None:
    parts = Parts(
        [started("a"), text("one"), lost("a")],
        [started("b"), text(" two"), StreamStalled("still", metadata={"backend": "b"})],
        [started("a"), text(" three"), finished()],
    )
    sink = await run(parts, request())
    assert sink.text == "one two three"
    assert sink.kinds.count("continued") == 2
    assert [call.tried for call in parts.calls] == [frozenset(), {"a"}, {"b"}]
    parts = Parts([started("a"), text("one"), lost("a")], [started("b"), text(" two"), lost("b")])
    asked = request()
    asked.routing.max_attempt_count = 2
    failure, sink = await breaks(parts, asked)
    assert sink.text == "one two"
    assert failure.metadata["backend"] == "b"


@virtual
async def test_a_part_that_fails_before_its_first_delta_is_replaced_unnoticed() -> None:
    gone = BackendUnavailable("x", metadata={"backend": "b"})
    parts = Parts(
        [started("a"), text("one"), lost("a")], [started("b"), gone], [started("c"), text("!"), finished()]
    )
    sink = await run(parts, request())
    assert sink.text == "one!"
    assert spliced(sink).backend == "c"
    assert parts.calls[2].tried == {"a", "b"}


def nobody(**refused: str) -> Failure:
    return NoBackend("none", metadata={f"refused.{name}": by for name, by in refused.items()})


@virtual
async def test_the_lost_backend_itself_may_go_on_when_it_is_back() -> None:
    parts = Parts(
        [started("a"), text("one"), lost("a")],
        [nobody(a="tried")],
        [nobody(a="reachable")],
        [nobody(a="reachable")],
        [started("a"), text(" two"), finished()],
    )
    sink = await run(parts, request())
    assert sink.text == "one two"
    assert [call.tried for call in parts.calls[1:]] == [{"a"}, frozenset(), frozenset(), frozenset()]
    assert now() > 0


@virtual
async def test_waiting_for_a_backend_has_an_end() -> None:
    parts = Parts([started("a"), text("one"), lost("a")], *[[nobody(a="reachable")]] * 100)
    failure, sink = await breaks(parts, request(), continue_wait="2s")
    assert failure.metadata == {"backend": "a", "continuation": "NO_BACKEND"}
    assert sink.text == "one"
    assert 1.0 < now() <= 2.0
    parts = Parts([started("a"), text("one"), lost("a")], *[[nobody(a="reachable")]] * 100)
    since = now()
    with pytest.raises(StreamInterrupted):
        await serve(layer(parts), request(), deadline=now() + 0.5)
    assert now() - since < 0.5


@virtual
async def test_nobody_is_waited_for_who_could_not_go_on_anyway() -> None:
    for hopeless in (nobody(b="resumption"), ContextExceeded("long", metadata={"backend": "b"})):
        parts = Parts([started("a"), text("one"), lost("a")], [hopeless])
        failure, _ = await breaks(parts, request())
        assert failure.metadata["continuation"] == hopeless.reason
        assert now() == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.routing.ClearField("continuation"),
        lambda r: setattr(r.routing, "continuation", pb.CONTINUATION_POLICY_NEVER),
        lambda r: setattr(r.output_format, "json_schema", "{}"),
    ],
)
@virtual
async def test_a_reply_that_may_not_be_joined_stays_broken(
    spoil: Callable[[pb.GenerateRequest], None],
) -> None:
    asked = request()
    spoil(asked)
    _, sink = await breaks(Parts([started(), text("{"), lost()]), asked)
    assert sink.text == "{"


@virtual
async def test_a_constrained_reply_goes_on_by_its_tokens_only() -> None:
    asked = request()
    asked.output_format.json_schema = "{}"
    parts = Parts([started(), text("{", 7), lost()], [started("b"), text("}", 8), finished()])
    assert (await run(parts, asked)).text == "{}"
    asked.routing.continuation = ANY
    await breaks(Parts([started(), text("{", 7), lost()]), asked)


@virtual
async def test_after_part_of_a_tool_call_nobody_goes_on() -> None:
    tool = pb.GenerateResponse(delta=pb.Delta(tool_call=pb.ToolCallDelta(id="c", name="t")))
    await breaks(Parts([started(), tool, lost()]), request())


@virtual
async def test_weights_that_are_not_known_are_not_the_same() -> None:
    await breaks(Parts([started(weights=""), text("one"), lost()]), request(SAME))
    parts = Parts([started(weights=""), text("one"), lost()], [started("b"), text(" two"), finished()])
    assert (await run(parts, request(ANY))).text == "one two"


@virtual
async def test_tokens_of_other_weights_are_not_passed_on() -> None:
    parts = Parts(
        [started("a", weights="sha256:v"), text("one", 1), lost("a")],
        [started("b", weights="sha256:w"), text(" two", 2), lost("b")],
        [started("c", weights="sha256:w"), text(" three", 3), finished()],
    )
    sink = await run(parts, request(ANY))
    assert sink.text == "one two three"
    assert not parts.requests[2].continue_from.token_ids
    assert parts.requests[2].continue_from.text == "one two"


@virtual
async def test_each_splice_takes_a_retry_from_the_budget() -> None:
    told: list[Failure] = []
    parts = Parts([started(), text("one"), lost()], [started("b"), text(" two"), finished()])
    made = layer(parts, budget=1.0)
    made._on_splice = told.append
    assert (await serve(made, request())).text == "one two"
    assert [failure.reason for failure in told] == ["STREAM_INTERRUPTED"]
    parts.parts = [[started(), text("one"), lost()]]
    poor = layer(parts, budget=0.0)
    with pytest.raises(StreamInterrupted) as caught:
        await serve(poor, request())
    assert caught.value.metadata["continuation"] == "no retry is left"
    assert 4.0 <= now() <= 5.0, "it waited for one"
    parts.parts = [[started(), text("one"), lost()]]
    since = now()
    with pytest.raises(StreamInterrupted):
        await serve(poor, request(), deadline=since + 1.0)
    assert now() - since <= 1.0, "and never longer than its caller waits"
    assert len(told) == 1


@virtual
async def test_of_fifty_replies_that_are_lost_at_once_all_go_on_as_fast_as_the_budget_lets_them() -> None:
    starts: list[float] = []

    async def inner(call: Call[Request], send: Send) -> None:
        if call.resumption is None:
            await send(started("a"))
            await send(text("one"))
            raise lost("a")
        starts.append(now())
        await send(started("b"))
        await send(text(" two"))
        await send(finished())

    retry = RetrySettings()
    budget = RetryBudget(ratio=0.0, per_second=10.0, clock=now)
    made = Continue(inner, settings=retry, budget=budget, source=random.Random(0))
    sinks = await asyncio.gather(*(serve(made, request()) for _ in range(50)))
    assert {sink.text for sink in sinks} == {"one two"}
    for second in range(6):
        assert sum(at < second for at in starts) <= 10 * (second + 1)


@virtual
async def test_what_the_caller_had_already_stays_in_front() -> None:
    asked = request()
    asked.continue_from.text = "zero "
    parts = Parts([started(), text("one", 1), lost()], [started("b"), text(" two"), finished()])
    await run(parts, asked)
    prefix = parts.requests[1].continue_from
    assert (prefix.text, list(prefix.token_ids)) == ("zero one", [])
    asked.continue_from.token_ids.append(9)
    parts = Parts([started(), text("one", 1), lost()], [started("b"), text(" two"), finished()])
    await run(parts, asked)
    assert list(parts.requests[1].continue_from.token_ids) == [9, 1]


@virtual
async def test_the_callers_own_failures_are_left_alone() -> None:
    with pytest.raises(ContextExceeded):
        await serve(layer(Parts([started(), ContextExceeded("x")])), request())


@virtual
async def test_before_the_first_delta_another_backend_begins_anew() -> None:
    parts = Parts([started(), lost()], [started("b"), text("one"), finished()])
    sink = await run(parts, request())
    assert "continued" not in sink.kinds
    assert not parts.requests[1].HasField("continue_from")


@virtual
async def test_a_timeout_that_is_not_its_own_is_passed_on() -> None:
    class Odd(Parts):
        async def __call__(self, call: Call[Request], send: Send) -> None:
            if self.calls:
                raise TimeoutError
            await super().__call__(call, send)

    with pytest.raises(TimeoutError):
        await serve(layer(Odd([started(), text("one"), lost()])), request())


@virtual
async def test_progress_and_other_calls_pass_untouched() -> None:
    waiting = pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED))
    parts = Parts(
        [waiting, started(), text("one"), lost()], [waiting, started("b"), text(" two"), finished()]
    )
    sink = await run(parts, request())
    assert sink.kinds == [
        *("progress", "started", "delta", "progress", "continued", "delta", "finished"),
    ]

    async def count(call: Call[Request], send: Send) -> None:
        answer: Event = pb.CountTokensResponse(token_count=3)
        await send(answer)

    other = Continue(
        count,
        settings=RetrySettings(),
        budget=RetryBudget(ratio=0, per_second=0, clock=now),
        source=random.Random(0),
    )
    assert (await serve(other, pb.CountTokensRequest(model="m"))).kinds == ["CountTokensResponse"]


@pytest.mark.parametrize("seed", range(40))
@virtual
async def test_however_it_breaks_the_whole_is_what_an_undisturbed_reply_says(seed: int) -> None:
    """A model that says one sentence, held back, batched and lost by chance."""
    chance = random.Random(seed)
    words = [f"{' ' if i else ''}w{i}{'é' * (i % 3)}" for i in range(30)]
    limit = chance.choice([None, 1, 5, 29, 30, 31])
    whole = "".join(words[: limit or 30])
    has_ids = chance.random() < 0.5

    class Model(Parts):
        async def __call__(self, call: Call[Request], send: Send) -> None:
            asked = call.request
            assert isinstance(asked, pb.GenerateRequest)
            self.calls.append(call)
            prefix = asked.continue_from
            at = len(prefix.token_ids)
            if not at:
                at = next(n for n in range(31) if "".join(words[:n]) == prefix.text)
            assert "".join(words[:at]) == prefix.text
            most = asked.limits.max_output_token_count if limit else 30
            assert most > 0
            end = min(30, at + most)
            breaks_after = chance.randint(1, 12) if len(self.calls) < 3 else 1000
            await send(started(f"b{len(self.calls)}"))
            sent = 0
            first = at
            while at < end:
                size = chance.randint(1, 3)
                batch = range(at, min(end, at + size))
                at = batch[-1] + 1
                said = "".join(words[i] for i in batch)
                cut = chance.randint(0, len(said))
                pieces = [(said[:cut], [], 0), (said[cut:], list(batch) if has_ids else [], len(batch))]
                for piece, ids, count in pieces:
                    if piece or count:
                        sent += 1
                        if sent > breaks_after:
                            raise StreamInterrupted("x", metadata={"backend": f"b{len(self.calls)}"})
                        await send(text(piece, *ids, count=count))
            if sent >= breaks_after:
                raise StreamInterrupted("x", metadata={"backend": f"b{len(self.calls)}"})
            await send(finished(at - first, prompt=10 + first))

    sink = await serve(layer(Model()), request(**({"max_output_token_count": limit} if limit else {})))
    grammar.check(sink.events, numbered=False)
    assert sink.text == whole
    usage = ending(sink).usage
    assert (usage.prompt_token_count, usage.output_token_count) == (10, min(30, limit or 30))
