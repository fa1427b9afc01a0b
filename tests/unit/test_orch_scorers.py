"""What makes one backend better than another, and what can never do so."""

from __future__ import annotations

import dataclasses
import random

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendUnavailable, InvalidRequest
from forebay.kit.pipeline import Call, Request, Send
from forebay.kit.prefixes import digests
from forebay.orchestrator.config import AffinitySettings, ScorerWeights
from forebay.orchestrator.layers.route import Route
from forebay.orchestrator.routing.affinity import MOST_MESSAGES, Affinity, shares
from forebay.orchestrator.routing.filters import FILTERS
from forebay.orchestrator.routing.router import Decision, Router
from forebay.orchestrator.routing.scorers import SCORERS
from forebay.orchestrator.routing.view import BUCKETS, EndpointView, Figures
from forebay.testing.calls import Sink

CASES = 800
"""Fleets and requests drawn at random. A second or two."""


class Clock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def figures(
    *,
    prefill: float | None = None,
    decode: float | None = None,
    duration: float | None = None,
    first_deltas: tuple[float | None, ...] = (None,) * len(BUCKETS),
) -> Figures:
    return Figures(
        call_count=5,
        error_ratio=0.0,
        duration=duration,
        prefill_rate=prefill,
        decode_rate=decode,
        first_deltas=first_deltas,
    )


def model(state: pb.Model.State.ValueType = pb.Model.STATE_ACTIVE, **fields: object) -> pb.Model:
    return pb.Model(id="m", state=state, **fields)  # type: ignore[arg-type]  # the message checks them


def view(name: str = "a", of: pb.Model | None = None, **fields: object) -> EndpointView:
    return EndpointView(name=name, models=(of or model(),), **fields)  # type: ignore[arg-type]  # checked there


def said(role: pb.Role.ValueType, text: str) -> pb.Message:
    return pb.Message(role=role, parts=[pb.Part(text=text)])


def ask(*texts: str, **fields: object) -> pb.GenerateRequest:
    roles = (pb.ROLE_USER, pb.ROLE_ASSISTANT)
    messages = [said(roles[place % 2], text) for place, text in enumerate(texts or ("hello",))]
    return pb.GenerateRequest(model="m", messages=messages, **fields)  # type: ignore[arg-type]  # as above


def router(affinity: Affinity | None = None, source: random.Random | None = None) -> Router:
    return Router(
        weights=ScorerWeights(), picker="best", source=source or random.Random(0), affinity=affinity
    )


def scores(decision: Decision) -> dict[str, dict[str, float]]:
    return {each.name: dict(each.scores) for each in decision.candidates}


def score(name: str, request: pb.GenerateRequest, *views: EndpointView) -> dict[str, float]:
    return {backend: found[name] for backend, found in scores(router().decide(request, views)).items()}


# One by one.


def test_a_model_that_has_to_be_loaded_is_expected_to_answer_as_much_later_as_its_last_load_took() -> None:
    cold = model(pb.Model.STATE_AVAILABLE)
    cold.load_duration.FromMilliseconds(9000)
    loading = model(pb.Model.STATE_LOADING)
    loading.load_duration.FromMilliseconds(9000)
    warm = {"figures": {"m": figures(first_deltas=(1.0,) * 5)}}
    found = score("latency", ask(), view("a", **warm), view("b", cold, **warm), view("c", loading, **warm))
    assert found == {"a": 1 / 2, "b": 1 / 11, "c": 1 / 6.5}


def test_a_load_that_was_never_measured_takes_longer_for_a_larger_model() -> None:
    small = model(pb.Model.STATE_AVAILABLE, disk_bytes=10**9)
    large = model(pb.Model.STATE_AVAILABLE, memory_bytes=40 * 10**9)
    unknown = model(pb.Model.STATE_AVAILABLE)
    found = score("latency", ask(), view("a", small), view("b", unknown), view("c", large))
    assert found["a"] > found["b"] > found["c"]


