"""Sends a call to the backend that suits it best now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from opentelemetry import trace

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendUnavailable,
    BrokenStream,
    Failure,
    Fault,
    StreamInterrupted,
    WrongModel,
)
from forebay.kit.pipeline import Call, Event, Request, Resumption, Send, Service
from forebay.orchestrator.routing.affinity import Affinity
from forebay.orchestrator.routing.filters import can
from forebay.orchestrator.routing.matching import Match
from forebay.orchestrator.routing.names import is_same
from forebay.orchestrator.routing.router import Candidate, Decision, Router, Snapshot

CONTINUING = frozenset({pb.CONTINUATION_POLICY_SAME_WEIGHTS, pb.CONTINUATION_POLICY_ANY_MODEL})
"""Policies under which a reply may go on elsewhere."""


_LOSSES = (BackendUnavailable, BrokenStream, StreamInterrupted)
"""Failures after which a backend is likely to be another process, which has read nothing yet."""


class Fleet(Protocol):
    """What routing needs of the fleet."""

    def snapshot(self) -> Snapshot:
        """Returns every backend as it is now."""

    def service(self, name: str) -> Service:
        """Returns the stack of a backend."""


class Route:
    """Decides where a call goes, asks in that backend's spelling, and checks who answered.

    Args:
        fleet: the backends.
        router: decides.
        on_decision: told of each decision, for metrics.
        affinity: told which backend has read which conversation. None remembers nothing.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        router: Router,
        on_decision: Callable[[Decision], None] | None = None,
        affinity: Affinity | None = None,
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._on_decision = on_decision
        self._affinity = affinity

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call.

        Raises:
            NoBackend: nobody can serve it now; the message says why, for each.
            ModelNotFound: nobody has the model.
            WrongModel: another model answered.
        """
        decision = self._router.decide(
            call.request,
            self._fleet.snapshot(),
            tried=call.tried,
            resumption=call.resumption,
            caller=call.caller,
        )
        if self._on_decision is not None:
            self._on_decision(decision)
        _note(decision)
        chosen = decision.chosen
        if chosen is None:
            raise decision.failure()
        if call.on_route is not None:
            call.on_route(chosen.name)
        inner = self._fleet.service(chosen.name)
        request = _addressed(call, chosen)
        check = _Check(call, chosen, send)
        try:
            # No await between the decision and here: what was decided is still true when the call is counted.
            await inner(call.with_(request=request, tokens=decision.traits.due_tokens), check)
        except Failure as failure:
            failure.metadata["backend"] = chosen.name
            if self._affinity is not None and isinstance(failure, _LOSSES):
                self._affinity.forget(chosen.name)
            raise
        if self._affinity is not None and decision.chain:
            self._affinity.note(call.caller, chosen.name, decision.chain)


def foresee(call: Call[Request], *, fleet: Fleet, router: Router) -> Failure | None:
    """Returns how a call fails that nobody can serve, however long it waits. None if somebody may.

    Only what the caller has to mend is told so soon, such as a misspelt model: a backend that is away may be
    back by the call's turn.
    """
    request = call.request
    found: Failure | None = None
    for model in dict.fromkeys((request.model, *request.routing.fallback_models)):
        asked = request
        if model != request.model:
            asked = type(request)()
            asked.CopyFrom(request)  # type: ignore[arg-type]  # both are of one type, which the union hides
            asked.model = model
        decision = router.decide(asked, fleet.snapshot(), tried=call.tried, caller=call.caller)
        if decision.chosen is not None:
            return None
        failure = decision.failure()
        if failure.fault is not Fault.CALLER:
            return None
        found = found or failure
    return found


class _Check:
    """A `Send` that names who answers, and refuses an answer from another model than was asked for."""

    def __init__(self, call: Call[Request], chosen: Candidate, send: Send) -> None:
        self._request = call.request
        self._request_id = call.request_id
        self._resumption = call.resumption
        self._chosen = chosen
        self._send = send

    def __call__(self, event: Event) -> Awaitable[None]:
        if isinstance(event, pb.GenerateResponse):
            if event.HasField("started"):
                self._name(event.started)
                event.started.request_id = self._request_id
                self._weigh(event.started)
        else:
            self._name(event)
        return self._send(event)

    def _name(self, answer: pb.Started | pb.EmbedResponse | pb.CountTokensResponse) -> None:
        asked = self._chosen.spelling
        # Our name for the backend: its own may differ, and another orchestrator tells the name of a backend
        # that the caller could neither drain nor ask for here.
        answer.backend = self._chosen.name
        if not answer.model:
            answer.model = asked
        if self._is_allowed(answer.model):
            if self._chosen.match is Match.LIKE:  # only where the caller accepts it
                _mark(answer, f"model {answer.model} answers: {self._chosen.match_detail}")
            return
        accepted = getattr(self._request, "accepted_degradations", ())
        if pb.DEGRADATION_KIND_MODEL_SUBSTITUTED not in accepted or isinstance(
            answer, pb.CountTokensResponse
        ):
            raise WrongModel(
                f"backend {self._chosen.name} was asked for model {asked} and answered with {answer.model}",
                metadata={"backend": self._chosen.name, "asked": asked, "answered": answer.model},
            )
        _mark(answer, f"model {answer.model} answers instead of {asked}")

    def _weigh(self, started: pb.Started) -> None:
        """Says which weights answer, and refuses others than those a reply must go on with."""
        listed = self._chosen.model
        is_listed = listed is not None and listed.HasField("weights") and listed.id == started.model
        if listed is not None and is_listed and not started.HasField("weights"):
            started.weights.CopyFrom(listed.weights)
        resumption = self._resumption
        if resumption is None or not resumption.needs_same_weights:
            return
        if started.weights.digest != resumption.weights:
            # It has another model under that name since it listed its models.
            raise WrongModel(
                f"backend {self._chosen.name} has other weights than those that began the reply",
                metadata={"backend": self._chosen.name, "answered": started.model},
            )

    def _is_allowed(self, answered: str) -> bool:
        named = (self._chosen.spelling, *self._request.routing.fallback_models)
        return any(is_same(name, answered, self._chosen.endpoint.models) for name in named)


def _mark(answer: pb.Started | pb.EmbedResponse | pb.CountTokensResponse, detail: str) -> None:
    """Says that another model answers than the one asked for. A count of tokens has no place for it."""
    if isinstance(answer, pb.CountTokensResponse):
        return
    if pb.DEGRADATION_KIND_MODEL_SUBSTITUTED not in {each.kind for each in answer.degradations}:
        answer.degradations.add(kind=pb.DEGRADATION_KIND_MODEL_SUBSTITUTED, field="model", detail=detail)


def _addressed(call: Call[Request], chosen: Candidate) -> Request:
    """Returns the request as the backend is to see it."""
    request = call.request
    copy = type(request)()
    copy.CopyFrom(request)  # type: ignore[arg-type]  # both are of one type, which the union hides
    copy.model = chosen.spelling
    copy.request_id = call.request_id
    if isinstance(copy, pb.GenerateRequest):
        _prepare_splices(copy, call.resumption, chosen)
    # The hints were for us, and an orchestrator behind us does not know our names.
    priority = request.routing.priority
    copy.ClearField("routing")
    if priority:
        copy.routing.priority = priority
    return copy


def _prepare_splices(request: pb.GenerateRequest, resumption: Resumption | None, chosen: Candidate) -> None:
    """Asks for token identifiers where they may be needed, and leaves out those that mean nothing there."""
    model = chosen.model
    if request.routing.continuation in CONTINUING and can(model, pb.CAPABILITY_TOKEN_IDS):
        # `Continue` takes them out again if the caller did not ask for them.
        request.include_token_ids = True
    if resumption is not None and request.continue_from.token_ids:
        digest = model.weights.digest if model is not None else ""
        if not digest or digest != resumption.weights:
            request.continue_from.ClearField("token_ids")


def _note(decision: Decision) -> None:
    """Puts the decision onto the span of the call."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    attributes: dict[str, str | float | bool | Sequence[str]] = {
        "forebay.route.class": decision.traits.request_class,
        "forebay.route.chosen": decision.chosen.name if decision.chosen else "",
        "forebay.route.last_resort": decision.is_last_resort,
    }
    for candidate in decision.candidates:
        key = f"forebay.route.{candidate.name}"
        attributes[key] = candidate.refused_by or f"{candidate.total:.3f}"
    if decision.chosen is not None and decision.chosen.match is not None:
        attributes["forebay.route.match"] = decision.chosen.match.value
    span.add_event("forebay.route", attributes)
