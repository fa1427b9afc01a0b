"""Tells watchers which backends changed, and never waits for one.

A watcher keeps the set of names that changed since it last looked: bounded by
the number of backends however slow its client is, and a client that catches up
sees the state as it is and not as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Watcher:
    """One reader of the feed. Begins with every backend marked as changed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._changed = dict.fromkeys(names)
        self._wake = asyncio.Event()
        self._wake.set()

    def mark(self, name: str) -> None:
        """Notes that a backend changed."""
        self._changed[name] = None
        self._wake.set()

    async def next(self) -> list[str]:
        """Waits for changes, and returns the backends that changed since the last call, oldest first."""
        await self._wake.wait()
        return self.take()

    def take(self) -> list[str]:
        """Returns the backends that changed since the last call, oldest first, and waits for none."""
        self._wake.clear()
        changed, self._changed = list(self._changed), {}
        return changed


class Feed:
    """Passes changes on to any number of watchers."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    def __len__(self) -> int:
        return len(self._watchers)

    def publish(self, name: str) -> None:
        """Tells every watcher that a backend changed."""
        for watcher in self._watchers:
            watcher.mark(name)

    @contextmanager
    def watch(self, names: Sequence[str]) -> Iterator[Watcher]:
        """Adds a watcher for the length of a `with` block.

        Args:
            names: backends that it is told of at once.
        """
        watcher = Watcher(names)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