def test_a_long_prompt_goes_to_who_reads_fast_and_a_short_one_to_who_begins_soon() -> None:
    slow_start = view("a", figures={"m": figures(prefill=4000.0, first_deltas=(2.0, None, None, None, None))})
    slow_read = view("b", figures={"m": figures(prefill=100.0, first_deltas=(0.2, None, None, None, None))})
    short = score("latency", ask("x" * 100), slow_start, slow_read)
    assert short["b"] > short["a"]
    long = score("latency", ask("x" * 20_000), slow_start, slow_read)
    assert long["a"] > long["b"]


def test_without_measurements_of_the_model_those_of_the_backend_count_and_else_a_guess() -> None:
    found = score("latency", ask(), view("a", first_delta=3.0), view("b"))
    assert found == {"a": 0.25, "b": 1 / 1.5}


def test_embeddings_are_expected_to_take_as_long_as_they_took() -> None:
    request = pb.EmbedRequest(model="m", texts=["x"])
    measured = view("a", figures={"m": figures(duration=3.0)})
    fresh = view("b", figures={"m": figures()})
    found = scores(router().decide(request, [measured, fresh, view("c")]))
    assert [found[name]["latency"] for name in "abc"] == [0.25, 1 / 1.5, 1 / 1.5]


def test_a_queue_is_expected_to_take_as_long_as_calls_take() -> None:
    quick = {"m": figures(duration=1.0, first_deltas=(1.0,) * 5)}
    slow = {"m": figures(duration=10.0, first_deltas=(1.0,) * 5)}
    found = score(
        "latency",
        ask(),
        view("a", slots=2, outstanding=1, figures=slow),
        view("b", slots=2, outstanding=3, figures=quick, queue=8),
        view("c", model(slot_count=2), outstanding=3, figures=slow),
        view("d", slots=1, outstanding=1, queue=8),
    )
    assert found["a"] == 1 / 2
    assert found["b"] == 1 / 3  # two wait for two slots of one second
    assert found["c"] == 1 / 12
    assert found["d"] == 1 / 6.5


def test_speed_is_told_where_somebody_was_measured() -> None:
    fast, slow = {"m": figures(decode=60.0)}, {"m": figures(decode=5.0)}
    found = score("speed", ask(), view("a", figures=fast), view("b", figures=slow), view("c"))
    assert found == {"a": 0.75, "b": 0.2, "c": 0.5}
    assert "speed" not in scores(router().decide(ask(), [view("a"), view("b")]))["a"]


def test_tokens_due_count_and_not_only_calls() -> None:
    found = score(
        "tokens",
        ask(),
        view("a", outstanding=1, outstanding_tokens=200.0, slots=1, queue=9),
        view("b", outstanding=1, outstanding_tokens=30_000.0, slots=1, queue=9),
        view("c", outstanding=1, outstanding_tokens=30_000.0, slots=16),
    )
    assert found["a"] > found["c"] > found["b"]


def test_a_model_is_loaded_where_there_is_room_for_it() -> None:
    cold = model(pb.Model.STATE_AVAILABLE, memory_bytes=4 * 2**30)
    gib = 2**30
    memories = {
        "roomy": pb.Memory(available_bytes=32 * gib),
        "narrow": pb.Memory(available_bytes=6 * gib),
        "full": pb.Memory(available_bytes=2 * gib),
        "limited": pb.Memory(available_bytes=32 * gib, limit_bytes=8 * gib, used_bytes=6 * gib),
        "promised": pb.Memory(available_bytes=10 * gib, reserved_bytes=4 * gib),
        "silent": pb.Memory(host="h"),
    }
    views = [view(name, cold, memory=memory) for name, memory in memories.items()]
    views += [view("loaded", memory=pb.Memory(available_bytes=1)), view("untold", cold)]
    assert score("memory", ask(), *views) == {
        "roomy": 1.0,
        "narrow": 0.5,
        "full": 0.0,
        "limited": 0.0,
        "promised": 0.5,
        "silent": 0.5,
        "loaded": 1.0,
        "untold": 1.0,
    }
    assert "memory" not in scores(router().decide(ask(), [view("a", cold)]))["a"]


# Affinity.


def remembering(**settings: object) -> tuple[Affinity, Clock]:
    clock = Clock()
    return Affinity(AffinitySettings.model_validate(settings), clock=clock), clock


