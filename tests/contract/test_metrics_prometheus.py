"""A real Prometheus scrapes real processes, and every query of the dashboard has data to show."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.testing.calls import ask, with_options
from forebay.testing.client import CallError, client
from forebay.testing.processes import ServiceProcess

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy/grafana/dashboards/forebay.json"
SILENT = (
    "forebay_worker_restarts",
    "forebay_models_loaded",
    "forebay_model_load",
    "forebay_prefill",
    "forebay_degradations",
    "forebay_memory_bytes",
    "forebay_model_memory",
    "forebay_worker_rows",
    "forebay_preemptions",
    "forebay_model_evictions",
    "forebay_continuations",
    "forebay_hedge",
    "forebay_coalesced",
    "forebay_admission_refusals",
    "forebay_embed_gathered",
    "forebay_host_",
    "forebay_evictions",
)
"""Metrics of mlx-service, which does not run here, and of what this load and scripted backends do not do."""

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
    return [each for each in filled if not any(metric in each for metric in SILENT)]


async def test_every_query_of_the_dashboard_has_data_after_some_load(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        # Backend a fails every call before it begins, so that there are retries, fallbacks and a breaker.
        services = [
            await stack.enter_async_context(
                ServiceProcess(
                    "forebay.testing.scripted",
                    ["--name", name, "--models", "m", "--weights", "same", "--token-delay", "2ms", *more],
                )
            )
            for name, more in (("a", ["--fault", "UNAVAILABLE@before"]), ("b", []))
        ]
        lines = [
            '[orchestrator]\naddress = "127.0.0.1:0"\nmetrics_address = "127.0.0.1:0"\n',
            *(
                f'[[orchestrator.backends]]\nname = "{name}"\naddress = "{service.address}"\nslots = 4\n'
                for name, service in zip("ab", services, strict=True)
            ),
        ]
        (tmp_path / "f.toml").write_text("".join(lines))
        orchestrator = await stack.enter_async_context(
            ServiceProcess("forebay.orchestrator", ["--config", str(tmp_path / "f.toml")])
        )
        page = re.search(r"metrics are at http://(\S+)/metrics", orchestrator.log)
        assert page is not None, orchestrator.log
        url = await stack.enter_async_context(prometheus(tmp_path, {"forebay-orchestrator": page[1]}))
        session = await stack.enter_async_context(aiohttp.ClientSession(url))
        peer = await stack.enter_async_context(client(orchestrator.address, timeout=20))
        fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)
        async with asyncio.timeout(20):
            while not all(
                each.models for each in (await fleet.ListBackends(fleet_pb2.ListBackendsRequest())).backends
            ):
                await asyncio.sleep(0.05)

        async def load() -> None:
            while True:
                request = ask("x", model="m")
                request.routing.backends.extend(["a", "b"])
                await peer.generate(request)
                with pytest.raises(CallError):
                    await peer.generate(with_options(ask("x", model="m"), fault="BACKEND_ERROR@2"))
                await asyncio.sleep(0.05)

        loading = asyncio.ensure_future(load())
        missing = queries()
        try:
            async with asyncio.timeout(40):
                while missing:
                    assert not loading.done(), loading.exception()
                    await asyncio.sleep(0.25)
                    missing = [query for query in missing if not await result(session, query)]
        except TimeoutError:
            raise AssertionError(f"these have no data: {missing}") from None
        finally:
            loading.cancel()
            await asyncio.wait([loading])
        (state,) = await result(session, 'forebay_backend_state{forebay_backend="b",forebay_state="active"}')
        assert state["metric"]["job"] == "forebay-orchestrator"
