"""What each framework can do, asked of the bridges over running servers, for `docs/bridges.md`.

`python tests/bridge_table.py` writes the table; a test compares it. Ollama and
LM Studio are played by the emulators, llama-server and MLX are the real ones.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import llama
import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.client import client
from forebay.testing.processes import ServiceProcess

PAGE = Path(__file__).parent.parent / "docs" / "bridges.md"
MARK = "<!-- table:bridges -->"

NAMES = {
    "Ollama": ("llama3.2:latest", "qwen3:latest", "llava:latest", "all-minilm:latest"),
    "LM Studio": ("chat", "seeing", "thinking", "embedding"),
}
_LISTENING = re.compile(r"listening on (?P<url>http://\S+)\n")


@asynccontextmanager
async def bridge(service: str, section: str, url: str, folder: Path, *, slots: int = 0) -> AsyncIterator[str]:
    """Runs a bridge as a process; gives its address."""
    config = folder / f"{section}.toml"
    config.write_text(f'[{section}]\nbase_url = "{url}"\n' + (f"slots = {slots}\n" if slots else ""))
    arguments = ["--config", str(config), "--address", "127.0.0.1:0"]
    async with ServiceProcess(f"forebay.{service}", arguments) as process:
        yield process.address


@asynccontextmanager
async def emulator(name: str, *arguments: str) -> AsyncIterator[str]:
    """Runs an emulator as a process; gives its URL."""
    process = ServiceProcess(f"forebay.testing.{name}", ["--port", "0", *arguments])
    await process.launch()
    try:
        yield (await process.wait_for_output(_LISTENING))["url"]
    finally:
        await process.kill()


async def models(address: str, wanted: int) -> list[pb.Model]:
    """Waits until a bridge lists so many models with capabilities, and returns them."""
    async with client(address) as caller, asyncio.timeout(60):
        while True:
            request = pb.ListModelsRequest()
            answer = await caller.inference.ListModels(request, wait_for_ready=True)
            listed = [model for model in answer.models if model.capabilities]
            if len(listed) >= wanted:
                return listed
            await asyncio.sleep(0.1)


async def columns(folder: Path) -> dict[str, pb.Model]:
    """Returns a model for each column of the table. llama-server's is missing where it was not built."""
    found: dict[str, pb.Model] = {}
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        url = await enter(emulator("fake_ollama"))
        address = await enter(bridge("ollama_bridge", "ollama", url, folder))
        listed = {model.id: model for model in await models(address, 4)}
        for id_ in NAMES["Ollama"]:
            found[f"Ollama: {id_.removesuffix(':latest')}"] = listed[id_]
        url = await enter(
            emulator("fake_lmstudio", "--models", "chat,seeing:vision,thinking:reasoning,embedding:embed")
        )
        address = await enter(bridge("lmstudio_bridge", "lmstudio", url, folder))
        listed = {model.id: model for model in await models(address, 4)}
        for id_ in NAMES["LM Studio"]:
            found[f"LM Studio: {id_}"] = listed[id_]
        if llama.find() is not None:
            model = llama.write_model(folder / "tiny.gguf")
            with llama.llama_server(folder, model=model) as server:
                async with bridge("openai_bridge", "openai", server.url, folder) as address:
                    found["llama-server"] = (await models(address, 1))[0]
        tiny_models.build_random(folder / "models" / "tiny")
        config = folder / "mlx.toml"
        config.write_text(
            f'[mlx]\nmodel_folders = ["{folder / "models"}"]\nhuggingface_cache = false\npreload = ["tiny"]\n'
        )
        mlx = await enter(
            ServiceProcess("forebay.mlx_service", ["--config", str(config), "--address", "127.0.0.1:0"])
        )
        async with client(mlx.address) as caller, asyncio.timeout(60):
            while (loaded := await caller.get_model("tiny")).state != pb.Model.STATE_ACTIVE:
                await asyncio.sleep(0.1)
        found["MLX"] = loaded
    return found


def table(found: dict[str, pb.Model]) -> str:
    """Returns the table: a line a capability, a column a model."""
    lines = [f"| | {' | '.join(found)} |", f"| --- |{' --- |' * len(found)}"]
    for number in pb.Capability.values():
        if number == pb.CAPABILITY_UNSPECIFIED:
            continue
        name = pb.Capability.Name(number).removeprefix("CAPABILITY_").lower().replace("_", " ")
        lines.append(f"| {name} | {' | '.join(_cell(model, number) for model in found.values())} |")
    return "\n".join(lines)


def _cell(model: pb.Model, capability: pb.Capability.ValueType) -> str:
    for report in model.capabilities:
        if report.capability == capability and report.support == pb.CapabilityReport.SUPPORT_YES:
            return "**yes**" if report.probed else "yes"
        if report.capability == capability and report.support == pb.CapabilityReport.SUPPORT_NO:
            return "no"
    return "?"


async def _main() -> None:
    with TemporaryDirectory() as folder:
        made = table(await columns(Path(folder)))
    text = PAGE.read_text()
    PAGE.write_text(
        re.sub(rf"{MARK}\n(?:\n\|(?:.*\n)+?(?=\n))?", lambda _: f"{MARK}\n\n{made}\n", text, count=1)
    )


if __name__ == "__main__":
    asyncio.run(_main())