def test_a_conversation_goes_back_to_the_backend_that_read_it() -> None:
    affinity, _ = remembering()
    decide = router(affinity).decide
    first = decide(ask("one"), [view("a"), view("b")], caller="me")
    assert "affinity" not in first.candidates[0].scores  # nobody holds it, so it says nothing
    affinity.note("me", "b", first.chain)
    for seed in range(20):
        again = router(affinity, random.Random(seed)).decide(
            ask("one", "reply", "two"), [view("a"), view("b")], caller="me"
        )
        assert again.chosen is not None
        assert again.chosen.name == "b"


def test_the_longest_match_wins() -> None:
    affinity, _ = remembering()
    long, short = ask("one", "reply", "two", "reply", "three"), ask("one", "reply", "two")
    affinity.note("", "a", affinity.chain(short))
    affinity.note("", "b", affinity.chain(long))
    longer = ask("one", "reply", "two", "reply", "three", "reply", "four")
    found = scores(router(affinity).decide(longer, [view("a"), view("b"), view("c")]))
    assert found["b"]["affinity"] > found["a"]["affinity"] > found["c"]["affinity"] == 0.0
    other = ask("something else")
    assert "affinity" not in scores(router(affinity).decide(other, [view("a"), view("b")]))["a"]


def test_what_a_backend_lists_goes_before_what_is_remembered_of_it() -> None:
    affinity, _ = remembering()
    request = ask("one", "reply", "two")
    chain = digests(request, model="m")
    affinity.note("", "a", affinity.chain(request))
    holds_little = view("a", model(prefix_digests=chain[:1]))
    holds_all = view("b", model(prefix_digests=reversed(chain)))
    found = scores(router(affinity).decide(request, [holds_little, holds_all]))
    assert found["b"]["affinity"] == 1.0
    assert 0.0 < found["a"]["affinity"] < 1.0
    # Its list may be kept apart for each caller, and then says nothing that could be understood here.
    holds_other = view("a", model(prefix_digests=[5]))
    found = scores(router(affinity).decide(request, [holds_other, holds_all]))
    assert found["a"]["affinity"] == 1.0


def test_nobody_is_steered_by_what_others_asked() -> None:
    affinity, _ = remembering()
    request = ask("one")
    affinity.note("alice", "a", affinity.chain(request))
    decide = router(affinity).decide
    assert "affinity" in scores(decide(request, [view("a"), view("b")], caller="alice"))["a"]
    assert "affinity" not in scores(decide(request, [view("a"), view("b")], caller="bob"))["a"]


def test_affinity_fades_where_calls_wait() -> None:
    affinity, _ = remembering()
    request = ask("one")
    affinity.note("", "a", affinity.chain(request))
    found = []
    for outstanding in (0, 1, 2, 6):
        holder = view("a", slots=2, outstanding=outstanding, queue=64)
        found.append(scores(router(affinity).decide(request, [holder, view("b")]))["a"]["affinity"])
    assert found == [1.0, 1.0, 0.5, 1 / 6]
    crowded = view("a", slots=2, outstanding=12, queue=64)
    decision = router(affinity).decide(request, [crowded, view("b", slots=2)])
    assert decision.chosen is not None
    assert decision.chosen.name == "b"


def test_what_is_held_need_not_be_read() -> None:
    affinity, _ = remembering()
    request = ask("x" * 20_000, "reply", "two")
    affinity.note("", "a", affinity.chain(request))
    rate = {"m": figures(prefill=500.0)}
    found = scores(router(affinity).decide(request, [view("a", figures=rate), view("b", figures=rate)]))
    assert found["a"]["latency"] > 0.9
    assert found["b"]["latency"] < 0.1


def test_what_is_remembered_is_bounded_and_grows_old() -> None:
    affinity, clock = remembering(entries=10, ttl="1m")
    first = affinity.chain(ask("one"))
    affinity.note("", "a", first)
    assert affinity.matches("", first, {"a"}) == {"a": 1}
    assert affinity.matches("", first, {"b"}) == {}
    clock.at = 59.0
    assert affinity.matches("", first, {"a"}) == {"a": 1}
    clock.at = 60.0
    assert affinity.matches("", first, {"a"}) == {}
    for number in range(100):
        affinity.note("", "a", affinity.chain(ask(f"{number}")))
    assert len(affinity) == 10


