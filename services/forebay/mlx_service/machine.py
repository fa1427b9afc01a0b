"""Which machine this is, as far as MLX cares: its chip, its memory, and what limits both.

Readings are collected first and interpreted after, so that what a machine of
another kind says can be tried on any. No reading is trusted: one that is
missing or makes no sense becomes a complaint, and the machine is then judged
by what is left. Nothing here imports mlx.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TypeAlias

import psutil

GIB = 1 << 30

SECONDS = 10.0
"""How long one program may take to tell. `system_profiler` takes one or two on a machine that is busy."""

MOST_MEMORY = 64 << 40
"""More memory than this is a misreading."""

MOST_CORES = 1024

_SYSCTL = (
    "machdep.cpu.brand_string",
    "hw.model",
    "hw.memsize",
    "hw.perflevel0.physicalcpu",
    "hw.perflevel1.physicalcpu",
    "iogpu.wired_limit_mb",
    "sysctl.proc_translated",
    "kern.osproductversion",
)

_CHIP = re.compile(
    r"Apple (?P<family>[AM])(?P<generation>\d{1,2})(?: (?P<tier>Pro|Max|Ultra))?(?![A-Za-z0-9])"
)


class Tier(Enum):
    """How large a chip of its generation is."""

    BASE = "base"
    PRO = "Pro"
    MAX = "Max"
    ULTRA = "Ultra"


_BANDWIDTHS: Mapping[tuple[int, Tier], Sequence[tuple[int, int]]] = {
    (1, Tier.BASE): ((0, 68),),
    (1, Tier.PRO): ((0, 200),),
    (1, Tier.MAX): ((0, 400),),
    (1, Tier.ULTRA): ((0, 800),),
    (2, Tier.BASE): ((0, 100),),
    (2, Tier.PRO): ((0, 200),),
    (2, Tier.MAX): ((0, 400),),
    (2, Tier.ULTRA): ((0, 800),),
    (3, Tier.BASE): ((0, 100),),
    (3, Tier.PRO): ((0, 150),),
    (3, Tier.MAX): ((0, 300), (40, 400)),
    (3, Tier.ULTRA): ((0, 819),),
    (4, Tier.BASE): ((0, 120),),
    (4, Tier.PRO): ((0, 273),),
    (4, Tier.MAX): ((0, 410), (40, 546)),
    (5, Tier.BASE): ((0, 153),),
    (5, Tier.PRO): ((0, 307),),
    (5, Tier.MAX): ((0, 460), (40, 614)),
}
"""Memory bandwidth in GB/s as Apple gives it, by generation and tier, from so many GPU cores on."""

_A_SERIES_BANDWIDTH = 60
"""GB/s of an A18 Pro, the one chip of that family in a Mac."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What the machine says of itself, word for word. Empty or 0 is what it did not say."""

    system: str
    """As `sys.platform` has it."""
    architecture: str
    """As `platform.machine` has it."""
    sysctl: str = ""
    sw_vers: str = ""
    profiler: str = ""
    """Answer of `system_profiler -json SPDisplaysDataType`."""
    cpuinfo: str = ""
    """`/proc/cpuinfo`."""
    memory_bytes: int = 0
    """As psutil has it."""
    core_count: int = 0
    """As psutil has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine, as far as MLX cares."""

    system: str
    """`macOS`, `Linux` or what else it is."""
    version: tuple[int, ...] = ()
    """Version of macOS. Empty elsewhere, and where it is not known."""
    model: str = ""
    """Such as `Mac15,9`."""
    chip: str = ""
    """Name of the chip, as the machine says it."""
    family: str = ""
    """`M` or `A` for Apple's own chips, else empty."""
    generation: int = 0
    """Such as 3 for an M3; 0 where it is none of Apple's."""
    tier: Tier | None = None
    """None where it is none of Apple's."""
    memory_bytes: int = 0
    """0 is unknown."""
    gpu_core_count: int = 0
    """0 is unknown, or none that MLX uses."""
    performance_core_count: int = 0
    efficiency_core_count: int = 0
    wired_limit_bytes: int = 0
    """Memory that the GPU may use, as somebody set it with sysctl. 0 is macOS's own choice."""
    is_translated: bool = False
    """Whether this Python is for Intel and runs in translation."""
    complaints: tuple[str, ...] = ()
    """Readings that were missing or made no sense."""

    @property
    def is_apple(self) -> bool:
        """Whether it has a chip of Apple's own."""
        return self.tier is not None

    @property
    def has_matrix_units(self) -> bool:
        """Whether each GPU core has matrix units, which read prompts several times as fast."""
        return self.family == "M" and self.generation >= 5

    @property
    def bandwidth(self) -> int:
        """Memory bandwidth in GB/s, as the chip's maker gives it. 0 is unknown."""
        if self.family == "A":
            return _A_SERIES_BANDWIDTH
        if self.tier is None:
            return 0
        known = _BANDWIDTHS.get((self.generation, self.tier), ())
        return max((rate for cores, rate in known if self.gpu_core_count >= cores), default=0)

    @property
    def metal_bytes(self) -> int:
        """About how much memory macOS lets the GPU use. 0 is unknown, or there is no Metal.

        Metal alone says it exactly, to the worker: this is what it was seen to say on machines of each size.
        """
        if not self.is_apple:
            return 0
        if self.wired_limit_bytes:
            return self.wired_limit_bytes
        share = (2, 3) if self.memory_bytes < 36 * GIB else (3, 4)
        return self.memory_bytes * share[0] // share[1]

    @property
    def title(self) -> str:
        """The machine in a few words."""
        words = [self.chip or f"unknown {self.system} machine"]
        if self.gpu_core_count:
            words.append(f"{self.gpu_core_count} GPU cores")
        words.append(f"{self.memory_bytes / GIB:.0f} GiB" if self.memory_bytes else "memory unknown")
        if self.bandwidth:
            words.append(f"{self.bandwidth} GB/s")
        return ", ".join(words)


