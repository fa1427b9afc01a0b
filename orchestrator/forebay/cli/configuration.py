"""`forebay config`: is the configuration right, what is it, and where is it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from forebay.cli import command, render, settings
from forebay.cli.problems import ExitCode, Problem
from forebay.kit.config import FILE_NAME, Settings, find_file

config = typer.Typer(no_args_is_help=True, help="Check, show and find the configuration.")

_SECRETS = frozenset({"api_key", "api_token", "token", "headers"})
"""Keys whose values are never shown."""


@config.command()
@command.command
def check(file: command.Config = None, debug: command.Debug = False) -> None:
    """Check every section, and say every mistake at once."""
    settings.read(file)
    path = file or find_file()
    where = str(path) if path is not None else "no file, all defaults"
    render.out().print(f"the configuration is right ({where})", markup=False, soft_wrap=True)


@config.command()
@command.command
def show(
    section: Annotated[str, typer.Argument(help="One section only.")] = "",
    file: command.Config = None,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> None:
    """Show the configuration that is in force, with defaults, file and environment taken together."""
    sections = settings.read(file)
    if section and section not in sections:
        raise Problem(
            f"there is no section {section!r}", remedy=f"there are {', '.join(sections)}", code=ExitCode.USAGE
        )
    shown = {name: value for name, value in sections.items() if not section or name == section}
    plain = {name: _hidden(value.model_dump(mode="json")) for name, value in shown.items()}
    if as_json:
        print(json.dumps(plain))
        return
    console = render.out()
    for name, values in plain.items():
        console.print(f"[{name}]", style="bold", markup=False)
        _lines(shown[name], values)
        console.print()


def _hidden(values: Mapping[str, object]) -> dict[str, object]:
    return {key: "(hidden)" if key in _SECRETS and value else value for key, value in values.items()}


def _lines(section: Settings, values: Mapping[str, object]) -> None:
    console = render.out()
    for key, value in values.items():
        field = type(section).model_fields.get(key)
        mark = "" if key in section.model_fields_set else "  # default"
        console.print(f"{key} = {json.dumps(value)}{mark}", markup=False, soft_wrap=True)
        if field is not None and field.description and console.is_terminal:
            console.print(f"    {field.description}", style="dim", markup=False)


@config.command("path")
@command.command
def where(debug: command.Debug = False) -> ExitCode:
    """Print which file is read."""
    path: Path | None = find_file()
    if path is None:
        render.note(f"there is no {FILE_NAME}; every setting has its default")
        return ExitCode.NOT_FOUND
    print(path)
    return ExitCode.OK
