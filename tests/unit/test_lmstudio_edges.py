"""What LM Studio does at its edges, one by one, and what the bridge makes of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    BrokenStream,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    StreamInterrupted,
    StreamStalled,
    UpstreamUnauthenticated,
    WrongModel,
)
from forebay.lmstudio_bridge.client import LmStudioClient
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.listing import Dialect
from forebay.testing import grammar
from forebay.testing.calls import Sink, message
from forebay.testing.fake_lmstudio import Version
from forebay.testing.fake_lmstudio_script import Close, Headers, Reply, Reset, Stall
from lmstudio import DOWNLOAD, EMBED, LOAD, TOKEN, UNLOAD, Rig, ask, chunk, rig, until

UNEXPECTED = {"error": "Unexpected endpoint or method. (GET /x)"}
NO_V1 = Version.parse("0.3.14")
NO_V0 = Version.parse("0.3.0")
OK = (chunk("fine"), chunk(finish="stop"))


def usage(prompt: int, completion: int) -> dict[str, object]:
    return {
        "object": "chat.completion.chunk",
        "model": "tiny",
        "choices": [],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


def tool(name: str = "weather") -> pb.Tool:
    return pb.Tool(
        name=name, parameters_json_schema='{"type":"object","properties":{"city":{"type":"string"}}}'
    )


async def test_edge_39_an_unexpected_endpoint_is_never_healthy() -> None:
    async with rig() as r:
        for path in ("/lmstudio-greeting", "/api/v1/models", "/api/v0/models", "/v1/models"):
            r.fake.script("GET", path, Reply.json(UNEXPECTED))
        with pytest.raises(BackendUnavailable, match="not LM Studio"):
            await r.client.probe()
        for body in ({"lmstudio": False}, {}, [], "lmstudio"):
            r.fake.script("GET", "/lmstudio-greeting", Reply.json(body))
            with pytest.raises(BackendUnavailable, match="not LM Studio"):
                await r.client.probe()
        with pytest.raises(BackendUnavailable, match="not LM Studio"):
            await r.client.models()
        await r.client.probe()
        assert r.client.dialect is Dialect.NATIVE
    async with rig(settings={"greeting": False}) as r:
        for _ in range(2):
            for path in ("/api/v1/models", "/api/v0/models", "/v1/models"):
                r.fake.script("GET", path, Reply.json(UNEXPECTED))
            with pytest.raises(BackendUnavailable, match="not LM Studio"):
                await r.client.probe()


@pytest.mark.parametrize(
    ("version", "dialect"),
    [("0.4.4", Dialect.NATIVE), ("0.3.14", Dialect.OLDER), ("0.3.0", Dialect.COMPATIBLE)],
)
async def test_edge_40_an_older_server_is_served_through_its_older_api(
    version: str, dialect: Dialect
) -> None:
    async with rig(version=Version.parse(version)) as r:
        assert await r.text(ask())
        assert r.client.dialect is dialect
        vectors = await r.embed(["a", "b"])
        assert [len(one.values) for one in vectors.embeddings] == [8, 8]
        if dialect is not Dialect.NATIVE:
            with pytest.raises(CapabilityUnsupported, match=r"0\.4\.0"):
                await r.unload("tiny")
            with pytest.raises(CapabilityUnsupported, match=r"0\.4\.0"):
                await r.pull("new/model")


async def test_edge_40_a_refused_token_is_no_reason_to_try_an_older_api() -> None:
    async with rig(token="lm-studio") as r:
        r.fake.options.token = TOKEN
        with pytest.raises(UpstreamUnauthenticated):
            await r.client.probe()
        assert not r.seen("/api/v0/models")
        assert not r.seen("/v1/models")
        assert r.client.dialect is None


async def test_edge_40_a_server_that_was_downgraded_is_asked_anew() -> None:
    async with rig() as r:
        await r.client.probe()
        r.fake.options.version = NO_V1
        assert await r.models()
        assert r.client.dialect is Dialect.OLDER


@pytest.mark.parametrize("token", ["", "sk-bogus-EXTRASECRET", TOKEN[:-1] + "x"])
async def test_edge_41_a_refused_token_is_named_and_never_shown(
    token: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with rig(token=token) as r:
        r.fake.options.token = TOKEN
        failures: list[Failure] = [await r.fails(ask())]
        with pytest.raises(UpstreamUnauthenticated) as refused:
            await r.embed(["a"])
        failures.append(refused.value)
        with pytest.raises(UpstreamUnauthenticated) as probed:
            await r.client.probe()
        failures.append(probed.value)
        said = " ".join(
            [repr(r.client), repr(r.engine), repr(r.settings), caplog.text]
            + [
                f"{one} {one.metadata} {one.to_status()} {one.__cause__} {one.__cause__!r}"
                for one in failures
            ]
        )
        for word in ("sk-bogus-E", "sk-lm-AbCd", "Malformed", "Bearer"):
            assert word not in said
        assert all("token" in one.message for one in failures)


async def test_edge_41_a_greeting_that_asks_for_a_token_is_named_too() -> None:
    async with rig() as r:
        r.fake.script("GET", "/lmstudio-greeting", Reply.json({"error": "sk-bogus-E***"}, status=401))
        with pytest.raises(UpstreamUnauthenticated) as refused:
            await r.client.probe()
        assert "sk-bogus" not in str(refused.value)


async def test_edge_41_the_right_token_is_sent() -> None:
    async with rig(token=TOKEN) as r:
        r.fake.options.token = TOKEN
        assert await r.text(ask())
        assert {one.headers["authorization"] for one in r.fake.requests} == {f"Bearer {TOKEN}"}


async def test_edge_42_a_loaded_model_is_not_loaded_again() -> None:
    async with rig() as r:
        await r.load("tiny")
        await r.load("tiny")
        await r.text(ask())
        assert r.fake.studio.loads == ["tiny"]
        assert [one.id for one in r.fake.studio.loaded()] == ["tiny"]


async def test_edge_42_eight_callers_share_one_load() -> None:
    async with rig() as r:
        r.fake.gates.hold("load")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(r.generate(ask()))
                tasks.create_task(r.load("tiny"))
            await r.fake.gates.arrived("load")
            for _ in range(20):
                await asyncio.sleep(0)
            assert (await r.model("tiny")).state == pb.Model.STATE_LOADING
            r.fake.gates.release("load")
        assert r.fake.studio.loads == ["tiny"]
        assert len(r.fake.calls(LOAD)) == 1
        stages = {e.progress.stage for s in r.sinks for e in s.events if e.WhichOneof("event") == "progress"}
        assert pb.Progress.STAGE_LOADING in stages


async def test_edge_42_an_older_server_is_made_to_load_once_by_one_small_request() -> None:
    async with rig(version=NO_V1) as r:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(r.generate(ask()))
        assert r.fake.studio.loads == ["tiny"]
        assert [body.get("max_tokens") for body in r.chats()].count(1) == 1


async def test_edge_43_a_model_is_unloaded_with_all_its_instances() -> None:
    async with rig() as r:
        await r.fake.load("tiny")
        await r.fake.load("tiny")
        await r.fake.load("tiny", identifier="mine")
        model = await r.model("tiny")
        assert list(model.aliases) == ["tiny:2", "mine"]
        assert model.slot_count == 12
        assert (await r.unload("mine")).state == pb.Model.STATE_ACTIVE
        assert [body["instance_id"] for body in r.fake.calls(UNLOAD)] == ["mine"]
        assert (await r.unload("tiny")).state == pb.Model.STATE_AVAILABLE
        assert r.fake.studio.loaded() == []


async def test_edge_43_unloading_what_is_not_loaded_succeeds_and_what_is_unknown_does_not() -> None:
    async with rig() as r:
        assert (await r.unload("tiny")).state == pb.Model.STATE_AVAILABLE
        with pytest.raises(ModelNotFound):
            await r.unload("nothing")
        await r.fake.load("tiny")
        r.fake.script(
            "POST", UNLOAD, Reply.json({"error": {"type": "model_not_found", "message": "x"}}, status=404)
        )
        await r.unload("tiny")  # somebody else was faster


async def test_edge_43_an_instance_is_reached_by_its_own_name() -> None:
    async with rig() as r:
        await r.fake.load("tiny")
        await r.fake.load("tiny", identifier="mine")
        await r.text(ask(model="mine"))
        assert r.chats()[-1]["model"] == "mine"


async def test_edge_44_a_load_goes_on_when_its_callers_leave() -> None:
    async with rig() as r:
        r.fake.gates.hold("load")
        callers = [
            asyncio.ensure_future(r.load("tiny")),
            asyncio.ensure_future(r.generate(ask(), complete=False)),
        ]
        await r.fake.gates.arrived("load")
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        r.fake.gates.release("load")
        await r.load("tiny")
        assert r.fake.studio.loads == ["tiny"]


@pytest.mark.parametrize("reply", [{"status": "loading", "instance_id": "tiny"}, {"status": "loaded"}, []])
async def test_edge_44_a_load_that_does_not_say_that_it_is_done_failed(reply: object) -> None:
    async with rig() as r:
        r.fake.script("POST", LOAD, Reply.json(reply))
        with pytest.raises(ModelLoadFailed):
            await r.load("tiny")


async def test_edge_44_a_failed_load_is_told_and_may_be_tried_again() -> None:
    async with rig() as r:
        for _ in range(2):
            with pytest.raises(ModelLoadFailed, match="could not load broken"):
                await r.load("broken")
        model = await r.model("broken")
        assert model.state == pb.Model.STATE_FAILED
        assert model.detail
        assert isinstance(await r.fails(ask(model="broken")), ModelLoadFailed)


async def test_edge_44_a_load_that_takes_too_long_failed() -> None:
    async with rig(settings={"load_timeout": 0.02}) as r:
        r.fake.gates.hold("load")
        with pytest.raises(ModelLoadFailed, match=r"0\.02"):
            await r.load("tiny")


async def test_edge_44_settings_of_a_load_are_sent_and_echoed_or_not() -> None:
    settings = {
        "load": {"context_length": 2048, "flash_attention": True},
        "models": {"tiny": {"context_length": 1024}},
    }
    async with rig(settings=settings) as r:
        loaded = (await r.load("tiny"))[-1].loaded
        assert loaded.model.loaded_context_token_count == 1024
        await r.load("other", context_token_count=512)
        first, second = r.fake.calls(LOAD)
        assert (first["context_length"], second["context_length"]) == (1024, 512)
        assert first["flash_attention"] is second["flash_attention"] is True
        r.fake.script("POST", LOAD, Reply.json({"type": "llm", "instance_id": "thinker", "status": "loaded"}))
        assert (await r.load("thinker"))[-1].HasField("loaded")


async def test_edge_45_another_model_s_answer_is_refused_or_told() -> None:
    async with rig() as r:
        await r.script(Reply.sse(chunk("hi", model="other"), chunk(finish="stop", model="other")))
        failure = await r.fails(ask())
        assert isinstance(failure, WrongModel)
        assert failure.metadata["answering_model"] == "other"
        await r.script(Reply.sse(chunk("hi", model="other"), chunk(finish="stop", model="other")))
        sink = await r.generate(ask(accepted_degradations=[pb.DEGRADATION_KIND_MODEL_SUBSTITUTED]))
        started = grammar_started(sink)
        assert started.model == "other"
        assert [one.kind for one in started.degradations] == [pb.DEGRADATION_KIND_MODEL_SUBSTITUTED]
        assert not started.weights.family


@pytest.mark.parametrize("name", ["", "tiny", "TINY", "tiny@q4_k_m"])
async def test_edge_45_spellings_of_the_model_are_accepted(name: str) -> None:
    async with rig() as r:
        await r.script(Reply.sse(chunk("hi", model=name), chunk(finish="stop", model=name)))
        assert grammar_started(await r.generate(ask())).model == "tiny"


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"error": "Trying to keep the first 9 tokens, with context length of only 4"}, ContextExceeded),
        (400, {"error": "'messages' field is required"}, InvalidRequest),
        (400, {"error": {"message": "bad", "param": "x", "code": None}}, InvalidRequest),
        (400, {"error": {"type": "invalid_request", "message": "x", "code": "c"}}, InvalidRequest),
        (500, {"error": "Error rendering prompt with jinja template: x"}, BackendError),
        (500, {"error": {"message": "Channel Error", "code": None}}, BackendError),
        (200, {"error": "Channel Error"}, BackendError),
        (200, UNEXPECTED, CapabilityUnsupported),
        (502, "<html>", BackendUnavailable),
    ],
)  # fmt: skip
async def test_edge_46_every_shape_of_error_is_read(status: int, body: object, kind: type[Failure]) -> None:
    async with rig() as r:
        await r.script(Reply.json(body, status=status))
        failure = await r.fails(ask("SECRET prompt"))
        assert type(failure) is kind
        assert "SECRET" not in str(failure)


async def test_edge_46_a_missing_model_is_looked_for_once_more() -> None:
    missing = Reply.json({"error": {"message": "No models loaded.", "code": None}}, status=404)
    async with rig() as r:
        await r.script(missing)
        assert await r.text(ask())
        await r.script(missing, missing)
        assert isinstance(await r.fails(ask()), ModelNotFound)


@pytest.mark.parametrize("then", ["data: [DONE]\n\n", ""])
@pytest.mark.parametrize(
    "payload",
    [{"error": {"message": "Channel Error"}, "message": "Channel Error"}, {"message": "Channel Error"}],
)
async def test_edge_47_an_error_event_is_an_error_wherever_it_comes(payload: object, then: str) -> None:
    event = f"event: error\ndata: {json.dumps(payload)}\n\n{then}"
    async with rig() as r:
        await r.script(Reply.sse(event, done=False))
        assert type(await r.fails(ask())) is BackendError
        await r.script(Reply.sse(chunk("a"), chunk("b"), chunk("c"), event, done=False))
        failure = await r.fails(ask())
        assert type(failure) is StreamInterrupted
        assert r.sinks[-1].text == "abc"
        await r.script(Reply.sse("event: error\ndata: Channel Error\n\n", done=False))
        assert type(await r.fails(ask())) is BackendError


async def test_edge_47_a_prompt_that_does_not_fit_is_told_in_the_stream() -> None:
    async with rig(context_length=64) as r:
        failure = await r.fails(ask("water " * 100))
        assert isinstance(failure, ContextExceeded)
        assert failure.metadata["context_token_count"] == "64"


@pytest.mark.parametrize("reply", [
    Reply.sse(),
    Reply.sse(done=False),
    Reply.sse(chunk(finish="stop")),
    Reply.sse(chunk(finish="stop"), usage(0, 0)),
    Reply.sse(chunk(finish="stop"), usage(200, 0)),
])  # fmt: skip
async def test_edge_48_silence_after_a_prompt_too_long_is_context_exceeded(reply: Reply) -> None:
    async with rig(context_length=64) as r:
        await r.script(reply)
        failure = await r.fails(ask("water " * 200))
        assert isinstance(failure, ContextExceeded)
        assert failure.metadata["context_token_count"] == "64"


async def test_edge_48_the_fake_s_silent_overflow_is_context_exceeded() -> None:
    async with rig(context_length=64, overflow="silent") as r:
        assert isinstance(await r.fails(ask("water " * 200)), ContextExceeded)


async def test_edge_48_silence_after_a_short_prompt_is_no_answer() -> None:
    async with rig() as r:
        for reply in (Reply.sse(), Reply.sse(done=False)):
            await r.script(reply)
            assert isinstance(await r.fails(ask()), BrokenStream)
        await r.script(Reply.sse(chunk(finish="stop"), usage(7, 0)))
        sink = await r.generate(ask())
        assert sink.text == ""
        assert sink.events[-1].finished.reason == pb.FINISH_REASON_STOP


@pytest.mark.parametrize("model", ["thinker", "thinker-content", "thinker-inline"])
async def test_edge_49_reasoning_is_told_apart_in_all_three_styles(model: str) -> None:
    async with rig() as r:
        sink = await r.generate(ask(model=model))
        assert grammar.reasoning(sink.events).strip()
        assert sink.text
        assert "think>" not in sink.text + grammar.reasoning(sink.events)


@pytest.mark.parametrize(
    ("pieces", "reasoning", "answer"),
    [
        (["<thi", "nk>", "why", "</thi", "nk>", "\n\nyes"], "why", "yes"),
        (["<think>why"], "why", ""),
        (["a <think> b"], "", "a <think> b"),
        (["<", "b>bold"], "", "<b>bold"),
    ],
)
async def test_edge_49_think_tags_may_be_cut_anywhere(
    pieces: Sequence[str], reasoning: str, answer: str
) -> None:
    async with rig() as r:
        await r.script(Reply.sse(*(chunk(piece) for piece in pieces), chunk(finish="stop"), every=7))
        sink = await r.generate(ask())
        assert (grammar.reasoning(sink.events), sink.text) == (reasoning, answer)


def piece(
    index: int, arguments: str = "", *, name: str | None = None, identifier: str | None = None
) -> object:
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    call = {"index": index, "type": "function", "function": function} | (
        {} if identifier is None else {"id": identifier}
    )
    return chunk(delta={"role": "assistant", "tool_calls": [call]})


async def test_edge_50_pieces_of_tool_calls_are_put_together() -> None:
    arguments = json.dumps({"city": "Rome", "days": list(range(30))})
    frames = [
        piece(0, name="weather", identifier=""),
        piece(1, name="time", identifier="b"),
        *(piece(0, arguments[at : at + 6], name="") for at in range(0, len(arguments), 6)),
        piece(1, '{"zone"', name="time"),
        piece(1, ": 1}", identifier=""),
    ]
    async with rig() as r:
        await r.script(Reply.sse(*frames, chunk(finish="stop")))
        sink = await r.generate(ask(tools=[tool(), tool("time")]))
        calls = grammar.tool_calls(sink.events)
        assert [call.name for call in calls] == ["weather", "time"]
        assert calls[0].id
        assert calls[1].id == "b"
        assert calls[0].arguments_json == arguments
        assert json.loads(calls[1].arguments_json) == {"zone": 1}
        assert sink.events[-1].finished.reason == pb.FINISH_REASON_TOOL_CALLS


async def test_edge_50_arguments_that_are_no_json_break_the_reply() -> None:
    async with rig() as r:
        await r.script(
            Reply.sse(piece(0, '{"city": ', name="weather", identifier="a"), chunk(finish="tool_calls"))
        )
        assert isinstance(await r.fails(ask(tools=[tool()])), BrokenStream)


async def test_edge_51_an_assistant_message_always_has_content() -> None:
    request = ask("use weather", tools=[tool()])
    request.messages.add(
        role=pb.ROLE_ASSISTANT,
        parts=[pb.Part(tool_call=pb.ToolCall(id="c1", name="weather", arguments_json='{"city":"Rome"}'))],
    )
    request.messages.add(role=pb.ROLE_TOOL, parts=[pb.Part(tool_result=pb.ToolResult(id="c1", text="sunny"))])
    async with rig() as r:
        assert await r.text(request)
        assistant, result = r.chats()[-1]["messages"][1:]  # type: ignore[index]
        assert assistant["content"] == ""
        assert assistant["tool_calls"][0]["function"]["arguments"] == '{"city":"Rome"}'
        assert result == {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


async def test_edge_52_any_json_is_asked_for_as_a_schema() -> None:
    async with rig() as r:
        text = await r.text(ask(output_format=pb.OutputFormat(any_json=True)))
        json.loads(text)
        shape = r.chats()[-1]["response_format"]
        assert shape == {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": {}},
        }
        schema = '{"type":"object","properties":{"z":{"type":"integer"},"a":{"type":"string"}}}'
        text = await r.text(ask(output_format=pb.OutputFormat(json_schema=schema)))
        assert list(json.loads(text)) == ["z", "a"]


def seeing(*, native: bool = True) -> pb.GenerateRequest:
    request = ask("what is this", model="seeing")
    request.messages[0].parts.add(image=pb.Blob(media_type="image/png", data=b"png"))
    if not native:
        request.sampling.seed = 1
    return request


async def test_edge_53_the_other_spelling_of_items_is_tried_and_kept() -> None:
    async with rig(settings={"native_chat": True}, input_item="message") as r:
        assert await r.text(seeing())
        assert await r.text(seeing())
        bodies = r.fake.calls("/api/v1/chat")
        assert [[item["type"] for item in body["input"]] for body in bodies] == [  # type: ignore[union-attr, index]
            ["text", "image"],
            ["message", "image"],
            ["message", "image"],
        ]
        assert all(body["store"] is False for body in bodies)
        r.fake.script(
            "POST",
            "/api/v1/chat",
            Reply.json({"error": {"message": "no", "type": "invalid_request"}}, status=400),
        )
        assert isinstance(await r.fails(seeing()), InvalidRequest)


async def test_edge_54_the_native_stream_is_read_with_its_progress() -> None:
    async with rig(settings={"native_chat": True}) as r:
        request = ask("hello", model="thinker")
        request.messages.insert(0, message("be brief", pb.ROLE_SYSTEM))
        request.sampling.temperature = 0.5
        request.sampling.min_p = 0.1
        request.limits.max_output_token_count = 400
        sink = await r.generate(request)
        assert grammar.reasoning(sink.events)
        assert sink.text
        fractions = [
            e.progress.fraction
            for e in sink.events
            if e.WhichOneof("event") == "progress"
            and e.progress.stage == pb.Progress.STAGE_PREFILLING
            and e.progress.HasField("fraction")
        ]
        assert fractions == [0.0, 1.0]
        finished = sink.events[-1].finished
        assert finished.usage.output_token_count > finished.usage.reasoning_token_count > 0
        assert finished.timings.prefill_duration.ToMilliseconds() == 111
        (body,) = r.fake.calls("/api/v1/chat")
        assert body["system_prompt"] == "be brief"
        assert (body["temperature"], body["min_p"], body["max_output_tokens"]) == (0.5, 0.1, 400)
        short = await r.generate(ask(limits=pb.GenerationLimits(max_output_token_count=2)))
        assert short.events[-1].finished.reason == pb.FINISH_REASON_LENGTH


def native(*events: dict[str, object]) -> Reply:
    frames = [f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in events]
    return Reply.sse(*frames, done=False)


async def test_edge_54_broken_native_streams_fail_by_name() -> None:
    start: dict[str, object] = {"type": "chat.start", "model_instance_id": "tiny"}
    said: dict[str, object] = {"type": "message.delta", "content": "half"}
    error: dict[str, object] = {
        "type": "error",
        "error": {"type": "internal_error", "message": "Model unloaded."},
    }
    end: dict[str, object] = {"type": "chat.end", "result": {"output": [], "stats": {}}}
    unknown: dict[str, object] = {"type": "weather.report", "content": "rain"}
    load: dict[str, object] = {"type": "model_load.progress", "progress": 0.5}
    async with rig(settings={"native_chat": True}) as r:

        async def fails(*events: dict[str, object]) -> Failure:
            await r.script(native(*events), path="/api/v1/chat")
            return await r.fails(ask())

        await r.script(native(start, load, unknown, said, end, said), path="/api/v1/chat")
        sink = await r.generate(ask())
        assert sink.text == "half"
        assert any(e.progress.stage == pb.Progress.STAGE_LOADING for e in sink.events)
        assert type(await fails(start, error, end)) is BackendUnavailable
        assert type(await fails(start, said, error, end)) is StreamInterrupted
        assert type(await fails(start, said, error)) is StreamInterrupted
        assert type(await fails(start, error)) is BackendUnavailable
        assert type(await fails(start, said)) is BrokenStream
        await r.script(Reply.sse("event: x\ndata: {no\n\n", done=False), path="/api/v1/chat")
        assert type(await r.fails(ask())) is BrokenStream


@pytest.mark.parametrize(
    ("stats", "reason", "stop"),
    [
        ({"stop_reason": "eosFound", "time_to_first_token": 0.25}, pb.FINISH_REASON_STOP, ""),
        ({"stop_reason": "stopStringFound"}, pb.FINISH_REASON_STOP, "END"),
        ({"stop_reason": "maxPredictedTokensReached"}, pb.FINISH_REASON_LENGTH, ""),
        ({"stop_reason": "contextLengthReached"}, pb.FINISH_REASON_LENGTH, ""),
        ({"stop_reason": "somethingNew"}, pb.FINISH_REASON_STOP, ""),
        ({}, pb.FINISH_REASON_STOP, ""),
        (None, pb.FINISH_REASON_STOP, ""),
    ],
)
async def test_edge_55_statistics_are_read_if_they_are_there(stats: object, reason: int, stop: str) -> None:
    async with rig() as r:
        await r.script(Reply.sse(chunk("hi"), chunk(finish="stop", stats=stats)))
        sink = await r.generate(ask(limits=pb.GenerationLimits(stop_sequences=["END"])))
        finished = sink.events[-1].finished
        assert (finished.reason, finished.stop_sequence) == (reason, stop)
        timed = isinstance(stats, dict) and "time_to_first_token" in stats
        assert finished.timings.prefill_duration.ToMilliseconds() == (250 if timed else 0)


async def test_edge_56_a_download_is_followed_to_its_end() -> None:
    async with rig() as r:
        events = await r.pull("new/model")
        done = [event.progress.completed_bytes for event in events[:-1]]
        assert done == sorted(done)
        assert done[-1] == 1000
        assert events[-1].pulled.model.id == "new/model"
        events = await r.pull("tiny")
        assert events[-1].pulled.model.id == "tiny"
        assert events[0].progress.detail == "it is here"


async def test_edge_56_a_download_by_address_is_found_under_its_key() -> None:
    async with rig() as r:
        events = await r.pull("https://huggingface.co/org/Repo-GGUF", quantization="Q8_0")
        assert events[-1].pulled.model.id == "repo"


async def test_edge_56_a_download_of_no_known_size_is_followed_too() -> None:
    async with rig() as r:
        events = await r.pull("none/total")
        assert {event.progress.total_bytes for event in events[:-1]} == {0}


async def test_edge_56_a_paused_download_is_told_and_waited_for() -> None:
    async with rig() as r:
        job: dict[str, object] = {"job_id": "j", "status": "downloading"}
        r.fake.script("POST", DOWNLOAD, Reply.json(job))
        path = f"{DOWNLOAD}/status/j"
        r.fake.script(
            "GET",
            path,
            Reply.json(job | {"status": "paused", "downloaded_bytes": 5, "total_size_bytes": 9}),
            Reply.json(job | {"downloaded_bytes": 3, "total_size_bytes": 9}),
            Reply.json(job | {"status": "completed", "total_size_bytes": 9}),
        )
        events = await r.pull("new/model")
        told = [(event.progress.detail, event.progress.completed_bytes) for event in events[:-1]]
        assert told == [("downloading", 0), ("paused in LM Studio", 5), ("downloading", 5), ("it is here", 9)]
        assert events[-1].pulled.model.id == "new/model"


async def test_edge_56_downloads_that_cannot_be_are_refused() -> None:
    async with rig() as r:
        with pytest.raises(BackendError, match="could not download"):
            await r.pull("bad/model")
        with pytest.raises(ModelNotFound):
            await r.pull("unknown/model")
        r.fake.script("POST", DOWNLOAD, Reply.json({"job_id": "j", "status": "downloading"}), Reply.json({}))
        with pytest.raises(BackendUnavailable, match="forgot"):
            await r.pull("new/model")
        with pytest.raises(BackendError, match="did not say"):
            await r.pull("new/model")
        r.fake.script("POST", DOWNLOAD, Reply.json({"status": "downloading"}))
        with pytest.raises(BackendError, match="could not download"):
            await r.pull("new/model")
        r.fake.script("POST", DOWNLOAD, Reply.json({"job_id": "j", "status": "downloading"}))
        r.fake.script("GET", f"{DOWNLOAD}/status/j", Reply.json({"error": "x"}, status=500))
        with pytest.raises(BackendError):
            await r.pull("new/model")
        for address in (
            "http://169.254.169.254/x",
            "https://huggingface.co.evil/x",
            "../x",
            "a b",
            "file:///x",
        ):
            with pytest.raises(InvalidRequest):
                await r.pull(address)


async def test_edge_57_deleting_is_not_possible() -> None:
    from forebay.models.v1 import models_pb2 as models_pb

    async with rig() as r:
        with pytest.raises(CapabilityUnsupported, match="My Models"):
            await r.engine.delete_model(models_pb.DeleteModelRequest(model="tiny"))
        with pytest.raises(ModelNotFound):
            await r.engine.delete_model(models_pb.DeleteModelRequest(model="nothing"))


async def step(r: Rig) -> None:
    """Lets a reply that is held at its next token have that token."""
    r.fake.gates.release("token")
    r.fake.gates.hold("token")
    await r.fake.gates.arrived("token")


async def test_edge_58_an_eviction_by_lm_studio_itself_breaks_a_reply_off() -> None:
    async with rig(version=NO_V1) as r:
        await r.load("tiny")
        r.fake.gates.hold("token")
        reply = asyncio.ensure_future(r.fails(ask()))
        await r.fake.gates.arrived("token")
        await step(r)
        await until(lambda: r.sinks[-1].text)
        await r.fake.studio.load("other", jit=True)  # another application asks for another model
        r.fake.gates.release("token")
        assert type(await reply) is StreamInterrupted


async def test_edge_58_what_the_bridge_loaded_is_not_evicted() -> None:
    async with rig() as r:
        await r.load("tiny")
        r.fake.gates.hold("token")
        reply = asyncio.ensure_future(r.generate(ask()))
        await r.fake.gates.arrived("token")
        await r.fake.studio.load("other", jit=True)
        r.fake.gates.release("token")
        assert (await reply).text


async def test_edge_58_a_model_that_is_unloaded_in_use_ends_its_replies_as_broken_off() -> None:
    async with rig() as r:
        cut = "event: error\ndata: " + json.dumps({"error": {"message": "Model unloaded."}}) + "\n\n"
        await r.script(Reply.sse(chunk("a"), cut, done=False))
        assert type(await r.fails(ask())) is StreamInterrupted
        await r.script(Reply.sse(cut, done=False))
        assert type(await r.fails(ask())) is BackendUnavailable
        for word in ("modelUnloaded", "failed", "userStopped"):
            await r.script(Reply.sse(chunk("a"), chunk(finish="stop", stats={"stop_reason": word})))
            assert type(await r.fails(ask())) is StreamInterrupted
        await r.script(Reply.sse(chunk(finish="stop", stats={"stop_reason": "modelUnloaded"})))
        assert type(await r.fails(ask())) is BrokenStream


async def test_edge_58_a_forced_unload_breaks_replies_off() -> None:
    async with rig() as r:
        r.fake.gates.hold("token")
        reply = asyncio.ensure_future(r.fails(ask()))
        await r.fake.gates.arrived("token")
        await r.unload("tiny", force=True)
        r.fake.gates.release("token")
        assert type(await reply) is BackendUnavailable


async def test_edge_59_floats_are_asked_for_and_anything_is_read() -> None:
    async with rig() as r:
        response = await r.embed(["a", "b", "a"])
        assert r.fake.calls(EMBED)[-1]["encoding_format"] == "float"
        assert r.fake.calls(EMBED)[-1]["input"] == ["a", "b"]
        assert response.model == "embedder"
        assert list(response.embeddings[0].values) == list(response.embeddings[2].values)
        assert response.normalized
        await r.script(
            Reply.json(
                {"data": [{"index": 1, "embedding": [0, 2]}, {"index": 0, "embedding": "AACAPwAAAAA="}]}
            ),
            path=EMBED,
            load="",
        )
        response = await r.embed(["x", "y"])
        assert [list(one.values) for one in response.embeddings] == [[1.0, 0.0], [0.0, 2.0]]
        assert not response.normalized


async def test_edge_59_a_batch_that_is_too_big_is_halved() -> None:
    async with rig(embed_batch=3) as r:
        response = await r.embed([f"text {n}" for n in range(10)])
        assert len(response.embeddings) == 10
        assert max(len(body["input"]) for body in r.fake.calls(EMBED)) == 10  # type: ignore[arg-type]
        with pytest.raises(ContextExceeded) as raised:
            await r.embed(["good", "w " * 5000])
        assert [path for path, _ in raised.value.violations] == ["texts[1]"]
        partial = await r.embed(["good", "w " * 5000], allow_partial=True)
        assert [one.index for one in partial.failures] == [1]


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}],
        [{"index": 0, "embedding": [None]}, {"index": 1, "embedding": ["x"]}],
        [{"index": 0, "embedding": "!"}, {"index": 1, "embedding": "A"}],
    ],
)
async def test_edge_59_vectors_that_cannot_be_are_refused(data: object) -> None:
    async with rig() as r:
        await r.fake.load("embedder")
        r.fake.script("POST", EMBED, *[Reply.json({"data": data})] * 3)
        with pytest.raises(BackendError):
            await r.embed(["x", "y"])
        while r.fake.unused():
            with pytest.raises(BackendError):
                await r.embed(["z"])


async def test_edge_59_another_embedding_model_s_vectors_are_refused() -> None:
    async with rig() as r:
        reply = Reply.json({"data": [{"index": 0, "embedding": [1.0]}], "model": "gte@q8_0"})
        await r.script(reply, path=EMBED, load="embedder")
        with pytest.raises(WrongModel):
            await r.embed(["x"])


async def test_edge_60_limits_time_to_live_and_drafts_are_passed_on() -> None:
    request = ask(limits=pb.GenerationLimits(max_output_token_count=3))
    request.backend_options["lmstudio"].update({"ttl": 60, "draft_model": "other"})
    async with rig() as r:
        sink = await r.generate(request)
        assert sink.events[-1].finished.reason == pb.FINISH_REASON_LENGTH
        (body,) = r.chats()
        assert (body["max_tokens"], body["draft_model"]) == (3, "other")
        assert "ttl" not in body  # LM Studio keeps time only of what it loads by itself
        assert (await r.model("tiny")).expire_time.seconds > 0
        await r.text(ask())
        assert "max_tokens" not in r.chats()[-1]
        await r.script(Reply.json({"error": "Draft model is not compatible"}, status=400))
        assert isinstance(await r.fails(request), InvalidRequest)
    async with rig(version=NO_V1) as r:
        await r.text(request)
        load, chat = r.chats()
        assert (load["ttl"], chat["ttl"]) == (60, 60)


async def test_edge_61_a_slot_is_busy_until_the_server_has_read_the_prompt() -> None:
    async with rig() as r:
        await r.fake.load("tiny", parallel=1)
        r.fake.gates.hold("prefill")
        left = asyncio.ensure_future(r.generate(ask(), complete=False))
        await r.fake.gates.arrived("prefill")
        left.cancel()
        await asyncio.wait([left])
        assert left.cancelled()
        waiting = asyncio.ensure_future(r.generate(ask("second")))
        await until(lambda: any(e.progress.stage == pb.Progress.STAGE_QUEUED for e in r.sinks[-1].events))
        assert len(r.chats()) == 1
        assert r.fake.busy("tiny") == 1
        r.fake.gates.release("prefill")
        assert (await waiting).text
        await until(lambda: r.fake.busy("tiny") == 0)


async def test_edge_61_a_caller_who_leaves_in_the_middle_closes_the_socket_at_once() -> None:
    async with rig(token_seconds=0.005, context_length=8000) as r:
        reply = asyncio.ensure_future(r.generate(ask("Say 4000 words."), complete=False))
        await until(lambda: r.sinks and len(r.sinks[-1].text) > 20)
        assert r.fake.busy("tiny") == 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        reply.cancel()
        await asyncio.wait([reply])
        await until(lambda: r.fake.busy("tiny") == 0)
        assert loop.time() - began < 0.2
        assert r.fake.disconnects == 1
        assert repr(r.engine).endswith("<Memory [tiny 0]>>")


async def test_edge_62_only_loaded_models_may_be_listed() -> None:
    async with rig(version=NO_V0, jit=False) as r:
        assert await r.models() == {}
        assert isinstance(await r.fails(ask()), ModelNotFound)
        await r.fake.load("tiny")
        assert list(await r.models()) == ["tiny"]
        assert await r.text(ask())
        with pytest.raises(CapabilityUnsupported, match=r"0\.3\.6"):
            await r.load("tiny")
        with pytest.raises(CapabilityUnsupported):
            await r.unload("tiny")


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (None, []),
        ([{"id": "a"}], ["a"]),
        ([{"id": "a", "object": "model", "meta": {"n_ctx_train": 9}, "extra": {}}, {"nothing": 1}, 7], ["a"]),
    ],
)
async def test_edge_63_a_sparse_listing_is_read(data: object, keys: list[str]) -> None:
    async with rig(version=NO_V0) as r:
        r.fake.script("GET", "/v1/models", Reply.json({"object": "list", "data": data}))
        assert list(await r.models()) == keys


async def test_edge_63_a_native_listing_may_lack_anything() -> None:
    models = [
        {"key": "bare"},
        {
            "key": "odd",
            "type": "vision",
            "quantization": None,
            "loaded_instances": [{}, {"id": "i"}],
            "size_bytes": "x",
        },
        {"type": "llm"},
    ]
    async with rig() as r:
        r.fake.script("GET", "/api/v1/models", *[Reply.json({"models": models})] * 2)
        found = await r.models()
        assert list(found) == ["bare", "odd"]
        assert found["odd"].slot_count == 1
        await r.model("odd")


async def test_edge_64_options_is_never_called() -> None:
    async with rig() as r:
        await r.text(ask())
        assert {one.method for one in r.fake.requests} == {"GET", "POST"}
        assert not any("origin" in one.headers for one in r.fake.requests)


@pytest.mark.parametrize("suffix", ["/", "//", "/v1", "/v1/", "/api/v1", "/api/v0/", "//v1//"])
async def test_edge_65_any_spelling_of_the_base_url_works(suffix: str) -> None:
    async with rig() as r:
        settings = LmStudioSettings.model_validate({"base_url": r.fake.url + suffix})
        async with LmStudioClient(settings) as client:
            await client.probe()
            assert client.dialect is Dialect.NATIVE
        assert all("//" not in one.path for one in r.fake.requests)


async def test_edge_66_an_idle_connection_that_was_closed_is_no_error() -> None:
    async with rig() as r:
        await r.client.probe()
        for _ in range(3):
            r.fake.script("GET", "/lmstudio-greeting", Reply(steps=(Close(),)))
            await r.client.probe()
            assert await r.text(ask())
        await r.script(Reply(steps=(Reset(),)))
        assert isinstance(await r.fails(ask()), BackendUnavailable)
        assert len(r.chats()) == 4  # a reply is never asked for twice


@pytest.mark.parametrize("cut", [Close(), Reset()])
async def test_a_connection_that_breaks_in_the_middle_breaks_the_reply_off(cut: Close | Reset) -> None:
    async with rig() as r:
        await r.script(Reply.sse(chunk("a"), chunk("b"), done=False, then=[Stall("cut"), cut]))
        reply = asyncio.ensure_future(r.fails(ask()))
        await until(lambda: r.sinks and r.sinks[-1].text == "ab")
        r.fake.gates.release("cut")
        assert type(await reply) is StreamInterrupted
        await r.script(Reply.sse(Headers(), chunk(), done=False, then=[cut]))
        assert type(await r.fails(ask())) in {BackendUnavailable, BrokenStream}


async def test_an_end_without_done_is_a_broken_reply() -> None:
    async with rig() as r:
        await r.script(Reply.sse(chunk("a"), chunk(finish="stop"), done=False))
        assert type(await r.fails(ask())) is BrokenStream
        await r.script(Reply.json({"object": "chat.completion", "choices": []}))
        assert type(await r.fails(ask())) is BrokenStream


async def test_silence_has_its_limits() -> None:
    async with rig(settings={"first_byte_timeout": 0.05, "between_bytes_timeout": 0.05}) as r:
        await r.script(Reply.sse(chunk("a"), Stall(), done=False))
        assert type(await r.fails(ask())) is StreamStalled


async def test_events_may_be_cut_at_any_byte() -> None:
    async with rig() as r:
        for every in (1, 2, 3, 5):
            await r.script(
                Reply.sse(
                    chunk("né"),
                    chunk(" 😀"),
                    chunk(" [DONE]"),
                    chunk(finish="stop"),
                    every=every,
                    newline="\r\n",
                )
            )
            assert await r.text(ask()) == "né 😀 [DONE]"


def grammar_started(sink: Sink) -> pb.Started:
    found = next(event for event in sink.events if event.WhichOneof("event") == "started")
    assert isinstance(found, pb.GenerateResponse)
    return found.started
