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
from forebay.kit.rpc import Edge, caller, write
from forebay.orchestrator.activity import Activity
from forebay.orchestrator.fleet.fleet import Fleet
from forebay.orchestrator.reload import Reload
from forebay.orchestrator.routing.router import Candidate, Router

FLEET_SERVICE = "forebay.fleet.v1.FleetService"

WATCH_PAUSE = 0.05
"""Seconds between two rounds of changes to one watcher. Every call changes a count; twenty pictures a second
are as many as a person can use."""

INTERVAL_MIN, INTERVAL_MAX, INTERVAL_UNSET = 0.05, 60.0, 1.0
"""Seconds between two messages of activity: at least, at most, and where the caller does not say."""

# The stubs' type for a context names both stacks; only the aio one is ever given.
Context = grpc.aio.ServicerContext[Any, Any]


class FleetServicer(fleet_pb2_grpc.FleetServiceServicer):
    """Serves a fleet as `forebay.fleet.v1.FleetService`.

    Args:
        fleet: the backends.
        router: decides between them; explanations ask the very one that routes.
        default_model: model of requests that name none.
        edge: what is around every call.
        activity: the record of requests.
        reload: reads the configuration again. None has none.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        router: Router,
        default_model: str,
        edge: Edge,
        activity: Activity,
        reload: Reload | None = None,
    ) -> None:
        self._fleet = fleet
        self._router = router
        self.default_model = default_model
        self._edge = edge
        self._reload = reload
        self._activity = activity

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
            return self._explain(request, caller(context))

    async def WatchActivity(  # type: ignore[override]  # stubs know only generators
        self, request: fleet_pb2.WatchActivityRequest, context: Context
    ) -> None:
        """Streams what the orchestrator is doing, once per interval."""
        # Only the check has an Edge, for a drain would wait for the watch.
        async with self._edge.serve(context, f"{FLEET_SERVICE}/WatchActivity", is_routine=True):
            interval = _interval(request)
        watch = self._activity.watch()
        with contextlib.suppress(CallerLeft):
            while True:
                # What a slow caller has not taken yet is not made: the next message tells what is then.
                await write(context, watch.look())
                await asyncio.sleep(interval)

    def _explain(self, request: fleet_pb2.ExplainRouteRequest, asker: str) -> fleet_pb2.ExplainRouteResponse:
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
            decision = self._router.decide(asked, self._fleet.snapshot(), caller=asker)
            answer.request_class = decision.traits.request_class
            answer.class_reasons[:] = decision.traits.reasons
            # Best first within a model, and the models in the order in which they are tried.
            for candidate in decision.candidates:
                if candidate.refused_by:
                    refused.append(candidate)
                else:
                    answer.candidates.append(candidate.to_proto())
        answer.candidates.extend(each.to_proto() for each in refused)
        return answer


def _interval(request: fleet_pb2.WatchActivityRequest) -> float:
    if not request.HasField("interval"):
        return INTERVAL_UNSET
    # By its parts, for a value that is out of range has no other form.
    seconds = request.interval.seconds + request.interval.nanos / 1e9
    if not INTERVAL_MIN <= seconds <= INTERVAL_MAX:
        text = f"give a time between {INTERVAL_MIN * 1000:.0f} ms and {INTERVAL_MAX:.0f} s"
        raise InvalidRequest(f"interval: {text}", violations=[("interval", text)])
    return seconds
