"""Two real MLX services: one is killed in the middle, and the other goes on to the very same text."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import tiny_models
from contract.orchestrator_mesh import until
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Call, Event
from forebay.mlx_service import requirements
from forebay.orchestrator.build import Orchestrator
from forebay.orchestrator.config import OrchestratorSettings
from forebay.testing import grammar
from forebay.testing.calls import ask
from forebay.testing.processes import ServiceProcess

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(bool(requirements.missing()), reason=requirements.missing()),
]

TOKENS = 800
"""So many that no busy machine lets the whole reply be written before its 20th delta has been read."""


def service(folder: Path) -> ServiceProcess:
    values = {
        "address": "127.0.0.1:0",
        "model_folders": json.dumps([str(folder / "models")]),
        "cache_dir": str(folder / "cache"),
        "huggingface_cache": "false",
        "fetch_default_model": "false",
        "preload": json.dumps(["tiny"]),
    }
    environment = {f"FOREBAY_MLX__{key.upper()}": value for key, value in values.items()}
    return ServiceProcess("forebay.mlx_service", environment=environment, folder=folder)


def request(*, continues: bool) -> pb.GenerateRequest:
    made = ask(model="tiny", token_count=TOKENS)
    made.sampling.temperature = 0
    made.routing.backends.extend(["a", "b"])
    if continues:
        made.routing.continuation = pb.CONTINUATION_POLICY_SAME_WEIGHTS
    return made


async def test_a_greedy_reply_goes_on_over_equal_weights_to_the_same_text(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    tiny_models.build_random(tmp_path / "a" / "models" / "tiny")
    shutil.copytree(tmp_path / "a" / "models", tmp_path / "b" / "models")
    async with service(tmp_path / "a") as a, service(tmp_path / "b") as b:
        settings = OrchestratorSettings.model_validate(
            {
                "backends": [{"name": "a", "address": a.address}, {"name": "b", "address": b.address}],
                "probe": {"models_interval": "200ms"},
            }
        )
        orchestrator = Orchestrator(settings)
        async with orchestrator.fleet as fleet, asyncio.timeout(90):

            def can_serve() -> bool:
                models = [endpoint.find("tiny") for endpoint in fleet if endpoint.is_listed]
                return len(models) == 2 and all(m and m.state == pb.Model.STATE_ACTIVE for m in models)

            # Two workers import MLX and load a model, which takes a busy machine half a minute.
            await until(can_serve, lambda: repr(fleet), seconds=60.0)

            async def read(asked: pb.GenerateRequest, on_delta: Callable[[], None]) -> list[Event]:
                events: list[Event] = []

                async def keep(event: Event) -> None:
                    events.append(event)
                    if len(grammar.deltas(events)) == 20:
                        on_delta()

                await orchestrator.inference.generate(Call(request=asked), keep)
                return events

            def kill(victim: ServiceProcess) -> None:
                for worker in psutil.Process(victim.pid).children(recursive=True):
                    worker.send_signal(signal.SIGKILL)

            whole = grammar.text(await read(request(continues=False), lambda: None))
            assert whole
            events = await read(request(continues=True), lambda: kill(a))
            grammar.check(events, numbered=False)
            assert grammar.text(events) == whole
            kinds = [e.WhichOneof("event") for e in events if isinstance(e, pb.GenerateResponse)]
            assert kinds.count("continued") == 1
            last = events[-1]
            assert isinstance(last, pb.GenerateResponse)
            assert last.finished.usage.output_token_count == TOKENS
