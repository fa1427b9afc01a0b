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
        silence = _Silence(self._first, self._between)

        async def watched(event: Event) -> None:
            if alarm.expired():  # a sign of life that comes too late: the call is being ended
                raise self._failure(silence.answered)
            silence.interrupt(event)
            await send(event)
            silence.begin()

        try:
            async with asyncio.timeout(None) as alarm:
                silence.watch(alarm)
                await self._inner(call, watched)
        except Exception as error:
            if alarm.expired():  # whatever the clean-up made of the cancellation, the silence caused it
                raise self._failure(silence.answered) from error
            raise
        finally:
            silence.forget()

    def _failure(self, answered: bool) -> Failure:
        limit = self._between if answered else self._first
        seconds = limit.total_seconds() if limit is not None else 0.0
        kind = StreamStalled if answered else FirstEventTimeout
        where = "in the middle of the answer" if answered else "before the answer began"
        return kind(
            f"the backend was silent for {seconds:g} s {where}", metadata={"silence_seconds": f"{seconds:g}"}
        )


_GRAIN = 1e-6
"""Seconds by which a timer may ring too early, for sums of floats are not exact."""


class _Silence:
    """How long a service has been silent, and the timer that ends the call when that is too long.

    The timer is not moved with every event, of which there are thousands a
    second: when it rings, it looks how long ago the last one was. Nor is it
    when the first delta brings another limit, for it never waits longer than
    the shorter of both.
    """

    def __init__(self, first: timedelta | None, between: timedelta | None) -> None:
        loop = asyncio.get_running_loop()
        self._call_at = loop.call_at
        self._clock = loop.time
        self._limit = None if first is None else first.total_seconds()
        self._between = None if between is None else between.total_seconds()
        self._shortest = min((each for each in (self._limit, self._between) if each is not None), default=0.0)
        self._since: float | None = self._clock()  # None while an event is on its way to the client
        self._timer: asyncio.TimerHandle | None = None
        self.answered = False
        """Whether part of the answer has come."""

    def watch(self, alarm: asyncio.Timeout) -> None:
        """Has the alarm go off after too long a silence."""
        self._alarm = alarm
        self._set(self._clock())

    def interrupt(self, event: Event) -> None:
        """Something was heard, and is on its way."""
        self._since = None
        if not self.answered and not _is_preparation(event):
            self.answered = True
            self._limit = self._between

    def begin(self) -> None:
        """It is silent again."""
        self._since = now = self._clock()
        if self._timer is None:
            self._set(now)

    def forget(self) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, now: float) -> None:
        if self._limit is not None and self._since is not None:
            self._timer = self._call_at(min(self._since + self._limit, now + self._shortest), self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._limit is None or self._since is None:
            return  # the client is slow, and not the service; `begin` sets the timer again
        now = self._clock()
        if now + _GRAIN >= self._since + self._limit:
            self._alarm.reschedule(self._since)  # in the past, so now
        else:
            self._set(now)


def _is_preparation(event: Event) -> bool:
    return isinstance(event, pb.GenerateResponse) and event.WhichOneof("event") in ("started", "progress")
