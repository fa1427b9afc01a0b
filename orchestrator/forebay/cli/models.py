"""`forebay models`: what is on disk, what is in memory, and how it gets there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from forebay.cli import command, render
from forebay.cli.client import DEFAULT_ADDRESS, connected
from forebay.cli.problems import ExitCode, Problem
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.config import parse_duration
from forebay.models.v1 import models_pb2 as models_pb

models = typer.Typer(no_args_is_help=True, help="List, load, unload, fetch and remove models.")

_T = TypeVar("_T")

ModelArgument = Annotated[
    str, typer.Argument(help="The model, in its framework's spelling.", metavar="MODEL")
]

STYLES = {
    pb.Model.STATE_ACTIVE: "green",
    pb.Model.STATE_LOADING: "yellow",
    pb.Model.STATE_UNLOADING: "yellow",
    pb.Model.STATE_FAILED: "red",
    pb.Model.STATE_QUARANTINED: "red",
}


def state_text(model: pb.Model) -> str:
    """Returns a model's state in a word."""
    return render.enum_text(pb.Model.State.Name(model.state), "STATE_")


def capabilities(model: pb.Model) -> Text:
    """Returns what a model can do, in words; what was not tried on the running server is dim."""
    words = Text()
    for report in model.capabilities:
        if report.support == pb.CapabilityReport.SUPPORT_YES:
            word = render.enum_text(pb.Capability.Name(report.capability), "CAPABILITY_")
            words.append(f"{', ' if words else ''}{word}", style="" if report.probed else "dim")
    return words or Text("-")


def table(listed: Iterable[pb.Model]) -> Table:
    """Returns models as a table."""
    grid = render.grid()
    for heading in ("model", "backend", "state", "weights"):
        grid.add_column(heading, overflow="fold")
    for heading in ("context", "memory", "disk"):
        grid.add_column(heading, justify="right")
    grid.add_column("can", overflow="fold")
    details = []
    for model in listed:
        context = str(model.context_token_count or "-")
        if model.loaded_context_token_count and model.loaded_context_token_count != model.context_token_count:
            context = f"{model.loaded_context_token_count} of {context}"
        weights = " ".join(
            part
            for part in (model.weights.size_label, model.weights.quantization, model.weights.format)
            if part
        )
        grid.add_row(
            Text(render.safe(model.id), style="bold"),
            render.safe(model.backend),
            Text(state_text(model), style=STYLES.get(model.state, "")),
            Text(render.safe(weights) or "-"),
            context,
            render.bytes_text(model.memory_bytes),
            render.bytes_text(model.disk_bytes),
            capabilities(model),
        )
        if model.detail:
            details.append(f"{render.safe(model.id)}: {render.safe(model.detail)}")
    if details:
        grid.caption = Text("\n".join(details), style="dim")
        grid.caption_justify = "left"
    return grid


