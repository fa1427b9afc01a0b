"""What the machine has: its memory, what a process holds of it, and which machine it is."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from forebay.mlx_service.models.describe import NotAModelError, describe

_GIB = 1 << 30

RESERVED_SHARE = 0.35
"""Share of a machine's memory that is left to everything else, within the bounds below."""

RESERVED_LEAST = 2 * _GIB
RESERVED_MOST = 12 * _GIB

METAL_SHARE = 0.95
"""Share of what Metal recommends to use at most. Beyond it macOS begins to take memory from others."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_USAGE_VERSION = 4
_FOOTPRINT = 9
"""Place of `ri_phys_footprint` among the 64-bit numbers of macOS's `rusage_info_v4`: after 16 bytes of uuid
come user time, system time, two counts of wake-ups, page-ins, wired size and resident size, then this."""


def usual_reserve(total: int) -> int:
    """Returns the bytes of a machine's memory that are left to everything but models."""
    return min(max(int(total * RESERVED_SHARE), RESERVED_LEAST), RESERVED_MOST)


def default_ceiling(total: int, metal: int | None = None, *, reserve: int | None = None) -> int:
    """Returns how much memory models and their requests may take on a machine.

    Args:
        total: bytes of memory that it has.
        metal: bytes that Metal recommends to use at most.
        reserve: bytes that are left to everything else; None is what is usual.
    """
    reserved = usual_reserve(total) if reserve is None else reserve
    ceiling = max(total - reserved, total // 4)
    return ceiling if metal is None else min(ceiling, int(metal * METAL_SHARE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine. Everything may be asked at any time and costs microseconds."""

    identity: str
    """The same for all processes of one running machine, those in containers too, and no other's."""
    total: int
    """Bytes of memory it has."""
    available: Callable[[], int]
    """Returns the bytes that could be taken now without harm."""
    footprint: Callable[[int], int]
    """Returns the bytes that a process holds and that come back when it ends; 0 if it is gone."""
    children: Callable[[int], list[int]] = lambda pid: []
    """Returns the processes that a process has started. It alone takes milliseconds."""


def this_host() -> Host:
    """Returns the machine that this process runs on."""
    return Host(
        identity=_identity(),
        total=psutil.virtual_memory().total,
        available=lambda: int(psutil.virtual_memory().available),
        footprint=footprint,
        children=children,
    )


def footprint(pid: int) -> int:
    """Returns the bytes that a process holds and that come back when it ends; 0 if it is gone.

    The resident size would not do: it misses what Metal holds on macOS, and
    counts libraries that other processes share on Linux.
    """
    held = _linux_footprint(pid) if sys.platform == "linux" else _mac_footprint(pid)
    if held is not None:
        return held
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started and that still run."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def weights_in(folder: Path) -> tuple[int, int]:
    """Returns the bytes of a model's weights as they are stored, and unpacked to float32; 0 is unknown.

    What they take in memory is one or the other, near enough.
    """
    try:
        facts = describe(folder)
    except NotAModelError:  # its worker says why
        return 0, 0
    return facts.weight_bytes, 4 * facts.parameter_count


def _linux_footprint(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    held = [int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in fields]
    return sum(held) * 1024 if held else None  # a zombie has none of them


def _mac_footprint(pid: int) -> int | None:
    query = _mac_query()
    if query is None:
        return None
    usage = (ctypes.c_uint64 * 64)()  # more than any version of the structure takes
    return int(usage[_FOOTPRINT]) if query(pid, _USAGE_VERSION, usage) == 0 else None


@functools.lru_cache(maxsize=1)
def _mac_query() -> Callable[..., int] | None:
    try:
        query: Callable[..., int] = ctypes.CDLL("libproc.dylib").proc_pid_rusage
    except (OSError, AttributeError):
        return None
    return query


def _identity() -> str:
    """Returns a digest of what names this run of the machine: containers have host names of their own."""
    try:
        name = _BOOT.read_text().strip()
    except OSError:
        name = f"{uuid.getnode()} {psutil.boot_time():.0f}"
    return hashlib.sha256(f"forebay host {name}".encode()).hexdigest()[:16]
