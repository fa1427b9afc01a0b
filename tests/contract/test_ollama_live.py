"""The bridge over a real Ollama, wherever FOREBAY_OLLAMA_URL names one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.server import serving
from forebay.ollama_bridge.config import OllamaSettings
from forebay.ollama_bridge.engine import OllamaEngine
from forebay.testing.contract import ContractSuite, Target

URL = os.environ.get("FOREBAY_OLLAMA_URL", "")
MODEL = os.environ.get("FOREBAY_OLLAMA_MODEL", "")

if not URL:
    pytest.skip("FOREBAY_OLLAMA_URL names no server", allow_module_level=True)


def can(model: pb.Model, capability: pb.Capability.ValueType) -> bool:
    return any(
        report.capability == capability and report.support == pb.CapabilityReport.SUPPORT_YES
        for report in model.capabilities
    )


@pytest.mark.live
@pytest.mark.timeout(600)
class TestLiveOllama(ContractSuite):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        settings = OllamaSettings(address="127.0.0.1:0", base_url=URL)
        async with (
            OllamaEngine.running(settings) as engine,
            serving(settings, inference=engine, models=engine.library) as up,
        ):
            await engine.probe()
            await up.set_ready(True)
            models = await engine.library.list_models()
            speakers = sorted(
                (m for m in models if can(m, pb.CAPABILITY_GENERATE) and MODEL in ("", m.id, *m.aliases)),
                key=lambda model: model.disk_bytes,
            )
            if not speakers:
                pytest.skip("the server has no model that generates")
            embedders = [m.id for m in models if can(m, pb.CAPABILITY_EMBED)]
            yield Target(
                address=up.address,
                model=speakers[0].id,
                embedding_model=embedders[0] if embedders else None,
                capabilities=frozenset(
                    r.capability for r in speakers[0].capabilities if can(speakers[0], r.capability)
                ),
                backend="ollama",
                timeout=300,
            )
