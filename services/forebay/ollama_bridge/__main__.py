"""Runs the Ollama bridge."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from forebay.kit import process
from forebay.kit.server import serving
from forebay.kit.telemetry import Telemetry
from forebay.ollama_bridge.config import OllamaSettings
from forebay.ollama_bridge.engine import OllamaEngine
from forebay.upstream.presence import watch_presence


async def serve(settings: OllamaSettings, telemetry: Telemetry) -> None:
    """Serves until the process is asked to stop; is ready whenever Ollama is there."""
    async with (
        OllamaEngine.running(settings) as engine,
        serving(settings, inference=engine, models=engine.library, telemetry=telemetry) as up,
        asyncio.TaskGroup() as group,
    ):

        async def change(present: bool, why: str) -> None:
            await up.set_ready(present, why)
            if present:
                engine.preload()

        interval = settings.probe_interval.total_seconds()
        watch = group.create_task(watch_presence(engine.probe, change, name=settings.name, interval=interval))
        process.announce("ollama", up.address)
        await process.until_stopped()
        watch.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the process and returns its exit code."""
    return process.main("ollama", OllamaSettings, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
