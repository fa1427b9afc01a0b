"""Alarms for a service that goes silent.

The alarm is `asyncio.timeout`, which cancels the call's own task and so runs
the inner service's clean-up before the failure is raised: no second task, the
same contextvars, and a caller who leaves in the same moment stays a
cancellation.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure, FirstEventTimeout, StreamStalled
from forebay.kit.pipeline import Call, Event, Request, Send, Service


class Watchdog:
    """Ends a call whose service is silent for too long. Does not count while the client is slow.

    Every event is a sign of life, progress too. Until the first delta the limit
    is `first_event`, even after `started`, since reading a long prompt is silent
    on many backends; from then on it is `between_events`.

    Args:
        inner: the service to watch.
        first_event: longest silence before the first delta. None is no limit.
        between_events: longest silence after it. None is no limit.
    """

    def __init__(
        self, inner: Service, *, first_event: timedelta | None, between_events: timedelta | None
    ) -> None:
        self._inner = inner
        self._first = first_event
        self._between = between_events

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call.

        Raises:
            FirstEventTimeout: the service was silent before the first delta.
            StreamStalled: it fell silent after it.
        """
        clock = asyncio.get_running_loop().time
        answered = False

        def due() -> float | None:
            limit = self._between if answered else self._first
            return None if limit is None else clock() + limit.total_seconds()

        async def watched(event: Event) -> None:
            nonlocal answered
            if alarm.expired():  # a sign of life that comes too late: the call is being ended
                raise self._failure(answered)
            alarm.reschedule(None)
            answered = answered or not _is_preparation(event)
            await send(event)
            alarm.reschedule(due())

        try:
            async with asyncio.timeout_at(due()) as alarm:
                await self._inner(call, watched)
        except Exception as error:
            if alarm.expired():  # whatever the clean-up made of the cancellation, the silence caused it
                raise self._failure(answered) from error
            raise

    def _failure(self, answered: bool) -> Failure:
        limit = self._between if answered else self._first
        seconds = limit.total_seconds() if limit is not None else 0.0
        kind = StreamStalled if answered else FirstEventTimeout
        where = "in the middle of the answer" if answered else "before the answer began"
        return kind(
            f"the backend was silent for {seconds:g} s {where}", metadata={"silence_seconds": f"{seconds:g}"}
        )


def _is_preparation(event: Event) -> bool:
    return isinstance(event, pb.GenerateResponse) and event.WhichOneof("event") in ("started", "progress")
