"""Aliases share permits, errors name every attempt, and broken promises are remembered."""

from __future__ import annotations

import asyncio
import random

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    Attempt,
    BackendError,
    BackendUnavailable,
    Failure,
    FormatViolated,
    InvalidRequest,
    QueueFull,
    StreamInterrupted,
    from_status,
)
from forebay.kit.pipeline import Call, Request, Send, Service
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import BackendSettings, RetrySettings, ScorerWeights
from forebay.orchestrator.fleet.capacity import Capacity
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.fleet.trust import Trust
from forebay.orchestrator.layers.admit import Admit
from forebay.orchestrator.layers.fallback import Fallback
from forebay.orchestrator.layers.verify import Verify
from forebay.orchestrator.routing.router import Router
from forebay.testing.calls import ask, serve
from forebay.testing.clock import now, virtual

SCHEMA = pb.CAPABILITY_JSON_SCHEMA


def endpoint(
    name: str, *models: pb.Model, aliases: dict[str, str] | None = None, weight: float = 1.0
) -> Endpoint:
    settings = BackendSettings.model_validate({"name": name, "address": "127.0.0.1:1", "weight": weight})
    made = Endpoint(settings, aliases=aliases or {}, clock=now, source=random.Random(0))
    made.found_serving()
    made.list_models(models)
    return made


# Permits.


@virtual
async def test_two_aliases_of_one_model_share_its_permits() -> None:
    backend = endpoint("a", pb.Model(id="m", slot_count=2), aliases={"fast": "m", "small": "m"})
    capacity = Capacity([backend], unknown=100, clock=now)
    assert {capacity.pool(name) for name in ("m", "M", "fast", "small")} == {"a/m"}
    admission = Admission(queue=10, ageing=10.0, capacity=capacity, clock=now)
    most = active = 0

    async def inner(call: Call[Request], send: Send) -> None:
        nonlocal most, active
        active += 1
        most = max(most, active)
        await asyncio.sleep(1.0)
        active -= 1

    layer = Admit(inner, admission=admission, pool=capacity.pool)
    async with asyncio.TaskGroup() as group:
        for name in ("fast", "small", "m", "fast", "small", "m"):
            group.create_task(serve(layer, ask(model=name)))
    assert most == 2
    assert now() == 3.0


@virtual
async def test_a_name_that_means_more_has_a_pool_of_its_own() -> None:
    one = endpoint("one", pb.Model(id="m", slot_count=2), aliases={"chat": "m"})
    two = endpoint("two", pb.Model(id="org/n", slot_count=3), aliases={"chat": "org/n"})
    capacity = Capacity([one, two], unknown=100, clock=now)
    assert capacity(capacity.pool("chat")) == 5
    assert capacity(capacity.pool("org/n")) == 3
    assert capacity(capacity.pool("nobody/has-it")) == 100
    assert capacity.pool("chat") == "one/m\ntwo/org/n"
    two.list_models([])  # both answers hold for a moment
    assert capacity(capacity.pool("chat")) == 5
    await asyncio.sleep(1.0)
    assert capacity(capacity.pool("chat")) == 2
    assert capacity("one/m\ntwo/org/n") == 2, "what a waiting call was taken for is gone on one backend"


# Attempts.


def failing(*failures: Failure) -> Service:
    """Returns a service whose attempts fail one after the other, on backends a, b, c."""
    left = list(zip("abcdefghij", failures, strict=False))

    async def inner(call: Call[Request], send: Send) -> None:
        name, failure = left.pop(0)
        failure.metadata["backend"] = name
        if isinstance(failure, BackendError):
            await send(pb.GenerateResponse(started=pb.Started(backend=name, model="m")))
            await send(pb.GenerateResponse(delta=pb.Delta(text="x")))
        raise failure

    return inner


