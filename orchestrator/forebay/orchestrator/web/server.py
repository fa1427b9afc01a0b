"""Serves the dashboard: a page, and one stream of events for each page that is open.

It only shows. It answers to the names of this machine or to those allowed,
gives nothing to other sites, and asks for a token where the orchestrator does.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from aiohttp import web

from forebay.kit import auth, hosts
from forebay.kit.server import StartError
from forebay.orchestrator.activity import Activity
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.config import OrchestratorSettings
from forebay.orchestrator.fleet.fleet import Fleet
from forebay.orchestrator.web import view
from forebay.orchestrator.web.view import History, Json

logger = logging.getLogger(__name__)

TICK = 0.5
"""Seconds between two events: what happens is on the screen before anybody wonders."""

SAMPLE = 1.0
"""Seconds between two samples of the charts."""

MOST_PAGES = 32
"""Pages open at once. Each costs a few milliseconds a second while a hundred requests are in progress."""

STUCK = 30.0
"""Seconds after which a page that takes nothing is given up."""

_MOST_ACTIVE = 100
"""Requests in progress that one event tells of: more than a screen holds."""

_FOLDER = Path(__file__).parent / "page"

_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

_HEADERS = {
    # Names of models and of backends come from others. Whatever they hold, nothing runs but our own script,
    # and nothing is loaded from elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "forebay",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Dashboard:
    """The page and its events.

    Args:
        settings: the orchestrator's settings.
        fleet: the backends.
        activity: the record of requests.
        admission: the queue before all backends.
    """

    def __init__(
        self, settings: OrchestratorSettings, *, fleet: Fleet, activity: Activity, admission: Admission
    ) -> None:
        assert settings.web_address is not None, "it is served where there is an address for it"
        self._settings = settings
        self._fleet = fleet
        self._activity = activity
        self._admission = admission
        self._history = History()
        self._closing = asyncio.Event()
        self._digests = auth.encoded(settings.auth_token_digests)
        own = settings.web_address.rpartition(":")[0].strip("[]")
        # The unspecified address is no name of anybody.
        self._hosts = frozenset({own, *settings.web_hosts} - {"0.0.0.0", "::"})  # noqa: S104  # left out
        self.page_count = 0
        """Pages that are open."""

    def app(self) -> web.Application:
        """Returns the application to serve."""
        app = web.Application(middlewares=[self._guard], client_max_size=1024)
        for path, (name, kind) in _FILES.items():
            app.router.add_get(path, _file((_FOLDER / name).read_bytes(), kind))
        app.router.add_get("/events", self._events)
        app.on_response_prepare.append(_harden)
        app.on_shutdown.append(self._close)
        return app

    async def sample(self) -> None:
        """Takes samples for the charts, for as long as the page is served."""
        while True:
            self._history.take(
                when=self._activity.clock(),
                time_ms=time.time_ns() // 1_000_000,
                tokens=self._activity.totals().output_token_count,
                waiting=self._admission.waiting,
                running=self._admission.running,
            )
            await asyncio.sleep(SAMPLE)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers only whoever may see this."""
        if not hosts.is_ours(request.headers.get("Host", ""), self._hosts):
            raise web.HTTPForbidden(
                text="This dashboard answers to the names of its own machine. To allow another name, "
                "list it in orchestrator.web_hosts.\n"
            )
        # What is opened in a tab may come from anywhere; what a page asks for, only from our own.
        is_page = request.path == "/" and request.headers.get("Sec-Fetch-Mode", "navigate") == "navigate"
        is_foreign = request.headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"}
        # A browser names the origin even of our own page when it asks for its script. It is HTTPS where a
        # proxy before us speaks that.
        host, origin = request.headers["Host"], request.headers.get("Origin")
        is_own = origin in {None, f"http://{host}", f"https://{host}"}
        if not is_own or (is_foreign and not is_page):
            raise web.HTTPForbidden(text="This dashboard is not for other sites.\n")
        if self._digests and not auth.is_known(_token(request), self._digests):
            raise web.HTTPUnauthorized(
                text="Give one of the orchestrator's tokens as the password, and any name.\n",
                headers={"WWW-Authenticate": 'Basic realm="forebay", charset="UTF-8"'},
            )
        return await handler(request)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Streams what happens: `hello` with all there is, then `tick` with what is new."""
        if self.page_count >= MOST_PAGES:
            raise web.HTTPServiceUnavailable(text="Too many dashboards are open.\n")
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        self.page_count += 1
        try:
            await response.prepare(request)
            with contextlib.suppress(ConnectionError, TimeoutError):
                await self._stream(response)
        finally:
            self.page_count -= 1
        return response

    async def _stream(self, response: web.StreamResponse) -> None:
        watch = self._activity.watch(most_active=_MOST_ACTIVE)
        samples, seen = self._history.since(0)
        kind = "hello"
        more: dict[str, Json] = {"trace_url": self._settings.trace_url}
        fleet = self._fleet
        with fleet.feed.watch(fleet.names) as changes:
            while not self._closing.is_set():
                told = view.activity(watch.look()) | more
                told["samples"] = samples
                names = fleet.names  # a reload of the configuration changes them
                told["names"] = list(names)
                changed = [name for name in changes.take() if name in names]
                told["backends"] = view.backends(fleet[name].to_proto() for name in changed)
                async with asyncio.timeout(STUCK):
                    await response.write(b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(told)))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK):
                        await self._closing.wait()
                samples, seen = self._history.since(seen)
                kind, more = "tick", {}

    async def _close(self, app: web.Application) -> None:
        self._closing.set()


@asynccontextmanager
async def serving(
    settings: OrchestratorSettings, *, fleet: Fleet, activity: Activity, admission: Admission
) -> AsyncIterator[str]:
    """Serves the dashboard for the length of a block; gives its URL.

    Raises:
        StartError: the address cannot be bound, or a file cannot be read.
    """
    dashboard = Dashboard(settings, fleet=fleet, activity=activity, admission=admission)
    runner = web.AppRunner(dashboard.app(), access_log=None, shutdown_timeout=1.0)
    host, _, port = str(settings.web_address).rpartition(":")
    context = _tls(settings)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host.strip("[]"), int(port), ssl_context=context)
        try:
            await site.start()
        except OSError as error:
            raise StartError(f"web_address {settings.web_address} cannot be bound: {error}") from error
        bound = runner.addresses[0][1]
        url = f"{'http' if context is None else 'https'}://{host}:{bound}/"
        logger.info("the dashboard is at %s", url)
        sampling = asyncio.create_task(dashboard.sample(), name="dashboard.sample")
        try:
            yield url
        finally:
            sampling.cancel()
            await asyncio.wait([sampling])
    finally:
        await runner.cleanup()


def _file(content: bytes, kind: str) -> Handler:
    async def serve(request: web.Request) -> web.Response:
        return web.Response(
            body=content, content_type=kind, charset="utf-8", headers={"Cache-Control": "no-cache"}
        )

    return serve


async def _harden(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _token(request: web.Request) -> str:
    """Returns the token that came with a request: a browser sends it as a password."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    try:
        given = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return given.partition(":")[2]


def _tls(settings: OrchestratorSettings) -> ssl.SSLContext | None:
    """Returns what makes it HTTPS: the orchestrator's own certificate, if it has one."""
    if settings.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
        if settings.tls_client_roots is not None:
            context.load_verify_locations(settings.tls_client_roots)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # SSLError is one too
        raise StartError(f"the dashboard cannot use {settings.tls_certificate}: {error}") from error
    return context
