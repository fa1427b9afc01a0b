"""Fetches in progress: one for a model, however many wait for it, and none ends because a caller left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

from forebay.kit.failure import BackendUnavailable, Failure
from forebay.mlx_service.fetch import Progress, Report

Work: TypeAlias = Callable[[Report], Awaitable[Path]]
"""Fetches a model and returns where it is."""

Tell: TypeAlias = Callable[[Progress], Awaitable[None]]
"""Takes how far a fetch is. It may be slow: steps that come meanwhile are skipped."""


class _Fetch:
    def __init__(self) -> None:
        self.step: Progress | None = None
        self.path: Path | None = None
        self.error: Exception | None = None
        self.is_over = False
        self._changed = asyncio.Event()

    def report(self, step: Progress) -> None:
        self.step = step
        self.notify()

    def notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self) -> None:
        await self._changed.wait()


class Fetches:
    """Runs fetches. Use it as a block: what is still running at its end is broken off."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[_Fetch, asyncio.Task[None]]] = {}
        self._tasks = asyncio.TaskGroup()

    def __repr__(self) -> str:
        return f"<Fetches {sorted(self._running)}>"

    async def __aenter__(self) -> Fetches:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for _, task in self._running.values():
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def join(self, id_: str, work: Work, tell: Tell) -> Path:
        """Fetches a model, or waits for a fetch of it that is under way.

        Args:
            id_: what is fetched.
            work: fetches it.
            tell: is told how far it is.

        Raises:
            Failure: the fetch failed.
        """
        if id_ not in self._running:
            fetch = _Fetch()
            task = self._tasks.create_task(self._run(fetch, work), name=f"fetch {id_}")
            self._running[id_] = fetch, task
            # Not in the task itself: one that is cancelled before its first step never runs a line.
            task.add_done_callback(lambda _: self._end(id_, fetch))
        fetch, _ = self._running[id_]
        told: Progress | None = None
        while True:
            if fetch.step is not told:
                told = fetch.step
                if told is not None:
                    await tell(told)
            elif fetch.is_over:
                break
            else:
                await fetch.change()
        if isinstance(fetch.error, Failure):
            raise type(fetch.error)(fetch.error.message, metadata=fetch.error.metadata) from fetch.error
        if fetch.error is not None:
            raise fetch.error
        if fetch.path is None:
            raise BackendUnavailable(f"the fetch of {id_} was broken off because the service is stopping")
        return fetch.path

    @staticmethod
    async def _run(fetch: _Fetch, work: Work) -> None:
        try:
            fetch.path = await work(fetch.report)
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait, and they get it
            fetch.error = error

    def _end(self, id_: str, fetch: _Fetch) -> None:
        del self._running[id_]
        fetch.is_over = True
        fetch.notify()
