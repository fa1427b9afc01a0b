"""The command line as a whole: which commands there are."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Annotated

import typer

from forebay.cli import command, render
from forebay.cli.chat import chat, embed
from forebay.cli.configuration import config
from forebay.cli.doctor import doctor
from forebay.cli.explain import explain
from forebay.cli.mlx import mlx
from forebay.cli.models import models
from forebay.cli.reload import reload
from forebay.cli.status import drain, resume, status
from forebay.cli.top.program import top
from forebay.cli.up import up

app = typer.Typer(
    name="forebay",
    no_args_is_help=True,
    # Failures are put into words by `command`; a traceback is shown where --debug asks for it.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(up)
app.command()(chat)
app.command()(embed)
app.command()(status)
app.command()(top)
app.command()(explain)
app.add_typer(models, name="models")
app.add_typer(mlx, name="mlx")
app.command()(drain)
app.command()(resume)
app.command()(reload)
app.add_typer(config, name="config")
app.command()(doctor)


@app.callback()
def root() -> None:
    """One gRPC door to every local LLM framework: MLX, Ollama, LM Studio and OpenAI-compatible servers."""


@app.command()
@command.command
def version(
    as_json: command.Json = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False,
) -> None:
    """Print the version of Forebay and of what it stands on."""
    versions = {"forebay": own_version(), "python": platform.python_version()}
    for package in ("grpcio", "protobuf", "mlx", "mlx-lm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if as_json:
        print(json.dumps(versions))
        return
    for package, number in versions.items():
        render.out().print(f"{package} {number}", markup=False)


def own_version() -> str:
    """Returns Forebay's version, or `unknown` where it runs from a folder that was not installed."""
    try:
        return importlib.metadata.version("forebay")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        app(sys.argv[1:] if argv is None else argv, prog_name="forebay")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    return 0
