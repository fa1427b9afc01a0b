"""Gives each request one span and one measurement, whatever becomes of its attempts."""

from __future__ import annotations

from collections.abc import Callable

from forebay.kit import genai
from forebay.kit.pipeline import Call, Request, Send, Service
from forebay.kit.telemetry import Telemetry


class Account:
    """Wraps a request in the span that the conventions for generative AI ask for: `chat MODEL`.

    Args:
        inner: the service to trace.
        telemetry: of this process.
        framework: returns the framework behind a backend, by the backend's name.
    """

    def __init__(self, inner: Service, *, telemetry: Telemetry, framework: Callable[[str], str]) -> None:
        self._inner = inner
        self._telemetry = telemetry
        self._framework = framework

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call."""
        with genai.requested(self._telemetry, call, send, framework=self._framework) as watched:
            await self._inner(call, watched)
