"""`python -m forebay.orchestrator`: the orchestrator as a process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from forebay.kit import process
from forebay.kit.server import serving
from forebay.kit.telemetry import Telemetry
from forebay.orchestrator.build import Orchestrator
from forebay.orchestrator.config import OrchestratorSettings


async def serve(settings: OrchestratorSettings, telemetry: Telemetry) -> None:
    """Serves until the process is asked to stop."""
    orchestrator = Orchestrator(settings, telemetry=telemetry, configuration=process.configuration())
    async with (
        orchestrator.fleet,
        # Above the server, so that a drain can be watched.
        orchestrator.dashboard(),
        serving(
            settings,
            inference=orchestrator.inference,
            models=orchestrator.models,
            more=[orchestrator.register],
            telemetry=telemetry,
            model_required=False,
        ) as up,
    ):
        process.announce("orchestrator", up.address)
        # Ready whatever the backends are: it can already say which are missing and why, and a health that
        # followed theirs would hide those answers from every client that asks health first.
        await up.set_ready(True)
        orchestrator.fleet.spawn(orchestrator.reload.run(), "reload")
        await process.until_stopped()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the process and returns its exit code."""
    return process.main("orchestrator", OrchestratorSettings, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
