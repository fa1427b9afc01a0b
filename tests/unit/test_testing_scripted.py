"""The scripted engine does what its script says, and keeps a record of it."""

import asyncio
import json
import math

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import failure
from forebay.kit.pipeline import Call, Event
from forebay.models.v1 import models_pb2 as models_pb
from forebay.testing import clock, grammar, tokens
from forebay.testing.calls import Sink, ask, message, serve, with_options
from forebay.testing.script import ALL, BEFORE, END, Chaos, Fault, Script, ScriptedModel, Trick
from forebay.testing.scripted import Fate, ScriptedCrashError, ScriptedEngine, ScriptUnusedError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3},
        "kind": {"enum": ["a", "b"]},
        "one": {"const": 1},
        "deep": {"type": "array", "items": {"type": "integer", "minimum": 5}, "minItems": 2},
        "rate": {"type": "number"},
        "yes": {"type": "boolean"},
        "none": {"type": "null"},
        "inner": {"properties": {"x": {"type": "integer"}}},
    },
}


def reply(engine: ScriptedEngine, request: pb.GenerateRequest) -> list[Event]:
    sink = clock.run(serve(engine.service, request))
    grammar.check(sink.events, numbered=False)
    return sink.events


def finished(events: list[Event]) -> pb.Finished:
    last = events[-1]
    assert isinstance(last, pb.GenerateResponse)
    return last.finished


def started(events: list[Event]) -> pb.Started:
    return next(
        e.started for e in events if isinstance(e, pb.GenerateResponse) and e.WhichOneof("event") == "started"
    )


# What it says.


def test_text_is_what_was_foretold_and_another_engine_says_the_same() -> None:
    request = ask("a question")
    first, second = ScriptedEngine(name="a"), ScriptedEngine(name="b")
    text = grammar.text(reply(first, request))
    assert text == first.expected(request) == grammar.text(reply(second, request))
    ids = tokens.tokens_for("scripted", tokens.prompt_of(request.messages), count=8)
    assert text == tokens.text_of(ids)


def test_prompt_model_and_seed_each_change_the_text() -> None:
    engine = ScriptedEngine(models=["scripted", "other"])
    seeded = ask()
    seeded.sampling.seed = 5
    texts = {engine.expected(r) for r in (ask(), ask("else"), ask(model="other"), seeded)}
    assert len(texts) == 4


def test_equal_weights_say_the_same_under_other_names() -> None:
    models = [ScriptedModel(name="a", weights="w"), ScriptedModel(name="b", weights="w", aliases=("c",))]
    engine = ScriptedEngine(models=models)
    assert (
        engine.expected(ask(model="a")) == engine.expected(ask(model="b")) == engine.expected(ask(model="c"))
    )
    assert started(reply(engine, ask(model="a"))).weights == started(reply(engine, ask(model="c"))).weights


def test_without_a_seed_a_warm_reply_is_never_the_same() -> None:
    request = ask()
    request.sampling.temperature = 0.8
    engine = ScriptedEngine()
    assert grammar.text(reply(engine, request)) != grammar.text(reply(engine, request))
    request.sampling.seed = 3
    assert grammar.text(reply(engine, request)) == grammar.text(reply(engine, request))


def test_a_limit_ends_a_reply_with_length() -> None:
    events = reply(ScriptedEngine(), ask(token_count=3))
    assert finished(events).reason == pb.FINISH_REASON_LENGTH
    assert finished(events).usage.output_token_count == 3
    assert finished(reply(ScriptedEngine(), ask(token_count=8))).reason == pb.FINISH_REASON_STOP


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_stop_sequence_cuts_the_text_wherever_it_begins(length: int) -> None:
    engine = ScriptedEngine()
    whole = engine.expected(ask())
    for at in range(len(whole) - length):
        request = ask()
        request.limits.stop_sequences.extend(["never there", whole[at : at + length]])
        events = reply(engine, request)
        assert grammar.text(events) == whole[: whole.index(whole[at : at + length])]
        assert finished(events).reason == pb.FINISH_REASON_STOP
        assert finished(events).stop_sequence == whole[at : at + length]


