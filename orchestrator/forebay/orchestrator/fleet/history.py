"""Keeps measurements over a restart: one JSON file of figures, without text and without callers.

The file is written beside the old one and put in its place in one step, so a
crash leaves the old or the new. What cannot be read is left out with a
warning: an orchestrator without a past is a little less wise, and no less able.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

from forebay.orchestrator.fleet.performance import Kept, Performance

logger = logging.getLogger(__name__)

FILE = "performance.json"
VERSION = 1
"""Of the file's layout. A file of another version is not read."""

INTERVAL = timedelta(minutes=1)
"""Time between two writes. A crash loses no more than this."""

MAX_BYTES = 64 * 2**20
"""A file larger than this was not written here."""


class History:
    """Writes and reads what was measured of every backend.

    Args:
        folder: where the file is. Made if it is missing.
        backends: what was measured of each backend, by its name.
        now: gives the time of day in seconds, which goes on while no process runs.
    """

    def __init__(
        self, folder: Path, backends: Mapping[str, Performance], *, now: Callable[[], float] = time.time
    ) -> None:
        self._path = folder.expanduser() / FILE
        self._backends = backends
        self._now = now

    def load(self) -> None:
        """Takes back what was kept, older by the time that has gone by."""
        try:
            if self._path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            content = json.loads(self._path.read_bytes())
            if content["version"] != VERSION:
                raise ValueError(f"it is of version {content['version']!r}, and {VERSION} is read here")
            # A clock that was set back must not make measurements younger.
            aged = max(0.0, self._now() - float(content["time"]))
            for name, kept in content["backends"].items():
                if name in self._backends:
                    self._backends[name].restore(kept, aged=aged)
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.warning("measurements in %s are left out: %s", self._path, error)

    def save(self) -> None:
        """Writes the file. A folder that cannot be written to is logged, and no more."""
        self._write(self._collect())

    async def keep(self) -> None:
        """Saves now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL.total_seconds())
            # Collected here, where nothing else runs; written elsewhere, since a disk can be slow.
            writing = asyncio.ensure_future(asyncio.to_thread(self._write, self._collect()))
            try:
                await asyncio.shield(writing)
            finally:
                await writing  # a thread cannot be cancelled, and the last save must not meet it

    async def close(self) -> None:
        """Saves for the last time."""
        self.save()

    def _collect(self) -> dict[str, dict[str, Kept]]:
        kept = {name: performance.keep() for name, performance in self._backends.items()}
        return {name: models for name, models in kept.items() if models}

    def _write(self, backends: dict[str, dict[str, Kept]]) -> None:
        content = {"version": VERSION, "time": round(self._now(), 3), "backends": backends}
        fresh = self._path.with_name(f"{FILE}.{os.getpid()}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
            fresh.replace(self._path)
        except OSError as error:
            logger.warning("measurements cannot be kept in %s: %s", self._path, error)
