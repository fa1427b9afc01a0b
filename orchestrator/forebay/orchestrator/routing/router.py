"""The decision where a call goes: filter, score, pick.

`Route` acts on it and `ExplainRoute` prints it. That both take it from here is
what makes an explanation true.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendNotFound,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    ModelNotFound,
    ModelQuarantined,
    NoBackend,
    QueueFull,
)
from forebay.kit.pipeline import Request, Resumption
from forebay.orchestrator.config import ScorerWeights
from forebay.orchestrator.routing.classify import Traits, classify
from forebay.orchestrator.routing.filters import FILTERS, Question
from forebay.orchestrator.routing.names import find_model
from forebay.orchestrator.routing.pickers import PICKERS
from forebay.orchestrator.routing.scorers import SCORERS
from forebay.orchestrator.routing.view import EndpointView

Snapshot: TypeAlias = Sequence[EndpointView]
"""Every backend at one moment, in the order of the configuration."""

ROOM_RETRY_AFTER = timedelta(seconds=1)
"""When to come back to a full fleet. Answers take seconds, so a slot is likely to be free by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One backend as it was judged for one request."""

    endpoint: EndpointView
    """The backend."""
    model: pb.Model | None
    """The model it would serve, as it calls it. None if it has no such model."""
    refused_by: str = ""
    """Filter that refused it. Empty if none did."""
    detail: str = ""
    """Why it was refused, for people."""
    scores: Mapping[str, float]
    """Scores by scorer. Empty if it was refused."""
    total: float = 0.0
    """Weighted mean of the scores."""

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.endpoint.name

    @property
    def spelling(self) -> str:
        """The model's name as the backend spells it. Empty if it has no such model."""
        return self.model.id if self.model is not None else ""

    def to_proto(self) -> fleet_pb2.Candidate:
        """Returns it as clients see it."""
        return fleet_pb2.Candidate(
            backend=self.name,
            refused_by=self.refused_by,
            refusal_detail=self.detail,
            scores=self.scores,
            total_score=self.total,
            model=self.spelling,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a call goes, and why not elsewhere."""

    model: str
    """The model that was asked for."""
    traits: Traits
    """What the request was taken for."""
    candidates: tuple[Candidate, ...]
    """Every backend, the best first and the refused last."""
    chosen: Candidate | None
    """The one it goes to. None if there is none."""
    is_last_resort: bool = False
    """Whether it goes to a backend that rests, because there is no other."""

    def failure(self) -> Failure:
        """Returns what to tell the caller if there is none to choose."""
        refusals = {candidate.name: candidate.detail for candidate in self.candidates}
        listed = "; ".join(f"{name}: {detail}" for name, detail in refusals.items())
        metadata = {"model": self.model} | {
            f"refused.{candidate.name}": candidate.refused_by for candidate in self.candidates
        }
        # Whoever has no such model, or was never heard of, says nothing about why it cannot be served now.
        serious = [c for c in self.candidates if c.model is not None and c.refused_by not in _NOT_CONCERNED]
        by = {candidate.refused_by for candidate in serious}
        if not serious and any(
            c.refused_by == "model" and c.endpoint.are_models_known for c in self.candidates
        ):
            # A backend that was never reached may have it. A misspelt name is far more likely, and a caller
            # who is told UNAVAILABLE would try it again for ever.
            return ModelNotFound(f"no backend has a model {self.model} ({listed})", metadata=metadata)
        if by == {"quarantine"}:
            return ModelQuarantined(f"model {self.model} crashed too often ({listed})", metadata=metadata)
        if by == {"capability"}:
            return CapabilityUnsupported(
                f"no backend can do what is asked with model {self.model} ({listed})", metadata=metadata
            )
        if by == {"context"}:
            return ContextExceeded(
                f"the request does not fit model {self.model} ({listed})", metadata=metadata
            )
        if "room" in by:
            return QueueFull(
                f"every backend with model {self.model} is full ({listed})",
                metadata=metadata,
                retry_after=ROOM_RETRY_AFTER,
            )
        resting = [c.endpoint.reopens_in for c in serious if c.refused_by == "breaker"]
        return NoBackend(
            f"no backend can serve model {self.model} now ({listed})",
            metadata=metadata,
            retry_after=timedelta(seconds=min(resting)) if resting else None,
        )


_PLAIN = frozenset({pb.CAPABILITY_GENERATE, pb.CAPABILITY_EMBED, pb.CAPABILITY_COUNT_TOKENS})
"""Capabilities that are no speciality: whoever lists a model for it can do them, or is refused."""

_NOT_CONCERNED = frozenset({"allowed", "tried", "model"})
"""Filters whose refusal is no obstacle that could go away."""


class Router:
    """Decides over a picture of the fleet. It keeps no state of its own.

    Args:
        weights: how much each score counts.
        picker: name of the picker.
        source: where randomness comes from.
    """

    def __init__(self, *, weights: ScorerWeights, picker: str, source: random.Random) -> None:
        self._weights: dict[str, float] = {name: getattr(weights, name) for name in SCORERS}
        self._picker = PICKERS[picker]
        self._source = source

    def decide(
        self,
        request: Request,
        snapshot: Snapshot,
        *,
        tried: frozenset[str] = frozenset(),
        resumption: Resumption | None = None,
    ) -> Decision:
        """Decides where a request goes.

        Args:
            request: the request; its `model` is the one that is looked for.
            snapshot: every backend.
            tried: backends that failed this call already.
            resumption: set if the reply was begun elsewhere.

        Raises:
            BackendNotFound: the request names a backend that does not exist.
        """
        permitted = tuple(request.routing.backends)
        _check_names(permitted, snapshot)
        traits = classify(request)
        questions = [
            Question(
                model=request.model,
                traits=traits,
                allowed=permitted,
                tried=tried,
                endpoint=endpoint,
                found=_find(request.model, endpoint.models, resumption),
                resumption=resumption,
            )
            for endpoint in snapshot
        ]
        judged = [self._judge(question) for question in questions]
        open_ones = [candidate for candidate in judged if not candidate.refused_by]
        chosen, is_last_resort = self._choose(open_ones, has_order=bool(permitted)), False
        if chosen is None:
            chosen = self._last_resort(questions)
            is_last_resort = chosen is not None
        # Best first; what was refused stays in the order of the configuration.
        ranked = sorted(judged, key=lambda candidate: (bool(candidate.refused_by), -candidate.total))
        return Decision(
            model=request.model,
            traits=traits,
            candidates=tuple(ranked),
            chosen=chosen,
            is_last_resort=is_last_resort,
        )

    def _judge(self, question: Question) -> Candidate:
        for name, refuses in FILTERS:
            detail = refuses(question)
            if detail is not None:
                return Candidate(
                    endpoint=question.endpoint,
                    model=question.found,
                    refused_by=name,
                    detail=detail,
                    scores={},
                )
        return self._score(question)

    def _score(self, question: Question) -> Candidate:
        scores = {name: scorer(question) for name, scorer in SCORERS.items() if self._has_say(name, question)}
        weight = sum(self._weights[name] for name in scores)
        total = sum(self._weights[name] * score for name, score in scores.items()) / weight if weight else 0.0
        return Candidate(endpoint=question.endpoint, model=question.found, scores=scores, total=total)

    def _has_say(self, scorer: str, question: Question) -> bool:
        """Whether a score can differ. One that is the same for all squeezes the rest into a corner."""
        if scorer == "preference":
            return bool(question.allowed)
        if scorer == "proven":
            return not question.traits.needs <= _PLAIN
        return True

    def _choose(self, candidates: Sequence[Candidate], *, has_order: bool) -> Candidate | None:
        if not candidates:
            return None
        # A backend on probation gets the next call that may go anywhere. Left to its scores it might never
        # be tried, and stay ejected long after it recovered. If it fails, the call moves on. Where the
        # caller gave an order, the order holds.
        probation = [candidate for candidate in candidates if candidate.endpoint.is_ejected]
        if probation and len(candidates) > 1 and not has_order:
            return probation[0]
        return candidates[self._picker([candidate.total for candidate in candidates], self._source)]

    def _last_resort(self, questions: Sequence[Question]) -> Candidate | None:
        # The breakers must not shut the last path for good: if nothing but a breaker stands in the way, one
        # call at a time goes through all the same.
        resting: list[Candidate] = []
        for question in questions:
            refusals = [name for name, refuses in FILTERS if refuses(question) is not None]
            if refusals == ["breaker"] and not question.endpoint.is_probing:
                resting.append(self._score(question))
        return max(resting, key=lambda candidate: candidate.total, default=None)


def _find(model: str, listed: Sequence[pb.Model], resumption: Resumption | None) -> pb.Model | None:
    """Returns the backend's model of that name, or the one with the very weights that a reply needs."""
    found = find_model(model, listed)
    if resumption is None or not resumption.needs_same_weights:
        return found
    same = [each for each in listed if each.weights.digest == resumption.weights]
    return found if found in same or not same else same[0]


def _check_names(names: Sequence[str], snapshot: Snapshot) -> None:
    known = [endpoint.name for endpoint in snapshot]
    for name in names:
        if name not in known:
            raise BackendNotFound(
                f"routing.backends names {name}, and there is no such backend; there are {', '.join(known)}",
                metadata={"backend": name},
            )
