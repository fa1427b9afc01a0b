"""One request through real processes is one story: a single trace, the right parents, the error where it was.

Each test runs with a receiver of its own, and with `make live` with the Jaeger at FOREBAY_JAEGER_URL too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

import llama
import tiny_models
from contract.orchestrator_mesh import reason
from contract.trace_mesh import (
    CALLER,
    GENERATE,
    JAEGER,
    TOLERANCE,
    Collector,
    Jaeger,
    Receiver,
    chain,
    processes,
    reporting,
    says_nothing_of,
    shape,
    traced,
)
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.calls import ask
from forebay.testing.processes import ServiceProcess

SECRET = "swordfish-7391"
LOAD = "forebay.models.v1.ModelService/LoadModel"
NO_JAEGER = pytest.mark.skipif(not JAEGER, reason="FOREBAY_JAEGER_URL names no Jaeger")


@pytest.fixture(params=["receiver", pytest.param("jaeger", marks=[pytest.mark.live, NO_JAEGER])])
async def collector(request: pytest.FixtureRequest) -> AsyncIterator[Collector]:
    async with Receiver() if request.param == "receiver" else Jaeger() as running:
        yield running


def scripted(collector: Collector, name: str, *more: str) -> ServiceProcess:
    return ServiceProcess(
        "forebay.testing.scripted",
        ["--name", name, "--models", "m", "--otlp", collector.endpoint, *more],
        environment=reporting(collector),
    )


def preferring(*backends: str) -> pb.GenerateRequest:
    request = ask(SECRET, model="m")
    request.routing.backends.extend(backends)
    return request


async def test_a_fallback_shows_the_failed_attempt_and_the_good_one(
    tmp_path: Path, collector: Collector
) -> None:
    backends = {"a": scripted(collector, "a", "--fault", "UNAVAILABLE@before"), "b": scripted(collector, "b")}
    async with processes(tmp_path, collector, **backends) as peer:
        reply = await traced(peer, preferring("a", "b"))
        assert reply.error is None
        spans = await collector.trace(reply.trace_id, 6)
    root, chat, failed, _, good, _ = spans
    assert shape(spans) == [
        ("orchestrator", "SERVER", ""),
        ("orchestrator", "CLIENT", ""),
        ("orchestrator", "CLIENT", "BACKEND_UNAVAILABLE"),
        ("a", "SERVER", "BACKEND_UNAVAILABLE"),
        ("orchestrator", "CLIENT", ""),
        ("b", "SERVER", ""),
    ]
    assert [span.parent for span in spans] == [
        CALLER, root.span_id, chat.span_id, failed.span_id, chat.span_id, good.span_id,
    ]  # fmt: skip
    assert chat.name == "chat m"
    assert {span.name for span in spans} - {chat.name} == {GENERATE}
    assert failed.end <= good.start + TOLERANCE
    routes = [fields for name, fields in chat.events if name == "forebay.route"]
    assert [fields["forebay.route.chosen"] for fields in routes] == ["a", "b"]
    says_nothing_of(spans, SECRET, grammar.text(reply.events))


async def test_a_load_is_part_of_the_trace_of_who_asked_for_the_model(
    tmp_path: Path, collector: Collector
) -> None:
    cold = scripted(collector, "a", "--unloaded", "--load-delay", "200ms")
    async with processes(tmp_path, collector, cold=True, a=cold) as peer:
        reply = await traced(peer, ask(SECRET, model="m"))
        assert reply.error is None
        spans = await collector.trace(reply.trace_id, 6)
    root, chat, load, over_there, attempt, _ = spans
    assert [(span.service.removeprefix("forebay-"), span.kind, span.name) for span in spans] == [
        ("orchestrator", "SERVER", GENERATE),
        ("orchestrator", "CLIENT", "chat m"),
        ("orchestrator", "CLIENT", LOAD),
        ("a", "SERVER", LOAD),
        ("orchestrator", "CLIENT", GENERATE),
        ("a", "SERVER", GENERATE),
    ]
    assert [span.parent for span in spans] == [
        CALLER, root.span_id, chat.span_id, load.span_id, chat.span_id, attempt.span_id,
    ]  # fmt: skip
    assert over_there.end - over_there.start >= 200_000_000
    assert load.start - TOLERANCE <= over_there.start <= attempt.start + TOLERANCE
    assert load.attributes.items() >= {"forebay.backend": "a", "gen_ai.request.model": "m"}.items()


async def test_a_backend_killed_in_the_middle_is_an_error_on_the_way_to_it_and_nowhere_else(
    tmp_path: Path, collector: Collector
) -> None:
    dying = scripted(collector, "a", "--token-count", "5000", "--token-delay", "5ms")
    async with processes(tmp_path, collector, a=dying) as peer:
        reply = await traced(peer, preferring("a"), on_delta=2, kill=psutil.Process(dying.pid).kill)
        assert reply.error is not None
        assert reason(reply.error) == "STREAM_INTERRUPTED"
        spans = chain(await collector.trace(reply.trace_id, 3))
        # The one that was killed could not say a word, and nobody else's span says it for it.
        assert shape(spans) == [
            ("orchestrator", "SERVER", "STREAM_INTERRUPTED"),
            ("orchestrator", "CLIENT", "STREAM_INTERRUPTED"),
            ("orchestrator", "CLIENT", "STREAM_INTERRUPTED"),
        ]
        assert spans[-1].attributes["forebay.backend"] == "a"
        assert all("forebay.first_delta" in [name for name, _ in span.events] for span in spans)
        says_nothing_of(spans, SECRET, grammar.text(reply.events))


@pytest.mark.mlx
async def test_a_chat_through_orchestrator_service_and_worker_is_one_trace(
    tmp_path: Path, collector: Collector
) -> None:
    pytest.importorskip("mlx.core", reason="MLX has no build for this machine")
    tiny_models.build_random(tmp_path / "models" / "tiny", context=8192, plain=True)
    (tmp_path / "m.toml").write_text(
        f'[mlx]\nmodel_folders = ["{tmp_path / "models"}"]\npreload = ["tiny"]\nfetch_default_model = false\n'
        f'cache_dir = "{tmp_path / "cache"}"\nhuggingface_cache = false\n'
    )
    mlx = ServiceProcess(
        "forebay.mlx_service",
        ["--config", str(tmp_path / "m.toml"), "--address", "127.0.0.1:0"],
        environment=reporting(collector),
    )
    async with processes(tmp_path, collector, mlx=mlx) as peer:
        request = ask(f"{SECRET} " * 40, model="tiny")
        request.limits.max_output_token_count = 20
        request.limits.stop_sequences.append("no-such-stop")
        request.sampling.temperature = 0
        reply = await traced(peer, request)
        assert reply.error is None
        spans = chain(await collector.trace(reply.trace_id, 6))
        assert shape(spans) == [
            ("orchestrator", "SERVER", ""),
            ("orchestrator", "CLIENT", ""),
            ("orchestrator", "CLIENT", ""),
            ("mlx", "SERVER", ""),
            ("mlx", "CLIENT", ""),
            ("mlx-worker", "SERVER", ""),
        ]
        chat, worker = spans[1], spans[-1]
        assert chat.name == "chat tiny"
        assert (
            chat.attributes.items()
            >= {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "mlx",
                "gen_ai.request.model": "tiny",
                "gen_ai.response.model": "tiny",
                "gen_ai.request.max_tokens": 20,
                "gen_ai.request.temperature": 0.0,
                "gen_ai.response.finish_reasons": ("length",),
                "gen_ai.usage.input_tokens": reply.events[-1].finished.usage.prompt_token_count,
                "gen_ai.usage.output_tokens": 20,
                "forebay.backend": "mlx",
            }.items()
        )
        first = chat.attributes["gen_ai.response.time_to_first_chunk"]
        assert isinstance(first, float)
        assert 0 < first <= (chat.end - chat.start) / 1e9
        assert "forebay.route" in [name for name, _ in chat.events]
        assert {"forebay.prefilling", "forebay.first_delta"} <= {name for name, _ in worker.events}
        parts = [worker.attributes[f"forebay.{name}.seconds"] for name in ("queue", "prefill", "generation")]
        # What the worker tells of its time fits into its span, and its span into the request's.
        assert (
            sum(part for part in parts if isinstance(part, float))
            <= (worker.end - worker.start + TOLERANCE) / 1e9
        )
        says_nothing_of(spans, SECRET, grammar.text(reply.events), "no-such-stop")

        # And a worker that is killed in the middle: the error is on the way to it, and on nothing else.
        request.limits.max_output_token_count = 6000
        request.limits.ClearField("stop_sequences")
        (process,) = [
            each
            for each in psutil.Process(mlx.pid).children(recursive=True)
            if "worker" in " ".join(each.cmdline())
        ]
        reply = await traced(peer, request, on_delta=1, kill=process.kill)
        assert reply.error is not None
        assert reason(reply.error) == "STREAM_INTERRUPTED"
        spans = chain(await collector.trace(reply.trace_id, 5))
        assert shape(spans) == [
            ("orchestrator", "SERVER", "STREAM_INTERRUPTED"),
            ("orchestrator", "CLIENT", "STREAM_INTERRUPTED"),
            ("orchestrator", "CLIENT", "STREAM_INTERRUPTED"),
            ("mlx", "SERVER", "STREAM_INTERRUPTED"),
            ("mlx", "CLIENT", "STREAM_INTERRUPTED"),
        ]


def bridge(collector: Collector, folder: Path, url: str) -> ServiceProcess:
    return ServiceProcess(
        "forebay.openai_bridge",
        ["--address", "127.0.0.1:0"],
        folder=folder,
        environment={**reporting(collector), "FOREBAY_OPENAI__BASE_URL": url},
    )


@pytest.mark.llama
@pytest.mark.skipif(llama.find() is None, reason=llama.MISSING)
async def test_a_chat_through_orchestrator_bridge_and_llama_server_is_one_trace(
    tmp_path: Path, collector: Collector
) -> None:
    model = llama.write_scripted(tmp_path / "says.gguf", ["the", " mill", " turns"])
    with llama.llama_server(tmp_path, "--alias", "says", "-c", "2048", "-np", "1", model=model) as server:
        async with processes(tmp_path, collector, openai=bridge(collector, tmp_path, server.url)) as peer:
            reply = await traced(peer, ask(SECRET, model="says"))
            assert grammar.text(reply.events) == "the mill turns"
            spans = chain(await collector.trace(reply.trace_id, 5))
            assert shape(spans) == [
                ("orchestrator", "SERVER", ""),
                ("orchestrator", "CLIENT", ""),
                ("orchestrator", "CLIENT", ""),
                ("openai", "SERVER", ""),
                ("openai", "CLIENT", ""),
            ]
            chat, http = spans[1], spans[-1]
            assert chat.attributes["gen_ai.provider.name"] == "openai"
            usage = reply.events[-1].finished.usage
            assert chat.attributes["gen_ai.usage.output_tokens"] == usage.output_token_count > 0
            assert http.name == "POST /v1/chat/completions"
            assert http.attributes["http.response.status_code"] == 200
            says_nothing_of(spans, SECRET, "mill")
            # What the bridge asks by itself all the time is nobody's trace.
            assert collector.others(reply.trace_id) == []


@pytest.mark.llama
@pytest.mark.skipif(llama.find() is None, reason=llama.MISSING)
async def test_a_llama_server_killed_in_the_middle_is_an_error_on_the_call_to_it_and_above(
    tmp_path: Path, collector: Collector
) -> None:
    model = llama.write_model(tmp_path / "mortal.gguf", width=128, layers=4, context=16384)
    options = ("--alias", "mortal", "-c", "16384", "-np", "1")
    with llama.llama_server(tmp_path, *options, model=model) as server:
        async with processes(tmp_path, collector, openai=bridge(collector, tmp_path, server.url)) as peer:
            request = ask(SECRET, model="mortal", token_count=15_000)
            reply = await traced(peer, request, on_delta=3, kill=server.kill)
            assert reply.error is not None
            spans = chain(await collector.trace(reply.trace_id, 5))
            errors = {error for _, _, error in shape(spans)}
            assert len(errors) == 1
            assert errors <= {"STREAM_INTERRUPTED", "BROKEN_STREAM"}
            assert [span.service for span in spans] == ["forebay-orchestrator"] * 3 + ["forebay-openai"] * 2
            assert spans[-1].name == "POST /v1/chat/completions"
            says_nothing_of(spans, SECRET, grammar.text(reply.events))