Run: TypeAlias = Callable[[Sequence[str]], str]
"""Runs a program and returns what it printed, empty where it cannot be run."""


def probe(*, thorough: bool = True) -> Machine:
    """Returns the machine this runs on. Never raises: what cannot be read is a complaint.

    Args:
        thorough: whether to ask for the GPU's cores too, which takes a second on macOS.
    """
    return interpret(collect(thorough=thorough))


def collect(
    *,
    thorough: bool = True,
    system: str = sys.platform,
    run: Run | None = None,
    cpuinfo: Path = Path("/proc/cpuinfo"),
) -> Readings:
    """Asks the machine. See `probe`."""
    readings = Readings(
        system=system,
        architecture=platform.machine(),
        memory_bytes=int(psutil.virtual_memory().total),
        core_count=psutil.cpu_count() or 0,
    )
    if system != "darwin":
        try:
            return replace(readings, cpuinfo=cpuinfo.read_text(errors="replace"))
        except OSError:
            return readings
    ask = run or _run
    return replace(
        readings,
        sysctl=ask(("/usr/sbin/sysctl", *_SYSCTL)),
        sw_vers=ask(("/usr/bin/sw_vers",)),
        profiler=ask(("/usr/sbin/system_profiler", "-json", "SPDisplaysDataType")) if thorough else "",
    )


def _run(argv: Sequence[str]) -> str:
    try:
        # sysctl says what it knows and then fails for what it does not, so the exit code tells nothing.
        done = subprocess.run(argv, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def interpret(readings: Readings) -> Machine:
    """Returns the machine that the readings are of."""
    if readings.system == "darwin":
        return _mac(readings)
    complaints = []
    name = next(iter(re.findall(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", readings.cpuinfo, re.M)), "")
    memory = _within(readings.memory_bytes, MOST_MEMORY)
    if not memory:
        complaints.append("how much memory there is cannot be read")
    return Machine(
        system="Linux" if readings.system.startswith("linux") else readings.system,
        chip=name.strip() or readings.architecture,
        memory_bytes=memory,
        performance_core_count=_within(readings.core_count, MOST_CORES),
        complaints=tuple(complaints),
    )


def _mac(readings: Readings) -> Machine:
    values = _pairs(readings.sysctl)
    complaints: list[str] = []

    def number(key: str, most: int, *, expected: bool = True) -> int:
        text = values.get(key, "")
        found = _within(int(text), most) if text.isascii() and text.isdigit() else 0
        if not found and (expected or text not in {"", "0"}):
            said = f"says {text[:40]!r}" if text else "says nothing"
            complaints.append(f"sysctl {key} {said}")
        return found

    name = values.get("machdep.cpu.brand_string", "")
    found = _CHIP.match(name)
    if found is None and not name.startswith("Intel"):
        complaints.append(
            f"the chip is called {name[:60]!r}, which is not known" if name else "the chip has no name"
        )
    family = found["family"] if found else ""
    memory = number("hw.memsize", MOST_MEMORY) or _within(readings.memory_bytes, MOST_MEMORY)
    version = values.get("kern.osproductversion") or _pairs(readings.sw_vers).get("ProductVersion", "")
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        complaints.append("the version of macOS cannot be read")
        version = ""
    wired = number("iogpu.wired_limit_mb", MOST_MEMORY >> 20, expected=False) << 20
    if memory and wired > memory:
        complaints.append("sysctl iogpu.wired_limit_mb is more than the machine has")
        wired = memory
    tier: Tier | None = None
    if found is not None:
        # An "A18 Pro" is a chip for phones: the word does not say there what it says of an M chip.
        tier = Tier(found["tier"]) if family == "M" and found["tier"] else Tier.BASE
    return Machine(
        system="macOS",
        version=tuple(int(part) for part in version.split(".")) if version else (),
        model=values.get("hw.model", ""),
        chip=name,
        family=family,
        generation=int(found["generation"]) if found else 0,
        tier=tier,
        memory_bytes=memory,
        gpu_core_count=_gpu_cores(readings.profiler, complaints) if found else 0,
        performance_core_count=number("hw.perflevel0.physicalcpu", MOST_CORES, expected=found is not None),
        efficiency_core_count=number("hw.perflevel1.physicalcpu", MOST_CORES, expected=False),
        wired_limit_bytes=wired,
        is_translated=values.get("sysctl.proc_translated") == "1" or name.startswith("VirtualApple"),
        complaints=tuple(complaints),
    )


def _gpu_cores(text: str, complaints: list[str]) -> int:
    if not text:
        return 0  # it was not asked for, or macOS took too long: chips are told apart without it
    try:
        displays = json.loads(text)["SPDisplaysDataType"]
        cores = max(
            (
                _within(int(display["sppci_cores"]), MOST_CORES)
                for display in displays
                if "sppci_cores" in display
            ),
            default=0,
        )
    except (ValueError, KeyError, TypeError):
        cores = 0
    if not cores:
        complaints.append("system_profiler does not say how many cores the GPU has")
    return cores


def _pairs(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def _within(value: int, most: int) -> int:
    return value if 0 < value <= most else 0
