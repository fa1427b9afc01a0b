"""The command `forebay top`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from forebay.cli import command
from forebay.cli.client import DEFAULT_ADDRESS, connected
from forebay.cli.problems import ExitCode, Problem


@command.command
def top(
    address: command.Address = DEFAULT_ADDRESS,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.05, max=60.0, help="Seconds between two looks.")
    ] = 0.5,
    debug: command.Debug = False,
) -> None:
    """Watch backends, requests, models and routing live, and drain, resume, load and unload.

    Keys: d drain, r resume (the backend under the cursor), l load, u unload (the model under the
    cursor), 1 live requests, 2 recent requests, 3 models, p pause, q quit.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Problem(
            "top needs a terminal",
            remedy="`forebay status --watch --json` tells programs the same",
            code=ExitCode.USAGE,
        )
    command.run(_top(address, interval))


async def _top(address: str, interval: float) -> None:
    # Textual is slow to import, and every other command does without it.
    from forebay.cli.top.screen import Top  # noqa: PLC0415

    async with connected(address) as client:
        await client.backends()  # whoever is not there, or is no orchestrator, is better told in a line
        await Top(client, interval=interval).run_async()
