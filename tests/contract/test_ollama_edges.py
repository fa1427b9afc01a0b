"""Whatever an Ollama server has been seen to do, and what the bridge makes of it, case by numbered case."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf import struct_pb2

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import failure as failures
from forebay.kit.pipeline import Call
from forebay.models.v1 import models_pb2 as models_pb
from forebay.ollama_bridge.config import OllamaSettings
from forebay.ollama_bridge.engine import OllamaEngine
from forebay.testing import grammar
from forebay.testing.calls import Sink, ask, message
from forebay.testing.fake_ollama import MODELS, FakeOllama, Layer
from forebay.testing.fake_ollama_runners import BUSY, FakeModel, Scheduler
from forebay.testing.fake_ollama_script import (
    Body,
    Cut,
    Flush,
    Head,
    Line,
    Normal,
    Pause,
    Raw,
    Step,
    Until,
    lines,
    reply,
)
from promptly import promptly

MODEL = "llama3.2"


def chunk(text: str = "", **more: object) -> dict[str, object]:
    fields = {key: more.pop(key) for key in ("thinking", "tool_calls") if key in more}
    content = {"role": "assistant", "content": text, **fields}
    return {"model": MODEL, "created_at": "2026-08-21T08:00:00.1Z", "message": content, "done": False, **more}


def end(text: str = "", **more: object) -> dict[str, object]:
    counts = {
        "prompt_eval_count": 7,
        "eval_count": 3,
        "eval_duration": 3_000_000,
        "prompt_eval_duration": 5_000,
    }
    return {**chunk(text, **more), "done": True, "done_reason": more.get("done_reason", "stop"), **counts}


def call(name: str = "f", arguments: object = None, **more: object) -> dict[str, object]:
    return {"function": {"name": name, "arguments": arguments if arguments is not None else {}}, **more}


@asynccontextmanager
async def bridge(fake: FakeOllama, **settings: Any) -> AsyncIterator[OllamaEngine]:
    settings.setdefault("base_url", fake.url)
    async with OllamaEngine.running(OllamaSettings(**settings)) as engine:
        await engine.probe()
        yield engine


@pytest.fixture
async def fake() -> AsyncIterator[FakeOllama]:
    async with FakeOllama() as server:
        yield server
        assert server.unplayed == []


@pytest.fixture
async def engine(fake: FakeOllama) -> AsyncIterator[OllamaEngine]:
    async with bridge(fake) as engine:
        yield engine


async def say(
    engine: OllamaEngine, request: pb.GenerateRequest | None = None, sink: Sink | None = None
) -> Sink:
    """Generates a whole reply and checks its grammar."""
    sink = sink or Sink()
    await engine.generate(Call(request=request or ask(model=MODEL)), sink)
    grammar.check(sink.events, numbered=False)
    return sink


async def refused(
    engine: OllamaEngine, kind: type[failures.Failure], request: pb.GenerateRequest | None = None
) -> tuple[failures.Failure, Sink]:
    """Generates a reply that fails, and checks that what came before is a prefix of a reply."""
    sink = Sink()
    with pytest.raises(kind) as caught:
        await engine.generate(Call(request=request or ask(model=MODEL)), sink)
    grammar.check(sink.events, complete=False, numbered=False)
    return caught.value, sink


def started(sink: Sink) -> pb.Started:
    return next(
        e.started for e in sink.events if isinstance(e, pb.GenerateResponse) and e.HasField("started")
    )


def finished(sink: Sink) -> pb.Finished:
    last = sink.events[-1]
    assert isinstance(last, pb.GenerateResponse)
    return last.finished


def tool(name: str = "f") -> pb.Tool:
    return pb.Tool(
        name=name,
        description="Does f.",
        parameters_json_schema='{"properties": {"z": {"type": "string"}, "a": {"type": "integer"}}}',
    )


def options(**values: object) -> struct_pb2.Struct:
    found = struct_pb2.Struct()
    found.update(values)
    return found


async def until(holds: Callable[[], bool], *, within: float = 2.0) -> float:
    """Waits until something holds; returns how long that took."""
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(within):
        while not holds():
            await asyncio.sleep(0.002)
    return asyncio.get_running_loop().time() - began


async def test_edge_01_a_line_may_be_cut_anywhere(fake: FakeOllama, engine: OllamaEngine) -> None:
    data = b"".join(json.dumps(value).encode() + b"\n" for value in (chunk("a"), chunk("b"), end()))
    for at in range(0, len(data), 7):
        fake.script("/api/chat", [Body(data, cuts=(at, at + 1))])
        assert (await say(engine)).text == "ab"
    for ending in (data.rstrip(b"\n"), data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\n\n")):
        fake.script("/api/chat", [Body(ending)])
        assert (await say(engine)).text == "ab"


async def test_edge_02_a_character_may_be_cut_anywhere(fake: FakeOllama, engine: OllamaEngine) -> None:
    word = "é😀ไทย"
    data = (
        json.dumps(chunk(word), ensure_ascii=False).encode() + b"\n" + json.dumps(end("\U0001f600")).encode()
    )
    assert b"\\ud83d\\ude00" in data
    fake.script("/api/chat", [Body(data, cuts=range(len(data)))])
    assert (await say(engine)).text == word + "😀"


async def test_edge_03_lines_may_be_megabytes_long(fake: FakeOllama, engine: OllamaEngine) -> None:
    big = "x" * 600_000
    calls = [call("f", {"z": big})]
    fake.script("/api/chat", lines(chunk("a" * 2_000_000), end(tool_calls=calls)))
    request = ask(model=MODEL)
    request.tools.append(tool())
    sink = await say(engine, request)
    assert len(sink.text) == 2_000_000
    assert json.loads(grammar.tool_calls(sink.events)[0].arguments_json) == {"z": big}


@pytest.mark.parametrize(
    ("script", "text", "names", "reason"),
    [
        (lines(chunk("a"), end("b")), "ab", [], pb.FINISH_REASON_STOP),
        (lines(end(tool_calls=[call()])), "", ["f"], pb.FINISH_REASON_TOOL_CALLS),
        (lines(chunk(tool_calls=[call()]), end()), "", ["f"], pb.FINISH_REASON_TOOL_CALLS),
    ],
    ids=["content-in-the-last", "calls-in-the-last", "calls-before-the-last"],
)
async def test_edge_04_the_last_chunk_may_hold_part_of_the_reply(
    fake: FakeOllama, engine: OllamaEngine, script: list[Step], text: str, names: list[str], reason: int
) -> None:
    fake.script("/api/chat", script)
    sink = await say(engine)
    assert sink.text == text
    assert [c.name for c in grammar.tool_calls(sink.events)] == names
    assert finished(sink).reason == reason


async def test_edge_05_tool_calls_come_in_every_shape(fake: FakeOllama, engine: OllamaEngine) -> None:
    one = call("f", {"z": "1", "a": 2}, id="call_1")
    same = {"function": {"index": 0, "name": "g", "arguments": {}}}
    fake.script("/api/chat", lines(chunk(tool_calls=[one, same]), chunk(tool_calls=[call("h")]), end()))
    calls = grammar.tool_calls((await say(engine)).events)
    assert [c.name for c in calls] == ["f", "g", "h"]
    assert calls[0].id == "call_1"
    assert len({c.id for c in calls}) == 3
    assert [c.arguments_json for c in calls] == ['{"z":"1","a":2}', "{}", "{}"]


async def test_edge_06_metrics_may_be_absent(fake: FakeOllama, engine: OllamaEngine) -> None:
    fake.script("/api/chat", lines(chunk("a"), {"model": MODEL, "done": True, "done_reason": "stop"}))
    done = finished(await say(engine))
    assert done.usage == pb.Usage()
    assert done.timings.prefill_duration.ToNanoseconds() == 0
    fake.script("/api/chat", lines(chunk("a"), end()))
    done = finished(await say(engine))
    assert (done.usage.prompt_token_count, done.usage.output_token_count) == (7, 3)
    assert done.timings.prefill_duration.ToMicroseconds() == 5


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        (reply(400, {"error": "model is required"}), failures.InvalidRequest),
        (reply(404, {"error": "model 'x' not found"}), failures.ModelNotFound),
        (reply(500, {"error": "model runner has unexpectedly stopped"}), failures.BackendError),
        (reply(500, {"error": "CUDA error: out of memory"}), failures.MemoryExhausted),
        (reply(503, {"error": BUSY}), failures.BackendBusy),
        (reply(403, "", "text/plain"), failures.UpstreamUnauthenticated),
        (reply(404, "404 page not found", "text/plain"), failures.CapabilityUnsupported),
        (reply(502, "<html>Bad Gateway</html>", "text/html"), failures.BackendUnavailable),
        (reply(499, {"error": "request canceled"}), failures.BackendUnavailable),
    ],
    ids=["400", "404", "500", "memory", "503", "403", "no-route", "502", "499"],
)
async def test_edge_07_an_error_before_the_first_byte_keeps_its_meaning(
    fake: FakeOllama, engine: OllamaEngine, steps: list[Step], kind: type[failures.Failure]
) -> None:
    fake.script("/api/chat", steps)
    _, sink = await refused(engine, kind)
    assert "started" not in sink.kinds


async def test_edge_08_an_error_in_the_stream_is_no_end(fake: FakeOllama, engine: OllamaEngine) -> None:
    fake.script("/api/chat", lines(chunk("a"), chunk("b"), chunk("c"), {"error": "boom"}))
    failure, sink = await refused(engine, failures.StreamInterrupted)
    assert sink.text == "abc"
    assert failure.code.name == "ABORTED"
    fake.script("/api/chat", lines({"error": "boom"}))
    await refused(engine, failures.BackendError)


@pytest.mark.parametrize(
    ("script", "kind", "text"),
    [
        (lines(chunk("a")), failures.StreamInterrupted, "a"),
        ([Flush()], failures.BrokenStream, ""),
        (reply(200, chunk("whole")), failures.StreamInterrupted, "whole"),
        (
            reply(200, {"model": "", "created_at": "0001-01-01T00:00:00Z", "message": {}, "done": False}),
            failures.StreamInterrupted,
            "",
        ),
        ([Body(b"not json\n")], failures.BrokenStream, ""),
        ([Body(b"[1]\n")], failures.BrokenStream, ""),
    ],
    ids=["no-done", "no-byte", "not-done", "all-zero", "no-json", "no-object"],
)
async def test_edge_09_an_end_without_done_is_never_success(
    fake: FakeOllama, engine: OllamaEngine, script: list[Step], kind: type[failures.Failure], text: str
) -> None:
    fake.script("/api/chat", script)
    failure, sink = await refused(engine, kind)
    assert sink.text == text
    assert failure.code.name == "ABORTED"


async def test_edge_10_a_lost_or_silent_server_is_noticed(fake: FakeOllama) -> None:
    quick = {"first_token_timeout": 0.5, "stall_timeout": 0.5, "progress_interval": 0.02}
    async with bridge(fake, **quick) as engine:
        fake.script("/api/chat", [Line(chunk("a")), Body(b'{"mod'), Pause(0.02), Cut()])
        _, sink = await refused(engine, failures.StreamInterrupted)
        assert sink.text == "a"
        fake.script("/api/chat", [Cut()])
        await refused(engine, failures.BackendUnavailable)
        fake.script("/api/chat", [Line(chunk("a")), Until()])
        await refused(engine, failures.StreamStalled)
        fake.script("/api/chat", [Until()])
        _, sink = await refused(engine, failures.FirstEventTimeout)
        stages = {e.progress.stage for e in sink.events if isinstance(e, pb.GenerateResponse)}
        assert pb.Progress.STAGE_PREFILLING in stages, "a call that waits gives signs of life"
    async with OllamaEngine.running(OllamaSettings(base_url="http://127.0.0.1:9")) as engine:
        with pytest.raises(failures.BackendUnavailable):
            await engine.probe()
        await refused(engine, failures.BackendUnavailable)


async def test_edge_11_busy_says_when_to_come_back(fake: FakeOllama, engine: OllamaEngine) -> None:
    fake.script("/api/chat", reply(503, {"error": BUSY}))
    failure, _ = await refused(engine, failures.BackendBusy)
    assert failure.retry_after
    assert (await say(engine)).text


async def test_edge_12_a_load_answers_one_object_without_an_end_of_line(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    await engine.library.load_model(models_pb.LoadModelRequest(model=MODEL), Sink())  # type: ignore[arg-type]  # any event
    assert fake.scheduler.loads["llama3.2:latest"] == 1
    fake.script("/api/chat", reply(200, {**chunk(), "done": True, "done_reason": "load"}))
    await refused(engine, failures.BrokenStream)


async def test_edge_13_an_embedding_model_is_loaded_by_embedding(fake: FakeOllama) -> None:
    for version in ("0.33.0", "0.5.1"):
        fake.version = version
        async with bridge(fake) as engine:
            sent: list[models_pb.LoadModelResponse] = []

            async def send(event: models_pb.LoadModelResponse, sent: list[Any] = sent) -> None:
                sent.append(event)

            await engine.library.load_model(models_pb.LoadModelRequest(model="all-minilm"), send)
            assert sent[-1].loaded.model.state == pb.Model.STATE_ACTIVE
            await engine.library.unload_model(models_pb.UnloadModelRequest(model="all-minilm"))
    assert fake.scheduler.loads["all-minilm:latest"] == 2
    paths = [request.path for request in fake.requests if request.path in ("/api/embed", "/api/generate")]
    # The new server says beforehand what the model can do; the old one has to refuse first.
    assert paths == ["/api/embed", "/api/generate", "/api/generate", "/api/embed", "/api/generate"]


async def test_edge_14_unloading_is_waited_for(fake: FakeOllama, engine: OllamaEngine) -> None:
    unload = models_pb.UnloadModelRequest(model=MODEL)
    idle = await engine.library.unload_model(unload)
    assert idle.model.state == pb.Model.STATE_AVAILABLE
    with pytest.raises(failures.ModelNotFound):
        await engine.library.unload_model(models_pb.UnloadModelRequest(model="nope"))
    fake.scheduler.unload_seconds = 0.05
    fake.models["registry.ollama.ai/library/llama3.2:latest"] = FakeModel(
        name="llama3.2:latest", answer_tokens=2000
    )
    fake.token_seconds = 0.01
    sink = Sink()
    async with asyncio.TaskGroup() as group:
        talking = group.create_task(say(engine, ask(model=MODEL, token_count=80), sink=sink))
        await until(lambda: fake.running == 1)
        unloading = group.create_task(engine.library.unload_model(unload))
        await until(lambda: bool(engine.library._unloading))
        listed = await engine.library.list_models()
        assert {m.state for m in listed if m.id == "llama3.2:latest"} == {pb.Model.STATE_UNLOADING}
    assert talking.result().text, "the call in progress ends first"
    assert unloading.result().model.state == pb.Model.STATE_AVAILABLE


async def test_edge_14_unloading_by_force_breaks_calls_off(fake: FakeOllama, engine: OllamaEngine) -> None:
    fake.token_seconds = 0.05
    force = models_pb.UnloadModelRequest(model=MODEL, force=True)
    async with asyncio.TaskGroup() as group:
        talking = group.create_task(refused(engine, failures.StreamInterrupted))
        await until(lambda: fake.running == 1 and fake.generations[0].sent > 1)
        await engine.library.unload_model(force)
    assert "unloaded by force" in talking.result()[0].message


async def test_edge_14_unloading_a_model_in_use_says_so_in_the_end(fake: FakeOllama) -> None:
    fake.token_seconds = 0.05
    async with bridge(fake, unload_timeout=0.1) as engine, asyncio.TaskGroup() as group:
        group.create_task(say(engine))
        await until(lambda: fake.running == 1)
        with pytest.raises(failures.BackendBusy):
            await engine.library.unload_model(models_pb.UnloadModelRequest(model=MODEL))


@pytest.mark.parametrize(
    ("value", "sent"), [(300, 300), (300.5, 300.5), ("5m", "5m"), (-1, -1), (0, 0), ("0", 0), ("-1m", "-1m")]
)
async def test_edge_15_keep_alive_is_passed_on(
    fake: FakeOllama, engine: OllamaEngine, value: object, sent: object
) -> None:
    request = ask(model=MODEL)
    request.backend_options["ollama"].CopyFrom(options(keep_alive=value))
    await say(engine, request)
    assert fake.seen("/api/chat")[-1].json["keep_alive"] == sent


@pytest.mark.parametrize("value", ["5 minutes", True, "", [1]])
async def test_edge_15_a_bad_keep_alive_is_refused_by_field(engine: OllamaEngine, value: object) -> None:
    request = ask(model=MODEL)
    request.backend_options["ollama"].CopyFrom(options(keep_alive=value))
    failure, _ = await refused(engine, failures.InvalidRequest, request)
    assert failure.violations[0][0] == "backend_options[ollama].keep_alive"


async def test_edge_16_reasoning_is_asked_for_only_where_there_is_some(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    request = ask(model=MODEL)
    request.reasoning_effort = pb.REASONING_EFFORT_HIGH
    await refused(engine, failures.CapabilityUnsupported, request)
    request.accepted_degradations.append(pb.DEGRADATION_KIND_OPTION_IGNORED)
    assert started(await say(engine, request)).degradations[0].field == "reasoning_effort"
    request = ask(model="qwen3")
    sink = await say(engine, request)
    assert grammar.reasoning(sink.events)
    assert sink.text
    request.reasoning_effort = pb.REASONING_EFFORT_NONE
    assert not grammar.reasoning((await say(engine, request)).events)
    request.reasoning_effort = pb.REASONING_EFFORT_LOW
    request.limits.max_output_token_count = 2
    sink = await say(engine, request)
    assert fake.seen("/api/chat")[-1].json["think"] == "low"
    assert grammar.reasoning(sink.events)
    assert (sink.text, finished(sink).reason) == ("", pb.FINISH_REASON_LENGTH)


async def test_edge_16_a_model_without_degrees_of_reasoning(fake: FakeOllama, engine: OllamaEngine) -> None:
    error = reply(400, {"error": 'think value "low" is not supported for this model'})
    request = ask(model="qwen3")
    request.reasoning_effort = pb.REASONING_EFFORT_LOW
    fake.script("/api/chat", error)
    failure, _ = await refused(engine, failures.CapabilityUnsupported, request)
    assert failure.metadata["field"] == "reasoning_effort"
    request.accepted_degradations.append(pb.DEGRADATION_KIND_OPTION_IGNORED)
    fake.script("/api/chat", error)
    sink = await say(engine, request)
    assert fake.seen("/api/chat")[-1].json["think"] is True
    assert [d.field for d in started(sink).degradations] == ["reasoning_effort"]


async def test_edge_17_formats_are_passed_on_and_their_errors_are_the_callers(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    request = ask(model="qwen3")
    request.output_format.any_json = True
    assert json.loads((await say(engine, request)).text) == {"answer": "yes"}
    request.output_format.json_schema = (
        '{"type":"object","properties":{"z":{"type":"string"},"a":{"type":"integer"}}}'
    )
    sink = await say(engine, request)
    assert list(json.loads(sink.text)) == ["z", "a"]
    assert grammar.reasoning(sink.events)
    sent = fake.seen("/api/chat")[-1].json["format"]
    assert isinstance(sent, dict)
    assert list(sent["properties"]) == ["z", "a"], "the order of the properties is kept"
    fake.script(
        "/api/chat",
        reply(500, {"error": 'invalid format: "x"; expected "json" or a valid JSON Schema object'}),
    )
    await refused(engine, failures.InvalidRequest, request)


async def test_edge_18_images_are_sent_as_bare_base64(fake: FakeOllama, engine: OllamaEngine) -> None:
    pixel = b"\x89PNG" + bytes(8)
    uri = b"data:image/png;base64," + base64.b64encode(pixel)
    request = ask(model="llava")
    for data in (pixel, uri, b"\xff" * (20 << 20)):
        request.messages[0].parts.add(image=pb.Blob(media_type="image/png", data=data))
    await say(engine, request)
    messages = fake.seen("/api/chat")[-1].json["messages"]
    assert isinstance(messages, list)
    images = messages[0]["images"]
    assert images[:2] == [base64.b64encode(pixel).decode()] * 2
    assert len(images[2]) > 20 << 20
    del request.messages[0].parts[1:]
    request.messages[0].parts.add(image=pb.Blob(media_type="image/png", data=b"data:image/png;base64,?"))
    failure, _ = await refused(engine, failures.InvalidRequest, request)
    assert failure.violations[0][0] == "messages[0].parts[1].image.data"


async def test_edge_19_options_are_checked_before_they_are_sent(fake: FakeOllama) -> None:
    async with bridge(fake, models={"llama3.2": {"num_ctx": 2048}}) as engine:
        request = ask(model=MODEL)
        for bad in (
            {"top_k": 1.5},
            {"top_k": "4"},
            {"mirostat": 1},
            {"num_ctx": 4096},
            {"num_gpu": 1},
            {"stop": [1]},
        ):
            request.backend_options["ollama"].CopyFrom(options(**bad))
            failure, _ = await refused(engine, failures.InvalidRequest, request)
            assert failure.violations[0][0] == f"backend_options[ollama].{next(iter(bad))}"
        request.backend_options["ollama"].CopyFrom(
            options(num_keep=2, repeat_last_n=8, stop="x", num_ctx=2048, top_p=0.5)
        )
        request.sampling.seed = 2**40
        request.sampling.temperature = 0.7
        await say(engine, request)
        sent = fake.seen("/api/chat")[-1].json["options"]
        assert isinstance(sent, dict)
        assert 0 <= sent.pop("seed") < 2**31
        assert sent == {
            "num_keep": 2,
            "repeat_last_n": 8,
            "stop": ["x"],
            "num_ctx": 2048,
            "top_p": 0.5,
            "temperature": 0.7,
        }
        request.sampling.top_p = 0.5
        failure, _ = await refused(engine, failures.InvalidRequest, request)
        assert "sampling.top_p" in failure.message
        del request.backend_options["ollama"]
        first = (await say(engine, request)).text
        assert (await say(engine, request)).text == first
        request.sampling.seed = 2
        assert (await say(engine, request)).text != first
        assert fake.scheduler.loads["llama3.2:latest"] == 1, "no request loads the model anew"
    fake.script("/api/chat", reply(500, {"error": 'option "num_ctx" must be of type integer'}))
    async with bridge(fake) as engine:
        await refused(engine, failures.InvalidRequest)


async def test_edge_20_every_spelling_of_a_name_is_one_model() -> None:
    models = [*MODELS, FakeModel(name="hf.co/user/model:Q4_K_M"), FakeModel(name="me/mine:v1")]
    async with FakeOllama(models) as fake, bridge(fake) as engine:
        for name in (
            "llama3.2",
            "llama3.2:latest",
            "LLAMA3.2",
            "library/llama3.2",
            "registry.ollama.ai/library/llama3.2:latest",
            "hf.co/user/model:q4_k_m",
            "me/mine:v1",
            "llama3.2:local",
        ):
            assert started(await say(engine, ask(model=name))).model == name
        assert fake.scheduler.loads["llama3.2:latest"] == 1
        await refused(engine, failures.ModelNotFound, ask(model="llama3.2:3b"))
        await refused(engine, failures.PermissionDenied, ask(model="gpt-oss:120b-cloud"))


async def test_edge_21_a_missing_model_is_not_found_whatever_the_server_calls_it(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    await refused(engine, failures.ModelNotFound, ask(model="nope"))
    await say(engine)
    # It was there a moment ago.
    fake.script("/api/chat", reply(404, {"error": 'model "llama3.2" not found, try pulling it first'}))
    await refused(engine, failures.ModelNotFound)


async def embed(
    engine: OllamaEngine, texts: Sequence[str], model: str = "all-minilm", **fields: Any
) -> pb.EmbedResponse:
    return await engine.embed(Call(request=pb.EmbedRequest(model=model, texts=texts, **fields)))


async def test_edge_22_embeddings_come_in_order_in_batches(fake: FakeOllama) -> None:
    async with bridge(fake, embed_batch_texts=64) as engine:
        texts = [f"text {n}" for n in range(1000)]
        response = await embed(engine, texts)
        assert len(response.embeddings) == 1000
        assert len(fake.seen("/api/embed")) >= 1000 // 64
        alone = await embed(engine, ["text 777"])
        assert alone.embeddings[0] == response.embeddings[777]
        assert alone.cached_embedding_count == 1
        assert response.usage.prompt_token_count == 2000
        assert (await embed(engine, [""])).dimension_count == 32
        assert fake.seen("/api/embed")[0].json.get("truncate", False) is False


async def test_edge_22_a_text_that_is_too_long_is_named(fake: FakeOllama, engine: OllamaEngine) -> None:
    texts = ["a", "long " * 300, "b"]
    with pytest.raises(failures.ContextExceeded) as caught:
        await embed(engine, texts)
    assert [path for path, _ in caught.value.violations] == ["texts[1]"]
    response = await embed(engine, texts, allow_partial=True)
    assert [f.index for f in response.failures] == [1]
    response = await embed(engine, texts, accepted_degradations=[pb.DEGRADATION_KIND_PROMPT_TRUNCATED])
    assert [d.field for d in response.degradations] == ["texts[1]"]
    assert all(len(e.values) == 32 for e in response.embeddings)
    with pytest.raises(failures.ContextExceeded):
        await embed(engine, texts)


async def test_edge_22_dimensions_are_never_ignored(fake: FakeOllama, engine: OllamaEngine) -> None:
    assert (await embed(engine, ["a"], dimension_count=8)).dimension_count == 8
    assert (await embed(engine, ["a"], dimension_count=32)).dimension_count == 32
    with pytest.raises(failures.InvalidRequest) as caught:
        await embed(engine, ["a"], dimension_count=33)
    assert caught.value.violations[0][0] == "dimension_count"


async def test_edge_22_a_chat_model_does_not_embed(fake: FakeOllama, engine: OllamaEngine) -> None:
    with pytest.raises(failures.CapabilityUnsupported):
        await embed(engine, ["a"], model=MODEL)
    await refused(engine, failures.CapabilityUnsupported, ask(model="all-minilm"))
    fake.version = "0.5.1"
    async with bridge(fake) as old:
        with pytest.raises(failures.CapabilityUnsupported):
            await embed(old, ["a"], model=MODEL)


async def test_edge_22_other_answers_to_embed(fake: FakeOllama, engine: OllamaEngine) -> None:
    await embed(engine, ["warm"])
    fake.script("/api/embed", reply(200, {"model": "other", "embeddings": [[1.0]]}))
    with pytest.raises(failures.WrongModel):
        await embed(engine, ["a"])
    fake.script("/api/embed", reply(200, {"model": "all-minilm", "embeddings": []}))
    with pytest.raises(failures.BackendError):
        await embed(engine, ["a"])
    fake.script("/api/embed", reply(400, {"error": "embedding contains NaN or Inf values"}))
    with pytest.raises(failures.InvalidRequest):
        await embed(engine, ["a"])
    for values, wanted in (({"keep_alive": "1m"}, "1m"), ({}, None)):
        request = pb.EmbedRequest(model="all-minilm", texts=[f"b{wanted}"])
        request.backend_options["ollama"].CopyFrom(options(**values))
        await engine.embed(Call(request=request))
        assert fake.seen("/api/embed")[-1].json.get("keep_alive") == wanted
    for bad in ({"temperature": 1}, {"num_ctx": 9}):
        request = pb.EmbedRequest(model="all-minilm", texts=["c"])
        request.backend_options["ollama"].CopyFrom(options(**bad))
        with pytest.raises(failures.InvalidRequest):
            await engine.embed(Call(request=request))


async def test_edge_23_the_norm_is_measured_and_not_believed(fake: FakeOllama, engine: OllamaEngine) -> None:
    assert (await embed(engine, ["a"])).normalized
    fake.script("/api/embed", reply(200, {"model": "all-minilm", "embeddings": [[3.0, 4.0]]}))
    assert not (await embed(engine, ["b"])).normalized


async def test_edge_24_lists_may_lack_anything(fake: FakeOllama, engine: OllamaEngine) -> None:
    for body in ({"models": None}, {"models": []}, {}, {"models": [{}, None, {"size": 1}]}):
        fake.script("/api/tags", reply(200, body))
        assert not (await engine.list_models(pb.ListModelsRequest())).models
    bare = {"name": "bare:latest", "details": {"families": None}}
    fake.script("/api/tags", reply(200, {"models": [bare]}))
    process = {"name": "bare:latest", "expires_at": "2024-06-04T14:38:31.837531234-07:00", "size": 5}
    for_ever = {**process, "expires_at": "2318-11-23T11:40:11.123456789Z"}
    fake.script("/api/ps", reply(200, {"models": [process, {}]}))
    (model,) = (await engine.list_models(pb.ListModelsRequest())).models
    assert model.state == pb.Model.STATE_ACTIVE
    assert model.expire_time.ToJsonString() == "2024-06-04T21:38:31.837531Z"
    assert model.memory_bytes == 5
    fake.script("/api/tags", reply(200, {"models": [bare]}))
    for odd in (
        for_ever,
        {**process, "expires_at": "soon"},
        {**process, "expires_at": "2024-06-04T14:38:31"},
    ):
        fake.script("/api/tags", reply(200, {"models": [bare]}))
        fake.script("/api/ps", reply(200, {"models": [odd]}))
        (model,) = (await engine.list_models(pb.ListModelsRequest())).models
        assert not model.HasField("expire_time")
    fake._scripts.clear()


async def test_edge_25_show_may_lack_anything(fake: FakeOllama) -> None:
    for shown in (
        {},
        {"model_info": None, "license": ["a", "b"]},
        {"model_info": {"general.architecture": "llama"}},
        {"model_info": {"tokens": ["x" * 100] * 30_000}},
    ):
        async with bridge(fake) as engine:
            fake.script("/api/show", reply(200, shown))
            model = (await engine.library.get_model(models_pb.GetModelRequest(model=MODEL))).model
            assert model.context_token_count == 8192, "what the list says stands"
    async with bridge(fake) as engine:
        fake.script("/api/show", reply(500, {"error": "unreadable"}))
        assert (await engine.library.get_model(models_pb.GetModelRequest(model=MODEL))).model.id


async def pull(
    engine: OllamaEngine, model: str = "tiny", sent: list[models_pb.PullModelResponse] | None = None
) -> list[models_pb.PullModelResponse]:
    sent = [] if sent is None else sent

    async def send(event: models_pb.PullModelResponse) -> None:
        sent.append(event)

    await engine.library.pull_model(models_pb.PullModelRequest(model=model), send)
    return sent


@pytest.fixture
async def shop() -> AsyncIterator[FakeOllama]:
    layers = [Layer(digest=f"sha256:{digit * 64}", size=size) for digit, size in (("a", 5 << 20), ("b", 700))]
    async with FakeOllama(registry={"tiny:latest": layers}, pull_seconds=0.002) as fake:
        yield fake


async def test_edge_26_a_pull_is_told_layer_by_layer(shop: FakeOllama) -> None:
    async with bridge(shop) as engine:
        events = await pull(engine)
        assert events[-1].pulled.model.id == "tiny:latest"
        done: dict[str, list[int]] = {}
        for event in events[:-1]:
            done.setdefault(event.progress.digest, []).append(event.progress.completed_bytes)
        assert all(values == sorted(values) for values in done.values())
        assert max(done[f"sha256:{'a' * 64}"]) == 5 << 20
        assert (await pull(engine))[-1].pulled.model.id == "tiny:latest", (
            "layers that are here are not fetched again"
        )


async def test_edge_26_a_pull_that_fails_says_why(shop: FakeOllama) -> None:
    async with bridge(shop, allow_pull=True) as engine:
        with pytest.raises(failures.ModelNotFound):
            await pull(engine, "nothing")
        shop.script("/api/pull", lines({"status": "pulling manifest"}))
        with pytest.raises(failures.BrokenStream):
            await pull(engine)
        digest = f"sha256:{'c' * 64}"
        back = [{"status": "x", "digest": digest, "total": 10, "completed": n} for n in (7, 3, 9)]
        steps = [step for line in [*back, {"status": "success"}] for step in (Line(line), Pause(0.03))]
        shop.script("/api/pull", steps)
        sent: list[models_pb.PullModelResponse] = []
        with pytest.raises(failures.ModelNotFound):  # the script says success, and there is no such model
            await pull(engine, sent=sent)
        assert [event.progress.completed_bytes for event in sent] == [7, 9], "bytes are never taken back"
        for name in ("", "../x", "a/b/c/d e", "x:"):
            with pytest.raises(failures.InvalidRequest):
                await pull(engine, name)
        with pytest.raises(failures.PermissionDenied):
            await pull(engine, "169.254.169.254/library/x")
        request = models_pb.PullModelRequest(model="tiny")
        request.backend_options["ollama"].CopyFrom(options(insecure=True))
        with pytest.raises(failures.InvalidRequest):
            await engine.library.pull_model(request, Sink())  # type: ignore[arg-type]  # nothing is sent
    async with bridge(shop, allow_pull=False) as engine:
        with pytest.raises(failures.PermissionDenied):
            await pull(engine)


async def test_edge_26_a_pull_survives_its_caller_and_resumes_after_a_stop(shop: FakeOllama) -> None:
    digest = f"sha256:{'a' * 64}"
    shop.pull_seconds, shop.pull_bytes = 0.01, 1 << 15
    async with bridge(shop) as engine:
        caller = asyncio.create_task(pull(engine))
        await until(lambda: shop.parts.get(digest, 0) > 0)
        caller.cancel()
        await asyncio.wait([caller])
        here = shop.parts[digest]
        await until(lambda: shop.parts[digest] > here)
    here = shop.parts[digest]
    assert here < 5 << 20, "the end of the bridge ends the pull"
    async with bridge(shop) as engine:
        events = await pull(engine)
    first = next(e.progress for e in events if e.progress.digest == digest)
    assert first.completed_bytes >= here


async def test_edge_27_deleting_has_an_empty_answer(fake: FakeOllama, engine: OllamaEngine) -> None:
    request = models_pb.DeleteModelRequest(model="llava")
    await engine.library.delete_model(request)
    with pytest.raises(failures.ModelNotFound):
        await engine.library.delete_model(request)
    await refused(engine, failures.ModelNotFound, ask(model="llava"))
    async with bridge(fake, allow_delete=False) as engine:
        with pytest.raises(failures.PermissionDenied):
            await engine.library.delete_model(request)


async def test_edge_28_the_bridge_neither_creates_nor_pushes_nor_copies(engine: OllamaEngine) -> None:
    # Creating is the emulator's business, which the official clients test. The bridge cannot even reach it.
    for path in ("/api/create", "/api/push", "/api/copy", "/api/blobs/{}"):
        with pytest.raises(ValueError, match="not among the paths"):
            await engine._client.post(path, {}, timeout=1)


async def test_edge_29_leaving_while_queued_frees_the_place(fake: FakeOllama, engine: OllamaEngine) -> None:
    fake.token_seconds = 0.02
    async with asyncio.TaskGroup() as group:
        group.create_task(say(engine))
        await until(lambda: fake.running == 1)
        sink = Sink()
        waiting = group.create_task(say(engine, sink=sink))
        await until(lambda: sink.kinds == ["progress"])
        waiting.cancel()
    assert len(fake.seen("/api/chat")) == 1, "a call that left the queue was never sent"


async def test_edge_29_leaving_while_loading_leaves_the_load_to_the_others() -> None:
    hold = asyncio.Event()
    scheduler = Scheduler(hold_loads=hold)
    async with FakeOllama(scheduler=scheduler) as fake, bridge(fake, slots=2) as engine:
        first, second = asyncio.create_task(say(engine)), asyncio.create_task(say(engine))
        await until(lambda: scheduler.loading == 1)
        first.cancel()
        await asyncio.wait([first])
        hold.set()
        assert (await second).text
        assert (scheduler.aborted_loads, scheduler.loads["llama3.2:latest"]) == (0, 1)
        assert len(fake.seen("/api/generate")) == 1


async def test_edge_29_leaving_in_mid_reply_closes_the_socket_at_once(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    fake.token_seconds = 0.03

    async def left() -> float:
        talking = asyncio.create_task(say(engine))
        await until(lambda: fake.running == 1 and fake.generations[-1].sent >= 2)
        talking.cancel()
        took = await until(lambda: fake.generations[-1].state == "stopped")
        await asyncio.wait([talking])
        return took

    await promptly(0.2, left)


async def test_edge_29_leaving_before_the_first_token_closes_the_socket_at_once(fake: FakeOllama) -> None:
    async with bridge(fake, progress_interval=0.01) as engine:
        fake.token_seconds = 5
        talking = asyncio.create_task(say(engine))
        await until(lambda: fake.running == 1)
        talking.cancel()
        assert await until(lambda: fake.generations[0].state == "stopped") < 0.2
        await asyncio.wait([talking])


async def test_edge_30_a_load_outlives_the_deadline_of_who_began_it() -> None:
    hold = asyncio.Event()
    scheduler = Scheduler(hold_loads=hold)
    async with FakeOllama(scheduler=scheduler) as fake, bridge(fake, progress_interval=0.02) as engine:
        sink = Sink()
        caller = asyncio.create_task(say(engine, sink=sink))
        await until(lambda: len(sink.events) > 1)
        caller.cancel()
        await asyncio.wait([caller])
        stages = {e.progress.stage for e in sink.events if isinstance(e, pb.GenerateResponse)}
        assert stages == {pb.Progress.STAGE_LOADING}
        (model,) = [m for m in await engine.library.list_models() if m.id == "llama3.2:latest"]
        assert model.state == pb.Model.STATE_LOADING
        hold.set()
        await until(lambda: scheduler.loads["llama3.2:latest"] == 1)
        assert (await say(engine)).text
        assert scheduler.aborted_loads == 0
    assert scheduler.loads["llama3.2:latest"] == 1


async def test_edge_31_fifty_streams_over_one_slot_wait_in_the_bridge(fake: FakeOllama) -> None:
    async with bridge(fake, queue=100) as engine:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(say(engine, ask(f"number {n}", model=MODEL))) for n in range(50)]
            other = group.create_task(say(engine, ask(model="qwen3")))
        assert other.result().text, "another model does not wait behind"
        assert all(task.result().text for task in tasks)
    assert len({task.result().text for task in tasks}) == 50


async def test_edge_31_two_hundred_streams_run_at_once() -> None:
    async with (
        FakeOllama(scheduler=Scheduler(parallel=200), token_seconds=0.001) as fake,
        bridge(fake, slots=200) as engine,
    ):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(say(engine, ask(f"number {n}", model=MODEL))) for n in range(200)]
        assert len({task.result().text for task in tasks}) == 200
        assert fake.scheduler.loads["llama3.2:latest"] == 1
        assert len(fake.seen("/api/tags")) < 10, "a burst of calls asks for the list once"


async def test_edge_31_a_full_queue_refuses_and_says_when_to_come_back(fake: FakeOllama) -> None:
    async with bridge(fake, queue=1, queue_timeout=0.7) as engine:
        gate = Until()
        fake.script("/api/chat", [gate, Normal()])
        async with asyncio.TaskGroup() as group:
            group.create_task(say(engine))
            await until(lambda: len(fake.seen("/api/chat")) == 1)
            waiting = group.create_task(refused(engine, failures.QueueTimeout))
            await until(lambda: "queue 1" in repr(engine))
            failure, _ = await refused(engine, failures.QueueFull)
            assert failure.retry_after
            await asyncio.wait([waiting])
            gate.event.set()
        assert waiting.result()[1].kinds == ["progress"]


async def test_edge_32_an_old_server_is_served_as_far_as_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    thinks = FakeModel(name="r1:latest", reply=("<thi", "nk>hm</th", "ink>\n\nyes"), answer_tokens=3)
    with caplog.at_level(logging.WARNING):
        async with FakeOllama([*MODELS, thinks], version="0.5.1") as fake, bridge(fake) as engine:
            sink = await say(engine, ask(model="r1"))
            assert (grammar.reasoning(sink.events), sink.text) == ("hm", "yes")
            request = ask(model=MODEL)
            request.logprobs.top_logprob_count = 1
            await refused(engine, failures.CapabilityUnsupported, request)
            request.accepted_degradations.append(pb.DEGRADATION_KIND_OPTION_IGNORED)
            assert [d.field for d in started(await say(engine, request)).degradations] == ["logprobs"]
            models = (await engine.list_models(pb.ListModelsRequest())).models
            assert "CVE-2026-7482" in models[0].detail
            assert models[0].context_token_count == 8192, "from /api/show"
            reports = {r.capability for r in models[0].capabilities}
            assert pb.CAPABILITY_TOOLS not in reports, "what is not known is not said"
            await engine.probe()
            await refused(engine, failures.ModelNotFound, ask(model="nope"))
    assert sum("CVE-2026-7482" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("body", "good"),
    [
        ({"version": "0.0.0"}, True),
        ({"version": "0.33.0-rc2"}, True),
        ({"version": "next"}, True),
        ({}, False),
        ({"version": 3}, False),
        ("<html></html>", False),
    ],
)
async def test_edge_33_health_is_a_version_that_can_be_read(
    fake: FakeOllama, body: object, good: bool
) -> None:
    async with bridge(fake) as engine:
        fake.script("/api/version", reply(200, body))
        if good:
            await engine.probe()
            assert engine.library.version.warning == ""
        else:
            with pytest.raises(failures.BackendUnavailable):
                await engine.probe()
    assert not fake.scheduler.loads, "a probe loads nothing"


async def test_edge_34_log_probabilities_without_text_are_kept_for_the_text(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    def chance(token: str) -> dict[str, object]:
        entry: dict[str, object] = {"token": token, "logprob": -0.5, "bytes": list(token.encode())}
        return {**entry, "top_logprobs": [entry, {"token": "x", "logprob": 1e-9, "bytes": [300]}]}

    request = ask(model=MODEL)
    request.logprobs.top_logprob_count = 2
    fake.script(
        "/api/chat",
        lines(
            chunk("", logprobs=[chance("a")]), chunk("ab", logprobs=[chance("b")]), end(logprobs=[chance("")])
        ),
    )
    sink = await say(engine, request)
    deltas = grammar.deltas(sink.events)
    assert [[entry.token for entry in delta.logprobs] for delta in deltas] == [["a", "b"], [""]]
    assert deltas[0].token_count == 2
    assert deltas[0].logprobs[0].raw_bytes == b"a"
    assert deltas[0].logprobs[0].top_logprobs[1].logprob == 0
    assert fake.seen("/api/chat")[-1].json["top_logprobs"] == 2
    fake.script("/api/chat", lines(chunk("a"), end()))
    failure, _ = await refused(engine, failures.BrokenStream, request)
    assert "log probabilities" in failure.message
    fake.script("/api/chat", reply(400, {"error": "top_logprobs must be between 0 and 20"}))
    await refused(engine, failures.InvalidRequest, request)


async def test_edge_35_text_is_text_whatever_it_looks_like(fake: FakeOllama, engine: OllamaEngine) -> None:
    odd = ["null", "[DONE]", '{"done":true}', "data: x\n", "<think>", "\u2028", "</s"]
    fake.script("/api/chat", lines(*(chunk(text) for text in odd), end()))
    assert (await say(engine)).text == "".join(odd)
    whole = (await say(engine)).text
    request = ask(model=MODEL)
    request.limits.stop_sequences.append(whole[4:12])
    assert (await say(engine, request)).text == whole[:4]


async def test_edge_36_the_host_header_can_be_set(fake: FakeOllama) -> None:
    port = fake.url.rpartition(":")[2]
    public = OllamaSettings(base_url=fake.url, host_header=f"ollama.example.org:{port}")
    async with OllamaEngine.running(public) as engine:
        with pytest.raises(failures.BackendUnavailable, match="set host_header"):
            await engine.probe()
    async with bridge(fake, host_header="localhost:11434"):
        assert fake.requests[-1].headers["Host"] == "localhost:11434"


async def test_edge_37_odd_http_is_read_or_refused(fake: FakeOllama, engine: OllamaEngine) -> None:
    fake.script("/api/chat", [Head(307, {"Location": "http://127.0.0.1:9/steal"}), Flush()])
    await refused(engine, failures.Failure)
    data = b"".join(json.dumps(value).encode() + b"\n" for value in (chunk("a"), end()))
    fake.script("/api/chat", [Head(200, {"Content-Encoding": "gzip"}), Body(gzip.compress(data))])
    assert (await say(engine)).text == "a"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n"
    fake.script("/api/chat", [Raw(head + data)])
    assert (await say(engine)).text == "a"
    fake.script("/api/chat", [Raw(head + data[:-30])])
    await refused(engine, failures.BrokenStream)
    fake.script("/api/chat", [Raw(b"SSH-2.0-OpenSSH\r\n")])
    await refused(engine, failures.Failure)


async def test_edge_38_what_comes_after_the_end_is_ignored(fake: FakeOllama, engine: OllamaEngine) -> None:
    fake.script("/api/chat", lines(chunk("a"), end(), end(), chunk("more"), {"error": "late"}))
    sink = await say(engine)
    assert sink.text == "a"
    assert sink.kinds.count("finished") == 1


# Beyond the list


async def test_another_model_than_asked_is_an_error_unless_accepted(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    other = {**chunk("a"), "model": "other:7b"}
    fake.script("/api/chat", lines(other, end()), times=2)
    await refused(engine, failures.WrongModel)
    request = ask(model=MODEL)
    request.accepted_degradations.append(pb.DEGRADATION_KIND_MODEL_SUBSTITUTED)
    begin = started(await say(engine, request))
    assert begin.model == "other:7b"
    assert [d.kind for d in begin.degradations] == [pb.DEGRADATION_KIND_MODEL_SUBSTITUTED]
    assert not begin.HasField("weights")


async def test_a_prompt_that_cannot_fit_is_not_sent(fake: FakeOllama, engine: OllamaEngine) -> None:
    request = ask("river " * 5000, model=MODEL)
    failure, _ = await refused(engine, failures.ContextExceeded, request)
    assert failure.metadata["context_token_count"] == "4096"
    assert not fake.seen("/api/chat")


async def test_a_prompt_that_may_fit_is_sent_with_truncation_off(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    request = ask("river " * 4094, model=MODEL)
    request.messages.insert(0, message("short"))
    await refused(engine, failures.ContextExceeded, request)
    assert fake.seen("/api/chat")[0].json["truncate"] is False
    request.accepted_degradations.append(pb.DEGRADATION_KIND_PROMPT_TRUNCATED)
    sink = await say(engine, request)
    assert [d.field for d in started(sink).degradations] == ["messages"]
    assert fake.seen("/api/chat")[-1].json["truncate"] is True


async def test_a_prompt_that_was_cut_all_the_same_is_noticed(fake: FakeOllama, engine: OllamaEngine) -> None:
    fake.script("/api/chat", lines(chunk("a"), {**end(), "prompt_eval_count": 2100}))
    failure, _ = await refused(engine, failures.ContextExceeded, ask("river " * 4000, model=MODEL))
    assert "part of the conversation" in failure.message


@pytest.mark.parametrize(("version", "told"), [("0.29.0", (0, 7)), ("0.30.0", (3, 7))])
async def test_a_count_that_leaves_out_what_was_cached_is_not_told(
    version: str, told: tuple[int, int]
) -> None:
    async with FakeOllama([*MODELS], version=version) as fake, bridge(fake) as engine:
        counts = []
        for count in (3, 7):
            fake.script("/api/chat", lines(chunk("a"), {**end(), "prompt_eval_count": count}))
            sink = await say(engine, ask("one two three four five six", model=MODEL))
            counts.append(finished(sink).usage.prompt_token_count)
    assert tuple(counts) == told


async def test_a_reply_that_fills_the_context_ends_with_length(fake: FakeOllama) -> None:
    async with bridge(fake, models={"llama3.2": {"num_ctx": 16}}) as engine:
        sink = await say(engine, ask("one two three four five six seven eight", model=MODEL))
        assert finished(sink).reason == pb.FINISH_REASON_LENGTH
        assert fake.seen("/api/chat")[0].json["shift"] is False


async def test_loads_and_chats_send_the_same_options(fake: FakeOllama) -> None:
    pins = {"num_ctx": 2048, "num_gpu": -1, "keep_alive": "10m", "slots": 2}
    async with bridge(
        fake, models={"LLAMA3.2": pins}, preload=["llama3.2", "nope"], keep_alive="1h"
    ) as engine:
        engine.preload()
        await until(lambda: fake.scheduler.loads["llama3.2:latest"] == 1)
        await say(engine)
        load, chat = fake.seen("/api/generate")[0].json, fake.seen("/api/chat")[0].json
        for key in ("options", "shift", "keep_alive"):
            assert load[key] == chat[key], key
        assert chat["options"] == {"num_ctx": 2048, "num_gpu": -1}
        assert chat["keep_alive"] == "10m"
        (model,) = [m for m in await engine.library.list_models() if m.id == "llama3.2:latest"]
        assert (model.loaded_context_token_count, model.slot_count) == (2048, 2)
    assert fake.scheduler.loads["llama3.2:latest"] == 1


async def load(engine: OllamaEngine, request: models_pb.LoadModelRequest) -> models_pb.ModelLoaded:
    sent: list[models_pb.LoadModelResponse] = []

    async def send(event: models_pb.LoadModelResponse) -> None:
        sent.append(event)

    await engine.library.load_model(request, send)
    assert [event.WhichOneof("event") for event in sent[:-1]] == ["progress"] * (len(sent) - 1)
    return sent[-1].loaded


async def test_a_load_decides_how_the_model_is_run_from_then_on(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    await say(engine)
    request = models_pb.LoadModelRequest(model=MODEL, context_token_count=1024, pinned=True)
    loaded = await load(engine, request)
    assert loaded.model.loaded_context_token_count == 1024
    assert not loaded.model.HasField("expire_time")
    await say(engine)
    again = await load(engine, request)
    assert again.load_duration.ToNanoseconds() == 0
    assert fake.scheduler.loads["llama3.2:latest"] == 2
    request = models_pb.LoadModelRequest(model=MODEL)
    request.keep_alive_duration.FromTimedelta(timedelta(minutes=2))
    request.backend_options["ollama"].CopyFrom(options(num_gpu=1, use_mmap=True))
    loaded = await load(engine, request)
    assert loaded.model.HasField("expire_time")
    await say(engine)
    sent = fake.seen("/api/chat")[-1].json
    assert sent["options"] == {"num_gpu": 1, "use_mmap": True}
    assert sent["keep_alive"] == 120
    await engine.library.unload_model(models_pb.UnloadModelRequest(model=MODEL))
    await say(engine)
    assert fake.seen("/api/chat")[-1].json["options"] == {}


async def test_a_model_that_stays_for_no_time_is_loaded_all_the_same(fake: FakeOllama) -> None:
    async with bridge(fake, keep_alive="0s") as engine:
        assert (await say(engine)).text
        assert "keep_alive" not in fake.seen("/api/generate")[0].json
        assert fake.seen("/api/chat")[0].json["keep_alive"] == "0s"
        assert fake.scheduler.loads["llama3.2:latest"] == 1
        await until(lambda: not fake.scheduler.runners)
        request = models_pb.LoadModelRequest(model=MODEL)
        request.keep_alive_duration.FromTimedelta(timedelta(0))
        with pytest.raises(failures.InvalidRequest, match="keep_alive_duration"):
            await load(engine, request)


@pytest.mark.parametrize(("model", "num_ctx", "context"), [("llama3.2", 1 << 20, 8192), ("llava", 16, 2048)])
async def test_a_context_that_the_server_changes_is_not_asked_for_again(
    fake: FakeOllama, model: str, num_ctx: int, context: int
) -> None:
    async with bridge(fake, models={model: {"num_ctx": num_ctx}}) as engine:
        for _ in range(3):
            await say(engine, ask(model=model))
        (listed,) = [m for m in await engine.library.list_models() if m.id == f"{model}:latest"]
    assert listed.loaded_context_token_count == context
    assert len(fake.seen("/api/generate")) == 1


async def test_a_load_must_not_contradict_the_settings(fake: FakeOllama) -> None:
    async with bridge(fake, models={"llama3.2": {"num_ctx": 2048}}) as engine:
        with pytest.raises(failures.InvalidRequest) as caught:
            await load(engine, models_pb.LoadModelRequest(model=MODEL, context_token_count=4096))
        assert caught.value.violations[0][0] == "context_token_count"
        request = models_pb.LoadModelRequest(model=MODEL)
        for bad in ({"num_gpus": 1}, {"num_gpu": "x"}, {"use_mmap": 1}):
            request.backend_options["ollama"].CopyFrom(options(**bad))
            with pytest.raises(failures.InvalidRequest):
                await load(engine, request)


async def test_a_load_that_fails_fails_for_all_who_wait() -> None:
    broken = FakeModel(
        name="broken:latest", load_error="llama-server process has terminated: error loading model"
    )
    async with FakeOllama([broken]) as fake, bridge(fake, slots=2) as engine:
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(refused(engine, failures.ModelLoadFailed, ask(model="broken")))
        with pytest.raises(failures.ModelLoadFailed):
            await load(engine, models_pb.LoadModelRequest(model="broken"))
        fake.script("/api/generate", reply(200, {"model": "broken", "done": True, "done_reason": "load"}))
        with pytest.raises(failures.ModelLoadFailed):
            await load(engine, models_pb.LoadModelRequest(model="broken"))


async def test_models_on_other_machines_are_left_out_unless_allowed(fake: FakeOllama) -> None:
    remote = {
        "name": "far:latest",
        "digest": "aa",
        "remote_host": "https://ollama.com",
        "remote_model": "far",
    }
    for allowed in (False, True):
        async with bridge(fake, allow_cloud=allowed) as engine:
            fake.script("/api/tags", reply(200, {"models": [remote]}), times=2)
            listed = (await engine.list_models(pb.ListModelsRequest())).models
            assert [m.id for m in listed] == (["far:latest"] if allowed else [])
            fake.script("/api/chat", lines({**end("a"), "model": "far"}))
            if allowed:
                assert (await say(engine, ask(model="far"))).text == "a"
            else:
                await refused(engine, failures.PermissionDenied, ask(model="far"))
            fake._scripts.clear()


async def test_what_ollama_lacks_is_refused_or_told(fake: FakeOllama, engine: OllamaEngine) -> None:
    def biased(request: pb.GenerateRequest) -> None:
        request.sampling.logit_bias[3] = 1.0

    def stopping(request: pb.GenerateRequest) -> None:
        request.limits.stop_token_ids.append(2)

    def lark(request: pb.GenerateRequest) -> None:
        request.output_format.lark_grammar = "start: /a/"

    def required(request: pb.GenerateRequest) -> None:
        request.tools.append(tool())
        request.tool_choice.mode = pb.ToolChoice.MODE_REQUIRED

    for change, path in (
        (biased, "sampling.logit_bias"),
        (stopping, "limits.stop_token_ids"),
        (lark, "output_format.lark_grammar"),
        (required, "tool_choice"),
    ):
        request = ask(model=MODEL)
        change(request)
        failure, _ = await refused(engine, failures.CapabilityUnsupported, request)
        assert failure.metadata["field"] == path
        request.accepted_degradations.extend(
            [pb.DEGRADATION_KIND_OPTION_IGNORED, pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED]
        )
        assert [d.field for d in started(await say(engine, request)).degradations] == [path]


async def test_a_tool_that_must_not_be_called_is_not_offered(fake: FakeOllama, engine: OllamaEngine) -> None:
    request = ask("call f", model=MODEL)
    request.tools.append(tool())
    assert grammar.tool_calls((await say(engine, request)).events)
    request.tool_choice.mode = pb.ToolChoice.MODE_NONE
    assert not grammar.tool_calls((await say(engine, request)).events)
    assert "tools" not in fake.seen("/api/chat")[-1].json


async def test_a_conversation_with_tools_is_written_as_ollama_reads_it(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    request = ask("call f", model=MODEL)
    request.messages.insert(0, message("Be brief.", pb.ROLE_SYSTEM))
    assistant = pb.Message(role=pb.ROLE_ASSISTANT)
    assistant.parts.add(reasoning="hm")
    assistant.parts.add(text="I look.")
    assistant.parts.add(tool_call=pb.ToolCall(id="c1", name="f", arguments_json='{"z": 1, "a": 2}'))
    results = pb.Message(role=pb.ROLE_TOOL)
    results.parts.add(tool_result=pb.ToolResult(id="c1", text="3"))
    results.parts.add(tool_result=pb.ToolResult(id="c2", text="4"))
    request.messages.extend([assistant, results])
    request.tools.append(tool())
    await say(engine, request)
    sent = fake.seen("/api/chat")[-1].json
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "call f"},
        {
            "role": "assistant",
            "content": "I look.",
            "thinking": "hm",
            "tool_calls": [
                {"id": "c1", "function": {"index": 0, "name": "f", "arguments": {"z": 1, "a": 2}}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1", "tool_name": "f"},
        {"role": "tool", "content": "4", "tool_call_id": "c2"},
    ]
    tools = sent["tools"]
    assert isinstance(tools, list)
    assert tools[0]["function"]["parameters"]["type"] == "object"


async def test_nothing_of_the_prompt_or_the_token_is_told_in_errors_or_logs(
    fake: FakeOllama, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "swordfish-9"
    with caplog.at_level(logging.DEBUG):
        async with bridge(fake, token=f"{secret}-token") as engine:
            request = ask(f"the word is {secret}", model=MODEL)
            fake.script("/api/chat", reply(500, {"error": f"template: cannot render {secret}"}))
            failure, _ = await refused(engine, failures.BackendError, request)
            fake.script("/api/chat", lines(chunk(secret), {"error": secret}))
            later, _ = await refused(engine, failures.StreamInterrupted, request)
            assert fake.seen("/api/chat")[0].headers["Authorization"] == f"Bearer {secret}-token"
            shown = [str(engine), repr(OllamaSettings(token=secret))]
    for told in (failure, later):
        shown += [str(told.to_status())]
    assert secret not in "\n".join(shown + [record.getMessage() for record in caplog.records])


async def test_the_model_s_weights_are_told_by_the_digest_of_their_file(
    fake: FakeOllama, engine: OllamaEngine
) -> None:
    model = fake.models["registry.ollama.ai/library/llama3.2:latest"]
    weights = started(await say(engine)).weights
    assert weights.digest == f"sha256:{model.weights}"
    assert (weights.family, weights.quantization, weights.format) == ("llama", "Q4_K_M", "gguf")
    assert weights.parameter_count == 3_212_749_888


async def test_timings_say_what_was_waited_for() -> None:
    hold = asyncio.Event()
    async with (
        FakeOllama(scheduler=Scheduler(hold_loads=hold), token_seconds=0.005) as fake,
        bridge(fake) as engine,
    ):
        first = asyncio.create_task(say(engine))
        await until(lambda: fake.scheduler.loading == 1)
        second = asyncio.create_task(say(engine))
        await until(lambda: "queue 1" in repr(engine))
        asyncio.get_running_loop().call_later(0.03, hold.set)
        one, two = finished(await first).timings, finished(await second).timings
    assert one.load_duration.ToMilliseconds() >= 29
    assert two.queue_duration.ToMilliseconds() >= 29
    assert two.load_duration.ToMilliseconds() == 0
    assert one.first_delta_duration.ToMilliseconds() >= 29
    assert one.generation_duration.ToMicroseconds() > 0


def stages(sink: Sink) -> list[pb.Progress.Stage.ValueType]:
    return [
        e.progress.stage for e in sink.events if isinstance(e, pb.GenerateResponse) and e.HasField("progress")
    ]


async def test_a_model_that_went_away_between_look_and_call_is_said_to_load(fake: FakeOllama) -> None:
    async with bridge(fake, progress_interval=0.01) as engine:
        await say(engine)
        gate, sink = Until(), Sink()
        fake.script("/api/chat", [gate, Normal()])
        async with asyncio.TaskGroup() as group:
            group.create_task(say(engine, sink=sink))
            await until(lambda: pb.Progress.STAGE_PREFILLING in stages(sink))
            fake.scheduler.close()
            engine.library._catalogue.forget()
            await until(lambda: pb.Progress.STAGE_LOADING in stages(sink))
            gate.event.set()


async def test_a_server_that_cannot_list_what_runs_is_taken_to_load(fake: FakeOllama) -> None:
    async with bridge(fake, progress_interval=0.01) as engine:
        await say(engine)
        gate, sink = Until(), Sink()
        fake.script("/api/chat", [gate, Normal()])
        async with asyncio.TaskGroup() as group:
            group.create_task(say(engine, sink=sink))
            await until(lambda: len(fake.seen("/api/chat")) == 2)
            fake.script("/api/ps", reply(500, {"error": "no"}), times=99)
            engine.library._catalogue.forget()
            await until(lambda: pb.Progress.STAGE_LOADING in stages(sink))
            gate.event.set()
        fake._scripts.clear()
