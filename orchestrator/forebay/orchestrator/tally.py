"""What the layers tell of each request, counted: for the metrics, and for the record that watchers read."""

from __future__ import annotations

from forebay.kit import metrics
from forebay.kit.failure import Failure
from forebay.kit.metrics import Metrics
from forebay.kit.pipeline import Call, Request
from forebay.orchestrator.activity import Activity
from forebay.orchestrator.layers.admit import Admitted
from forebay.orchestrator.layers.hedge import Race
from forebay.orchestrator.layers.remember import Lookup
from forebay.orchestrator.routing.router import Decision

_BACKEND = "forebay.backend"
_ERROR = "error.type"
_PRIORITY = "forebay.priority"


class Tally:
    """Takes what the layers tell.

    Args:
        to: the metrics of this process.
        record: what each request is doing.
    """

    def __init__(self, to: Metrics, record: Activity) -> None:
        self._to = to
        self._record = record

    def admitted(self, admitted: Admitted) -> None:
        """The queue let a request run, or refused it."""
        self._record.admitted(admitted)
        if not self._to.enabled:
            return
        priority = {_PRIORITY: admitted.call.urgency.name.lower()}
        if admitted.failure is None:
            self._to.record(metrics.ADMISSION_WAIT, admitted.waited, priority)
        else:
            self._to.add(metrics.REFUSALS, {**priority, _ERROR: admitted.failure.reason})

    def decided(self, decision: Decision) -> None:
        """The router decided where an attempt goes."""
        self._record.decided(decision)
        if not self._to.enabled:
            return
        chosen = decision.chosen.name if decision.chosen else ""
        labels = {_BACKEND: chosen, "forebay.route.class": decision.traits.request_class}
        self._to.add(metrics.DECISIONS, labels)

    def retried(self, failure: Failure) -> None:
        """An attempt failed, and there is another."""
        self._record.retried()
        self._to.add(metrics.RETRIES, {_BACKEND: failure.metadata.get("backend", ""), _ERROR: failure.reason})

    def spliced(self, failure: Failure) -> None:
        """A reply broke off, and another backend is to go on with it."""
        self._record.spliced(failure)
        self._to.add(
            metrics.CONTINUATIONS, {_BACKEND: failure.metadata.get("backend", ""), _ERROR: failure.reason}
        )

    def raced(self, race: Race) -> None:
        """A second attempt was made beside a slow one."""
        self._record.raced(race)
        self._to.add(metrics.HEDGES, {_BACKEND: race.winner})
        self._to.record(metrics.HEDGE_WASTE, race.wasted, {})

    def looked_up(self, lookup: Lookup) -> None:
        """The cache was asked."""
        self._record.looked_up(lookup)
        for result, count in (("hit", lookup.hits), ("miss", lookup.misses)):
            labels = {"forebay.cache": "replies", "forebay.cache.result": result}
            self._to.add(metrics.CACHE, labels, count)

    def joined(self, call: Call[Request]) -> None:
        """A request joined another one's reply."""
        self._record.joined(call)
        self._to.add(metrics.COALESCED, {})

    def gathered(self, count: int) -> None:
        """Calls for embeddings went to a backend as one."""
        self._to.record(metrics.GATHERED, count, {})
