"""Races a second backend against one that is slow to begin.

The time to the first delta has a long tail: a cold cache, a long prompt before
us, a model that is being swapped in. A second attempt after most calls would
have begun cuts the tail for a few per cent more work. It counts as a retry, so
an overload cannot feed on it, and ends with the first delta of either.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry import trace

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.commit import CommitGate
from forebay.kit.failure import Failure
from forebay.kit.pipeline import Call, Event, Request, Send, Service, Serving
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import HedgeSettings

_KEPT = 200
"""Times that are kept: enough for a 95th percentile, few enough to follow a change within minutes."""


class FirstDeltas:
    """How long recent calls took to their first delta, over all backends."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_KEPT)

    def note(self, seconds: float) -> None:
        """Takes in what a call took."""
        self._seconds.append(seconds)

    def quantile(self, share: float, *, min_samples: int) -> float | None:
        """Returns the time in seconds that this share of calls did not exceed; None if too few are known."""
        if len(self._seconds) < min_samples:
            return None
        ordered = sorted(self._seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """How a call with two attempts at once ended."""

    backends: tuple[str, ...]
    """The backends, in the order in which they were asked. One whose racer found no backend is missing."""
    winner: str
    """The one that answered first. Empty if none did."""
    wasted: float
    """Seconds that the others worked for nothing."""


class Hedge:
    """Makes a second attempt elsewhere if the first has not begun to answer when most calls would have.

    Args:
        inner: makes one attempt, on a backend that is not in `call.tried`.
        settings: when to race.
        budget: shared by all calls; a second attempt is a retry.
        times: how long first deltas took lately.
        on_race: told of each race, for metrics.
    """

    def __init__(
        self,
        inner: Service,
        *,
        settings: HedgeSettings,
        budget: RetryBudget,
        times: FirstDeltas,
        on_race: Callable[[Race], None] | None = None,
    ) -> None:
        self._inner = inner
        self._settings = settings
        self._budget = budget
        self._times = times
        self._on_race = on_race

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call.

        Raises:
            Failure: of the first attempt, if neither answered. One that fails before there is a second is
                raised at once, and whoever is above tries again at once.
        """
        delay = self._delay(call)
        return self._inner(call, send) if delay is None else self._serve(call, send, delay)

    async def _serve(self, call: Call[Request], send: Send, delay: float) -> None:
        runners = _Runners(self._inner, call, send)
        try:
            await runners.run(delay, may_race=self._budget.withdraw)
        finally:
            race = runners.race()
            if race is not None:
                _note(race)
                if self._on_race is not None:
                    self._on_race(race)

    def _delay(self, call: Call[Request]) -> float | None:
        """Returns the seconds after which there is a second attempt, if there is to be one."""
        if not self._settings.enabled or not isinstance(call.request, pb.GenerateRequest):
            return None
        delay = self._times.quantile(self._settings.quantile, min_samples=self._settings.min_samples)
        return None if delay is None else max(delay, self._settings.delay_min.total_seconds())


class _Runner:
    """One of two attempts."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.backend = ""
        self.failure: Failure | None = None
        self.since = asyncio.get_running_loop().time()
        self.seconds = 0.0
        self.is_done = False

    def routed(self, backend: str) -> None:
        self.backend = backend


class _Runners:
    """The attempts of one call."""

    def __init__(self, inner: Service, call: Call[Request], send: Send) -> None:
        self._inner = inner
        self._call = call
        self._send = send
        self._runners: list[_Runner] = []
        self._winner: _Runner | None = None
        self._settled = asyncio.Event()  # one has answered, or all have ended

    async def run(self, delay: float, *, may_race: Callable[[], bool]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._start(group, self._call)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._settled.wait()
                if not self._settled.is_set() and may_race():
                    first = self._runners[0].backend
                    self._start(group, self._call.with_(tried=self._call.tried | {first}))
        except BaseExceptionGroup as errors:  # of our code: failures are kept, not raised
            raise errors.exceptions[0] from errors
        if self._winner is not None:
            if self._winner.failure is not None:
                raise self._winner.failure
            return
        failures = [runner.failure for runner in self._runners if runner.failure is not None]
        if failures:
            # That nobody was left for the second says less than why the first failed.
            raise failures[0]

    def race(self) -> Race | None:
        """How the race ended; None if there was none."""
        if len(self._runners) < 2:
            return None
        losers = [runner for runner in self._runners if runner is not self._winner and runner.backend]
        return Race(
            backends=tuple(runner.backend for runner in self._runners if runner.backend),
            winner=self._winner.backend if self._winner is not None else "",
            wasted=sum(runner.seconds for runner in losers),
        )

    def _start(self, group: asyncio.TaskGroup, call: Call[Request]) -> None:
        runner = _Runner()
        self._runners.append(runner)
        runner.task = group.create_task(self._attempt(runner, call.with_(on_route=runner.routed)))

    async def _attempt(self, runner: _Runner, call: Call[Request]) -> None:
        async def send(event: Event) -> None:
            if self._winner is None:  # progress: one at a time is enough
                leader = next((each for each in self._runners if not each.is_done), runner)
                if leader is not runner:
                    return
            elif self._winner is not runner:
                # It answered in the very moment in which it lost, and is about to be cancelled.
                await asyncio.Event().wait()
            await self._send(event)

        try:
            await self._inner(call, CommitGate(send, on_commit=lambda: self._claim(runner)))
        except Failure as failure:
            runner.failure = failure
            if not failure.elsewhere and runner.backend:
                self._end_others(runner)  # what the caller did wrong is wrong everywhere
        finally:
            runner.is_done = True
            runner.seconds = asyncio.get_running_loop().time() - runner.since
            if all(each.is_done for each in self._runners):
                self._settled.set()

    def _claim(self, runner: _Runner) -> None:
        if self._winner is None:
            self._winner = runner
            self._settled.set()
            self._end_others(runner)

    def _end_others(self, runner: _Runner) -> None:
        for other in self._runners:
            if other is not runner and other.task is not None:
                other.task.cancel()


def _note(race: Race) -> None:
    trace.get_current_span().add_event(
        "forebay.hedge",
        {
            "forebay.hedge.backends": race.backends,
            "forebay.hedge.winner": race.winner,
            "forebay.hedge.wasted_seconds": race.wasted,
        },
    )
