"""Memory pressure: what a worker does, step by step, when the memory it has comes to its end.

Reservations keep accepted rows within the limit as far as can be foreseen.
Temporaries, padding, and a limit that was lowered cannot. So the engine looks
between any two steps at what MLX holds, and climbs as far as it must:

    soft  the prefix cache shrinks, freed memory goes back to the system, and no row joins
    hard  the least urgent row, of these the youngest, is set aside: it keeps its tokens and nothing else
    over  one row is left and exceeds the limit by itself: the service is asked for more, then the row fails

The marks are shares of what the limit leaves beside the weights. Of the whole
limit they would leave a large model nothing to work with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

SOFT = 0.85
"""Mark above which what can be had again is given up. The rest is for the steps in progress."""

HARD = 0.95
"""Mark above which a row is set aside. The rest is for the next step's temporaries."""

PATIENCE = 3.0
"""Seconds that a row which exceeds the limit by itself goes on, so that the service can make room for it. It
looks every second, and an idle model takes a moment to leave."""

FREED_SHARE = 0.1
"""Share of what is left beside the weights that MLX may hold in freed buffers: from soft to hard."""


class Level(IntEnum):
    """How full the memory is."""

    CALM = 0
    SOFT = 1
    HARD = 2
    OVER = 3


@dataclass(frozen=True, slots=True)
class Held:
    """What MLX holds."""

    used: int
    """Bytes in use: weights, caches and temporaries."""
    freed: int
    """Bytes that are free and kept for the next step."""


class Pressure:
    """Watches the memory of one engine, on its thread.

    Args:
        read: tells what MLX holds.
        give_back: returns freed memory to the system.
        shrink: gives up so many bytes of what can be read again, or as much of it as there is.
    """

    def __init__(
        self, *, read: Callable[[], Held], give_back: Callable[[], None], shrink: Callable[[int], None]
    ) -> None:
        self._read = read
        self._give_back = give_back
        self._shrink = shrink
        self.limit: int | None = None
        """Bytes that weights and rows may take. None is no limit."""
        self.weights = 0
        """Bytes of the model."""
        self.held = Held(0, 0)
        """What MLX held at the last look."""
        self.level = Level.CALM
        """How full it was then, after what could be given up was."""
        self._over_since: float | None = None

    def mark(self, share: float) -> int:
        """Returns the bytes at a share of the limit."""
        assert self.limit is not None
        return self.weights + int(share * max(0, self.limit - self.weights))

    @property
    def wanted(self) -> int:
        """Limit below whose hard mark the memory would be. 0 is that the limit there is does."""
        if self.limit is None or self.level < Level.HARD:
            return 0
        return self.weights + int((self.held.used - self.weights) / SOFT) + 1

    def look(self) -> Level:
        """Looks at the memory, gives up what can be had again if it is full, and says how full it is then."""
        self.held = self._read()
        self.level = self._level()
        if self.level is not Level.OVER:
            self._over_since = None
        if self.level is Level.CALM:
            if self.limit is not None and self.held.used + self.held.freed > self.mark(HARD):
                self._give_back()
            return self.level
        self._shrink(self.held.used - self.mark(SOFT))
        self._give_back()
        self.held = self._read()
        self.level = self._level()
        return self.level

    def allows(self, used: int) -> bool:
        """Returns whether a row may join if so many bytes are in use then."""
        if self.limit is None:
            return True
        return self.level is Level.CALM and used <= self.mark(SOFT)

    def is_hopeless(self, now: float) -> bool:
        """Returns whether one row alone has exceeded the limit for too long. Asked when one row is left."""
        if self.level is not Level.OVER:
            return False
        if self._over_since is None:
            self._over_since = now
        return now - self._over_since >= PATIENCE

    def _level(self) -> Level:
        if self.limit is None or self.held.used <= self.mark(SOFT):
            return Level.CALM
        if self.held.used <= self.mark(HARD):
            return Level.SOFT
        return Level.HARD if self.held.used <= self.limit else Level.OVER
