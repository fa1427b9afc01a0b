"""Scorers: each says how good a backend is in one respect, in [0.0, 1.0]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator.placement.room import estimate
from forebay.orchestrator.routing.filters import Question, is_cold
from forebay.orchestrator.routing.view import Figures, bucket_of

Scorer: TypeAlias = Callable[[Question], float]

UNKNOWN_FIRST_DELTA = 0.5
"""Seconds assumed where nothing was measured: a little optimistic, so that a new backend gets calls by which
it can be measured."""

USUAL_CALL = 5.0
"""Seconds that a call takes where nothing was measured."""

UNKNOWN_LOAD = 10.0
"""Seconds that a load takes where neither its last one nor the model's size is known."""

LOAD_BYTES_PER_SECOND = 1e9
"""Bytes that a load reads a second: less than a laptop's disk can, since they are also put in place."""

READING_RATE = 20.0
"""Tokens a second that count as half of all that can be wished for. A fast reader takes in ten."""

UNKNOWN_SPEED = 0.5
"""Score where no speed was measured, so that a new backend gets calls by which it can be."""

UNKNOWN_ROOM = 0.5
"""Score where it is not known whether a model fits."""

HEALTHY = 0.9
"""Share of calls that must succeed for a conversation to return to whoever holds it."""

FEW_TOKENS = 2048.0
"""Tokens due for each slot that halve the score: a long question and its answer."""

FEW_CALLS = 4
"""Slots assumed where there is no limit. It only shapes how fast the score falls with calls in progress."""


def preference(question: Question) -> float:
    """The caller's order of backends. Asked only where there is one."""
    return 1.0 - question.allowed.index(question.endpoint.name) / len(question.allowed)


def loaded(question: Question) -> float:
    """Whether the model is in memory."""
    state = question.found.state if question.found is not None else pb.Model.STATE_UNSPECIFIED
    if state == pb.Model.STATE_ACTIVE:
        return 1.0
    if state == pb.Model.STATE_UNSPECIFIED:  # some frameworks do not say
        return 0.5
    return 0.3 if state == pb.Model.STATE_LOADING else 0.0


def load(question: Question) -> float:
    """How few calls are in progress for its slots."""
    endpoint = question.endpoint
    return 1.0 / (1.0 + endpoint.outstanding / (_slots(question) or FEW_CALLS))


def proven(question: Question) -> float:
    """How sure is what it needs beyond plain text: tried is better than said, a kept word than a broken."""
    found, doubts = question.found, question.endpoint.doubts
    reports = {report.capability: report for report in found.capabilities} if found else {}
    name = found.id if found else ""
    sure = [
        _certainty(reports.get(need)) * (1.0 - doubts.get((name, int(need)), 0.0))
        for need in question.traits.specialities
    ]
    return min(sure, default=1.0)


def _certainty(report: pb.CapabilityReport | None) -> float:
    if report is None or report.support != pb.CapabilityReport.SUPPORT_YES:
        return 0.0
    return 1.0 if report.probed else 0.5


def context(question: Question) -> float:
    """Whether the request likely fits the context as it is loaded. Otherwise a reload or a refusal is due."""
    limit = question.found.loaded_context_token_count if question.found is not None else 0
    if limit <= 0 or question.traits.likely_tokens <= limit:
        return 1.0
    return limit / question.traits.likely_tokens


def latency(question: Question) -> float:
    """How soon the first delta is to be expected. One second gives 0.5."""
    return 1.0 / (1.0 + expected_first_delta(question))


def expected_first_delta(question: Question) -> float:
    """Returns the seconds to the first delta that are to be expected: of queue, load and prompt."""
    return _wait(question) + _load_time(question) + _prefill_time(question)


def _wait(question: Question) -> float:
    """Seconds until a slot is free, from how long calls take."""
    endpoint, slots = question.endpoint, _slots(question)
    if not slots or endpoint.outstanding < slots:
        return 0.0
    figures = _figures(question)
    duration = figures.duration if figures is not None and figures.duration else USUAL_CALL
    return duration * (endpoint.outstanding - slots + 1) / slots


