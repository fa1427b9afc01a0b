"""Counts what a bridge does, for its own status line. Traces and metrics proper are the edge's work."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

_WINDOW = 256  # latest samples that quantiles are taken from: minutes of a busy bridge, 2 KiB


class Latency:
    """Quantiles of the latest samples, in seconds."""

    def __init__(self, window: int = _WINDOW) -> None:
        self._samples: deque[float] = deque(maxlen=window)
        self.count = 0
        """Samples so far."""

    def add(self, seconds: float) -> None:
        """Takes a sample."""
        self._samples.append(seconds)
        self.count += 1

    def quantile(self, q: float) -> float | None:
        """Returns the smallest sample that `q` of the samples do not exceed; None if there are none.

        Args:
            q: in [0.0, 1.0].
        """
        if not self._samples:
            return None
        ordered = sorted(self._samples)
        return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1))]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Figures at one moment."""

    outcomes: dict[str, int]
    """Calls by outcome: `ok`, `cancelled`, or the reason of a failure."""
    first_delta_median: float | None
    """Median seconds to the first delta of late, None if there was none."""
    whole_median: float | None
    """Median seconds of a whole call of late, None if there was none."""


class Stats:
    """Outcomes and latencies of one bridge."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self.first_delta = Latency()
        """Seconds to the first delta."""
        self.whole = Latency()
        """Seconds of calls that ended well."""

    def count(self, outcome: str) -> None:
        """Counts a call by its outcome."""
        self._outcomes[outcome] += 1

    def snapshot(self) -> Snapshot:
        """Returns the figures now."""
        return Snapshot(dict(self._outcomes), self.first_delta.quantile(0.5), self.whole.quantile(0.5))