def test_a_conversation_in_use_is_not_the_one_that_is_forgotten() -> None:
    affinity, _ = remembering(entries=4)
    kept = affinity.chain(ask("kept"))
    for number in range(20):
        affinity.note("", "a", kept)
        affinity.note("", "a", affinity.chain(ask(f"{number}")))
    assert affinity.matches("", kept, {"a"}) == {"a": 1}


def test_memory_can_be_switched_off_and_ends_at_very_long_conversations() -> None:
    assert remembering(entries=0)[0].chain(ask("one")) == []
    long = ask(*["x"] * (MOST_MESSAGES + 1))
    assert remembering()[0].chain(long) == []
    lists = view("a", model(prefix_digests=digests(long, model="m")))
    assert "affinity" not in scores(router().decide(long, [lists, view("b")]))["a"]


def test_a_part_of_the_prompt_is_measured_by_its_text() -> None:
    request = ask("x" * 99, "y" * 299)
    found = shares(request, {"a": 1, "b": 2, "c": 0})
    assert found["a"] == pytest.approx(0.25, abs=0.01)
    assert found["b"] == 1.0
    assert 0.0 < found["c"] < 0.01


def test_whoever_holds_the_tools_alone_holds_a_little() -> None:
    request = pb.GenerateRequest(model="m", tools=[pb.Tool(name="t")], messages=ask("x" * 99).messages)
    holder = view("a", model(prefix_digests=digests(request, model="m")[:1]))
    found = scores(router().decide(request, [holder, view("b")]))
    assert 0.0 < found["a"]["affinity"] < 0.02


def test_another_model_other_tools_and_other_words_are_another_conversation() -> None:
    affinity, _ = remembering()
    request = ask("one", "reply", "two")
    others = [ask("one", "Reply", "two"), ask("one", "reply", "two"), ask("one", "reply", "two")]
    others[1].model = "other"
    others[2].tools.add(name="t")
    chain = affinity.chain(request)
    assert affinity.chain(ask("one", "reply", "two", "reply"))[:3] == chain
    assert [affinity.chain(other)[-1] == chain[-1] for other in others] == [False] * 3
    assert affinity.chain(others[0])[0] == chain[0]


class Served:
    """A fleet of one or two backends that answer, or fail."""

    def __init__(self, *names: str) -> None:
        self.views = [view(name) for name in names]
        self.failure: Exception | None = None

    def snapshot(self) -> list[EndpointView]:
        return self.views

    def service(self, name: str) -> object:
        async def serve(call: Call[Request], send: Send) -> None:
            assert call.tokens > 0
            if self.failure is not None:
                raise self.failure
            await send(pb.GenerateResponse(finished=pb.Finished()))

        return serve


async def test_a_call_that_was_served_is_remembered_and_a_lost_backend_forgotten() -> None:
    affinity, _ = remembering()
    fleet = Served("a", "b")
    route = Route(fleet=fleet, router=router(affinity), affinity=affinity)  # type: ignore[arg-type]  # as far as routing goes

    async def go(request: pb.GenerateRequest) -> None:
        await route(Call(request=request, caller="me"), Sink())

    request = ask("one", routing=pb.RoutingHints(backends=["b"]))
    chain = affinity.chain(request)
    await go(request)
    assert affinity.matches("me", chain, {"a", "b"}) == {"b": 1}
    fleet.failure = InvalidRequest("wrong")
    with pytest.raises(InvalidRequest):
        await go(request)
    assert affinity.matches("me", chain, {"b"})
    affinity.note("me", "a", chain)
    fleet.failure = BackendUnavailable("gone")
    with pytest.raises(BackendUnavailable):
        await go(request)
    assert affinity.matches("me", chain, {"a", "b"}) == {"a": 1}


# Whatever the fleet looks like.


def any_model(chance: random.Random, request: pb.GenerateRequest) -> pb.Model:
    found = model(
        chance.choice(pb.Model.State.values()),
        memory_bytes=chance.choice([0, 10**9, 10**11]),
        disk_bytes=chance.choice([0, 10**9]),
        slot_count=chance.choice([0, 1, 4]),
        context_token_count=chance.choice([0, 1, 4096]),
        loaded_context_token_count=chance.choice([0, 1, 4096]),
        prefix_digests=chance.sample(digests(request, model="m"), chance.choice([0, 0, 1])),
    )
    if chance.random() < 0.5:
        found.load_duration.FromMilliseconds(chance.choice([0, 1, 10**7]))
    for capability in (pb.CAPABILITY_GENERATE, pb.CAPABILITY_TOOLS):
        support = chance.choice(pb.CapabilityReport.Support.values())
        found.capabilities.add(capability=capability, support=support, probed=chance.random() < 0.5)
    return found


