"""How a service process starts and ends: settings, logs, telemetry, serve, drain.

Exit codes follow sysexits.h: 64 for a wrong configuration, 69 where something
that is needed is missing or taken, 70 for a fault of ours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar, cast

from forebay.kit import logs, telemetry
from forebay.kit.config import ConfigError, ServerSettings, Settings, find_file, load
from forebay.kit.logs import LogSettings
from forebay.kit.server import StartError
from forebay.kit.telemetry import Telemetry, TelemetrySettings

EX_USAGE = 64
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70

STDIN_VARIABLE = "FOREBAY_EXIT_ON_STDIN_EOF"
"""If set to 1, the end of standard input stops the process. A supervisor holds the other end of the pipe, so
that its death, however sudden, leaves no orphan on any system."""


class Configuration:
    """The configuration that this process was started with, to be read again while it runs.

    Args:
        sections: the type of each section that is wanted, by name.
        path: the file that was named; None looks for one.
    """

    def __init__(self, sections: Mapping[str, type[Settings]], path: Path | None) -> None:
        self._sections = dict(sections)
        # The folder is that of the start, whatever becomes of the working directory.
        self._path = path.absolute() if path is not None else None
        self.first: dict[str, Settings] = {}
        """What was read first, and is in effect where nobody applied anything since."""

    @property
    def path(self) -> Path | None:
        """The file that would be read now; None if there is none."""
        return self._path or find_file()

    def read(self) -> dict[str, Settings]:
        """Reads and checks everything again, as at the start.

        Raises:
            ConfigError: with every mistake.
        """
        sections = load(self._sections, path=self._path)
        self.first = self.first or sections
        return sections


_CONFIGURATION: ContextVar[Configuration | None] = ContextVar("configuration", default=None)
_STOPPED: ContextVar[asyncio.Event] = ContextVar("stopped")

SettingsT = TypeVar("SettingsT", bound=ServerSettings)


def main(
    service: str,
    settings_type: type[SettingsT],
    serve: Callable[[SettingsT, Telemetry], Awaitable[None]],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a service process from its command line and returns its exit code.

    Args:
        service: name of the service and of its section in the configuration.
        settings_type: type of that section.
        serve: serves, and returns after `until_stopped` has.
        argv: the command line, without the program's name; None takes the process's own.
    """
    arguments = _parse(service, argv)
    if arguments.address:
        os.environ[f"FOREBAY_{service.upper()}__ADDRESS"] = arguments.address
    configuration = Configuration(
        {service: settings_type, "log": LogSettings, "telemetry": TelemetrySettings}, arguments.config
    )
    try:
        sections = configuration.read()
    except ConfigError as error:
        for line in error.lines:
            print(line, file=sys.stderr)  # noqa: T201 - there is no log yet, and people read this
        return EX_USAGE
    _CONFIGURATION.set(configuration)
    logs.setup(cast("LogSettings", sections["log"]), service=service)
    settings = cast("SettingsT", sections[service])
    try:
        tracing = _telemetry(service, settings, cast("TelemetrySettings", sections["telemetry"]))
    except OSError as error:
        where = f"metrics_address {settings.metrics_address}"
        print(f"forebay {service}: {where} cannot be bound: {error}", file=sys.stderr)  # noqa: T201 - one readable line, not a log record
        return EX_UNAVAILABLE
    try:
        asyncio.run(_serve(serve(settings, tracing)))
    except StartError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"forebay {service}: {error}", file=sys.stderr)  # noqa: T201 - one readable line, not a log record
        return EX_UNAVAILABLE
    except Exception:
        logging.getLogger(__name__).exception("forebay %s stops because of a fault of its own", service)
        return EX_SOFTWARE
    finally:
        tracing.shutdown()
    return 0


def _telemetry(service: str, settings: ServerSettings, wanted: TelemetrySettings) -> Telemetry:
    if wanted.otlp_endpoint:
        # Processes started from here, such as a model's worker, may find another file, or none.
        os.environ["FOREBAY_TELEMETRY__OTLP_ENDPOINT"] = wanted.otlp_endpoint
    return telemetry.setup(
        f"forebay-{service}",
        wanted,
        metrics_address=settings.metrics_address,
        metrics_hosts=settings.metrics_hosts,
    )


async def _serve(served: Awaitable[None]) -> None:
    # What was imported stays for ever. A full collection would walk all of it, for tens of milliseconds, in
    # the middle of somebody's reply.
    gc.collect()
    gc.freeze()
    # From the first moment on: a supervisor may change its mind before the port is bound.
    async with stop_requests() as stopped:
        _STOPPED.set(stopped)
        await served


def announce(service: str, address: str) -> None:
    """Says on standard output that the service listens, for supervisors and tests that wait for it."""
    print(f"forebay {service} listening on {address}", flush=True)  # noqa: T201 - the line is an interface


def configuration() -> Configuration | None:
    """Returns the configuration that `main` was started with; None outside of it."""
    return _CONFIGURATION.get()


async def until_stopped() -> None:
    """Returns when the process is asked to stop: SIGTERM, SIGINT, or the end of a supervisor's pipe.

    Inside `main` a request counts from the process's first moment on, elsewhere from this call on.
    """
    stopped = _STOPPED.get(None)
    if stopped is not None:
        await stopped.wait()
        return
    async with stop_requests() as stopped:
        await stopped.wait()


@contextlib.asynccontextmanager
async def stop_requests() -> AsyncIterator[asyncio.Event]:
    """Gives an event that is set when the process is asked to stop, for as long as the block runs."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stopped.set)
    watches_stdin = os.environ.get(STDIN_VARIABLE) == "1"
    if watches_stdin:
        loop.add_reader(sys.stdin.fileno(), _read_stdin, loop, stopped)
    try:
        yield stopped
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        if watches_stdin:
            loop.remove_reader(sys.stdin.fileno())


def _read_stdin(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        stopped.set()


def _parse(service: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"forebay-{service}", description=f"Runs Forebay's {service} process."
    )
    parser.add_argument(
        "--config", type=Path, help="configuration file; default: forebay.toml here or in the user's"
    )
    parser.add_argument("--address", help="address to listen on, instead of the configured one")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors at start")
    return parser.parse_args(argv)
