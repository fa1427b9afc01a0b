"""One load for all who want it, that no one who leaves can stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeAlias, TypeVar

from forebay.kit.failure import Draining

K = TypeVar("K", bound=Hashable)
P = TypeVar("P")
T = TypeVar("T")

Report: TypeAlias = Callable[[P], None]
"""Takes the latest progress of a flight. Never waits: whoever is slow skips some."""


class _Flight(Generic[P, T]):
    def __init__(self) -> None:
        self.done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.latest: P | None = None
        self.joined: set[asyncio.Event] = set()

    def report(self, progress: P) -> None:
        self.latest = progress
        for news in self.joined:
            news.set()


class SingleFlight(Generic[K, P, T]):
    """Runs one flight a key at a time; callers join it and may leave it.

    The flight is a task of `group`, so it ends when its callers have left only
    if it is over or the group is. A failure reaches every caller that is still
    there, and nobody if none is.

    Args:
        group: owns the flights.
    """

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._flights: dict[K, _Flight[P, T]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    async def join(
        self,
        key: K,
        begin: Callable[[Report[P]], Awaitable[T]],
        *,
        progress: Callable[[P], Awaitable[None]] | None = None,
    ) -> T:
        """Returns the result of the flight of `key`, beginning it if there is none.

        Args:
            key: what is wanted.
            begin: does the work. Called only if there is no flight of `key`; reports its progress.
            progress: is told the latest progress of the flight, this caller's or another's.

        Raises:
            Exception: what the flight raised.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            self._group.create_task(self._fly(key, flight, begin))
        if progress is not None:
            await _follow(flight, progress)
        return await asyncio.shield(flight.done)

    async def _fly(self, key: K, flight: _Flight[P, T], begin: Callable[[Report[P]], Awaitable[T]]) -> None:
        try:
            result = await begin(flight.report)
        except Exception as error:  # noqa: BLE001  # it is not lost: every caller gets it
            flight.done.set_exception(error)
            flight.done.exception()  # nobody may be left to fetch it, which is no fault
        except asyncio.CancelledError:
            flight.done.set_exception(Draining("the service is stopping"))
            flight.done.exception()
            raise
        else:
            flight.done.set_result(result)
        finally:
            del self._flights[key]
            for news in flight.joined:
                news.set()


async def _follow(flight: _Flight[P, T], progress: Callable[[P], Awaitable[None]]) -> None:
    news = asyncio.Event()
    if flight.latest is not None:
        news.set()
    flight.joined.add(news)
    told: P | None = None
    try:
        while not flight.done.done():
            await news.wait()
            news.clear()
            if flight.latest is not None and flight.latest is not told:
                told = flight.latest
                await progress(told)
    finally:
        flight.joined.discard(news)
