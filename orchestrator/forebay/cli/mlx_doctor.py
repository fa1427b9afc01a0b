"""`forebay mlx doctor`: which machine this is to MLX, what was chosen for it and why, and what is wrong.

It only looks: it loads no model, changes nothing, and does not import mlx.
"""

from __future__ import annotations

import asyncio
import json

from rich.text import Text

from forebay.cli import command, render, settings
from forebay.cli.doctor import STYLES, Finding, Grade, look_at_mlx
from forebay.cli.problems import ExitCode
from forebay.kit.failure import Failure
from forebay.mlx_service import machine as machines
from forebay.mlx_service import requirements, tuning
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.machine import GIB, Machine
from forebay.mlx_service.registry import Entry, Imports, Registry
from forebay.mlx_service.service import roots
from forebay.mlx_service.tuning import Profile, Source

OLDEST_MACOS = (14,)
"""Oldest macOS that MLX is built for."""

WIRING_MACOS = (15,)
"""First macOS in which a process can wire memory for its GPU."""

MATRIX_MACOS = (26, 2)
"""First macOS in which MLX uses the matrix units of M5 chips."""

SYSTEM_BYTES = 3 * GIB
"""Memory that macOS needs for itself. With less it swaps whatever else is done."""

_COUNTS = {"prefill_chunk_token_count": "tokens", "max_rows": "at once"}


def look_at_machine(machine: Machine) -> list[Finding]:
    """Looks whether MLX can run well here."""
    found = [Finding(grade=Grade.GOOD, subject="machine", text=machine.title)]
    found += [
        Finding(grade=Grade.NOTE, subject="machine", text=f"{complaint}: it is judged without")
        for complaint in machine.complaints
    ]
    if machine.system != "macOS":
        found.append(
            Finding(
                grade=Grade.NOTE,
                subject="machine",
                text="MLX runs on the CPU here: to try things out",
            )
        )
        return found
    if machine.is_translated:
        found.append(
            Finding(
                grade=Grade.BROKEN,
                subject="python",
                text="this Python is for Intel and runs in translation, where MLX cannot run",
                remedy="install a Python for Apple silicon and make the environment anew",
            )
        )
    elif not machine.is_apple and machine.chip.startswith("Intel"):
        found.append(
            Finding(
                grade=Grade.BROKEN,
                subject="machine",
                text="MLX needs Apple silicon",
                remedy="use another backend here, such as Ollama",
            )
        )
    version = ".".join(str(part) for part in machine.version)
    if machine.version and machine.version < OLDEST_MACOS:
        found.append(
            Finding(
                grade=Grade.BROKEN,
                subject="macos",
                text=f"{version} is older than what MLX is built for",
                remedy="update macOS to 14 or newer",
            )
        )
    elif machine.has_matrix_units and machine.version and machine.version < MATRIX_MACOS:
        found.append(
            Finding(
                grade=Grade.WARNING,
                subject="macos",
                text=f"{version} leaves this chip's matrix units unused",
                remedy="update macOS to 26.2 or newer: prompts are read several times as fast",
            )
        )
    elif machine.version:
        found.append(Finding(grade=Grade.GOOD, subject="macos", text=version))
    return found