def test_a_stop_sequence_that_is_not_met_changes_nothing() -> None:
    request = ask(token_count=4)
    request.limits.stop_sequences.append("never there")
    assert finished(reply(ScriptedEngine(), request)).reason == pb.FINISH_REASON_LENGTH


def test_a_prefix_is_continued_exactly_where_it_ends_even_within_a_word() -> None:
    engine = ScriptedEngine()
    whole = engine.expected(ask())
    for end in range(len(whole) + 1):
        request = ask()
        request.continue_from.text = whole[:end]
        assert whole[:end] + grammar.text(reply(engine, request)) == whole


def test_token_identifiers_are_continued_before_text() -> None:
    engine = ScriptedEngine()
    request = ask()
    request.include_token_ids = True
    ids = [token for delta in grammar.deltas(reply(engine, request)) for token in delta.token_ids]
    assert tokens.text_of(ids) == engine.expected(request)
    request.continue_from.token_ids.extend(ids[:5])
    request.continue_from.text = "something else"
    assert tokens.text_of(ids[:5]) + grammar.text(reply(engine, request)) == tokens.text_of(ids)


def test_another_models_prefix_is_gone_on_from() -> None:
    engine = ScriptedEngine()
    request = ask()
    request.continue_from.text = "Once upon a time"
    events = reply(engine, request)
    assert grammar.text(events).startswith(" ")
    assert finished(events).usage.output_token_count == 4


def test_reasoning_comes_first_and_can_be_switched_off() -> None:
    engine = ScriptedEngine(models=[ScriptedModel(name="scripted", script=Script(reasoning_token_count=5))])
    events = reply(engine, ask())
    assert len(grammar.reasoning(events).split()) == 5
    assert finished(events).usage.reasoning_token_count == 5
    assert finished(events).usage.output_token_count == 13
    request = ask()
    request.reasoning_effort = pb.REASONING_EFFORT_NONE
    assert grammar.reasoning(reply(engine, request)) == ""
    begun = ask()
    begun.continue_from.reasoning = " ".join(grammar.reasoning(events).split()[:2])
    assert begun.continue_from.reasoning + grammar.reasoning(reply(engine, begun)) == grammar.reasoning(
        events
    )
    begun.continue_from.text = engine.expected(request)[:4]
    assert grammar.reasoning(reply(engine, begun)) == ""


def test_json_matches_its_schema() -> None:
    request = ask(token_count=400)
    request.output_format.json_schema = json.dumps(SCHEMA)
    value = json.loads(grammar.text(reply(ScriptedEngine(), request)))
    assert value == {
        "name": "xxx",
        "kind": "a",
        "one": 1,
        "deep": [5, 5],
        "rate": 1,
        "yes": True,
        "none": None,
        "inner": {"x": 1},
    }
    request.output_format.any_json = True
    assert json.loads(grammar.text(reply(ScriptedEngine(), request))) == {"ok": True}


def test_tools_are_called_as_scripted_chosen_or_forbidden() -> None:
    engine = ScriptedEngine()
    request = ask()
    request.tools.extend([pb.Tool(name="f", parameters_json_schema=json.dumps(SCHEMA)), pb.Tool(name="g")])
    assert grammar.tool_calls(reply(engine, request)) == []
    twice = with_options(request, tool_call_count=2)
    events = reply(engine, twice)
    assert [call.name for call in grammar.tool_calls(events)] == ["f", "g"]
    assert json.loads(grammar.tool_calls(events)[0].arguments_json)["yes"] is True
    assert grammar.tool_calls(events)[1].arguments_json == "{}"
    assert finished(events).reason == pb.FINISH_REASON_TOOL_CALLS
    request.tool_choice.mode = pb.ToolChoice.MODE_REQUIRED
    request.tool_choice.tool_name = "g"
    assert [call.name for call in grammar.tool_calls(reply(engine, request))] == ["g"]
    twice.tool_choice.mode = pb.ToolChoice.MODE_NONE
    assert grammar.tool_calls(reply(engine, twice)) == []


def test_log_probabilities_are_given_for_each_token() -> None:
    request = ask()
    request.logprobs.top_logprob_count = 3
    for delta in grammar.deltas(reply(ScriptedEngine(), request)):
        (entry,) = delta.logprobs
        assert entry.token == delta.text
        assert entry.top_logprobs[0].token == delta.text
        assert len(entry.top_logprobs) == 3


