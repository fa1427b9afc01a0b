"""What every command shares: its common options, and the one place where a failure becomes an exit code."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from forebay.cli import problems, render
from forebay.cli.client import DEFAULT_ADDRESS
from forebay.cli.problems import ExitCode, Problem
from forebay.kit.failure import Failure

P = ParamSpec("P")
T = TypeVar("T")

Address = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        envvar="FOREBAY_ADDRESS",
        metavar="HOST:PORT",
        help="Orchestrator, or single backend, to talk to.",
        show_default=DEFAULT_ADDRESS,
    ),
]

Debug = Annotated[
    bool, typer.Option("--debug", envvar="FOREBAY_DEBUG", help="Show a traceback where something fails.")
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

Model = Annotated[
    str, typer.Option("--model", "-m", help="Model to use, in its framework's spelling. Empty picks one.")
]

BackendName = Annotated[str, typer.Option("--backend", "-b", help="Backend to use. Empty is any.")]

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="FOREBAY_CONFIG",
        metavar="FILE",
        help="Configuration file. Default: forebay.toml here, else in the user's configuration folder.",
    ),
]

Timeout = Annotated[
    float | None,
    typer.Option("--timeout", min=0.001, metavar="SECONDS", help="Most time for the whole call."),
]


def run(main: Coroutine[object, object, T]) -> T:
    """Runs a command's coroutine. Ctrl-C cancels it, so that its calls are cancelled too."""
    return asyncio.run(main)


def command(function: Callable[P, ExitCode | None]) -> Callable[P, None]:
    """Wraps a command so that it leaves with an exit code and a readable line, never with a traceback.

    With `--debug` the traceback is shown as well.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        code = ending(lambda: function(*args, **kwargs), debug=bool(kwargs.get("debug")))
        if code is not ExitCode.OK:
            raise typer.Exit(code)

    return wrapped


def ending(function: Callable[[], ExitCode | None], *, debug: bool) -> ExitCode:
    """Runs `function` and returns what the process should exit with, having said why."""
    try:
        code = function() or ExitCode.OK
        sys.stdout.flush()
    except (typer.Exit, typer.Abort):
        raise
    except Problem as problem:
        return _say(problem, debug=debug)
    except Failure as failure:
        return _say(problems.from_failure(failure), debug=debug)
    except BrokenPipeError:
        # What is still in Python's buffer would be written again at exit, and fail again, in plain sight.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.PIPE
    except KeyboardInterrupt:
        return ExitCode.CANCELLED
    except Exception as error:  # noqa: BLE001  # the last place where a fault of ours can be put into words
        text = str(error) or "no more is known"
        unexpected = Problem(
            f"unexpected {type(error).__name__}: {text}",
            remedy="" if debug else "--debug shows where",
            code=ExitCode.INTERNAL,
        )
        return _say(unexpected, debug=debug)
    return code


def _say(problem: Problem, *, debug: bool) -> ExitCode:
    if debug:
        traceback.print_exc()
    render.problem(problem)
    return problem.code
