"""Scorers: each says how good a backend is in one respect, in [0.0, 1.0]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator.placement.room import estimate
from forebay.orchestrator.routing.filters import Question

Scorer: TypeAlias = Callable[[Question], float]

UNKNOWN_FIRST_DELTA = 0.5
"""Seconds assumed where nothing was measured: a little optimistic, so that a new backend gets calls by which
it can be measured."""

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


def memory(question: Question) -> float:
    """Whether there is room for the model. Asked only of models that are not in memory."""
    if question.found is None:
        return 0.0
    room, need = question.endpoint.room(question.found.id), estimate(question.found)
    if need <= room.free:
        return 1.0
    return 0.5 if need <= room.free + room.evictable else 0.0


def load(question: Question) -> float:
    """How few calls are in progress for its slots."""
    endpoint = question.endpoint
    return 1.0 / (1.0 + endpoint.outstanding / (endpoint.slots or FEW_CALLS))


def proven(question: Question) -> float:
    """How sure the needed capabilities are. Tried is better than said, and a word kept than one broken."""
    found, doubts = question.found, question.endpoint.doubts
    reports = {report.capability: report for report in found.capabilities} if found else {}
    name = found.id if found else ""
    return min(
        _certainty(reports.get(need)) * (1.0 - doubts.get((name, int(need)), 0.0))
        for need in question.traits.needs
    )


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
    """How soon the first delta came lately. One second gives 0.5."""
    seconds = question.endpoint.first_delta
    return 1.0 / (1.0 + (UNKNOWN_FIRST_DELTA if seconds is None else seconds))


def health(question: Question) -> float:
    """How many of its recent calls it did not fail."""
    return question.endpoint.success_rate


def weight(question: Question) -> float:
    """The configured weight."""
    return question.endpoint.weight


SCORERS: Mapping[str, Scorer] = {
    "preference": preference,
    "loaded": loaded,
    "memory": memory,
    "load": load,
    "proven": proven,
    "context": context,
    "latency": latency,
    "health": health,
    "weight": weight,
}
"""Every scorer by name. The names are those of `ScorerWeights`."""
