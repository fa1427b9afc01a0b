"""A pytest plugin that replays ollama-python's own test suite through the emulator's wire code.

That suite scripts an HTTP server by a fixture named `httpserver`. This plugin
offers the same fixture, but every request the client makes is first judged by
the emulator's parser, and every scripted reply is written by the emulator's
own framing. A test that passes shows that the emulator accepts what the
official client sends and that the client reads what the emulator writes.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import pytest
from aiohttp import web

from forebay.testing.fake_ollama_wire import Lines, WireError, check_body, json_reply


class URIPattern:
    """What the suite derives its own patterns from."""

    def match(self, uri: str) -> bool:
        raise NotImplementedError


class Request:
    """What the suite's handlers are given; they do not look at it."""


class Response:
    """What the suite's handlers answer with."""

    def __init__(self, body: Iterable[str] | None = None, status: int = 200) -> None:
        self.body = body
        self.status = status


class Expectation:
    """One request the suite waits for, with its answer."""

    def __init__(self, uri: object, method: str, body: object) -> None:
        self.uri = uri
        self.method = method
        self.body = body
        self.status = 200
        self.answer: Callable[[], Response | dict[str, object]] = Response

    def respond_with_json(self, value: dict[str, object], status: int = 200) -> None:
        self.status = status
        self.answer = lambda: value

    def respond_with_response(self, response: Response) -> None:
        self.answer = lambda: response

    def respond_with_handler(self, handler: Callable[[Request], Response]) -> None:
        self.answer = lambda: handler(Request())

    def differs(self, request: web.Request, raw: bytes) -> str:
        if request.method != self.method:
            return f"method {request.method}, not {self.method}"
        if isinstance(self.uri, str):
            fits = request.path == self.uri
        elif isinstance(self.uri, re.Pattern):
            fits = bool(self.uri.match(request.path))
        else:
            assert isinstance(self.uri, URIPattern)
            fits = self.uri.match(request.path)
        if not fits:
            return f"path {request.path}"
        if self.body is not None and json.loads(raw) != self.body:
            return "body"
        return ""


class HTTPServer:
    """A server that answers in the order of its expectations."""

    def __init__(self) -> None:
        self.replayed = 0
        self._queue: deque[Expectation] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner, self._base = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> tuple[web.AppRunner, str]:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{rest:.*}", self._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def clear(self) -> None:
        self._queue.clear()

    def url_for(self, path: str) -> str:
        return self._base + path

    def expect_ordered_request(self, uri: object, method: str = "GET", json: object = None) -> Expectation:
        expectation = Expectation(uri, method, json)
        self._queue.append(expectation)
        return expectation

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        # The suite gives some clients a base URL that repeats the path.
        path = request.path.replace("/api/delete/api/", "/api/").replace("/api/copy/api/", "/api/")
        try:
            check_body(request.method, path, raw)
        except WireError as error:
            return json_reply({"error": f"the emulator refuses this: {error.text}"}, 599)
        if not self._queue:
            return json_reply({"error": "nothing was expected"}, 599)
        expectation = self._queue.popleft()
        wrong = expectation.differs(request, raw)
        if wrong:
            return json_reply({"error": f"not as expected: {wrong}"}, 599)
        self.replayed += 1
        answer = expectation.answer()
        if isinstance(answer, dict):
            return json_reply(answer, expectation.status)
        if answer.body is None:
            return web.Response(status=answer.status)
        out = Lines(request)
        for line in answer.body:
            await out.send(json.loads(line))
        return await out.end()


httpserver_module = types.ModuleType("pytest_httpserver")
httpserver_module.HTTPServer = HTTPServer  # type: ignore[attr-defined]  # a stand-in for what is not installed
httpserver_module.URIPattern = URIPattern  # type: ignore[attr-defined]
wrappers_module = types.ModuleType("werkzeug.wrappers")
wrappers_module.Request = Request  # type: ignore[attr-defined]
wrappers_module.Response = Response  # type: ignore[attr-defined]
sys.modules["pytest_httpserver"] = httpserver_module
sys.modules["werkzeug"] = types.ModuleType("werkzeug")
sys.modules["werkzeug.wrappers"] = wrappers_module

_network: dict[str, str] = {}


@pytest.fixture(scope="session")
def _server() -> Iterator[HTTPServer]:
    server = HTTPServer()
    yield server
    server.stop()


@pytest.fixture
def httpserver(_server: HTTPServer) -> Iterator[HTTPServer]:
    yield _server
    _server.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" and "httpserver" in getattr(item, "fixturenames", ()):
        _network[item.nodeid] = report.outcome
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = sum(outcome == "passed" for outcome in _network.values())
    terminalreporter.write_line(f"network tests passed: {passed} of {len(_network)}")
