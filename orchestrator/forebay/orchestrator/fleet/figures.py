"""The fleet's gauges: what each backend is doing now, read whenever somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from forebay.kit import metrics
from forebay.kit.metrics import Metrics
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.fleet.breaker import BreakerState
from forebay.orchestrator.fleet.endpoint import Endpoint, State
from forebay.orchestrator.fleet.fleet import Fleet

_BREAKERS = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}


def show(fleet: Fleet, admission: Admission, to: Metrics) -> None:
    """Has the gauges of every backend, and of the queue before them, read from now on."""

    def each(value: Callable[[Endpoint], float]) -> metrics.Samples:
        return lambda: [(value(endpoint), {"forebay.backend": endpoint.name}) for endpoint in fleet]

    def states() -> Iterable[tuple[float, Mapping[str, str]]]:
        return [
            (
                float(endpoint.state is state),
                {"forebay.backend": endpoint.name, "forebay.state": state.name.lower()},
            )
            for endpoint in fleet
            for state in State
        ]

    to.observe(metrics.WAITING, lambda: [(admission.waiting, {})])
    to.observe(metrics.BACKEND_STATE, states)
    to.observe(metrics.BACKEND_ACTIVE, each(lambda endpoint: endpoint.active))
    to.observe(metrics.BACKEND_QUEUED, each(lambda endpoint: endpoint.queued))
    to.observe(metrics.BREAKER, each(lambda endpoint: _BREAKERS[endpoint.breakers.whole.state]))
    to.observe(
        metrics.MODEL_BREAKERS,
        each(lambda endpoint: sum(1 for model, _ in endpoint.breakers.not_closed() if model)),
    )
