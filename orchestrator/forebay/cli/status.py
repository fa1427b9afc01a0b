"""`forebay status`, `forebay drain` and `forebay resume`: the backends behind an orchestrator."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from forebay.cli import command, render
from forebay.cli.client import DEFAULT_ADDRESS, connected
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb

STYLES = {
    fleet_pb.Backend.STATE_ACTIVE: "green",
    fleet_pb.Backend.STATE_DRAINING: "yellow",
    fleet_pb.Backend.STATE_EJECTED: "red",
    fleet_pb.Backend.STATE_UNREACHABLE: "red",
}


def state_text(backend: fleet_pb.Backend) -> str:
    """Returns a backend's state in a word."""
    return render.enum_text(fleet_pb.Backend.State.Name(backend.state), "STATE_")


def loaded(backend: fleet_pb.Backend) -> list[str]:
    """Returns the models that a backend has in memory."""
    return [model.id for model in backend.models if model.state == pb.Model.STATE_ACTIVE]


def table(backends: Iterable[fleet_pb.Backend]) -> Table:
    """Returns the backends as a table."""
    grid = render.grid()
    for heading, justify in (
        ("backend", "left"),
        ("state", "left"),
        ("framework", "left"),
        ("address", "left"),
        ("calls", "right"),
        ("queue", "right"),
        ("first token", "right"),
        ("tok/s", "right"),
        ("ok / failed", "right"),
        ("models", "left"),
    ):
        grid.add_column(heading, justify="right" if justify == "right" else "left", overflow="fold")
    details: list[str] = []
    for backend in backends:
        grid.add_row(
            Text(render.safe(backend.name), style="bold"),
            Text(state_text(backend), style=STYLES.get(backend.state, "dim")),
            render.safe(backend.framework),
            render.safe(backend.address),
            f"{backend.active_call_count}/{backend.slot_count}"
            if backend.slot_count
            else str(backend.active_call_count),
            str(backend.queued_call_count),
            render.seconds_text(backend.first_delta_duration.ToTimedelta().total_seconds())
            if backend.HasField("first_delta_duration")
            else "-",
            f"{backend.output_tokens_per_second:.1f}" if backend.output_tokens_per_second else "-",
            f"{backend.succeeded_call_count} / {backend.failed_call_count}",
            Text(_models_text(backend)),
        )
        details += remarks(backend)
    if details:
        grid.caption = Text("\n".join(details), style="dim")
        grid.caption_justify = "left"
    return grid


def remarks(backend: fleet_pb.Backend) -> list[str]:
    """Returns what else there is to say of a backend, a line each: why it is not well, its open breakers."""
    lines = [f"{backend.name}: {render.safe(backend.detail)}"] if backend.detail else []
    if 0.0 < backend.share < 1.0:
        lines.append(f"{backend.name}: comes back with {backend.share:.0%} of its share of calls")
    return lines + [f"{backend.name}: {_breaker_text(breaker)}" for breaker in backend.breakers]


def _breaker_text(breaker: fleet_pb.Breaker) -> str:
    state = render.enum_text(fleet_pb.Breaker.State.Name(breaker.state), "STATE_")
    whose = f"model {render.safe(breaker.model)}" if breaker.model else "the whole backend"
    left = (
        f", {render.seconds_text(breaker.remaining_duration.ToTimedelta().total_seconds())} left"
        if breaker.HasField("remaining_duration")
        else ""
    )
    return f"breaker of {whose} is {state} ({breaker.reason}{left})"


def performance(backends: Iterable[fleet_pb.Backend]) -> Table | None:
    """Returns what was measured lately as a table with a line for each model; None if nothing was."""
    measured = [(backend.name, each) for backend in backends for each in backend.performance]
    if not measured:
        return None
    grid = render.grid()
    grid.add_column("backend", overflow="fold")
    grid.add_column("model", overflow="fold")
    for heading in ("calls", "failed", "read tok/s", "tok/s"):
        grid.add_column(heading, justify="right")
    grid.add_column("first token by length of prompt", overflow="fold")
    for name, each in measured:
        grid.add_row(
            Text(render.safe(name), style="bold"),
            Text(render.safe(each.model)),
            str(each.call_count),
            f"{each.error_ratio:.0%}",
            f"{each.prefill_tokens_per_second:.0f}" if each.prefill_tokens_per_second else "-",
            f"{each.output_tokens_per_second:.1f}" if each.output_tokens_per_second else "-",
            ", ".join(map(_first_delta_text, each.first_deltas)) or "-",
        )
    return grid


