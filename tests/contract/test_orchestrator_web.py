"""The dashboard over real HTTP: what it tells, whom it answers, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from pydantic import ValidationError

from contract.orchestrator_mesh import WAIT_SECONDS, Mesh, until
from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import hosts
from forebay.kit.server import StartError
from forebay.kit.telemetry import off
from forebay.orchestrator.__main__ import serve
from forebay.orchestrator.config import OrchestratorSettings
from forebay.orchestrator.web import server, view
from forebay.testing.calls import ask, with_options
from forebay.testing.scripted import ScriptedEngine

Told = dict[str, Any]

LOCAL = {"web_address": "127.0.0.1:0", "trace_url": "http://127.0.0.1:16686/trace/{trace_id}"}


class Stack:
    """A mesh with its dashboard, and a client of the dashboard."""

    def __init__(self, mesh: Mesh, url: str, client: aiohttp.ClientSession) -> None:
        self.mesh = mesh
        self.url = url
        self.client = client

    async def status(self, path: str = "", method: str = "GET", **headers: str) -> int:
        return (await self.answer(path, method, **headers)).status

    async def answer(self, path: str = "", method: str = "GET", **headers: str) -> aiohttp.ClientResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.request(method, self.url + path, headers=named) as response:
            if response.content_type != "text/event-stream":
                await response.read()
            return response


@asynccontextmanager
async def shown(folder: Path, **settings: object) -> AsyncIterator[Stack]:
    engines = (ScriptedEngine(name=name, models=("m",)) for name in ("a", "b"))
    async with (
        Mesh(folder, *engines, **{**LOCAL, **settings}) as mesh,
        mesh.orchestrator.dashboard() as url,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_SECONDS)) as client,
    ):
        assert isinstance(url, str)
        yield Stack(mesh, url, client)


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Told]]:
    kind = ""
    async for line in response.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


async def test_the_page_is_whole_without_anything_from_elsewhere(tmp_path: Path) -> None:
    async with shown(tmp_path) as stack:
        for path, kind in (
            ("", "text/html"),
            ("app.js", "text/javascript"),
            ("charts.js", "text/javascript"),
            ("style.css", "text/css"),
            ("icon.svg", "image/svg+xml"),
        ):
            async with stack.client.get(stack.url + path) as response:
                text = await response.text()
                assert (response.status, response.content_type) == (200, kind)
                assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert await stack.status("events", "POST") == 405
        assert await stack.status("../config.py") == 404
        assert await stack.status("server.py") == 404


async def test_every_answer_is_closed_to_other_sites(tmp_path: Path) -> None:
    async with shown(tmp_path) as stack:
        answers = [
            await stack.answer(path, method)
            for path, method in (("", "GET"), ("events", "GET"), ("nosuch", "GET"), ("", "OPTIONS"))
        ]
        answers.append(await stack.answer(Host="evil.example"))
        for answer in answers:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert answer.headers["Server"] == "forebay"
            assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "0.0.0.0", "10.0.0.1"])
async def test_a_name_that_is_not_ours_is_refused(tmp_path: Path, host: str) -> None:
    async with shown(tmp_path) as stack:
        for path in ("", "events", "app.js"):
            assert await stack.status(path, Host=host) == 403


async def test_names_of_this_machine_and_those_allowed_are_answered(tmp_path: Path) -> None:
    async with shown(tmp_path, web_hosts=["mac.example"]) as stack:
        for host in (
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1:50350",
            "[::1]:50350",
            "mac.example",
            "Mac.Example:9",
        ):
            assert await stack.status(Host=host) == 200


def test_a_host_is_ours_only_as_a_whole() -> None:
    assert hosts.is_ours("localhost")
    assert not hosts.is_ours("localhost.evil.example")
    assert not hosts.is_ours("user@evil.example:80")
    assert not hosts.is_ours("")


async def test_other_sites_may_link_here_and_read_nothing(tmp_path: Path) -> None:
    async with shown(tmp_path) as stack:
        own = stack.url.removesuffix("/")
        assert await stack.status("app.js", Origin=own, Sec_Fetch_Site="same-origin") == 200
        assert await stack.status("app.js", Origin=own.replace("http", "https")) == 200
        for origin in ("http://evil.example", "null", f"{own}.evil.example", "http://127.0.0.1:1", ""):
            assert await stack.status("events", Origin=origin) == 403
        assert await stack.status(Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate") == 200
        assert await stack.status(Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors") == 403
        for site in ("cross-site", "same-site"):
            assert await stack.status("events", Sec_Fetch_Site=site, Sec_Fetch_Mode="cors") == 403


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def test_it_asks_for_the_token_that_grpc_asks_for(tmp_path: Path) -> None:
    digest = hashlib.sha256("schlüssel".encode()).hexdigest()
    async with shown(tmp_path, auth_token_digests=[digest]) as stack:
        refused = await stack.answer()
        assert refused.status == 401
        assert refused.headers["WWW-Authenticate"].startswith('Basic realm="forebay"')
        right = basic("anyone", "schlüssel")
        for path in ("", "app.js", "events"):
            assert await stack.status(path) == 401
            assert await stack.status(path, Authorization=right) == 200
        for wrong in (
            "Bearer no",
            "Basic !!!",
            "Basic /////w==",
            basic("schlüssel", "no"),
            "Negotiate x",
        ):
            assert await stack.status("events", Authorization=wrong) == 401
    plain = hashlib.sha256(b"key").hexdigest()
    async with shown(tmp_path, auth_token_digests=[plain]) as stack:
        assert await stack.status(Authorization="Bearer key") == 200


async def test_it_is_https_where_grpc_has_a_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    certificate, key, roots = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "roots.pem"
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(certificate)
    authority.cert_pem.write_to_path(roots)
    files = {"tls_certificate": certificate, "tls_key": key}
    trusting = ssl.create_default_context(cafile=str(roots))
    async with shown(tmp_path, **files) as stack:
        assert stack.url.startswith("https://")
        async with stack.client.get(stack.url, ssl=trusting) as response:
            assert response.status == 200
        # The script's origin is that of the page, which is HTTPS.
        origin = {"Origin": stack.url.removesuffix("/")}
        async with stack.client.get(stack.url + "app.js", ssl=trusting, headers=origin) as response:
            assert response.status == 200
    async with shown(tmp_path, **files, tls_client_roots=roots) as stack:
        with pytest.raises(aiohttp.ClientError):
            await stack.client.get(stack.url, ssl=trusting)
        authority.issue_cert("me@example.org").private_key_and_cert_chain_pem.write_to_path(
            tmp_path / "me.pem"
        )
        trusting.load_cert_chain(tmp_path / "me.pem")
        async with stack.client.get(stack.url, ssl=trusting) as response:
            assert response.status == 200
    key.write_text("no key")
    with pytest.raises(StartError, match=r"cert\.pem"):
        server._tls(OrchestratorSettings.model_validate({**LOCAL, **files}))


async def test_events_begin_with_all_and_go_on_with_news(tmp_path: Path) -> None:
    async with shown(tmp_path) as stack:
        await stack.mesh.generate(ask(model="m"))
        async with stack.client.get(stack.url + "events") as response:
            stream = events(response)
            kind, told = await anext(stream)
            assert kind == "hello"
            assert told["names"] == ["a", "b"]
            assert told["trace_url"] == LOCAL["trace_url"]
            assert [each["name"] for each in told["backends"]] == ["a", "b"]
            assert [each["phase"] for each in told["ended"]] == ["succeeded"]
            slow = with_options(ask(model="m"), token_count=10_000, token_delay="5ms")
            running = stack.mesh.client.Generate(slow)
            async for kind, told in stream:
                assert kind == "tick"
                assert not told["ended"]
                if any(each["phase"] == "decode" for each in told["active"]):
                    break
            assert told["queue"]["running"] == 1
            assert {each["name"] for each in told["backends"]} <= {"a", "b"}
            running.cancel()
            async for _, told in stream:
                if told["ended"]:
                    break
            (ended,) = told["ended"]
            assert (ended["phase"], ended["model"], ended["attempts"]) == ("cancelled", "m", 1)
            assert [each["refused"] for each in ended["candidates"]] == ["", ""]
            assert set(ended["candidates"][0]["scores"]) >= {"load", "health"}


async def test_a_page_that_is_opened_later_has_the_last_minutes_too(tmp_path: Path) -> None:
    async with shown(tmp_path) as stack:
        async with stack.client.get(stack.url + "events") as response:
            samples = 0
            async for _, told in events(response):
                samples += len(told["samples"])
                if samples >= 2:
                    break
        async with stack.client.get(stack.url + "events") as response:
            _, told = await anext(events(response))
            assert len(told["samples"]) >= 2


async def test_a_page_that_is_closed_costs_nothing_any_more(tmp_path: Path) -> None:
    async with shown(tmp_path) as stack:
        feed = stack.mesh.fleet.feed
        async with stack.client.get(stack.url + "events") as response:
            await anext(events(response))
            assert len(feed) == 1
        await until(lambda: len(feed) == 0)


async def test_a_page_that_takes_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STUCK", 0.2)
    monkeypatch.setattr(server, "TICK", 0.0)
    monkeypatch.setattr(view, "backends", lambda shown: ["much" * 2**18])
    async with shown(tmp_path) as stack:
        reader, writer = await asyncio.open_connection(*stack.url.split("/")[2].split(":"), limit=1)
        writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.read(1)
        feed = stack.mesh.fleet.feed
        await until(lambda: len(feed) == 1)
        await until(lambda: len(feed) == 0)
        writer.close()


async def test_too_many_pages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_PAGES", 1)
    async with shown(tmp_path) as stack, stack.client.get(stack.url + "events") as response:
        await anext(events(response))
        assert await stack.status("events") == 503


async def test_an_open_page_does_not_hold_up_the_end(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as client:
        async with shown(tmp_path) as stack:
            response = await client.get(stack.url + "events")
            stream = events(response)
            await anext(stream)
            since = loop.time()
        assert loop.time() - since < WAIT_SECONDS
        assert [kind for kind, _ in [each async for each in stream] if kind == "hello"] == []
        response.close()


async def test_a_port_that_is_taken_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StartError, match=f"web_address {address} cannot be bound"):
            async with shown(tmp_path, web_address=address):
                pass


async def test_without_an_address_there_is_no_dashboard(tmp_path: Path) -> None:
    async with (
        Mesh(tmp_path, ScriptedEngine(name="a", models=("m",))) as mesh,
        mesh.orchestrator.dashboard() as url,
    ):
        assert url is None


async def test_the_process_serves_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        web = f"127.0.0.1:{found.getsockname()[1]}"
    settings = OrchestratorSettings.model_validate(
        {
            "address": "127.0.0.1:0",
            "web_address": web,
            "backends": [{"name": "absent", "address": f"unix:{tmp_path}/absent"}],
        }
    )
    serving = asyncio.create_task(serve(settings, off()))
    answers = []
    async with aiohttp.ClientSession() as client, asyncio.timeout(WAIT_SECONDS):
        while not answers:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with client.get(f"http://{web}/") as response:
                    answers.append(response.status)
            await asyncio.sleep(0.01)
    serving.cancel()
    await asyncio.wait([serving])
    assert answers == [200]


GUARD = {
    "tls_certificate": "c.pem",
    "tls_key": "k.pem",
    "auth_token_digests": [hashlib.sha256(b"x").hexdigest()],
}


@pytest.mark.parametrize("address", ["0.0.0.0:1", "192.168.1.2:1", "[::]:1", "mac.local:1"])
def test_an_address_others_can_reach_needs_a_guard_or_a_word(address: str) -> None:
    with pytest.raises(ValidationError, match="can be reached from other machines, and the dashboard"):
        OrchestratorSettings.model_validate({"web_address": address})
    with pytest.raises(ValidationError, match="can be reached from other machines, and the dashboard"):
        OrchestratorSettings.model_validate(
            {"web_address": address, **{k: v for k, v in GUARD.items() if k.startswith("tls")}}
        )
    OrchestratorSettings.model_validate({"web_address": address, **GUARD})
    OrchestratorSettings.model_validate({"web_address": address, "insecure_listen": True})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"web_address": "unix:/tmp/x"}, "a browser needs a port"),
        ({"trace_url": "http://127.0.0.1:16686/trace/"}, "holds {trace_id}"),
        ({"trace_url": "javascript:alert(1)//{trace_id}"}, "begins with http"),
        ({"trace_url": "https:///{trace_id}"}, "begins with http"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        OrchestratorSettings.model_validate(settings)


def test_all_that_is_known_of_a_backend_is_told() -> None:
    backend = fleet_pb2.Backend(
        name="x", state=fleet_pb2.Backend.STATE_EJECTED, share=0.25, detail="d" * 1000
    )
    backend.memory.used_bytes = 5
    backend.memory.limit_bytes = 10
    open_one = backend.breakers.add(model="m", state=fleet_pb2.Breaker.STATE_HALF_OPEN, reason="R")
    open_one.remaining_duration.FromSeconds(3)
    states = pb.Model
    for number in range(60):
        backend.models.add(id=f"m{number:02}", state=states.STATE_AVAILABLE)
    backend.models.add(id="z", state=states.STATE_ACTIVE, pinned=True, context_token_count=4096)
    told = view.backend(backend)
    assert (told["state"], told["share"], told["first"]) == ("ejected", 0.25, None)
    assert told["memory"] == {"total": 0, "available": 0, "limit": 10, "used": 5, "reserved": 0}
    assert told["breakers"] == [{"model": "m", "state": "half_open", "reason": "R", "remaining": 3.0}]
    models: Any = told["models"]
    assert (told["model_count"], len(models)) == (61, 40)
    assert (models[0]["id"], models[0]["state"], models[0]["pinned"]) == ("z", "active", True)
    assert models[0]["context"] == 4096
    assert len(str(told["detail"])) == 300


def test_the_history_has_rates_and_a_bound() -> None:
    history = view.History()
    for second in range(400):
        history.take(when=float(second), time_ms=second * 1000, tokens=second * 7, waiting=1, running=2)
    samples, seen = history.since(0)
    assert (len(samples), seen) == (view.SAMPLES, 400)
    assert samples[-1] == [399_000, 7.0, 1, 2]
    assert history.since(seen) == ([], 400)
    history.take(when=400.0, time_ms=400_000, tokens=0, waiting=0, running=0)
    assert history.since(seen) == ([[400_000, 0.0, 0, 0]], 401)
