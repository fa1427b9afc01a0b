"""Where calls go, and what people are told of it."""

from __future__ import annotations

import dataclasses
import random

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendNotFound,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    ModelNotFound,
    ModelQuarantined,
    NoBackend,
    QueueFull,
)
from forebay.orchestrator.config import ScorerWeights
from forebay.orchestrator.routing.classify import classify
from forebay.orchestrator.routing.names import find_model, is_same
from forebay.orchestrator.routing.pickers import best, two
from forebay.orchestrator.routing.router import Decision, Router
from forebay.orchestrator.routing.view import EndpointView


def model(name: str = "m", *, no: tuple[int, ...] = (), **fields: object) -> pb.Model:
    made = pb.Model(id=name, **{"state": pb.Model.STATE_ACTIVE, **fields})
    for capability in no:
        made.capabilities.add(capability=capability, support=pb.CapabilityReport.SUPPORT_NO)
    return made


def view(name: str, *models: pb.Model, **fields: object) -> EndpointView:
    made = EndpointView(name=name, models=models or (model(),))
    return dataclasses.replace(made, **fields)


def ask(text: str = "hello", *, name: str = "m", **fields: object) -> pb.GenerateRequest:
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])
    return pb.GenerateRequest(model=name, messages=[message], **fields)


def router(picker: str = "best") -> Router:
    return Router(weights=ScorerWeights(), picker=picker, source=random.Random(0))


def decide(
    request: pb.GenerateRequest | pb.EmbedRequest, *views: EndpointView, tried: frozenset[str] = frozenset()
) -> Decision:
    return router().decide(request, views, tried=tried)


def why(request: pb.GenerateRequest | pb.EmbedRequest, *views: EndpointView, **fields: object) -> Failure:
    decision = decide(request, *views, **fields)
    assert decision.chosen is None
    return decision.failure()


# Names.


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("Llama3.2", "Llama3.2"),
        ("llama3.2", "llama3.2:latest"),
        ("LLAMA3.2:LATEST", "llama3.2:latest"),
        ("qwen", "Qwen/Qwen3"),
        ("QWEN", "Qwen/Qwen3"),
        ("big", "big:latest"),
        ("bigger", None),
        ("", None),
    ],
)
def test_a_name_is_matched_from_the_strictest_reading_to_the_loosest(asked: str, found: str | None) -> None:
    models = [
        pb.Model(id="llama3.2:latest"),
        pb.Model(id="Llama3.2"),
        pb.Model(id="Qwen/Qwen3", aliases=["qwen"]),
        pb.Model(id="big:latest"),
    ]
    if asked == "llama3.2":
        # An equal name in other letters is nearer than a tag that is left out.
        assert find_model(asked, models) == models[1]
        models.pop(1)
    match = find_model(asked, models)
    assert (match.id if match is not None else None) == found


def test_an_exact_name_goes_before_another_models_alias() -> None:
    models = [pb.Model(id="a", aliases=["b"]), pb.Model(id="b")]
    assert find_model("b", models) == models[1]


def test_two_names_of_one_model_are_the_same() -> None:
    models = [pb.Model(id="long/name", aliases=["short"]), pb.Model(id="other")]
    assert is_same("short", "long/name", models)
    assert is_same("x", "X:latest", models)
    assert not is_same("short", "other", models)
    assert not is_same("short", "unknown", models)


# Classes.


def image() -> pb.Part:
    return pb.Part(image=pb.Blob(media_type="image/png", data=b"x"))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ask(), "chat"),
        (ask(tools=[pb.Tool(name="t")]), "tools"),
        (ask(output_format=pb.OutputFormat(json_schema="{}")), "schema"),
        (ask("x" * 40_000), "long_context"),
        (ask("```py\n```"), "code"),
        (ask(routing=pb.RoutingHints(priority=pb.PRIORITY_BATCH)), "batch"),
        (
            pb.GenerateRequest(
                messages=[pb.Message(parts=[image()])], tools=[pb.Tool(name="t")], include_token_ids=True
            ),
            "vision",
        ),
        (pb.EmbedRequest(texts=["a"]), "embedding"),
        (pb.CountTokensRequest(), "count_tokens"),
    ],
)
def test_a_request_is_classed_by_what_narrows_the_choice_most(request_: object, expected: str) -> None:
    traits = classify(request_)  # type: ignore[arg-type]  # one of the three kinds
    assert traits.request_class == expected
    assert traits.reasons


