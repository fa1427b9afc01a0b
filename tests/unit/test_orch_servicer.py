"""What the fleet service does when its caller is gone."""

from __future__ import annotations

import random
from typing import Any

import grpc.aio

from forebay.fleet.v1 import fleet_pb2
from forebay.kit.rpc import Edge, InFlight
from forebay.orchestrator.activity import Activity
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.config import BackendSettings, ScorerWeights
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.fleet.feed import Feed
from forebay.orchestrator.fleet.fleet import Fleet, Member
from forebay.orchestrator.routing.router import Router
from forebay.orchestrator.servicer import FleetServicer
from forebay.testing.clock import now, virtual


class GoneCaller:
    """A context whose caller reads one message and hangs up."""

    def __init__(self) -> None:
        self.written: list[fleet_pb2.WatchBackendsResponse] = []

    async def write(self, message: fleet_pb2.WatchBackendsResponse) -> None:
        if self.written:
            raise grpc.aio.UsageError("the call is over")
        self.written.append(message)


@virtual
async def test_a_watch_whose_caller_left_ends_in_silence() -> None:
    source = random.Random(0)
    feed = Feed()
    endpoints = [
        Endpoint(BackendSettings(name=name, address="127.0.0.1:1"), aliases={}, clock=now, source=source)
        for name in ("a", "b")
    ]
    nothing: Any = None  # neither a connection nor a probe is asked here
    fleet = Fleet([Member(endpoint=e, channel=nothing, probe=nothing) for e in endpoints], feed)
    router = Router(weights=ScorerWeights(), picker="best", source=source)
    admission = Admission(queue=1, ageing=1.0, capacity=lambda pool: 1, clock=now)
    servicer = FleetServicer(
        fleet=fleet,
        router=router,
        default_model="",
        edge=Edge(InFlight()),
        activity=Activity(admission, clock=now),
    )
    caller: Any = GoneCaller()
    await servicer.WatchBackends(fleet_pb2.WatchBackendsRequest(), caller)
    assert [message.backend.name for message in caller.written] == ["a"]
    assert len(feed) == 0
    assert repr(fleet) == "<Fleet [a UNREACHABLE 0s | b UNREACHABLE 0s]>"
