"""The dashboard in a real browser: it follows what happens, says when it cannot, and runs nobody's script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest

from browser import Browser, Page, executable
from contract.orchestrator_mesh import Mesh
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.calls import ask, with_options
from forebay.testing.script import Fault, Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine

pytestmark = pytest.mark.skipif(
    executable() is None, reason="there is no Chromium here: apt install chromium"
)

HOSTILE = '<img src=x onerror="window.pwned=1">\'"><script>window.pwned=2</script>'
"""A model's name, as whoever publishes models may choose it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    async with browser.page() as tab:
        yield tab
    assert not tab.complaints, "the browser complained"


def card(name: str) -> str:
    """Returns what a backend's card says of its state, as a script."""
    return f"document.querySelector('#backends [data-key={name}] .pill')?.textContent ?? ''"


async def test_it_follows_a_kill_a_recovery_and_the_requests_meanwhile(tmp_path: Path, page: Page) -> None:
    engines = [ScriptedEngine(name=name, models=("m",)) for name in ("a", "b")]
    async with (
        Mesh(tmp_path, *engines, web_address="127.0.0.1:0", trace_url="http://x.example/{trace_id}") as mesh,
        mesh.orchestrator.dashboard() as url,
    ):
        await page.open(str(url))
        await page.until("document.body.dataset.link === 'live'")
        for name in ("a", "b"):
            await page.until(f"{card(name)} === 'Active'")
        slow = with_options(ask(model="m"), token_count=10_000, token_delay="5ms")
        slow.routing.backends.append("a")
        stream = mesh.client.Generate(slow)
        await page.until("document.querySelector('#live .pill')?.textContent === 'Writing'")
        assert await page.look("document.querySelectorAll('#live tr').length") == 1
        await mesh["a"].stop()
        lost = await page.until(f"{card('a')}.startsWith('Unreachable')")
        await page.until("document.querySelector('#recent .pill')?.textContent === 'STREAM_INTERRUPTED'")
        await page.until("document.querySelectorAll('#live tr').length === 0")
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stream:
                pass
        await mesh["a"].start()
        back = await page.until(f"{card('a')} === 'Active'")
        print(f"the page showed the loss after {lost:.2f} s and the return after {back:.2f} s")
        assert await page.look("document.querySelectorAll('#chart-first circle').length") == 1
        assert await page.look("document.querySelectorAll('#chart-rate path').length") == 2


async def test_the_decision_behind_a_request_can_be_opened(tmp_path: Path, page: Page) -> None:
    engines = [ScriptedEngine(name=name, models=("m",)) for name in ("a", "b")]
    async with (
        Mesh(tmp_path, *engines, web_address="127.0.0.1:0") as mesh,
        mesh.orchestrator.dashboard() as url,
    ):
        mesh["a"].engine.then(Script(fault=Fault.parse("UNAVAILABLE@before")))
        request = ask(model="m")
        request.routing.backends.extend(["a", "b"])
        await mesh.generate(request)
        await page.open(str(url))
        await page.until("document.querySelectorAll('#recent tr').length === 1")
        button = "document.querySelector('#recent .why-button')"
        assert await page.look(f"{button}.getAttribute('aria-expanded')") == "false"
        await page.look(f"{button}.focus()")
        for kind in ("rawKeyDown", "char", "keyUp"):
            await page.ask(
                "Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13
            )
        await page.until("document.querySelector('#recent .decision') !== null")
        assert await page.look(f"{button}.getAttribute('aria-expanded')") == "true"
        told = await page.look("document.querySelector('.decision').innerText")
        assert "The last of 2 decisions" in told
        assert "refused: tried" in told
        assert "it has failed this call already" in told
        assert "chosen" in told
        # What a reader looks at stays where it is; what is new is offered.
        await mesh.generate(ask(model="m"))
        await page.until("document.querySelector('#newer').textContent === 'Show 1 newer'")
        assert await page.look("document.querySelectorAll('#recent .entry').length") == 1
        await page.look("document.querySelector('#newer').click()")
        await page.until("document.querySelectorAll('#recent .entry').length === 2")
        await page.look("document.querySelector('[data-filter=moved]').click()")
        assert await page.look("document.querySelectorAll('#recent .entry').length") == 1
        await page.look("document.querySelector('[data-filter=failed]').click()")
        assert await page.look("document.querySelector('#recent-empty').hidden") is False


