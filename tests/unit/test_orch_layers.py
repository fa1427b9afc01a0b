"""What the orchestrator's layers promise, in virtual time and without sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendBusy,
    BackendError,
    BackendUnavailable,
    ContextExceeded,
    DeadlineExceeded,
    Failure,
    FirstEventTimeout,
    InvalidRequest,
    ModelNotFound,
    NoBackend,
    QueueFull,
    StreamInterrupted,
    StreamStalled,
    WrongModel,
)
from forebay.kit.pipeline import Call, Event, Request, Send
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import RetrySettings, ScorerWeights
from forebay.orchestrator.layers.deadline import Deadline
from forebay.orchestrator.layers.fallback import Fallback
from forebay.orchestrator.layers.route import Route, foresee
from forebay.orchestrator.routing.router import Router
from forebay.orchestrator.routing.view import EndpointView
from forebay.testing.calls import Sink, ask, serve
from forebay.testing.clock import now, virtual

STARTED = pb.GenerateResponse(started=pb.Started(backend="x", model="m"))
PROGRESS = pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_LOADING))
FINISHED = pb.GenerateResponse(finished=pb.Finished())


def delta(text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text))


GOOD: Sequence[Event | Failure] = (STARTED, delta("a"), delta("b"), FINISHED)
Attempt = Sequence[Event | Failure]


class Backends:
    """What is below `Fallback`: named backends, each with what it does on each attempt in turn."""

    def __init__(self, **attempts: list[Attempt]) -> None:
        self.attempts = attempts
        self.seen: list[tuple[str, str]] = []
        self.times: list[float] = []

    async def __call__(self, call: Call[Request], send: Send) -> None:
        left = [name for name, todo in self.attempts.items() if todo and name not in call.tried]
        if not left:
            raise NoBackend("nobody is left")
        name = left[0]
        self.seen.append((name, call.request.model))
        self.times.append(now())
        for step in self.attempts[name].pop(0):
            if isinstance(step, Failure):
                step.metadata["backend"] = name
                raise step
            await send(step)


def fallback(inner: Backends, *, per_second: float = 10.0, **settings: object) -> Fallback:
    return Fallback(
        inner,
        settings=RetrySettings.model_validate(settings),
        budget=RetryBudget(ratio=0.0, per_second=per_second, clock=now),
        source=random.Random(0),
    )


@virtual
async def test_a_call_that_works_is_made_once() -> None:
    backends = Backends(a=[GOOD], b=[GOOD])
    sink = await serve(fallback(backends), ask(model="m"))
    assert sink.kinds == ["started", "delta", "delta", "finished"]
    assert backends.seen == [("a", "m")]


@virtual
async def test_a_backend_that_fails_before_its_first_delta_is_replaced_unnoticed() -> None:
    lost = (PROGRESS, STARTED, BackendUnavailable("gone"))
    backends = Backends(a=[lost], b=[GOOD])
    sink = await serve(fallback(backends), ask(model="m"))
    assert sink.kinds == ["progress", "started", "delta", "delta", "finished"]
    assert [name for name, _ in backends.seen] == ["a", "b"]
    assert backends.times == [0.0, 0.0]


@pytest.mark.parametrize("failure", [StreamInterrupted("x"), StreamStalled("x")])
@virtual
async def test_a_reply_that_broke_off_before_its_first_delta_is_begun_elsewhere(failure: Failure) -> None:
    backends = Backends(a=[(STARTED, failure)], b=[GOOD])
    sink = await serve(fallback(backends), ask(model="m"))
    assert sink.kinds == ["started", "delta", "delta", "finished"]
    assert [name for name, _ in backends.seen] == ["a", "b"]


@pytest.mark.parametrize("failure", [BackendUnavailable("x"), BackendBusy("x"), BackendError("x")])
@virtual
async def test_after_the_first_delta_nothing_is_tried_again(failure: Failure) -> None:
    backends = Backends(a=[(STARTED, delta("a"), failure)], b=[GOOD])
    sink = Sink()
    with pytest.raises(StreamInterrupted) as caught:
        await serve(fallback(backends), ask(model="m"), sink=sink)
    assert sink.text == "a"
    assert len(backends.seen) == 1
    assert caught.value.metadata["cause"] == failure.reason
    assert caught.value.metadata["backend"] == "a"


@pytest.mark.parametrize("failure", [StreamStalled("x"), StreamInterrupted("x"), ContextExceeded("x")])
@virtual
async def test_after_the_first_delta_what_is_told_truly_stays_as_it_is(failure: Failure) -> None:
    with pytest.raises(type(failure)) as caught:
        await serve(fallback(Backends(a=[(STARTED, delta("a"), failure)])), ask(model="m"))
    assert caught.value is failure or caught.value.__cause__ is failure


@virtual
async def test_what_the_caller_did_wrong_is_never_tried_again() -> None:
    backends = Backends(a=[(InvalidRequest("x"),)], b=[GOOD])
    with pytest.raises(InvalidRequest):
        await serve(fallback(backends), ask(model="m"))
    assert len(backends.seen) == 1


@virtual
async def test_attempts_are_bounded() -> None:
    a, b, c = ([(FirstEventTimeout("x"),)] for _ in range(3))
    backends = Backends(a=a, b=b, c=c, d=[GOOD])
    with pytest.raises(FirstEventTimeout) as caught:
        await serve(fallback(backends, max_attempts=3), ask(model="m"))
    assert [name for name, _ in backends.seen] == ["a", "b", "c"]
    assert caught.value.metadata["attempts"] == (
        "a: FIRST_EVENT_TIMEOUT; b: FIRST_EVENT_TIMEOUT; c: FIRST_EVENT_TIMEOUT"
    )


@virtual
async def test_a_caller_may_ask_for_fewer_attempts() -> None:
    backends = Backends(a=[(BackendUnavailable("x"),)], b=[GOOD])
    request = ask(model="m")
    request.routing.max_attempt_count = 1
    with pytest.raises(BackendUnavailable):
        await serve(fallback(backends), request)
    assert len(backends.seen) == 1


@virtual
async def test_retries_stay_within_the_budget_of_all_calls() -> None:
    service = fallback(Backends(), per_second=1.0)
    for expected in (2, 1):
        backends = Backends(a=[(BackendUnavailable("x"),)], b=[(BackendUnavailable("x"),)])
        service._inner = backends
        with pytest.raises(BackendUnavailable):
            await serve(service, ask(model="m"))
        assert len(backends.seen) == expected


@virtual
async def test_the_next_model_is_asked_when_no_backend_can_serve_the_first() -> None:
    backends = Backends(a=[(ModelNotFound("x"),), GOOD])
    request = ask(model="m")
    request.routing.fallback_models.extend(["n", "m"])
    sink = await serve(fallback(backends), request)
    assert backends.seen == [("a", "m"), ("a", "n")]
    assert sink.kinds[-1] == "finished"
    assert request.model == "m"


@virtual
async def test_a_refused_model_is_followed_by_the_next_one() -> None:
    asked: list[str] = []

    async def inner(call: Call[Request], send: Send) -> None:
        asked.append(call.request.model)
        if call.request.model == "m":
            raise ContextExceeded("too small, says the router")
        await send(FINISHED)

    request = ask(model="m")
    request.routing.fallback_models.append("n")
    await serve(fallback(inner), request)  # type: ignore[arg-type]  # any service will do
    assert asked == ["m", "n"]


@virtual
async def test_the_same_backend_is_tried_again_only_after_all_others_and_a_wait() -> None:
    backends = Backends(a=[(BackendUnavailable("x"),), GOOD], b=[(BackendUnavailable("x"),)])
    await serve(fallback(backends), ask(model="m"))
    assert [name for name, _ in backends.seen] == ["a", "b", "a"]
    assert 0.05 <= backends.times[2] <= 0.1


@virtual
async def test_a_backend_is_given_the_time_it_asks_for() -> None:
    busy = BackendBusy("x", retry_after=timedelta(seconds=2))
    backends = Backends(a=[(busy,), GOOD])
    await serve(fallback(backends), ask(model="m"))
    assert 2.0 < backends.times[1] <= 2.1


@pytest.mark.parametrize(("seconds", "deadline"), [(60.0, None), (2.0, 2.0)])
@virtual
async def test_a_wait_that_is_too_long_is_not_begun(seconds: float, deadline: float | None) -> None:
    busy = BackendBusy("x", retry_after=timedelta(seconds=seconds))
    backends = Backends(a=[(busy,), GOOD])
    with pytest.raises(BackendBusy):
        await serve(fallback(backends), ask(model="m"), deadline=deadline)
    assert now() == 0.0


@virtual
async def test_a_failure_that_does_not_pass_is_not_waited_for() -> None:
    backends = Backends(a=[(BackendError("x"),), GOOD])
    with pytest.raises(BackendError):
        await serve(fallback(backends), ask(model="m"))
    assert (len(backends.seen), now()) == (1, 0.0)


@virtual
async def test_a_backend_that_vanished_meanwhile_ends_the_call() -> None:
    backends = Backends(a=[(BackendUnavailable("x"),)])
    with pytest.raises(BackendUnavailable):
        await serve(fallback(backends), ask(model="m"))
    assert now() < 0.2


@virtual
async def test_the_most_telling_failure_is_raised() -> None:
    backends = Backends(a=[(BackendUnavailable("x"),)], b=[(QueueFull("x"),)], c=[(ModelNotFound("x"),)])
    with pytest.raises(QueueFull) as caught:
        await serve(fallback(backends), ask(model="m"))
    assert caught.value.metadata["attempts"] == ("a: BACKEND_UNAVAILABLE; b: QUEUE_FULL; c: MODEL_NOT_FOUND")


@virtual
async def test_a_failure_without_a_rank_is_raised_as_it_is() -> None:
    class Odd(BackendError):
        reason = "ODD"

    backends = Backends(a=[(Odd("x"),)])
    with pytest.raises(Odd):
        await serve(fallback(backends, max_attempts=1), ask(model="m"))
    unknown = Failure("x")
    unknown.elsewhere = True  # type: ignore[misc]  # for this one
    with pytest.raises(Failure):
        await serve(fallback(Backends(a=[(unknown,)]), max_attempts=1), ask(model="m"))


@virtual
async def test_without_any_backend_the_routers_reason_is_raised() -> None:
    with pytest.raises(NoBackend, match="nobody is left"):
        await serve(fallback(Backends()), ask(model="m"))


@virtual
async def test_another_orchestrator_without_backends_is_passed_over() -> None:
    backends = Backends(a=[(NoBackend("x"),)], b=[GOOD])
    sink = await serve(fallback(backends), ask(model="m"))
    assert sink.kinds[-1] == "finished"


@virtual
async def test_retries_are_told_of() -> None:
    told: list[str] = []
    service = Fallback(
        Backends(a=[(BackendUnavailable("x"),)], b=[GOOD]),
        settings=RetrySettings(),
        budget=RetryBudget(ratio=0.0, per_second=10.0, clock=now),
        source=random.Random(0),
        on_retry=lambda failure: told.append(failure.reason),
    )
    await serve(service, ask(model="m"))
    assert told == ["BACKEND_UNAVAILABLE"]


@virtual
async def test_a_caller_that_leaves_ends_the_attempt() -> None:
    ended = asyncio.Event()

    async def inner(call: Call[Request], send: Send) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.set()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(fallback(inner), ask(model="m")))  # type: ignore[arg-type]  # any service
        await asyncio.sleep(1)
        task.cancel()
    assert ended.is_set()
    assert now() == 1.0


# Deadline.


def deadline(inner: Callable[[Call[Request], Send], Awaitable[None]]) -> Deadline:
    return Deadline(
        inner,
        default=timedelta(seconds=10),
        longest=timedelta(seconds=20),
        margin=timedelta(milliseconds=50),
    )


async def _sleep(call: Call[Request], send: Send) -> None:
    await asyncio.sleep(1000)


@pytest.mark.parametrize(
    ("given", "ends"), [(None, 10.0), (5.0, 4.95), (0.1, 0.09), (1000.0, 20.0), (0.0, 0.0)]
)
@virtual
async def test_every_call_ends(given: float | None, ends: float) -> None:
    with pytest.raises(DeadlineExceeded):
        await serve(deadline(_sleep), ask(), deadline=given)
    assert now() == pytest.approx(ends)


@virtual
async def test_what_is_below_knows_the_deadline() -> None:
    seen: list[float | None] = []

    async def inner(call: Call[Request], send: Send) -> None:
        seen.append(call.deadline)

    await serve(deadline(inner), ask())
    assert seen == [10.0]


@virtual
async def test_a_timeout_from_below_is_not_taken_for_the_deadline() -> None:
    async def inner(call: Call[Request], send: Send) -> None:
        raise TimeoutError("of something else")

    with pytest.raises(TimeoutError, match="of something else"):
        await serve(deadline(inner), ask())


# Route.


class OneBackend:
    """A fleet of one backend that answers as it is told."""

    def __init__(self, *answers: Event) -> None:
        self.answers = answers
        self.calls: list[Call[Request]] = []
        model = pb.Model(id="M:latest", aliases=["alias"])
        self.views = [EndpointView(name="mlx", models=(model, pb.Model(id="other")))]

    def snapshot(self) -> list[EndpointView]:
        return self.views

    def service(self, name: str) -> OneBackend:
        assert name == "mlx"
        return self

    async def __call__(self, call: Call[Request], send: Send) -> None:
        self.calls.append(call)
        for answer in self.answers:
            if isinstance(answer, Failure):
                raise answer
            await send(answer)


def route(fleet: OneBackend) -> Route:
    return Route(fleet=fleet, router=Router(weights=ScorerWeights(), picker="best", source=random.Random(0)))


def started(model: str, *, degraded: bool = False) -> pb.GenerateResponse:
    event = pb.GenerateResponse(started=pb.Started(backend="inner", model=model, request_id="theirs"))
    if degraded:
        event.started.degradations.add(kind=pb.DEGRADATION_KIND_MODEL_SUBSTITUTED, detail="theirs")
    return event


@virtual
async def test_a_backend_is_asked_in_its_own_spelling_and_without_hints_for_us() -> None:
    fleet = OneBackend(started("M:latest"))
    request = ask(model="ALIAS")
    request.routing.backends.append("mlx")
    request.routing.fallback_models.append("other")
    request.routing.priority = pb.PRIORITY_BATCH
    await serve(route(fleet), request, request_id="id")
    sent = fleet.calls[0].request
    assert (sent.model, sent.request_id) == ("M:latest", "id")
    assert sent.routing == pb.RoutingHints(priority=pb.PRIORITY_BATCH)
    assert request.model == "ALIAS"
    await serve(route(fleet), ask(model="alias"))
    assert not fleet.calls[1].request.HasField("routing")


@virtual
async def test_answers_carry_our_name_for_the_backend_and_our_identifier() -> None:
    sink = await serve(route(OneBackend(started(""))), ask(model="m"), request_id="ours")
    answer = sink.events[0]
    assert isinstance(answer, pb.GenerateResponse)
    assert answer.started == pb.Started(backend="mlx", model="M:latest", request_id="ours")


@pytest.mark.parametrize("answered", ["M:latest", "m", "alias"])
@virtual
async def test_an_answer_under_another_spelling_is_the_same_model(answered: str) -> None:
    await serve(route(OneBackend(started(answered))), ask(model="m"))


@virtual
async def test_an_answer_from_another_model_is_an_error() -> None:
    with pytest.raises(WrongModel) as caught:
        await serve(route(OneBackend(started("other"))), ask(model="m"))
    assert caught.value.metadata == {"backend": "mlx", "asked": "M:latest", "answered": "other"}


@virtual
async def test_a_model_that_the_caller_named_may_answer() -> None:
    request = ask(model="m")
    request.routing.fallback_models.append("other")
    await serve(route(OneBackend(started("other"))), request)


@pytest.mark.parametrize("declared", [False, True])
@virtual
async def test_an_accepted_substitution_is_declared_once(declared: bool) -> None:
    request = ask(model="m")
    request.accepted_degradations.append(pb.DEGRADATION_KIND_MODEL_SUBSTITUTED)
    sink = await serve(route(OneBackend(started("other", degraded=declared))), request)
    answer = sink.events[0]
    assert isinstance(answer, pb.GenerateResponse)
    assert [d.kind for d in answer.started.degradations] == [pb.DEGRADATION_KIND_MODEL_SUBSTITUTED]


@virtual
async def test_unary_answers_are_checked_too() -> None:
    embed = pb.EmbedRequest(model="m", texts=["x"])
    sink = await serve(route(OneBackend(pb.EmbedResponse(backend="inner", model="m"))), embed)
    assert sink.events == [pb.EmbedResponse(backend="mlx", model="m")]
    with pytest.raises(WrongModel):
        await serve(
            route(OneBackend(pb.CountTokensResponse(model="other"))), pb.CountTokensRequest(model="m")
        )


@virtual
async def test_a_failure_names_its_backend() -> None:
    failure = BackendUnavailable("x", metadata={"backend": "inner"})
    with pytest.raises(BackendUnavailable) as caught:
        await serve(route(OneBackend(failure)), ask(model="m"))  # type: ignore[arg-type]  # raised instead
    assert caught.value.metadata["backend"] == "mlx"


@virtual
async def test_nobody_to_route_to_is_told() -> None:
    with pytest.raises(ModelNotFound):
        await serve(route(OneBackend()), ask(model="nosuch"))


def test_only_what_the_caller_has_to_mend_is_foreseen() -> None:
    fleet = OneBackend()
    router = Router(weights=ScorerWeights(), picker="best", source=random.Random(0))

    def foreseen(model: str, *others: str) -> Failure | None:
        request = ask(model=model)
        request.routing.fallback_models.extend(others)
        return foresee(Call(request=request), fleet=fleet, router=router)

    missing = foreseen("nosuch", "neither")
    assert isinstance(missing, ModelNotFound)
    assert missing.metadata["model"] == "nosuch"
    assert foreseen("m") is None
    assert foreseen("nosuch", "m") is None, "another model will do"
    fleet.views = [replace(fleet.views[0], is_reachable=False)]
    assert foreseen("m") is None, "it may be back by then"
    assert foreseen("nosuch", "m") is None


@virtual
async def test_decisions_are_told_of_and_put_onto_the_span() -> None:
    told: list[str] = []
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    layer = Route(
        fleet=OneBackend(started("m")),
        router=Router(weights=ScorerWeights(), picker="best", source=random.Random(0)),
        on_decision=lambda decision: told.append(decision.model),
    )
    with provider.get_tracer("test").start_as_current_span("call"):
        await serve(layer, ask("secret words", model="m"))
        with pytest.raises(ModelNotFound):
            await serve(layer, ask("secret words", model="nosuch"))
    (span,) = exporter.get_finished_spans()
    first, second = span.events
    assert first.attributes is not None
    assert second.attributes is not None
    assert first.attributes["forebay.route.chosen"] == "mlx"
    assert second.attributes["forebay.route.mlx"] == "model"
    assert "secret" not in span.to_json()
    assert told == ["m", "nosuch"]
