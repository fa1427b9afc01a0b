"""Shows the traces of docs/observability.md from a run: `python tests/trace_text.py`.

It needs MLX and the default model in the cache (`make run` puts it there).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.client import client
from forebay.testing.otlp import OtlpReceiver, Span
from forebay.testing.processes import ServiceProcess

MODEL = "smollm2-135m-instruct"
SHOWN = (
    "error.type",
    "forebay.attempt",
    "forebay.backend",
    "gen_ai.provider.name",
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.output_tokens",
    "gen_ai.response.finish_reasons",
    "gen_ai.response.time_to_first_chunk",
    "forebay.queue.seconds",
    "forebay.prefill.seconds",
    "forebay.generation.seconds",
)
"""Attributes that are shown, of all spans the first three."""


def render(spans: Sequence[Span]) -> str:
    """Returns a trace as an indented list: when each span began, how long it took, and what it says."""
    origin = min(span.start for span in spans)
    ids = {span.span_id for span in spans}
    lines: list[str] = []

    def show(parent: str, depth: int) -> None:
        for span in sorted((s for s in spans if (s.parent if s.parent in ids else "") == parent), key=_start):
            at, took = (span.start - origin) / 1e6, (span.end - span.start) / 1e6
            name = span.name.rpartition("/")[2] if "forebay." in span.name else span.name
            lines.append(
                f"{at:8.1f} {took:9.1f} ms  {'  ' * depth}{span.service.removeprefix('forebay-')}: {name} "
                f"[{span.kind.lower()}{'' if span.status == 'UNSET' else ' ' + span.status}]"
            )
            shown = SHOWN if span.name.startswith("chat ") else SHOWN[:3]
            said = [
                f"{key.rpartition('gen_ai.')[2]}={_short(span.attributes[key])}"
                for key in shown
                if key in span.attributes
            ]
            indent = f"{'':22}  {'  ' * depth}"
            lines.extend(indent + "  ".join(said[i : i + 3]) for i in range(0, len(said), 3))
            lines.extend(f"{'':22}  {'  ' * depth}* {name}{_event(found)}" for name, found in span.events)
            show(span.span_id, depth + 1)

    show("", 0)
    return "\n".join(lines)


def _start(span: Span) -> int:
    return span.start


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _event(attributes: object) -> str:
    assert isinstance(attributes, dict)
    said = [
        f"{k.removeprefix('forebay.').removeprefix('route.')}={v}"
        for k, v in attributes.items()
        if v not in ("", "exact")  # a model that was found by its name is nothing to tell
    ]
    return f" ({', '.join(said)})" if said else ""


async def main() -> None:
    """Asks a model that is not loaded yet, and then one whose first backend is broken; prints both traces."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        otlp = await stack.enter_async_context(OtlpReceiver())
        quick = {"OTEL_BSP_SCHEDULE_DELAY": "100", "FOREBAY_TELEMETRY__OTLP_ENDPOINT": otlp.endpoint}
        (folder / "m.toml").write_text("[mlx]\npreload = []\n")
        mlx = await stack.enter_async_context(
            ServiceProcess(
                "forebay.mlx_service",
                ["--address", "127.0.0.1:0", "--config", str(folder / "m.toml")],
                environment=quick,
            )
        )
        broken = await stack.enter_async_context(
            ServiceProcess(
                "forebay.testing.scripted",
                [
                    "--name",
                    "broken",
                    "--models",
                    MODEL,
                    "--otlp",
                    otlp.endpoint,
                    "--fault",
                    "UNAVAILABLE@before",
                ],
                environment=quick,
            )
        )
        (folder / "o.toml").write_text(
            '[orchestrator]\naddress = "127.0.0.1:0"\n'
            f'[[orchestrator.backends]]\nname = "mlx"\naddress = "{mlx.address}"\n'
            f'[[orchestrator.backends]]\nname = "broken"\naddress = "{broken.address}"\n'
        )
        orchestrator = await stack.enter_async_context(
            ServiceProcess("forebay.orchestrator", ["--config", str(folder / "o.toml")], environment=quick)
        )
        peer = await stack.enter_async_context(client(orchestrator.address, timeout=120))
        fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)
        async with asyncio.timeout(60):
            while not all(
                b.models for b in (await fleet.ListBackends(fleet_pb2.ListBackendsRequest())).backends
            ):
                await asyncio.sleep(0.1)
        seen: set[str] = set()
        for backends, count in ((["mlx"], 6), (["broken", "mlx"], 8)):
            request = pb.GenerateRequest(
                model=MODEL,
                messages=[
                    pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="What is the capital of France?")])
                ],
                sampling=pb.Sampling(temperature=0),
            )
            request.routing.backends.extend(backends)
            await peer.generate(request)
            await otlp.wait_for(len([s for s in otlp.spans() if s.trace_id in seen]) + count)
            spans = [span for span in otlp.spans() if span.trace_id not in seen]
            seen |= {span.trace_id for span in spans}
            print(render(spans), "\n")


if __name__ == "__main__":
    asyncio.run(main())
