"""The breakers of one backend: one for the whole of it, and one for each model that fails by itself.

A model whose file is damaged, or at which its framework crashes, must not take
its healthy neighbours down with it. Some failures say that they are about the
model. Of the others it shows: once another model was served while this one
failed, what fails further is this one's own, and opens only its breaker.
"""

from __future__ import annotations

import logging
import random
from types import TracebackType

from forebay.kit.failure import (
    BreakerOpen,
    Failure,
    Fault,
    ModelLoadFailed,
    ModelQuarantined,
    WrongModel,
    printable,
)
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import BreakerSettings
from forebay.orchestrator.fleet.breaker import BUSY, Breaker, BreakerState, Permit

logger = logging.getLogger(__name__)

_NONE: frozenset[str] = frozenset()

_OF_THE_MODEL = (ModelLoadFailed, ModelQuarantined, WrongModel)


class Breakers:
    """Admits calls to a backend and learns from how they end.

    Args:
        backend: the backend's name, for messages.
        settings: when to open, and for how long.
        clock: gives the time in seconds.
        source: where jitter comes from.
    """

    def __init__(
        self, backend: str, settings: BreakerSettings, *, clock: Clock, source: random.Random
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._clock = clock
        self._source = source
        self.whole = Breaker(settings, clock=clock, source=source)
        self._models: dict[str, Breaker] = {}  # only those whose model has failed since it last succeeded
        self._failing: set[str] = set()  # models that failed, for whatever reason, since they last succeeded
        self._alone: set[str] = set()  # those of them while others succeeded: the failures are their own

    def change(self, settings: BreakerSettings) -> None:
        """Goes by other settings from now on."""
        self._settings = settings
        for breaker in (self.whole, *self._models.values()):
            breaker.change(settings)

    def of(self, model: str) -> tuple[Breaker, ...]:
        """Returns the breakers that a call for the model has to pass."""
        own = self._models.get(model)
        return (self.whole,) if own is None else (self.whole, own)

    def closed_models(self) -> frozenset[str]:
        """Returns the models whose own breaker keeps calls away now."""
        if not self._models:
            return _NONE
        return frozenset(model for model, breaker in self._models.items() if not breaker.can_admit)

    def not_closed(self) -> list[tuple[str, Breaker]]:
        """Returns every breaker that is not closed with its model; the whole backend is the model `""`."""
        # A copy in one step: metrics are read on another thread.
        named = [("", self.whole), *list(self._models.items())]
        return [(model, breaker) for model, breaker in named if breaker.state is not BreakerState.CLOSED]

    def heal(self) -> None:
        """Notes that the backend came back anew."""
        self._failing.clear()
        self._alone.clear()
        for breaker in (self.whole, *self._models.values()):
            breaker.heal()

    def admit(self, model: str) -> Admission:
        """Admits a call for the length of a `with` block, and learns from how the block ends.

        Raises:
            BreakerOpen: another call is out that decides whether the backend works again.
        """
        return Admission(self, model)

    def take(self, model: str) -> list[Permit]:
        """Returns the permits of a call, of the whole backend first.

        Raises:
            BreakerOpen: there is none.
        """
        permits: list[Permit] = []
        for breaker in self.of(model):
            permit = breaker.admit()
            if permit is None:
                for taken in permits:
                    taken.forget()
                raise BreakerOpen(
                    f"backend {self._backend} failed ({breaker.reason}) and is being tried by another call",
                    metadata={"backend": self._backend, "cause": breaker.reason},
                )
            permits.append(permit)
        return permits

    def end(self, model: str, permits: list[Permit], error: BaseException | None) -> None:
        """Learns from how a call ended."""
        if error is None:
            for permit in permits:
                permit.succeed()
            self._succeed(model)
            return
        if isinstance(error, Failure):
            self._fail(model, permits, error)
        for permit in permits:  # told already, unless the call was broken off
            permit.forget()

    def _succeed(self, model: str) -> None:
        self._models.pop(model, None)
        if self._failing:
            self._failing.discard(model)
            self._alone.discard(model)
            self._alone |= self._failing

    def _fail(self, model: str, permits: list[Permit], failure: Failure) -> None:
        is_own = isinstance(failure, _OF_THE_MODEL)
        if failure.fault is Fault.BACKEND and not isinstance(failure, BUSY):
            self._failing.add(model)
            is_own = is_own or model in self._alone
        if not is_own:
            permits[0].fail(failure)
            return
        if len(permits) == 1:
            own = self._models.setdefault(
                model, Breaker(self._settings, clock=self._clock, source=self._source)
            )
            # One that is open opened while this call was under way, which is no news to it.
            permit = own.admit() if own.state is BreakerState.CLOSED else None
            if permit is None:
                return
            permits.append(permit)
        was_open = self._is_open(model)
        permits[1].fail(failure)
        if self._is_open(model) and not was_open:
            # Of the whole backend its state tells, and every change of that is logged.
            logger.warning(
                "backend %s: calls are kept from model %s: they failed: %s",
                self._backend,
                printable(model),
                failure.reason,
            )

    def _is_open(self, model: str) -> bool:
        own = self._models.get(model)
        return own is not None and own.state is not BreakerState.CLOSED


class Admission:
    """A call that breakers let through, for `with`. See `Breakers.admit`."""

    __slots__ = ("_breakers", "_model", "_permits")

    def __init__(self, breakers: Breakers, model: str) -> None:
        self._breakers = breakers
        self._model = model
        self._permits: list[Permit] = []

    def __enter__(self) -> None:
        self._permits = self._breakers.take(self._model)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._breakers.end(self._model, self._permits, error)
