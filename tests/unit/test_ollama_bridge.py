"""The parts of the Ollama bridge that need no server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pydantic
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import CapabilityUnsupported, Failure, InvalidRequest
from forebay.ollama_bridge import translate
from forebay.ollama_bridge.client import Version
from forebay.ollama_bridge.config import OllamaSettings, keep_alive_value
from forebay.ollama_bridge.models import Facts, read_time
from forebay.ollama_bridge.names import aliases, canonical, is_cloud, registry_of
from forebay.ollama_bridge.reply import Reply
from forebay.ollama_bridge.tasks import background, ticking
from forebay.ollama_bridge.translate import Setting
from forebay.testing.calls import ask


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("llama3.2", "llama3.2:latest"),
        (" LLaMA3.2:3B ", "llama3.2:3b"),
        ("https://registry.ollama.ai/library/llama3.2", "llama3.2:latest"),
        ("hf.co/User/Model:Q4", "hf.co/user/model:q4"),
        ("localhost:5000/me/m", "localhost:5000/me/m:latest"),
        ("m:local", "m:latest"),
    ],
)
def test_spellings_of_a_name_meet_in_one(name: str, same: str) -> None:
    assert canonical(name) == same
    assert canonical(same) == same


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("llama3.2:3b", "registry.ollama.ai"),
        ("me/mine", "registry.ollama.ai"),
        ("HF.co/user/model:Q4_K_M", "hf.co"),
        ("localhost:5000/me/m", "localhost:5000"),
        ("../etc/passwd", None),
        ("a/../b", None),
        ("x:", None),
        ("http://host/a/b", None),
        ("", None),
        ("a b", None),
    ],
)
def test_the_registry_of_a_name_is_found_or_the_name_is_none(name: str, host: str | None) -> None:
    assert registry_of(name) == host


def test_other_names_are_listed() -> None:
    assert aliases("llama3.2:latest") == ["llama3.2"]
    assert aliases("llama3.2:3b") == []
    assert is_cloud("gpt-oss:120b-cloud")
    assert not is_cloud("cloudy")


@pytest.mark.parametrize(
    ("said", "logprobs", "warns"),
    [
        ("0.5.1", False, True),
        ("0.17.1", True, False),
        ("v0.17.0", True, True),
        ("0.0.0", True, False),
        ("?", True, False),
    ],
)
def test_a_version_says_what_a_server_can_do(said: str, logprobs: bool, warns: bool) -> None:
    version = Version.of(said)
    assert version.has_logprobs is logprobs
    assert bool(version.warning) is warns


def test_a_moment_is_read_with_any_number_of_digits() -> None:
    assert read_time("2024-06-04T14:38:31.837531234Z") == datetime(2024, 6, 4, 14, 38, 31, 837531, UTC)
    assert read_time("2024-06-04T14:38:31Z") == datetime(2024, 6, 4, 14, 38, 31, 0, UTC)
    assert read_time("0001-01-01T00:00:00Z") is None


def test_settings_refuse_what_cannot_be_meant() -> None:
    for wrong in (
        {"keep_alive": "5 minutes"},
        {"base_url": "ftp://x"},
        {"slots": 0},
        {"models": {"m": {"num_ctx": 2}}},
        {"models": {"m": {"temperature": 1}}},
        {"models": {"m": {}, "M:latest": {}}},
        {"nonsense": 1},
    ):
        with pytest.raises(pydantic.ValidationError):
            OllamaSettings.model_validate(wrong)
    settings = OllamaSettings.model_validate({"base_url": "localhost:11434/v1/", "keep_alive": "-1"})
    assert settings.base_url == "http://localhost:11434"
    assert settings.of_model("any:latest").load_options() == {}


def test_keep_alive_is_a_number_where_it_has_no_unit() -> None:
    assert [keep_alive_value(text) for text in ("-1", "0", "1.5", "5m")] == [-1, 0, 1.5, "5m"]


def _plan(request: pb.GenerateRequest, **more: object) -> translate.Plan:
    facts = Facts(key="m:latest", name="m:latest", **more)  # type: ignore[arg-type]  # fields by name
    return translate.plan(
        request, facts=facts, setting=Setting(), version=Version.of("0.4.9"), backend="ollama"
    )


def test_a_server_without_schemas_refuses_them() -> None:
    request = ask(model="m")
    request.output_format.json_schema = "{}"
    with pytest.raises(CapabilityUnsupported):
        _plan(request)
    request.output_format.any_json = True
    assert _plan(request).body["format"] == "json"


def test_a_server_that_does_not_think_is_not_told_to_stop() -> None:
    request = ask(model="m")
    request.reasoning_effort = pb.REASONING_EFFORT_NONE
    assert "think" not in _plan(request).body


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("max_output_token_count", "num_predict"),
        ("stop_sequences", "stop"),
        ("seed", "seed"),
    ],
)
def test_an_option_that_is_set_twice_is_refused(field: str, option: str) -> None:
    request = ask(model="m")
    request.sampling.seed = 1
    request.limits.max_output_token_count = 1
    request.limits.stop_sequences.append("x")
    request.backend_options["ollama"].update({option: ["x"] if option == "stop" else 1})
    with pytest.raises(InvalidRequest, match=field):
        _plan(request)


def test_tool_arguments_that_came_as_text_are_passed_on_as_they_are() -> None:
    reply = Reply(backend="ollama")
    message = {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    deltas = reply.feed({"message": message, "done": True, "done_reason": "stop"})  # type: ignore[dict-item]  # JSON
    assert deltas[0].tool_call.arguments_json == '{"a": 1}'
    end = reply.finished(queued=0, loaded=0, first=None, spoke=0)
    assert end.reason == pb.FINISH_REASON_TOOL_CALLS


def test_held_reasoning_comes_out_at_the_end() -> None:
    reply = Reply(backend="ollama", splits_reasoning=True)
    first = reply.feed({"message": {"content": "<think>a</thi"}})
    last = reply.feed({"message": {"content": "n"}, "done": True})
    assert "".join(delta.reasoning for delta in first + last) == "a</thin"
    reply = Reply(backend="ollama", splits_reasoning=True)
    assert [d.text for d in reply.feed({"message": {"content": "<thi"}, "done": True})] == ["<thi"]
    assert reply.finished(queued=0, loaded=0, first=None, spoke=0).reason == pb.FINISH_REASON_UNSPECIFIED


async def test_background_tasks_end_with_their_block_and_leave_its_failure_alone() -> None:
    tasks: list[asyncio.Task[None]] = []

    async def block() -> None:
        async with background() as group:
            tasks.append(group.create_task(asyncio.sleep(60)))
            await asyncio.sleep(0)
            raise Failure("of the block")

    with pytest.raises(Failure, match="of the block"):
        await block()
    assert tasks[0].cancelled()


async def test_ticking_ticks_until_it_is_stopped() -> None:
    ticks = 0
    enough = asyncio.Event()

    async def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            enough.set()

    async with ticking(0.001, tick) as stop:
        await enough.wait()
        await stop()
        before = ticks
        await asyncio.sleep(0.01)
    assert ticks == before


async def test_a_tick_that_fails_fails_the_block() -> None:
    async def tick() -> None:
        raise Failure("nobody listens")

    with pytest.raises(Failure, match="nobody listens"):
        async with ticking(0.001, tick):
            await asyncio.sleep(10)
