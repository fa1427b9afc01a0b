"""`forebay mlx`: what MLX does on this machine, and how fast."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from forebay.cli import command, render
from forebay.cli.mlx_doctor import doctor, machine_json, mlx_settings
from forebay.cli.models import Bar
from forebay.cli.problems import ExitCode, Problem
from forebay.mlx_service import bench as benches
from forebay.mlx_service import machine as machines
from forebay.mlx_service import requirements, tuning
from forebay.mlx_service.bench import Best, Plan, Point, Step
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.fetch import Progress
from forebay.mlx_service.machine import Machine
from forebay.mlx_service.tuning import Measured

mlx = typer.Typer(no_args_is_help=True, help="Look at MLX on this machine, and measure it.")
mlx.command()(doctor)

_KINDS = {benches.PREFILL: "reading, tokens a step", benches.DECODE: "writing, replies at once"}

NOISY = 0.2
"""Spread of the rounds above which figures tell little."""


def _numbers(text: str, option: str, *, least: int, most: int) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise Problem(f"{option} {text}: write numbers such as 128,512", code=ExitCode.USAGE) from error
    if numbers[0] < least or numbers[-1] > most:
        raise Problem(f"{option} {text}: numbers must be from {least} to {most}", code=ExitCode.USAGE)
    return numbers


@mlx.command()
@command.command
def bench(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Model, by name or by its folder. Empty takes the default model."),
    ] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "128,512,2048",
    chunks: Annotated[
        str, typer.Option(help="Tokens of a prompt read in one step.")
    ] = "64,128,256,512,1024,2048",
    widths: Annotated[str, typer.Option(help="Replies at once.")] = "1,2,4,8,16",
    tokens: Annotated[int, typer.Option(min=2, max=4096, help="Tokens that each reply writes.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often everything is measured.")] = 3,
    write: Annotated[
        bool, typer.Option("--write", help="Write what is best to the profile file, for the service to use.")
    ] = False,
    config: command.Config = None,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Measure how fast a model reads and writes here, and find the best chunk and width."""
    plan = Plan(
        lengths=_numbers(lengths, "--lengths", least=16, most=1 << 20),
        chunks=_numbers(chunks, "--chunks", least=16, most=4096),
        widths=_numbers(widths, "--widths", least=1, most=64),
        tokens=tokens,
        rounds=rounds,
    )
    if missing := requirements.missing():
        raise Problem("MLX cannot be measured here", remedy=missing, code=ExitCode.UNAVAILABLE)
    settings = mlx_settings(config)
    machine = machines.probe()
    name, points = command.run(_measure(settings, machine, model or settings.default_model, plan))
    best = benches.best(points)
    written = tuning.profile_file(settings) if write else None
    if written is not None:
        _write(written, machine, name, best)
    if as_json:
        print(json.dumps(_plain(machine, name, points, best, written), ensure_ascii=False))
    else:
        _show(machine, name, points, best, written)


async def _measure(
    settings: MlxSettings, machine: Machine, model: str, plan: Plan
) -> tuple[str, list[Point]]:
    reserve = tuning.choose(machine, settings).memory_reserve.value
    bar = Bar(render.err(), "measuring")
    try:

        def convert(step: Progress) -> None:
            bar.update(step.what, step.done / step.total if step.total else None)

        def show(step: Step) -> None:
            bar.update(step.what, step.fraction)

        name, folder = await benches.find_model(settings, model, convert)
        ceiling = settings.memory_ceiling or tuning.ceiling(machine, reserve)
        return name, await benches.measure(folder, plan, settings=settings, ceiling=ceiling, on_step=show)
    finally:
        bar.close()


def _write(path: Path, machine: Machine, model: str, best: Best) -> None:
    measured = Measured(
        chip=machine.chip,
        memory_bytes=machine.memory_bytes,
        model=model,
        mlx_version=importlib.metadata.version("mlx"),
        mlx_lm_version=importlib.metadata.version("mlx-lm"),
        time=datetime.now(UTC),
        prefill_chunk_token_count=best.chunk.size,
        prefill_rate=best.chunk.rate,
        max_rows=best.rows.size,
        rows_ratio=best.rows_ratio,
    )
    try:
        tuning.write_measured(path, measured)
    except OSError as error:
        raise Problem(
            f"{path} cannot be written: {error.strerror}", remedy="set [mlx] profile_file to another place"
        ) from error


def _plain(
    machine: Machine, model: str, points: Sequence[Point], best: Best, written: Path | None
) -> dict[str, object]:
    return {
        "machine": machine_json(machine),
        "model": model,
        "points": [
            {
                "kind": point.kind,
                "prompt_token_count": point.length,
                "size": point.size,
                "tokens_per_second": point.rate,
                "rounds": list(point.rates),
                "ratio": benches.ratio(point, points),
            }
            for point in points
        ],
        "best": {
            "prefill_chunk_token_count": best.chunk.size,
            "max_rows": best.rows.size,
            "rows_ratio": best.rows_ratio,
        },
        "written": str(written) if written is not None else None,
    }


def _table(points: Sequence[Point], best: Best, kind: str) -> Table:
    grid = render.grid()
    grid.add_column(_KINDS[kind], justify="right")
    for heading in ("prompt", "tokens/s", "spread", "ratio"):
        grid.add_column(heading, justify="right")
    for point in points:
        if point.kind == kind:
            style = "bold green" if point in {best.chunk, best.rows} else ""
            grid.add_row(
                Text(str(point.size), style=style),
                str(point.length),
                Text(f"{point.rate:.1f}", style=style),
                Text(f"{point.spread:.0%}", style="yellow" if point.spread > NOISY else ""),
                f"{benches.ratio(point, points):.2f}",
            )
    return grid


def _show(machine: Machine, model: str, points: Sequence[Point], best: Best, written: Path | None) -> None:
    console = render.out()
    console.print(f"{render.safe(model)} on {render.safe(machine.title)}", markup=False, soft_wrap=True)
    for kind in (benches.PREFILL, benches.DECODE):
        console.print()
        render.show_table(console, _table(points, best, kind))
    console.print()
    console.print(
        f"best: prefill_chunk_token_count = {best.chunk.size}, max_rows = {best.rows.size} "
        f"({best.rows_ratio:.1f} times the tokens of one reply)",
        markup=False,
        soft_wrap=True,
    )
    if any(point.spread > NOISY for point in points):
        render.note("rounds differ a lot: something else keeps this machine busy", style="yellow")
    if written is not None:
        console.print(
            f"written to {written}; the service uses it from its next start", markup=False, soft_wrap=True
        )
    else:
        render.note("--write makes the service use this")
