"""The orchestrator promises its clients what every backend promises."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from contract.orchestrator_mesh import Mesh
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.calls import with_options
from forebay.testing.contract import ContractSuite, Target
from forebay.testing.script import DEFAULT_CAPABILITIES, Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine


def _slow(request: pb.GenerateRequest) -> pb.GenerateRequest:
    return with_options(request, token_count=2000, token_delay="5ms")


class TestOrchestratorContract(ContractSuite):
    """The suite over a mesh of two backends, one of which does not have the model."""

    @pytest.fixture
    async def target(self, tmp_path: Path) -> AsyncIterator[Target]:
        engine = ScriptedEngine(
            name="one", models=[ScriptedModel(name="scripted", script=Script(token_count=64))]
        )
        other = ScriptedEngine(name="two", models=["other"])
        async with Mesh(tmp_path, engine, other) as mesh:

            async def active() -> int:
                return len(engine.active)

            yield Target(
                address=mesh.address,
                model="scripted",
                embedding_model="scripted",
                capabilities=DEFAULT_CAPABILITIES,
                backend="one",
                context_token_count=4096,
                prepare=_slow,
                active=active,
            )
