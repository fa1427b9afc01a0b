"""Learns from how calls end whether a backend works."""

from __future__ import annotations

from collections.abc import Callable

from forebay.kit.pipeline import Call, Request, Send, Service
from forebay.orchestrator.fleet.breakers import Breakers


class Guard:
    """Feeds the outcomes of calls to a backend's breakers, and lets one call at a time try a failed one.

    Args:
        inner: the service to protect.
        breakers: the backend's breakers.
        on_change: called after each call, for the breakers may have moved.
    """

    def __init__(self, inner: Service, *, breakers: Breakers, on_change: Callable[[], None]) -> None:
        self._inner = inner
        self._breakers = breakers
        self._on_change = on_change

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call.

        Raises:
            BreakerOpen: another call is out that decides whether the backend works again.
        """
        try:
            with self._breakers.admit(call.request.model):
                await self._inner(call, send)
        finally:
            self._on_change()
