"""Backends that ask for a bearer token, in plaintext on this machine and over TLS."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path

import pytest
import trustme

from contract.orchestrator_mesh import QUICK, until
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.config import ServerSettings
from forebay.kit.failure import Failure
from forebay.kit.pipeline import Call
from forebay.kit.server import serving
from forebay.models.v1 import models_pb2 as models_pb
from forebay.orchestrator.build import Orchestrator
from forebay.orchestrator.config import OrchestratorSettings
from forebay.testing.calls import Sink, ask
from forebay.testing.scripted import ScriptedEngine

TOKEN = "a-long-secret"  # of this test


@pytest.mark.parametrize("has_tls", [False, True])
async def test_a_backend_that_asks_for_a_token_gets_it_with_every_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_tls: bool
) -> None:
    caplog.set_level("DEBUG")
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    server: dict[str, object] = {
        "address": "127.0.0.1:0",
        "auth_token_digests": [hashlib.sha256(TOKEN.encode()).hexdigest()],
        **QUICK,
    }
    backend: dict[str, object] = {"name": "a", "token_file": token}
    if has_tls:
        authority = trustme.CA()
        pair = authority.issue_cert("127.0.0.1", "localhost")
        pair.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
        pair.private_key_pem.write_to_path(tmp_path / "server.key")
        authority.cert_pem.write_to_path(tmp_path / "roots.pem")
        server |= {"tls_certificate": tmp_path / "server.pem", "tls_key": tmp_path / "server.key"}
        backend |= {"tls_roots": tmp_path / "roots.pem"}
    engine = ScriptedEngine(name="a", models=["m"])
    async with serving(ServerSettings.model_validate(server), inference=engine, models=engine) as up:
        await up.set_ready(True)
        settings = OrchestratorSettings.model_validate(
            {"address": "127.0.0.1:0", "backends": [backend | {"address": up.address}]}
        )
        orchestrator = Orchestrator(settings, source=random.Random(0))
        async with orchestrator.fleet as fleet, asyncio.timeout(20):
            await until(lambda: bool(fleet["a"].models), lambda: repr(fleet))
            sink = Sink()
            await orchestrator.inference.generate(Call(request=ask(model="m")), sink)
            assert sink.text
            counted = await orchestrator.inference.count_tokens(
                Call(request=pb.CountTokensRequest(model="m", messages=ask().messages))
            )
            assert counted.token_count
            described = await orchestrator.models.get_model(models_pb.GetModelRequest(model="m"))
            assert described.model.id == "m"
            loaded: list[models_pb.LoadModelResponse] = []

            async def keep(event: models_pb.LoadModelResponse) -> None:
                loaded.append(event)

            await orchestrator.models.load_model(models_pb.LoadModelRequest(model="m"), keep)
            assert loaded[-1].HasField("loaded")
    assert TOKEN not in caplog.text


async def test_a_wrong_token_is_shown_where_backends_are_shown(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("wrong")
    engine = ScriptedEngine(name="a", models=["m"])
    settings = ServerSettings.model_validate(
        {"address": "127.0.0.1:0", "auth_token_digests": [hashlib.sha256(b"right").hexdigest()], **QUICK}
    )
    async with serving(settings, inference=engine, models=engine) as up:
        await up.set_ready(True)
        orchestrator = Orchestrator(
            OrchestratorSettings.model_validate(
                {"backends": [{"name": "a", "address": up.address, "token_file": token}]}
            )
        )
        async with orchestrator.fleet as fleet:
            await until(lambda: "authorization: Bearer" in fleet["a"].detail, lambda: repr(fleet))
            with pytest.raises(Failure):
                await orchestrator.inference.generate(Call(request=ask(model="m")), Sink())
