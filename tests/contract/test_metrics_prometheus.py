"""A real Prometheus scrapes every kind of process, and every query of the dashboard has data to show."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

import tiny_models
from contract.orchestrator_mesh import Backend
from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.calls import ask, with_options
from forebay.testing.client import CallError, Client, client
from forebay.testing.fake_lmstudio import FakeLmStudio, FakeModel
from forebay.testing.fake_ollama import FakeOllama
from forebay.testing.processes import ServiceProcess
from forebay.testing.script import Fault, Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy/grafana/dashboards/forebay.json"
SILENT = ("forebay_preemptions", "forebay_evictions", "forebay_degradations")
"""Counters of what does not happen here: memory runs out nowhere, and nobody accepts less than they asked."""
OF_MLX = (
    "forebay_prefill",
    "forebay_worker_restarts",
    "forebay_models_loaded",
    "forebay_model_load",
    "forebay_memory_bytes",
    "forebay_model_memory",
    "forebay_worker_rows",
    "forebay_model_evictions",
)
"""Metrics of mlx-service, which does not run everywhere."""
WAIT_SECONDS = 120.0
"""Longest wait for anything: a dozen processes share the machine with other tests."""

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is missing: apt install prometheus"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@asynccontextmanager
async def prometheus(folder: Path, targets: dict[str, str]) -> AsyncIterator[str]:
    """Runs a Prometheus that looks at the targets every half second; gives its URL."""
    jobs = [
        {"job_name": job, "scrape_interval": "500ms", "static_configs": [{"targets": [target]}]}
        for job, target in targets.items()
    ]
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"evaluation_interval": "500ms"},
                "scrape_configs": jobs,
                "rule_files": [str(ROOT / "deploy/prometheus/rules.yml")],
            }
        )
    )
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        *("--config.file", str(folder / "prometheus.yml"), "--storage.tsdb.path", str(folder / "data")),
        *("--web.listen-address", f"127.0.0.1:{port}"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


async def result(session: aiohttp.ClientSession, query: str) -> list[dict[str, Any]]:
    try:
        async with session.get("/api/v1/query", params={"query": query}) as answer:
            body = await answer.json()
    except aiohttp.ClientConnectionError:  # it is starting
        return []
    if answer.status == 503:
        return []
    assert body["status"] == "success", (query, body)
    found: list[dict[str, Any]] = body["data"]["result"]
    return found


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    written = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    filled = [
        re.sub(r"\$(instance|model|backend)", ".*", each).replace("$__rate_interval", "5s")
        for each in written
    ]
    silent = SILENT if has_mlx() else (*SILENT, *OF_MLX)
    return [each for each in filled if not any(metric in each for metric in silent)]


def has_mlx() -> bool:
    return importlib.util.find_spec("mlx") is not None


def page_of(process: ServiceProcess) -> str:
    """Returns where a process shows its figures."""
    found = re.search(r"metrics are at http://(\S+)/metrics", process.log)
    assert found is not None, process.log
    return found[1]


def service(module: str, section: str, **settings: str) -> ServiceProcess:
    names = {"metrics_address": "127.0.0.1:0", **settings}
    return ServiceProcess(
        module,
        ["--address", "127.0.0.1:0"],
        environment={f"FOREBAY_{section}__{key.upper()}": value for key, value in names.items()},
    )


def scripted(name: str, **script: object) -> ScriptedEngine:
    model = ScriptedModel(name="m", weights="same", script=Script(**script))  # type: ignore[arg-type]  # its fields
    return ScriptedEngine(name=name, models=[model])


async def workers(process: ServiceProcess) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [each for each in children if "forebay.mlx_service.worker" in each.cmdline()]


@asynccontextmanager
async def everything(folder: Path) -> AsyncIterator[tuple[dict[str, ServiceProcess], Client]]:
    """Runs all processes that have figures, before frameworks that are played, and gives a client."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        # Backend a fails every call before it begins, c in the middle, and d is slow: so there are retries,
        # fallbacks, a breaker, continuations and hedges.
        played = [
            Backend(scripted("a", fault=Fault.parse("UNAVAILABLE@before")), f"unix:{folder}/a"),
            Backend(scripted("b", token_delay=0.002), f"unix:{folder}/b"),
            Backend(scripted("c", fault=Fault.parse("STREAM_INTERRUPTED@5")), f"unix:{folder}/c"),
            Backend(scripted("d", first_delay=2.0), f"unix:{folder}/d"),
        ]
        for each in played:
            await each.start()
            stack.push_async_callback(each.stop)
        ollama = FakeOllama()
        await ollama.start()
        stack.push_async_callback(ollama.stop)
        studio = await enter(FakeLmStudio([FakeModel(key="qwen-fake")]))
        running = {
            "forebay-ollama": await enter(service("forebay.ollama_bridge", "OLLAMA", base_url=ollama.url)),
            "forebay-lmstudio": await enter(
                service("forebay.lmstudio_bridge", "LMSTUDIO", base_url=studio.url)
            ),
        }
        if has_mlx():
            for name in ("tiny", "other"):
                tiny_models.build_random(folder / "models" / name, plain=True)
            running["forebay-mlx"] = await enter(
                service(
                    "forebay.mlx_service",
                    "MLX",
                    model_folders=json.dumps([str(folder / "models")]),
                    preload='["tiny", "other"]',
                    keep_alive="5s",
                    fetch_default_model="false",
                    huggingface_cache="false",
                    cache_dir=str(folder / "cache"),
                )
            )
        addresses = {each.engine.name: each.address for each in played}
        addresses |= {name.removeprefix("forebay-"): each.address for name, each in running.items()}
        lines = [
            '[orchestrator]\naddress = "127.0.0.1:0"\nmetrics_address = "127.0.0.1:0"\ncoalesce = "always"\n',
            '[orchestrator.hedge]\nenabled = true\nmin_samples = 1\ndelay_min = "20ms"\n',
            "[orchestrator.admission]\nqueue = 8\n",
            *(
                f'[[orchestrator.backends]]\nname = "{name}"\naddress = "{address}"\nslots = 4\n'
                for name, address in addresses.items()
            ),
        ]
        (folder / "f.toml").write_text("".join(lines))
        orchestrator = await enter(
            ServiceProcess("forebay.orchestrator", ["--config", str(folder / "f.toml")])
        )
        peer = await enter(client(orchestrator.address, timeout=WAIT_SECONDS))
        fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)
        async with asyncio.timeout(WAIT_SECONDS):
            while not all(
                each.models for each in (await fleet.ListBackends(fleet_pb2.ListBackendsRequest())).backends
            ):
                await asyncio.sleep(0.05)
        yield {"forebay-orchestrator": orchestrator, **running}, peer


