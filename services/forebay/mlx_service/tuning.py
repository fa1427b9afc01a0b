"""What suits the machine: a profile for its class, what was measured on it, and first what is configured.

A profile is a set of defaults, each with its reason. It is no more than a
sensible place to start: `forebay mlx bench --write` measures, and what it
writes goes before the class. What `[mlx]` says goes before everything.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.host import default_ceiling, usual_reserve
from forebay.mlx_service.machine import GIB, Machine, Tier

MIB = 1 << 20

FILE_NAME = "mlx-profile.json"
"""Name of the file with what was measured, in `cache_dir` where `profile_file` does not say another."""

ROWS = 8
"""Replies at once on all but small machines. Published measurements on several Macs gain up to 8 and lose
beyond 16 where replies are long."""

SMALL_ROWS = 4

SMALL = 16 * GIB
"""Memory below which a machine is small: an 8 GiB Mac lets the GPU use 5 of them, model included."""

CACHE_SHARE = 0.05
CACHE_LEAST = 512 * MIB
CACHE_MOST = 4 * GIB

_CHUNKS: Mapping[Tier, int] = {Tier.BASE: 512, Tier.PRO: 1024, Tier.MAX: 2048, Tier.ULTRA: 2048}

CPU_CHUNK = 512
"""More than 512 tokens at once hardly make a CPU faster."""


class Source(Enum):
    """Where a value comes from."""

    CLASS = "this class of machine"
    MEASURED = "measured here"
    CONFIGURED = "configured"


@dataclass(frozen=True, slots=True)
class Value:
    """A value and why it is this one."""

    value: int
    source: Source
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What suits a machine."""

    name: str
    """Class of the machine, such as `apple-max`."""
    prefill_chunk_token_count: Value
    """Most tokens of a prompt read in one step."""
    max_rows: Value
    """Most replies generated at once."""
    cache_limit: Value
    """Bytes of freed memory that MLX keeps for the next step."""
    memory_reserve: Value
    """Bytes of memory left to everything else."""
    wired_limit: Value
    """Bytes that macOS may not page out; 0 leaves it alone."""
    complaints: tuple[str, ...] = ()
    """What could not be used, and why."""

    def values(self) -> dict[str, Value]:
        """Returns the values by the names of their settings."""
        return {
            "prefill_chunk_token_count": self.prefill_chunk_token_count,
            "max_rows": self.max_rows,
            "cache_limit": self.cache_limit,
            "memory_reserve": self.memory_reserve,
            "wired_limit": self.wired_limit,
        }

    def apply(self, settings: MlxSettings) -> MlxSettings:
        """Returns the settings with the profile's values where nothing is configured."""
        return settings.model_copy(update={name: each.value for name, each in self.values().items()})


