"""Gives each request one span, one measurement and one record, whatever becomes of its attempts."""

from __future__ import annotations

from collections.abc import Callable

from forebay.kit import genai
from forebay.kit.pipeline import Call, Request, Send, Service
from forebay.kit.telemetry import Telemetry
from forebay.orchestrator.activity import Activity


class Account:
    """Wraps a request in the span that the conventions for generative AI ask for: `chat MODEL`.

    The record is for those who watch, and reads what the span's `Watched` notes anyway.

    Args:
        inner: the service to trace.
        telemetry: of this process.
        framework: returns the framework behind a backend, by the backend's name.
        activity: the record of requests.
    """

    def __init__(
        self,
        inner: Service,
        *,
        telemetry: Telemetry,
        framework: Callable[[str], str],
        activity: Activity,
    ) -> None:
        self._inner = inner
        self._telemetry = telemetry
        self._framework = framework
        self._activity = activity

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call."""
        activity = self._activity
        with (
            genai.requested(
                self._telemetry, call, send, framework=self._framework, clock=activity.clock
            ) as watched,
            activity.follow(call, watched),
        ):
            await self._inner(call, watched)
