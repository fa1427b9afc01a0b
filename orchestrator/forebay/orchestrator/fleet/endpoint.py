"""The orchestrator's view of one backend.

Everything that is known of a backend is changed here, by methods that do not
wait: probes, layers and operators call them, and whoever decides reads a
picture of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Fault, printable
from forebay.kit.layers.limit import Limit
from forebay.kit.layers.measure import Ending, Outcome
from forebay.kit.pipeline import Call, Request, Send, Service
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import BackendSettings, PerformanceSettings, SlowStartSettings
from forebay.orchestrator.fleet.breaker import BreakerState
from forebay.orchestrator.fleet.breakers import Breakers
from forebay.orchestrator.fleet.performance import Performance
from forebay.orchestrator.fleet.slow_start import SlowStart
from forebay.orchestrator.fleet.trust import Trust
from forebay.orchestrator.placement.room import ROOMY, Room
from forebay.orchestrator.routing.names import find_model
from forebay.orchestrator.routing.view import EndpointView

logger = logging.getLogger(__name__)

_AVERAGE_WEIGHT = 0.3
"""Weight of the latest call in the averages: after three calls two thirds of a change are seen, while one
cold start does not turn every call away."""

DETAIL_CHARACTERS = 300
"""Most characters kept of what a backend or gRPC says of itself; it is shown to people in one line."""


class State(Enum):
    """Where a backend is in its life."""

    ACTIVE = fleet_pb2.Backend.STATE_ACTIVE
    DRAINING = fleet_pb2.Backend.STATE_DRAINING
    EJECTED = fleet_pb2.Backend.STATE_EJECTED
    UNREACHABLE = fleet_pb2.Backend.STATE_UNREACHABLE


_BREAKER_STATES = {
    BreakerState.CLOSED: fleet_pb2.Breaker.STATE_CLOSED,
    BreakerState.OPEN: fleet_pb2.Breaker.STATE_OPEN,
    BreakerState.HALF_OPEN: fleet_pb2.Breaker.STATE_HALF_OPEN,
}


class Endpoint:
    """What is known of one backend, and the way to it.

    Args:
        settings: the backend's settings.
        aliases: the operator's names for its models, as `{alias: model}`.
        clock: gives the time in seconds.
        source: where jitter comes from.
        on_change: told the backend's name whenever something changes that a watcher may want to see.
        now: gives the time of day.
        on_first_delta: told how many seconds each call took to its first delta.
        performance: how its speed is remembered.
        slow_start: how it gets its share back after an ejection.
    """

    def __init__(
        self,
        settings: BackendSettings,
        *,
        aliases: Mapping[str, str],
        clock: Clock,
        source: random.Random,
        on_change: Callable[[str], None] = lambda name: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_first_delta: Callable[[float], None] = lambda seconds: None,
        performance: PerformanceSettings | None = None,
        slow_start: SlowStartSettings | None = None,
    ) -> None:
        self.settings = settings
        self.name = settings.name
        self.breakers = Breakers(settings.name, settings.breaker, clock=clock, source=source)
        self.trust = Trust(clock=clock)
        self.performance = Performance(performance or PerformanceSettings(), clock=clock)
        self.limit: Limit | None = None
        self.memory: Callable[[], pb.Memory | None] = lambda: None
        """Returns the memory that its models share, as far as that is known."""
        self.room: Callable[[str], Room] = lambda model: ROOMY
        """Returns how much room there is for a model."""
        self.service: Service | None = None
        self._aliases = dict(aliases)
        self._clock = clock
        self._now = now
        self._on_change = on_change
        self._on_first_delta = on_first_delta
        self._is_reachable = False
        self._is_serving = False
        self._is_drained = False
        self._detail = "not connected yet"
        self._list_error = ""
        self._is_framework_gone = False  # its service answers, and says that what is behind it does not
        self._is_unexplained = False  # it is not serving, and has not been asked why yet
        self._logged = State.UNREACHABLE
        self._absence = ""  # what was last logged of the framework's absence
        self._listed: tuple[pb.Model, ...] = ()  # in its own words
        self._models: tuple[pb.Model, ...] = ()
        self._are_models_known = False
        self._memory: pb.Memory | None = None
        self._outstanding = 0
        self._holders = 0
        self._idle = asyncio.Event()
        self._outstanding_tokens = 0.0
        self._slow_start = SlowStart(slow_start or SlowStartSettings(), clock=clock)
        self._first_delta: float | None = None
        self._tokens_per_second: float | None = None
        self._succeeded = 0
        self._failed = 0
        self._state = State.UNREACHABLE
        self._changed_at = clock()
        self._change_time = now()

    def __repr__(self) -> str:
        return f"<Endpoint {self.status()}>"

    # What a call does.

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Counts a call in and serves it."""
        assert self.service is not None, "the stack is built before the first call"
        # Counted before the first await, so that calls that are routed at the same moment see each other.
        self._outstanding += 1
        self._outstanding_tokens += call.tokens
        self._publish()
        try:
            await self.service(call, send)
        finally:
            self._outstanding -= 1
            self._outstanding_tokens -= call.tokens
            self._publish()
            self._rest()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the connection open for the length of a `with` block, for what is no call of inference."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._rest()

    async def wait_idle(self) -> None:
        """Returns when nothing goes on over the connection any more."""
        while self._outstanding or self._holders:
            self._idle.clear()
            await self._idle.wait()

    def _rest(self) -> None:
        if not self._outstanding and not self._holders:
            self._idle.set()

    def record(self, outcome: Outcome) -> None:
        """Takes in what a call took."""
        self.performance.record(outcome)
        if outcome.ending is Ending.DONE:
            self._succeeded += 1
        elif outcome.failure is not None and outcome.failure.fault is Fault.BACKEND:
            self._failed += 1
        if outcome.first_delta is not None:
            self._first_delta = _average(self._first_delta, outcome.first_delta)
            self._on_first_delta(outcome.first_delta)
        if outcome.tokens_per_second is not None:
            self._tokens_per_second = _average(self._tokens_per_second, outcome.tokens_per_second)

    # What a probe finds.

    def found_serving(self) -> None:
        """It answers, and says that it takes calls."""
        if not (self._is_reachable and self._is_serving):
            # It came back, perhaps as another process: what it did in its former life says little.
            self.breakers.heal()
            self.trust.forget()
            self._models = self._named()
        if self._is_reachable and not self._is_serving:
            self._list_error = ""  # it was of the time before
        self._is_reachable = self._is_serving = True
        self._is_framework_gone = self._is_unexplained = False
        self._detail = ""
        self.update()

    def found_not_serving(self) -> None:
        """It answers, and says that it takes no calls. Why, its list of models will tell."""
        self._is_unexplained = self._is_unexplained or self._is_serving or not self._is_reachable
        self._is_reachable, self._is_serving = True, False
        self._detail = "it says that it is not serving"
        self.update()

    def lose(self, detail: str) -> None:
        """It does not answer.

        Args:
            detail: why, for people.
        """
        self._is_reachable = self._is_serving = False
        self._is_framework_gone = self._is_unexplained = False
        self._detail = _line(detail)
        self.update()

    def list_models(self, models: Sequence[pb.Model], memory: pb.Memory | None = None) -> None:
        """It listed its models.

        Args:
            models: what it can serve.
            memory: what they share, if it tells.
        """
        self._memory = memory
        self._listed = tuple(models)
        found = self._named()
        is_news = found != self._models or not self._are_models_known or bool(self._list_error)
        if is_news:  # else the list stays the very same, and what was found in it holds
            self._models = found
        self._are_models_known, self._list_error = True, ""
        if self._is_unexplained or self._is_framework_gone:
            self._is_unexplained = self._is_framework_gone = False
            self.update()
        elif is_news:
            self._publish()

    def _named(self) -> tuple[pb.Model, ...]:
        """Returns the models with our name for the backend, and the operator's names for them."""
        listed: dict[str, pb.Model] = {}
        for model in self._listed:
            ours = pb.Model()
            ours.CopyFrom(model)
            ours.backend = self.name
            self._mark_proven(ours)
            listed[ours.id] = ours
        for alias, spelling in self._aliases.items():
            meant = find_model(spelling, listed.values())
            if meant is not None and alias not in meant.aliases:
                meant.aliases.append(alias)
        return tuple(listed.values())

    def _mark_proven(self, model: pb.Model) -> None:
        """Marks as probed what the model was seen to do, whatever its backend says."""
        proven = self.trust.proven(model.id)
        for report in model.capabilities:
            if report.capability in proven:
                proven.discard(report.capability)
                report.support, report.probed = pb.CapabilityReport.SUPPORT_YES, True
        for capability in sorted(proven):
            model.capabilities.add(
                capability=pb.Capability.ValueType(capability),
                support=pb.CapabilityReport.SUPPORT_YES,
                probed=True,
            )

    def judge(self, model: str, capability: pb.Capability.ValueType, *, kept: bool) -> None:
        """Takes in whether a reply was what a capability of its model promises."""
        if self.trust.note(model, capability, kept=kept):
            self._models = self._named()
            self._publish()

    def fail_to_list(self, detail: str, *, is_gone: bool = False) -> None:
        """It could not list its models. The last list is kept.

        Args:
            detail: why, for people.
            is_gone: whether it says that the framework behind it cannot be reached.
        """
        is_away = self._is_reachable and not self._is_serving
        error = _line(detail if is_away else f"its models cannot be listed: {detail}")
        is_news = error != self._list_error
        is_told = is_away and (self._is_unexplained or is_gone is not self._is_framework_gone)
        if not is_news and not is_told:
            return
        self._list_error, self._is_unexplained = error, False
        self._is_framework_gone = is_gone and is_away
        if is_away:
            self.update()
        else:
            logger.warning("backend %s: %s", self.name, error)
            self._publish()

    # What an operator wants.

    def change(self, settings: BackendSettings, *, aliases: Mapping[str, str]) -> None:
        """Goes by other settings from now on. Whoever built the stack builds it anew."""
        self.settings = settings
        self.breakers.change(settings.breaker)
        self._aliases = dict(aliases)
        self._models = self._named()
        self.update()

    def drain(self) -> None:
        """Takes it out of routing. Calls in progress go on."""
        self._is_drained = True
        self.update()

    def resume(self) -> None:
        """Takes it back into routing."""
        self._is_drained = False
        self.update()

    # What it is.

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    @property
    def is_reachable(self) -> bool:
        """Whether it answers."""
        return self._is_reachable

    @property
    def is_listed(self) -> bool:
        """Whether its models can be served now, as far as states go."""
        return self._is_reachable and self._is_serving and not self._is_drained

    @property
    def models(self) -> tuple[pb.Model, ...]:
        """What it listed last, with the operator's aliases."""
        return self._models

    def find(self, name: str) -> pb.Model | None:
        """Returns the model that a name means here, or None."""
        return find_model(name, self._models)

    def update(self) -> None:
        """Finds the state anew, and tells who watches."""
        if not self._is_reachable or (self._is_framework_gone and not self._is_drained):
            state = State.UNREACHABLE
        elif self._is_drained or not self._is_serving:
            state = State.DRAINING
        elif self.breakers.whole.state is not BreakerState.CLOSED:
            state = State.EJECTED
        else:
            state = State.ACTIVE
        if state is not self._state:
            if self._state is State.EJECTED and state is State.ACTIVE:
                self._slow_start.begin()
            self._state = state
            self._changed_at = self._clock()
            self._change_time = self._now()
        # One that does not serve is told of once, when it is known why.
        if not self._is_unexplained and (state is not self._logged or self._is_news_of_absence()):
            level = logging.INFO if state is State.ACTIVE else logging.WARNING
            detail = self.detail
            logger.log(level, "backend %s is %s%s", self.name, state.name, f": {detail}" if detail else "")
            self._logged = state
            self._absence = self._list_error if self._is_framework_gone else ""
        self._publish()

    def _is_news_of_absence(self) -> bool:
        return self._is_framework_gone and self._list_error != self._absence

    @property
    def detail(self) -> str:
        """Why it is in its state, in one sentence for people. Empty if all is well."""
        if self._detail:
            return self._away()
        if self._is_drained:
            return "an operator drained it"
        if self.breakers.whole.state is not BreakerState.CLOSED:
            return f"its calls failed: {self.breakers.whole.reason}"
        return self._list_error

    def _away(self) -> str:
        """Why it takes no calls: its own words where it has any."""
        is_told = self._is_reachable and self._list_error and not self._is_unexplained
        return self._list_error if is_told else self._detail

    def view(self) -> EndpointView:
        """Returns what routing decides over."""
        whole = self.breakers.whole
        return EndpointView(
            name=self.name,
            framework=self.framework,
            is_reachable=self._is_reachable,
            is_serving=self._is_serving,
            is_drained=self._is_drained,
            detail=self._away(),
            models=self._models,
            are_models_known=self._are_models_known,
            can_admit=whole.can_admit,
            is_ejected=whole.state is not BreakerState.CLOSED,
            is_probing=whole.is_probing,
            reopens_in=whole.remaining.total_seconds(),
            refused_models=self.breakers.closed_models(),
            cause=whole.reason,
            outstanding=self._outstanding,
            slots=self.settings.slots,
            queue=self.settings.queue,
            first_delta=self._first_delta,
            success_rate=whole.success_rate,
            doubts=self.trust.doubts(),
            room=self.room,
            outstanding_tokens=self._outstanding_tokens,
            figures=self.performance.figures(),
            memory=self._memory,
            share=self.share,
            weight=self.settings.weight,
        )

    @property
    def framework(self) -> str:
        """The framework behind it."""
        return self.settings.framework or self.name

    @property
    def share(self) -> float:
        """Part of its full share of calls that it should get now, in (0.0, 1.0]."""
        return self._slow_start.share

    @property
    def queued(self) -> int:
        """Calls that wait for a slot of ours."""
        return self.limit.waiting if self.limit is not None else 0

    @property
    def active(self) -> int:
        """Calls in progress."""
        return self._outstanding - self.queued

    def status(self) -> str:
        """Returns one short line for operators."""
        words = [self.name, self._state.name]
        if self._state is State.EJECTED:
            words.append(f"{self.breakers.whole.remaining.total_seconds():.0f}s")
        elif self._state is State.UNREACHABLE:
            words.append(f"{self._clock() - self._changed_at:.0f}s")
        else:
            slots = self.settings.slots
            words.append(f"{self.active}/{slots}" if slots else str(self.active))
            if self.queued:
                words.append(f"queue {self.queued}")
        return " ".join(words)

    def to_proto(self) -> fleet_pb2.Backend:
        """Returns it as clients see it."""
        backend = fleet_pb2.Backend(
            name=self.name,
            framework=self.framework,
            state=self._state.value,
            active_call_count=self.active,
            queued_call_count=self.queued,
            models=self._models,
            address=self.settings.address,
            detail=self.detail,
            slot_count=self.settings.slots,
            output_tokens_per_second=self._tokens_per_second or 0.0,
            succeeded_call_count=self._succeeded,
            failed_call_count=self._failed,
            memory=self._memory,
            performance=self.performance.to_proto(),
            share=self.share,
        )
        backend.state_change_time.FromDatetime(self._change_time)
        memory = self.memory()
        if memory is not None:
            backend.memory.CopyFrom(memory)
        if self._first_delta is not None:
            backend.first_delta_duration.FromNanoseconds(int(self._first_delta * 1e9))
        for model, breaker in self.breakers.not_closed():
            shown = backend.breakers.add(
                model=model, state=_BREAKER_STATES[breaker.state], reason=breaker.reason
            )
            if breaker.state is BreakerState.OPEN:
                shown.remaining_duration.FromTimedelta(breaker.remaining)
        return backend

    def _publish(self) -> None:
        self._on_change(self.name)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _AVERAGE_WEIGHT * (new - old)


def _line(text: str) -> str:
    return printable(text)[:DETAIL_CHARACTERS]
