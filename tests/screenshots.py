"""Pictures for the docs: `python tests/screenshots.py [--seconds 310] [--out docs/images]`.

Scripted backends play an afternoon: people chat, batches run, one backend is
lost and comes back, another fails a request, and one is drained at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import tempfile
from pathlib import Path

import grpc.aio
from opentelemetry.sdk.trace import TracerProvider

from browser import Browser, Page
from contract.orchestrator_mesh import Mesh
from forebay.cli.client import connected
from forebay.cli.top.screen import Top
from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.telemetry import Telemetry
from forebay.testing.calls import ask, with_options
from forebay.testing.script import Fault, Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine

QWEN = "qwen3-8b-4bit"
WIDTH, HEIGHT = 1280, 880


def model(name: str, *, loaded: bool = True, **script: float) -> ScriptedModel:
    return ScriptedModel(name=name, loaded=loaded, script=Script(**script))  # type: ignore[arg-type]  # its fields


class Played(ScriptedEngine):
    """A backend with models of a size."""

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        listed = await super().list_models(request)
        for each in listed.models:
            size, quantization, gigabytes = SIZES[each.id]
            each.weights.size_label, each.weights.quantization = size, quantization
            each.memory_bytes = int(gigabytes * 2**30)
        return listed


SIZES = {
    QWEN: ("8B", "4bit", 4.9),
    "smollm2-135m-instruct": ("135M", "8bit", 0.3),
    "gemma-3-27b-it-4bit": ("27B", "4bit", 15.8),
    "llama3.2:3b": ("3B", "Q4_K_M", 2.6),
    "nomic-embed-text": ("137M", "float16", 0.3),
    "mistral-small-24b": ("24B", "Q4_K_M", 14.1),
}


def engines() -> list[ScriptedEngine]:
    return [
        Played(
            name="mlx",
            models=[
                model(QWEN, first_delay=0.28, token_delay=0.021, progress_delay=0.1),
                model("smollm2-135m-instruct", first_delay=0.05, token_delay=0.006),
                model("gemma-3-27b-it-4bit", loaded=False, load_delay=4.0, first_delay=1.4, token_delay=0.06),
            ],
        ),
        Played(
            name="ollama",
            models=[
                model(QWEN, first_delay=0.5, token_delay=0.033, progress_delay=0.1),
                model("llama3.2:3b", first_delay=0.22, token_delay=0.017),
                model("nomic-embed-text", first_delay=0.02),
            ],
        ),
        Played(
            name="lmstudio",
            models=[model("mistral-small-24b", first_delay=1.1, token_delay=0.045, progress_delay=0.2)],
        ),
    ]


class Afternoon:
    """Who asks what."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._chance = random.Random(11)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._people(group))
            group.create_task(self._batches(group))
            group.create_task(self._trouble())

    async def _people(self, group: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(self._chance.expovariate(0.9))
            group.create_task(self._ask(self._request()))

    def _request(self) -> pb.GenerateRequest:
        chance = self._chance
        name = chance.choices(
            [
                QWEN,
                "smollm2-135m-instruct",
                "llama3.2:3b",
                "mistral-small-24b",
                "gemma-3-27b-it-4bit",
                "gpt-9",
            ],
            [40, 18, 22, 15, 4, 1],
        )[0]
        request = with_options(
            ask(f"question {chance.random()}", model=name), token_count=chance.randint(30, 260)
        )
        request.routing.priority = chance.choice([pb.PRIORITY_INTERACTIVE, pb.PRIORITY_UNSPECIFIED])
        request.routing.continuation = pb.CONTINUATION_POLICY_SAME_WEIGHTS
        if chance.random() < 0.1:
            request.CopyFrom(with_options(ask("the same again", model="llama3.2:3b"), token_count=60))
            request.sampling.temperature = 0.0
            request.routing.cache = pb.CACHE_POLICY_USE
        return request

    async def _batches(self, group: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(26)
            for _ in range(8):
                request = with_options(ask("batch", model="mistral-small-24b"), token_count=50)
                request.routing.priority = pb.PRIORITY_BATCH
                group.create_task(self._ask(request))
            embed = pb.EmbedRequest(model="nomic-embed-text", texts=["a", "b", "c"])
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._mesh.client.Embed(embed)

    async def _trouble(self) -> None:
        while True:
            await asyncio.sleep(90)
            await self._mesh["ollama"].stop()
            await asyncio.sleep(4)
            await self._mesh["ollama"].start()
            await asyncio.sleep(3600)

    async def _ask(self, request: pb.GenerateRequest) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._mesh.generate(request)


async def main(seconds: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    provider = TracerProvider(shutdown_on_exit=False)  # for trace identifiers, which lead nowhere
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        mesh = Mesh(
            Path(folder),
            *engines(),
            telemetry=Telemetry(provider.get_tracer("pictures"), provider),
            backend={"slots": 4},
            placement={"memory": "48GiB"},  # as a Mac has it, whatever this machine has
            web_address="127.0.0.1:0",
            trace_url="http://127.0.0.1:16686/trace/{trace_id}",
        )
        async with mesh, mesh.orchestrator.dashboard() as url, browser.page() as page:
            traffic = asyncio.create_task(Afternoon(mesh).run())
            await page.dress(width=WIDTH, height=HEIGHT, scheme="dark")
            await page.open(str(url))
            await asyncio.sleep(seconds)
            await shoot_terminal(mesh, out)
            await shoot(page, mesh, out)
            traffic.cancel()
            await asyncio.wait([traffic])
            print("\n".join(page.complaints) or "the browser has nothing to complain of")


async def shoot_terminal(mesh: Mesh, out: Path) -> None:
    async with connected(mesh.address) as client:
        top = Top(client, interval=0.5)
        async with top.run_test(size=(132, 38)) as pilot:
            await asyncio.sleep(20)
            await pilot.press("1")
            await pilot.pause(0.5)
            # Without the fonts it would fetch from elsewhere: every monospaced one will do.
            picture = re.sub(r"@font-face \{.*?\}", "", top.export_screenshot(), flags=re.DOTALL)
            (out / "top.svg").write_text(picture)


async def shoot(page: Page, mesh: Mesh, out: Path) -> None:
    await mesh.control.DrainBackend(fleet_pb2.DrainBackendRequest(backend="lmstudio"))
    moved = with_options(ask(model=QWEN), token_count=40)
    moved.routing.backends.extend(["mlx", "ollama"])
    for _ in range(10):  # somebody else may get the failure
        mesh["mlx"].engine.then(Script(fault=Fault.parse("UNAVAILABLE@before")))
        if any(event.started.backend == "ollama" for event in await mesh.generate(moved)):
            break
    await asyncio.sleep(3)
    await page.until("document.querySelectorAll('#live tr').length >= 4")
    await page.picture(out / "dashboard-dark.png")
    await page.dress(width=WIDTH, height=HEIGHT, scheme="light")
    await asyncio.sleep(0.6)
    await page.picture(out / "dashboard-light.png")
    await page.look("document.querySelector('[data-filter=moved]').click()")
    button = "[...document.querySelectorAll('#recent tr')].find(row => row.textContent.includes('ollama'))"
    await page.until(f"{button}?.querySelector('.why-button') != null")
    await page.look(f"{button}.querySelector('.why-button').click()")
    await asyncio.sleep(0.6)
    await page.picture(out / "dashboard-decision.png", selector="section[aria-labelledby=recent-title]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=310.0)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    asyncio.run(main(arguments.seconds, arguments.out))