@pytest.mark.parametrize(
    "kind", ["image", "tools", "output_format", "regex", "seed", "logprobs", "ids", "effort"]
)
def test_what_a_model_cannot_do_is_refused_or_told(kind: str) -> None:
    engine = ScriptedEngine(
        models=[ScriptedModel(name="scripted", capabilities=frozenset({pb.CAPABILITY_GENERATE}))]
    )
    request = ask()
    match kind:
        case "image":
            request.messages[0].parts.add(image=pb.Blob(media_type="image/png", data=b"x"))
        case "tools":
            request.tools.add(name="f")
        case "output_format":
            request.output_format.any_json = True
        case "regex":
            request.output_format.regex = "a"
        case "seed":
            request.sampling.seed = 1
        case "logprobs":
            request.logprobs.top_logprob_count = 0
        case "ids":
            request.include_token_ids = True
        case _:
            request.reasoning_effort = pb.REASONING_EFFORT_HIGH
    with pytest.raises(failure.CapabilityUnsupported):
        reply(engine, request)
    request.accepted_degradations.extend(k for k in pb.DegradationKind.values() if k)
    events = reply(engine, request)
    assert len(started(events).degradations) == 1
    assert grammar.text(events)


def test_a_model_that_cannot_continue_or_generate_says_so() -> None:
    models = [
        ScriptedModel(name="a", capabilities=ALL - {pb.CAPABILITY_CONTINUE}),
        ScriptedModel(name="b", capabilities=ALL - {pb.CAPABILITY_GENERATE}),
    ]
    request = ask(model="a")
    request.continue_from.text = ""
    request.continue_from.SetInParent()
    with pytest.raises(failure.CapabilityUnsupported, match="continue_from"):
        reply(ScriptedEngine(models=models), request)
    with pytest.raises(failure.CapabilityUnsupported, match="model"):
        reply(ScriptedEngine(models=models), ask(model="b"))


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    engine = ScriptedEngine(models=[ScriptedModel(name="scripted", context_token_count=20)])
    with pytest.raises(failure.ContextExceeded):
        reply(engine, ask("word " * 20))
    with pytest.raises(failure.ContextExceeded):
        reply(engine, ask("word " * 10, token_count=10))
    events = reply(engine, ask("word " * 13))
    assert finished(events).reason == pb.FINISH_REASON_LENGTH
    assert finished(events).usage.output_token_count == 4


def test_all_parts_of_messages_are_counted() -> None:
    parts = [
        pb.Part(text="one two"),
        pb.Part(reasoning="one two three"),
        pb.Part(tool_call=pb.ToolCall(name="f", arguments_json='{"a": 1}')),
        pb.Part(tool_result=pb.ToolResult(text="one")),
        pb.Part(image=pb.Blob(data=b"x")),
    ]
    counts = [tokens.count_tokens([pb.Message(parts=[part])]) - 3 for part in parts]
    assert counts == [2, 3, 3, 1, 16]
    assert tokens.count_tokens([], [pb.Tool(name="f", description="does things")]) == 3


# When it says it.


def test_the_times_of_a_script_are_kept_and_told() -> None:
    script = Script(token_count=3, load_delay=4, first_delay=2, token_delay=0.5, progress_delay=1)
    engine = ScriptedEngine(models=[ScriptedModel(name="scripted", script=script, loaded=False)])
    times: list[tuple[str, float]] = []

    async def send(event: Event) -> None:
        assert isinstance(event, pb.GenerateResponse)
        times.append((str(event.WhichOneof("event")), clock.now()))
        if event.WhichOneof("event") == "finished":
            timings = event.finished.timings
            assert timings.load_duration.ToSeconds() == 4
            assert timings.first_delta_duration.ToSeconds() == 6
            assert timings.generation_duration.ToSeconds() == 1

    clock.run(engine.generate(Call(request=ask()), send))
    assert times == [
        *[("progress", float(t)) for t in range(4)],
        ("started", 4.0),
        ("progress", 4.0),
        ("progress", 5.0),
        ("delta", 6.0),
        ("delta", 6.5),
        ("delta", 7.0),
        ("finished", 7.0),
    ]