def any_figures(chance: random.Random) -> Figures:
    def some() -> float | None:
        return chance.choice([None, 0.0, 1e-9, chance.expovariate(0.1), 1e9])

    return figures(
        prefill=some(), decode=some(), duration=some(), first_deltas=tuple(some() for _ in BUCKETS)
    )


def any_view(chance: random.Random, name: str, request: pb.GenerateRequest) -> EndpointView:
    return EndpointView(
        name=name,
        is_reachable=chance.random() < 0.9,
        is_serving=chance.random() < 0.9,
        is_drained=chance.random() < 0.1,
        models=(any_model(chance, request),) if chance.random() < 0.9 else (),
        are_models_known=chance.random() < 0.9,
        can_admit=chance.random() < 0.8,
        is_ejected=chance.random() < 0.2,
        is_probing=chance.random() < 0.1,
        refused_models=frozenset("m" if chance.random() < 0.1 else ""),
        outstanding=chance.choice([0, 1, 5, 1000]),
        outstanding_tokens=chance.choice([0.0, -1e-9, 100.0, 1e9]),
        slots=chance.choice([0, 1, 4]),
        queue=chance.choice([0, 64]),
        first_delta=chance.choice([None, 0.0, 1e6]),
        success_rate=chance.choice([0.0, 0.5, 0.95, 1.0]),
        weight=chance.random(),
        figures={"m": any_figures(chance)} if chance.random() < 0.7 else {},
        memory=chance.choice([None, pb.Memory(available_bytes=10**9, limit_bytes=10, used_bytes=10**12)]),
        share=chance.choice([0.1, 1.0]),
    )


def any_request(chance: random.Random) -> pb.GenerateRequest:
    request = ask(*["x" * chance.choice([0, 10, 50_000]) for _ in range(chance.randrange(1, 5))])
    if chance.random() < 0.3:
        request.tools.add(name="t", parameters_json_schema="{}")
    if chance.random() < 0.2:
        request.routing.backends.extend(chance.sample("abc", 2))
    return request


def test_whatever_the_fleet_looks_like_scores_are_shares_and_refusals_hold() -> None:
    chosen_count = affine_count = 0
    for seed in range(CASES):
        chance = random.Random(seed)
        request = any_request(chance)
        affinity, _ = remembering()
        affinity.note("", chance.choice("abc"), affinity.chain(request))
        views = [any_view(chance, name, request) for name in "abc"]
        tried = frozenset(chance.sample("abc", chance.choice([0, 0, 1])))
        decision = router(affinity, chance).decide(request, views, tried=tried)
        why = f"seed {seed}"
        for candidate in decision.candidates:
            assert all(0.0 <= value <= 1.0 for value in candidate.scores.values()), why
            assert 0.0 <= candidate.total <= 1.0, why
            assert set(candidate.scores) <= set(SCORERS), why
            assert bool(candidate.refused_by) is not bool(candidate.scores), why
            affine_count += candidate.scores.get("affinity", 0.0) > 0.0
        if decision.chosen is None:
            assert all(candidate.refused_by for candidate in decision.candidates), why
            decision.failure()
            continue
        chosen_count += 1
        chosen = decision.chosen
        assert chosen.endpoint.is_reachable, why
        assert chosen.endpoint.is_serving, why
        assert not chosen.endpoint.is_drained, why
        assert chosen.name not in tried, why
        if decision.is_last_resort:
            assert not chosen.endpoint.can_admit or chosen.spelling in chosen.endpoint.refused_models, why
        else:
            assert decision.candidates[0] is chosen, why
            assert not chosen.refused_by, why
    # Of fleets in which nobody serves, or nobody holds anything, nothing would be proven.
    assert chosen_count > CASES / 4
    assert affine_count > CASES / 20


