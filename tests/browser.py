"""A real browser for tests: Chromium without a screen, driven over its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

START_SECONDS = 60.0
"""Longest start: a browser on a busy machine."""

WAIT_SECONDS = 30.0
"""Longest wait for something that is due within a second."""


def executable() -> str | None:
    """Returns the path of a Chromium, or None."""
    return os.environ.get("FOREBAY_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab.

    Args:
        socket: the tab's debugging socket.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        """What the browser complained of: errors, exceptions, and violations of the content policy."""

    async def listen(self) -> None:
        """Takes what the browser says, until it closes."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif told["method"] == "Runtime.exceptionThrown":
                details = told["params"]["exceptionDetails"]
                self.complaints.append(details.get("exception", details).get("description", str(details)))
            elif told["method"] == "Log.entryAdded":
                self.complaints.append(
                    f"{told['params']['entry']['level']}: {told['params']['entry']['text']}"
                )
            elif told["method"] == "Runtime.consoleAPICalled":
                self.complaints.append(f"console: {told['params']['args']}")

    async def ask(self, method: str, **params: object) -> dict[str, Any]:
        """Gives a command and returns its result."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(WAIT_SECONDS):
            told = await answer
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']}")
        result: dict[str, Any] = told["result"]
        return result

    async def open(self, url: str) -> None:
        """Goes to a page, and returns when it is there."""
        for domain in ("Page", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")
        await self.ask("Page.navigate", url=url)
        await self.until(f"location.href === {url!r} && document.readyState === 'complete'")

    async def look(self, script: str) -> Any:
        """Returns the value of a script."""
        told = await self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{script}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def until(self, script: str) -> float:
        """Waits until a script is true, and returns the seconds that took."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while not await self.look(script):
            assert loop.time() - since < WAIT_SECONDS, (
                f"did not come true: {script}\n{self.complaints}\n{await self.text()}"
            )
            await asyncio.sleep(0.02)
        return loop.time() - since

    async def text(self) -> str:
        """Returns the text on the page."""
        return str(await self.look("document.body.innerText"))

    async def dress(self, *, width: int, height: int, scheme: str = "light", scale: float = 1.0) -> None:
        """Sets the window's size in pixels, and `light` or `dark`."""
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.ask("Emulation.setEmulatedMedia", features=features)

    async def picture(self, path: Path, *, selector: str = "") -> None:
        """Writes a PNG of the window, or of one element."""
        more: dict[str, object] = {}
        if selector:
            box = await self.look(
                f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect();"
                "return {x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height, scale: 1} })()"
            )
            more = {"clip": box, "captureBeyondViewport": True}
        told = await self.ask("Page.captureScreenshot", format="png", **more)
        path.write_bytes(base64.b64decode(told["data"]))


class Browser:
    """A browser process with an empty profile, for `with`; its tabs belong to whichever loop opens them."""

    def __enter__(self) -> Self:
        found = executable()
        assert found is not None, "there is a Chromium, or the test was skipped"
        self._profile = Path(tempfile.mkdtemp(prefix="forebay-browser-"))
        self._process = subprocess.Popen(
            [
                found,
                "--headless=new",
                "--no-sandbox",  # it cannot make one as root, and only our own page is opened
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--remote-debugging-port=0",
                f"--user-data-dir={self._profile}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._port = self._find_port()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def _find_port(self) -> int:
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
                return int((self._profile / "DevToolsActivePort").read_text().splitlines()[0])
            assert self._process.poll() is None, "the browser did not start"
            assert time.monotonic() < until, "the browser took too long to start"
            time.sleep(0.05)

    @asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """Opens a tab for the length of a block."""
        host = f"http://127.0.0.1:{self._port}/json"
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{host}/new?about:blank") as response:
                tab = await response.json(content_type=None)
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                yield page
                await socket.close()
                await listening
            async with session.get(f"{host}/close/{tab['id']}"):
                pass
