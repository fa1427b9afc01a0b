"""The OpenAI bridge keeps the suite's promises over a real mlx_lm.server, and stands its peculiarities."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import InvalidRequest
from forebay.kit.server import serving
from forebay.openai_bridge.config import OpenAiSettings
from forebay.openai_bridge.engine import OpenAiEngine
from forebay.testing import grammar
from forebay.testing.calls import Sink, ask, message, serve
from forebay.testing.client import CallError, client
from forebay.testing.contract import TOOL, ContractSuite, Target
from llama import Running, free_port, running
from promptly import promptly
from tiny_models import build_scripted

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that counts, in words that are one token each."""
    return build_scripted(tmp_path_factory.mktemp("mlx") / "tiny", [f" n{n}" for n in range(1800)]).resolve()


def server(model: Path, home: Path) -> Iterator[Running]:
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1"]
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    with running(command, port=port, log=home / "mlx.log", env=env) as up:
        yield up


@pytest.fixture(scope="module")
def listing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that finds the folder in which it looks for models."""
    home = tmp_path_factory.mktemp("home")
    (home / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    yield from server(model, home)


@pytest.fixture(scope="module")
def blind(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that does not find that folder, and then lists nothing and says nothing."""
    yield from server(model, tmp_path_factory.mktemp("nothing"))


class TestMlxLmServer(ContractSuite):
    @pytest.fixture
    async def target(self, listing: Running, model: Path) -> AsyncIterator[Target]:
        settings = OpenAiSettings(address="127.0.0.1:0", base_url=listing.url, slots=8)
        async with OpenAiEngine(settings) as engine, serving(settings, inference=engine, models=engine) as up:
            await up.set_ready(True)
            yield Target(
                address=up.address,
                model=str(model),
                capabilities=frozenset({pb.CAPABILITY_SEED, pb.CAPABILITY_TOOLS}),
                backend="openai",
                manages_models=False,
                long_token_count=1500,
            )


@pytest.fixture
async def engine(listing: Running) -> AsyncIterator[OpenAiEngine]:
    async with OpenAiEngine(OpenAiSettings(base_url=listing.url)) as engine:
        yield engine


async def test_it_is_recognised(engine: OpenAiEngine) -> None:
    await engine.list_models(pb.ListModelsRequest())
    assert "mlx-lm" in repr(engine)


async def test_edge_74_a_model_is_named_by_a_path_with_slashes(engine: OpenAiEngine, model: Path) -> None:
    listed = await engine.list_models(pb.ListModelsRequest())
    assert [m.id for m in listed.models] == [str(model)]
    sink = await serve(engine.generate, ask(model=str(model), token_count=3))
    grammar.check(sink.events, numbered=False)


async def test_edge_74_an_empty_list_of_models_leaves_the_default_one(blind: Running) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{blind.url}/v1/models") as answer:
        assert (answer.status, await answer.read()) == (200, b"")
    async with OpenAiEngine(OpenAiSettings(base_url=blind.url)) as engine:
        listed = await engine.list_models(pb.ListModelsRequest())
        assert [m.id for m in listed.models] == ["default_model"]
        sink = await serve(engine.generate, ask(model="default_model", token_count=3))
        grammar.check(sink.events, numbered=False)


async def test_edge_75_every_number_it_takes_is_taken(engine: OpenAiEngine, model: Path) -> None:
    request = ask(model=str(model), token_count=1)
    sampling = request.sampling
    sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p = 1.0, 1.0, 5, 0.0
    sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty = 1.0, 0.0, 0.0
    sampling.seed = 3
    sampling.logit_bias[5] = -100
    request.limits.stop_sequences.extend(["never this", "nor that"])
    request.backend_options["openai"].update({"xtc_probability": 0.0, "xtc_threshold": 0.1})
    sink = await serve(engine.generate, request)
    assert sink.kinds[-1] == "finished"


async def test_reading_a_long_prompt_is_told(engine: OpenAiEngine, model: Path) -> None:
    sink = await serve(engine.generate, ask("river " * 400, model=str(model), token_count=2))
    stages = [
        e.progress for e in sink.events if isinstance(e, pb.GenerateResponse) and e.HasField("progress")
    ]
    assert stages
    assert all(stage.stage == pb.Progress.STAGE_PREFILLING for stage in stages)
    assert [s.fraction for s in stages] == sorted(s.fraction for s in stages)


async def test_what_it_ignores_is_refused(engine: OpenAiEngine, model: Path) -> None:
    forced = ask(model=str(model))
    forced.tools.append(TOOL)
    forced.tool_choice.mode = pb.ToolChoice.MODE_REQUIRED
    typical = ask(model=str(model))
    typical.sampling.typical_p = 0.5
    for request, field in ((forced, "tool_choice"), (typical, "sampling.typical_p")):
        with pytest.raises(Exception, match=field):
            await serve(engine.generate, request)
        request.accepted_degradations.append(pb.DEGRADATION_KIND_OPTION_IGNORED)
        request.limits.max_output_token_count = 2
        sink = await serve(engine.generate, request)
        started = next(
            e.started for e in sink.events if isinstance(e, pb.GenerateResponse) and e.HasField("started")
        )
        assert [d.field for d in started.degradations] == [field]


async def test_a_model_it_does_not_list_is_never_asked_for(listing: Running, model: Path) -> None:
    settings = OpenAiSettings(address="127.0.0.1:0", base_url=listing.url)
    async with (
        OpenAiEngine(settings) as engine,
        serving(settings, inference=engine) as up,
        client(up.address) as peer,
    ):
        # Asked for it, the server would look for it on the network.
        with pytest.raises(CallError) as raised:
            await peer.generate(ask(model="mlx-community/anything"))
        assert raised.value.reason == "MODEL_NOT_FOUND"
        assert "anything" not in (listing.log.read_text(errors="replace"))


async def test_a_404_that_is_no_missing_model_is_an_invalid_request(
    engine: OpenAiEngine, model: Path
) -> None:
    request = ask(model=str(model), token_count=2)
    # Its chat template adds texts up, so a message without any makes it fail.
    request.messages.append(message("x", pb.ROLE_ASSISTANT))
    request.backend_options["openai"].update({"chat_template_kwargs": {"messages": "none"}})
    with pytest.raises(InvalidRequest):
        await serve(engine.generate, request)


async def test_a_cancelled_reply_closes_its_connection(engine: OpenAiEngine, model: Path) -> None:
    loop = asyncio.get_running_loop()

    async def cancelled() -> float:
        sink = Sink()
        request = ask(model=str(model), token_count=1500)
        call = asyncio.create_task(serve(engine.generate, request, sink=sink))
        async with asyncio.timeout(20):
            while "delta" not in sink.kinds:
                await asyncio.sleep(0.01)
        begin = loop.time()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return loop.time() - begin

    await promptly(0.2, cancelled)
    again = await serve(engine.generate, ask(model=str(model), token_count=2))
    assert again.kinds[-1] == "finished"