def _load_time(question: Question) -> float:
    """Seconds until the model is in memory."""
    found = question.found
    if found is None or found.state in (pb.Model.STATE_ACTIVE, pb.Model.STATE_UNSPECIFIED):
        return 0.0
    told = found.load_duration.seconds + found.load_duration.nanos * 1e-9
    size = found.memory_bytes or found.disk_bytes
    seconds = told or (size / LOAD_BYTES_PER_SECOND if size else UNKNOWN_LOAD)
    return seconds / 2.0 if found.state == pb.Model.STATE_LOADING else seconds


def _prefill_time(question: Question) -> float:
    """Seconds to read what is left of the prompt, as such prompts took, else at the measured rate."""
    tokens = question.traits.likely_tokens * (1.0 - _held(question))
    figures = _figures(question)
    if figures is not None and question.traits.request_class == "embedding":
        return UNKNOWN_FIRST_DELTA if figures.duration is None else figures.duration
    if figures is not None:
        measured = figures.first_deltas[bucket_of(tokens)]
        if measured is not None:
            return measured
        if figures.prefill_rate:
            return tokens / figures.prefill_rate
    seconds = question.endpoint.first_delta
    return UNKNOWN_FIRST_DELTA if seconds is None else seconds


def speed(question: Question) -> float:
    """How fast replies came lately. As fast as people read with ease gives 0.5."""
    figures = _figures(question)
    rate = figures.decode_rate if figures is not None else None
    return UNKNOWN_SPEED if rate is None else rate / (rate + READING_RATE)


def tokens(question: Question) -> float:
    """How few tokens are due to calls in progress, for its slots."""
    endpoint = question.endpoint
    slots = _slots(question) or FEW_CALLS
    return 1.0 / (1.0 + max(0.0, endpoint.outstanding_tokens) / (slots * FEW_TOKENS))


def affinity(question: Question) -> float:
    """How much of the prompt it holds evaluated.

    Fades with the calls that wait for its slots, and is nothing where calls fail: health goes first.
    """
    endpoint = question.endpoint
    slots = _slots(question) or FEW_CALLS
    waiting = max(0, endpoint.outstanding + 1 - slots)
    return _held(question) / (1.0 + waiting)


def memory(question: Question) -> float:
    """Whether there is room for the model: 1.0 if there is, or it is loaded, less if others have to leave."""
    found, shared = question.found, question.endpoint.memory
    if found is None or not is_cold(found):
        return 1.0
    room, size = question.endpoint.room(found.id), estimate(found)
    if room.limit:  # the account knows more than its backend does
        if size <= room.free:
            return 1.0
        return 0.5 if size <= room.free + room.evictable else 0.0
    if shared is None:
        return 1.0
    need = found.memory_bytes or found.disk_bytes
    rooms = []
    if shared.available_bytes:
        rooms.append(shared.available_bytes - shared.reserved_bytes)
    if shared.limit_bytes:
        rooms.append(shared.limit_bytes - shared.used_bytes - shared.reserved_bytes)
    if not need or not rooms:
        return UNKNOWN_ROOM
    return min(1.0, max(0.0, min(rooms) / need - 1.0))


def _held(question: Question) -> float:
    endpoint = question.endpoint
    return question.held.get(endpoint.name, 0.0) if endpoint.success_rate >= HEALTHY else 0.0


def _slots(question: Question) -> int:
    """Calls that it can serve at once, as configured or else as it says. 0 is not known."""
    return question.endpoint.slots or (question.found.slot_count if question.found is not None else 0)


def _figures(question: Question) -> Figures | None:
    return question.endpoint.figures.get(question.found.id) if question.found is not None else None


def health(question: Question) -> float:
    """How many of its recent calls it did not fail."""
    return question.endpoint.success_rate


def weight(question: Question) -> float:
    """The configured weight."""
    return question.endpoint.weight


SCORERS: Mapping[str, Scorer] = {
    "preference": preference,
    "loaded": loaded,
    "load": load,
    "proven": proven,
    "context": context,
    "latency": latency,
    "speed": speed,
    "tokens": tokens,
    "affinity": affinity,
    "memory": memory,
    "health": health,
    "weight": weight,
}
"""Every scorer by name. The names are those of `ScorerWeights`."""
