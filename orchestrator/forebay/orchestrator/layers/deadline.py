"""Gives every call an end."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from forebay.kit.failure import DeadlineExceeded
from forebay.kit.pipeline import Call, Request, Send, Service

_MARGIN_SHARE = 0.1
"""Most of the time left that the margin may take, so that short deadlines are not eaten up by it."""


class Deadline:
    """Ends calls at their deadline, and gives one to those that have none.

    Args:
        inner: the service to bound.
        default: for calls without a deadline.
        longest: no call gets more.
        margin: time kept back, so that our answer arrives before the caller's own timer fires.
    """

    def __init__(self, inner: Service, *, default: timedelta, longest: timedelta, margin: timedelta) -> None:
        self._inner = inner
        self._default = default.total_seconds()
        self._longest = longest.total_seconds()
        self._margin = margin.total_seconds()

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call.

        Raises:
            DeadlineExceeded: it took too long.
        """
        now = asyncio.get_running_loop().time()
        left = call.remaining()
        if left is None:
            left = self._default
        else:
            left -= min(self._margin, left * _MARGIN_SHARE)
        left = min(left, self._longest)
        try:
            async with asyncio.timeout_at(now + left) as scope:
                await self._inner(call.with_(deadline=now + left), send)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceeded(
                f"the call was not done within {left:.1f} s", metadata={"seconds": f"{left:.3f}"}
            ) from error
