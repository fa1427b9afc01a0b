"""Puts the orchestrator together from its settings."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import grpc.aio

from forebay.fleet.v1 import fleet_pb2_grpc
from forebay.kit.channel import connect
from forebay.kit.relay import Pairs
from forebay.kit.rpc import Edge
from forebay.kit.telemetry import Telemetry, off
from forebay.orchestrator.activity import Activity
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import BackendSettings, CacheSettings, OrchestratorSettings
from forebay.orchestrator.engine import Engine, Models
from forebay.orchestrator.fleet.capacity import Capacity
from forebay.orchestrator.fleet.channel import Channel
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.fleet.feed import Feed
from forebay.orchestrator.fleet.figures import show
from forebay.orchestrator.fleet.fleet import Fleet, Member
from forebay.orchestrator.fleet.history import History
from forebay.orchestrator.fleet.management import Management
from forebay.orchestrator.fleet.probe import Probe
from forebay.orchestrator.layers.hedge import FirstDeltas
from forebay.orchestrator.replies import MemoryStore, Store
from forebay.orchestrator.routing.affinity import Affinity
from forebay.orchestrator.routing.matching import Matcher
from forebay.orchestrator.routing.router import Router
from forebay.orchestrator.servicer import FLEET_SERVICE, FleetServicer
from forebay.orchestrator.stack import endpoint_stack, request_stack


class Orchestrator:
    """All parts of a running orchestrator. Made inside a running loop.

    Args:
        settings: the orchestrator's settings.
        telemetry: tracer of this process.
        source: where jitter and ties come from.
    """

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        telemetry: Telemetry | None = None,
        source: random.Random | None = None,
    ) -> None:
        self.settings = settings
        self._telemetry = telemetry or off()
        self._source = source or random.Random()  # noqa: S311  # spreads load; it guards nothing
        self._clock: Clock = asyncio.get_running_loop().time
        feed = Feed()
        self._times = FirstDeltas()
        matcher = Matcher(settings.matching, own_names=settings.aliases)
        self.fleet = Fleet(
            [self._member(backend, feed) for backend in settings.backends if backend.enabled], feed, matcher
        )
        self._remember_performance(settings.performance.state_dir)
        affinity = Affinity(settings.affinity, clock=self._clock)
        self.router = Router(
            weights=settings.scorers,
            picker=settings.picker,
            source=self._source,
            matcher=matcher,
            affinity=affinity,
        )
        budget = RetryBudget(
            ratio=settings.retry.budget_ratio,
            per_second=settings.retry.budget_per_second,
            clock=self._clock,
        )
        self.admission = Admission(
            queue=settings.admission.queue,
            queue_bytes=settings.admission.queue_bytes,
            ageing=settings.admission.ageing.total_seconds(),
            capacity=Capacity(
                self.fleet,
                unknown=settings.admission.concurrency,
                clock=self._clock,
                find=self.fleet.find,
            ),
            clock=self._clock,
        )
        self.activity = Activity(self.admission, clock=self._clock)
        service = request_stack(
            settings,
            fleet=self.fleet,
            router=self.router,
            budget=budget,
            source=self._source,
            admission=self.admission,
            store=self._store(settings.cache),
            spawn=self.fleet.spawn,
            weights=self.fleet.weights,
            times=self._times,
            affinity=affinity,
            telemetry=self._telemetry,
            activity=self.activity,
        )
        show(self.fleet, self.admission, self._telemetry.metrics)
        self.inference = Engine(fleet=self.fleet, service=service, default_model=settings.default_model)
        self.models = Models(fleet=self.fleet, management=self._management)

    def register(self, server: grpc.aio.Server, edge: Edge) -> Sequence[str]:
        """Adds the fleet service to a server and returns its name."""
        servicer = FleetServicer(
            fleet=self.fleet,
            router=self.router,
            default_model=self.settings.default_model,
            edge=edge,
            activity=self.activity,
        )
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(servicer, server)
        return [FLEET_SERVICE]

    def _remember_performance(self, folder: Path | None) -> None:
        if folder is None:
            return
        history = History(folder, {endpoint.name: endpoint.performance for endpoint in self.fleet})
        history.load()
        self.fleet.while_open(history.keep)
        self.fleet.on_close(history.close)

    def dashboard(self) -> AbstractAsyncContextManager[object]:
        """Serves the dashboard for the length of a block, if there is an address for it."""
        if self.settings.web_address is None:
            return nullcontext()
        # Only here, for it needs an HTTP server that most orchestrators do without.
        from forebay.orchestrator.web.server import serving  # noqa: PLC0415

        return serving(self.settings, fleet=self.fleet, activity=self.activity, admission=self.admission)

    def _store(self, settings: CacheSettings) -> Store | None:
        if not settings.max_bytes:
            return None
        ttl = settings.ttl.total_seconds()
        memory = MemoryStore(max_bytes=settings.max_bytes, ttl=ttl, clock=self._clock)
        if not settings.url:
            return memory
        # Its client comes with the extra `cache`, which most installations do without.
        from forebay.orchestrator.remote_store import RemoteStore  # noqa: PLC0415

        remote = RemoteStore(
            settings.url,
            ttl=ttl,
            timeout=settings.timeout.total_seconds(),
            largest=memory.largest,
            clock=self._clock,
        )
        self.fleet.on_close(remote.close)
        return remote

    def _member(self, backend: BackendSettings, feed: Feed) -> Member:
        aliases = {
            alias: spellings[backend.name]
            for alias, spellings in self.settings.aliases.items()
            if backend.name in spellings
        }
        endpoint = Endpoint(
            backend,
            aliases=aliases,
            clock=self._clock,
            source=self._source,
            on_change=feed.publish,
            on_first_delta=self._times.note,
            performance=self.settings.performance,
            slow_start=self.settings.slow_start,
        )
        channel = connect(backend.address, tls_roots=backend.tls_roots)
        credentials = _credentials(backend)
        endpoint.service = endpoint_stack(
            endpoint,
            channel=Channel(channel, backend.name, credentials=credentials),
            clock=self._clock,
            telemetry=self._telemetry,
        )
        probe = Probe(endpoint, channel, self.settings.probe, source=self._source, credentials=credentials)
        return Member(endpoint=endpoint, channel=channel, probe=probe, credentials=credentials)

    def _management(self, name: str) -> Management:
        member = self.fleet.member(name)
        return Management(
            member.channel, name, on_change=member.probe.refresh, credentials=member.credentials
        )


def _credentials(backend: BackendSettings) -> Pairs:
    """Returns the metadata that proves to a backend who we are."""
    token = backend.token()
    return () if token is None else (("authorization", f"Bearer {token.get_secret_value()}"),)
