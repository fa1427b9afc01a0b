"""The fake LM Studio, judged by the documented replies and by a client that others wrote."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import sys
from collections.abc import AsyncIterator

import aiohttp
import jsonschema
import openai
import pytest

from forebay.testing import fake_lmstudio_text as text
from forebay.testing.fake_lmstudio import (
    CatalogueEntry,
    FakeLmStudio,
    FakeModel,
    FakeOptions,
    Reply,
    Version,
    main,
)
from forebay.testing.fake_lmstudio_script import Close, Delay, Headers, Raw, Reset, Send, Stall
from lmstudio import environment

TOKEN = "sk-lm-AbCdEf12:AbCdEfGhIjKlMnOpQrSt"
PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG-not-really").decode()
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
MODELS = (
    FakeModel(key="qwen/tiny"),
    FakeModel(key="granite-vision", vision=True, format="mlx", quantization="4bit"),
    FakeModel(key="nomic-embed", type="embedding", quantization="Q4_K_M"),
    FakeModel(key="gpt-oss", reasoning="reasoning"),
    FakeModel(key="deep-key", reasoning="reasoning_content"),
    FakeModel(key="deep-inline", reasoning="inline"),
    FakeModel(key="broken", load_error="Error: unable to allocate buffer"),
)


@contextlib.asynccontextmanager
async def studio(*models: FakeModel, **options: object) -> AsyncIterator[FakeLmStudio]:
    catalogue = {
        "new/model": CatalogueEntry(model=FakeModel(key="new/model"), total=1000),
        "https://huggingface.co/org/repo@Q8_0": CatalogueEntry(model=FakeModel(key="org/repo"), total=500),
        "bad/model": CatalogueEntry(model=FakeModel(key="bad/model"), total=1000, fails_at=500),
        "qwen/tiny": CatalogueEntry(model=FakeModel(key="qwen/tiny")),
    }
    fake = FakeLmStudio(models or MODELS, catalogue=catalogue, options=FakeOptions(**options))  # type: ignore[arg-type]
    async with fake:
        yield fake


@contextlib.asynccontextmanager
async def client(fake: FakeLmStudio, token: str = "lm-studio") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{fake.url}/v1", api_key=token, max_retries=0) as found:
        yield found


async def ask(
    fake: FakeLmStudio, method: str, path: str, body: object = None, **more: object
) -> tuple[int, object]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, fake.url + path, json=body, **more) as reply,  # type: ignore[arg-type]
    ):
        return reply.status, await reply.json(content_type=None)


async def frames(fake: FakeLmStudio, path: str, body: object) -> list[tuple[str, object]]:
    """Returns the events of a stream as (event, data) pairs."""
    async with aiohttp.ClientSession() as session, session.post(fake.url + path, json=body) as reply:
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        raw = (await reply.read()).decode()
    found: list[tuple[str, object]] = []
    for block in filter(None, raw.split("\n\n")):
        kind, data = "", ""
        for line in block.splitlines():
            name, _, value = line.partition(": ")
            kind, data = (value, data) if name == "event" else (kind, value)
        found.append((kind, data if data == "[DONE]" else json.loads(data)))
    return found


# The official client


async def test_the_official_client_chats() -> None:
    async with studio() as fake, client(fake) as official:
        reply = await official.chat.completions.create(
            model="qwen/tiny", messages=[{"role": "user", "content": "hello"}]
        )
    choice = reply.choices[0]
    assert choice.message.content
    assert choice.finish_reason == "stop"
    assert reply.model == "qwen/tiny"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == text.count(choice.message.content)


async def test_a_stream_says_what_the_whole_reply_says() -> None:
    question = [{"role": "user", "content": "tell me"}]
    async with studio() as fake, client(fake) as official:
        whole = await official.chat.completions.create(model="qwen/tiny", messages=question, seed=7)
        stream = await official.chat.completions.create(
            model="qwen/tiny", messages=question, seed=7, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        other = await official.chat.completions.create(model="qwen/tiny", messages=question, seed=8)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert other.choices[0].message.content != said
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert {chunk.choices[0].delta.role for chunk in chunks[:-2]} == {"assistant"}


async def test_the_official_client_calls_tools_in_pieces() -> None:
    messages: list[object] = [{"role": "user", "content": "use weather for Rome"}]
    async with studio() as fake, client(fake) as official:
        async with official.chat.completions.stream(  # type: ignore[call-overload]
            model="qwen/tiny", messages=messages, tools=[TOOL]
        ) as stream:
            final = await stream.get_final_completion()
        call = final.choices[0].message.tool_calls[0]
        messages += [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})],
            },
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]
        after = await official.chat.completions.create(model="qwen/tiny", messages=messages, tools=[TOOL])  # type: ignore[call-overload]
        forced = await official.chat.completions.create(
            model="qwen/tiny",
            messages=[{"role": "user", "content": "hi"}],
            tools=[TOOL],
            tool_choice="required",  # type: ignore[list-item]
        )
    assert final.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])  # type: ignore[index]
    assert after.choices[0].message.content
    assert not after.choices[0].message.tool_calls
    assert forced.choices[0].finish_reason == "tool_calls"


async def test_the_official_client_gets_json_that_matches_its_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 6},
            "kind": {"enum": ["a", "b"]},
            "fixed": {"const": 3},
            "list": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 2},
            "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "score": {"type": ["number", "null"], "minimum": 11},
            "free": {},
            "none": {"type": "null"},
        },
        "required": ["name", "kind", "list"],
        "$defs": {"item": {"properties": {"x": {"type": "integer"}}}},
    }
    async with studio() as fake, client(fake) as official:
        reply = await official.chat.completions.create(
            model="qwen/tiny",
            messages=[{"role": "user", "content": "json"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
        with pytest.raises(openai.BadRequestError) as refused:
            await official.chat.completions.create(
                model="qwen/tiny",
                messages=[{"role": "user", "content": "json"}],
                response_format={"type": "json_object"},
            )
    jsonschema.validate(json.loads(reply.choices[0].message.content or ""), schema)
    assert "json_schema" in refused.value.response.json()["error"]


async def test_the_official_client_embeds_and_gets_floats_for_base64() -> None:
    async with studio() as fake, client(fake) as official:
        reply = await official.embeddings.create(
            model="nomic-embed", input=["a", "b"], encoding_format="base64"
        )
        floats = await official.embeddings.create(model="nomic-embed", input="a", encoding_format="float")
    assert [entry.index for entry in reply.data] == [0, 1]
    assert reply.data[0].embedding == floats.data[0].embedding
    assert math.isclose(sum(x * x for x in floats.data[0].embedding), 1.0)
    assert reply.model == "nomic-embed@q4_k_m"
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (0, 0)


async def test_the_official_client_lists_models_and_completes_text() -> None:
    async with studio(jit=False) as fake, client(fake) as official:
        assert [model.id async for model in official.models.list()] == []
        await fake.load("qwen/tiny", identifier="mine")
        assert [model.id async for model in official.models.list()] == ["mine"]
        fake.options.jit = True
        assert "mine" in [model.id async for model in official.models.list()]
        whole = await official.completions.create(model="qwen/tiny", prompt="once", max_tokens=3)
        stream = await official.completions.create(
            model="qwen/tiny", prompt="once", max_tokens=3, stream=True
        )
        pieces = [chunk.choices[0].text async for chunk in stream]
    assert whole.choices[0].finish_reason == "length"
    assert "".join(pieces) == whole.choices[0].text


async def test_the_official_client_sees_typed_errors() -> None:
    long = "word " * 5000
    async with studio() as fake, client(fake) as official:
        with pytest.raises(openai.NotFoundError) as missing:
            await official.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.BadRequestError) as too_long:
            await official.chat.completions.create(
                model="qwen/tiny", messages=[{"role": "user", "content": long}]
            )
        stream = await official.chat.completions.create(
            model="qwen/tiny", messages=[{"role": "user", "content": long}], stream=True
        )
        with pytest.raises(openai.APIError, match="Trying to keep the first"):
            await anext(aiter(stream))
    assert "Trying to keep the first" in too_long.value.response.json()["error"]
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"


async def test_the_official_client_must_show_its_token() -> None:
    async with studio(token=TOKEN) as fake:
        async with client(fake, TOKEN) as official:
            assert [model.id async for model in official.models.list()]
        for token, words in (("lm-studio", "Malformed"), (TOKEN[:-1] + "x", "Invalid")):
            async with client(fake, token) as official:
                with pytest.raises(openai.AuthenticationError, match=words):
                    await official.models.list()
        status, body = await ask(fake, "GET", "/api/v1/models")
        assert status == 401
        assert body["error"]["code"] == "invalid_api_key"  # type: ignore[index]
        assert "none was provided" in body["error"]["message"]  # type: ignore[index]
        assert await ask(fake, "GET", "/lmstudio-greeting") == (200, {"lmstudio": True})
        fake.options.version = Version.parse("0.3")
        assert (await ask(fake, "GET", "/v1/models"))[0] == 200


async def test_a_malformed_token_is_echoed_in_part() -> None:
    async with studio(token=TOKEN) as fake:
        headers = {"Authorization": "Bearer sk-bogus-EXTRASECRET"}
        _, body = await ask(fake, "GET", "/v1/models", headers=headers)
    assert body["error"]["message"] == "Malformed LM Studio API token provided: sk-bogus-E**********"  # type: ignore[index]


# Documented shapes


async def test_the_native_listing_has_the_documented_shape() -> None:
    async with studio() as fake:
        await fake.load("qwen/tiny", context_length=2048)
        _, body = await ask(fake, "GET", "/api/v1/models")
    entries = {entry["key"]: entry for entry in body["models"]}  # type: ignore[index]
    assert entries["qwen/tiny"] == {
        "type": "llm",
        "publisher": "forebay-tests",
        "key": "qwen/tiny",
        "display_name": "Tiny",
        "architecture": "llama",
        "quantization": {"name": "Q4_K_M", "bits_per_weight": 4},
        "size_bytes": 1234567,
        "params_string": "135M",
        "loaded_instances": [
            {
                "id": "qwen/tiny",
                "config": {
                    "context_length": 2048,
                    "eval_batch_size": 512,
                    "parallel": 4,
                    "flash_attention": True,
                },
            }
        ],
        "max_context_length": 8192,
        "format": "gguf",
        "capabilities": {"vision": False, "trained_for_tool_use": True},
        "description": None,
    }
    assert entries["gpt-oss"]["capabilities"]["reasoning"] == {
        "allowed_options": ["off", "on"],
        "default": "on",
    }
    assert not {"architecture", "capabilities"} & set(entries["nomic-embed"])


async def test_the_older_listing_has_the_documented_shape() -> None:
    async with studio() as fake:
        await fake.load("granite-vision")
        _, body = await ask(fake, "GET", "/api/v0/models")
        status, one = await ask(fake, "GET", "/api/v0/models/qwen/tiny")
        missing, _ = await ask(fake, "GET", "/api/v0/models/none")
    entries = {entry["id"]: entry for entry in body["data"]}  # type: ignore[index]
    assert body["object"] == "list"  # type: ignore[index]
    assert entries["granite-vision"] == {
        "id": "granite-vision",
        "object": "model",
        "type": "vlm",
        "publisher": "forebay-tests",
        "arch": "llama",
        "compatibility_type": "mlx",
        "quantization": "4bit",
        "state": "loaded",
        "max_context_length": 8192,
        "capabilities": ["tool_use"],
        "loaded_context_length": 4096,
    }
    assert entries["nomic-embed"]["type"] == "embeddings"
    assert (status, missing) == (200, 404)
    assert one["state"] == "not-loaded"  # type: ignore[index]


async def test_older_chat_replies_carry_their_statistics() -> None:
    async with studio() as fake:
        body = {"model": "qwen/tiny", "messages": [{"role": "user", "content": "hi"}]}
        _, whole = await ask(fake, "POST", "/api/v0/chat/completions", body)
        events = await frames(fake, "/api/v0/chat/completions", body | {"stream": True})
    assert whole["stats"]["stop_reason"] == "eosFound"  # type: ignore[index]
    assert set(whole["stats"]) == {
        "tokens_per_second",
        "time_to_first_token",
        "generation_time",
        "stop_reason",
    }  # type: ignore[index]
    assert whole["model_info"] == {
        "arch": "llama",
        "quant": "Q4_K_M",
        "format": "gguf",
        "context_length": 4096,
    }  # type: ignore[index]
    assert events[-1] == ("", "[DONE]")
    assert events[-2][1]["stats"]["stop_reason"] == "eosFound"  # type: ignore[index]


async def test_unknown_paths_and_methods_get_a_200_that_is_an_error() -> None:
    async with studio() as fake:
        for method, path in (
            ("GET", "/api/health"),
            ("GET", "//v1/models"),
            ("GET", "/v1/models/"),
            ("DELETE", "/v1/models"),
            ("OPTIONS", "/v1/models"),
        ):
            status, body = await ask(fake, method, path)
            assert status == 200
            assert body == {"error": f"Unexpected endpoint or method. ({method} {path})"}
        fake.options.cors = True
        async with aiohttp.ClientSession() as session, session.options(f"{fake.url}/v1/models") as reply:
            assert reply.status == 204


async def test_a_version_has_the_paths_of_its_time() -> None:
    expected = {"0.3.0": (False, False), "0.3.14": (True, False), "0.4.0": (True, True)}
    for version, (v0, v1) in expected.items():
        async with studio(version=Version.parse(version)) as fake:
            _, old = await ask(fake, "GET", "/api/v0/models")
            _, new = await ask(fake, "GET", "/api/v1/models")
            assert ("data" in old, "models" in new) == (v0, v1)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/v1/chat/completions", {"model": "qwen/tiny"}, "'messages' field is required"),
        ("/v1/chat/completions", {"model": "qwen/tiny", "messages": ["x"]}, "'messages' must be an array"),
        (
            "/v1/chat/completions",
            {"model": "qwen/tiny", "messages": [{"role": "robot"}]},
            "'role' must be one of",
        ),
        (
            "/v1/chat/completions",
            {"model": "qwen/tiny", "messages": [{"role": "assistant", "content": None}]},
            "field must be a string or an array of objects",
        ),
        (
            "/v1/chat/completions",
            {
                "model": "qwen/tiny",
                "messages": [
                    {"role": "assistant", "content": "", "tool_calls": [{"id": "", "function": {}}]}
                ],
            },
            "'id' must be a non-empty string",
        ),
        (
            "/v1/chat/completions",
            {"model": "qwen/tiny", "messages": [{"role": "tool", "content": "x"}]},
            "'tool_call_id' is required",
        ),
        (
            "/v1/chat/completions",
            {"model": "qwen/tiny", "messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "must have a 'type'",
        ),
        (
            "/v1/chat/completions",
            {
                "model": "granite-vision",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}],
                    }
                ],
            },
            "base64 encoded image",
        ),
        (
            "/v1/chat/completions",
            {
                "model": "qwen/tiny",
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}],
            },
            "does not support images",
        ),
        (
            "/v1/chat/completions",
            {
                "model": "qwen/tiny",
                "messages": [{"role": "user", "content": "x"}],
                "tool_choice": {"type": "function"},
            },
            "Invalid tool_choice type",
        ),
        (
            "/v1/chat/completions",
            {"model": "qwen/tiny", "messages": [{"role": "user", "content": "x"}], "tools": {}},
            "'tools' must be an array",
        ),
        (
            "/v1/chat/completions",
            {"model": "qwen/tiny", "messages": [{"role": "user", "content": "x"}], "tools": [{}]},
            "each tool must have",
        ),
        (
            "/v1/chat/completions",
            {
                "model": "qwen/tiny",
                "messages": [{"role": "user", "content": "x"}],
                "response_format": {"type": "json_schema", "json_schema": {}},
            },
            "must be an object",
        ),
        (
            "/v1/chat/completions",
            {"model": "qwen/tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": "9"},
            "'max_tokens' must be an integer",
        ),
        ("/v1/completions", {"model": "qwen/tiny", "prompt": ["x"]}, "'prompt' field"),
        ("/v1/embeddings", {"model": "nomic-embed", "input": [[1, 2]]}, "'input' field must be a string"),
    ],
)
async def test_a_malformed_request_gets_a_bare_string(path: str, body: object, error: str) -> None:
    async with studio() as fake:
        status, reply = await ask(fake, "POST", path, body)
    assert status == 400
    assert error in reply["error"]  # type: ignore[index,operator]


async def test_bad_json_is_refused() -> None:
    async with (
        studio() as fake,
        aiohttp.ClientSession() as session,
        session.post(f"{fake.url}/v1/chat/completions", data=b"{no") as reply,
    ):
        assert reply.status == 400


async def test_an_image_is_read_by_a_model_that_can() -> None:
    parts = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": PNG}}]
    async with studio() as fake:
        body = {"model": "granite-vision", "messages": [{"role": "user", "content": parts}]}
        status, reply = await ask(fake, "POST", "/v1/chat/completions", body)
    assert status == 200
    assert reply["usage"]["prompt_tokens"] > 64  # type: ignore[index]


@pytest.mark.parametrize("model", ["gpt-oss", "deep-key", "deep-inline"])
async def test_reasoning_comes_in_three_styles(model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "why"}]}
    async with studio() as fake:
        _, whole = await ask(fake, "POST", "/v1/chat/completions", body)
        _, quiet = await ask(fake, "POST", "/v1/chat/completions", body | {"reasoning_effort": "none"})
        events = await frames(fake, "/v1/chat/completions", body | {"stream": True})
    message = whole["choices"][0]["message"]  # type: ignore[index]
    key = {"gpt-oss": "reasoning", "deep-key": "reasoning_content"}.get(model)
    deltas = [data["choices"][0]["delta"] for _, data in events[:-1]]  # type: ignore[index]
    if key is None:
        assert message["content"].startswith("<think>\n")
        assert deltas[0]["content"] == "<thi"
    else:
        assert message[key] == "".join(delta.get(key, "") for delta in deltas)
        assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0  # type: ignore[index]
    assert "<think>" not in quiet["choices"][0]["message"]["content"]  # type: ignore[index]


async def test_stop_strings_and_limits_end_a_reply() -> None:
    body = {"model": "qwen/tiny", "messages": [{"role": "user", "content": "count"}]}
    async with studio() as fake:
        _, whole = await ask(fake, "POST", "/api/v0/chat/completions", body)
        said = whole["choices"][0]["message"]["content"]  # type: ignore[index]
        cut = said[9:13]
        _, stopped = await ask(fake, "POST", "/api/v0/chat/completions", body | {"stop": [cut]})
        _, alone = await ask(fake, "POST", "/api/v0/chat/completions", body | {"stop": cut})
        _, unmet = await ask(fake, "POST", "/api/v0/chat/completions", body | {"stop": ["no such"]})
        _, short = await ask(fake, "POST", "/api/v0/chat/completions", body | {"max_tokens": 2})
        _, free = await ask(fake, "POST", "/api/v0/chat/completions", body | {"max_tokens": -1})
        fake.studio.restart()
        await fake.load("qwen/tiny", context_length=5)
        _, full = await ask(fake, "POST", "/api/v0/chat/completions", body)
    assert stopped["choices"][0]["message"]["content"] == said[: said.find(cut)]  # type: ignore[index]
    assert stopped["stats"]["stop_reason"] == "stopStringFound"  # type: ignore[index]
    assert alone["choices"] == stopped["choices"]  # type: ignore[index]
    assert unmet["choices"] == free["choices"] == whole["choices"]  # type: ignore[index]
    assert short["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
    assert full["stats"]["stop_reason"] == "contextLengthReached"  # type: ignore[index]


async def test_logprobs_are_null_unless_the_version_gives_them() -> None:
    body = {
        "model": "qwen/tiny",
        "messages": [{"role": "user", "content": "p"}],
        "logprobs": True,
        "top_logprobs": 2,
    }
    async with studio() as fake:
        _, without = await ask(fake, "POST", "/v1/chat/completions", body)
        fake.options.logprobs = True
        _, whole = await ask(fake, "POST", "/v1/chat/completions", body)
        events = await frames(fake, "/v1/chat/completions", body | {"stream": True})
    assert without["choices"][0]["logprobs"] is None  # type: ignore[index]
    entries = whole["choices"][0]["logprobs"]["content"]  # type: ignore[index]
    assert all(entry["logprob"] < 0 and len(entry["top_logprobs"]) == 2 for entry in entries)
    assert events[0][1]["choices"][0]["logprobs"]["content"][0] == entries[0]  # type: ignore[index]


async def test_a_prompt_too_long_can_end_in_silence() -> None:
    body = {"model": "qwen/tiny", "messages": [{"role": "user", "content": "w " * 5000}], "stream": True}
    async with studio(overflow="silent") as fake:
        assert await frames(fake, "/v1/chat/completions", body) == [("", "[DONE]")]
        fake.options.overflow = "event"
        fake.options.done_after_error = False
        ((kind, data),) = await frames(fake, "/v1/chat/completions", body)
    assert kind == "error"
    assert data["error"]["message"] == data["message"]  # type: ignore[index]


# Native API


async def test_loading_twice_makes_a_second_instance_and_unloading_takes_the_identifier() -> None:
    async with studio() as fake:
        body = {"model": "qwen/tiny", "context_length": 100, "echo_load_config": True}
        _, first = await ask(fake, "POST", "/api/v1/models/load", body)
        _, second = await ask(fake, "POST", "/api/v1/models/load", {"model": "qwen/tiny"})
        _, third = await ask(fake, "POST", "/api/v1/models/load", {"model": "qwen/tiny"})
        _, gone = await ask(fake, "POST", "/api/v1/models/unload", {"instance_id": "qwen/tiny"})
        status, error = await ask(fake, "POST", "/api/v1/models/unload", {"instance_id": "qwen/tiny"})
        found = fake.studio.find("qwen/tiny")
    assert first["load_config"]["context_length"] == 100  # type: ignore[index]
    assert (first["type"], first["status"]) == ("llm", "loaded")  # type: ignore[index]
    assert (second["instance_id"], third["instance_id"]) == ("qwen/tiny:2", "qwen/tiny:3")  # type: ignore[index]
    assert "load_config" not in second  # type: ignore[operator]
    assert gone == {"instance_id": "qwen/tiny"}
    assert status == 404
    assert error["error"]["type"] == "model_not_found"  # type: ignore[index]
    assert found is not None
    assert found.id == "qwen/tiny:2"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("load", {}, 400, "missing_required_parameter"),
        ("load", {"model": "qwen/tiny", "ttl": 60}, 400, "unrecognized_keys"),
        ("load", {"model": "qwen/tiny", "context_length": "8"}, 400, "invalid_type"),
        ("load", {"model": "none"}, 404, "model_not_found"),
        ("load", {"model": "broken"}, 500, None),
        ("unload", {}, 400, "missing_required_parameter"),
        ("download", {}, 400, "missing_required_parameter"),
        ("download", {"model": "none"}, 404, "model_not_found"),
    ],
)
async def test_native_errors_have_the_native_shape(
    path: str, body: object, status: int, code: str | None
) -> None:
    async with studio() as fake:
        got, reply = await ask(fake, "POST", f"/api/v1/models/{path}", body)
    assert got == status
    assert reply["error"].get("code") == code  # type: ignore[index]
    assert reply["error"]["message"]  # type: ignore[index]


async def test_a_download_gets_on_with_each_look() -> None:
    async with studio() as fake:
        _, job = await ask(fake, "POST", "/api/v1/models/download", {"model": "new/model"})
        _, again = await ask(fake, "POST", "/api/v1/models/download", {"model": "new/model"})
        path = f"/api/v1/models/download/status/{job['job_id']}"  # type: ignore[index]
        seen = [(await ask(fake, "GET", path))[1] for _ in range(4)]
        fake.studio.downloads[job["job_id"]].status = "paused"  # type: ignore[index]
        _, paused = await ask(fake, "GET", path)
        _, already = await ask(fake, "POST", "/api/v1/models/download", {"model": "new/model"})
        _, known = await ask(fake, "POST", "/api/v1/models/download", {"model": "gpt-oss"})
        body = {"model": "https://huggingface.co/org/repo", "quantization": "Q8_0"}
        _, address = await ask(fake, "POST", "/api/v1/models/download", body)
        _, bad = await ask(fake, "POST", "/api/v1/models/download", {"model": "bad/model"})
        looks = [
            (await ask(fake, "GET", f"/api/v1/models/download/status/{bad['job_id']}"))[1]["status"]  # type: ignore[index]
            for _ in range(2)
        ]
        fake.studio.restart()
        lost, error = await ask(fake, "GET", path)
    assert job["total_size_bytes"] == 1000  # type: ignore[index]
    assert again["job_id"] == job["job_id"]  # type: ignore[index]
    assert [one.get("downloaded_bytes") for one in seen] == [250, 500, 750, None]  # type: ignore[attr-defined]
    assert seen[-1]["status"] == "completed"  # type: ignore[index]
    assert paused["status"] == "paused"  # type: ignore[index]
    assert already == known == {"status": "already_downloaded"}
    assert address["status"] == "downloading"  # type: ignore[index]
    assert looks == ["downloading", "failed"]
    assert lost == 404
    assert error["error"]["type"] == "job_not_found"  # type: ignore[index]


async def test_the_native_chat_streams_its_events_in_order() -> None:
    async with studio() as fake:
        body = {
            "model": "gpt-oss",
            "input": "hello",
            "stream": True,
            "store": False,
            "system_prompt": "be brief",
        }
        events = await frames(fake, "/api/v1/chat", body)
        _, whole = await ask(fake, "POST", "/api/v1/chat", body | {"stream": False, "store": True})
        again = await frames(fake, "/api/v1/chat", body | {"reasoning": "off"})
        inline = await frames(fake, "/api/v1/chat", body | {"model": "deep-inline"})
    kinds = [kind for kind, _ in events]
    assert list(dict.fromkeys(kinds)) == [
        "chat.start",
        "model_load.start",
        "model_load.progress",
        "model_load.end",
        "prompt_processing.start",
        "prompt_processing.progress",
        "prompt_processing.end",
        "reasoning.start",
        "reasoning.delta",
        "reasoning.end",
        "message.start",
        "message.delta",
        "message.end",
        "chat.end",
    ]
    assert all(kind == data["type"] for kind, data in events)  # type: ignore[index]
    result = events[-1][1]["result"]  # type: ignore[index]
    assert result["output"] == whole["output"]  # type: ignore[index]
    assert result["stats"]["model_load_time_seconds"] == 0.5
    assert "response_id" not in result
    assert whole["response_id"].startswith("resp_")  # type: ignore[index]
    assert "reasoning.start" not in [kind for kind, _ in again]
    assert "model_load.start" not in [kind for kind, _ in again]
    assert "reasoning.start" in [kind for kind, _ in inline]


async def test_the_native_chat_knows_one_spelling_of_items() -> None:
    async with studio() as fake:
        body = {"model": "granite-vision", "input": [{"type": "message", "content": "x"}]}
        status, error = await ask(fake, "POST", "/api/v1/chat", body)
        fake.options.input_item = "message"
        body["input"] = [{"type": "message", "content": "x"}, {"type": "image", "data_url": PNG}]
        right, _ = await ask(fake, "POST", "/api/v1/chat", body)
        blind, _ = await ask(fake, "POST", "/api/v1/chat", body | {"model": "qwen/tiny"})
    assert status == 400
    assert error == {
        "error": {
            "message": "Invalid discriminator value. Expected 'text' | 'image'",
            "type": "invalid_request",
            "code": "invalid_union",
            "param": "input",
        }
    }
    assert (right, blind) == (200, 400)


@pytest.mark.parametrize(
    "body",
    [
        {"input": "x"},
        {"model": "qwen/tiny", "input": ""} | {"input": []},
        {"model": "qwen/tiny", "input": "x", "seed": 1},
        {"model": "qwen/tiny", "input": "x", "reasoning": "on"},
        {"model": "qwen/tiny", "input": "w " * 5000},
    ],
)
async def test_the_native_chat_refuses_what_it_does_not_know(body: object) -> None:
    async with studio() as fake:
        status, reply = await ask(fake, "POST", "/api/v1/chat", body)
    assert status == 400
    assert reply["error"]["type"] == "invalid_request"  # type: ignore[index]


# Habits and faults


async def test_simultaneous_first_requests_load_an_instance_each() -> None:
    body = {"model": "qwen/tiny", "messages": [{"role": "user", "content": "x"}]}
    for race, expected in ((True, 3), (False, 1)):
        async with studio(jit_race=race) as fake:
            fake.gates.hold("load")
            asks = [asyncio.ensure_future(ask(fake, "POST", "/v1/chat/completions", body)) for _ in range(3)]
            await fake.gates.arrived("load", expected)
            fake.gates.release("load")
            await asyncio.gather(*asks)
            assert len(fake.studio.loaded()) == expected


async def test_an_idle_model_is_unloaded_after_its_time() -> None:
    body = {"model": "qwen/tiny", "messages": [{"role": "user", "content": "x"}], "ttl": 0}
    async with studio() as fake:
        await fake.load("gpt-oss")
        await ask(fake, "POST", "/v1/chat/completions", body)
        assert [one.id for one in fake.studio.loaded()] == ["gpt-oss"]


async def test_eviction_cuts_a_running_reply() -> None:
    body = {"model": "qwen/tiny", "messages": [{"role": "user", "content": "x"}]}
    async with studio() as fake:
        fake.gates.hold("token")
        cut = asyncio.ensure_future(frames(fake, "/v1/chat/completions", body | {"stream": True}))
        await fake.gates.arrived("token")
        whole = asyncio.ensure_future(ask(fake, "POST", "/v1/chat/completions", body))
        await fake.gates.arrived("token", 2)
        native = asyncio.ensure_future(
            frames(fake, "/api/v1/chat", {"model": "qwen/tiny", "input": "x", "stream": True})
        )
        plain = asyncio.ensure_future(ask(fake, "POST", "/api/v1/chat", {"model": "qwen/tiny", "input": "x"}))
        await fake.gates.arrived("token", 4)
        other = asyncio.ensure_future(ask(fake, "POST", "/v1/chat/completions", body | {"model": "gpt-oss"}))
        await fake.gates.arrived("token", 5)
        fake.gates.release("token")
        events, (status, error), told, (plain_status, _), (fine, _) = await asyncio.gather(
            cut, whole, native, plain, other
        )
    assert events[0][0] == "error"
    assert (status, plain_status, fine) == (500, 500, 200)
    assert error == {"error": "Model unloaded."}
    assert [kind for kind, _ in told][-2:] == ["error", "chat.end"]


async def test_requests_over_the_slots_wait_in_silence() -> None:
    body = {"model": "qwen/tiny", "messages": [{"role": "user", "content": "x"}]}
    async with studio() as fake:
        instance = await fake.load("qwen/tiny", parallel=2)
        fake.gates.hold("prefill")
        asks = [asyncio.ensure_future(ask(fake, "POST", "/v1/chat/completions", body)) for _ in range(5)]
        await fake.gates.arrived("prefill", 2)
        while instance.waiting < 3:
            await asyncio.sleep(0.001)
        assert fake.busy("qwen/tiny") == 2
        fake.gates.release("prefill")
        assert {status for status, _ in await asyncio.gather(*asks)} == {200}


async def test_a_client_that_leaves_does_not_end_the_reading_of_its_prompt() -> None:
    body = {"model": "qwen/tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with studio() as fake:
        instance = await fake.load("qwen/tiny", parallel=1)
        fake.gates.hold("prefill")
        first = asyncio.ensure_future(ask(fake, "POST", "/v1/chat/completions", body))
        await fake.gates.arrived("prefill")
        second = asyncio.ensure_future(ask(fake, "POST", "/v1/chat/completions", body))
        while not instance.waiting:
            await asyncio.sleep(0.001)
        first.cancel()
        second.cancel()
        await asyncio.wait([first, second])
        await asyncio.sleep(0.02)
        assert fake.busy("qwen/tiny") == 1
        fake.gates.release("prefill")
        while fake.disconnects < 2:
            await asyncio.sleep(0.001)
        assert fake.busy("qwen/tiny") == 0


async def test_a_client_that_leaves_an_embedding_is_noticed() -> None:
    async with studio() as fake:
        fake.gates.hold("embed")
        left = asyncio.ensure_future(
            ask(fake, "POST", "/v1/embeddings", {"model": "nomic-embed", "input": "x"})
        )
        await fake.gates.arrived("embed")
        left.cancel()
        await asyncio.wait([left])
        await asyncio.sleep(0.02)
        fake.gates.release("embed")
        while not fake.disconnects:
            await asyncio.sleep(0.001)


async def test_embedding_fails_on_big_batches_and_long_texts() -> None:
    async with studio(embed_batch=2) as fake:
        batch, error = await ask(
            fake, "POST", "/v1/embeddings", {"model": "nomic-embed", "input": ["a", "b", "c"]}
        )
        long, _ = await ask(fake, "POST", "/v1/embeddings", {"model": "nomic-embed", "input": "w " * 5000})
        fake.options.version = Version.parse("0.3.3")
        empty, _ = await ask(fake, "POST", "/v1/embeddings", {"model": "nomic-embed", "input": ["", "a"]})
        wrong, _ = await ask(fake, "POST", "/v1/embeddings", {"model": "qwen/tiny", "input": ["a"]})
    assert (batch, long, empty, wrong) == (500, 500, 500, 404)
    assert "llama_decode returned -1" in error["error"]  # type: ignore[index,operator]


async def test_no_model_loaded_is_said_in_two_ways() -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    for version, code in (("0.4.4", "model_not_found"), ("0.4.8", None)):
        async with studio(jit=False, version=Version.parse(version)) as fake:
            status, reply = await ask(fake, "POST", "/v1/chat/completions", body)
            assert status == 404
            assert reply["error"]["code"] == code  # type: ignore[index]


async def test_the_only_loaded_model_answers_for_others_if_so_told() -> None:
    body = {"model": "other", "messages": [{"role": "user", "content": "x"}]}
    async with studio(jit=False) as fake:
        await fake.load("qwen/tiny")
        refused, _ = await ask(fake, "POST", "/v1/chat/completions", body)
        fake.options.answers_with_loaded = True
        _, reply = await ask(fake, "POST", "/v1/chat/completions", body)
        _, nameless = await ask(fake, "POST", "/v1/chat/completions", {"messages": body["messages"]})
    assert refused == 404
    assert reply["model"] == nameless["model"] == "qwen/tiny"  # type: ignore[index]


# Scripts


async def test_a_script_plays_bytes_delays_and_cuts() -> None:
    async with studio() as fake, aiohttp.ClientSession() as session:
        url = f"{fake.url}/v1/models"
        fake.script(
            "GET",
            "/v1/models",
            Reply.json({"a": 1}, status=503),
            Reply.text("<html>", content_type="text/html"),
            Reply.sse({"x": "é"}, "event: a\ndata: 1\n\n", b": c\n\n", Headers(), Delay(0.001), every=1),
            Reply(steps=(Send(b"part"), Close())),
            Reply(steps=(Raw(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"),)),
            Reply(content_type="", chunked=False, steps=(Send(b"till the end"),)),
        )
        fake.script("POST", "/v1/models", Reply(steps=(Reset(),)))
        async with session.get(url) as reply:
            assert (reply.status, await reply.json()) == (503, {"a": 1})
        async with session.get(url) as reply:
            assert await reply.text() == "<html>"
        async with session.get(url) as reply:
            assert await reply.text() == 'data: {"x":"é"}\n\nevent: a\ndata: 1\n\n: c\n\ndata: [DONE]\n\n'
        with pytest.raises(aiohttp.ClientPayloadError):
            async with session.get(url) as reply:
                await reply.read()
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.post(url)  # aiohttp sends a GET again of its own accord
        async with session.get(url) as reply:
            assert await reply.read() == b"{"
        async with session.get(url) as reply:
            assert await reply.read() == b"till the end"
        assert fake.unused() == []


async def test_a_script_stalls_until_it_is_let_go_or_the_client_leaves() -> None:
    async with studio() as fake:
        fake.script(
            "GET", "/v1/models", Reply(steps=(Stall("here"), Send(b"{}"))), Reply(steps=(Stall(),)), Reply()
        )
        first = asyncio.ensure_future(ask(fake, "GET", "/v1/models"))
        await fake.gates.arrived("here")
        fake.gates.release("here")
        assert await first == (200, {})
        second = asyncio.ensure_future(ask(fake, "GET", "/v1/models"))
        while len(fake.requests) < 2:
            await asyncio.sleep(0.001)
        second.cancel()
        await asyncio.wait([second])
        assert fake.unused() == ["GET /v1/models x1"]


def test_a_script_travels_as_json() -> None:
    steps = [
        {"send": "a"},
        {"send64": "Yg=="},
        {"raw": "c"},
        {"raw64": "ZA=="},
        {"delay": 1},
        {"stall": "g"},
        {"headers": True},
        {"close": True},
        {"reset": True},
    ]
    reply = Reply.from_json({"status": 500, "content_type": "text/plain", "steps": steps})
    assert reply.status == 500
    assert reply.steps == (
        Send(b"a"),
        Send(b"b"),
        Raw(b"c"),
        Raw(b"d"),
        Delay(1.0),
        Stall("g"),
        Headers(),
        Close(),
        Reset(),
    )
    with pytest.raises(ValueError, match="not a step"):
        Reply.from_json({"steps": [{"jump": 1}]})


def test_text_depends_on_its_input_alone() -> None:
    assert text.answer("p", model="m", seed=1) == text.answer("p", model="m", seed=1)
    assert text.vector("p", model="m", size=5) == text.vector("p", model="m", size=5)
    assert text.instance(True) is None
    assert text.instance({"type": "object"}) == {}
    assert text.instance({"type": []}) == {}


# The process


async def test_the_process_prints_its_address_and_takes_scripts() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "forebay.testing.fake_lmstudio",
        "--models=a,b:embed,c:vision:inline",
        "--loaded=a",
        "--control",
        stdout=asyncio.subprocess.PIPE,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
        url = line.split()[-1]
        assert line.startswith("forebay fake-lmstudio listening on http://127.0.0.1:")
        async with aiohttp.ClientSession() as session:

            async def control(name: str, body: object = None) -> object:
                method = "GET" if name == "state" else "POST"
                async with session.request(method, f"{url}/__fake__/{name}", json=body) as reply:
                    return await reply.json()

            reply = {"status": 503, "steps": [{"send": "{}"}]}
            await control("script", {"method": "GET", "path": "/v1/models", "reply": reply})
            bad = await control("script", {"reply": {"steps": [1]}})
            async with session.get(f"{url}/v1/models") as scripted:
                assert scripted.status == 503
            assert "not a step" in bad["error"]  # type: ignore[index]
            await control("hold", {"gate": "load"})
            await control("release", {"gate": "load"})
            state = await control("state")
            assert state["instances"] == {"a": 0}  # type: ignore[index]
            await control("restart")
            assert (await control("state"))["instances"] == {}  # type: ignore[index]
            assert await control("none") == {"error": "no such control"}
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0


def test_an_unknown_trait_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown trait"):
        main(["--models", "a:flying"])
