"""The orchestrator's own interface: shows and steers the fleet."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio

from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.kit.failure import CallerLeft, CapabilityUnsupported, InvalidRequest
from forebay.kit.pipeline import Request
from forebay.kit.rpc import Edge, write
from forebay.orchestrator.fleet.fleet import Fleet
from forebay.orchestrator.reload import Reload
from forebay.orchestrator.routing.router import Candidate, Router

FLEET_SERVICE = "forebay.fleet.v1.FleetService"

WATCH_PAUSE = 0.05
"""Seconds between two rounds of changes to one watcher. Every call changes a count; twenty pictures a second
are as many as a person can use."""

# The stubs' type for a context names both stacks; only the aio one is ever given.
Context = grpc.aio.ServicerContext[Any, Any]


class FleetServicer(fleet_pb2_grpc.FleetServiceServicer):
    """Serves a fleet as `forebay.fleet.v1.FleetService`.

    Args:
        fleet: the backends.
        router: decides between them; explanations ask the very one that routes.
        default_model: model of requests that name none.
        edge: what is around every call.
        reload: reads the configuration again. None has none.
    """

    def __init__(
        self, *, fleet: Fleet, router: Router, default_model: str, edge: Edge, reload: Reload | None = None
    ) -> None:
        self._fleet = fleet
        self._router = router
        self.default_model = default_model
        self._edge = edge
        self._reload = reload

    async def ListBackends(
        self, request: fleet_pb2.ListBackendsRequest, context: Context
    ) -> fleet_pb2.ListBackendsResponse:
        """Lists the backends."""
        async with self._edge.serve(context, f"{FLEET_SERVICE}/ListBackends", is_routine=True):
            return fleet_pb2.ListBackendsResponse(backends=[endpoint.to_proto() for endpoint in self._fleet])

    async def WatchBackends(  # type: ignore[override]  # stubs know only generators
        self, request: fleet_pb2.WatchBackendsRequest, context: Context
    ) -> None:
        """Streams the backends, and each again when it changes."""
        # No Edge: it counts calls that a drain waits for, and a watch never ends by itself.
        with contextlib.suppress(CallerLeft), self._fleet.feed.watch(self._fleet.names) as watcher:
            while True:
                for name in await watcher.next():
                    await write(context, self._news(name))
                await asyncio.sleep(WATCH_PAUSE)

    def _news(self, name: str) -> fleet_pb2.WatchBackendsResponse:
        if name in self._fleet:
            return fleet_pb2.WatchBackendsResponse(backend=self._fleet[name].to_proto())
        return fleet_pb2.WatchBackendsResponse(backend=fleet_pb2.Backend(name=name), removed=True)

    async def ReloadConfiguration(
        self, request: fleet_pb2.ReloadConfigurationRequest, context: Context
    ) -> fleet_pb2.ReloadConfigurationResponse:
        """Reads the configuration again."""
        async with self._edge.serve(context, f"{FLEET_SERVICE}/ReloadConfiguration"):
            if self._reload is None:
                raise CapabilityUnsupported("this orchestrator has no configuration to read again")
            report = self._reload.serve(validate_only=request.validate_only)
            return fleet_pb2.ReloadConfigurationResponse(
                changes=report.changes, restart_required=report.restart_required
            )

    async def DrainBackend(
        self, request: fleet_pb2.DrainBackendRequest, context: Context
    ) -> fleet_pb2.DrainBackendResponse:
        """Takes a backend out of routing."""
        async with self._edge.serve(context, f"{FLEET_SERVICE}/DrainBackend"):
            endpoint = self._fleet[request.backend]
            endpoint.drain()
            return fleet_pb2.DrainBackendResponse(backend=endpoint.to_proto())

    async def ResumeBackend(
        self, request: fleet_pb2.ResumeBackendRequest, context: Context
    ) -> fleet_pb2.ResumeBackendResponse:
        """Takes a backend back into routing."""
        async with self._edge.serve(context, f"{FLEET_SERVICE}/ResumeBackend"):
            endpoint = self._fleet[request.backend]
            endpoint.resume()
            return fleet_pb2.ResumeBackendResponse(backend=endpoint.to_proto())

    async def ExplainRoute(
        self, request: fleet_pb2.ExplainRouteRequest, context: Context
    ) -> fleet_pb2.ExplainRouteResponse:
        """Says where a request would go now, and why not elsewhere."""
        async with self._edge.serve(context, f"{FLEET_SERVICE}/ExplainRoute"):
            return self._explain(request)

    def _explain(self, request: fleet_pb2.ExplainRouteRequest) -> fleet_pb2.ExplainRouteResponse:
        kind = request.WhichOneof("kind")
        if kind is None:
            raise InvalidRequest(
                "request: give the request to explain",
                violations=[("request", "give the request to explain")],
            )
        asked: Request = request.request if kind == "request" else request.embed_request
        models = dict.fromkeys((asked.model or self.default_model, *asked.routing.fallback_models))
        answer = fleet_pb2.ExplainRouteResponse()
        refused: list[Candidate] = []
        for model in models:
            asked.model = model
            decision = self._router.decide(asked, self._fleet.snapshot())
            answer.request_class = decision.traits.request_class
            answer.class_reasons[:] = decision.traits.reasons
            # Best first within a model, and the models in the order in which they are tried.
            for candidate in decision.candidates:
                if candidate.refused_by:
                    refused.append(candidate)
                else:
                    answer.candidates.append(_candidate(candidate))
        answer.candidates.extend(map(_candidate, refused))
        return answer


def _candidate(candidate: Candidate) -> fleet_pb2.Candidate:
    return fleet_pb2.Candidate(
        backend=candidate.name,
        refused_by=candidate.refused_by,
        refusal_detail=candidate.detail,
        scores=candidate.scores,
        total_score=candidate.total,
        model=candidate.spelling,
    )
