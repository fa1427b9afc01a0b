"""The contract, kept by the MLX worker on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.contract import ContractSuite, Target

pytestmark = pytest.mark.mlx

pytest.importorskip("mlx.core", reason="MLX has no build for this machine")

CONTEXT = 4096


@contextmanager
def worker() -> Iterator[str]:
    """Runs a worker with a tiny model; gives its address."""
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        model = tiny_models.build_random(Path(folder) / "tiny", context=CONTEXT, plain=True)
        listen = f"unix:{folder}/w.sock"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "forebay.mlx_service.worker", "--model", str(model)),
                *("--model-id", "tiny", "--address", listen, "--name", "mlx"),
            ],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            with grpc.insecure_channel(listen) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60
                )
                for update in watch:
                    if update.status == health_pb2.HealthCheckResponse.SERVING:
                        break
                watch.cancel()
            yield listen
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(30) == 0


def target_at(address: str) -> Target:
    """Returns the target that a worker is."""
    return Target(
        address=address,
        model="tiny",
        backend="mlx",
        capabilities=frozenset(
            {
                pb.CAPABILITY_JSON_SCHEMA,
                pb.CAPABILITY_GRAMMAR,
                pb.CAPABILITY_SEED,
                pb.CAPABILITY_LOGPROBS,
                pb.CAPABILITY_CONTINUE,
                pb.CAPABILITY_COUNT_TOKENS,
                pb.CAPABILITY_TOKEN_IDS,
                pb.CAPABILITY_STOP_TOKEN_IDS,
            }
        ),
        context_token_count=CONTEXT,
        manages_models=False,
    )


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with worker() as listening:
        yield listening


class TestMlxWorker(ContractSuite):
    @pytest.fixture
    def target(self, address: str) -> Target:
        return target_at(address)
