"""The scripted engine keeps the promises that it is used to test, with all capabilities and with none."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.config import ServerSettings
from forebay.kit.server import serving
from forebay.testing.calls import with_options
from forebay.testing.contract import ContractSuite, Target
from forebay.testing.script import ALL, DEFAULT_CAPABILITIES, Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine, raw


def slowly(request: pb.GenerateRequest) -> pb.GenerateRequest:
    return with_options(request, token_count=2000, token_delay="20ms")


@asynccontextmanager
async def scripted(
    capabilities: frozenset[pb.Capability.ValueType], *, slots: int | None = None, is_raw: bool = False
) -> AsyncIterator[Target]:
    model = ScriptedModel(name="m", capabilities=capabilities, script=Script(token_count=20))
    engine = ScriptedEngine(name="scripted", models=[model, "embedder"], slots=slots, numbered=is_raw)

    async def active() -> int:
        return len(engine.active)

    inference, more = (None, [raw(engine)]) if is_raw else (engine, [])
    async with serving(ServerSettings(), inference=inference, models=engine, more=more) as up:
        await up.set_ready(True)
        yield Target(
            address=up.address,
            model="m",
            embedding_model="embedder",
            capabilities=capabilities,
            backend="scripted",
            context_token_count=model.context_token_count,
            prepare=slowly,
            active=active,
            timeout=20,
        )
    assert engine.active == []


class TestScripted(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with scripted(DEFAULT_CAPABILITIES) as target:
            yield target


class TestScriptedThatCanDoAll(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with scripted(ALL - {pb.CAPABILITY_GRAMMAR}) as target:
            yield target


class TestScriptedThatCanDoNothingElse(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with scripted(frozenset({pb.CAPABILITY_GENERATE})) as target:
            yield target


class TestScriptedWithOneSlot(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with scripted(DEFAULT_CAPABILITIES, slots=1) as target:
            yield target


class TestScriptedWithoutTheKitsNumbers(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with scripted(DEFAULT_CAPABILITIES, is_raw=True) as target:
            yield target


class TestScriptedThatPromisesLittle(ContractSuite):
    """The suite against a target that says little about itself, as a framework's may."""

    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with scripted(DEFAULT_CAPABILITIES) as target:
            yield dataclasses.replace(
                target,
                deterministic=False,
                embedding_model=None,
                context_token_count=None,
                active=None,
                backend="",
                manages_models=False,
                reflects=False,
            )
