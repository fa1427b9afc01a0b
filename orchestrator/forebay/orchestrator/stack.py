"""What happens to a call: two stacks, read from top to bottom.

"Above" is nearer to the client, "below" is nearer to the backend. A layer sees
a call after everything above it, and its events and failures before.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from datetime import timedelta

from forebay.kit import metrics
from forebay.kit.layers.limit import Limit
from forebay.kit.layers.measure import Measure
from forebay.kit.layers.watchdog import Watchdog
from forebay.kit.pipeline import Layer, Service, stack
from forebay.kit.telemetry import Telemetry, off
from forebay.orchestrator.activity import Activity
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import OrchestratorSettings
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.layers.account import Account
from forebay.orchestrator.layers.admit import Admit
from forebay.orchestrator.layers.coalesce import Coalesce, Spawn
from forebay.orchestrator.layers.continue_ import Continue
from forebay.orchestrator.layers.deadline import Deadline
from forebay.orchestrator.layers.fallback import Fallback
from forebay.orchestrator.layers.gather import Gather
from forebay.orchestrator.layers.guard import Guard
from forebay.orchestrator.layers.hedge import FirstDeltas, Hedge
from forebay.orchestrator.layers.place import Held, Place
from forebay.orchestrator.layers.remember import Remember
from forebay.orchestrator.layers.route import Fleet, Route, foresee
from forebay.orchestrator.layers.span import Span
from forebay.orchestrator.layers.verify import Judge, Verify
from forebay.orchestrator.replies import Store
from forebay.orchestrator.routing.affinity import Affinity
from forebay.orchestrator.routing.router import Router
from forebay.orchestrator.tally import Tally

UNLIMITED = sys.maxsize
"""Slots of a limit that was taken away while calls waited in it."""


def request_stack(
    settings: OrchestratorSettings,
    *,
    fleet: Fleet,
    router: Router,
    budget: RetryBudget,
    source: random.Random,
    admission: Admission,
    pool: Callable[[str], str] = lambda model: model,
    judge: Judge | None = None,
    store: Store | None = None,
    spawn: Spawn | None = None,
    weights: Callable[[str], str] = lambda model: "",
    times: FirstDeltas | None = None,
    affinity: Affinity | None = None,
    telemetry: Telemetry | None = None,
    activity: Activity | None = None,
) -> Service:
    """Returns the stack that every call goes down once.

    Args:
        settings: the orchestrator's settings.
        fleet: the backends.
        router: decides between them.
        budget: retries that all calls share.
        source: where jitter comes from.
        admission: the queue before all backends.
        pool: returns the pool of permits that calls for a model share.
        judge: told how replies kept what their backends had promised. None tells nobody.
        store: where answers are kept; None keeps none.
        spawn: starts tasks that no call owns; None shares no replies.
        weights: returns what is known of the weights behind a model's name.
        times: how long first deltas took lately. None knows of none.
        affinity: told which backend has read which conversation. None remembers nothing.
        telemetry: of this process; None tells nobody.
        activity: the record of requests; None keeps one that nobody reads.
    """
    watched_by = telemetry or off()
    record = activity or Activity(admission)
    tally = Tally(watched_by.metrics, record)
    frameworks = {backend.name: backend.framework or backend.name for backend in settings.backends}

    caching: list[Layer] = []
    if store is not None:
        # Above Coalesce and Admit: an answer that is known takes neither a flight nor a permit.
        caching.append(
            lambda inner: Remember(
                inner,
                store=store,
                weights=weights,
                is_shared=settings.cache.shared,
                on_lookup=tally.looked_up,
            )
        )
    if spawn is not None and settings.coalesce != "never":
        # Above Admit, so that whoever joins a reply holds no permit, nor a place in the queue.
        caching.append(
            lambda inner: Coalesce(
                inner,
                spawn=spawn,
                when=settings.coalesce,
                longest=settings.max_deadline,
                weights=weights,
                is_shared=settings.cache.shared,
                on_join=tally.joined,
            )
        )
    if spawn is not None and settings.gather.window:
        # Above Admit, so that calls that wait for a turn are gathered too, and take one together.
        caching.append(
            lambda inner: Gather(
                inner,
                spawn=spawn,
                window=settings.gather.window,
                max_texts=settings.gather.max_texts,
                on_gathered=tally.gathered,
            )
        )
    return stack(
        # Above all, so that its span covers every attempt and every wait, and tells the caller's time.
        lambda inner: Account(
            inner,
            telemetry=watched_by,
            framework=lambda backend: frameworks.get(backend, metrics.OTHER),
            activity=record,
        ),
        # Above all that waits, so that it bounds every wait, those between attempts included.
        lambda inner: Deadline(
            inner,
            default=settings.default_deadline,
            longest=settings.max_deadline,
            margin=settings.deadline_margin,
        ),
        *caching,
        # Above Fallback, so that a call keeps its place over its attempts.
        lambda inner: Admit(
            inner,
            admission=admission,
            pool=pool,
            foresee=lambda call: foresee(call, fleet=fleet, router=router),
            on_admitted=tally.admitted,
        ),
        # Above Continue, so that it sees the reply as the caller does, spliced or not.
        lambda inner: Verify(inner, judge=judge),
        # Above Fallback, so that whoever goes on with a broken reply is found as anyone is, with attempts and
        # a commit gate of its own: until the next part's first delta nothing tells the caller that there is
        # one. Below whatever holds a place for the call, which keeps it over the splice.
        lambda inner: Continue(
            inner, settings=settings.retry, budget=budget, source=source, on_splice=tally.spliced
        ),
        # Above Route, so that each attempt is decided anew over the fleet as it then is. It holds the commit
        # gate, so nothing between it and the backend may keep a delta back.
        lambda inner: Fallback(
            inner, settings=settings.retry, budget=budget, source=source, on_retry=tally.retried
        ),
        # Below Fallback, for two racers are one attempt: whichever answers first is the attempt's answer.
        # Above Route, so that each racer is routed by itself.
        lambda inner: Hedge(
            inner,
            settings=settings.hedge,
            budget=budget,
            times=times or FirstDeltas(),
            on_race=tally.raced,
        ),
        # At the bottom: what is below belongs to one backend.
        around=Route(fleet=fleet, router=router, on_decision=tally.decided, affinity=affinity),
    )


def endpoint_stack(
    endpoint: Endpoint,
    *,
    channel: Service,
    clock: Clock,
    telemetry: Telemetry,
    held: Held | None = None,
) -> Service:
    """Returns the stack of one backend, which every attempt on it goes down.

    Args:
        endpoint: the backend.
        channel: the call to its process.
        clock: gives the time in seconds.
        telemetry: of this process.
        held: keeps a model in memory. None leaves that to the backend.
    """
    settings = endpoint.settings
    layers: list[Layer] = []
    if held is not None:
        # Above Guard, so that a load, however slow or unlucky, moves no breaker and is no latency; above
        # Limit, so that a call that waits for its model takes no slot from one that does not.
        layers.append(lambda inner: Place(inner, held=held))
    layers += [
        # Above Watchdog, so that a stall counts as a failure; above Limit, so that a call that is refused
        # here never took a slot.
        lambda inner: Guard(inner, breakers=endpoint.breakers, on_change=endpoint.update),
    ]
    if settings.slots:
        # Above Measure: waiting for a slot of ours is not the backend's latency. Above Watchdog for the same
        # reason: a call in our queue is not silent.
        layers.append(lambda inner: _limit(endpoint, inner))
    elif endpoint.limit is not None:
        # There were slots before. Who waits for one goes at once.
        endpoint.limit.resize(slots=UNLIMITED, queue=0)
        endpoint.limit = None
    layers += [
        # Above Watchdog, so that a stall shows on its attempt; below Limit, so that the span is the backend's
        # time and not the time in our queue. Which of Span and Measure is above the other does not matter.
        lambda inner: Span(inner, telemetry=telemetry, backend=settings.name, address=settings.address),
        # Above Watchdog, so that calls that stalled are measured too.
        lambda inner: Measure(inner, record=endpoint.record, clock=clock),
        # Directly above the channel: it tells the silence of the backend from that of anything of ours.
        lambda inner: Watchdog(
            inner,
            first_event=_unless_zero(settings.first_event_timeout),
            between_events=_unless_zero(settings.between_events_timeout),
        ),
    ]
    return stack(*layers, around=channel)


def _limit(endpoint: Endpoint, inner: Service) -> Limit:
    settings = endpoint.settings
    if endpoint.limit is not None:  # the stack is built anew, and calls run and wait in the one before
        endpoint.limit.resize(slots=settings.slots, queue=settings.queue, inner=inner)
        return endpoint.limit
    # The endpoint shows how many calls wait.
    endpoint.limit = Limit(inner, slots=settings.slots, queue=settings.queue, name=f"backend {settings.name}")
    return endpoint.limit


def _unless_zero(duration: timedelta) -> timedelta | None:
    return duration or None
