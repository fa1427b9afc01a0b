"""The decision where a call goes: filter, score, pick.

`Route` acts on it and `ExplainRoute` prints it. That both take it from here is
what makes an explanation true.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeAlias

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendNotFound,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    MemoryExhausted,
    ModelNotFound,
    ModelQuarantined,
    NoBackend,
    QueueFull,
)
from forebay.kit.pipeline import Request, Resumption
from forebay.orchestrator.config import ScorerWeights
from forebay.orchestrator.routing import affinity as prefixes
from forebay.orchestrator.routing.affinity import Affinity
from forebay.orchestrator.routing.classify import Traits, classify
from forebay.orchestrator.routing.filters import FILTERS, Question, is_cold
from forebay.orchestrator.routing.matching import Found, Match, Matcher
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
    match: Match | None = None
    """How the name that was asked for and that model belong together. None if it has no such model."""
    match_detail: str = ""
    """Why, in one sentence for people. Empty if there is nothing to say."""

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
            match=self.match.value if self.match is not None else "",
            match_detail=self.match_detail,
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
    chain: Sequence[int] = ()
    """What stands for the conversation in `Affinity`. Empty if it is not remembered."""

    def failure(self) -> Failure:  # noqa: PLR0911  # a line for each way of having nobody
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
        if by == {"memory"}:
            return MemoryExhausted(
                f"no backend has room for model {self.model} ({listed})", metadata=metadata
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


_NOT_CONCERNED = frozenset({"allowed", "tried", "model"})
"""Filters whose refusal is no obstacle that could go away."""


class Router:
    """Decides over a picture of the fleet. What it remembers makes no decision wrong, only quick or apt.

    Args:
        weights: how much each score counts.
        picker: name of the picker.
        source: where randomness comes from.
        matcher: finds models by name. None is one with the default settings.
        affinity: remembers who has read which conversation. None goes by what backends list alone.
    """

    def __init__(
        self,
        *,
        weights: ScorerWeights,
        picker: str,
        source: random.Random,
        matcher: Matcher | None = None,
        affinity: Affinity | None = None,
    ) -> None:
        self._source = source
        self._matcher = matcher or Matcher()
        self._affinity = affinity
        self.change(weights=weights, picker=picker)

    def change(self, *, weights: ScorerWeights, picker: str) -> None:
        """Compares backends by other weights, or takes them by another picker, from now on."""
        self._weights: dict[str, float] = {name: getattr(weights, name) for name in SCORERS}
        self._picker = PICKERS[picker]

    def decide(
        self,
        request: Request,
        snapshot: Snapshot,
        *,
        tried: frozenset[str] = frozenset(),
        resumption: Resumption | None = None,
        caller: str = "",
    ) -> Decision:
        """Decides where a request goes.

        Args:
            request: the request; its `model` is the one that is looked for.
            snapshot: every backend.
            tried: backends that failed this call already.
            resumption: set if the reply was begun elsewhere.
            caller: who asks. Only their own conversations are remembered for them.

        Raises:
            BackendNotFound: the request names a backend that does not exist.
        """
        permitted = tuple(request.routing.backends)
        _check_names(permitted, snapshot)
        traits = classify(request)
        held: dict[str, float] = {}
        may_be_like = self._may_be_like(request)
        found = self._matcher.find(request.model, [endpoint.models for endpoint in snapshot])
        meanings = [
            _meaning(each, endpoint, resumption, may_be_like=may_be_like)
            for each, endpoint in zip(found, snapshot, strict=True)
        ]
        questions = [
            Question(
                model=request.model,
                traits=traits,
                allowed=permitted,
                tried=tried,
                endpoint=endpoint,
                found=model,
                match=match,
                match_detail=detail,
                held=held,
                resumption=resumption,
            )
            for endpoint, (model, match, detail) in zip(snapshot, meanings, strict=True)
        ]
        refusals = [_refusal(question) for question in questions]
        open_questions = [q for q, refusal in zip(questions, refusals, strict=True) if refusal is None]
        chain = self._hold(request, questions, caller, held)
        scorers = self._concerned(open_questions or questions)
        judged = [
            self._score(question, scorers) if refusal is None else _refused(question, *refusal)
            for question, refusal in zip(questions, refusals, strict=True)
        ]
        judged = _without_likes(judged)
        open_ones = [candidate for candidate in judged if not candidate.refused_by]
        chosen, is_last_resort = self._choose(open_ones, has_order=bool(permitted)), False
        if chosen is None:
            chosen = self._last_resort(questions, scorers)
            is_last_resort = chosen is not None
        # Who is chosen, then best first; what was refused stays in the order of the configuration.
        ranked = sorted(
            judged,
            key=lambda candidate: (bool(candidate.refused_by), candidate is not chosen, -candidate.total),
        )
        return Decision(
            model=request.model,
            traits=traits,
            candidates=tuple(ranked),
            chosen=chosen,
            is_last_resort=is_last_resort,
            chain=chain,
        )

    def _may_be_like(self, request: Request) -> bool:
        """Whether the same model in another quantisation may answer: the operator and the caller say so."""
        return (
            self._matcher.settings.like
            and isinstance(request, pb.GenerateRequest)
            and pb.DEGRADATION_KIND_MODEL_SUBSTITUTED in request.accepted_degradations
        )

    def _hold(
        self, request: Request, questions: Sequence[Question], caller: str, held: dict[str, float]
    ) -> Sequence[int]:
        """Finds who holds how much of the conversation, and returns what stands for it."""
        models = {question.endpoint.name: question.found for question in questions if question.found}
        if len(models) < 2 or not isinstance(request, pb.GenerateRequest) or not self._weights["affinity"]:
            return ()
        counts = prefixes.listed(request, models)
        chain: Sequence[int] = ()
        if self._affinity is not None:
            chain = self._affinity.chain(request)
            for name, count in self._affinity.matches(caller, chain, models).items():
                # Of what a backend lists, its list is the truth. What it does not list of a conversation it
                # may hold all the same, kept apart for a caller under a name that is not known here.
                counts.setdefault(name, count)
        if counts:
            held.update(prefixes.shares(request, counts))
        return chain

    def _concerned(self, questions: Sequence[Question]) -> list[str]:
        """Returns the scorers that can tell backends apart.

        One that gives the same to all would squeeze the rest into a corner.
        """
        silent = set(_NEEDS)
        for question in questions:
            silent.difference_update([name for name in silent if _NEEDS[name](question)])
        return [name for name in SCORERS if name not in silent]

    def _score(self, question: Question, scorers: Sequence[str]) -> Candidate:
        scores: dict[str, float] = {}
        total = weight = 0.0
        for name in scorers:
            score = scores[name] = SCORERS[name](question)
            weight += self._weights[name]
            total += self._weights[name] * score
        return Candidate(
            endpoint=question.endpoint,
            model=question.found,
            scores=scores,
            total=total / weight if weight else 0.0,
            match=question.match,
            match_detail=question.match_detail,
        )

    def _choose(self, candidates: Sequence[Candidate], *, has_order: bool) -> Candidate | None:
        if not candidates:
            return None
        if not has_order:  # where the caller gave an order, the order holds
            # A backend on probation gets the next call that may go anywhere. Left to its scores it might
            # never be tried, and stay ejected long after it recovered. If it fails, the call moves on.
            probation = [candidate for candidate in candidates if candidate.endpoint.is_ejected]
            if probation and len(candidates) > 1:
                return probation[0]
            # One that has just come back sits out as many turns as its share leaves out.
            candidates = [each for each in candidates if self._takes_turn(each)] or candidates
        return candidates[self._picker([candidate.total for candidate in candidates], self._source)]

    def _takes_turn(self, candidate: Candidate) -> bool:
        share = candidate.endpoint.share
        return share >= 1.0 or self._source.random() < share

    def _last_resort(self, questions: Sequence[Question], scorers: Sequence[str]) -> Candidate | None:
        # The breakers must not shut the last path for good: if nothing but a breaker stands in the way, one
        # call at a time goes through all the same.
        resting: list[Candidate] = []
        for question in questions:
            refusals = [name for name, refuses in FILTERS if refuses(question) is not None]
            if refusals == ["breaker"] and not question.endpoint.is_probing:
                resting.append(self._score(question, scorers))
        return max(resting, key=lambda candidate: candidate.total, default=None)


def _refusal(question: Question) -> tuple[str, str] | None:
    """Returns the first filter that refuses and why, or None."""
    for name, refuses in FILTERS:
        detail = refuses(question)
        if detail is not None:
            return name, detail
    return None


def _refused(question: Question, by: str, detail: str) -> Candidate:
    return Candidate(
        endpoint=question.endpoint,
        model=question.found,
        refused_by=by,
        detail=detail,
        scores={},
        match=question.match,
        match_detail=question.match_detail if question.found is not None else "",
    )


def _without_likes(judged: list[Candidate]) -> list[Candidate]:
    """Refuses what is merely like the model, where somebody can serve the model itself."""
    able = [each.name for each in judged if not each.refused_by and each.match is not Match.LIKE]
    if not able:
        return judged
    return [
        replace(each, refused_by="like", detail=f"{able[0]} can serve the model itself", scores={}, total=0.0)
        if each.match is Match.LIKE and not each.refused_by
        else each
        for each in judged
    ]


def _meaning(
    found: Found | None, endpoint: EndpointView, resumption: Resumption | None, *, may_be_like: bool
) -> tuple[pb.Model | None, Match | None, str]:
    """Returns the model that may answer, how it was found, and what is to be said of that."""
    if resumption is not None and resumption.needs_same_weights:
        same = [each for each in endpoint.models if each.weights.digest == resumption.weights]
        if same and (found is None or found.model not in same):
            return same[0], Match.WEIGHTS, "its weights are those that began the reply"
    if found is None:
        return None, None, ""
    if found.match is not Match.LIKE or may_be_like:
        return found.model, found.match, found.detail
    return None, None, f"{found.model.id}, and {found.detail}"


def _knows_of_speed(question: Question) -> bool:
    """Whether it was measured how fast replies come."""
    figures = question.endpoint.figures.get(question.found.id) if question.found is not None else None
    return figures is not None and bool(figures.decode_rate)


def _knows_of_room(question: Question) -> bool:
    """Whether anything is known of the memory that a model would be loaded into."""
    found, endpoint = question.found, question.endpoint
    if endpoint.memory is not None:
        return True
    return found is not None and is_cold(found) and bool(endpoint.room(found.id).limit)


_NEEDS: Mapping[str, Callable[[Question], object]] = {
    "preference": lambda question: question.allowed,
    "proven": lambda question: question.traits.specialities,
    "affinity": lambda question: question.held,
    "speed": _knows_of_speed,
    "tokens": lambda question: question.endpoint.outstanding_tokens,
    "memory": _knows_of_room,
}
"""What a scorer needs to know of a backend to tell it apart. Those that are not here always have it."""


def _check_names(names: Sequence[str], snapshot: Snapshot) -> None:
    if not names:
        return
    known = [endpoint.name for endpoint in snapshot]
    for name in names:
        if name not in known:
            raise BackendNotFound(
                f"routing.backends names {name}, and there is no such backend; there are {', '.join(known)}",
                metadata={"backend": name},
            )
