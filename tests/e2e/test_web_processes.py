"""The dashboard of a real orchestrator process, in a real browser, while processes are killed and frozen."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, Page, executable
from forebay.testing.processes import ServiceProcess

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium: apt install chromium")

STATE = "document.querySelector('#backends .pill')?.textContent ?? ''"
LINK = "document.body.dataset.link"


def free() -> str:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"127.0.0.1:{found.getsockname()[1]}"


def backend(address: str) -> ServiceProcess:
    return ServiceProcess("forebay.testing.scripted", ["--name", "b", "--models", "m", "--address", address])


def orchestrator(folder: Path, *, web: str, backend: str) -> ServiceProcess:
    config = folder / "forebay.toml"
    config.write_text(
        f'[orchestrator]\naddress = "127.0.0.1:0"\nweb_address = "{web}"\n'
        f'[[orchestrator.backends]]\nname = "b"\naddress = "{backend}"\n'
    )
    return ServiceProcess("forebay.orchestrator", ["--config", str(config)])


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.mark.soak
async def test_killed_and_frozen_processes_are_seen_and_their_return_too(
    tmp_path: Path, browser: Browser
) -> None:
    web, path = free(), f"{tmp_path}/b"
    async with (
        backend(f"unix:{path}") as served,
        orchestrator(tmp_path, web=web, backend=f"unix:{path}") as orchestrating,
        browser.page() as page,
    ):
        await page.open(f"http://{web}/")
        await page.until(f"{STATE} === 'Active'")
        since = time.monotonic()
        await served.kill()
        await page.until(f"{STATE}.startsWith('Unreachable')")
        print(f"a killed backend is shown after {time.monotonic() - since:.2f} s")
        Path(path).unlink()
        await served.start()
        await page.until(f"{STATE} === 'Active'")
        assert not page.complaints
        await unheard(page, orchestrating)
        since = time.monotonic()
        await orchestrating.kill()
        await page.until(f"{LINK} === 'lost'")
        print(f"a killed orchestrator is shown after {time.monotonic() - since:.2f} s")
        await orchestrating.start()
        await page.until(f"{LINK} === 'live'")
        await page.until(f"{STATE} === 'Active'")
    # That nobody answered is what was to be shown, and the browser notes it too.
    assert [each for each in page.complaints if "net::ERR" not in each] == []


async def unheard(page: Page, orchestrating: ServiceProcess) -> None:
    """Freezes the orchestrator: its connections stay, and nothing comes."""
    orchestrating.freeze()
    try:
        await page.until(f"{LINK} === 'lost'")
    finally:
        orchestrating.thaw()
    await page.until(f"{LINK} === 'live'")