async def load(peer: Client, running: dict[str, ServiceProcess]) -> None:
    """Has everything happen that there are figures of, again and again."""

    async def one(request: pb.GenerateRequest) -> None:
        with contextlib.suppress(CallError):
            await peer.generate(request)

    mlx = running.get("forebay-mlx")
    is_killed = mlx is None
    while True:
        fallback, continued, raced = (ask("x", model="m") for _ in range(3))
        fallback.routing.backends.extend(["a", "b"])
        continued.routing.backends.extend(["c", "b"])
        continued.routing.continuation = pb.CONTINUATION_POLICY_SAME_WEIGHTS
        raced.routing.backends.extend(["d", "b"])
        same = with_options(ask("same", model="m"), token_count=20, token_delay="5ms")
        same.sampling.temperature = 0
        same.routing.backends.append("b")
        crowd = [with_options(ask(str(i), model="m"), token_delay="20ms") for i in range(30)]
        for each in crowd:
            each.routing.backends.append("b")
        embeds = [pb.EmbedRequest(model="m", texts=["x"]) for _ in range(4)]
        await asyncio.gather(
            *map(one, [fallback, continued, raced, same, same]),
            one(with_options(ask("x", model="m"), fault="BACKEND_ERROR@2")),
            *(one(ask("x", model=model, token_count=8)) for model in ("llama3.2:latest", "qwen-fake")),
            *(peer.inference.Embed(with_options(each, first_delay="20ms"), timeout=60) for each in embeds),
        )
        await asyncio.gather(*map(one, crowd))
        if mlx is not None:
            await one(ask("x", model="tiny", token_count=8))
            if not is_killed:
                is_killed = True
                for worker in await workers(mlx):
                    worker.kill()
        await asyncio.sleep(0.05)


@pytest.mark.timeout(400)
async def test_every_query_of_the_dashboard_has_data_after_some_load(tmp_path: Path) -> None:
    async with everything(tmp_path) as (running, peer), AsyncExitStack() as stack:
        targets = {name: page_of(process) for name, process in running.items()}
        url = await stack.enter_async_context(prometheus(tmp_path, targets))
        session = await stack.enter_async_context(aiohttp.ClientSession(url))
        loading = asyncio.ensure_future(load(peer, running))
        missing = queries()
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while missing:
                    assert not loading.done(), loading.exception()
                    await asyncio.sleep(0.25)
                    missing = [query for query in missing if not await result(session, query)]
        except TimeoutError:
            raise AssertionError(f"these have no data: {missing}") from None
        finally:
            loading.cancel()
            await asyncio.wait([loading])
        up = {each["metric"]["job"]: each["value"][1] for each in await result(session, "up")}
        assert up == dict.fromkeys(targets, "1")
        (state,) = await result(session, 'forebay_backend_state{forebay_backend="b",forebay_state="active"}')
        assert state["metric"]["job"] == "forebay-orchestrator"
