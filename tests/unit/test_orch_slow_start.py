"""How a backend that was ejected comes back: tried at once, and loaded little by little."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendError, Failure
from forebay.kit.pipeline import Call, Request, Send
from forebay.kit.telemetry import off
from forebay.orchestrator.config import BackendSettings, ScorerWeights, SlowStartSettings
from forebay.orchestrator.fleet.endpoint import Endpoint, State
from forebay.orchestrator.fleet.slow_start import SlowStart
from forebay.orchestrator.layers.route import Route
from forebay.orchestrator.routing.router import Router
from forebay.orchestrator.routing.view import EndpointView
from forebay.orchestrator.stack import endpoint_stack
from forebay.testing.calls import Sink
from forebay.testing.clock import now, virtual

CALLS_PER_SECOND = 50


class Fleet:
    """Two backends with real endpoints, whose channels fail when told to."""

    def __init__(self, seed: int, **slow_start: object) -> None:
        self.chance = random.Random(seed)
        self.failing: set[str] = set()
        self.served: list[tuple[float, str]] = []
        self.endpoints = {name: self._endpoint(name, slow_start) for name in ("a", "b")}
        router = Router(weights=ScorerWeights(), picker="best", source=self.chance)
        self.route = Route(fleet=self, router=router)  # type: ignore[arg-type]  # a fleet as far as routing goes

    def _endpoint(self, name: str, slow_start: dict[str, object]) -> Endpoint:
        made = Endpoint(
            BackendSettings(name=name, address="127.0.0.1:1"),
            aliases={},
            clock=now,
            source=self.chance,
            slow_start=SlowStartSettings.model_validate(slow_start),
        )

        async def channel(call: Call[Request], send: Send) -> None:
            self.served.append((now(), name))
            await asyncio.sleep(0.001)
            if name in self.failing:
                raise BackendError("it is broken")
            await send(pb.GenerateResponse(started=pb.Started(model="m")))
            await send(pb.GenerateResponse(delta=pb.Delta(text="a", token_count=1)))
            await send(pb.GenerateResponse(finished=pb.Finished()))

        made.service = endpoint_stack(made, channel=channel, clock=now, telemetry=off())
        made.found_serving()
        made.list_models([pb.Model(id="m", state=pb.Model.STATE_ACTIVE)])
        return made

    def snapshot(self) -> list[EndpointView]:
        return [endpoint.view() for endpoint in self.endpoints.values()]

    def service(self, name: str) -> Endpoint:
        return self.endpoints[name]

    async def call(self, backend: str = "") -> None:
        request = pb.GenerateRequest(model="m", messages=[pb.Message(parts=[pb.Part(text="hi")])])
        if backend:
            request.routing.backends.append(backend)
        await self.route(Call(request=request), Sink())

    async def eject(self, name: str) -> None:
        self.failing.add(name)
        while self.endpoints[name].state is not State.EJECTED:
            with pytest.raises(Failure):
                await self.call(name)

    async def hold(self, seconds: float) -> None:
        end = now() + seconds
        while now() < end:
            await self.call()
            await asyncio.sleep(1.0 / CALLS_PER_SECOND)

    def shares(self, since: float, *, step: float = 2.0) -> list[float]:
        """Returns the share of the calls that `a` got, for each `step` seconds."""
        counts: Counter[tuple[int, str]] = Counter()
        for at, name in self.served:
            if at >= since:
                counts[int((at - since) / step), name] += 1
        places = range(max(place for place, _ in counts) + 1)
        return [counts[place, "a"] / (counts[place, "a"] + counts[place, "b"]) for place in places]


@virtual
async def test_a_backend_that_serves_again_is_tried_within_a_second_and_has_its_share_in_ten() -> None:
    for seed in range(2):
        fleet = Fleet(seed)
        await fleet.eject("a")
        endpoint = fleet.endpoints["a"]
        endpoint.lose("it crashed")
        await fleet.hold(5.0)
        fleet.failing.clear()
        fleet.served.clear()
        since = now()
        endpoint.found_serving()
        await fleet.hold(0.9)
        assert next(at for at, name in fleet.served if name == "a") <= since + 1.0
        assert endpoint.state is State.ACTIVE
        await fleet.hold(9.1)
        assert endpoint.to_proto().share == 1.0
        fleet.served.clear()
        since = now()
        await fleet.hold(20.0)
        [share] = fleet.shares(since, step=100.0)
        assert 0.4 < share < 0.6, f"seed {seed}"


@virtual
async def test_its_share_grows_step_by_step() -> None:
    totals = [0.0] * 4
    for seed in range(8):
        fleet = Fleet(seed)
        await fleet.eject("a")
        fleet.failing.clear()
        endpoint = fleet.endpoints["a"]
        endpoint.lose("it crashed")
        endpoint.found_serving()
        await fleet.call()
        fleet.served.clear()
        assert endpoint.to_proto().share == pytest.approx(0.1, abs=0.01)
        assert endpoint.view().share < 1.0
        since = now()
        await fleet.hold(8.0)
        totals = [total + share / 8 for total, share in zip(totals, fleet.shares(since), strict=False)]
    # Half of 0.1 to 1.0, since the other takes half of the calls of the turns it takes part in.
    assert totals == pytest.approx([0.5 * share for share in (0.21, 0.44, 0.66, 0.89)], abs=0.09)


@virtual
async def test_a_backend_that_comes_back_alone_gets_every_call() -> None:
    fleet = Fleet(1)
    await fleet.eject("a")
    fleet.failing.clear()
    fleet.endpoints["b"].lose("gone")
    fleet.endpoints["a"].lose("it crashed")
    fleet.endpoints["a"].found_serving()
    fleet.served.clear()
    await fleet.hold(1.0)
    assert {name for _, name in fleet.served} == {"a"}


@virtual
async def test_who_asks_for_a_backend_gets_it_however_small_its_share() -> None:
    fleet = Fleet(1)
    await fleet.eject("a")
    fleet.failing.clear()
    fleet.endpoints["a"].lose("it crashed")
    fleet.endpoints["a"].found_serving()
    fleet.served.clear()
    for _ in range(20):
        await fleet.call("a")
    assert {name for _, name in fleet.served} == {"a"}


@virtual
async def test_a_backend_that_was_never_ejected_has_its_full_share() -> None:
    fleet = Fleet(1)
    assert fleet.endpoints["a"].to_proto().share == 1.0
    fleet.endpoints["a"].lose("gone")
    fleet.endpoints["a"].found_serving()
    assert fleet.endpoints["a"].to_proto().share == 1.0


@virtual
async def test_the_way_back_begins_anew_with_each_ejection_and_can_be_switched_off() -> None:
    growing = SlowStart(SlowStartSettings(), clock=now)
    assert growing.share == 1.0
    growing.begin()
    await asyncio.sleep(4.0)
    assert growing.share == pytest.approx(0.55)
    growing.begin()
    assert growing.share == pytest.approx(0.1)
    await asyncio.sleep(8.0)
    assert growing.share == 1.0
    at_once = SlowStart(SlowStartSettings.model_validate({"window": 0}), clock=now)
    at_once.begin()
    assert at_once.share == 1.0
