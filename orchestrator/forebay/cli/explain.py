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
    grid = render.grid()
    grid.add_column("")
    grid.add_column("backend", overflow="fold")
    grid.add_column("model", overflow="fold")
    grid.add_column("found by")
    grid.add_column("score", justify="right")
    grid.add_column("refused by", overflow="fold")
    for index, candidate in enumerate(response.candidates):
        chosen = index == 0 and not candidate.refused_by
        refusal = ": ".join(part for part in (candidate.refused_by, candidate.refusal_detail) if part)
        grid.add_row(
            Text("\N{RIGHTWARDS ARROW}" if chosen else "", style="bold green"),
            Text(render.safe(candidate.backend), style="bold" if chosen else ""),
            Text(render.safe(candidate.model)),
            render.safe(candidate.match) or "-",
            "-" if candidate.refused_by else f"{candidate.total_score:.3f}",
            Text(render.safe(refusal), style="red"),
        )
    notes = [
        f"{candidate.backend}: {candidate.match_detail}"
        for candidate in response.candidates
        if candidate.match_detail
    ]
    if notes:
        grid.caption = Text(render.safe("\n".join(notes)), style="dim")
        grid.caption_justify = "left"
    return grid


def scores(response: fleet_pb.ExplainRouteResponse) -> Table | None:
    """Returns the scores as a table with a line for each scorer; None if nobody was scored.

    Backends are few and scorers many, so that it fits a terminal this way about.
    """
    scored = [candidate for candidate in response.candidates if candidate.scores]
    if not scored:
        return None
    names = [candidate.backend for candidate in scored]
    grid = render.grid()
    grid.add_column("scorer")
    for candidate, name in zip(scored, names, strict=True):
        heading = name if names.count(name) == 1 else f"{name} {candidate.model}"
        grid.add_column(Text(render.safe(heading)), justify="right", overflow="fold")
    for scorer in sorted({scorer for candidate in scored for scorer in candidate.scores}):
        values = [dict(candidate.scores).get(scorer) for candidate in scored]
        known = [value for value in values if value is not None]
        # What is the same for all decides nothing.
        is_telling = max(known) - min(known) >= _TELLING
        grid.add_row(
            Text(render.safe(scorer), style="" if is_telling else "dim"),
            *(
                Text(
                    "-" if value is None else f"{value:.2f}",
                    style="bold" if is_telling and value == max(known) else "dim",
                )
                for value in values
            ),
        )
    return grid


_TELLING = 0.005
"""Difference of two scores that can be seen in the digits shown."""


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
    grid = scores(response)
    if grid is not None:
        console.print()
        render.show_table(console, grid)
    if not any(not candidate.refused_by for candidate in response.candidates):
        render.note("no backend can take this request", style="yellow")
        return ExitCode.UNAVAILABLE
    return ExitCode.OK


async def _explain(address: str, request: fleet_pb.ExplainRouteRequest) -> fleet_pb.ExplainRouteResponse:
    async with connected(address) as client:
        return await client.explain(request)
