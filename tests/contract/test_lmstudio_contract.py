"""The bridge to LM Studio keeps every promise of the interface, over the fake and over a real server."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

import llama
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.server import serving
from forebay.lmstudio_bridge.client import LmStudioClient
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.engine import LmStudioEngine
from forebay.testing.client import Client
from forebay.testing.client import client as connect
from forebay.testing.contract import ContractSuite, Target
from forebay.testing.fake_lmstudio import FakeLmStudio, FakeModel, FakeOptions, Version

CAPABILITIES = frozenset(
    {pb.CAPABILITY_GENERATE, pb.CAPABILITY_SEED, pb.CAPABILITY_JSON_SCHEMA, pb.CAPABILITY_TOOLS}
)
CONTEXT = 3000


def at_length(request: pb.GenerateRequest) -> pb.GenerateRequest:
    request.messages[-1].parts[0].text = "Say 2500 words."
    return request


@asynccontextmanager
async def bridge(settings: dict[str, object]) -> AsyncIterator[str]:
    made = LmStudioSettings.model_validate({"address": "127.0.0.1:0", **settings})
    async with (
        LmStudioClient(made) as client,
        LmStudioEngine(made, client) as engine,
        serving(made, inference=engine, models=engine) as up,
    ):
        await client.probe()
        await up.set_ready(True)
        yield up.address


@asynccontextmanager
async def over_fake(
    *,
    native_chat: bool = False,
    capabilities: frozenset[pb.Capability.ValueType] = CAPABILITIES,
    **options: object,
) -> AsyncIterator[Target]:
    models = [
        FakeModel(key="tiny", vision=pb.CAPABILITY_VISION in capabilities),
        FakeModel(key="embedder", type="embedding"),
    ]
    made = FakeOptions(context_length=CONTEXT, token_seconds=0.002, auto_evict=False, **options)  # type: ignore[arg-type]  # by name
    async with FakeLmStudio(models, options=made) as fake:

        async def active() -> int:
            return sum(instance.busy for instance in fake.studio.loaded())

        async with bridge({"base_url": fake.url, "native_chat": native_chat}) as address:
            yield Target(
                address=address,
                model="tiny",
                embedding_model="embedder",
                capabilities=capabilities,
                backend="lmstudio",
                context_token_count=CONTEXT,
                prepare=at_length,
                active=active,
                manages_models=made.version.has_v1,
                timeout=20,
            )


class TestLmStudio(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with over_fake() as target:
            yield target


class TestLmStudioThatSeesAndReportsLogprobs(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        more = {pb.CAPABILITY_VISION, pb.CAPABILITY_LOGPROBS}
        async with over_fake(capabilities=CAPABILITIES | more, logprobs=True) as target:
            yield target


class TestLmStudioWithItsNativeChat(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with over_fake(native_chat=True) as target:
            yield target


class TestOlderLmStudio(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with over_fake(version=Version.parse("0.3.30")) as target:
            yield target


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama.Running]:
    folder = tmp_path_factory.mktemp("llama")
    model = llama.write_model(folder / "tiny.gguf")
    with llama.llama_server(folder, "-np", "2", "-c", "4096", "--alias", "tiny", model=model) as server:
        yield server


@pytest.mark.llama
@pytest.mark.skipif(llama.find() is None, reason=llama.MISSING)
class TestRealServerThroughTheOldestApi(ContractSuite):
    async def test_a_schema_is_enforced_or_refused(self, target: Target, peer: Client) -> None:
        pytest.skip("random weights never close a string, and the server calls the rest no JSON")

    async def test_a_required_tool_is_called_or_refused(self, target: Target, peer: Client) -> None:
        pytest.skip("random weights never come to the end of a call")

    @pytest.fixture
    async def target(self, server: llama.Running) -> AsyncIterator[Target]:
        async with bridge({"base_url": server.url, "greeting": False, "slots": 2}) as address:
            yield Target(
                address=address,
                model="tiny",
                capabilities=CAPABILITIES | {pb.CAPABILITY_LOGPROBS},
                backend="lmstudio",
                context_token_count=2048,
                manages_models=False,
                timeout=60,
            )


LIVE = os.environ.get("FOREBAY_LMSTUDIO_URL", "")


@pytest.mark.live
@pytest.mark.skipif(not LIVE, reason="FOREBAY_LMSTUDIO_URL names no LM Studio")
class TestLiveLmStudio(ContractSuite):
    """A real LM Studio. FOREBAY_LMSTUDIO_MODEL and FOREBAY_LMSTUDIO_EMBEDDING_MODEL name its models.

    Where they do not, the first that generates is taken, and the first that embeds.
    """

    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with bridge({"base_url": LIVE}) as address, connect(address, timeout=60) as peer:
            listed = await peer.list_models()

            def first(capability: pb.Capability.ValueType, variable: str) -> pb.Model | None:
                named = os.environ.get(variable)
                able = [one for one in listed if capability in able_to(one) and named in (None, one.id)]
                return next(iter(sorted(able, key=lambda one: one.state != pb.Model.STATE_ACTIVE)), None)

            model = first(pb.CAPABILITY_GENERATE, "FOREBAY_LMSTUDIO_MODEL")
            embedding = first(pb.CAPABILITY_EMBED, "FOREBAY_LMSTUDIO_EMBEDDING_MODEL")
            if model is None:
                pytest.skip("LM Studio has no model that generates")
            yield Target(
                address=address,
                model=model.id,
                embedding_model=embedding.id if embedding is not None else None,
                capabilities=able_to(model),
                deterministic=False,
                prepare=at_length,
                timeout=300,
            )


def able_to(model: pb.Model) -> frozenset[pb.Capability.ValueType]:
    yes = pb.CapabilityReport.SUPPORT_YES
    return frozenset(report.capability for report in model.capabilities if report.support == yes)