def test_a_load_is_joined_and_outlives_its_caller() -> None:
    engine = ScriptedEngine(
        models=[ScriptedModel(name="scripted", script=Script(load_delay=10), loaded=False)]
    )

    async def body() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4):
                await serve(engine.service, ask())
        (model,) = (await engine.list_models(pb.ListModelsRequest())).models
        assert model.state == pb.Model.STATE_LOADING
        await serve(engine.service, ask())
        assert clock.now() == 10.0
        (model,) = (await engine.list_models(pb.ListModelsRequest())).models
        assert model.state == pb.Model.STATE_ACTIVE

    clock.run(body())


def test_options_of_a_request_go_before_the_models_script() -> None:
    request = with_options(ask(), token_count=2, token_delay=0.25, progress_delay="1s")
    events = reply(ScriptedEngine(), request)
    assert finished(events).usage.output_token_count == 2


@pytest.mark.parametrize(
    "options", [{"nonsense": 1}, {"token_count": "x"}, {"token_delay": "soon"}, {"fault": "NONSENSE@1"}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str | float]) -> None:
    with pytest.raises(failure.InvalidRequest, match="scripted"):
        reply(ScriptedEngine(), with_options(ask(), **options))


# What goes wrong.


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("UNAVAILABLE", Fault(failure.BackendUnavailable)),
        ("BACKEND_BUSY@before", Fault(failure.BackendBusy)),
        ("STALL@3", Fault(Trick.STALL, 3)),
        ("INTERNAL@end", Fault(failure.Internal, END)),
        ("QUEUE_FULL@0x2", Fault(failure.QueueFull, 0, 2)),
        ("STREAM_INTERRUPTED@1", Fault(failure.StreamInterrupted, 1)),
        ("NOT_FOUND", Fault(failure.ModelNotFound, BEFORE)),
    ],
)
def test_faults_are_written_and_read(text: str, fault: Fault) -> None:
    assert Fault.parse(text) == fault
    assert Fault.parse(str(fault)) == fault


@pytest.mark.parametrize("text", ["", "unavailable", "UNAVAILABLE@soon", "NONSENSE", "STALL@-1"])
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="fault"):
        Fault.parse(text)


@pytest.mark.parametrize(
    ("point", "kinds"),
    [
        ("before", []),
        ("0", ["started"]),
        ("2", ["started", "delta", "delta"]),
        ("99", ["started"] + ["delta"] * 8),
        ("end", ["started"] + ["delta"] * 8),
    ],
)
def test_failures_come_at_their_point(point: str, kinds: list[str]) -> None:
    engine = ScriptedEngine()
    sink = Sink()
    with pytest.raises(failure.MemoryExhausted) as raised:
        clock.run(serve(engine.service, ask(model=f"fail:MEMORY_EXHAUSTED@{point}"), sink=sink))
    assert sink.kinds == kinds
    assert raised.value.metadata["backend"] == "scripted"
    assert engine.records[0].fate is Fate.FAILED
    assert engine.records[0].failure == "MEMORY_EXHAUSTED"
    assert engine.records[0].delta_count == kinds.count("delta")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("SKIP@before", "event 0: delta with sequence 1"),
        ("SKIP@2", "event 3: delta with sequence 4"),
        ("SKIP@end", "event 9: the end, and no finished"),
        ("REPEAT@0", "event 1: started with sequence 0"),
        ("REPEAT@3", "event 4: delta with sequence 3"),
        ("TRUNCATE@before", "event 0: the end, and no finished"),
        ("TRUNCATE@2", "event 3: the end, and no finished"),
        ("ENCORE", "event 10: finished after finished"),
    ],
)
def test_tricks_break_the_grammar_as_told(fault: str, error: str) -> None:
    sink = clock.run(serve(ScriptedEngine(numbered=True).service, with_options(ask(), fault=fault)))
    with pytest.raises(grammar.GrammarError) as raised:
        grammar.check(sink.events)
    assert str(raised.value) == error


