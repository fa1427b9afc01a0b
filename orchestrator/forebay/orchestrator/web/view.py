"""What the page is told, as JSON: short keys, times in milliseconds since 1970, durations in seconds.

Written by hand rather than by protobuf's own JSON, which takes longer: it is
made on the loop that serves the calls, twice a second for each open page.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias

from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.message import Message

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

SAMPLES = 300
"""Samples that are kept: five minutes, one a second."""

MOST_MODELS = 40
"""Models of a backend that are told of, those in memory first."""

_DETAIL = 300
"""Most characters of a sentence."""


class History:
    """The last minutes: tokens a second, calls that wait, and calls that run, once a second."""

    def __init__(self) -> None:
        self._samples: deque[Json] = deque(maxlen=SAMPLES)
        self._count = 0
        self._last: tuple[float, int] | None = None

    def take(self, *, when: float, time_ms: int, tokens: int, waiting: int, running: int) -> None:
        """Takes a sample.

        Args:
            when: seconds, on any clock.
            time_ms: the same on everybody's clock.
            tokens: tokens of replies passed on since the start.
            waiting: calls that wait.
            running: calls that run.
        """
        rate = 0.0
        if self._last is not None and when > self._last[0]:
            rate = max(0.0, (tokens - self._last[1]) / (when - self._last[0]))
        self._last = (when, tokens)
        self._samples.append([time_ms, round(rate, 2), waiting, running])
        self._count += 1

    def since(self, seen: int) -> tuple[list[Json], int]:
        """Returns the samples after the first `seen` ones, as far as they are kept, and the number of all."""
        fresh = min(self._count - seen, len(self._samples))
        return list(self._samples)[len(self._samples) - fresh :], self._count


def activity(message: fleet_pb2.WatchActivityResponse) -> dict[str, Json]:
    """Returns what goes on."""
    queue, totals = message.queue, message.totals
    return {
        "t": _ms(message.observe_time),
        "queue": {
            "running": queue.admitted_count,
            "permits": queue.permit_count,
            "interactive": queue.waiting_interactive_count,
            "normal": queue.waiting_normal_count,
            "batch": queue.waiting_batch_count,
            "oldest": _known(queue, "oldest_wait_duration"),
            "expected": _known(queue, "expected_wait_duration"),
        },
        "totals": {
            "requests": totals.request_count,
            "failed": totals.failed_request_count,
            "refused": totals.refused_request_count,
            "hits": totals.cache_hit_count,
            "coalesced": totals.coalesced_request_count,
            "retries": totals.retry_count,
            "hedges": totals.hedge_count,
            "continuations": totals.continuation_count,
            "tokens": totals.output_token_count,
        },
        "active": [_request(each) for each in message.active_requests],
        # The page tells of the decision once a request has ended.
        "ended": [
            _request(each) | {"candidates": [_candidate(candidate) for candidate in each.candidates]}
            for each in message.ended_requests
        ],
        "skipped": message.skipped_request_count,
    }


def _request(request: fleet_pb2.RequestActivity) -> dict[str, Json]:
    phase = fleet_pb2.RequestActivity.Phase.Name(request.phase).removeprefix("PHASE_").lower()
    return {
        "id": request.request_id,
        "trace": request.trace_id,
        "op": request.operation,
        "model": request.model,
        "class": request.request_class,
        "backend": request.backend,
        "served": request.served_model,
        "phase": phase,
        "created": _ms(request.create_time),
        "elapsed": _seconds(request.elapsed_duration),
        "first": _known(request, "first_delta_duration"),
        "in": request.input_token_count,
        "out": request.output_token_count,
        "rate": round(request.output_tokens_per_second, 2),
        "attempts": request.attempt_count,
        "error": request.error_reason,
        "cached": request.cached,
        "continued": request.continuation_count,
    }


def _candidate(candidate: fleet_pb2.Candidate) -> dict[str, Json]:
    return {
        "backend": candidate.backend,
        "model": candidate.model,
        "refused": candidate.refused_by,
        "detail": candidate.refusal_detail,
        "scores": {name: round(score, 3) for name, score in sorted(candidate.scores.items())},
        "total": round(candidate.total_score, 3),
    }


def backend(shown: fleet_pb2.Backend) -> dict[str, Json]:
    """Returns a backend."""
    models = sorted(shown.models, key=_rank)
    return {
        "name": shown.name,
        "framework": shown.framework,
        "state": fleet_pb2.Backend.State.Name(shown.state).removeprefix("STATE_").lower(),
        "since": _ms(shown.state_change_time),
        "detail": shown.detail[:_DETAIL],
        "address": shown.address,
        "active": shown.active_call_count,
        "queued": shown.queued_call_count,
        "slots": shown.slot_count,
        "first": _known(shown, "first_delta_duration"),
        "rate": round(shown.output_tokens_per_second, 2),
        "succeeded": shown.succeeded_call_count,
        "failed": shown.failed_call_count,
        "share": round(shown.share, 3),
        "breakers": [_breaker(each) for each in shown.breakers],
        "memory": _memory(shown.memory) if shown.HasField("memory") else None,
        "models": [_model(each) for each in models[:MOST_MODELS]],
        "model_count": len(models),
    }


def _rank(model: pb.Model) -> tuple[int, str]:
    order = (pb.Model.STATE_ACTIVE, pb.Model.STATE_LOADING, pb.Model.STATE_UNLOADING)
    place = order.index(model.state) if model.state in order else len(order)
    return place, model.id


def _model(model: pb.Model) -> dict[str, Json]:
    return {
        "id": model.id,
        "state": pb.Model.State.Name(model.state).removeprefix("STATE_").lower(),
        "detail": model.detail[:_DETAIL],
        "memory": model.memory_bytes,
        "slots": model.slot_count,
        "context": model.loaded_context_token_count or model.context_token_count,
        "size": model.weights.size_label,
        "quantization": model.weights.quantization,
        "pinned": model.pinned,
    }


def _breaker(breaker: fleet_pb2.Breaker) -> dict[str, Json]:
    return {
        "model": breaker.model,
        "state": fleet_pb2.Breaker.State.Name(breaker.state).removeprefix("STATE_").lower(),
        "reason": breaker.reason,
        "remaining": _known(breaker, "remaining_duration"),
    }


def _memory(memory: pb.Memory) -> dict[str, Json]:
    return {
        "total": memory.total_bytes,
        "available": memory.available_bytes,
        "limit": memory.limit_bytes,
        "used": memory.used_bytes,
        "reserved": memory.reserved_bytes,
    }


def backends(shown: Iterable[fleet_pb2.Backend]) -> list[Json]:
    """Returns backends."""
    return [backend(each) for each in shown]


def _ms(time: timestamp_pb2.Timestamp) -> int:
    return time.seconds * 1000 + time.nanos // 1_000_000


def _known(message: Message, field: str) -> float | None:
    """Returns a duration in a message; None if it is unset."""
    return _seconds(getattr(message, field)) if message.HasField(field) else None


def _seconds(duration: duration_pb2.Duration) -> float:
    return round(duration.seconds + duration.nanos / 1e9, 4)
