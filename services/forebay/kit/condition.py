"""What health says besides yes and no: whether a call would wait now, and whether calls end well of late.

A service that is down says NOT_SERVING for itself. One that is up but busy, or
up but failing, goes on saying SERVING, since calls may still be worth sending;
it says the rest under two names of their own, which any health client can ask
for or watch.
"""

from __future__ import annotations

from collections import deque

CAPACITY = "forebay.capacity"
"""Health name that is NOT_SERVING while calls wait for their turn: a new one would wait too."""

QUALITY = "forebay.quality"
"""Health name that is NOT_SERVING while it is degraded: too many calls fail through its own fault."""

WINDOW = 20
"""Latest calls that are looked at. Counted and not timed, so that a quiet hour heals nothing by itself."""

FEWEST = 5
"""Calls below which nothing is said: one failed call of one is no rate."""

SHARE = 0.5
"""Share of failed calls from which on a service is degraded. Less may be one bad model of several."""


class Condition:
    """Keeps what calls tell of a service."""

    def __init__(self) -> None:
        self._waiting: set[int] = set()
        self._failed: deque[bool] = deque(maxlen=WINDOW)

    def __repr__(self) -> str:
        words = [word for word, holds in (("busy", self.is_busy), ("degraded", self.is_degraded)) if holds]
        return f"<Condition {' '.join(words) or 'good'}>"

    @property
    def is_busy(self) -> bool:
        """Whether calls wait for their turn."""
        return bool(self._waiting)

    @property
    def is_degraded(self) -> bool:
        """Whether too many of the latest calls failed through the service's fault."""
        return len(self._failed) >= FEWEST and sum(self._failed) >= SHARE * len(self._failed)

    def wait(self, call: int) -> None:
        """A call waits for its turn."""
        self._waiting.add(call)

    def go_on(self, call: int) -> None:
        """A call no longer waits, because its turn came or because it is over."""
        self._waiting.discard(call)

    def end(self, *, failed: bool) -> None:
        """A call ended: well, or through the service's own fault. The caller's faults are not told here."""
        self._failed.append(failed)