def test_every_rule_that_matched_is_told() -> None:
    request = ask("```", tools=[pb.Tool(name="t")])
    assert classify(request).reasons == ("it offers 1 tool(s)", "it has a fenced code block")


def test_a_request_needs_what_it_uses() -> None:
    request = ask(
        tools=[pb.Tool(name="t")],
        output_format=pb.OutputFormat(regex="a"),
        logprobs=pb.LogprobOptions(),
        continue_from=pb.ReplyPrefix(text="x"),
        include_token_ids=True,
        limits=pb.GenerationLimits(stop_token_ids=[3]),
    )
    assert classify(request).needs == {
        pb.CAPABILITY_GENERATE,
        pb.CAPABILITY_TOOLS,
        pb.CAPABILITY_GRAMMAR,
        pb.CAPABILITY_LOGPROBS,
        pb.CAPABILITY_CONTINUE,
        pb.CAPABILITY_TOKEN_IDS,
        pb.CAPABILITY_STOP_TOKEN_IDS,
    }


def test_an_accepted_shortfall_is_no_need() -> None:
    request = ask(tools=[pb.Tool(name="t")], accepted_degradations=[pb.DEGRADATION_KIND_TOOLS_DROPPED])
    assert classify(request).needs == {pb.CAPABILITY_GENERATE}


# Filters, and the failure where all refuse.

LONG = ask("one word and another " * 5000)

DOWN = {"is_reachable": False, "is_serving": False, "detail": "nothing listens"}


