"""Filters: each refuses a backend for a reason, or says nothing.

A filter refuses only what is certain to fail. What is merely worse is a scorer's
business, and what is unknown is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Resumption
from forebay.orchestrator.placement.room import estimate
from forebay.orchestrator.routing.classify import Traits
from forebay.orchestrator.routing.matching import Match
from forebay.orchestrator.routing.view import EndpointView


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Whether one backend can serve one request with one model."""

    model: str
    """The model that is asked for."""
    traits: Traits
    """What the request needs."""
    allowed: tuple[str, ...]
    """Backends the caller allows, in order of preference. Empty is any."""
    tried: frozenset[str]
    """Backends that failed this call already."""
    endpoint: EndpointView
    """The backend."""
    found: pb.Model | None
    """What the backend calls that model; None if it has no such model."""
    match: Match | None = None
    """How the name and that model belong together. None if it has no such model."""
    match_detail: str = ""
    """Why, for people; of a model that is merely like it and may not answer, what keeps it out."""
    held: Mapping[str, float] = field(default_factory=dict)
    """By backend, the part of the prompt that it holds evaluated, as far as known. Filled in for scorers."""
    resumption: Resumption | None = None
    """Set if the reply was begun elsewhere."""


Filter: TypeAlias = Callable[[Question], str | None]
"""Returns why a backend is refused, in one sentence for people, or None."""


def allowed(question: Question) -> str | None:
    """Refuses backends that the caller does not allow."""
    if question.allowed and question.endpoint.name not in question.allowed:
        return f"the request allows only {', '.join(question.allowed)}"
    return None


def tried(question: Question) -> str | None:
    """Refuses backends that failed this call."""
    if question.endpoint.name in question.tried:
        return "it has failed this call already"
    return None


def reachable(question: Question) -> str | None:
    """Refuses backends without a connection."""
    if not question.endpoint.is_reachable:
        return question.endpoint.detail or "it cannot be reached"
    return None


def serving(question: Question) -> str | None:
    """Refuses backends that say they take no calls."""
    if not question.endpoint.is_serving:
        return question.endpoint.detail or "it says that it is not serving"
    return None


def drained(question: Question) -> str | None:
    """Refuses backends that an operator drained."""
    return "an operator drained it" if question.endpoint.is_drained else None


def model(question: Question) -> str | None:
    """Refuses backends that do not have the model."""
    if question.endpoint.are_models_known:
        if question.found is not None:
            return None
        near = f", only {question.match_detail}" if question.match_detail else ""
        return f"it has no model {question.model}{near}"
    # Of one that was never reached, why it cannot be reached says more; that is for the filters below.
    is_up = question.endpoint.is_reachable and question.endpoint.is_serving
    return "its models are not known yet" if is_up else None


def quarantine(question: Question) -> str | None:
    """Refuses models that crashed too often."""
    if question.found is not None and question.found.state == pb.Model.STATE_QUARANTINED:
        return f"model {question.found.id} crashed too often; load it by name to try again"
    return None


def capability(question: Question) -> str | None:
    """Refuses models that are known to lack what the request needs."""
    if question.found is None:
        return None
    for report in question.found.capabilities:
        if report.capability in question.traits.needs and report.support == pb.CapabilityReport.SUPPORT_NO:
            name = pb.Capability.Name(report.capability).removeprefix("CAPABILITY_").lower()
            return f"model {question.found.id} does not support {name}"
    return None


def resumption(question: Question) -> str | None:
    """Refuses models that are not known to go on with the reply.

    What is unknown is not tried here: a backend that begins anew would repeat what the caller has read.
    """
    begun, found = question.resumption, question.found
    if begun is None or found is None:
        return None
    if begun.needs_same_weights and found.weights.digest != begun.weights:
        return f"model {found.id} is not known to have the weights that began the reply"
    if not can(found, pb.CAPABILITY_CONTINUE):
        return f"model {found.id} is not known to go on from the start of a reply"
    return None


def can(model: pb.Model | None, capability: pb.Capability.ValueType) -> bool:
    """Returns whether a model is known to have a capability."""
    return model is not None and any(
        report.capability == capability and report.support == pb.CapabilityReport.SUPPORT_YES
        for report in model.capabilities
    )


def context(question: Question) -> str | None:
    """Refuses models whose context, as they are loaded, is too small for any reading of the text."""
    found, least = question.found, question.traits.least_tokens
    if found is None:
        return None
    limits = (found.loaded_context_token_count, found.context_token_count)
    limit = min((each for each in limits if each > 0), default=least)
    if least <= limit:
        return None
    loaded = " as it is loaded" if limit == found.loaded_context_token_count else ""
    return f"the text has at least {least} tokens and the context{loaded} holds {limit}"


def memory(question: Question) -> str | None:
    """Refuses models that cannot get into memory, whatever may be unloaded for them."""
    if question.found is None or not is_cold(question.found):
        return None
    room, need = question.endpoint.room(question.found.id), estimate(question.found)
    if need <= room.most:
        return None
    return (
        f"model {question.found.id} needs {need / 2**30:.1f} GiB of memory, and {room.most / 2**30:.1f} GiB "
        f"of the {room.limit / 2**30:.1f} GiB for models could be had"
    )


def is_cold(model: pb.Model) -> bool:
    """Returns whether a model has to be loaded before it can answer."""
    return model.state in (pb.Model.STATE_AVAILABLE, pb.Model.STATE_FAILED)


def breaker(question: Question) -> str | None:
    """Refuses backends and models that failed lately."""
    endpoint = question.endpoint
    if not endpoint.can_admit:
        if endpoint.is_probing:
            return f"it failed ({endpoint.cause}) and is being tried by another call"
        return f"it failed ({endpoint.cause}) and rests for {endpoint.reopens_in:.1f} s"
    if question.found is not None and question.found.id in endpoint.refused_models:
        return f"model {question.found.id} failed and rests"
    return None


def room(question: Question) -> str | None:
    """Refuses backends whose slots and queue are full."""
    endpoint = question.endpoint
    if endpoint.slots and endpoint.outstanding >= endpoint.slots + endpoint.queue:
        return f"its {endpoint.slots} slots and {endpoint.queue} places in the queue are taken"
    return None


FILTERS: Sequence[tuple[str, Filter]] = (
    # What can be said of a backend without looking at the request comes after what the caller said, so that
    # nobody reads of the health of a backend they did not ask for.
    ("allowed", allowed),
    ("tried", tried),
    # The model before the state: "it has no such model" holds however healthy the backend is, and it is by
    # this order that a model nobody has is told from one that cannot be served now.
    ("model", model),
    ("quarantine", quarantine),
    ("capability", capability),
    ("resumption", resumption),
    ("context", context),
    ("memory", memory),
    ("reachable", reachable),
    ("serving", serving),
    ("drained", drained),
    # Last the refusals that waiting cures: only where one of them is all that stands in the way can an
    # ejected backend serve as a last resort, or a full one be worth coming back to.
    ("breaker", breaker),
    ("room", room),
)
"""Every filter by name. The first that refuses is the one that is reported."""
