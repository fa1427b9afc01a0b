"""Keeps replies in Valkey or Redis, which several orchestrators can share and which outlives them.

The store is a convenience: whatever goes wrong with it is a miss, within a
bound, and a store that keeps failing is left alone for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar, cast

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from forebay.orchestrator.clock import Clock
from forebay.orchestrator.replies import Respite

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PREFIX = b"forebay:"

_CONNECTIONS = 32
"""Most connections; a call that finds none free is a miss."""


class RemoteStore:
    """Keeps values in a server that speaks the protocol of Redis.

    Args:
        url: where it is, such as `redis://127.0.0.1:6379/0`.
        ttl: seconds an entry lives.
        timeout: seconds an answer may take.
        largest: most bytes of one value.
        clock: gives the time in seconds.
    """

    def __init__(self, url: str, *, ttl: float, timeout: float, largest: int, clock: Clock) -> None:
        self.largest = largest
        self._ttl = max(1, int(ttl * 1000))
        self._timeout = timeout
        self._respite = Respite(clock=clock)
        self._client = redis.asyncio.Redis.from_url(
            url.replace("valkey", "redis", 1) if url.startswith("valkey") else url,
            max_connections=_CONNECTIONS,
            # Repeating is of no use within so short a bound, and the respite decides when to come back.
            retry=Retry(NoBackoff(), 0),
        )

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Returns the value of each key, or None."""
        found = await self._ask(lambda: self._client.mget([_PREFIX + key for key in keys]))
        return [None] * len(keys) if found is None else cast("list[bytes | None]", found)

    async def put(self, values: Mapping[bytes, bytes]) -> None:
        """Keeps values that are not too large."""
        kept = {key: value for key, value in values.items() if len(value) <= self.largest}
        if not kept:
            return
        batch = self._client.pipeline(transaction=False)
        for key, value in kept.items():
            batch.set(_PREFIX + key, value, px=self._ttl)
        await self._ask(batch.execute)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T | None:
        """Returns the answer, or None if there is none in time."""
        if not self._respite.may_try():
            return None
        try:
            async with asyncio.timeout(self._timeout):
                found = await ask()
        except (RedisError, OSError, TimeoutError) as error:
            if self._respite.fail():
                # The class and not the message: a message of the server may quote what it was sent.
                logger.warning("the cache is left alone for a while: %s", type(error).__name__)
            return None
        except BaseException:
            self._respite.forget()
            raise
        self._respite.succeed()
        return found
