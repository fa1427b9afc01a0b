"""Hundreds of schedules of calls, faults, flapping and impatient callers, each from its seed.

The layers, the breakers, the budget and the router are the real ones; only the
channel is played. Whatever a schedule does, the promises below hold.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendBusy,
    BackendError,
    BackendUnavailable,
    BrokenStream,
    Failure,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    QueueFull,
    StreamInterrupted,
    StreamStalled,
)
from forebay.kit.pipeline import Call, Request, Send, Service
from forebay.kit.telemetry import off
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import BackendSettings, OrchestratorSettings
from forebay.orchestrator.fleet.breaker import BreakerState
from forebay.orchestrator.fleet.endpoint import Endpoint, State
from forebay.orchestrator.routing.router import Decision, Router
from forebay.orchestrator.routing.view import EndpointView
from forebay.orchestrator.stack import endpoint_stack, request_stack
from forebay.testing import grammar
from forebay.testing.calls import Sink, ask
from forebay.testing.clock import now, run
from soak import counted

SEEDS = 600
"""Schedules of 60 calls each. The whole of it takes seconds. `make soak` plays ten thousand."""

CALLS = 60


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Switches the log off: tens of thousands of lines about played faults take longer than the playing."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


FAULTS: tuple[type[Failure], ...] = (
    BackendUnavailable,
    BackendUnavailable,
    BackendBusy,
    BackendError,
    BrokenStream,
    QueueFull,
    ModelLoadFailed,
    ModelNotFound,
    InvalidRequest,
)


class PlayedBackend:
    """The channel of a backend that fails, stalls and dawdles by chance."""

    def __init__(self, name: str, chance: random.Random) -> None:
        self.name = name
        self.chance = chance
        self.fault_rate = chance.choice([0.0, 0.1, 0.5, 1.0])
        self.only_before = False
        """Whether it only ever fails before its first delta, and never by refusing the caller."""
        self.attempts = 0
        self.active = 0
        self.endpoint: Endpoint

    async def __call__(self, call: Call[Request], send: Send) -> None:
        self.attempts += 1
        self.active += 1
        whole = self.endpoint.breakers.whole
        # A call that waited for a slot was admitted earlier, when the breaker may have been closed.
        is_admitted_now = not self.endpoint.settings.slots
        if is_admitted_now:
            assert whole.state is BreakerState.CLOSED or whole.is_probing, "a call passed an open breaker"
        try:
            await self._play(send)
        finally:
            self.active -= 1

    async def _play(self, send: Send) -> None:
        chance = self.chance
        fails_at = chance.randint(-1, 3) if chance.random() < self.fault_rate else 99
        await asyncio.sleep(chance.expovariate(5.0))
        if self.only_before and fails_at < 99:
            raise BackendUnavailable("as played", metadata={"backend": self.name})
        if fails_at == -1:
            raise self._fault()
        await send(pb.GenerateResponse(started=pb.Started(backend=self.name, model="m")))
        for position in range(3):
            if fails_at == position:
                if chance.random() < 0.2:
                    await asyncio.sleep(1e6)  # silence; the watchdog has to end it
                raise self._fault()
            await asyncio.sleep(chance.expovariate(20.0))
            await send(pb.GenerateResponse(delta=pb.Delta(text=str(position), token_count=1)))
        if fails_at == 3:
            raise self._fault()
        await send(pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP)))

    def _fault(self) -> Failure:
        return self.chance.choice(FAULTS)("as played", metadata={"backend": self.name})


class CheckedRouter(Router):
    """A router whose every refusal is checked: there was no path left."""

    def decide(
        self, request: Request, snapshot: object, *, tried: frozenset[str] = frozenset(), **more: object
    ) -> Decision:
        decision = super().decide(request, snapshot, tried=tried, **more)  # type: ignore[arg-type]  # only passed on
        if decision.chosen is None:
            for candidate in decision.candidates:
                assert not _is_path(candidate.endpoint, tried), f"the path to {candidate.name} was shut"
        return decision


def _is_path(view: EndpointView, tried: frozenset[str]) -> bool:
    is_full = bool(view.slots) and view.outstanding >= view.slots + view.queue
    return (
        view.is_reachable
        and view.is_serving
        and not view.is_drained
        and not view.is_probing
        and not is_full
        and view.name not in tried
    )


class Simulation:
    """One schedule."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.log = hashlib.sha256()
        self.settings = OrchestratorSettings.model_validate(
            {"default_deadline": "60s", "picker": self.chance.choice(["best", "two"])}
        )
        self.backends = [PlayedBackend(name, self.chance) for name in ("a", "b", "c")]
        self.endpoints = [self._endpoint(backend) for backend in self.backends]
        router = CheckedRouter(weights=self.settings.scorers, picker=self.settings.picker, source=self.chance)
        retry = self.settings.retry
        budget = RetryBudget(ratio=retry.budget_ratio, per_second=retry.budget_per_second, clock=now)
        self.stack = request_stack(
            self.settings,
            fleet=self,
            router=router,
            budget=budget,
            source=self.chance,
            admission=Admission(queue=100, ageing=15.0, capacity=lambda _: 1000, clock=now),
        )

    def _endpoint(self, backend: PlayedBackend) -> Endpoint:
        settings = BackendSettings.model_validate(
            {
                "name": backend.name,
                "address": "127.0.0.1:1",
                "slots": self.chance.choice([0, 1, 3]),
                "queue": 4,
                "first_event_timeout": "10s",
                "between_events_timeout": "5s",
            }
        )
        endpoint = backend.endpoint = Endpoint(settings, aliases={}, clock=now, source=self.chance)
        endpoint.service = endpoint_stack(endpoint, channel=backend, clock=now, telemetry=off())
        endpoint.found_serving()
        endpoint.list_models([pb.Model(id="m")])
        return endpoint

    def snapshot(self) -> list[EndpointView]:
        return [endpoint.view() for endpoint in self.endpoints]

    def service(self, name: str) -> Service:
        return next(endpoint for endpoint in self.endpoints if endpoint.name == name)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            flapping = group.create_task(self._flap())
            async with asyncio.TaskGroup() as calls:
                for _ in range(CALLS):
                    await asyncio.sleep(self.chance.expovariate(10.0))
                    calls.create_task(self._call(self.chance.random() < 0.1))
            flapping.cancel()
        self._check_end()
        await self._recover()

    async def _flap(self) -> None:
        while True:
            await asyncio.sleep(self.chance.expovariate(1.0))
            endpoint = self.chance.choice(self.endpoints)
            match self.chance.randrange(7):
                case 0:
                    endpoint.found_not_serving()
                case 1:
                    endpoint.lose("played")
                case 2:
                    endpoint.drain()
                case 3 | 4:
                    endpoint.resume()
                case _:
                    endpoint.found_serving()

    async def _call(self, is_impatient: bool) -> None:
        sink, request = Sink(), ask(model="m")
        outcome = "done"
        try:
            async with asyncio.timeout(self.chance.uniform(0.0, 1.0) if is_impatient else None) as patience:
                await self.stack(Call(request=request), sink)
        except TimeoutError:
            assert patience.expired()
            outcome = "left"
        except Failure as failure:
            outcome = failure.reason
            is_final = isinstance(failure, StreamInterrupted | StreamStalled | InvalidRequest)
            if "delta" in sink.kinds and not is_final:
                raise AssertionError(f"{failure!r} looks as if it could be tried again") from failure
        grammar.check(sink.events, complete=outcome == "done", numbered=False)
        assert sink.kinds.count("started") <= 1
        assert "012".startswith(sink.text)
        self.outcomes[outcome] += 1
        self.log.update(f"{now():.6f} {outcome} {sink.text}\n".encode())

    def _check_end(self) -> None:
        assert self.outcomes.total() == CALLS
        retry = self.settings.retry
        retries = sum(backend.attempts for backend in self.backends) - CALLS
        assert retries <= retry.budget_ratio * CALLS + retry.budget_per_second * (now() + 1.0)
        for backend, endpoint in zip(self.backends, self.endpoints, strict=True):
            assert backend.active == 0
            assert endpoint.view().outstanding == 0
            assert all(not breaker.is_probing for breaker in endpoint.breakers.of("m"))

    async def _recover(self) -> None:
        """No schedule does lasting harm: once the backends work, every one of them serves again."""
        for backend, endpoint in zip(self.backends, self.endpoints, strict=True):
            backend.fault_rate = 0.0
            endpoint.found_serving()
            endpoint.resume()
            request = ask(model="m")
            request.routing.backends.append(endpoint.name)
            sink = Sink()
            await self.stack(Call(request=request), sink)
            assert sink.text == "012"
            assert endpoint.state is State.ACTIVE


