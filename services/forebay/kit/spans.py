"""Spans that end exactly once, whatever ends their work, and say how.

The SDK's own context manager knows `Exception`. A cancelled call is none, so
its span would say nothing; and what the caller did wrong, or that it left, is
no error of the one who served it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span, SpanKind, Status, StatusCode, Tracer

from forebay.kit.failure import CallerLeft, Failure, Fault

Attributes: TypeAlias = Mapping[str, str | bool | int | float | Sequence[str]]
"""Attributes of a span."""


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


@contextmanager
def traced(
    tracer: Tracer, name: str, kind: SpanKind, attributes: Attributes, *, is_current: bool = True
) -> Iterator[Span]:
    """Gives the span of a block; at the block's end it is ended and says how.

    Args:
        tracer: makes the span.
        name: its name. Never text of a prompt or an answer.
        kind: its kind.
        attributes: its first attributes.
        is_current: whether spans made in the block are its children. False where the block may be left in
            another task than it was entered in.
    """
    if isinstance(tracer, NoOpTracer):
        # Nobody sees it, so nobody pays for it. The caller's context stays the current one and goes on.
        yield INVALID_SPAN
        return
    span = tracer.start_span(
        name, kind=kind, attributes=dict(attributes), record_exception=False, set_status_on_exception=False
    )
    try:
        if is_current:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield span
        else:
            yield span
    except BaseException as error:
        tell(span, ending_of(error))
        raise
    finally:
        span.end()
