"""Waits between attempts: each twice as long as the last, and partly random."""

from __future__ import annotations

import random
from datetime import timedelta

_MOST_DOUBLINGS = 32
"""Beyond this the longest wait was reached long ago; it keeps the power of two a small number."""


class Backoff:
    """Counts attempts and says how long to wait after each.

    Args:
        shortest: the first wait.
        longest: no wait is longer.
        jitter: share of each wait that is random, in [0.0, 1.0]. Waits only ever get shorter by it, so
            `longest` holds.
        source: where randomness comes from.
    """

    def __init__(
        self, shortest: timedelta, longest: timedelta, *, jitter: float = 0.5, source: random.Random
    ) -> None:
        self._shortest = shortest.total_seconds()
        self._longest = longest.total_seconds()
        self._jitter = jitter
        self._source = source
        self._count = 0

    @property
    def count(self) -> int:
        """Waits since the last reset."""
        return self._count

    def next(self) -> float:
        """Returns the next wait in seconds."""
        wait = min(self._longest, self._shortest * 2.0 ** min(self._count, _MOST_DOUBLINGS))
        self._count += 1
        return wait * (1.0 - self._jitter * self._source.random())

    def reset(self) -> None:
        """Begins again with the shortest wait."""
        self._count = 0
