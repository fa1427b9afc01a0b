"""The retry budget: how many attempts beyond the first all calls together may make.

Attempts counted by call would multiply an overload by their number; a share of
the traffic cannot. Two purses, for two needs: one fills with traffic, the other
with time, so that an orchestrator with one call a minute can still move it.
"""

from __future__ import annotations

from forebay.orchestrator.clock import Clock

_EARNED_MOST = 100.0
"""Most retries that traffic saves up. A backend that dies takes its calls in flight with it, and they all
move at once: with 0.2 a call this covers the last 500 calls, and is nothing an overload could live on."""


class RetryBudget:
    """Allows retries within a share of calls plus a number a second.

    In any stretch of `t` seconds in which `n` calls came, at most
    `ratio * n + per_second * (t + 1) + 100` retries are allowed.

    Args:
        ratio: retries earned by each call.
        per_second: retries that time alone brings.
        clock: gives the time in seconds.
    """

    def __init__(self, *, ratio: float, per_second: float, clock: Clock) -> None:
        self._ratio = ratio
        self._per_second = per_second
        self._clock = clock
        self._earned = 0.0
        self._free = per_second
        self._seen = clock()

    def change(self, *, ratio: float, per_second: float) -> None:
        """Goes by other shares from now on. What was saved up stays."""
        self._ratio, self._per_second = ratio, per_second

    def deposit(self) -> None:
        """Notes that a call came."""
        self._earned = min(_EARNED_MOST, self._earned + self._ratio)

    def withdraw(self) -> bool:
        """Takes one retry. Returns False, and takes nothing, if there is none."""
        now = self._clock()
        self._free = min(self._per_second, self._free + (now - self._seen) * self._per_second)
        self._seen = now
        # Time's purse first: it is refilled anyway, while what traffic earned stays for a bad moment.
        if self._free >= 1.0:
            self._free -= 1.0
            return True
        if self._earned >= 1.0:
            self._earned -= 1.0
            return True
        return False
