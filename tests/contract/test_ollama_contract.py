"""The Ollama bridge keeps the promises of the contract, over a new server and an old one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.server import serving
from forebay.ollama_bridge.config import OllamaSettings
from forebay.ollama_bridge.engine import OllamaEngine
from forebay.testing.contract import ContractSuite, Target
from forebay.testing.fake_ollama import MODELS, FakeOllama
from forebay.testing.fake_ollama_runners import FakeModel, Scheduler

CAPABILITIES = frozenset({pb.CAPABILITY_JSON_SCHEMA, pb.CAPABILITY_SEED})


@asynccontextmanager
async def bridged(
    *, model: str, capabilities: frozenset[pb.Capability.ValueType], version: str = "0.33.0", slots: int = 4
) -> AsyncIterator[Target]:
    long = FakeModel(name="long:latest", answer_tokens=2000)
    fake = FakeOllama(
        [*MODELS, long], version=version, scheduler=Scheduler(parallel=slots), token_seconds=0.002
    )

    async def active() -> int:
        return fake.running

    def prepare(request: pb.GenerateRequest) -> pb.GenerateRequest:
        request.model = "long:latest"
        return request

    async with fake:
        settings = OllamaSettings(address="127.0.0.1:0", base_url=fake.url, slots=slots)
        async with (
            OllamaEngine.running(settings) as engine,
            serving(settings, inference=engine, models=engine.library) as up,
        ):
            await engine.probe()
            await up.set_ready(True)
            yield Target(
                address=up.address,
                model=model,
                embedding_model="all-minilm:latest",
                capabilities=capabilities,
                backend="ollama",
                context_token_count=4096,
                prepare=prepare,
                active=active,
                timeout=20,
            )
    assert fake.running == 0
    assert fake.unplayed == []


class TestOllama(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        capabilities = CAPABILITIES | {pb.CAPABILITY_LOGPROBS, pb.CAPABILITY_TOOLS}
        async with bridged(model="llama3.2:latest", capabilities=capabilities) as target:
            yield target


class TestOllamaThatThinks(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        capabilities = CAPABILITIES | {
            pb.CAPABILITY_LOGPROBS,
            pb.CAPABILITY_TOOLS,
            pb.CAPABILITY_REASONING,
        }
        async with bridged(model="qwen3:latest", capabilities=capabilities, slots=1) as target:
            yield target


class TestOllamaThatSees(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        capabilities = CAPABILITIES | {pb.CAPABILITY_LOGPROBS, pb.CAPABILITY_VISION}
        async with bridged(model="llava:latest", capabilities=capabilities) as target:
            yield target
