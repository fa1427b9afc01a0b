"""A worker without mlx: it takes a worker's command line and serves a scripted engine.

What it does is told by `behaviour.json` in the model's folder: `exit` and `say`
end it at once; `exit_after` ends it once it has served for so many seconds;
`script` is how its model behaves; `ready_delay` is how long loading takes;
`stubborn` makes it deaf to SIGTERM; `raw` keeps gaps in its events' numbers;
`needs` refuses replies until its memory limit is that many bytes, and
`adapter_needs` refuses its adapters until then.
A line is added to `starts` in that folder at each start, and to `journal` at
each change of a call.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from forebay.kit import process
from forebay.kit.config import ServerSettings
from forebay.kit.failure import MemoryExhausted
from forebay.kit.server import serving
from forebay.mlx.v1 import worker_pb2, worker_pb2_grpc
from forebay.mlx_service.ledger import WANTED
from forebay.models.v1 import models_pb2
from forebay.testing.script import Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine, raw


class Control(worker_pb2_grpc.WorkerServiceServicer):
    """Takes any limit, and holds nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def require(self, needs: int) -> None:
        if self.limit < needs:
            raise MemoryExhausted("too little memory", metadata={WANTED: str(needs)})

    async def Adjust(self, request, context):
        if request.HasField("limit_bytes"):
            self.limit = request.limit_bytes
        return worker_pb2.AdjustResponse(limit_bytes=self.limit, weights_bytes=1, memory_bytes=1)

    def register(self, server, edge):
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)
        return ["forebay.mlx.v1.WorkerService"]


class Tight:
    """An engine that refuses replies until it has enough memory."""

    def __init__(self, engine: ScriptedEngine, control: Control, needs: int) -> None:
        self._engine, self._control, self._needs = engine, control, needs
        self.embed, self.count_tokens = engine.embed, engine.count_tokens
        self.list_models = engine.list_models

    async def generate(self, call, send):
        self._control.require(self._needs)
        await self._engine.generate(call, send)


class Adapters:
    """Loads any adapter once there is enough memory for it."""

    def __init__(self, control: Control, needs: int) -> None:
        self._control, self._needs = control, needs

    async def load_model(self, request, send):
        self._control.require(self._needs)
        await send(models_pb2.LoadModelResponse(loaded=models_pb2.ModelLoaded()))


async def serve(arguments: argparse.Namespace, behaviour: dict) -> None:
    with (arguments.model / "journal").open("a", buffering=1) as journal:
        model = ScriptedModel(
            name=arguments.model_id,
            script=Script().changed(behaviour.get("script", {})),
            context_token_count=arguments.context or 4096,
        )
        engine = ScriptedEngine(
            name=arguments.name,
            models=[model],
            slots=arguments.max_rows,
            numbered=behaviour.get("raw", False),
            on_change=lambda record: print(record.to_json(), file=journal),
        )
        control = Control(arguments.memory_ceiling or 0)
        served = Tight(engine, control, behaviour["needs"]) if "needs" in behaviour else engine
        settings = ServerSettings.model_validate({"address": arguments.address, "grace": "0s"})
        async with (
            process.stop_requests() as stopped,
            serving(
                settings,
                inference=None if behaviour.get("raw") else served,
                models=Adapters(control, behaviour.get("adapter_needs", 0)) if arguments.adapter else None,
                more=[raw(engine)] if behaviour.get("raw") else [control.register],
            ) as up,
        ):
            if behaviour.get("stubborn"):
                asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            process.announce("mlx-worker", up.address)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(behaviour.get("ready_delay", 0.0)):
                    await stopped.wait()
            await up.set_ready(True)
            if "exit_after" in behaviour:
                asyncio.get_running_loop().call_later(behaviour["exit_after"], os.abort)
            await stopped.wait()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--max-rows", type=int, default=8)
    parser.add_argument("--context", type=int)
    parser.add_argument("--default-max-tokens", type=int)
    parser.add_argument("--prefix-cache", type=int)
    parser.add_argument("--digests", type=Path)
    parser.add_argument("--prefix-disk", type=Path)
    parser.add_argument("--prefix-disk-bytes", type=int)
    parser.add_argument("--prefix-disk-write")
    parser.add_argument("--memory-ceiling", type=int)
    parser.add_argument("--shards")
    parser.add_argument("--smg", action="store_true")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--cache-limit", type=int)
    parser.add_argument("--wired-limit", type=int)
    parser.add_argument("--prompt-lookup", action="store_true")
    parser.add_argument("--draft-model", type=Path)
    parser.add_argument("--adapter", action="append")
    parser.add_argument("--isolate-callers", action="store_true")
    parser.add_argument("--cpu-weights")
    arguments = parser.parse_args()
    with (arguments.model / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    path = arguments.model / "behaviour.json"
    behaviour = json.loads(path.read_text()) if path.exists() else {}
    if "exit" in behaviour:
        print(behaviour.get("say", ""), file=sys.stderr, flush=True)
        return behaviour["exit"]
    asyncio.run(serve(arguments, behaviour))
    return 0


if __name__ == "__main__":
    sys.exit(main())
