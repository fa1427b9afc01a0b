"""Traces and measures each attempt on a backend."""

from __future__ import annotations

from forebay.kit import genai
from forebay.kit.pipeline import Call, Request, Send, Service, Serving
from forebay.kit.telemetry import Telemetry


class Span:
    """Wraps each attempt in a client span, which is the parent of the backend's own span.

    However the attempt ends, the span ends with it and says how. It holds
    counts and names, and nothing of what was asked or answered.

    Args:
        inner: the service to trace.
        telemetry: of this process.
        backend: the backend's name.
        address: where it listens.
    """

    def __init__(self, inner: Service, *, telemetry: Telemetry, backend: str, address: str) -> None:
        self._inner = inner
        self._telemetry = telemetry
        self._backend = backend
        self._address = address

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call."""
        # Most calls are not traced, and each of their events would be noted for nobody.
        return self._serve(call, send) if genai.is_watched(self._telemetry) else self._inner(call, send)

    async def _serve(self, call: Call[Request], send: Send) -> None:
        with genai.attempted(
            self._telemetry, call, send, backend=self._backend, address=self._address
        ) as watched:
            await self._inner(call, watched)