class Measured(BaseModel):
    """What a benchmark found on a machine: the content of a profile file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    chip: str
    memory_bytes: int
    model: str
    """The model it was measured with."""
    mlx_version: str = ""
    mlx_lm_version: str = ""
    time: datetime
    prefill_chunk_token_count: int = Field(ge=16, le=4096)
    prefill_rate: float = 0.0
    """Tokens a second read with it."""
    max_rows: int = Field(ge=1, le=64)
    rows_ratio: float = 0.0
    """How many times as many tokens a second as one row alone."""

    def misfit(self, machine: Machine) -> str:
        """Returns why it does not hold for a machine, empty if it does."""
        if self.chip != machine.chip or self.memory_bytes != machine.memory_bytes:
            size = f"{self.memory_bytes / GIB:.0f} GiB"
            return f"it was measured on another machine: {self.chip or 'an unknown chip'}, {size}"
        return ""


def profile_file(settings: MlxSettings) -> Path:
    """Returns where measurements are kept."""
    return (settings.profile_file or settings.cache_dir / FILE_NAME).expanduser()


def read_measured(path: Path, machine: Machine) -> tuple[Measured | None, str]:
    """Returns what was measured on this machine, and what is wrong with the file, if anything."""
    try:
        measured = Measured.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "its syntax"
        return None, f"{path} is ignored: {where} is wrong; `forebay mlx bench --write` writes it anew"
    misfit = measured.misfit(machine)
    return (None, f"{path} is ignored: {misfit}") if misfit else (measured, "")


def write_measured(path: Path, measured: Measured) -> None:
    """Writes a profile file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measured.model_dump(mode="json"), indent=1)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def choose(machine: Machine, settings: MlxSettings) -> Profile:
    """Returns what suits a machine: what is configured, else measured on it, else usual in its class."""
    measured, complaint = read_measured(profile_file(settings), machine)

    def value(name: str, usual: Value, found: Value | None = None) -> Value:
        configured = getattr(settings, name)
        if configured is not None:
            return Value(configured, Source.CONFIGURED, f"[mlx] {name} says so")
        return usual if found is None else found

    chunk = rows = None
    if measured is not None:
        where = (
            f"`forebay mlx bench` with {measured.model} on {measured.time:%Y-%m-%d}, {profile_file(settings)}"
        )
        chunk = Value(
            measured.prefill_chunk_token_count,
            Source.MEASURED,
            f"{measured.prefill_rate:.0f} tokens/s read: {where}",
        )
        rows = Value(
            measured.max_rows,
            Source.MEASURED,
            f"{measured.rows_ratio:.1f} times the tokens of one reply: {where}",
        )
    return Profile(
        name=class_of(machine),
        prefill_chunk_token_count=value("prefill_chunk_token_count", _chunk(machine), chunk),
        max_rows=value("max_rows", _rows(machine), rows),
        cache_limit=value("cache_limit", _cache_limit(machine)),
        memory_reserve=value("memory_reserve", _reserve(machine)),
        wired_limit=value("wired_limit", _WIRED),
        complaints=(complaint,) if complaint else (),
    )


def class_of(machine: Machine) -> str:
    """Returns the name of a machine's class."""
    if machine.tier is None:
        return "cpu"
    if machine.family == "A" or 0 < machine.memory_bytes < SMALL:
        return "apple-small"
    return f"apple-{machine.tier.name.lower()}"


def ceiling(machine: Machine, reserve: int) -> int:
    """Returns about how much memory models and requests may take. A running service knows it exactly."""
    return default_ceiling(machine.memory_bytes, machine.metal_bytes or None, reserve=reserve)


def _chunk(machine: Machine) -> Value:
    if machine.tier is None:
        return Value(CPU_CHUNK, Source.CLASS, "more make a CPU hardly faster, and each step long")
    if class_of(machine) == "apple-small":
        return Value(256, Source.CLASS, "longer steps take memory, which is scarce here")
    count = _CHUNKS[machine.tier]
    if machine.has_matrix_units:
        return Value(
            min(2048, count * 2), Source.CLASS, "each GPU core has matrix units, which long steps keep busy"
        )
    return Value(
        count,
        Source.CLASS,
        f"keeps the GPU of a {machine.tier.value} chip busy; slow models take shorter steps by themselves",
    )


def _rows(machine: Machine) -> Value:
    if class_of(machine) == "apple-small":
        return Value(SMALL_ROWS, Source.CLASS, "each reply takes memory, which is scarce here")
    return Value(ROWS, Source.CLASS, "wider batches gain little beyond 8, and lose where replies are long")


def _cache_limit(machine: Machine) -> Value:
    size = min(max(int(machine.memory_bytes * CACHE_SHARE), CACHE_LEAST), CACHE_MOST)
    return Value(
        size, Source.CLASS, "5 % of memory, at least 512 MiB and at most 4 GiB; unbound it takes all there is"
    )


def _reserve(machine: Machine) -> Value:
    return Value(
        usual_reserve(machine.memory_bytes),
        Source.CLASS,
        "35 % of memory, 2 to 12 GiB: for the system and other programs",
    )


_WIRED = Value(
    0,
    Source.CLASS,
    "never by itself: with several replies at once it has panicked macOS kernels",
)