def look_at_limits(machine: Machine, profile: Profile) -> list[Finding]:
    """Looks at what bounds the memory."""
    reserve = profile.memory_reserve.value
    found = []
    if machine.metal_bytes:
        text = f"the GPU may use about {render.bytes_text(machine.metal_bytes)}"
        if machine.wired_limit_bytes:
            text += ", as sysctl iogpu.wired_limit_mb says"
        found.append(Finding(grade=Grade.GOOD, subject="memory", text=text))
    if machine.wired_limit_bytes > max(0, machine.memory_bytes - SYSTEM_BYTES) > 0:
        found.append(
            Finding(
                grade=Grade.WARNING,
                subject="memory",
                text=f"iogpu.wired_limit_mb leaves macOS less than {render.bytes_text(SYSTEM_BYTES)}",
                remedy="set it lower: sudo sysctl iogpu.wired_limit_mb=0 is macOS's own choice",
            )
        )
    wired = profile.wired_limit.value
    if wired and machine.is_apple:
        found.append(_wired(machine, profile))
    elif machine.is_apple:
        text = 'nothing is wired; [mlx] wired_limit = "8GiB" and max_rows = 1 keep a model in memory'
        found.append(Finding(grade=Grade.NOTE, subject="memory", text=text))
    elif wired:
        found.append(
            Finding(grade=Grade.NOTE, subject="memory", text="wired_limit does nothing without Metal")
        )
    if machine.memory_bytes and reserve >= machine.memory_bytes:
        found.append(
            Finding(
                grade=Grade.WARNING,
                subject="memory",
                text="memory_reserve is all there is: models get a quarter of the memory nevertheless",
                remedy="set [mlx] memory_reserve lower",
            )
        )
    return found


def _wired(machine: Machine, profile: Profile) -> Finding:
    wired = profile.wired_limit.value
    if machine.version and machine.version < WIRING_MACOS:
        return Finding(
            grade=Grade.WARNING,
            subject="memory",
            text="wired_limit does nothing before macOS 15",
            remedy="remove [mlx] wired_limit, or update macOS",
        )
    if wired > machine.metal_bytes:
        return Finding(
            grade=Grade.WARNING,
            subject="memory",
            text=f"wired_limit, {render.bytes_text(wired)}, is more than the GPU may use: workers will fail",
            remedy=f"set it to {render.bytes_text(machine.metal_bytes)} or less",
        )
    if profile.max_rows.value > 1:
        return Finding(
            grade=Grade.WARNING,
            subject="memory",
            text="wired memory and several replies at once have panicked macOS kernels",
            remedy="remove [mlx] wired_limit, or set max_rows = 1",
        )
    return Finding(
        grade=Grade.GOOD, subject="memory", text=f"{render.bytes_text(wired)} are wired, one reply at once"
    )


def look_at_models(
    machine: Machine, mlx: MlxSettings, profile: Profile, entries: dict[str, Entry]
) -> list[Finding]:
    """Looks whether the models of the start fit.

    Args:
        machine: the machine.
        mlx: the service's settings.
        profile: what was chosen.
        entries: those of the models that are on disk, by the name they are configured with.
    """
    ceiling = mlx.memory_ceiling or tuning.ceiling(machine, profile.memory_reserve.value)
    found = []
    for name in mlx.preloaded:
        entry = entries.get(name)
        if entry is None:
            text = f"{name} is not on disk yet: how much memory it takes is not known"
            found.append(Finding(grade=Grade.NOTE, subject="model", text=text))
            continue
        if entry.fault:
            text = f"{name} cannot be loaded: {entry.fault}"
            found.append(Finding(grade=Grade.WARNING, subject="model", text=text))
            continue
        size = entry.facts.weight_bytes if entry.facts is not None else entry.disk_bytes
        text = f"{name} takes {render.bytes_text(size)} of {render.bytes_text(ceiling)}"
        if size > ceiling:
            remedy = "use a smaller model or one with fewer bits"
            found.append(
                Finding(grade=Grade.WARNING, subject="model", text=f"{text}: it does not fit", remedy=remedy)
            )
            continue
        if machine.bandwidth and size:
            text += f"; one reply can have at most {machine.bandwidth * 10**9 / size:.0f} tokens/s"
        found.append(Finding(grade=Grade.GOOD, subject="model", text=text))
    sizes = [entry.disk_bytes for entry in entries.values() if not entry.fault]
    if machine.memory_bytes and sum(sizes) > ceiling and max(sizes, default=0) <= ceiling:
        found.append(
            Finding(
                grade=Grade.WARNING,
                subject="model",
                text=f"the models of the start take {render.bytes_text(sum(sizes))} together, more than "
                f"{render.bytes_text(ceiling)}",
                remedy="preload fewer, or set max_loaded_models = 1",
            )
        )
    return found


