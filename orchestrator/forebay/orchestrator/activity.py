"""What the orchestrator is doing: the requests in progress, the last that ended, and counts since the start.

It is written for the many requests that nobody watches. A request costs a
record and a few assignments; a token costs nothing here, for what its span
notes anyway (`genai.Watched`) is read when somebody looks. Text of prompts and
replies never comes here, nor who asked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import TypeAlias

from opentelemetry import trace

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import DeadlineExceeded, Failure, Internal, QueueFull, QueueTimeout, printable
from forebay.kit.genai import Watched, model_name
from forebay.kit.pipeline import Call, Request, Urgency
from forebay.kit.spans import ending_of
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.layers.admit import Admitted
from forebay.orchestrator.layers.hedge import Race
from forebay.orchestrator.layers.remember import Lookup
from forebay.orchestrator.routing.router import Decision

REMEMBERED = 256
"""Ended requests that are kept: minutes of a busy machine, and less than a megabyte."""

MOST_ACTIVE = 512
"""Requests in progress that one message lists: more than a person can read."""

LARGEST = 2**21
"""Bytes of a message above which requests are told without the decision behind them. gRPC's own limit for
what a client takes is twice that."""

_CHARACTERS = 200
"""Most characters of a name or a sentence that a caller or a backend chose."""

Phase: TypeAlias = "fleet_pb2.RequestActivity.Phase.ValueType"

_ACTIVITY = fleet_pb2.RequestActivity

_STAGES: dict[pb.Progress.Stage.ValueType, Phase] = {
    pb.Progress.STAGE_QUEUED: _ACTIVITY.PHASE_QUEUED,
    pb.Progress.STAGE_LOADING: _ACTIVITY.PHASE_LOADING,
    pb.Progress.STAGE_PREFILLING: _ACTIVITY.PHASE_PREFILL,
}

_OPERATIONS: dict[type[Request], str] = {pb.GenerateRequest: "generate", pb.EmbedRequest: "embed"}
"""Requests that are recorded. Counting tokens is no work of a model."""


class _Entry:
    """One request.

    Args:
        call: the request.
        watched: what its span notes.
        since: when it came, on the record's clock.
        create_time: the same, on everybody's clock.
    """

    __slots__ = (
        "_candidates",
        "_deltas_before",
        "_ended_at",
        "_last",
        "_phase",
        "attempts",
        "create_time",
        "decision",
        "error_reason",
        "is_cached",
        "model",
        "operation",
        "request_id",
        "since",
        "trace_id",
        "watched",
    )

    def __init__(self, call: Call[Request], watched: Watched, since: float, create_time: datetime) -> None:
        self.watched = watched
        """What its span notes. Its span and its stream it lets go of when the request ends."""
        self.since = since
        self.create_time = create_time
        self.request_id = printable(call.request_id)[:_CHARACTERS]
        self.operation = _OPERATIONS[type(call.request)]
        self.model = model_name(call.request.model)
        span = trace.get_current_span().get_span_context()
        self.trace_id = span.trace_id if span.is_valid and span.trace_flags.sampled else 0
        self.decision: Decision | None = None
        self.attempts = 0
        self.is_cached = False
        self.error_reason = ""
        self._phase: Phase = _ACTIVITY.PHASE_QUEUED
        self._deltas_before = 0
        self._candidates: list[fleet_pb2.Candidate] | None = None
        self._ended_at: float | None = None
        self._last: fleet_pb2.RequestActivity | None = None  # made when somebody looks for the first time

    def move(self, phase: Phase) -> None:
        """Notes how far it is, until the next delta tells otherwise."""
        self._phase = phase
        self._deltas_before = self.watched.delta_count

    def progress(self, progress: pb.Progress) -> None:
        """Notes what a backend, or the queue, says of it."""
        phase = _STAGES.get(progress.stage)
        if phase is not None:
            self.move(phase)

    def decide(self, decision: Decision) -> None:
        """Notes where the router sends it."""
        if self._ended_at is not None:
            return
        self.decision, self._candidates = decision, None
        if decision.chosen is not None:
            self.attempts += 1
            self.move(_ACTIVITY.PHASE_PREFILL)

    def end(self, error: BaseException | None, *, is_late: bool, now: float) -> None:
        """Notes how it ended. What is told of it never changes after that."""
        if error is not None:
            ending = ending_of(error)
            is_cancelled = ending.error_type == "CANCELLED" or ending.code == "CANCELLED"
            if is_cancelled and is_late:
                self.error_reason = DeadlineExceeded.reason
            elif not is_cancelled:
                self.error_reason = ending.error_type if isinstance(error, Failure) else Internal.reason
            is_failed = bool(self.error_reason)
            self._phase = _ACTIVITY.PHASE_FAILED if is_failed else _ACTIVITY.PHASE_CANCELLED
        else:
            self._phase = _ACTIVITY.PHASE_SUCCEEDED
        self._ended_at = now

    @property
    def output_token_count(self) -> int:
        """Tokens of the reply so far."""
        return self.watched.output_token_count or self.watched.delta_count

    @property
    def continuation_count(self) -> int:
        """Times another backend went on with the reply."""
        return self.watched.continuation_count

    def to_proto(self, now: float) -> fleet_pb2.RequestActivity:
        """Returns it as it is now, with the decision behind it."""
        if self._ended_at is not None and self._last is None:
            self._last = self._figures(self._ended_at)
            self._last.phase = self._phase
            self._last.error_reason = self.error_reason
        shown = self._last if self._last is not None else self._figures(now)
        if self.decision is None:
            return shown
        if self._candidates is None:
            self._candidates = [_shortened(each.to_proto()) for each in self.decision.candidates]
        told = fleet_pb2.RequestActivity(candidates=self._candidates)
        told.MergeFrom(shown)
        return told

    def _figures(self, now: float) -> fleet_pb2.RequestActivity:
        """Returns all but the decision."""
        watched = self.watched
        is_written = watched.first_delta is not None and watched.delta_count > self._deltas_before
        shown = _ACTIVITY(
            request_id=self.request_id,
            trace_id=f"{self.trace_id:032x}" if self.trace_id else "",
            operation=self.operation,
            model=self.model,
            phase=_ACTIVITY.PHASE_DECODE if is_written else self._phase,
            output_token_count=self.output_token_count,
            output_tokens_per_second=_rate(watched),
            attempt_count=self.attempts,
            cached=self.is_cached,
            continuation_count=watched.continuation_count,
        )
        if self.decision is not None:
            shown.request_class = self.decision.traits.request_class
        shown.backend, shown.served_model = self._place(watched)
        shown.create_time.FromDatetime(self.create_time)
        shown.elapsed_duration.FromNanoseconds(round((now - self.since) * 1e9))
        if watched.first_delta is not None:
            shown.first_delta_duration.FromNanoseconds(round(watched.first_delta * 1e9))
        if watched.finished is not None:
            shown.input_token_count = watched.finished.usage.prompt_token_count
        return shown

    def _place(self, watched: Watched) -> tuple[str, str]:
        """Returns who serves it, and with which model."""
        if watched.continued is not None:
            return watched.continued.backend, model_name(watched.continued.model)
        if watched.backend:
            return watched.backend, model_name(watched.model)
        if self.decision is not None and self.decision.chosen is not None:
            return self.decision.chosen.name, model_name(self.decision.chosen.spelling)
        return "", ""


_CURRENT: ContextVar[_Entry | None] = ContextVar("forebay.activity", default=None)
"""The request that the code that runs serves."""


class Watch:
    """One reader of the record. What it did not read in time it is told the number of.

    Args:
        activity: the record.
        most_active: requests in progress that a look tells of.
    """

    def __init__(self, activity: Activity, *, most_active: int) -> None:
        self._activity = activity
        self._most_active = most_active
        self._seen = -1  # requests that had ended at the last look

    def look(self) -> fleet_pb2.WatchActivityResponse:
        """Returns what is in progress, and what ended since the last look; at first, all that is known."""
        activity = self._activity
        ended = activity.ended
        fresh = len(ended) if self._seen < 0 else activity.ended_count - self._seen
        self._seen = activity.ended_count
        kept = min(fresh, len(ended))
        return activity.picture(
            list(ended)[len(ended) - kept :], skipped=fresh - kept, most_active=self._most_active
        )


class _Followed:
    """A request in the record, for `with`."""

    __slots__ = ("_activity", "_call", "_entry", "_token", "_watched")

    def __init__(self, activity: Activity, call: Call[Request], watched: Watched) -> None:
        self._activity = activity
        self._call = call
        self._watched = watched

    def __enter__(self) -> None:
        self._entry = self._activity.begin(self._call, self._watched)
        self._token = _CURRENT.set(self._entry)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        _CURRENT.reset(self._token)
        self._activity.end(self._entry, self._call, error)


_UNRECORDED = nullcontext()


class Activity:
    """The record of requests. It is told of what happens by the layers, from within a request's own context.

    Args:
        admission: the queue before all backends.
        clock: gives the time in seconds.
        now: gives the time of day.
        remembered: ended requests that are kept.
    """

    def __init__(
        self,
        admission: Admission,
        *,
        clock: Clock = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        remembered: int = REMEMBERED,
    ) -> None:
        self.clock = clock
        """Gives the time in seconds."""
        self.ended: deque[_Entry] = deque(maxlen=remembered)
        """The last requests that ended, oldest first."""
        self.ended_count = 0
        """Requests that ended since the start."""
        self._admission = admission
        self._now = now
        self._active: dict[_Entry, None] = {}
        self._totals = fleet_pb2.ActivityTotals()

    def __repr__(self) -> str:
        return f"<Activity {len(self._active)} active, {self.ended_count} ended>"

    def follow(self, call: Call[Request], watched: Watched) -> AbstractContextManager[None]:
        """Records a request for the length of a `with` block.

        Args:
            call: the request.
            watched: what its span notes.
        """
        return _Followed(self, call, watched) if type(call.request) in _OPERATIONS else _UNRECORDED

    def begin(self, call: Call[Request], watched: Watched) -> _Entry:
        """Takes a request in."""
        entry = _Entry(call, watched, self.clock(), self._now())
        watched.on_progress = entry.progress
        self._active[entry] = None
        self._totals.request_count += 1
        return entry

    def end(self, entry: _Entry, call: Call[Request], error: BaseException | None) -> None:
        """Notes how a request ended."""
        totals = self._totals
        del self._active[entry]
        totals.output_token_count += entry.output_token_count
        totals.continuation_count += entry.continuation_count
        entry.end(error, is_late=call.remaining() == 0.0, now=self.clock())
        totals.failed_request_count += bool(entry.error_reason)
        totals.refused_request_count += isinstance(error, QueueFull | QueueTimeout)
        self.ended.append(entry)
        self.ended_count += 1

    # What the layers tell. A reply that is shared goes on in the context of whoever asked first, even if they
    # left.

    def admitted(self, admitted: Admitted) -> None:
        """The queue let the request run, or refused it."""
        if admitted.failure is None and (entry := _CURRENT.get()) is not None:
            entry.move(_ACTIVITY.PHASE_ROUTING)

    def decided(self, decision: Decision) -> None:
        """The router decided where an attempt goes."""
        if (entry := _CURRENT.get()) is not None:
            entry.decide(decision)

    def retried(self) -> None:
        """An attempt failed, and there is another."""
        self._totals.retry_count += 1
        if (entry := _CURRENT.get()) is not None:
            entry.move(_ACTIVITY.PHASE_ROUTING)

    def raced(self, race: Race) -> None:
        """A second attempt was started beside a slow one."""
        self._totals.hedge_count += 1

    def spliced(self, failure: Failure) -> None:
        """A reply broke off, and somebody is to go on with it."""
        if (entry := _CURRENT.get()) is not None:
            entry.move(_ACTIVITY.PHASE_ROUTING)

    def looked_up(self, lookup: Lookup) -> None:
        """The cache was asked."""
        if lookup.hits and not lookup.misses:
            self._totals.cache_hit_count += 1
            self._mark_cached()

    def joined(self, call: Call[Request]) -> None:
        """The request joined another one's reply."""
        self._totals.coalesced_request_count += 1
        self._mark_cached()

    def _mark_cached(self) -> None:
        if (entry := _CURRENT.get()) is not None:
            entry.is_cached = True

    # What watchers read.

    def watch(self, *, most_active: int = MOST_ACTIVE) -> Watch:
        """Returns a reader that begins with all that is remembered.

        Args:
            most_active: requests in progress that a look tells of.
        """
        return Watch(self, most_active=most_active)

    def picture(
        self, ended: Sequence[_Entry], *, skipped: int, most_active: int
    ) -> fleet_pb2.WatchActivityResponse:
        """Returns what is going on.

        Args:
            ended: ended requests to tell of.
            skipped: how many there were that are forgotten.
            most_active: requests in progress to tell of.
        """
        now = self.clock()
        message = fleet_pb2.WatchActivityResponse(
            queue=self._queue(), totals=self.totals(), skipped_request_count=skipped
        )
        message.observe_time.FromDatetime(self._now())
        active = [entry for entry, _ in zip(self._active, range(most_active), strict=False)]
        room = LARGEST
        for entries, listed in ((active, message.active_requests), (ended, message.ended_requests)):
            for entry in entries:
                told = entry.to_proto(now)
                room -= told.ByteSize()
                if room < 0:
                    told.ClearField("candidates")
                listed.append(told)
        return message

    def totals(self) -> fleet_pb2.ActivityTotals:
        """Returns the counts since the start, requests in progress included."""
        totals = fleet_pb2.ActivityTotals()
        totals.CopyFrom(self._totals)
        totals.output_token_count += sum(entry.output_token_count for entry in self._active)
        totals.continuation_count += sum(entry.continuation_count for entry in self._active)
        return totals

    def _queue(self) -> fleet_pb2.Queue:
        admission = self._admission
        depth = admission.depth()
        queue = fleet_pb2.Queue(
            admitted_count=admission.running,
            permit_count=admission.permits,
            waiting_interactive_count=depth[Urgency.INTERACTIVE],
            waiting_normal_count=depth[Urgency.NORMAL],
            waiting_batch_count=depth[Urgency.BATCH],
        )
        if (oldest := admission.oldest_wait) is not None:
            queue.oldest_wait_duration.FromNanoseconds(round(oldest * 1e9))
        if (expected := admission.prospect()) is not None:
            queue.expected_wait_duration.FromNanoseconds(round(expected * 1e9))
        return queue


def _rate(watched: Watched) -> float:
    """Returns the tokens a second since the first delta, as far as the last one; 0 if that is not known."""
    told = watched.tokens_per_second
    if told is not None:
        return told
    seconds = watched.writing_seconds
    return (watched.delta_count - 1) / seconds if seconds and not watched.output_token_count else 0.0


def _shortened(candidate: fleet_pb2.Candidate) -> fleet_pb2.Candidate:
    candidate.refusal_detail = printable(candidate.refusal_detail)[:_CHARACTERS]
    candidate.model = model_name(candidate.model)
    return candidate