def test_repeating_before_anything_was_sent_does_nothing() -> None:
    reply(ScriptedEngine(), with_options(ask(), fault="REPEAT@before"))


def test_a_crash_is_an_exception_that_nobody_expects() -> None:
    engine = ScriptedEngine()
    with pytest.raises(ScriptedCrashError):
        clock.run(serve(engine.service, ask(model="fail:CRASH@1")))
    assert engine.records[0].failure == "ScriptedCrashError"


def test_a_fault_meets_as_many_calls_as_it_says() -> None:
    engine = ScriptedEngine()

    async def body() -> list[str]:
        fates = []
        for _ in range(4):
            try:
                await serve(engine.service, ask(model="fail:UNAVAILABLE@1x2"))
                fates.append("ok")
            except failure.BackendUnavailable:
                fates.append("failed")
        return fates

    assert clock.run(body()) == ["failed", "failed", "ok", "ok"]


def test_chaos_is_the_same_for_the_same_seed() -> None:
    schedules = [
        [str(Chaos(seed=seed, rate=0.5).fault_for(n) or "") for n in range(200)] for seed in (1, 1, 2)
    ]
    assert schedules[0] == schedules[1] != schedules[2]
    assert 60 < sum(map(bool, schedules[0])) < 140


def test_queued_scripts_are_used_in_order_and_must_be_used() -> None:
    engine = ScriptedEngine()
    engine.then(Script(token_count=1), Script(token_count=2))
    assert len(grammar.deltas(reply(engine, ask()))) == 1
    with pytest.raises(ScriptUnusedError, match="1 scripts"):
        engine.assert_used()
    assert len(grammar.deltas(reply(engine, ask()))) == 2
    engine.assert_used()
    assert len(grammar.deltas(reply(engine, ask()))) == 8


def test_unknown_models_and_unknown_faults_are_not_found() -> None:
    for name in ("nobody", "fail:NONSENSE"):
        with pytest.raises(failure.ModelNotFound):
            reply(ScriptedEngine(), ask(model=name))


# What it keeps.