@pytest.mark.parametrize(
    ("endpoint", "request_", "filter_"),
    [
        (view("a"), ask(routing=pb.RoutingHints(backends=["b"])), "allowed"),
        (view("a", model("other")), ask(), "model"),
        (view("a", are_models_known=False, models=()), ask(), "model"),
        (view("a", model(state=pb.Model.STATE_QUARANTINED)), ask(), "quarantine"),
        (view("a", model(no=(pb.CAPABILITY_TOOLS,))), ask(tools=[pb.Tool(name="t")]), "capability"),
        (view("a", model(context_token_count=2)), ask("x" * 1000), "context"),
        (view("a", model(context_token_count=131_072, loaded_context_token_count=4096)), LONG, "context"),
        (view("a", **DOWN), ask(), "reachable"),
        (view("a", **{**DOWN, "detail": ""}), ask(), "reachable"),
        (view("a", is_serving=False), ask(), "serving"),
        (view("a", is_drained=True), ask(), "drained"),
        (view("a", can_admit=False, is_ejected=True, cause="X", reopens_in=2.0), ask(), "breaker"),
        (view("a", can_admit=False, is_ejected=True, is_probing=True), ask(), "breaker"),
        (view("a", refused_models=frozenset({"m"})), ask(), "breaker"),
        (view("a", slots=1, queue=1, outstanding=2), ask(), "room"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_with_a_reason(
    endpoint: EndpointView, request_: pb.GenerateRequest, filter_: str
) -> None:
    decision = decide(request_, endpoint, view("b"))
    assert decision.chosen is not None
    assert decision.chosen.name == "b"
    refused = decision.candidates[-1]
    assert (refused.name, refused.refused_by) == ("a", filter_)
    assert refused.detail


def test_what_is_unknown_is_no_reason_to_refuse() -> None:
    decision = decide(ask("x" * 100_000, tools=[pb.Tool(name="t")]), view("a"))
    assert decision.chosen is not None
    assert decision.chosen.spelling == "m"


def test_a_backend_that_failed_the_call_is_not_chosen_again() -> None:
    decision = decide(ask(), view("a"), view("b"), tried=frozenset({"a"}))
    assert decision.chosen is not None
    assert decision.chosen.name == "b"
    assert isinstance(why(ask(), view("a"), tried=frozenset({"a"})), NoBackend)


def test_no_backend_says_why_for_each() -> None:
    failure = why(ask(), view("a", **DOWN), view("b", is_drained=True))
    assert isinstance(failure, NoBackend)
    assert "a: nothing listens" in failure.message
    assert "b: an operator drained it" in failure.message
    assert failure.metadata["refused.a"] == "reachable"
    assert failure.metadata["refused.b"] == "drained"


def test_a_model_that_nobody_has_is_not_found_even_if_one_backend_was_never_reached() -> None:
    absent = view("b", models=(), are_models_known=False, **DOWN)
    assert isinstance(why(ask(), view("a", model("x")), absent), ModelNotFound)
    assert isinstance(why(ask(), absent), NoBackend)


def test_a_model_whose_only_backend_is_down_is_not_called_unknown() -> None:
    assert isinstance(why(ask(), view("a", model("x")), view("b", **DOWN)), NoBackend)


def test_what_no_model_can_do_is_unsupported() -> None:
    lacking = view("a", model(no=(pb.CAPABILITY_EMBED,)))
    assert isinstance(why(pb.EmbedRequest(model="m", texts=["x"]), lacking), CapabilityUnsupported)


def test_what_does_not_fit_the_context_as_it_is_loaded_is_refused_unless_it_may_be_cut() -> None:
    loaded = view("a", model(context_token_count=131_072, loaded_context_token_count=4096))
    refused = decide(LONG, loaded)
    assert refused.chosen is None
    assert refused.candidates[0].detail == (
        "the text has at least 10000 tokens and the context as it is loaded holds 4096"
    )
    assert isinstance(refused.failure(), ContextExceeded)
    may = pb.GenerateRequest()
    may.CopyFrom(LONG)
    may.accepted_degradations.append(pb.DEGRADATION_KIND_PROMPT_TRUNCATED)
    assert decide(may, loaded).chosen is not None
    assert decide(LONG, view("a", model(context_token_count=131_072))).chosen is not None


def test_what_fits_no_context_is_said_to_exceed_it() -> None:
    assert isinstance(why(ask("x" * 1000), view("a", model(context_token_count=1))), ContextExceeded)


def test_a_quarantined_model_is_named_as_such() -> None:
    failure = why(ask(), view("a", model(state=pb.Model.STATE_QUARANTINED)), view("b", model("x")))
    assert isinstance(failure, ModelQuarantined)


def test_a_full_fleet_says_when_to_come_back() -> None:
    full = {"slots": 1, "queue": 0, "outstanding": 1}
    failure = why(ask(), view("a", **full), view("b", is_drained=True))
    assert isinstance(failure, QueueFull)
    assert failure.retry_after


def test_an_unknown_backend_in_the_hints_is_an_error() -> None:
    with pytest.raises(BackendNotFound, match="nosuch"):
        decide(ask(routing=pb.RoutingHints(backends=["nosuch"])), view("a"))


# The last resort.

RESTING = {"can_admit": False, "is_ejected": True, "cause": "X", "reopens_in": 3.0}


def test_an_ejected_backend_serves_where_there_is_no_other() -> None:
    decision = decide(ask(), view("a", **RESTING), view("b", is_drained=True))
    assert decision.chosen is not None
    assert decision.chosen.name == "a"
    assert decision.is_last_resort


def test_an_ejected_backend_rests_where_there_is_another() -> None:
    decision = decide(ask(), view("a", **RESTING), view("b"))
    assert decision.chosen is not None
    assert (decision.chosen.name, decision.is_last_resort) == ("b", False)


def test_one_call_at_a_time_tries_the_last_resort() -> None:
    failure = why(ask(), view("a", is_probing=True, **RESTING))
    assert isinstance(failure, NoBackend)
    assert failure.retry_after is not None
    assert failure.retry_after.total_seconds() == 3.0


def test_a_backend_that_is_ejected_and_drained_is_no_last_resort() -> None:
    assert isinstance(why(ask(), view("a", is_drained=True, **RESTING)), NoBackend)


def test_a_backend_on_probation_gets_the_next_call_that_may_go_anywhere() -> None:
    probation = view("b", is_ejected=True, success_rate=0.0, first_delta=9.0)
    decision = decide(ask(), view("a"), probation)
    assert decision.chosen is not None
    assert decision.chosen.name == "b"
    ordered = decide(ask(routing=pb.RoutingHints(backends=["a", "b"])), view("a"), probation)
    assert ordered.chosen is not None
    assert ordered.chosen.name == "a"


# Scores.


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (view("b"), view("a", model(state=pb.Model.STATE_AVAILABLE))),
        (view("b"), view("a", model(state=pb.Model.STATE_LOADING))),
        (view("b"), view("a", model(state=pb.Model.STATE_UNSPECIFIED))),
        (view("b"), view("a", outstanding=3)),
        (view("b", slots=8, outstanding=2), view("a", slots=2, outstanding=2)),
        (view("b", first_delta=0.1), view("a", first_delta=2.0)),
        (view("b"), view("a", success_rate=0.5)),
        (view("b"), view("a", weight=0.5)),
        (view("b"), view("a", model(loaded_context_token_count=1))),
    ],
)
def test_the_better_backend_is_chosen(better: EndpointView, worse: EndpointView) -> None:
    decision = decide(ask(), worse, better)
    assert [candidate.name for candidate in decision.candidates] == ["b", "a"]
    assert decision.chosen == decision.candidates[0]
    assert all(0.0 <= score <= 1.0 for c in decision.candidates for score in (*c.scores.values(), c.total))


def test_the_callers_order_goes_before_everything_else() -> None:
    request = ask(routing=pb.RoutingHints(backends=["b", "a"]))
    worse = view("b", model(state=pb.Model.STATE_AVAILABLE), outstanding=9, success_rate=0.1, first_delta=9.0)
    decision = decide(request, view("a"), worse)
    assert decision.chosen is not None
    assert decision.chosen.name == "b"
    assert "preference" in decision.chosen.scores


def test_without_weights_every_backend_is_equal() -> None:
    nothing = ScorerWeights.model_validate(dict.fromkeys(ScorerWeights.model_fields, 0.0))
    decision = Router(weights=nothing, picker="best", source=random.Random(0)).decide(ask(), [view("a")])
    assert decision.chosen is not None
    assert decision.chosen.total == 0.0


def test_equals_share_the_calls() -> None:
    decider = router()
    chosen = [decider.decide(ask(), [view("a"), view("b")]).chosen for _ in range(200)]
    names = [candidate.name for candidate in chosen if candidate is not None]
    assert 60 < names.count("a") < 140


@pytest.mark.parametrize(("picker", "picked"), [("best", {"a"}), ("two", {"a", "b"})])
def test_the_picker_is_the_configured_one(picker: str, picked: set[str]) -> None:
    views = [view("a"), view("b", weight=0.5), view("c", weight=0.1)]
    decider = Router(weights=ScorerWeights(), picker=picker, source=random.Random(0))
    chosen = [decider.decide(ask(), views).chosen for _ in range(60)]
    assert {candidate.name for candidate in chosen if candidate is not None} == picked


def test_two_random_choices_never_take_the_worst_of_three() -> None:
    source = random.Random(0)
    picks = {two([0.9, 0.5, 0.1], source) for _ in range(200)}
    assert picks == {0, 1}
    assert two([0.3], source) == 0


def test_the_best_is_the_best() -> None:
    assert best([0.1, 0.9, 0.5], random.Random(0)) == 1
    assert router("two").decide(ask(), [view("a")]).chosen is not None
