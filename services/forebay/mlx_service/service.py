"""Puts the MLX service together and serves it until the process is asked to stop."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from forebay.kit import process
from forebay.kit.server import Serving, serving
from forebay.kit.telemetry import Telemetry
from forebay.mlx_service import machine, smg, smg_api, tuning
from forebay.mlx_service.companions import Companions
from forebay.mlx_service.config import DIGESTS, MlxSettings
from forebay.mlx_service.front import MlxEngine
from forebay.mlx_service.ollama_store import ollama_folder
from forebay.mlx_service.process import Launcher
from forebay.mlx_service.registry import Imports, Registry, Root, hub_cache_dir
from forebay.mlx_service.supervisor import Supervisor

logger = logging.getLogger(__name__)


async def serve(settings: MlxSettings, telemetry: Telemetry) -> None:
    """Serves until the process is asked to stop. Health says SERVING once the models of the start are loaded.

    A model of the start that cannot be loaded does not keep the service from
    serving the others; it is listed with its reason.
    """
    settings = await asyncio.to_thread(tuned, settings)
    interface = smg_api.api() if settings.smg else None
    registry = Registry(
        roots(settings), aliases=settings.aliases, imports=Imports(settings.cache_dir / "imports")
    )
    companions = Companions(settings, registry)
    launcher = Launcher(
        name=settings.name,
        arguments=worker_arguments(settings),
        environment=settings.worker_environment,
        grace=settings.stop_grace.total_seconds(),
        more=lambda spec: [*model_arguments(settings, spec.model_id, interface), *companions.arguments(spec)],
    )
    try:
        async with (
            Supervisor(
                settings, launch=launcher, measured=telemetry.metrics, beside=companions.draft
            ) as supervisor,
            MlxEngine(
                settings,
                registry=registry,
                companions=companions,
                supervisor=supervisor,
                hub_cache=hub_folder(settings),
            ) as engine,
            serving(
                settings,
                inference=engine,
                models=engine,
                more=[smg.register(interface, engine, settings.smg, settings.name)] if interface else [],
                telemetry=telemetry,
            ) as server,
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


def tuned(settings: MlxSettings) -> MlxSettings:
    """Returns the settings with what suits this machine where nothing is configured."""
    profile = tuning.choose(machine.probe(thorough=False), settings)
    for complaint in profile.complaints:
        logger.warning("%s", complaint)
    found = ", ".join(f"{name} {each.value} ({each.source.value})" for name, each in profile.values().items())
    logger.info("profile %s: %s", profile.name, found)
    return profile.apply(settings)


def roots(settings: MlxSettings) -> list[Root]:
    """Returns where models are looked for; of two with one name the earlier is served."""
    found = [Root(path=path.expanduser(), required=True) for path in settings.model_folders]
    found.append(Root(path=settings.cache_dir / "models", removable=True))
    found.append(Root(path=hub_folder(settings), hub=True, removable=True))
    if settings.ollama_models:
        folder = settings.ollama_folder.expanduser() if settings.ollama_folder else ollama_folder()
        found.append(Root(path=folder, ollama=True, required=settings.ollama_folder is not None))
    return found


def hub_folder(settings: MlxSettings) -> Path:
    """Returns where models of the hub are kept: with those of other programs, or apart from them."""
    return hub_cache_dir() if settings.huggingface_cache else settings.cache_dir / "hub"


def model_arguments(settings: MlxSettings, model_id: str, interface: smg_api.Api | None) -> list[str]:
    """Returns the command-line arguments that only the worker of one model gets."""
    shards = settings.shards.get(model_id)
    arguments = [] if shards is None else ["--shards", shards.model_dump_json()]
    if interface is not None and model_id == settings.aliases.get(settings.smg, settings.smg):
        arguments.append(smg_api.WORKER_FLAG)
    return arguments


def worker_arguments(settings: MlxSettings) -> list[str]:
    """Returns the command-line arguments that all workers get."""
    arguments = ["--prefix-cache", str(settings.prefix_cache_bytes)]
    arguments += ["--digests", str(settings.cache_dir / DIGESTS)]
    if settings.prefix_disk_bytes:
        folder = settings.prefix_disk_folder or settings.cache_dir / "prefixes"
        arguments += ["--prefix-disk", str(folder.expanduser())]
        arguments += ["--prefix-disk-bytes", str(settings.prefix_disk_bytes)]
        arguments += ["--prefix-disk-write", settings.prefix_disk_write]
    for flag, value in (
        ("--max-rows", settings.max_rows),
        ("--prefill-chunk", settings.prefill_chunk_token_count),
        ("--cache-limit", settings.cache_limit),
        ("--wired-limit", settings.wired_limit),
    ):
        if value is not None:
            arguments += [flag, str(value)]
    if settings.prompt_lookup:
        arguments.append("--prompt-lookup")
    if settings.auth_token_digests or settings.tls_client_roots is not None:
        arguments.append("--isolate-callers")
    if settings.default_max_output_token_count is not None:
        arguments += ["--default-max-tokens", str(settings.default_max_output_token_count)]
    if settings.cpu_weights != "auto":
        arguments += ["--cpu-weights", settings.cpu_weights]
    return arguments
