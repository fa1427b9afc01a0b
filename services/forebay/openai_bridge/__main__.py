"""Runs the bridge to an OpenAI-compatible server: `python -m forebay.openai_bridge`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from forebay.kit import process
from forebay.kit.server import StartError, serving
from forebay.kit.telemetry import Telemetry
from forebay.openai_bridge.config import OpenAiSettings
from forebay.openai_bridge.engine import OpenAiEngine


async def serve(settings: OpenAiSettings, telemetry: Telemetry) -> None:
    """Serves until the process is asked to stop. The server behind may come and go."""
    try:
        token = settings.read_token()
    except OSError as error:
        raise StartError(f"token_file {settings.token_file} cannot be read: {error.strerror}") from error
    async with (
        OpenAiEngine(settings, token=token) as engine,
        serving(settings, inference=engine, models=engine, telemetry=telemetry) as up,
    ):
        engine.watch(up.set_ready)
        process.announce("openai", up.address)
        await process.until_stopped()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bridge and returns its exit code."""
    return process.main("openai", OpenAiSettings, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