def fallback(inner: Service, **settings: object) -> Fallback:
    return Fallback(
        inner,
        settings=RetrySettings.model_validate(settings),
        budget=RetryBudget(ratio=1.0, per_second=100.0, clock=now),
        source=random.Random(0),
    )


def over_the_wire(failure: Failure) -> tuple[Attempt, ...]:
    read = from_status(failure.to_status())
    assert read is not None
    return read.attempts


@virtual
async def test_the_last_error_names_every_attempt_with_its_reason() -> None:
    def both() -> Service:
        return failing(BackendUnavailable("x"), QueueFull("x"))

    with pytest.raises(BackendUnavailable) as caught:
        await serve(fallback(both(), max_attempts=1), ask(model="m"))
    assert over_the_wire(caught.value) == (Attempt("a", "BACKEND_UNAVAILABLE", "m"),)
    with pytest.raises(QueueFull) as full:
        await serve(fallback(both(), max_attempts=2), ask(model="m"))
    assert over_the_wire(full.value) == (
        Attempt("a", "BACKEND_UNAVAILABLE", "m"),
        Attempt("b", "QUEUE_FULL", "m"),
    )


@pytest.mark.parametrize(
    ("last", "kind", "reason"),
    [
        (InvalidRequest("x"), InvalidRequest, "INVALID_REQUEST"),
        (BackendError("x"), StreamInterrupted, "BACKEND_ERROR"),
    ],
)
@virtual
async def test_an_attempt_that_ends_the_call_at_once_is_named_with_those_before(
    last: Failure, kind: type[Failure], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        await serve(fallback(failing(BackendUnavailable("x"), last)), ask(model="m"))
    assert over_the_wire(caught.value) == (
        Attempt("a", "BACKEND_UNAVAILABLE", "m"),
        Attempt("b", reason, "m"),
    )


@virtual
async def test_an_orchestrator_behind_ours_is_believed_about_its_own_attempts() -> None:
    below = BackendUnavailable("x")
    below.attempts = (Attempt("x", "QUEUE_FULL", "m"), Attempt("y", "BACKEND_UNAVAILABLE", "m"))
    with pytest.raises(BackendUnavailable) as caught:
        await serve(fallback(failing(below), max_attempts=1), ask(model="m"))
    assert [each.backend for each in caught.value.attempts] == ["x", "y"]


def test_attempts_fit_the_trailers_however_many_there_are() -> None:
    failure = BackendUnavailable("x" * 5000, metadata={f"k{i}": "v" * 999 for i in range(99)})
    failure.attempts = tuple(Attempt("ä" * 999, "R" * 999, "m" * 999) for _ in range(99))
    status = failure.to_status()
    assert len(over_the_wire(failure)) == 6
    assert status.ByteSize() < 4096 + 1024 + 6 * 3 * 52


# Promises.


def test_a_promise_that_is_broken_costs_trust_and_kept_ones_win_it_back() -> None:
    time = 0.0
    trust = Trust(clock=lambda: time)
    trust.note("m", SCHEMA, kept=True)
    assert trust.doubts() == {}
    trust.note("m", SCHEMA, kept=False)
    trust.note("m", SCHEMA, kept=False)
    assert trust.doubts() == {("m", SCHEMA): pytest.approx(0.75)}
    trust.note("m", SCHEMA, kept=True)
    assert trust.doubts()["m", SCHEMA] == pytest.approx(0.525)
    for _ in range(20):
        trust.note("m", SCHEMA, kept=True)
    assert trust.doubts() == {}


def test_doubt_is_forgotten_with_time_and_with_a_restart() -> None:
    time = 0.0
    trust = Trust(clock=lambda: time)
    trust.note("m", SCHEMA, kept=False)
    time = 600.0
    assert trust.doubts()["m", SCHEMA] == pytest.approx(0.25)
    time = 6000.0
    assert trust.doubts() == {}
    trust.note("m", SCHEMA, kept=False)
    trust.forget()
    assert trust.doubts() == {}


def answering(text: str, *, continued: bool = False) -> Service:
    async def inner(call: Call[Request], send: Send) -> None:
        await send(pb.GenerateResponse(started=pb.Started(backend="a", model="m")))
        if continued:
            await send(pb.GenerateResponse(continued=pb.Continued(backend="b")))
        await send(pb.GenerateResponse(delta=pb.Delta(text=text)))
        await send(pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP)))

    return inner


