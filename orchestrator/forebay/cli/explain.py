"""`forebay explain`: where a request would go, and why not elsewhere."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from forebay.cli import command, render
from forebay.cli.chat import Wishes, message
from forebay.cli.client import DEFAULT_ADDRESS, connected
from forebay.cli.problems import ExitCode
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb


def table(response: fleet_pb.ExplainRouteResponse) -> Table:
    """Returns the candidates as a table, best first."""
    scorers = sorted({name for candidate in response.candidates for name in candidate.scores})
    grid = render.grid()
    grid.add_column("")
    grid.add_column("backend", overflow="fold")
    grid.add_column("model", overflow="fold")
    grid.add_column("score", justify="right")
    for scorer in scorers:
        grid.add_column(render.safe(scorer), justify="right", style="dim")
    grid.add_column("refused by", overflow="fold")
    for index, candidate in enumerate(response.candidates):
        chosen = index == 0 and not candidate.refused_by
        refusal = ": ".join(part for part in (candidate.refused_by, candidate.refusal_detail) if part)
        grid.add_row(
            Text("\N{RIGHTWARDS ARROW}" if chosen else "", style="bold green"),
            Text(render.safe(candidate.backend), style="bold" if chosen else ""),
            Text(render.safe(candidate.model)),
            "-" if candidate.refused_by else f"{candidate.total_score:.3f}",
            *(f"{candidate.scores[scorer]:.2f}" if scorer in candidate.scores else "-" for scorer in scorers),
            Text(render.safe(refusal), style="red"),
        )
    return grid


@command.command
def explain(
    prompt: Annotated[str, typer.Argument(help="What would be asked.")] = "Hello",
    address: command.Address = DEFAULT_ADDRESS,
    model: command.Model = "",
    backend: command.BackendName = "",
    embedding: Annotated[bool, typer.Option("--embed", help="Explain a request for embeddings.")] = False,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> ExitCode:
    """Say where a request would go now, and why not elsewhere, without sending it."""
    request = fleet_pb.ExplainRouteRequest()
    if embedding:
        request.embed_request.model = model
        request.embed_request.texts.append(prompt)
        if backend:
            request.embed_request.routing.backends.append(backend)
    else:
        wishes = Wishes(backend=backend)
        request.request.CopyFrom(wishes.request([message(pb.ROLE_USER, prompt)], model))
    response = command.run(_explain(address, request))
    if as_json:
        print(json.dumps(render.as_json(response), ensure_ascii=False))
        return ExitCode.OK
    console = render.out()
    reasons = f": {'; '.join(response.class_reasons)}" if response.class_reasons else ""
    if response.request_class:
        console.print(f"taken for {response.request_class}{reasons}", markup=False, soft_wrap=True)
    render.show_table(console, table(response))
    if not any(not candidate.refused_by for candidate in response.candidates):
        render.note("no backend can take this request", style="yellow")
        return ExitCode.UNAVAILABLE
    return ExitCode.OK


async def _explain(address: str, request: fleet_pb.ExplainRouteRequest) -> fleet_pb.ExplainRouteResponse:
    async with connected(address) as client:
        return await client.explain(request)
