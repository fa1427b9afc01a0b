"""What a bridge costs: a framework's HTTP called directly, and through its bridge, in turn, in one run.

Ollama is played by the emulator with no delays, so what is left is the cost of
the bridge; llama-server is real, with a tiny model, where it was built.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

import bridge_table
import llama
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.client import Client, client

TOKENS = 64
ROUNDS = 30
TEXTS = 1000
CALLERS = 50

Row = tuple[str, float, float, str]


async def _lines(session: aiohttp.ClientSession, url: str, body: object) -> AsyncIterator[bytes]:
    async with session.post(url, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.strip():
                yield line


async def _timed(events: AsyncIterator[object], is_delta: Callable[[object], bool]) -> tuple[float, float]:
    """Returns seconds to the first delta, and from it to the last a token."""
    begin = time.perf_counter()
    first = last = 0.0
    count = 0
    async for event in events:
        if is_delta(event):
            last = time.perf_counter()
            first = first or last
            count += 1
    return first - begin, (last - first) / max(1, count - 1)


async def _generate(caller: Client, model: str) -> AsyncIterator[object]:
    request = pb.GenerateRequest(
        model=model,
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="hello")])],
        sampling=pb.Sampling(temperature=0),
        limits=pb.GenerationLimits(max_output_token_count=TOKENS),
    )
    async with caller.stream(request) as stream:
        async for event in stream:
            yield event


def _has_text(event: object) -> bool:
    return isinstance(event, pb.GenerateResponse) and event.HasField("delta")


async def _pairs(
    direct: Callable[[], Awaitable[tuple[float, float]]],
    bridged: Callable[[], Awaitable[tuple[float, float]]],
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    await direct(), await bridged()
    return [(await direct(), await bridged()) for _ in range(ROUNDS)]


def _rows(name: str, pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> list[Row]:
    return [
        (
            f"{name}: {what}",
            statistics.median(a[i] for a, _ in pairs) * 1000,
            statistics.median(b[i] for _, b in pairs) * 1000,
            "ms",
        )
        for i, what in enumerate(("first token", "each token"))
    ]


async def _texts_a_second(embed: Callable[[list[str]], Awaitable[object]]) -> float:
    """Embeds short texts from many callers, each one after the other, and returns texts a second."""
    each = TEXTS // CALLERS
    serial = time.perf_counter_ns()

    async def one(who: int) -> None:
        for i in range(each):
            await embed([f"text {serial} {who} {i}"])

    begin = time.perf_counter()
    await asyncio.gather(*(one(who) for who in range(CALLERS)))
    return TEXTS / (time.perf_counter() - begin)


async def test_the_bridges(tmp_path: Path) -> None:
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CALLERS)))
        url = await enter(bridge_table.emulator("fake_ollama", "--parallel", "64", "--token-seconds", "0"))
        address = await enter(bridge_table.bridge("ollama_bridge", "ollama", url, tmp_path, slots=64))
        await bridge_table.models(address, 4)
        caller = await enter(client(address, timeout=60))
        body = {
            "model": "llama3.2",
            "messages": [{"role": "user", "content": "hello"}],
            "options": {"temperature": 0, "num_predict": TOKENS},
            "truncate": False,
            "shift": False,
        }

        def is_line(line: object) -> bool:
            assert isinstance(line, bytes)
            return bool(json.loads(line)["message"]["content"])

        pairs = await _pairs(
            lambda: _timed(_lines(session, f"{url}/api/chat", body), is_line),
            lambda: _timed(_generate(caller, "llama3.2:latest"), _has_text),
        )
        rows += _rows("ollama", pairs)

        async def embed(texts: list[str]) -> None:
            async with session.post(
                f"{url}/api/embed", json={"model": "all-minilm", "input": texts}
            ) as answer:
                answer.raise_for_status()
                await answer.read()

        near = await _texts_a_second(embed)
        far = await _texts_a_second(
            lambda texts: caller.embed(pb.EmbedRequest(model="all-minilm:latest", texts=texts))
        )
        rows.append((f"ollama: texts/s, {CALLERS} callers", near, far, ""))
        if llama.find() is not None:
            model = llama.write_model(tmp_path / "tiny.gguf")
            with llama.llama_server(tmp_path, "--alias", "tiny", model=model) as server:
                address = await enter(bridge_table.bridge("openai_bridge", "openai", server.url, tmp_path))
                await bridge_table.models(address, 1)
                other = await enter(client(address, timeout=60))
                chat = {
                    "model": "tiny",
                    "messages": body["messages"],
                    "temperature": 0,
                    "max_tokens": TOKENS,
                    "stream": True,
                }

                def is_chunk(line: object) -> bool:
                    assert isinstance(line, bytes)
                    data = line.removeprefix(b"data: ").strip()
                    if data == b"[DONE]":
                        return False
                    choices = json.loads(data)["choices"]
                    return bool(choices and choices[0]["delta"].get("content"))

                pairs = await _pairs(
                    lambda: _timed(_lines(session, f"{server.url}/v1/chat/completions", chat), is_chunk),
                    lambda: _timed(_generate(other, "tiny"), _has_text),
                )
                rows += _rows("llama-server", pairs)
                await stack.aclose()
    print(f"\n{'':34}{'direct':>12}{'bridged':>12}{'ratio':>8}{'added':>12}")
    for name, a, b, unit in rows:
        added = f"{b - a:.2f} {unit}" if unit else ""
        print(f"{name:34}{a:>12.2f}{b:>12.2f}{b / a:>8.2f}{added:>12}")