@pytest.mark.parametrize(("text", "kept"), [("{}", False), ('{"a": 1}', True), ("no json", False)])
@virtual
async def test_each_reply_with_a_format_tells_how_the_backend_kept_its_word(text: str, kept: bool) -> None:
    judged: list[tuple[str, str, int, bool]] = []
    request = ask(model="m")
    request.output_format.json_schema = '{"type": "object", "required": ["a"]}'
    layer = Verify(answering(text), judge=lambda *each: judged.append(each))
    try:
        await serve(layer, request)
    except FormatViolated:
        assert not kept
    assert judged == [("a", "m", SCHEMA, kept)]


Delta, MODE = pb.Delta, pb.ToolChoice


@pytest.mark.parametrize(
    ("asked", "delta", "reason", "expected"),
    [
        ({"logprobs": pb.LogprobOptions()}, Delta(text="x", logprobs=[pb.TokenLogprob()]), "STOP", [True]),
        ({"logprobs": pb.LogprobOptions()}, Delta(text="x"), "STOP", [False]),
        ({"include_token_ids": True}, Delta(text="x", token_ids=[1]), "LENGTH", [True]),
        ({"include_token_ids": True}, Delta(text="x"), "LENGTH", [False]),
        ({"include_token_ids": True}, Delta(reasoning="x"), "LENGTH", []),
        ({"tools": [pb.Tool(name="t")]}, Delta(tool_call=pb.ToolCallDelta()), "TOOL_CALLS", [True]),
        ({"tools": [pb.Tool(name="t")]}, Delta(text="none needed"), "STOP", []),
        (
            {"tools": [pb.Tool(name="t")], "tool_choice": MODE(mode=MODE.MODE_REQUIRED)},
            Delta(text="no"),
            "STOP",
            [False],
        ),
        (
            {
                "logprobs": pb.LogprobOptions(),
                "accepted_degradations": [pb.DEGRADATION_KIND_OPTION_IGNORED],
            },
            Delta(text="x"),
            "STOP",
            [],
        ),
        ({}, Delta(text="x"), "STOP", []),
    ],
)
@virtual
async def test_what_a_reply_shows_of_a_capability_is_told(
    asked: dict[str, object], delta: pb.Delta, reason: str, expected: list[bool]
) -> None:
    async def inner(call: Call[Request], send: Send) -> None:
        await send(pb.GenerateResponse(started=pb.Started(backend="a", model="m")))
        await send(pb.GenerateResponse(delta=delta))
        ended = pb.FinishReason.Value(f"FINISH_REASON_{reason}")
        await send(pb.GenerateResponse(finished=pb.Finished(reason=ended)))

    judged: list[tuple[str, str, int, bool]] = []
    request = pb.GenerateRequest(model="m", **asked)  # type: ignore[arg-type]  # the message checks them
    await serve(Verify(inner, judge=lambda *each: judged.append(each)), request)
    assert [(backend, model, kept) for backend, model, _, kept in judged] == [
        ("a", "m", kept) for kept in expected
    ]


