"""The bridge over a real llama-server with a real model, the embedded default one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp
import grpc
import pytest

import llama
from contract.test_llama_server import bridge
from forebay.inference.v1 import inference_pb2 as pb
from forebay.mlx_service.fetch import default_cache_dir, ensure_default_gguf
from forebay.testing import grammar
from forebay.testing.client import CallError, client

pytestmark = [
    pytest.mark.llama,
    pytest.mark.model,
    pytest.mark.skipif(llama.find() is None, reason=llama.MISSING),
]

CONTEXT = 512
QUESTION = "Write one sentence about a mill by a river."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama.Running]:
    folder = tmp_path_factory.mktemp("smollm2")
    model = asyncio.run(ensure_default_gguf(default_cache_dir(), lambda progress: None))
    options = ("--alias", "smollm2", "-c", str(2 * CONTEXT), "-np", "2")
    with llama.llama_server(folder, *options, model=model) as running:
        yield running


def ask(text: str = QUESTION, most: int = 40) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="smollm2",
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
        sampling=pb.Sampling(temperature=0.8, seed=11),
        limits=pb.GenerationLimits(max_output_token_count=most),
    )


async def test_a_seeded_stream_is_what_the_server_says_without_streaming(server: llama.Running) -> None:
    async with bridge(server.url) as (_, address), client(address, timeout=60) as caller:
        events = await caller.generate(ask())
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0.8,
        "seed": 11,
        "max_tokens": 40,
    }
    url = f"{server.url}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        whole = await answer.json()
    assert grammar.text(events) == whole["choices"][0]["message"]["content"]
    usage = events[-1].finished.usage
    assert usage.prompt_token_count == whole["usage"]["prompt_tokens"]
    assert usage.output_token_count == whole["usage"]["completion_tokens"]


async def test_a_prompt_longer_than_a_slot_is_refused_with_figures(server: llama.Running) -> None:
    async with bridge(server.url) as (_, address), client(address, timeout=60) as caller:
        with pytest.raises(CallError) as caught:
            await caller.generate(ask("river " * (CONTEXT + 100)))
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_EXCEEDED")
    assert str(CONTEXT) in caught.value.details


async def test_the_counted_tokens_are_those_of_the_prompt(server: llama.Running) -> None:
    async with bridge(server.url) as (_, address), client(address, timeout=60) as caller:
        request = ask()
        counted = await caller.count_tokens(pb.CountTokensRequest(model="smollm2", messages=request.messages))
        events = await caller.generate(request)
    assert counted.token_count == events[-1].finished.usage.prompt_token_count
