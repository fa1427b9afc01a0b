"""The OpenAI bridge keeps the suite's promises over a real llama-server, and what only a real one shows."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendUnavailable
from forebay.kit.pipeline import Call
from forebay.kit.server import serving
from forebay.models.v1 import models_pb2 as models_pb
from forebay.openai_bridge.config import OpenAiSettings
from forebay.openai_bridge.engine import OpenAiEngine
from forebay.testing import grammar
from forebay.testing.calls import Sink, ask, message, serve
from forebay.testing.client import CallError, Client, client
from forebay.testing.contract import SCHEMA, TOOL, ContractSuite, Target
from llama import MISSING, Running, find, llama_server, wait_for, write_model, write_scripted
from promptly import promptly

pytestmark = [pytest.mark.llama, pytest.mark.skipif(find() is None, reason=MISSING)]

CONTEXT = 16_384

ABILITIES = frozenset(
    {
        pb.CAPABILITY_GENERATE,
        pb.CAPABILITY_JSON_SCHEMA,
        pb.CAPABILITY_SEED,
        pb.CAPABILITY_LOGPROBS,
        pb.CAPABILITY_CONTINUE,
        pb.CAPABILITY_COUNT_TOKENS,
        pb.CAPABILITY_TOKEN_IDS,
        pb.CAPABILITY_TOOLS,
    }
)


async def processing(url: str) -> int:
    """Returns how many slots of a llama-server generate."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session, session.get(f"{url}/slots") as answer:
        return sum(1 for slot in await answer.json() if slot["is_processing"])


