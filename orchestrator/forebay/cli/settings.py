"""The `[up]` section, and the table of the services that `forebay up` starts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from pydantic import Field

from forebay.cli.problems import ExitCode, Problem
from forebay.kit import config
from forebay.kit.config import ConfigError, Duration, Settings
from forebay.kit.logs import LogSettings
from forebay.kit.telemetry import TelemetrySettings


class UpSettings(Settings):
    """How `forebay up` starts and keeps the services."""

    services: tuple[str, ...] = Field(
        (),
        description="Services to start, such as `mlx` and `orchestrator`. Empty starts every one that is "
        "harmless without its framework, and `openai` where it is configured.",
    )
    ready_timeout: Duration = Field(
        timedelta(seconds=90),
        description="How long the services may take until the first one can serve. A first start compiles "
        "and loads the default model.",
    )
    fetch: bool = Field(
        True, description="Whether the embedded default model is fetched where it is missing."
    )
    require_backend: bool = Field(
        True,
        description="Whether to stop again where no backend can serve. False waits for one, as a machine's "
        "start-up wants it.",
    )
    restart_delay: Duration = Field(
        timedelta(milliseconds=500), description="Longest wait before the first restart of a crashed service."
    )
    restart_delay_limit: Duration = Field(
        timedelta(seconds=30),
        description="Longest wait before any restart. The wait doubles with each crash up to this.",
    )
    kill_after: Duration = Field(
        timedelta(seconds=40),
        description="How long a service may take to stop before it is killed. More than the services' own "
        "`grace` of 30 s, so that calls in progress can end.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service that `forebay up` can start."""

    name: str
    """Its section in the configuration, and its name in `--only`."""
    module: str
    """What `python -m` runs."""
    settings: str
    """Its settings, as `module:class`."""
    title: str
    """What it is, in a few words."""
    style: str
    """Colour of its lines."""


SERVICES: Mapping[str, Service] = {
    service.name: service
    for service in (
        Service(
            name="mlx",
            module="forebay.mlx_service",
            settings="forebay.mlx_service.config:MlxSettings",
            title="MLX in worker processes",
            style="magenta",
        ),
        Service(
            name="ollama",
            module="forebay.ollama_bridge",
            settings="forebay.ollama_bridge.config:OllamaSettings",
            title="bridge to Ollama",
            style="blue",
        ),
        Service(
            name="lmstudio",
            module="forebay.lmstudio_bridge",
            settings="forebay.lmstudio_bridge.config:LmStudioSettings",
            title="bridge to LM Studio",
            style="green",
        ),
        Service(
            name="openai",
            module="forebay.openai_bridge",
            settings="forebay.openai_bridge.config:OpenAiSettings",
            title="bridge to an OpenAI-compatible server",
            style="yellow",
        ),
        Service(
            name="orchestrator",
            module="forebay.orchestrator",
            settings="forebay.orchestrator.config:OrchestratorSettings",
            title="the one door",
            style="cyan",
        ),
    )
}
"""Every service, in the order they are started. The orchestrator is last, and stops first."""


def settings_types() -> dict[str, type[Settings]]:
    """Returns the type of every section of the configuration that this installation knows."""
    types: dict[str, type[Settings]] = {"up": UpSettings, "log": LogSettings, "telemetry": TelemetrySettings}
    for service in SERVICES.values():
        kind = _settings_type(service)
        if kind is not None:
            types[service.name] = kind
    return types


def _settings_type(service: Service) -> type[Settings] | None:
    module, _, name = service.settings.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return None  # a partial installation: the service is simply not there
        raise
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def read(path: Path | None) -> dict[str, Settings]:
    """Reads and checks the whole configuration.

    Raises:
        Problem: with every mistake, a line each.
    """
    try:
        return config.load(settings_types(), path=path)
    except ConfigError as error:
        count = len(error.lines)
        raise Problem(
            f"the configuration has {count} mistake{'' if count == 1 else 's'}",
            code=ExitCode.CONFIG,
            lines=error.lines,
        ) from error