def play(seed: int) -> tuple[str, Counter[str]]:
    async def body() -> Simulation:
        simulation = Simulation(seed)
        await simulation.run()
        return simulation

    simulation = run(body())
    return simulation.log.hexdigest(), simulation.outcomes


@pytest.mark.parametrize("block", range(0, SEEDS, 50))
def test_whatever_happens_the_promises_hold(block: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(block, block + 50):
        outcomes += play(seed)[1]
    # A simulation in which nothing goes wrong, or nothing goes well, would prove nothing.
    assert outcomes["done"] > 500
    assert outcomes["STREAM_INTERRUPTED"] > 20
    assert outcomes["left"] > 20


@pytest.mark.soak(minutes=12)
@pytest.mark.timeout(3 * 3600)
def test_in_ten_thousand_schedules_of_calls_and_faults_the_promises_hold() -> None:
    outcomes: Counter[str] = Counter()
    for seed in counted(10_000, "schedules of router, breakers, budget and layers"):
        outcomes += play(seed)[1]
    print(", ".join(f"{outcome} {count:,}" for outcome, count in outcomes.most_common()))
    assert outcomes.total() == 10_000 * CALLS


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_seed_is_one_schedule(seed: int) -> None:
    assert play(seed) == play(seed)


class Steady(Simulation):
    """Many calls on three backends whose fault rates are given, without flapping."""

    def __init__(self, *fault_rates: float) -> None:
        super().__init__(7)
        for backend, rate in zip(self.backends, fault_rates, strict=True):
            backend.fault_rate = rate
            backend.only_before = True

    async def hold(self, calls: int) -> tuple[int, int]:
        """Returns how many calls were served, and in how many attempts."""
        async with asyncio.TaskGroup() as group:
            for _ in range(calls):
                await asyncio.sleep(self.chance.expovariate(20.0))
                group.create_task(self._call(is_impatient=False))
        return self.outcomes["done"], sum(backend.attempts for backend in self.backends)


def hold(*fault_rates: float, calls: int) -> tuple[int, int, float]:
    async def body() -> tuple[int, int, float]:
        served, attempts = await Steady(*fault_rates).hold(calls)
        return served, attempts, now()

    return run(body())


def test_half_the_calls_failing_on_one_of_three_backends_is_not_noticed() -> None:
    served, attempts, _ = hold(0.5, 0.0, 0.0, calls=3000)
    assert served >= 0.999 * 3000
    assert attempts <= 1.05 * 3000  # the breaker keeps calls away, so few had to be made twice


def test_all_backends_failing_cannot_multiply_the_calls() -> None:
    _, attempts, seconds = hold(1.0, 1.0, 1.0, calls=3000)
    assert attempts <= 1.2 * 3000 + 10.0 * (seconds + 1.0)