@virtual
async def test_what_a_model_was_seen_to_do_counts_as_probed_until_it_fails_at_it_or_comes_back_anew() -> None:
    claim = pb.CapabilityReport(capability=SCHEMA, support=pb.CapabilityReport.SUPPORT_YES)
    listed = [pb.Model(id="m", capabilities=[claim]), pb.Model(id="n", capabilities=[claim])]
    backend = endpoint("a", *listed)

    def probed() -> list[tuple[str, int]]:
        return [
            (model.id, report.capability)
            for model in backend.to_proto().models
            for report in model.capabilities
            if report.probed and report.support == pb.CapabilityReport.SUPPORT_YES
        ]

    assert probed() == []
    backend.judge("m", SCHEMA, kept=True)
    backend.judge("m", pb.CAPABILITY_LOGPROBS, kept=True)  # of which it said nothing
    known = [("m", SCHEMA), ("m", pb.CAPABILITY_LOGPROBS)]
    assert probed() == known
    before = backend.models
    backend.judge("m", SCHEMA, kept=True)
    backend.list_models(listed)
    assert backend.models is before, "nothing is new"
    backend.judge("m", SCHEMA, kept=False)
    assert probed() == [("m", pb.CAPABILITY_LOGPROBS)]
    backend.judge("m", SCHEMA, kept=True)
    assert probed() == known
    backend.lose("gone")
    backend.found_serving()
    assert probed() == []


@virtual
async def test_calls_go_where_what_they_need_was_seen_to_work() -> None:
    claim = pb.CapabilityReport(capability=SCHEMA, support=pb.CapabilityReport.SUPPORT_YES)
    model = pb.Model(id="m", state=pb.Model.STATE_ACTIVE, capabilities=[claim])
    said, seen = endpoint("said", model), endpoint("seen", model)
    seen.judge("m", SCHEMA, kept=True)
    router = Router(weights=ScorerWeights(), picker="best", source=random.Random(0))
    request = ask(model="m")
    request.output_format.any_json = True
    decision = router.decide(request, [said.view(), seen.view()])
    assert [(each.name, each.scores["proven"]) for each in decision.candidates] == [
        ("seen", 1.0),
        ("said", 0.5),
    ]


@virtual
async def test_a_reply_of_several_backends_is_held_against_none() -> None:
    judged: list[object] = []
    request = ask(model="m")
    request.output_format.any_json = True
    layer = Verify(answering("no", continued=True), judge=lambda *each: judged.append(each))
    with pytest.raises(FormatViolated):
        await serve(layer, request)
    assert judged == []


@virtual
async def test_calls_that_rely_on_a_broken_promise_go_where_it_is_kept() -> None:
    proven = pb.CapabilityReport(capability=SCHEMA, support=pb.CapabilityReport.SUPPORT_YES, probed=True)
    plain = pb.CapabilityReport(
        capability=pb.CAPABILITY_GENERATE, support=pb.CapabilityReport.SUPPORT_YES, probed=True
    )
    model = pb.Model(id="m", state=pb.Model.STATE_ACTIVE, capabilities=[plain, proven])
    liar, other = endpoint("liar", model), endpoint("other", model, weight=0.5)
    router = Router(weights=ScorerWeights(), picker="best", source=random.Random(0))
    request = ask(model="m")
    request.output_format.any_json = True

    def chosen() -> str:
        decision = router.decide(request, [liar.view(), other.view()])
        assert decision.chosen is not None
        return decision.chosen.name

    assert chosen() == "liar"
    liar.trust.note("m", SCHEMA, kept=False)
    assert chosen() == "other"
    liar.lose("gone")
    liar.found_serving()
    assert chosen() == "liar", "it came back, perhaps as another version"


@virtual
async def test_a_backend_that_breaks_its_word_still_gets_its_other_calls() -> None:
    model = pb.Model(id="m", state=pb.Model.STATE_ACTIVE)
    liar = endpoint("liar", model)
    before = liar.view()
    liar.trust.note("m", SCHEMA, kept=False)
    router = Router(weights=ScorerWeights(), picker="best", source=random.Random(0))
    was, now_is = (router.decide(ask(model="m"), [view]).chosen for view in (before, liar.view()))
    assert was is not None
    assert now_is is not None
    assert was.total == now_is.total