def test_records_tell_the_fate_of_every_call() -> None:
    lines: list[str] = []
    engine = ScriptedEngine(slots=2, queue=4, on_change=lambda record: lines.append(record.to_json()))

    async def body() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(serve(engine.service, with_options(ask(), first_delay="1s")))
        with pytest.raises(failure.BackendUnavailable):
            await serve(engine.service, ask(model="fail:UNAVAILABLE@2"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await serve(engine.service, with_options(ask(), fault="STALL@1"), request_id="left")

    clock.run(body())
    assert engine.peak == 2
    assert engine.active == []
    fates = [record.fate for record in engine.records]
    assert fates == [Fate.COMPLETED] * 3 + [Fate.FAILED, Fate.CANCELLED]
    assert repr(engine) == "<ScriptedEngine scripted active 0 completed 3 failed 1 cancelled 1>"
    last = json.loads(lines[-1])
    assert last.pop("time") >= json.loads(lines[0])["time"]
    assert last == {
        "request_id": "left",
        "kind": "generate",
        "model": "scripted",
        "fate": "cancelled",
        "delta_count": 1,
        "failure": "",
    }


# Unary calls and models.


def test_embeddings_are_unit_vectors_in_order() -> None:
    engine = ScriptedEngine()

    async def body() -> pb.EmbedResponse:
        return await engine.embed(Call(request=pb.EmbedRequest(model="scripted", texts=["a", "b", "a"])))

    response = clock.run(body())
    first, second, third = ([*e.values] for e in response.embeddings)
    assert first == third != second
    assert math.sqrt(sum(x * x for x in first)) == pytest.approx(1.0)
    assert (response.dimension_count, response.normalized, response.backend) == (8, True, "scripted")


def test_fewer_components_can_be_asked_for_and_more_cannot() -> None:
    engine = ScriptedEngine()

    async def embed(count: int) -> pb.EmbedResponse:
        request = pb.EmbedRequest(model="scripted", texts=["a"], dimension_count=count)
        return await engine.embed(Call(request=request))

    assert len(clock.run(embed(3)).embeddings[0].values) == 3
    with pytest.raises(failure.InvalidRequest) as raised:
        clock.run(embed(9))
    assert raised.value.violations[0][0] == "dimension_count"


def test_a_text_that_is_too_long_is_refused_or_named() -> None:
    engine = ScriptedEngine(models=[ScriptedModel(name="scripted", context_token_count=4)])

    async def embed(*, allow_partial: bool) -> pb.EmbedResponse:
        request = pb.EmbedRequest(model="scripted", texts=["a", "b " * 9], allow_partial=allow_partial)
        return await engine.embed(Call(request=request))

    with pytest.raises(failure.ContextExceeded):
        clock.run(embed(allow_partial=False))
    response = clock.run(embed(allow_partial=True))
    assert [(f.index, f.reason) for f in response.failures] == [(1, "CONTEXT_EXCEEDED")]
    assert len(response.embeddings[1].values) == 0


def test_unary_calls_fail_as_scripted() -> None:
    engine = ScriptedEngine()

    async def body() -> None:
        with pytest.raises(failure.BackendUnavailable):
            await engine.embed(Call(request=pb.EmbedRequest(model="fail:UNAVAILABLE", texts=["a"])))
        request = pb.CountTokensRequest(model="scripted", messages=[message("a b c")])
        assert (await engine.count_tokens(Call(request=request))).token_count == 6
        request.model = "nobody"
        with pytest.raises(failure.ModelNotFound):
            await engine.count_tokens(Call(request=request))
        flaky = pb.EmbedRequest(model="fail:UNAVAILABLEx1", texts=["a"])
        with pytest.raises(failure.BackendUnavailable):
            await engine.embed(Call(request=flaky))
        await engine.embed(Call(request=flaky))

    clock.run(body())


def test_models_are_loaded_unloaded_fetched_and_deleted() -> None:
    engine = ScriptedEngine(
        models=["a"], pullable=[ScriptedModel(name="b", script=Script(load_delay=4)), "c"]
    )
    loads: list[models_pb.LoadModelResponse] = []
    pulls: list[models_pb.PullModelResponse] = []

    async def on_load(event: models_pb.LoadModelResponse) -> None:
        loads.append(event)

    async def on_pull(event: models_pb.PullModelResponse) -> None:
        pulls.append(event)

    async def body() -> None:
        await engine.pull_model(models_pb.PullModelRequest(model="b"), on_pull)
        assert [p.progress.completed_bytes for p in pulls[:-1]] == [0, 1024, 2048, 3072, 4096]
        assert pulls[-1].pulled.model.state == pb.Model.STATE_AVAILABLE
        await engine.pull_model(models_pb.PullModelRequest(model="b"), on_pull)
        await engine.load_model(models_pb.LoadModelRequest(model="b"), on_load)
        assert [x.WhichOneof("event") for x in loads] == ["progress"] * 4 + ["loaded"]
        assert loads[-1].loaded.load_duration.ToSeconds() == 4
        for _ in range(2):
            unloaded = await engine.unload_model(models_pb.UnloadModelRequest(model="b"))
            assert unloaded.model.state == pb.Model.STATE_AVAILABLE
        assert (await engine.get_model(models_pb.GetModelRequest(model="b"))).model.id == "b"
        await engine.delete_model(models_pb.DeleteModelRequest(model="b"))
        for attempt in (
            engine.get_model(models_pb.GetModelRequest(model="b")),
            engine.delete_model(models_pb.DeleteModelRequest(model="b")),
            engine.pull_model(models_pb.PullModelRequest(model="nobody"), on_pull),
        ):
            with pytest.raises(failure.ModelNotFound):
                await attempt

    clock.run(body())


@pytest.mark.parametrize("force", [False, True])
def test_unloading_waits_for_calls_or_breaks_them_off(force: bool) -> None:
    engine = ScriptedEngine()

    async def body() -> float:
        call = asyncio.create_task(serve(engine.service, with_options(ask(), token_delay="1s")))
        await asyncio.sleep(2.5)
        await engine.unload_model(models_pb.UnloadModelRequest(model="scripted", force=force))
        ended = clock.now()
        if force:
            with pytest.raises(failure.StreamInterrupted):
                await call
        else:
            await call
        return ended

    assert clock.run(body()) == (2.5 if force else 7.0)
