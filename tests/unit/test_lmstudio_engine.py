"""The bridge to LM Studio keeps its promises, over a fake."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.config import ConfigError, load
from forebay.kit.failure import (
    BackendUnavailable,
    CapabilityUnsupported,
    Draining,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    QueueFull,
)
from forebay.kit.pipeline import Call
from forebay.lmstudio_bridge import listing
from forebay.lmstudio_bridge.client import LmStudioClient
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.engine import LmStudioEngine
from forebay.models.v1 import models_pb2 as models_pb
from forebay.testing import grammar
from forebay.testing.calls import Sink, message
from forebay.testing.client import client
from forebay.testing.fake_lmstudio import FakeLmStudio, Version
from forebay.testing.fake_lmstudio_script import Reply, Stall
from lmstudio import LOAD, MODELS, UNLOAD, ask, environment, rig, until

TOOL = pb.Tool(name="weather", description="Says it", parameters_json_schema='{"type":"object"}')
OPTION = pb.DEGRADATION_KIND_OPTION_IGNORED


def started(sink: Sink) -> pb.Started:
    found = next(event for event in sink.events if event.WhichOneof("event") == "started")
    assert isinstance(found, pb.GenerateResponse)
    return found.started


def stages(sink: Sink) -> list[int]:
    return [
        event.progress.stage
        for event in sink.events
        if isinstance(event, pb.GenerateResponse) and event.WhichOneof("event") == "progress"
    ]


# What is sent


async def test_everything_of_a_request_is_sent_as_lm_studio_spells_it() -> None:
    request = pb.GenerateRequest(
        model="seeing",
        messages=[
            message("be brief", pb.ROLE_SYSTEM),
            pb.Message(
                role=pb.ROLE_USER,
                parts=[pb.Part(text="what"), pb.Part(image=pb.Blob(media_type="image/png", data=b"png"))],
            ),
            pb.Message(role=pb.ROLE_ASSISTANT, parts=[pb.Part(reasoning="hm"), pb.Part(text="a cat")]),
            pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="are "), pb.Part(text="you sure")]),
        ],
        sampling=pb.Sampling(
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            seed=2**40,
            repetition_penalty=1.1,
            presence_penalty=0.1,
            frequency_penalty=0.2,
            logit_bias={7: -1.5, 3: 2},
        ),
        limits=pb.GenerationLimits(max_output_token_count=5, stop_sequences=["END"]),
        tools=[TOOL, pb.Tool(name="time")],
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE),
        reasoning_effort=pb.REASONING_EFFORT_NONE,
        accepted_degradations=[pb.DEGRADATION_KIND_PROMPT_TRUNCATED],
    )
    async with rig() as r:
        sink = await r.generate(request)
        (body,) = r.chats()
    assert body == {
        "model": "seeing",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}},
                ],
            },
            {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": "are you sure"},
        ],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 2**40,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"3": 2.0, "7": -1.5},
        "max_tokens": 5,
        "stop": ["END"],
        "tool_choice": "none",
        "tools": [
            {
                "type": "function",
                "function": {"name": "weather", "description": "Says it", "parameters": {"type": "object"}},
            },
            {
                "type": "function",
                "function": {
                    "name": "time",
                    "description": "",
                    "parameters": {"type": "object", "properties": {}},
                },
            },
        ],
    }
    assert [one.kind for one in started(sink).degradations] == [pb.DEGRADATION_KIND_PROMPT_TRUNCATED]


async def test_one_required_tool_is_the_only_one_on_offer() -> None:
    choice = pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, tool_name="time")
    async with rig() as r:
        sink = await r.generate(ask(tools=[TOOL, pb.Tool(name="time")], tool_choice=choice))
        (body,) = r.chats()
    assert body["tool_choice"] == "required"
    assert [one["function"]["name"] for one in body["tools"]] == ["time"]  # type: ignore[attr-defined]
    assert [call.name for call in grammar.tool_calls(sink.events)] == ["time"]


REQUIRED = pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)
IMAGE = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(image=pb.Blob(media_type="image/png", data=b"p"))])
EFFORTS = {"low": pb.REASONING_EFFORT_LOW, "none": pb.REASONING_EFFORT_NONE}


@pytest.mark.parametrize(
    ("request_", "kind", "field"),
    [
        (ask(sampling=pb.Sampling(min_p=0.1)), OPTION, "sampling.min_p"),
        (ask(sampling=pb.Sampling(typical_p=0.1)), OPTION, "sampling.typical_p"),
        (ask(include_token_ids=True), OPTION, "include_token_ids"),
        (ask(limits=pb.GenerationLimits(stop_token_ids=[2])), OPTION, "limits.stop_token_ids"),
        (ask(logprobs=pb.LogprobOptions(top_logprob_count=2)), OPTION, "logprobs"),
        (ask(reasoning_effort=pb.REASONING_EFFORT_LOW), OPTION, "reasoning_effort"),
        (ask(model="thinker", reasoning_effort=pb.REASONING_EFFORT_LOW), OPTION, "reasoning_effort"),
        (
            ask(output_format=pb.OutputFormat(regex="a+")),
            pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
            "output_format.regex",
        ),
        (
            ask(output_format=pb.OutputFormat(lark_grammar="start: A")),
            pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
            "output_format.lark_grammar",
        ),
        (
            pb.GenerateRequest(model="tiny", messages=[IMAGE]),
            pb.DEGRADATION_KIND_IMAGE_DROPPED,
            "messages[0].parts[0].image",
        ),
        (ask(model="seeing", tools=[TOOL], tool_choice=REQUIRED), OPTION, "tool_choice"),
    ],
)
async def test_a_shortfall_is_refused_or_told(
    request_: pb.GenerateRequest, kind: pb.DegradationKind.ValueType, field: str
) -> None:
    async with rig() as r:
        failure = await r.fails(request_)
        assert isinstance(failure, CapabilityUnsupported)
        assert field in failure.message
        accepting = pb.GenerateRequest()
        accepting.CopyFrom(request_)
        accepting.accepted_degradations.append(kind)
        told = started(await r.generate(accepting)).degradations
        assert [(one.kind, one.field) for one in told] == [(kind, field)]


async def test_an_image_is_dropped_for_a_model_that_turns_out_to_be_blind() -> None:
    request = ask(accepted_degradations=[pb.DEGRADATION_KIND_IMAGE_DROPPED])
    request.messages[0].parts.extend(IMAGE.parts)
    async with rig(version=Version.parse("0.3.0")) as r:
        for tries in (2, 3):
            told = started(await r.generate(request)).degradations
            assert [one.kind for one in told] == [pb.DEGRADATION_KIND_IMAGE_DROPPED]
            assert len(r.chats()) == tries
        del request.accepted_degradations[:]
        assert isinstance(await r.fails(request), CapabilityUnsupported)


async def test_what_cannot_be_served_is_refused_before_anything_is_loaded() -> None:
    async with rig() as r:
        for request in (
            ask(sampling=pb.Sampling(min_p=0.1)),
            ask(continue_from=pb.ReplyPrefix(text="The")),
            ask(model="embedder"),
        ):
            assert isinstance(await r.fails(request), CapabilityUnsupported)
        with pytest.raises(CapabilityUnsupported, match="no embedding model"):
            await r.embed(["a"], model="tiny")
        with pytest.raises(CapabilityUnsupported):
            await r.engine.count_tokens(Call(request=pb.CountTokensRequest(model="tiny")))
        assert r.fake.studio.loads == []


@pytest.mark.parametrize(
    ("efforts", "effort", "sent"),
    [
        (["off", "on"], pb.REASONING_EFFORT_NONE, "none"),
        (["low", "medium", "high"], pb.REASONING_EFFORT_HIGH, "high"),
        ([], pb.REASONING_EFFORT_MEDIUM, "medium"),
        (["low", "medium", "high"], pb.REASONING_EFFORT_NONE, None),
    ],
)
async def test_the_effort_of_reasoning_is_sent_if_the_model_knows_it(
    efforts: Sequence[str], effort: pb.ReasoningEffort.ValueType, sent: str | None
) -> None:
    async with rig() as r:
        await r.fake.load("thinker")
        body = r.fake.studio.listing()
        (entry,) = [one for one in body["models"] if one["key"] == "thinker"]  # type: ignore[attr-defined]
        entry["capabilities"]["reasoning"] = {"allowed_options": efforts, "default": "on"}
        r.fake.script("GET", "/api/v1/models", Reply.json(body))
        sink = await r.generate(ask(model="thinker", reasoning_effort=effort, accepted_degradations=[OPTION]))
        assert r.chats()[-1].get("reasoning_effort") == sent
        assert bool(started(sink).degradations) is (sent is None)


@pytest.mark.parametrize(
    "options",
    [{"ttl": -1}, {"ttl": "1h"}, {"ttl": True}, {"draft_model": ""}, {"draft_model": 3}, {"temperature": 1}],
)
async def test_options_of_a_call_are_checked(options: dict[str, object]) -> None:
    request = ask()
    request.backend_options["lmstudio"].update(options)
    async with rig() as r:
        failure = await r.fails(request)
        assert isinstance(failure, InvalidRequest)
        (name,) = options
        assert failure.violations[0][0] == f"backend_options[lmstudio].{name}"


async def test_options_of_embeddings_loads_and_pulls_are_checked() -> None:
    async with rig() as r:
        embed = pb.EmbedRequest(model="embedder", texts=["a"])
        embed.backend_options["lmstudio"].update({"draft_model": "x"})
        with pytest.raises(InvalidRequest, match="there are ttl"):
            await r.engine.embed(Call(request=embed))
        request = models_pb.LoadModelRequest(model="tiny")
        request.backend_options["lmstudio"].update({"ttl": 3, "num_experts": 0.5, "flash_attention": 1})
        with pytest.raises(InvalidRequest) as raised:
            await r.engine.load_model(request, _ignore)
        assert len(raised.value.violations) == 3
        pull = models_pb.PullModelRequest(model="new/model")
        pull.backend_options["lmstudio"].update({"quantization": 4, "path": "/"})
        with pytest.raises(InvalidRequest) as raised:
            await r.engine.pull_model(pull, _ignore)
        assert len(raised.value.violations) == 2
        good = models_pb.LoadModelRequest(model="tiny")
        good.backend_options["lmstudio"].update({"num_experts": 4, "flash_attention": False})
        await r.engine.load_model(good, _ignore)
        assert r.fake.calls(LOAD) == [
            {"model": "tiny", "echo_load_config": True, "num_experts": 4, "flash_attention": False}
        ]


async def _ignore(event: object) -> None:
    del event


# What comes back


async def test_a_reply_has_its_stages_usage_and_times() -> None:
    async with rig(settings={"name": "studio"}) as r:
        sink = await r.generate(ask())
        assert stages(sink) == [pb.Progress.STAGE_LOADING, pb.Progress.STAGE_PREFILLING]
        begin = started(sink)
        assert (begin.backend, begin.model) == ("studio", "tiny")
        assert begin.weights.quantization == "Q4_K_M"
        assert begin.weights.parameter_count == 135_000_000
        finished = sink.events[-1].finished
        assert finished.usage.output_token_count == len(grammar.deltas(sink.events))
        assert finished.usage.prompt_token_count > 0
        assert finished.timings.load_duration.ToNanoseconds() > 0
        assert (
            finished.timings.first_delta_duration.ToNanoseconds()
            >= finished.timings.load_duration.ToNanoseconds()
        )
        again = await r.generate(ask())
        assert stages(again) == [pb.Progress.STAGE_PREFILLING]
        assert again.events[-1].finished.timings.load_duration.ToNanoseconds() == 0


async def test_log_probabilities_are_given_where_lm_studio_gives_them() -> None:
    async with rig(logprobs=True) as r:
        sink = await r.generate(ask(logprobs=pb.LogprobOptions(top_logprob_count=2)))
        entries = [entry for delta in grammar.deltas(sink.events) for entry in delta.logprobs]
        assert "".join(entry.token for entry in entries) == sink.text
        assert all(len(entry.top_logprobs) == 2 for entry in entries)
        reports = {one.capability: one for one in (await r.model("tiny")).capabilities}
        assert reports[pb.CAPABILITY_LOGPROBS].support == pb.CapabilityReport.SUPPORT_YES
        assert reports[pb.CAPABILITY_LOGPROBS].probed
        r.fake.options.logprobs = False
        assert isinstance(await r.fails(ask(logprobs=pb.LogprobOptions())), CapabilityUnsupported)
        reports = {one.capability: one for one in (await r.model("tiny")).capabilities}
        assert reports[pb.CAPABILITY_LOGPROBS].support == pb.CapabilityReport.SUPPORT_NO


async def test_parallel_replies_are_whole_and_never_more_than_the_slots() -> None:
    async with rig(parallel=3) as r:
        await r.load("tiny")
        alone = {n: await r.text(ask(f"number {n}")) for n in range(12)}
        r.fake.gates.hold("prefill")
        async with asyncio.TaskGroup() as tasks:
            replies = {n: tasks.create_task(r.generate(ask(f"number {n}"))) for n in range(12)}
            await r.fake.gates.arrived("prefill", 3)
            await until(lambda: sum(pb.Progress.STAGE_QUEUED in stages(s) for s in r.sinks) == 9)
            assert r.fake.busy("tiny") == 3
            assert r.fake.studio.instances["tiny"].waiting == 0
            r.fake.gates.release("prefill")
        assert {n: reply.result().text for n, reply in replies.items()} == alone


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async with rig(settings={"slots": 1, "queue": 1}) as r:
        await r.load("tiny")
        assert (await r.model("tiny")).slot_count == 1
        r.fake.gates.hold("prefill")
        first = asyncio.ensure_future(r.generate(ask()))
        await r.fake.gates.arrived("prefill")
        second = asyncio.ensure_future(r.generate(ask()))
        await until(lambda: pb.Progress.STAGE_QUEUED in stages(r.sinks[-1]))
        failure = await r.fails(ask())
        assert isinstance(failure, QueueFull)
        assert failure.retry_after
        other = asyncio.ensure_future(r.generate(ask(model="other")))
        await r.fake.gates.arrived("prefill", 2)  # another model has slots of its own
        r.fake.gates.release("prefill")
        await asyncio.gather(first, second, other)


async def test_calls_are_spread_over_the_instances_of_a_model() -> None:
    async with rig(parallel=1) as r:
        await r.fake.load("tiny")
        await r.fake.load("tiny")
        r.fake.gates.hold("prefill")
        replies = [asyncio.ensure_future(r.generate(ask())) for _ in range(2)]
        await r.fake.gates.arrived("prefill", 2)
        assert {body["model"] for body in r.chats()} == {"tiny", "tiny:2"}
        assert "tiny 2" in repr(r.engine)
        r.fake.gates.release("prefill")
        await asyncio.gather(*replies)


async def test_a_caller_who_leaves_the_queue_is_never_sent() -> None:
    async with rig(settings={"slots": 1}) as r:
        await r.load("tiny")
        r.fake.gates.hold("prefill")
        first = asyncio.ensure_future(r.generate(ask()))
        await r.fake.gates.arrived("prefill")
        second = asyncio.ensure_future(r.generate(ask(), complete=False))
        await until(lambda: pb.Progress.STAGE_QUEUED in stages(r.sinks[-1]))
        second.cancel()
        await asyncio.wait([second])
        r.fake.gates.release("prefill")
        await first
        assert len(r.chats()) == 1


async def test_a_caller_who_leaves_at_any_moment_leaves_nothing_behind() -> None:
    async with rig(parallel=1) as r:
        await r.load("tiny")
        for turns in range(60):
            reply = asyncio.ensure_future(r.generate(ask("x"), complete=False))
            for _ in range(turns):
                await asyncio.sleep(0)
            reply.cancel()
            await asyncio.wait([reply])
        await until(lambda: r.fake.busy("tiny") == 0)
        assert await r.text(ask())
        assert "[tiny 0]" in repr(r.engine)


async def test_a_server_that_is_not_lm_studio_is_left_in_prefill_too() -> None:
    async with rig(settings={"greeting": False}) as r:
        await r.script(Reply(steps=(Stall(),)))
        reply = asyncio.ensure_future(r.generate(ask(), complete=False))
        await until(r.chats)
        reply.cancel()
        await asyncio.wait([reply])
        await until(lambda: "Memory []" in repr(r.engine))


# Memory


async def test_an_unload_waits_for_calls_and_later_calls_load_again() -> None:
    async with rig() as r:
        await r.load("tiny")
        r.fake.gates.hold("token")
        first = asyncio.ensure_future(r.generate(ask()))
        await r.fake.gates.arrived("token")
        unload = asyncio.ensure_future(r.unload("tiny"))
        another = asyncio.ensure_future(r.unload("tiny"))
        await until(lambda: r.engine._memory.is_leaving("tiny"))
        assert (await r.model("tiny")).state == pb.Model.STATE_UNLOADING
        later = asyncio.ensure_future(r.generate(ask("later")))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not unload.done()
        r.fake.gates.release("token")
        assert (await first).text
        await unload
        await another
        assert (await later).text
        assert r.fake.studio.loads.count("tiny") >= 1


async def test_an_unload_waits_for_the_load_of_its_model() -> None:
    async with rig() as r:
        r.fake.gates.hold("load")
        load_ = asyncio.ensure_future(r.load("tiny"))
        await r.fake.gates.arrived("load")
        unload = asyncio.ensure_future(r.unload("tiny"))
        for _ in range(20):
            await asyncio.sleep(0)
        r.fake.gates.release("load")
        await load_
        assert (await unload).state == pb.Model.STATE_AVAILABLE
        assert r.fake.studio.loaded() == []


async def test_an_unload_of_a_model_whose_load_fails_succeeds() -> None:
    async with rig() as r:
        r.fake.gates.hold("load")
        load_ = asyncio.ensure_future(r.load("broken"))
        await r.fake.gates.arrived("load")
        unload = asyncio.ensure_future(r.unload("broken"))
        for _ in range(20):
            await asyncio.sleep(0)
        r.fake.gates.release("load")
        assert (await unload).state == pb.Model.STATE_FAILED
        with pytest.raises(ModelLoadFailed):
            await load_


async def test_a_model_that_nobody_uses_is_unloaded_after_its_time() -> None:
    async with rig(settings={"ttl": 60}) as r:
        await r.text(ask())
        assert (await r.model("tiny")).HasField("expire_time")
    async with rig(settings={"ttl": 0.05}) as r:
        await r.fake.load("other")
        await r.text(ask())
        await r.text(ask(model="other"))
        await until(lambda: [one.id for one in r.fake.studio.loaded()] == ["other"])


async def test_a_pinned_model_stays() -> None:
    async with rig(settings={"ttl": 0.0}) as r:
        r.fake.script("POST", UNLOAD, Reply.json({"error": "busy"}, status=500))
        await r.load("tiny")
        await until(lambda: not r.fake.unused())  # the first try fails, and is the last
        await r.load("tiny", pinned=True)
        await r.load("other", pinned=True)
        assert not (await r.model("other")).HasField("expire_time")
        await r.load("other", keep_alive_duration={"seconds": 60})
        assert (await r.model("other")).HasField("expire_time")
        assert {one.id for one in r.fake.studio.loaded()} == {"tiny", "other"}


async def test_a_load_with_more_context_than_there_is_is_refused() -> None:
    async with rig() as r:
        await r.load("tiny", context_token_count=512)
        await r.load("tiny", context_token_count=256)
        with pytest.raises(ModelLoadFailed, match="512 tokens"):
            await r.load("tiny", context_token_count=1024)


async def test_somebody_else_s_load_is_waited_for() -> None:
    async with rig(version=Version.parse("0.3.14")) as r:
        await r.client.probe()
        entry = r.fake.studio.entry_v0(r.fake.studio.models["tiny"]) | {"state": "loading"}
        loading = Reply.json({"object": "list", "data": [entry]})
        r.fake.script("GET", "/api/v0/models", loading, loading)
        await r.fake.load("tiny")
        assert await r.text(ask())
        assert r.fake.studio.loads == ["tiny"]
        r.fake.script("GET", "/api/v0/models", loading)
        assert (await r.models())["tiny"].state == pb.Model.STATE_LOADING


async def test_an_older_server_loads_embedding_models_too() -> None:
    async with rig(version=Version.parse("0.3.14"), auto_evict=False) as r:
        await r.load("embedder")
        await r.load("seeing", keep_alive_duration={"seconds": 90})
        assert r.chats()[-1]["ttl"] == 90
        models = await r.models()
        assert models["embedder"].state == models["seeing"].state == pb.Model.STATE_ACTIVE
        reports = {one.capability: one.support for one in models["seeing"].capabilities}
        assert reports[pb.CAPABILITY_VISION] == pb.CapabilityReport.SUPPORT_YES


async def test_models_are_described() -> None:
    async with rig() as r:
        await r.load("tiny")
        tiny = (await r.models())["tiny"]
        assert (tiny.state, tiny.slot_count, tiny.loaded_context_token_count) == (
            pb.Model.STATE_ACTIVE,
            4,
            4096,
        )
        assert (tiny.context_token_count, tiny.disk_bytes) == (8192, 1_234_567)
        other = (await r.models())["other"]
        assert (other.state, other.slot_count) == (pb.Model.STATE_AVAILABLE, 0)
        with pytest.raises(ModelNotFound):
            await r.model("nothing")


async def test_embeddings_are_kept() -> None:
    async with rig() as r:
        await r.embed(["a", "b"])
        again = await r.embed(["b", "c"])
        assert again.cached_embedding_count == 1
        assert r.fake.calls("/v1/embeddings")[-1]["input"] == ["c"]
        assert again.weights.quantization == "Q4_K_M"


def test_sizes_are_read_as_people_write_them() -> None:
    assert [listing.parameter_count(label) for label in ("135M", "7.6B", "1T", "20 b", "big", "")] == [
        135_000_000,
        7_600_000_000,
        10**12,
        20 * 10**9,
        0,
        0,
    ]


# The process


async def test_the_bridge_starts_without_lm_studio_and_serves_when_it_comes() -> None:
    fake = FakeLmStudio(MODELS)
    async with fake:
        url, port = fake.url, fake.port
    settings = LmStudioSettings.model_validate(
        {"base_url": url, "probe_interval": 0.01, "preload": ["tiny", "broken"]}
    )
    told: list[tuple[bool, str]] = []

    async def change(serves: bool, why: str) -> None:
        told.append((serves, why))

    async with (
        LmStudioClient(settings) as upstream,
        LmStudioEngine(settings, upstream) as engine,
        asyncio.TaskGroup() as tasks,
    ):
        watch = tasks.create_task(engine.watch(change))
        await until(lambda: told)
        assert told[0][0] is False
        with pytest.raises(BackendUnavailable):
            await engine.list_models(pb.ListModelsRequest())
        async with FakeLmStudio(MODELS, port=port) as back:
            await until(lambda: told[-1][0])
            await until(lambda: [one.id for one in back.studio.loaded()] == ["tiny"])
            sink = Sink()
            await engine.generate(Call(request=ask()), sink)
            assert sink.text
        await until(lambda: not told[-1][0])
        assert upstream.dialect is None
        watch.cancel()


async def test_a_reply_that_is_waited_for_ends_with_the_bridge() -> None:
    async with FakeLmStudio(MODELS) as fake:
        await fake.load("tiny")
        settings = LmStudioSettings.model_validate({"base_url": fake.url})
        fake.gates.hold("prefill")
        async with LmStudioClient(settings) as upstream:
            async with LmStudioEngine(settings, upstream) as engine:
                reply = asyncio.ensure_future(engine.generate(Call(request=ask()), Sink()))
                await fake.gates.arrived("prefill")
            with pytest.raises(Draining):
                await reply
        fake.gates.release("prefill")


async def test_the_process_serves_and_drains(tmp_path: Path) -> None:
    async with FakeLmStudio(MODELS) as fake:
        config = tmp_path / "forebay.toml"
        config.write_text(
            f'[lmstudio]\naddress = "127.0.0.1:0"\nbase_url = "{fake.url}/v1"\nprobe_interval = "10ms"\n'
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "forebay.lmstudio_bridge",
            "--config",
            str(config),
            stdout=asyncio.subprocess.PIPE,
            env=environment(),
        )
        try:
            assert process.stdout is not None
            line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
            assert line.startswith("forebay lmstudio listening on 127.0.0.1:")
            async with client(line.split()[-1]) as peer:
                assert await peer.text(ask())
                assert (await peer.load(models_pb.LoadModelRequest(model="other"))).model.id == "other"
        finally:
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 30) == 0


@pytest.mark.parametrize("token", ["", "two words"])
async def test_a_token_that_cannot_be_used_stops_the_start(tmp_path: Path, token: str) -> None:
    config, file = tmp_path / "forebay.toml", tmp_path / "token"
    if token:
        file.write_text(token)
    config.write_text(f'[lmstudio]\naddress = "127.0.0.1:0"\ntoken_file = "{file}"\n')
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "forebay.lmstudio_bridge",
        "--config",
        str(config),
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 69
    assert b"token" in errors
    assert b"two words" not in errors


def test_the_token_comes_from_the_settings_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert LmStudioSettings.model_validate({"token_file": file}).read_token() == "from-file"
    assert LmStudioSettings.model_validate({"token": "plain"}).read_token({"LM_API_TOKEN": "x"}) == "plain"
    assert LmStudioSettings.model_validate({}).read_token({"LMSTUDIO_API_TOKEN": "env "}) == "env"
    assert LmStudioSettings.model_validate({}).read_token({}) == ""
    assert "plain" not in repr(LmStudioSettings.model_validate({"token": "plain"}))


def test_wrong_settings_are_told(tmp_path: Path) -> None:
    config = tmp_path / "forebay.toml"
    config.write_text('[lmstudio]\nbase_url = "ftp://x"\nmodels = {tiny = {context = 1}}\n')
    with pytest.raises(ConfigError) as raised:
        load({"lmstudio": LmStudioSettings}, path=config)
    assert len(raised.value.lines) == 2
    config.write_text('[lmstudio]\ntoken = "a"\ntoken_file = "b"\n')
    with pytest.raises(ConfigError, match="not both"):
        load({"lmstudio": LmStudioSettings}, path=config)
