"""An immutable picture of the fleet, which all routing decisions are made over."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator.placement.room import ROOMY, Room

BUCKETS = (256, 1024, 4096, 16384, 0)
"""Longest prompts, in tokens, whose times to the first delta are counted together. The last has no bound."""


def bucket_of(tokens: float) -> int:
    """Returns the position in `BUCKETS` of a prompt's length."""
    return bisect_left(BUCKETS, tokens, hi=len(BUCKETS) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured of one model on one backend lately. None is not known."""

    call_count: int
    """Calls that ended."""
    error_ratio: float
    """Part of them that failed through the backend's fault."""
    duration: float | None
    """Seconds that a call takes."""
    prefill_rate: float | None
    """Prompt tokens evaluated a second."""
    decode_rate: float | None
    """Tokens a second of one reply."""
    first_deltas: tuple[float | None, ...]
    """Seconds to the first delta without those of a load, for each of `BUCKETS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointView:
    """A backend as it is at one moment."""

    name: str
    """The backend's name."""
    framework: str = ""
    """Framework behind it."""
    is_reachable: bool = True
    """Whether there is a connection on which it answers."""
    is_serving: bool = True
    """Whether it says that it takes calls."""
    is_drained: bool = False
    """Whether an operator told us not to send it new calls."""
    detail: str = ""
    """Why it is unreachable or not serving, for people."""
    models: tuple[pb.Model, ...] = ()
    """What it listed last. Never changed in place."""
    are_models_known: bool = True
    """Whether it has listed its models at least once."""
    can_admit: bool = True
    """Whether the breaker of the whole backend lets a call through."""
    is_ejected: bool = False
    """Whether that breaker is open or half-open."""
    is_probing: bool = False
    """Whether a call is out that decides whether it works again."""
    reopens_in: float = 0.0
    """Seconds until its breaker lets a call through."""
    refused_models: frozenset[str] = frozenset()
    """Models whose own breaker keeps calls away."""
    cause: str = ""
    """Reason of the failure that opened its breaker."""
    outstanding: int = 0
    """Calls we sent it that have not ended, those that wait included."""
    slots: int = 0
    """Calls it may serve at once. 0 is no limit."""
    queue: int = 0
    """Calls that may wait for a slot."""
    first_delta: float | None = None
    """Recent seconds to the first delta. None is not known."""
    success_rate: float = 1.0
    """Recent share of calls that it did not fail."""
    room: Callable[[str], Room] = lambda model: ROOMY
    """How much room there is for a model. Asked for when it matters, which is seldom."""
    doubts: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """How far its word was not kept lately, in (0.0, 1.0], by model and capability."""
    outstanding_tokens: float = 0.0
    """Tokens to read and to write that those calls may still need, roughly."""
    figures: Mapping[str, Figures] = field(default_factory=dict)
    """What was measured lately, by model. Never changed in place."""
    memory: pb.Memory | None = None
    """Memory that its models share. None is not known."""
    share: float = 1.0
    """Part of its full share of calls that it should get now, in (0.0, 1.0]."""
    weight: float = 1.0
    """How much it is preferred when all else is equal."""