async def until(what: Callable[[], object], *, seconds: float = 10) -> None:
    """Waits until something is true."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def bridge(url: str, **settings: object) -> AsyncIterator[tuple[OpenAiEngine, str]]:
    """Serves a bridge to a server, once the server was found; gives the engine and the address."""
    found = asyncio.Event()
    options = {"address": "127.0.0.1:0", "base_url": url, "probe_interval": 0.1, **settings}
    parsed = OpenAiSettings.model_validate(options)
    async with (
        OpenAiEngine(parsed) as engine,
        serving(parsed, inference=engine, models=engine) as up,
    ):

        async def tell(ready: bool, detail: str) -> None:
            await up.set_ready(ready, detail)
            if ready:
                found.set()

        engine.watch(tell)
        async with asyncio.timeout(20):
            await found.wait()
        yield engine, up.address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def talker(folder: Path) -> Iterator[Running]:
    """A server whose model babbles without end."""
    model = write_model(folder / "talker.gguf", width=128, layers=4, context=CONTEXT)
    options = ("--alias", "talker", "-c", str(2 * CONTEXT), "-np", "2", "--embeddings", "--pooling", "mean")
    with llama_server(folder, *options, model=model) as server:
        yield server


@pytest.fixture(scope="module")
def reciter(folder: Path) -> Iterator[Running]:
    """A server whose model says one JSON object."""
    pieces = ['{"place"', ': "the', " mill", '", "depth"', ": 3", "}"]
    model = write_scripted(folder / "reciter.gguf", pieces)
    with llama_server(folder, "-c", "2048", "-np", "1", model=model) as server:
        yield server


@pytest.fixture(scope="module")
def router(folder: Path) -> Iterator[Running]:
    """A server without a model of its own, that loads what it is asked to."""
    models = folder / "models"
    models.mkdir()
    write_model(models / "a.gguf", width=128, layers=4, context=CONTEXT)
    write_model(models / "b.gguf", seed=2)
    write_model(models / "c.gguf", seed=3)
    (models / "broken.gguf").write_bytes(b"GGUF and nothing more")
    options = ("--models-dir", str(models), "--models-max", "2", "-c", str(2 * CONTEXT), "-np", "2")
    with llama_server(folder, *options) as server:
        yield server


class TestLlamaServer(ContractSuite):
    @pytest.fixture
    async def target(self, talker: Running) -> AsyncIterator[Target]:
        async with bridge(talker.url) as (_, address):
            yield Target(
                address=address,
                model="talker",
                embedding_model="talker",
                capabilities=ABILITIES,
                backend="openai",
                context_token_count=CONTEXT,
                long_token_count=15_000,
                active=lambda: processing(talker.url),
                manages_models=False,
            )

    async def test_a_required_tool_is_called_or_refused(self, target: Target, peer: Client) -> None:
        pytest.skip("a model that babbles ends no call; the model that recites shows it below")


class TestLlamaServerAsRouter(ContractSuite):
    @pytest.fixture
    async def target(self, router: Running) -> AsyncIterator[Target]:
        async with bridge(router.url) as (_, address):
            yield Target(
                address=address,
                model="a",
                capabilities=ABILITIES,
                backend="openai",
                context_token_count=CONTEXT,
                long_token_count=15_000,
            )

    async def test_a_required_tool_is_called_or_refused(self, target: Target, peer: Client) -> None:
        pytest.skip("a model that babbles ends no call; the model that recites shows it below")


async def test_a_schema_is_enforced_to_its_end(reciter: Running) -> None:
    async with bridge(reciter.url) as (_, address), client(address) as peer:
        request = ask("Where?", model="reciter", token_count=100)
        request.sampling.temperature = 0
        request.output_format.json_schema = SCHEMA
        events = await peer.generate(request)
    assert json.loads(grammar.text(events)) == {"place": "the mill", "depth": 3}
    assert events[-1].finished.reason == pb.FINISH_REASON_STOP


async def test_a_required_tool_is_called(folder: Path) -> None:
    pieces = ["<tool_call>", '{"name": "look_up_depth"', ', "arguments": ', '{"place"', ': "the mill"', "}}"]
    pieces.append("</tool_call>")
    model = write_scripted(folder / "caller.gguf", pieces)
    with llama_server(folder, "-c", "4096", "-np", "1", model=model) as server:
        async with bridge(server.url) as (_, address), client(address) as peer:
            request = ask("How deep?", model="caller", token_count=200)
            request.sampling.temperature = 0
            request.tools.append(TOOL)
            request.tool_choice.mode = pb.ToolChoice.MODE_REQUIRED
            events = await peer.generate(request)
    (call,) = grammar.tool_calls(events)
    assert (call.name, json.loads(call.arguments_json)) == ("look_up_depth", {"place": "the mill"})
    assert events[-1].finished.reason == pb.FINISH_REASON_TOOL_CALLS


async def test_edge_67_llama_server_that_starts_is_unavailable_then_ok(folder: Path) -> None:
    model = write_model(folder / "late.gguf")
    with llama_server(folder, "-c", "512", "-np", "1", model=model, ready="") as server:
        states: list[bool] = []

        async def tell(ready: bool, _: str) -> None:
            states.append(ready)

        async with OpenAiEngine(OpenAiSettings(base_url=server.url, probe_interval=0.02)) as engine:
            with pytest.raises(BackendUnavailable):
                await serve(engine.generate, ask(model="late", token_count=2))
            engine.watch(tell)
            await until(lambda: True in states, seconds=60)
            sink = await serve(engine.generate, ask(model="late", token_count=2))
    assert (states[0], states[-1]) == (False, True)
    grammar.check(sink.events, numbered=False)


async def test_edge_82_loading_a_loaded_model_and_unloading_an_unloaded_one_succeed(router: Running) -> None:
    async with bridge(router.url) as (_, address), client(address) as peer:
        await peer.load(models_pb.LoadModelRequest(model="a"))
        again = await peer.load(models_pb.LoadModelRequest(model="a"))
        assert again.load_duration.ToTimedelta().total_seconds() == 0
        assert (await peer.unload("a")).state == pb.Model.STATE_AVAILABLE
        assert (await peer.unload("a")).state == pb.Model.STATE_AVAILABLE
        with pytest.raises(CallError) as raised:
            await peer.load(models_pb.LoadModelRequest(model="broken"))
        assert raised.value.reason == "MODEL_LOAD_FAILED"
        assert "exit code 1" in raised.value.details
        states = {model.id: model.state for model in await peer.list_models()}
        assert states["broken"] == pb.Model.STATE_FAILED


async def test_edge_82_a_model_in_use_is_not_evicted(router: Running) -> None:
    async with bridge(router.url) as (_, address), client(address, timeout=60) as peer:
        for name in ("a", "b"):
            await peer.load(models_pb.LoadModelRequest(model=name))
        long = ask("Count.", model="a", token_count=1500)
        long.sampling.temperature = 0
        async with asyncio.TaskGroup() as tasks:
            streaming = tasks.create_task(peer.generate(long))
            other = tasks.create_task(peer.generate(ask(model="c", token_count=2)))
        assert streaming.result()[-1].finished.usage.output_token_count == 1500
        assert grammar.text(other.result())


async def test_edge_82_eight_callers_make_one_load(router: Running) -> None:
    def starts() -> int:
        return router.log.read_text(errors="replace").count("spawning server instance with name=b")

    async with bridge(router.url) as (_, address), client(address) as peer:
        await peer.unload("b")
        before = starts()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(peer.load(models_pb.LoadModelRequest(model="b")))
        assert starts() == before + 1


async def test_a_load_goes_on_when_its_caller_leaves(router: Running) -> None:
    async with bridge(router.url) as (_, address), client(address) as peer:
        await peer.unload("b")
        call = peer.models.LoadModel(models_pb.LoadModelRequest(model="b"))
        async for _ in call:
            break
        call.cancel()
        async with asyncio.timeout(20):
            while (await peer.get_model("b")).state != pb.Model.STATE_ACTIVE:
                await asyncio.sleep(0.05)


async def test_generating_loads_and_says_so(router: Running) -> None:
    async with bridge(router.url) as (_, address), client(address) as peer:
        await peer.unload("a")
        events = await peer.generate(ask(model="a", token_count=2))
        stages = [event.progress.stage for event in events if event.WhichOneof("event") == "progress"]
        assert pb.Progress.STAGE_LOADING in stages
        assert events[-1].finished.timings.load_duration.ToNanoseconds() > 0


async def test_a_model_nobody_uses_is_unloaded_after_its_keep_alive(router: Running) -> None:
    async with bridge(router.url) as (_, address), client(address) as peer:
        request = models_pb.LoadModelRequest(model="a")
        request.keep_alive_duration.FromMilliseconds(100)
        loaded = await peer.load(request)
        assert loaded.model.HasField("expire_time")
        async with asyncio.timeout(20):
            while (await peer.get_model("a")).state != pb.Model.STATE_AVAILABLE:
                await asyncio.sleep(0.05)


async def test_a_pinned_model_is_loaded_at_start_and_stays(router: Running) -> None:
    settings = {"pinned": ("b", "nowhere"), "keep_alive": "100ms"}
    async with bridge(router.url, **settings) as (_, address), client(address) as peer:
        async with asyncio.timeout(20):
            while (await peer.get_model("b")).state != pb.Model.STATE_ACTIVE:
                await asyncio.sleep(0.05)
        assert not (await peer.get_model("b")).HasField("expire_time")


async def test_a_single_server_loads_and_unloads_nothing(talker: Running) -> None:
    async with bridge(talker.url) as (_, address), client(address) as peer:
        for attempt in (
            peer.load(models_pb.LoadModelRequest(model="talker")),
            peer.unload("talker"),
            peer.pull(models_pb.PullModelRequest(model="talker")),
            peer.delete("talker"),
        ):
            with pytest.raises(CallError) as raised:
                await attempt
            assert raised.value.code is grpc.StatusCode.UNIMPLEMENTED
            assert raised.value.reason == "CAPABILITY_UNSUPPORTED"
        assert (await peer.get_model("talker")).state == pb.Model.STATE_ACTIVE


async def test_edge_85_a_text_too_long_to_embed_is_named_and_the_others_survive(talker: Running) -> None:
    texts = ["short", "river " * 2000, "also short"]
    async with bridge(talker.url) as (_, address), client(address) as peer:
        with pytest.raises(CallError) as raised:
            await peer.embed(pb.EmbedRequest(model="talker", texts=texts))
        assert raised.value.reason == "CONTEXT_EXCEEDED"
        assert raised.value.fields == ["texts[1]"]
        partial = await peer.embed(pb.EmbedRequest(model="talker", texts=texts, allow_partial=True))
        assert [failure.index for failure in partial.failures] == [1]
        assert [len(e.values) > 0 for e in partial.embeddings] == [True, False, True]
        assert partial.normalized
        again = await peer.embed(pb.EmbedRequest(model="talker", texts=["short", "new"]))
        assert again.cached_embedding_count == 1
        assert list(again.embeddings[0].values) == list(partial.embeddings[0].values)


async def test_components_that_are_not_given_are_never_cut_in_silence(talker: Running) -> None:
    async with bridge(talker.url) as (_, address), client(address) as peer:
        request = pb.EmbedRequest(model="talker", texts=["a"], dimension_count=8)
        with pytest.raises(CallError) as raised:
            await peer.embed(request)
        assert raised.value.reason == "CAPABILITY_UNSUPPORTED"
        request.accepted_degradations.append(pb.DEGRADATION_KIND_OPTION_IGNORED)
        response = await peer.embed(request)
        assert response.dimension_count == 128
        assert [d.field for d in response.degradations] == ["dimension_count"]


async def test_a_server_without_embeddings_says_so(reciter: Running) -> None:
    async with bridge(reciter.url) as (_, address), client(address) as peer:
        (model,) = await peer.list_models()
        reports = {report.capability: report.support for report in model.capabilities}
        assert reports[pb.CAPABILITY_EMBED] == pb.CapabilityReport.SUPPORT_NO
        with pytest.raises(CallError) as raised:
            await peer.embed(pb.EmbedRequest(model="reciter", texts=["a"]))
        assert raised.value.reason == "CAPABILITY_UNSUPPORTED"


async def test_edge_86_a_cancelled_reply_frees_its_slot_within_200_ms(talker: Running) -> None:
    async with bridge(talker.url) as (engine, _):
        loop = asyncio.get_running_loop()

        async def cancelled() -> float:
            sink = Sink()
            request = ask(model="talker", token_count=15_000)
            call = asyncio.create_task(serve(engine.generate, request, sink=sink))
            await until(lambda: "delta" in sink.kinds)
            assert await processing(talker.url) == 1
            begin = loop.time()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            closed = loop.time()
            while await processing(talker.url):  # the server's part is the time to its next token
                await asyncio.sleep(0.005)
            return closed - begin

        await promptly(0.2, cancelled)


async def test_edge_87_bytes_in_are_bytes_out(talker: Running) -> None:
    async with bridge(talker.url) as (engine, _):
        request = ask(model="talker", token_count=200)
        request.sampling.temperature = 0
        request.sampling.seed = 5
        sink = await serve(engine.generate, request)
        body = {
            "messages": [{"role": "user", "content": "Tell me of the river."}],
            "max_tokens": 200,
            "temperature": 0,
            "seed": 5,
        }
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{talker.url}/v1/chat/completions", json=body) as answer,
        ):
            whole = (await answer.json())["choices"][0]["message"]["content"]
    assert sink.text == whole
    assert len(whole) >= 200


async def test_edge_88_a_slow_reader_holds_the_server_back(talker: Running) -> None:
    async with bridge(talker.url) as (engine, _):
        gate = asyncio.Event()
        taken = 0

        async def slow(_: object) -> None:
            nonlocal taken
            taken += 1
            if taken > 20:
                await gate.wait()

        request = ask(model="talker", token_count=15_000)
        call = asyncio.create_task(engine.generate(Call(request=request), slow))
        await until(lambda: taken > 20)
        # What nobody reads stays in the sockets and in the server: its reply does not run to its end.
        for _ in range(50):
            await asyncio.sleep(0.02)
            assert taken == 21
        assert await processing(talker.url) == 1
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_reply_is_taken_up_in_the_middle_without_repeating(talker: Running) -> None:
    async with bridge(talker.url) as (engine, _):
        request = ask(model="talker", token_count=8)
        request.sampling.temperature = 0
        request.continue_from.text = "The river runs"
        sink = await serve(engine.generate, request)
        assert not sink.text.startswith("The river runs")
        assert sink.text


async def test_counting_agrees_with_what_a_reply_uses(talker: Running) -> None:
    async with bridge(talker.url) as (engine, _), asyncio.timeout(20):
        conversation = [
            message("You are brief.", pb.ROLE_SYSTEM),
            message("How deep is it? \u00e9\U0001f600"),
        ]
        request = pb.GenerateRequest(model="talker", messages=conversation)
        request.limits.max_output_token_count = 1
        sink = await serve(engine.generate, request)
        counted = await engine.count_tokens(
            Call(request=pb.CountTokensRequest(model="talker", messages=conversation))
        )
        finished = sink.events[-1]
        assert isinstance(finished, pb.GenerateResponse)
        assert counted.token_count == finished.finished.usage.prompt_token_count


async def test_the_model_goes_by_its_path_its_file_and_its_stem(reciter: Running, folder: Path) -> None:
    async with bridge(reciter.url) as (_, address), client(address) as peer:
        (model,) = await peer.list_models()
        assert model.id == str(folder / "reciter.gguf")
        assert list(model.aliases) == ["reciter.gguf", "reciter"]
        assert model.slot_count == 1
        assert model.weights.quantization == "F32"
        for name in (model.id, *model.aliases):
            events = await peer.generate(ask(model=name, token_count=3))
            started = next(e.started for e in events if e.WhichOneof("event") == "started")
            assert started.model == name


async def test_a_server_that_dies_and_comes_back_is_noticed_and_used_again(folder: Path) -> None:
    model = write_model(folder / "phoenix.gguf")
    states: list[bool] = []

    async def tell(ready: bool, _: str) -> None:
        states.append(ready)

    with llama_server(folder, "-c", "512", model=model) as server:
        port = int(server.url.rpartition(":")[2])
        async with OpenAiEngine(OpenAiSettings(base_url=server.url, probe_interval=0.05)) as engine:
            engine.watch(tell)
            await until(lambda: states == [True])
            server.kill()
            await until(lambda: states == [True, False])
            with pytest.raises(Exception, match="cannot reach"):
                await serve(engine.generate, ask(model="phoenix"))
            with llama_server(folder, "-c", "512", model=model, port=port) as again:
                wait_for(again, "/health")
                await until(lambda: states == [True, False, True])
                sink = await serve(engine.generate, ask(model="phoenix", token_count=3))
                assert sink.kinds[-1] == "finished"


async def test_a_server_killed_in_the_middle_interrupts_the_reply(folder: Path) -> None:
    model = write_model(folder / "mortal.gguf", width=128, layers=4, context=CONTEXT)
    with llama_server(folder, "-c", str(CONTEXT), "-np", "1", model=model) as server:
        async with bridge(server.url) as (_, address), client(address) as peer:
            request = ask(model="mortal", token_count=15_000)
            async with peer.stream(request) as call:
                seen = 0
                try:
                    async for event in call:
                        seen += event.WhichOneof("event") == "delta"
                        if seen == 3:
                            server.kill()
                except grpc.aio.AioRpcError as error:
                    failed = CallError(error, [])
            assert failed.code is grpc.StatusCode.ABORTED
            assert failed.reason in ("STREAM_INTERRUPTED", "BROKEN_STREAM")


async def test_log_probabilities_are_those_of_the_tokens_sent(talker: Running) -> None:
    async with bridge(talker.url) as (engine, _):
        request = ask(model="talker", token_count=10)
        request.sampling.temperature = 0
        request.logprobs.top_logprob_count = 3
        request.include_token_ids = True
        sink = await serve(engine.generate, request)
    entries = [entry for delta in grammar.deltas(sink.events) for entry in delta.logprobs]
    identifiers = [token for delta in grammar.deltas(sink.events) for token in delta.token_ids]
    assert b"".join(entry.raw_bytes for entry in entries).decode("utf-8", "replace") == sink.text
    assert [entry.token_id for entry in entries] == identifiers
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy
        assert math.isfinite(entry.logprob)
