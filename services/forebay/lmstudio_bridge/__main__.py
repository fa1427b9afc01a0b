"""Runs the bridge to LM Studio: `python -m forebay.lmstudio_bridge`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from forebay.kit import process
from forebay.kit.server import StartError, serving
from forebay.kit.telemetry import Telemetry
from forebay.lmstudio_bridge.client import LmStudioClient
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.engine import LmStudioEngine
from forebay.upstream.tasks import OwnedTasks


async def serve(settings: LmStudioSettings, telemetry: Telemetry) -> None:
    """Serves until the process is asked to stop, whether LM Studio is there or not."""
    try:
        client = LmStudioClient(settings, token=settings.read_token())
    except (OSError, ValueError) as error:
        raise StartError(f"the token of LM Studio cannot be used: {error}") from error
    async with (
        client,
        LmStudioEngine(settings, client) as engine,
        serving(settings, inference=engine, models=engine, telemetry=telemetry) as up,
        OwnedTasks() as tasks,
    ):
        tasks.create_task(engine.watch(up.set_ready))
        process.announce("lmstudio", up.address)
        await process.until_stopped()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the process and returns its exit code."""
    return process.main("lmstudio", LmStudioSettings, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