def test_affinity_never_beats_health() -> None:
    for seed in range(400):
        chance = random.Random(seed)
        affinity, _ = remembering()
        request = ask("x" * chance.choice([10, 50_000]), "reply", "two")
        affinity.note("", "a", affinity.chain(request))
        measured = {"m": any_figures(chance)}
        healthy = view("b", figures=measured, slots=chance.choice([0, 4]))
        failing = dataclasses.replace(
            healthy,
            name="a",
            success_rate=chance.uniform(0.0, 0.899),
            models=(model(prefix_digests=digests(request, model="m")),),
        )
        decision = router(affinity, chance).decide(request, [failing, healthy])
        assert decision.chosen is not None
        assert decision.chosen.name == "b", f"seed {seed}"


def test_no_backend_that_a_filter_refuses_is_chosen_for_its_affinity() -> None:
    refusals: dict[str, dict[str, object]] = {
        "reachable": {"is_reachable": False},
        "serving": {"is_serving": False},
        "drained": {"is_drained": True},
        "breaker": {"can_admit": False, "is_ejected": True},
        "room": {"slots": 1, "queue": 0, "outstanding": 1},
    }
    assert set(refusals) < {name for name, _ in FILTERS}
    for by, state in refusals.items():
        affinity, _ = remembering()
        affinity.note("", "a", affinity.chain(ask()))
        decision = router(affinity).decide(ask(), [view("a", **state), view("b")])
        assert decision.chosen is not None
        assert decision.chosen.name == "b"
        assert decision.candidates[-1].refused_by == by


# Each by itself.

TOOLS, YES = pb.CAPABILITY_TOOLS, pb.CapabilityReport.SUPPORT_YES
COLD = model(pb.Model.STATE_AVAILABLE, memory_bytes=4 * 2**30)


def can_use_tools(*, probed: bool) -> pb.Model:
    return model(capabilities=[pb.CapabilityReport(capability=TOOLS, support=YES, probed=probed)])


def holding(request: pb.GenerateRequest) -> pb.Model:
    return model(prefix_digests=digests(request, model="m"))


def with_memory(free: int) -> EndpointView:
    return view("", COLD, memory=pb.Memory(available_bytes=free))


ONLY: dict[str, tuple[pb.GenerateRequest, EndpointView, EndpointView]] = {
    "preference": (ask(routing=pb.RoutingHints(backends=["better", "worse"])), view(), view()),
    "loaded": (ask(), view(), view("", COLD)),
    "load": (ask(), view(outstanding=1), view(outstanding=3)),
    "proven": (
        ask(tools=[pb.Tool(name="t")]),
        view("", can_use_tools(probed=True)),
        view("", can_use_tools(probed=False)),
    ),
    "context": (ask("x" * 4000), view(), view("", model(loaded_context_token_count=100))),
    "latency": (ask(), view(first_delta=0.1), view(first_delta=3.0)),
    "speed": (ask(), view(figures={"m": figures(decode=80.0)}), view(figures={"m": figures(decode=8.0)})),
    "tokens": (ask(), view(outstanding_tokens=10.0), view(outstanding_tokens=9000.0)),
    "affinity": (ask("a", "b", "c"), view("", holding(ask("a", "b", "c"))), view()),
    "memory": (ask(), with_memory(64 * 2**30), with_memory(2**30)),
    "health": (ask(), view(success_rate=1.0), view(success_rate=0.4)),
    "weight": (ask(), view(weight=1.0), view(weight=0.3)),
}


@pytest.mark.parametrize("name", SCORERS)
def test_each_scorer_tells_the_better_by_itself_and_its_weight_decides(name: str) -> None:
    request, better, worse = ONLY[name]
    views = [dataclasses.replace(worse, name="worse"), dataclasses.replace(better, name="better")]
    weights = dict.fromkeys(ScorerWeights.model_fields, 0.0)
    for weight, expected in ((2.0, {"better"}), (0.0, {"better", "worse"})):
        decider = Router(
            weights=ScorerWeights.model_validate(weights | {name: weight}),
            picker="best",
            source=random.Random(0),
        )
        chosen = [decider.decide(request, views).chosen for _ in range(40)]
        assert {each.name for each in chosen if each is not None} == expected