async def test_a_lost_orchestrator_is_told_and_found_again(tmp_path: Path, page: Page) -> None:
    mesh = Mesh(tmp_path, ScriptedEngine(name="a", models=("m",)), web_address="127.0.0.1:0")
    async with mesh:
        async with mesh.orchestrator.dashboard() as url:
            await page.open(str(url))
            await page.until("document.body.dataset.link === 'live'")
        await page.until("document.body.dataset.link === 'lost'")
        assert await page.look("document.querySelector('#lost').hidden") is False
        assert "The connection to the orchestrator is lost." in await page.text()
        await mesh.generate(ask(model="m"))
        settings = mesh.orchestrator.settings.model_copy(
            update={"web_address": str(url).removeprefix("http://").strip("/")}
        )
        mesh.orchestrator.settings = settings
        async with mesh.orchestrator.dashboard():
            await page.until("document.body.dataset.link === 'live'")
            assert await page.look("document.querySelector('#lost').hidden") is True
            await page.until("document.querySelectorAll('#recent .entry').length === 1")
    # That the address did not answer is what was to be shown, and the browser notes it too.
    page.complaints = [each for each in page.complaints if "net::ERR" not in each]


async def test_names_that_others_chose_are_text_and_never_code(tmp_path: Path, page: Page) -> None:
    engine = ScriptedEngine(name="a", models=[ScriptedModel(name=HOSTILE), ScriptedModel(name="m")])
    settings = {"backends": [{"name": "a", "framework": HOSTILE, "address": f"unix:{tmp_path}/a"}]}
    async with (
        Mesh(tmp_path, engine, web_address="127.0.0.1:0", **settings) as mesh,
        mesh.orchestrator.dashboard() as url,
    ):
        slow = with_options(ask(model=HOSTILE), token_count=10_000, token_delay="5ms")
        stream = mesh.client.Generate(slow)
        await page.open(str(url))
        await page.until("document.querySelector('#live .pill')?.textContent === 'Writing'")
        stream.cancel()
        with pytest.raises(grpc.aio.AioRpcError):
            await mesh.generate(ask(model=f"{HOSTILE}, which nobody has"))
        await page.until("document.querySelectorAll('#recent .entry').length === 2")
        for button in range(2):
            await page.look(f"document.querySelectorAll('.why-button')[{button}].click()")
        await asyncio.sleep(0.2)  # an image's error would come by now
        assert await page.look("window.pwned") is None
        assert await page.look("document.querySelectorAll('main img, main script').length") == 0
        assert (await page.text()).count(HOSTILE) >= 5


async def test_it_fits_a_narrow_screen_and_both_schemes(tmp_path: Path, page: Page) -> None:
    async with (
        Mesh(tmp_path, ScriptedEngine(name="a", models=("m",)), web_address="127.0.0.1:0") as mesh,
        mesh.orchestrator.dashboard() as url,
    ):
        await page.open(str(url))
        await page.until("document.body.dataset.link === 'live'")
        grounds = []
        for scheme in ("light", "dark"):
            for width in (360, 800, 1600):
                await page.dress(width=width, height=800, scheme=scheme)
                await page.until("document.querySelector('#chart-rate svg').viewBox.baseVal.width > 0")
                assert await page.look("document.documentElement.scrollWidth <= innerWidth")
            grounds.append(await page.look("getComputedStyle(document.documentElement).backgroundColor"))
        assert grounds[0] != grounds[1]
        assert (await mesh.generate(ask(model="m")))[-1].finished.reason == pb.FINISH_REASON_STOP
