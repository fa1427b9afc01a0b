"""Whatever the layers do to a request is counted, and told on its span, under names that the docs have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from contract.orchestrator_mesh import WAIT_SECONDS, Mesh, until
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.metrics import Metrics
from forebay.kit.telemetry import Telemetry
from forebay.testing.calls import ask, with_options
from forebay.testing.client import client as client_of
from forebay.testing.otlp import OtlpReceiver
from forebay.testing.processes import ServiceProcess
from forebay.testing.script import Fault, Script
from forebay.testing.scripted import ScriptedEngine, ScriptedModel


class Measured:
    """Telemetry whose metrics and spans can be read."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self._spans = InMemorySpanExporter()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.telemetry = Telemetry(
            tracers.get_tracer("test"), tracers, metrics=Metrics(meters.get_meter("test"))
        )

    def spans(self, name: str, kind: str = "CLIENT") -> list[ReadableSpan]:
        """Returns the spans of that name and kind that have ended."""
        ended = self._spans.get_finished_spans()
        return [span for span in ended if span.name == name and span.kind.name == kind]

    async def events(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        """Returns the events of that name once there are so many, all on spans of whole requests."""

        def found() -> list[tuple[str, dict[str, Any]]]:
            spans = self._spans.get_finished_spans()
            return [(s.name, dict(e.attributes or {})) for s in spans for e in s.events if e.name == name]

        await until(lambda: len(found()) >= count)
        assert {span for span, _ in found()} <= {"chat m", "embeddings m"}
        return [attributes for _, attributes in found()]

    def points(self, name: str) -> dict[tuple[str, ...], float]:
        """Returns value, or a histogram's count, by the labels' values in the order of their names."""
        data = self._reader.get_metrics_data()
        found: dict[tuple[str, ...], float] = {}
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points if metric.name == name else ():
                        labels = tuple(str(value) for _, value in sorted((point.attributes or {}).items()))
                        if isinstance(point, HistogramDataPoint):
                            found[labels] = point.count
                        elif isinstance(point, NumberDataPoint):
                            found[labels] = point.value
        return found


def engine(name: str, **script: object) -> ScriptedEngine:
    model = ScriptedModel(name="m", weights="same", script=Script(**script))  # type: ignore[arg-type]  # its fields
    return ScriptedEngine(name=name, models=[model])


async def test_a_reply_that_another_backend_went_on_with_is_counted_by_who_was_lost(tmp_path: Path) -> None:
    found = Measured()
    breaking = engine("a", fault=Fault.parse("STREAM_INTERRUPTED@5"))
    async with Mesh(tmp_path, breaking, engine("b"), telemetry=found.telemetry) as mesh:
        request = ask(model="m")
        request.routing.backends.extend(["a", "b"])
        request.routing.continuation = pb.CONTINUATION_POLICY_SAME_WEIGHTS
        await mesh.generate(request)
        assert found.points("forebay.continuations") == {("STREAM_INTERRUPTED", "a"): 1}
        assert found.points("forebay.admission.duration") == {("normal",): 1}
        (continued,) = await found.events("forebay.continued")
        assert continued.pop("forebay.text_length") > 0
        assert continued == {
            "forebay.backend": "b",
            "forebay.lost_backend": "a",
            "error.type": "STREAM_INTERRUPTED",
        }


async def test_who_is_turned_away_is_counted_with_the_reason(tmp_path: Path) -> None:
    found = Measured()
    mesh = Mesh(
        tmp_path, engine("a"), telemetry=found.telemetry, backend={"slots": 1}, admission={"queue": 0}
    )
    async with mesh:
        slow = with_options(ask(model="m"), token_count=5000, token_delay="5ms")
        call = mesh.client.Generate(slow, timeout=WAIT_SECONDS)
        await call.read()
        urgent = ask(model="m")
        urgent.routing.priority = pb.PRIORITY_INTERACTIVE
        with pytest.raises(grpc.aio.AioRpcError):
            await mesh.generate(urgent)
        assert found.points("forebay.admission.refusals") == {("QUEUE_FULL", "interactive"): 1}
        (refused,) = await found.events("forebay.admit")
        assert refused == {"forebay.queue.seconds": 0.0, "forebay.queue.refused": "QUEUE_FULL"}
        call.cancel()


async def test_who_waits_for_a_turn_is_told_for_how_long(tmp_path: Path) -> None:
    found = Measured()
    async with Mesh(tmp_path, engine("a"), telemetry=found.telemetry, backend={"slots": 1}) as mesh:
        slow = with_options(ask(model="m"), token_count=5000, token_delay="5ms")
        call = mesh.client.Generate(slow, timeout=WAIT_SECONDS)
        await call.read()
        waiting = asyncio.create_task(mesh.generate(ask(model="m")))
        await until(lambda: mesh.orchestrator.admission.waiting == 1)
        call.cancel()
        await waiting
        (admitted,) = await found.events("forebay.admit")
        assert admitted["forebay.queue.seconds"] > 0
        assert admitted["forebay.queue.refused"] == ""


async def test_a_race_is_counted_by_its_winner_and_so_is_what_it_wasted(tmp_path: Path) -> None:
    found = Measured()
    hedge = {"enabled": True, "min_samples": 1, "delay_min": "20ms"}
    slow, quick = engine("a", first_delay=3600.0), engine("b")
    async with Mesh(tmp_path, slow, quick, telemetry=found.telemetry, hedge=hedge) as mesh:
        request = ask(model="m")
        request.routing.backends.append("b")  # so that it is known how long a first delta takes
        await mesh.generate(request)
        request.routing.backends[:] = ["a", "b"]
        await mesh.generate(request)
        assert found.points("forebay.hedges") == {("b",): 1}
        assert found.points("forebay.hedge.wasted") == {(): 1}
        (race,) = await found.events("forebay.hedge")
        assert race["forebay.hedge.backends"] == ("a", "b")
        assert race["forebay.hedge.winner"] == "b"
        assert race["forebay.hedge.wasted_seconds"] > 0


async def test_a_load_belongs_to_who_asked_for_the_model_and_not_to_who_made_room(tmp_path: Path) -> None:
    found = Measured()
    engines = [
        ScriptedEngine(name=name, models=[ScriptedModel(name=model, loaded=False)])
        for name, model in (("a", "m"), ("b", "n"))
    ]
    room_for_one: dict[str, object] = {"memory": "1536KiB"}
    async with Mesh(tmp_path, *engines, telemetry=found.telemetry, placement=room_for_one) as mesh:
        slow = with_options(ask(model="m"), token_count=5000, token_delay="5ms")
        call = mesh.client.Generate(slow, timeout=WAIT_SECONDS)
        while not (await call.read()).HasField("delta"):  # type: ignore[union-attr]  # it does not end by itself
            pass
        waiting = asyncio.create_task(mesh.generate(ask(model="n")))

        def is_waiting() -> bool:
            figures = mesh.orchestrator.placement.ledger.figures_of("b")
            return figures is not None and figures.waiting == 1

        await until(is_waiting)
        call.cancel()
        await waiting
        await until(lambda: len(found.spans("chat n")) == len(found.spans("chat m")) == 1)
    parents = [span.parent for span in found.spans("forebay.models.v1.ModelService/LoadModel")]
    asked = [found.spans(f"chat {model}")[0].get_span_context() for model in "mn"]
    assert [each and each.span_id for each in parents] == [each and each.span_id for each in asked]


async def test_who_joins_a_reply_is_counted(tmp_path: Path) -> None:
    found = Measured()
    async with Mesh(tmp_path, engine("a"), telemetry=found.telemetry, coalesce="always") as mesh:
        request = with_options(ask(model="m"), token_count=50, token_delay="5ms")
        request.sampling.temperature = 0
        await asyncio.gather(mesh.generate(request), mesh.generate(request))
        assert found.points("forebay.coalesced") == {(): 1}
        assert len(await found.events("forebay.coalesced")) == 1


async def test_what_a_cache_had_is_counted_and_so_is_what_it_had_not(tmp_path: Path) -> None:
    found = Measured()
    async with Mesh(tmp_path, engine("a"), telemetry=found.telemetry, cache={"max_bytes": "1MiB"}) as mesh:
        request = ask(model="m")
        request.sampling.temperature = 0
        request.routing.cache = pb.CACHE_POLICY_USE
        await mesh.generate(request)
        await mesh.generate(request)
        counted = found.points("forebay.cache.lookups")
        assert (counted["replies", "miss"], counted["replies", "hit"]) == (1, 1)
        missed, hit = await found.events("forebay.cache", 2)
        assert missed == {"forebay.cache.hits": 0, "forebay.cache.misses": 1}
        assert hit == {"forebay.cache.hits": 1, "forebay.cache.misses": 0}


async def test_embeddings_that_went_together_are_counted(tmp_path: Path) -> None:
    found = Measured()
    async with Mesh(tmp_path, engine("a"), telemetry=found.telemetry, gather={"window": "50ms"}) as mesh:
        one = with_options(pb.EmbedRequest(model="m", texts=["x"]), first_delay="50ms")
        await asyncio.gather(*(mesh.client.Embed(one, timeout=WAIT_SECONDS) for _ in range(3)))
        assert found.points("forebay.embed.gathered") == {(): 1}
        # The first goes at once, for there is nobody to wait for; the others go together.
        assert await found.events("forebay.gathered", 2) == [{"forebay.calls": 2}] * 2


async def test_a_slow_bucket_names_a_trace_to_look_at(tmp_path: Path) -> None:
    """Exemplars go with the metrics that are pushed; the page for Prometheus has none."""
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_METRIC_EXPORT_INTERVAL": "200"}
    async with (
        OtlpReceiver() as otlp,
        ServiceProcess("forebay.testing.scripted", ["--name", "a", "--models", "m"]) as backend,
    ):
        (tmp_path / "o.toml").write_text(
            f'[telemetry]\notlp_endpoint = "{otlp.endpoint}"\nmetrics_interval = "200ms"\n'
            '[orchestrator]\naddress = "127.0.0.1:0"\n'
            f'[[orchestrator.backends]]\nname = "a"\naddress = "{backend.address}"\n'
        )
        async with (
            ServiceProcess(
                "forebay.orchestrator", ["--config", str(tmp_path / "o.toml")], environment=environment
            ) as orchestrator,
            client_of(orchestrator.address) as peer,
        ):
            async with asyncio.timeout(WAIT_SECONDS):
                while not (await peer.inference.ListModels(pb.ListModelsRequest())).models:
                    await asyncio.sleep(0.05)
            trace = "4bf92f3577b34da6a3ce929d0e0e4736"
            metadata = grpc.aio.Metadata(("traceparent", f"00-{trace}-00f067aa0ba902b7-01"))
            async for _ in peer.inference.Generate(ask(model="m"), timeout=WAIT_SECONDS, metadata=metadata):
                pass
            async with asyncio.timeout(WAIT_SECONDS):
                while not any(
                    trace in point.traces for point in otlp.points("gen_ai.client.operation.duration")
                ):
                    await asyncio.sleep(0.05)
