"""The official Python client against the emulator: what it makes of our answers is the verdict."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import ollama
import pytest

from forebay.testing.fake_ollama import MODELS, FakeOllama, Layer
from forebay.testing.fake_ollama_runners import FakeModel
from forebay.testing.fake_ollama_script import Line

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer"}},
        },
    },
}


@pytest.fixture
async def fake() -> AsyncIterator[FakeOllama]:
    registry = {"tiny:latest": [Layer(digest="sha256:" + "a" * 64, size=3 << 20)]}
    async with FakeOllama(registry=registry) as server:
        yield server


@pytest.fixture
async def client(fake: FakeOllama) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(host=fake.url)
    yield client
    await client._client.aclose()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def test_chat_and_stream_say_the_same(client: ollama.AsyncClient) -> None:
    whole = await client.chat("llama3.2", messages=user("Why is the sky blue?"))
    parts = [
        part
        async for part in await client.chat("llama3.2", messages=user("Why is the sky blue?"), stream=True)
    ]
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts[-2:]] == [False, True]
    assert parts[-1].done_reason == "stop"
    assert parts[-1].eval_count == whole.eval_count == 12
    assert whole.prompt_eval_count is not None
    assert whole.model == "llama3.2"


async def test_the_seed_decides_the_answer(client: ollama.AsyncClient) -> None:
    async def say(seed: int) -> str:
        answer = await client.generate("llama3.2", "Once", options={"seed": seed})
        return answer.response

    assert await say(1) == await say(1) != await say(2)


async def test_generate_streams_and_keeps_a_context(client: ollama.AsyncClient) -> None:
    parts = [part async for part in await client.generate("llama3.2", "Once", stream=True)]
    assert parts[-1].context
    assert parts[-1].done


@pytest.mark.parametrize("model", ["llama3.2", "qwen3"], ids=["in-the-last-chunk", "in-an-earlier-chunk"])
async def test_a_tool_is_called(client: ollama.AsyncClient, model: str) -> None:
    messages = user("use get_weather for Bern")
    parts = (
        [
            part
            async for part in await client.chat(
                model, messages=messages, tools=[WEATHER], stream=True, think=False
            )
        ]
        if model == "qwen3"
        else [
            part async for part in await client.chat(model, messages=messages, tools=[WEATHER], stream=True)
        ]
    )
    calls = [
        (at - len(parts), call) for at, part in enumerate(parts) for call in part.message.tool_calls or ()
    ]
    assert [call.function.name for _, call in calls] == ["get_weather"]
    assert set(calls[0][1].function.arguments) == {"city", "days"}
    assert calls[0][0] == (-1 if model == "llama3.2" else -2)


async def test_a_thinking_model_thinks_unless_it_is_told_not_to(client: ollama.AsyncClient) -> None:
    assert (await client.chat("qwen3", messages=user("hm"))).message.thinking
    assert not (await client.chat("qwen3", messages=user("hm"), think=False)).message.thinking
    with pytest.raises(ollama.ResponseError, match=r'"llama3\.2" does not support thinking') as caught:
        await client.chat("llama3.2", messages=user("hm"), think=True)
    assert caught.value.status_code == 400


async def test_logprobs_come_with_their_rivals(client: ollama.AsyncClient) -> None:
    answer = await client.chat("llama3.2", messages=user("hi"), logprobs=True, top_logprobs=3)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 12
    assert len(answer.logprobs[0].top_logprobs or ()) == 3
    with pytest.raises(ollama.ResponseError, match="between 0 and 20"):
        await client.chat("llama3.2", messages=user("hi"), logprobs=True, top_logprobs=21)


async def test_embeddings_have_norm_one(client: ollama.AsyncClient) -> None:
    answer = await client.embed("all-minilm", input=["a", "b"], dimensions=8)
    assert [len(vector) for vector in answer.embeddings] == [8, 8]
    assert sum(value * value for value in answer.embeddings[0]) == pytest.approx(1.0)
    legacy = await client.embeddings("all-minilm", "a")
    assert sum(value * value for value in legacy.embedding) == pytest.approx(9.0)


async def test_lists_say_what_is_where(client: ollama.AsyncClient) -> None:
    listed = await client.list()
    assert {model.model for model in listed.models} == {model.name for model in MODELS}
    assert not (await client.ps()).models
    await client.generate("llama3.2", keep_alive="1h")
    (running,) = (await client.ps()).models
    assert running.model == "llama3.2:latest"
    assert running.context_length == 4096
    assert running.expires_at is not None
    shown = await client.show("llama3.2")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    unloaded = await client.generate("llama3.2", keep_alive=0)
    assert unloaded.done_reason == "unload"
    assert not (await client.ps()).models


async def test_a_pull_ends_with_the_model_on_disk(client: ollama.AsyncClient) -> None:
    parts = [part async for part in await client.pull("tiny", stream=True)]
    assert parts[-1].status == "success"
    done = [part.completed or 0 for part in parts if part.digest]
    assert done == sorted(done)
    assert (await client.show("tiny")).details is not None


async def test_a_pull_of_nothing_fails_inside_a_good_stream(client: ollama.AsyncClient) -> None:
    with pytest.raises(ollama.ResponseError, match="file does not exist"):
        async for _ in await client.pull("nothing", stream=True):
            pass
    with pytest.raises(ollama.ResponseError, match="file does not exist") as caught:
        await client.pull("nothing")
    assert caught.value.status_code == 500


async def test_a_model_is_created_from_a_file(
    client: ollama.AsyncClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    digest = await client.create_blob(path)
    assert digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    made = await client.create("mine", files={"tiny.gguf": digest}, stream=False)
    assert made.status == "success"
    await client.copy("mine", "yours")
    names = {model.model for model in (await client.list()).models}
    assert {"mine:latest", "yours:latest"} <= names
    await client.delete("mine")
    with pytest.raises(ollama.ResponseError, match="model 'mine' not found") as caught:
        await client.delete("mine")
    assert caught.value.status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"model": "nope", "messages": user("x")}, 404, "model 'nope' not found"),
        ({"model": "all-minilm", "messages": user("x")}, 400, '"all-minilm" does not support chat'),
        (
            {"model": "llava", "messages": user("x"), "tools": [WEATHER]},
            400,
            "library/llava:latest does not support tools",
        ),
        (
            {"model": "llama3.2", "messages": user("x"), "options": {"num_ctx": "big"}},
            500,
            "must be of type integer",
        ),
        ({"model": "llama3.2", "messages": user("x"), "keep_alive": "10"}, 400, "missing unit in duration"),
    ],
)
async def test_errors_have_their_code(
    client: ollama.AsyncClient, body: dict[str, object], status: int, text: str
) -> None:
    with pytest.raises(ollama.ResponseError, match=text) as caught:
        await client.chat(**body)  # type: ignore[call-overload]  # bodies the client lets through
    assert caught.value.status_code == status


async def test_an_error_after_the_first_byte_reaches_the_client(
    fake: FakeOllama, client: ollama.AsyncClient
) -> None:
    message = {"role": "assistant", "content": "The"}
    fake.script(
        "/api/chat", [Line({"model": "llama3.2", "message": message, "done": False}), Line({"error": "boom"})]
    )
    with pytest.raises(ollama.ResponseError, match="boom"):
        async for _ in await client.chat("llama3.2", messages=user("x"), stream=True):
            pass
    assert fake.unplayed == []


async def test_leaving_stops_the_generation() -> None:
    slow = FakeModel(name="slow:latest", answer_tokens=1000)
    async with FakeOllama([slow], token_seconds=0.005) as fake:
        client = ollama.AsyncClient(host=fake.url)
        async for _ in await client.chat("slow", messages=user("x"), stream=True):
            break
        await client._client.aclose()
        async with asyncio.timeout(2):
            while fake.generations[0].state != "stopped":
                await asyncio.sleep(0.01)
        assert fake.generations[0].sent < 1000
