"""Spans that end exactly once, whatever ends their work, and say how.

The SDK's own context manager knows `Exception`. A cancelled call is none, so
its span would say nothing; and what the caller did wrong, or that it left, is
no error of the one who served it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span, SpanKind, Status, StatusCode, Tracer

from forebay.kit.failure import CallerLeft, Failure, Fault

Attributes: TypeAlias = Mapping[str, str | bool | int | float | Sequence[str]]
"""Attributes of a span."""

Describe: TypeAlias = Callable[[], tuple[str, Attributes]]
"""Returns the name of a span, never text of a prompt or an answer, and its first attributes."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a piece of work ended."""

    code: str = "OK"
    """Name of a gRPC status."""
    error_type: str = ""
    """What `error.type` says. Empty if all went well."""
    is_error: bool = False
    """Whether it is an error of the one who did the work, and not of the one who asked."""


def ending_of(error: BaseException) -> Ending:
    """Returns how work ended that raised this."""
    if isinstance(error, Failure):
        is_error = error.fault is not Fault.CALLER and not isinstance(error, CallerLeft)
        return Ending(error.code.name, error.reason, is_error)
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return Ending("CANCELLED", "CANCELLED")
    return Ending("INTERNAL", type(error).__name__, is_error=True)


def tell(span: Span, ending: Ending) -> None:
    """Writes onto a span how its work ended."""
    if ending.error_type:
        span.set_attribute("error.type", ending.error_type)
    if ending.is_error:
        span.set_status(Status(StatusCode.ERROR, ending.error_type))


def traced(
    tracer: Tracer, kind: SpanKind, describe: Describe, *, is_current: bool = True
) -> AbstractContextManager[Span]:
    """Gives the span of a block; at the block's end it is ended and says how.

    Whether a trace is recorded is decided once in each process, where a call comes in. Below a span of ours
    that is not recorded no further one is made, and nothing is prepared for it: the block goes on in the span
    around.

    Args:
        tracer: makes the span.
        kind: its kind.
        describe: gives its name and its first attributes. Asked only if there is a span.
        is_current: whether spans made in the block are its children. False where the block may be left in
            another task than it was entered in.
    """
    return _Traced(tracer, kind, describe, is_current)


def is_dropped(tracer: Tracer) -> bool:
    """Whether a span that was made here would tell nobody anything."""
    return isinstance(tracer, NoOpTracer) or _is_dropped(trace.get_current_span())


def _is_dropped(span: Span) -> bool:
    if span.is_recording():
        return False
    context = span.get_span_context()
    # One that is sampled has ended: a reply that is shared goes on after whoever asked for it first.
    return context.is_valid and not context.is_remote and not context.trace_flags.sampled


class _Traced:
    """A block with a span. A class, for a generator costs more than all else that an unrecorded span does."""

    __slots__ = ("_describe", "_is_current", "_kind", "_span", "_token", "_tracer")

    def __init__(self, tracer: Tracer, kind: SpanKind, describe: Describe, is_current: bool) -> None:
        self._tracer = tracer
        self._kind = kind
        self._describe = describe
        self._is_current = is_current
        self._span: Span | None = None
        self._token: Token[Context] | None = None

    def __enter__(self) -> Span:
        if isinstance(self._tracer, NoOpTracer):
            # Nobody sees it, so nobody pays for it. The caller's context stays the current one and goes on.
            return INVALID_SPAN
        around = trace.get_current_span()
        if _is_dropped(around):
            return around
        name, attributes = self._describe()
        self._span = span = self._tracer.start_span(
            name,
            kind=self._kind,
            attributes=dict(attributes),
            record_exception=False,
            set_status_on_exception=False,
        )
        if self._is_current:
            self._token = otel_context.attach(trace.set_span_in_context(span))
        return span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._token is not None:
            otel_context.detach(self._token)
        if self._span is not None:
            if error is not None:
                tell(self._span, ending_of(error))
            self._span.end()
