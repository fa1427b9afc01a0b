"""Follows an orchestrator, and finds it again when it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from forebay.cli.client import Client
from forebay.cli.problems import Problem, from_failure
from forebay.cli.top.picture import Picture
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.kit.failure import Failure

PAUSE = 0.3
"""Seconds before a lost stream is asked for again: soon enough to see a restart within a second."""


LIST_PERIOD = 2.0
"""Seconds between two lists of the backends."""


class Follower:
    """Keeps a picture up to date until it is cancelled.

    Args:
        client: the orchestrator.
        picture: what is kept up to date.
        interval: seconds between two messages of activity.
        on_change: told that the picture has changed.
    """

    def __init__(
        self, client: Client, picture: Picture, *, interval: float, on_change: Callable[[], None]
    ) -> None:
        self._client = client
        self._picture = picture
        self._interval = interval
        self._on_change = on_change

    async def run(self) -> None:
        """Follows for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep("backends", self._backends))
            tasks.create_task(self._keep("activity", self._activity))
            tasks.create_task(self._keep("backends", self._forget))

    async def _keep(self, what: str, read: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await read()
                why = "it ended"
            except Problem as problem:
                why = problem.message
            except Failure as failure:
                why = from_failure(failure).message
            self._picture.losses[what] = why
            self._on_change()
            await asyncio.sleep(PAUSE)

    async def _backends(self) -> None:
        await self._client.watch(self._take_backend)

    async def _forget(self) -> None:
        # A stream of changes never says that a backend is gone from the configuration.
        while True:
            self._picture.keep_backends([backend.name for backend in await self._client.backends()])
            await asyncio.sleep(LIST_PERIOD)

    async def _activity(self) -> None:
        is_first = True

        def take(message: fleet_pb.WatchActivityResponse) -> None:
            nonlocal is_first
            if is_first:
                self._picture.begin_activity()
                is_first = False
            self._picture.take_activity(message)
            self._heard("activity")

        await self._client.activity(take, interval=self._interval)

    def _take_backend(self, backend: fleet_pb.Backend) -> None:
        self._picture.take_backend(backend)
        self._heard("backends")

    def _heard(self, what: str) -> None:
        self._picture.losses.pop(what, None)
        self._on_change()
