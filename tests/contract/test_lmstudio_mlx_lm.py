"""The LM Studio bridge over a real mlx_lm.server, which has of LM Studio's interfaces the oldest only."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import grpc
import pytest

from contract import test_mlx_lm_server
from contract.test_lmstudio_contract import bridge
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.calls import ask
from forebay.testing.client import CallError, client
from llama import Running

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed"),
]

listing = test_mlx_lm_server.listing
model = test_mlx_lm_server.model


async def test_a_streamed_reply_comes_through(listing: Running, model: Path) -> None:
    async with bridge({"base_url": listing.url, "greeting": False}) as address, client(address) as caller:
        assert [found.id for found in await caller.list_models()] == [str(model)]
        request = ask(model=str(model), token_count=40)
        request.sampling.temperature = 0
        events = await caller.generate(request)
    assert len(grammar.deltas(events)) > 10
    numbers = [int(word.removeprefix("n")) for word in grammar.text(events).split()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # none lost, none twice
    assert events[-1].finished.reason == pb.FINISH_REASON_LENGTH


async def test_a_server_lost_in_the_middle_interrupts_the_reply(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    starting = test_mlx_lm_server.server(model, tmp_path)
    running = next(starting)
    try:
        async with bridge({"base_url": running.url, "greeting": False}) as address, client(address) as caller:
            events: list[pb.GenerateResponse] = []

            async def read() -> None:
                async with caller.stream(ask(model=str(model), token_count=1500)) as stream:
                    async for event in stream:
                        events.append(event)
                        if len(grammar.deltas(events)) == 3:
                            running.kill()

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read()
            assert caught.value.code() is grpc.StatusCode.ABORTED
            grammar.check(events, complete=False)
            with pytest.raises(CallError) as refused:
                await caller.generate(ask(model=str(model)))
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    finally:
        starting.close()  # type: ignore[attr-defined]  # a generator, typed as what the fixture needs