def _first_delta_text(first: fleet_pb.FirstDelta) -> str:
    bound = f"to {first.max_prompt_token_count}" if first.max_prompt_token_count else "longer"
    return f"{bound}: {render.seconds_text(first.median_duration.ToTimedelta().total_seconds())}"


def _models_text(backend: fleet_pb.Backend) -> str:
    names = [render.safe(name) for name in loaded(backend)]
    others = len(backend.models) - len(names)
    if others:
        names.append(f"+{others} on disk" if names else f"{others} on disk")
    return ", ".join(names) or "-"


def line(backend: fleet_pb.Backend) -> str:
    """Returns a backend in one line, for output that is not a terminal."""
    parts = [backend.name, state_text(backend), backend.address, f"calls {backend.active_call_count}"]
    if backend.queued_call_count:
        parts.append(f"queue {backend.queued_call_count}")
    parts.append(_models_text(backend))
    if backend.detail:
        parts.append(backend.detail)
    parts += [_breaker_text(breaker) for breaker in backend.breakers]
    return "  ".join(render.safe(part) for part in parts)


@command.command
def status(
    address: command.Address = DEFAULT_ADDRESS,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing changes until Ctrl-C.")] = False,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Show the backends: state, calls, queue, speed and models."""
    if watch:
        command.run(_watch(address, as_json=as_json))
        return
    backends = command.run(_list(address))
    if as_json:
        print(json.dumps([render.as_json(backend) for backend in backends], ensure_ascii=False))
    else:
        show(render.out(), backends)


def show(console: Console, backends: list[fleet_pb.Backend]) -> None:
    """Prints the backends: a table on a terminal that has room for it, else a line each."""
    if console.is_terminal and console.width >= 80:
        render.show_table(console, table(backends))
        measured = performance(backends)
        if measured is not None:
            console.print()
            render.show_table(console, measured)
        return
    for backend in backends:
        console.print(line(backend), markup=False, soft_wrap=True)


async def _list(address: str) -> list[fleet_pb.Backend]:
    async with connected(address) as client:
        return await client.backends()


async def _watch(address: str, *, as_json: bool) -> None:
    known: dict[str, fleet_pb.Backend] = {}
    console = render.out()
    async with connected(address) as client:
        if as_json or not sys.stdout.isatty():

            def print_line(backend: fleet_pb.Backend) -> None:
                text = json.dumps(render.as_json(backend), ensure_ascii=False) if as_json else line(backend)
                print(text, flush=True)

            await client.watch(print_line, lambda name: print(_removal(name, as_json=as_json), flush=True))
            return
        with Live(table([]), console=console, auto_refresh=False) as live:

            def update(backend: fleet_pb.Backend) -> None:
                known[backend.name] = backend
                live.update(table(known.values()), refresh=True)

            def drop(name: str) -> None:
                known.pop(name, None)
                live.update(table(known.values()), refresh=True)

            await client.watch(update, drop)


def _removal(name: str, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"name": name, "removed": True}, ensure_ascii=False)
    return f"{render.safe(name)}  removed"


BackendArgument = Annotated[str, typer.Argument(help="Name of the backend.", metavar="BACKEND")]


@command.command
def drain(
    name: BackendArgument,
    address: command.Address = DEFAULT_ADDRESS,
    wait: Annotated[bool, typer.Option("--wait", help="Return when its last call has ended.")] = False,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Send no new calls to a backend. Calls in progress go on."""
    _print_one(command.run(_drain(address, name, wait=wait)), as_json=as_json)


@command.command
def resume(
    name: BackendArgument,
    address: command.Address = DEFAULT_ADDRESS,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Send calls to a drained backend again."""
    _print_one(command.run(_resume(address, name)), as_json=as_json)


def _print_one(backend: fleet_pb.Backend, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(render.as_json(backend), ensure_ascii=False))
    else:
        render.out().print(line(backend), markup=False, soft_wrap=True)


async def _drain(address: str, name: str, *, wait: bool) -> fleet_pb.Backend:
    async with connected(address) as client:
        backend = await client.drain(name)
        while wait and backend.active_call_count:
            await asyncio.sleep(0.2)
            backend = next(b for b in await client.backends() if b.name == name)
        return backend


async def _resume(address: str, name: str) -> fleet_pb.Backend:
    async with connected(address) as client:
        return await client.resume(name)
