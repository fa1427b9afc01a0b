"""Measures a model on this machine, in a process of its own, and says what suits it. Imports no mlx.

Two things are measured: how fast a prompt is read, with chunks of several
sizes, and how fast replies are written, several at once. Of values that are
equally good the smallest is best: a shorter chunk makes others wait less, and
fewer rows take less memory.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forebay.kit.failure import BackendError, CapabilityUnsupported, ModelLoadFailed
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.fetch import Report
from forebay.mlx_service.models.describe import describe
from forebay.mlx_service.registry import Imports, Registry
from forebay.mlx_service.service import roots
from forebay.mlx_service.tool import run_tool

GOOD_ENOUGH = 0.95
"""Share of the best rate that is as good: two rounds of the same differ by as much."""

PREFILL = "prefill"
DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    lengths: tuple[int, ...] = (128, 512, 2048)
    """Tokens of the prompts."""
    chunks: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Tokens of a prompt read in one step."""
    widths: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Replies at once."""
    tokens: int = 32
    """Tokens written by each reply."""
    rounds: int = 3
    """How often everything is measured; rounds take turns, so that a slow moment hits all alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was measured with one set of figures."""

    kind: str
    """`prefill` or `decode`."""
    length: int
    """Tokens of each prompt."""
    size: int
    """Tokens of a chunk, or replies at once."""
    rates: tuple[float, ...]
    """Tokens a second, of all replies together, of each round."""

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """How far the rounds lie apart, as a share of the median."""
        return (max(self.rates) - min(self.rates)) / self.rate if self.rate else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """What suits the model on this machine."""

    chunk: Point
    rows: Point
    rows_ratio: float
    """How many times as many tokens a second as one reply alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far a benchmark is."""

    what: str
    fraction: float


def ratio(point: Point, points: Iterable[Point]) -> float:
    """Returns how many times as fast a point is as the smallest size of the same length."""
    same = [p for p in points if p.kind == point.kind and p.length == point.length]
    least = min(same, key=lambda p: p.size)
    return point.rate / least.rate if least.rate else 0.0


def best(points: Sequence[Point]) -> Best:
    """Returns what suits the model: the smallest sizes that are as good as the best.

    Chunks are judged with the longest prompts, where they matter, and so are rows.
    """
    chunk, rows = _best(points, PREFILL), _best(points, DECODE)
    return Best(chunk=chunk, rows=rows, rows_ratio=ratio(rows, points))


def _best(points: Sequence[Point], kind: str) -> Point:
    longest = max(point.length for point in points if point.kind == kind)
    tried = [point for point in points if point.kind == kind and point.length == longest]
    most = max(point.rate for point in tried)
    return min((p for p in tried if p.rate >= most * GOOD_ENOUGH), key=lambda p: p.size)


async def find_model(settings: MlxSettings, name: str, report: Report) -> tuple[str, Path]:
    """Returns a model's identifier and its folder, converting a GGUF file if that was not done yet.

    Args:
        settings: where models are looked for.
        name: an identifier, an alias, or the path of a folder.
        report: is told how far a conversion is.

    Raises:
        ModelNotFound: there is none of that name.
        ModelLoadFailed: it is broken.
        CapabilityUnsupported: it generates no text.
    """
    path = await asyncio.to_thread(_folder, name)
    if path is not None:
        id_, folder = path.name, path
    else:
        registry = Registry(
            roots(settings), aliases=settings.aliases, imports=Imports(settings.cache_dir / "imports")
        )
        entry = await registry.find(name)
        if entry.fault:
            raise ModelLoadFailed(f"{entry.id} cannot be loaded: {entry.fault}", metadata={"model": entry.id})
        id_, folder = entry.id, await registry.folder(entry, report)
    if describe(folder).recipe is not None:
        raise CapabilityUnsupported(f"{id_} embeds text: the benchmark needs a model that generates it")
    return id_, folder


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser().resolve()
    return path if (path / "config.json").is_file() else None


async def measure(
    folder: Path,
    plan: Plan,
    *,
    settings: MlxSettings,
    ceiling: int,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Point]:
    """Measures a model in a process of its own.

    Args:
        folder: the model.
        plan: what to measure.
        settings: how workers are to hold weights and to multiply.
        ceiling: bytes that the model and its replies may take; what could exceed it is left out.
        on_step: is told how far it is.

    Raises:
        BackendError: it could not be measured; the message says why.
    """
    points: list[Point] = []

    def on_line(line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:  # a library that prints: no word of ours
            return
        if "what" in event:
            on_step(Step(what=str(event["what"]), fraction=float(event["fraction"])))
        elif "kind" in event:
            points.append(
                Point(
                    kind=event["kind"],
                    length=event["length"],
                    size=event["size"],
                    rates=tuple(event["rates"]),
                )
            )

    argv = [sys.executable, "-m", "forebay.mlx_service.worker.bench", "--model", str(folder)]
    for flag, values in (("lengths", plan.lengths), ("chunks", plan.chunks), ("widths", plan.widths)):
        argv += [f"--{flag}", ",".join(str(value) for value in values)]
    argv += ["--tokens", str(plan.tokens), "--rounds", str(plan.rounds), "--ceiling", str(ceiling)]
    argv += ["--cpu-weights", settings.cpu_weights]
    ended = await run_tool(argv, env=settings.worker_environment, on_line=on_line)
    if ended.code:
        raise BackendError(f"the benchmark failed: {ended.last}")
    if not {PREFILL, DECODE} <= {point.kind for point in points}:
        raise BackendError(
            "there was nothing to measure: the context or the memory is too small for the lengths asked"
        )
    return points
