"""`forebay reload`: has an orchestrator read its configuration again."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from forebay.cli import command, render
from forebay.cli.client import DEFAULT_ADDRESS, connected
from forebay.cli.problems import ExitCode, Problem
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.kit.failure import InvalidRequest


@command.command
def reload(
    address: command.Address = DEFAULT_ADDRESS,
    check: Annotated[bool, typer.Option("--check", help="Only say what would change.")] = False,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Read the configuration again, without dropping a call."""
    answer = command.run(_reload(address, check=check))
    if as_json:
        print(json.dumps(render.as_json(answer), ensure_ascii=False))
        return
    for line in lines(answer):
        render.out().print(line, markup=False, soft_wrap=True)


def lines(answer: fleet_pb.ReloadConfigurationResponse) -> list[str]:
    """Returns what changed, a line each, and then what takes a restart."""
    shown = [render.safe(line) for line in answer.changes]
    shown += [f"{render.safe(line)}  (after a restart)" for line in answer.restart_required]
    return shown or ["nothing changed"]


async def _reload(address: str, *, check: bool) -> fleet_pb.ReloadConfigurationResponse:
    async with connected(address) as client:
        try:
            return await client.reload(validate_only=check)
        except InvalidRequest as refusal:
            title, *mistakes = refusal.message.splitlines()
            raise Problem(title.rstrip(":"), code=ExitCode.CONFIG, lines=mistakes) from refusal
