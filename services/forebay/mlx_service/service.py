"""Puts the MLX service together and serves it until the process is asked to stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

from forebay.kit import process
from forebay.kit.server import Serving, serving
from forebay.kit.telemetry import Telemetry
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.front import MlxEngine
from forebay.mlx_service.process import Launcher
from forebay.mlx_service.registry import Imports, Registry, Root, hub_cache_dir
from forebay.mlx_service.supervisor import Supervisor


async def serve(settings: MlxSettings, telemetry: Telemetry) -> None:
    """Serves until the process is asked to stop. Health says SERVING once the models of the start are loaded.

    A model of the start that cannot be loaded does not keep the service from
    serving the others; it is listed with its reason.
    """
    launcher = Launcher(
        name=settings.name,
        arguments=worker_arguments(settings),
        environment=settings.worker_environment,
        grace=settings.stop_grace.total_seconds(),
    )
    try:
        async with (
            Supervisor(settings, launch=launcher, measured=telemetry.metrics) as supervisor,
            MlxEngine(
                settings,
                registry=Registry(
                    roots(settings), aliases=settings.aliases, imports=Imports(settings.cache_dir / "imports")
                ),
                supervisor=supervisor,
                hub_cache=hub_folder(settings),
            ) as engine,
            serving(settings, inference=engine, models=engine, telemetry=telemetry) as server,
            process.stop_requests() as stopped,
        ):
            process.announce("mlx", server.address)
            async with asyncio.TaskGroup() as tasks:
                starting = tasks.create_task(_start(engine, server))
                await stopped.wait()
                starting.cancel()
    finally:
        launcher.close()


async def _start(engine: MlxEngine, server: Serving) -> None:
    await engine.preload()
    await server.set_ready(True)


def roots(settings: MlxSettings) -> list[Root]:
    """Returns where models are looked for; of two with one name the earlier is served."""
    found = [Root(path=path.expanduser(), required=True) for path in settings.model_folders]
    found.append(Root(path=settings.cache_dir / "models", removable=True))
    found.append(Root(path=hub_folder(settings), hub=True, removable=True))
    return found


def hub_folder(settings: MlxSettings) -> Path:
    """Returns where models of the hub are kept: with those of other programs, or apart from them."""
    return hub_cache_dir() if settings.huggingface_cache else settings.cache_dir / "hub"


def worker_arguments(settings: MlxSettings) -> list[str]:
    """Returns the command-line arguments that all workers get."""
    arguments = ["--max-rows", str(settings.max_rows)]
    arguments += ["--prefix-cache", str(settings.prefix_cache_bytes)]
    if settings.auth_token_digests or settings.tls_client_roots is not None:
        arguments.append("--isolate-callers")
    if settings.default_max_output_token_count is not None:
        arguments += ["--default-max-tokens", str(settings.default_max_output_token_count)]
    if settings.cpu_weights != "auto":
        arguments += ["--cpu-weights", settings.cpu_weights]
    return arguments
