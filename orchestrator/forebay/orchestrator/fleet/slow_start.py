"""Gives a backend that was ejected its share of the calls back little by little.

It comes back with cold caches and perhaps half started. Given all its calls at
once, it may fail again under what it could carry a few seconds later.
"""

from __future__ import annotations

from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import SlowStartSettings


class SlowStart:
    """The share of one backend, as it grows in equal steps of time.

    Args:
        settings: how long it grows, and from where.
        clock: gives the time in seconds.
    """

    def __init__(self, settings: SlowStartSettings, *, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._began: float | None = None

    def begin(self) -> None:
        """Notes that it has come back."""
        self._began = self._clock()

    @property
    def share(self) -> float:
        """Part of its full share that it should get now, in (0.0, 1.0]."""
        if self._began is None:
            return 1.0
        window, elapsed = self._settings.window.total_seconds(), self._clock() - self._began
        if elapsed >= window:
            self._began = None
            return 1.0
        return self._settings.share + (1.0 - self._settings.share) * elapsed / window