async def find_models(mlx: MlxSettings) -> dict[str, Entry]:
    """Returns those models of the start that are on disk, by the name they are configured with."""
    registry = Registry(roots(mlx), aliases=mlx.aliases, imports=Imports(mlx.cache_dir / "imports"))
    found = {}
    for name in mlx.preloaded:
        try:
            found[name] = await registry.find(name)
        except Failure:
            continue  # it is named as missing
    return found


@command.command
def doctor(
    config: command.Config = None, as_json: command.Json = False, debug: command.Debug = False
) -> ExitCode:
    """Show what MLX is to do on this machine, why, and what is wrong."""
    mlx = mlx_settings(config)
    machine = machines.probe()
    profile = tuning.choose(machine, mlx)
    package = look_at_mlx()
    if requirements.missing():  # for this command it is the one thing that matters
        package = Finding(grade=Grade.BROKEN, subject="mlx", text=package.text, remedy=package.remedy)
    findings = [*look_at_machine(machine), package, *look_at_limits(machine, profile)]
    findings += [Finding(grade=Grade.WARNING, subject="profile", text=text) for text in profile.complaints]
    findings += look_at_models(machine, mlx, profile, asyncio.run(find_models(mlx)))
    if as_json:
        print(json.dumps(_plain(machine, profile, findings), ensure_ascii=False))
    else:
        _show(profile, findings)
    broken = any(finding.grade is Grade.BROKEN for finding in findings)
    return ExitCode.FAILED if broken else ExitCode.OK


def mlx_settings(config: command.Config) -> MlxSettings:
    """Returns the settings of the MLX service.

    Raises:
        Problem: the configuration is wrong.
    """
    section = settings.read(config)["mlx"]
    assert isinstance(section, MlxSettings)
    return section


def machine_json(machine: Machine) -> dict[str, object]:
    """Returns a machine for programs."""
    return {
        "system": machine.system,
        "version": ".".join(str(part) for part in machine.version),
        "model": machine.model,
        "chip": machine.chip,
        "generation": machine.generation,
        "tier": machine.tier.value if machine.tier is not None else "",
        "memory_bytes": machine.memory_bytes,
        "metal_bytes": machine.metal_bytes,
        "gpu_core_count": machine.gpu_core_count,
        "performance_core_count": machine.performance_core_count,
        "efficiency_core_count": machine.efficiency_core_count,
        "bandwidth_gb_per_second": machine.bandwidth,
        "complaints": list(machine.complaints),
    }


def _plain(machine: Machine, profile: Profile, findings: list[Finding]) -> dict[str, object]:
    return {
        "machine": machine_json(machine),
        "profile": {
            "name": profile.name,
            "values": {
                name: {"value": each.value, "source": each.source.name.lower(), "reason": each.reason}
                for name, each in profile.values().items()
            },
        },
        "findings": [
            {"grade": f.grade.value, "subject": f.subject, "text": f.text, "remedy": f.remedy}
            for f in findings
        ],
    }


def value_text(name: str, value: int) -> str:
    """Returns a value of a profile with its unit."""
    if name in _COUNTS:
        return f"{value} {_COUNTS[name]}"
    return render.bytes_text(value) if value else "none"


_SOURCES = {Source.CLASS: "dim", Source.MEASURED: "green", Source.CONFIGURED: "cyan"}


def _show(profile: Profile, findings: list[Finding]) -> None:
    console = render.out()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.grade.value:<8}", style=STYLES[finding.grade])
        line.append(f"{finding.subject:<{width}}  ", style="bold")
        line.append(render.safe(finding.text), style="default")
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':<{width + 10}}do: {finding.remedy}", style="cyan"), soft_wrap=True)
    console.print()
    console.print(Text(f"profile {profile.name}", style="bold"))
    grid = render.grid()
    for heading in ("[mlx] setting", "value", "from", "why"):
        grid.add_column(Text(heading), overflow="fold")
    for name, each in profile.values().items():
        source = Text(each.source.value, style=_SOURCES[each.source])
        grid.add_row(name, value_text(name, each.value), source, Text(render.safe(each.reason)))
    render.show_table(console, grid)
