"""The breaker: keeps calls away from what fails, and finds out when it works again.

Two conditions open it, because each is blind where the other sees. A run of
hard failures notices a backend that died, within a handful of calls; but one
success in between resets it, so a backend that fails every other call would
never be noticed. The success rate over a window notices that one, and says
nothing until it has seen enough calls.

"Busy" (RESOURCE_EXHAUSTED) opens nothing, for a backend that says so is alive.
It lowers `success_rate`, by which routing prefers others, since calls fare
better there; the condition over the window is asked of the other calls alone.
While the breaker tries whether the backend works again, busy means no.

What the caller did wrong, and calls that were broken off, count for nothing.

Nothing here waits. Openings end by the clock when somebody asks.
"""

from __future__ import annotations

import random
from collections import deque
from datetime import timedelta
from enum import Enum

from forebay.kit.failure import BackendBusy, Failure, Fault, MemoryExhausted, QueueFull
from forebay.orchestrator.backoff import Backoff
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import BreakerSettings

BUSY = (BackendBusy, MemoryExhausted, QueueFull)
"""Failures whose code is RESOURCE_EXHAUSTED."""


class BreakerState(Enum):
    """Where a breaker is in its life."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Permit:
    """One admitted call. Its outcome is told once; what is told later is ignored."""

    __slots__ = ("_breaker", "_epoch", "is_probe")

    def __init__(self, breaker: Breaker, epoch: int, *, is_probe: bool) -> None:
        self._breaker: Breaker | None = breaker
        self._epoch = epoch
        self.is_probe = is_probe

    def succeed(self) -> None:
        """The backend did what it was asked."""
        self._end(None, counts=True)

    def fail(self, failure: Failure) -> None:
        """The call failed. Whether that is the backend's fault is read from the failure."""
        self._end(failure, counts=True)

    def forget(self) -> None:
        """The call was broken off, which says nothing of the backend."""
        self._end(None, counts=False)

    def _end(self, failure: Failure | None, *, counts: bool) -> None:
        breaker, self._breaker = self._breaker, None
        if breaker is not None:
            breaker.end(self._epoch, failure, counts=counts, is_probe=self.is_probe)


class Breaker:
    """A loop of closed, open and half-open, moved by outcomes and the clock.

    Args:
        settings: when to open, and for how long.
        clock: gives the time in seconds.
        source: where jitter comes from.
    """

    def __init__(self, settings: BreakerSettings, *, clock: Clock, source: random.Random) -> None:
        self._settings = settings
        self._clock = clock
        self._source = source
        self._backoff = Backoff(settings.open_min, settings.open_max, jitter=settings.jitter, source=source)
        self._window: deque[tuple[float, bool, bool]] = deque()  # when, whether it succeeded, whether busy
        self._successes = 0  # of those in the window
        self._busy = 0
        self._run = 0
        self._opens_until: float | None = None  # None is closed
        self._is_probing = False
        # Counts openings and closings. An outcome that began in another epoch is old news: a call that was
        # in flight when the breaker opened must not decide the probe.
        self._epoch = 0
        self._reason = ""

    def __repr__(self) -> str:
        return f"<Breaker {self.state.value} run {self._run} rate {self.success_rate:.2f}>"

    def change(self, settings: BreakerSettings) -> None:
        """Goes by other settings from now on. What it has seen stays, and so does an opening."""
        if settings == self._settings:
            return
        self._settings = settings
        self._backoff = Backoff(
            settings.open_min, settings.open_max, jitter=settings.jitter, source=self._source
        )

    @property
    def state(self) -> BreakerState:
        """Where the breaker is now."""
        if self._opens_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < self._opens_until else BreakerState.HALF_OPEN

    @property
    def reason(self) -> str:
        """Reason of the failure that opened it. Empty while it is closed."""
        return self._reason

    @property
    def is_probing(self) -> bool:
        """Whether a call is out that decides what happens next."""
        return self._is_probing

    @property
    def can_admit(self) -> bool:
        """Whether a call should come now: it is closed, or half-open with nobody trying."""
        state = self.state
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._is_probing)

    @property
    def remaining(self) -> timedelta:
        """Time until it lets a call through. Zero unless it is open."""
        if self._opens_until is None:
            return timedelta(0)
        return timedelta(seconds=max(0.0, self._opens_until - self._clock()))

    @property
    def success_rate(self) -> float:
        """Share of successes in the window, in which busy is none. 1.0 while there are no calls."""
        self._trim()
        if not self._window:
            return 1.0
        return self._successes / len(self._window)

    def admit(self) -> Permit | None:
        """Returns a permit, or None.

        While the breaker is not closed, one call at a time is let through. The
        router keeps calls away from an open breaker; it sends one only where
        there is no other way, so that the last path is never shut for good.
        """
        if self._opens_until is None:
            return Permit(self, self._epoch, is_probe=False)
        if self._is_probing:
            return None
        self._is_probing = True
        return Permit(self, self._epoch, is_probe=True)

    def heal(self) -> None:
        """Notes that the backend came back anew: an opening ends at once, and the next call tries it."""
        if self._opens_until is not None:
            self._opens_until = min(self._opens_until, self._clock())

    def end(self, epoch: int, failure: Failure | None, *, counts: bool, is_probe: bool) -> None:
        """Takes in how a call ended. Called by its permit."""
        if epoch != self._epoch:
            return
        if is_probe:
            self._end_probe(failure, counts=counts)
        elif counts:
            self._end_call(failure)

    def _end_probe(self, failure: Failure | None, *, counts: bool) -> None:
        self._is_probing = False
        if not counts:
            return
        if failure is None:
            # half-open => closed
            self._shut()
        elif failure.fault is Fault.BACKEND or isinstance(failure, BUSY):
            # half-open => open, for longer
            self._open(failure)
        # Otherwise the caller was wrong: still half-open, the next call tries.

    def _end_call(self, failure: Failure | None) -> None:
        is_busy = isinstance(failure, BUSY)
        if failure is not None and failure.fault is not Fault.BACKEND and not is_busy:
            return
        self._window.append((self._clock(), failure is None, is_busy))
        self._successes += failure is None
        self._busy += is_busy
        self._trim()
        if failure is None:
            self._run = 0
        elif not is_busy:
            self._run += 1
            if self._run >= self._settings.consecutive_failures or self._is_rate_bad():
                # closed => open
                self._open(failure)

    def _is_rate_bad(self) -> bool:
        settings, count = self._settings, len(self._window) - self._busy
        return count >= settings.min_samples and self._successes < settings.success_rate * count

    def _open(self, failure: Failure) -> None:
        self._opens_until = self._clock() + self._backoff.next()
        self._reason = failure.reason
        self._begin()

    def _shut(self) -> None:
        self._opens_until = None
        self._reason = ""
        self._backoff.reset()
        self._begin()

    def _begin(self) -> None:
        self._epoch += 1
        self._run = 0
        self._window.clear()
        self._successes = self._busy = 0
        self._is_probing = False

    def _trim(self) -> None:
        horizon = self._clock() - self._settings.window.total_seconds()
        while self._window and self._window[0][0] < horizon:
            _, succeeded, was_busy = self._window.popleft()
            self._successes -= succeeded
            self._busy -= was_busy
