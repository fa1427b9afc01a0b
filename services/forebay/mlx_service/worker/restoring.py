"""Rows that wait until what is on disk of their prompts is in memory again.

A row whose prompt's beginning is on disk, and not in memory, waits aside while
the disk's thread reads; the others go on. It waits a bounded time: a disk that
does not answer costs that much, and then the prompt is read by the model.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Generic, TypeVar

from forebay.mlx_service.worker.prefix_cache import PrefixCache, Stretch
from forebay.mlx_service.worker.prefix_disk import DiskTier

log = logging.getLogger(__name__)

RESTORE_SECONDS = 10.0
"""How long a row waits for its disk. A slow one gives a gigabyte in this time."""

RowT = TypeVar("RowT", bound=Hashable)


class Restoring(Generic[RowT]):
    """Brings prefixes back from disk for rows that begin with them.

    Args:
        prefixes: takes them.
        disk: has them.
        ready: is given each row whose wait is over.
        clock: tells how long a row has waited, in seconds.
    """

    def __init__(
        self,
        prefixes: PrefixCache,
        disk: DiskTier,
        *,
        ready: Callable[[RowT], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefixes = prefixes
        self._disk = disk
        self._ready = ready
        self._clock = clock
        self._rows: dict[RowT, float] = {}

    @property
    def rows(self) -> list[RowT]:
        """Rows that wait, longest first."""
        return list(self._rows)

    def begin(self, row: RowT, key: str, tokens: Sequence[int]) -> bool:
        """Has a row wait if there is something on disk worth waiting for. Returns whether it does."""
        known, ends = self._prefixes.known(key, tokens)
        plan = self._disk.lookup(key, tokens, known, ends)
        if plan is None:
            return False
        self._rows[row] = self._clock()
        self._disk.read(plan, self._take, partial(self._done, row))
        return True

    def drop(self, row: RowT) -> None:
        """Has a row wait no more. What is read for it is kept all the same."""
        self._rows.pop(row, None)

    def give_up(self) -> None:
        """Ends the waits that have lasted too long."""
        late = self._clock() - RESTORE_SECONDS
        for row in [row for row, since in self._rows.items() if since <= late]:
            log.warning("a prefix on disk was not read in %g s and is read by the model", RESTORE_SECONDS)
            self._done(row)

    def _take(self, stretch: Stretch) -> bool:
        try:
            return self._prefixes.adopt(stretch)
        except Exception as error:  # a cache that fails costs time and no reply
            log.error("the prefix cache failed and is emptied: %s", type(error).__name__, exc_info=error)
            self._prefixes.clear()
            return False

    def _done(self, row: RowT) -> None:
        if self._rows.pop(row, None) is not None:
            self._ready(row)