@models.command("list")
@command.command
def list_models(
    address: command.Address = DEFAULT_ADDRESS,
    backend: command.BackendName = "",
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """List the models that can be served now."""
    response = command.run(_list(address, [backend] if backend else []))
    if as_json:
        print(json.dumps(render.as_json(response), ensure_ascii=False))
        return
    console = render.out()
    if response.models:
        render.show_table(console, table(response.models))
    else:
        render.note("there are no models; fetch one with `forebay models pull`", style="yellow")
    for name in response.unreachable:
        render.note(f"{name} could not be asked", style="yellow")


async def _list(address: str, backends: list[str]) -> pb.ListModelsResponse:
    async with connected(address) as client:
        return await client.models(backends)


class Bar:
    """Shows how far something is: a moving bar on a terminal, else a line now and then.

    Args:
        console: where.
        title: of what.
    """

    STEP = 0.1
    """A line is printed each time this share is reached: ten lines tell enough."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._step = -1
        self._detail = ""
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def update(self, detail: str, fraction: float | None, amount: str = "") -> None:
        """Shows how far it is.

        Args:
            detail: what is being done.
            fraction: how much is done, in [0, 1], where known.
            amount: the same in bytes or other words.
        """
        if self._console.is_terminal:
            self._move(detail, fraction, amount)
            return
        step = -1 if fraction is None else int(fraction / self.STEP + 1e-9)
        if detail == self._detail and step == self._step:
            return
        self._detail, self._step = detail, step
        share = "" if fraction is None else f" {fraction:.0%}"
        self._console.print(
            " ".join(part for part in (f"{self._title}:", detail + share, amount) if part),
            markup=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Takes the moving bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _move(self, detail: str, fraction: float | None, amount: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.fields[title]}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[detail]}", style="dim", markup=False),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=None, title=self._title, detail="")
        assert self._task is not None
        self._progress.update(
            self._task,
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
            detail=" ".join(part for part in (detail, amount) if part),
        )


@models.command()
@command.command
def load(
    model: ModelArgument,
    address: command.Address = DEFAULT_ADDRESS,
    backend: command.BackendName = "",
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens of prompt and answer to make room for.")
    ] = None,
    keep: Annotated[
        str,
        typer.Option("--keep", metavar="DURATION", help="Time in memory after its last use, such as 10m."),
    ] = "",
    pin: Annotated[bool, typer.Option("--pin", help="Keep it in memory until it is unloaded.")] = False,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Load a model into memory."""
    request = models_pb.LoadModelRequest(
        model=model, backend=backend, context_token_count=context, pinned=pin
    )
    if keep:
        request.keep_alive_duration.FromTimedelta(_duration(keep))
    done = command.run(_load(address, request, as_json=as_json))
    if not as_json:
        took = done.load_duration.ToTimedelta().total_seconds()
        word = f"loaded in {render.seconds_text(took)}" if took else "was loaded already"
        render.out().print(
            f"{done.model.id or model} {word} on {done.model.backend or backend}",
            markup=False,
            soft_wrap=True,
        )


def _duration(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise Problem(f"--keep {text}: {error}", code=ExitCode.USAGE) from error


async def _load(address: str, request: models_pb.LoadModelRequest, *, as_json: bool) -> models_pb.ModelLoaded:
    loaded: list[models_pb.ModelLoaded] = []
    bar = Bar(render.err(), f"loading {render.safe(request.model)}")

    def show(event: models_pb.LoadModelResponse) -> None:
        if as_json:
            print(json.dumps(render.as_json(event), ensure_ascii=False), flush=True)
        if event.HasField("loaded"):
            loaded.append(event.loaded)
        elif event.HasField("progress") and not as_json:
            fraction = event.progress.fraction if event.progress.HasField("fraction") else None
            bar.update(render.safe(event.progress.detail), fraction)

    async with connected(address) as client:
        try:
            await client.load(request, show)
        finally:
            bar.close()
    return _last(loaded, models_pb.ModelLoaded())


def _last(items: list[_T], otherwise: _T) -> _T:
    return items[-1] if items else otherwise


@models.command()
@command.command
def pull(
    model: ModelArgument,
    address: command.Address = DEFAULT_ADDRESS,
    backend: command.BackendName = "",
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Fetch a model to disk."""
    request = models_pb.PullModelRequest(model=model, backend=backend)
    pulled = command.run(_pull(address, request, as_json=as_json))
    if not as_json:
        where = pulled.backend or backend
        render.out().print(
            f"{pulled.id or model} is on disk{f' for {where}' if where else ''}", markup=False, soft_wrap=True
        )


async def _pull(address: str, request: models_pb.PullModelRequest, *, as_json: bool) -> pb.Model:
    pulled: list[pb.Model] = []
    bar = Bar(render.err(), f"fetching {render.safe(request.model)}")

    def show(event: models_pb.PullModelResponse) -> None:
        if as_json:
            print(json.dumps(render.as_json(event), ensure_ascii=False), flush=True)
        if event.HasField("pulled"):
            pulled.append(event.pulled.model)
        elif event.HasField("progress") and not as_json:
            show_bytes(
                bar,
                render.safe(event.progress.detail),
                event.progress.completed_bytes,
                event.progress.total_bytes,
            )

    async with connected(address) as client:
        try:
            await client.pull(request, show)
        finally:
            bar.close()
    return _last(pulled, pb.Model())


def show_bytes(bar: Bar, detail: str, completed: int, total: int) -> None:
    """Shows how many bytes are here."""
    if total:
        bar.update(
            detail,
            min(1.0, completed / total),
            f"{render.bytes_text(completed)} of {render.bytes_text(total)}",
        )
    else:
        bar.update(detail, None, render.bytes_text(completed) if completed else "")


@models.command()
@command.command
def unload(
    model: ModelArgument,
    address: command.Address = DEFAULT_ADDRESS,
    backend: command.BackendName = "",
    force: Annotated[bool, typer.Option("--force", help="Break off the calls it serves.")] = False,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Remove a model from memory."""
    request = models_pb.UnloadModelRequest(model=model, backend=backend, force=force)
    response = command.run(_unload(address, request))
    if as_json:
        print(json.dumps(render.as_json(response), ensure_ascii=False))
    else:
        render.out().print(f"{model} is not in memory", markup=False, soft_wrap=True)


async def _unload(address: str, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
    async with connected(address) as client:
        return await client.unload(request)


@models.command("rm")
@command.command
def remove(
    model: ModelArgument,
    address: command.Address = DEFAULT_ADDRESS,
    backend: command.BackendName = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: command.Debug = False,
) -> None:
    """Remove a model from disk."""
    if not yes:
        typer.confirm(f"Remove {render.safe(model)} from disk?", abort=True, err=True)
    command.run(_remove(address, models_pb.DeleteModelRequest(model=model, backend=backend)))
    render.out().print(f"{model} is removed", markup=False, soft_wrap=True)


async def _remove(address: str, request: models_pb.DeleteModelRequest) -> None:
    async with connected(address) as client:
        await client.delete(request)
