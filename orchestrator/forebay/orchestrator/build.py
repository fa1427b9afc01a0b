"""Puts the orchestrator together from its settings."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from pathlib import Path

import grpc.aio

from forebay.fleet.v1 import fleet_pb2_grpc
from forebay.kit.channel import connect
from forebay.kit.pipeline import Service
from forebay.kit.process import Configuration
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
from forebay.orchestrator.placement.placement import Placement
from forebay.orchestrator.reload import Reload, replaces
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
        configuration: what the settings came from, to be read again. None is nothing.
        source: where jitter and ties come from.
    """

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        telemetry: Telemetry | None = None,
        configuration: Configuration | None = None,
        source: random.Random | None = None,
    ) -> None:
        self.settings = settings
        self._telemetry = telemetry or off()
        self._source = source or random.Random()  # noqa: S311  # spreads load; it guards nothing
        self._clock: Clock = asyncio.get_running_loop().time
        self._feed = Feed()
        self.placement = Placement(
            settings.placement,
            backends=lambda: self.fleet,
            management=self._management,
            spawn=self._spawn,
            clock=self._clock,
        )
        self._times = FirstDeltas()
        self._matcher = matcher = Matcher(settings.matching, own_names=settings.aliases)
        self.fleet = Fleet(
            [self._member(backend, settings) for backend in settings.backends if backend.enabled],
            self._feed,
            matcher,
        )
        self._remember_performance(settings.performance.state_dir)
        self._affinity = Affinity(settings.affinity, clock=self._clock)
        self.router = Router(
            weights=settings.scorers,
            picker=settings.picker,
            source=self._source,
            matcher=matcher,
            affinity=self._affinity,
        )
        self._budget = RetryBudget(
            ratio=settings.retry.budget_ratio,
            per_second=settings.retry.budget_per_second,
            clock=self._clock,
        )
        self._capacity = Capacity(
            self.fleet, unknown=settings.admission.concurrency, clock=self._clock, find=self.fleet.find
        )
        self.admission = Admission(
            queue=settings.admission.queue,
            queue_bytes=settings.admission.queue_bytes,
            ageing=settings.admission.ageing.total_seconds(),
            capacity=self._capacity,
            clock=self._clock,
        )
        self.activity = Activity(self.admission, clock=self._clock)
        self.placement.show(self._telemetry.metrics)
        self._answers = self._store(settings.cache)
        show(self.fleet, self.admission, self._telemetry.metrics)
        self.inference = Engine(
            fleet=self.fleet, service=self._stack(settings), default_model=settings.default_model
        )
        self.models = Models(fleet=self.fleet, management=self._management, load=self.placement.load)
        self.reload = Reload(configuration, settings=lambda: self.settings, apply=self.change)
        self._servicers: list[FleetServicer] = []

    def register(self, server: grpc.aio.Server, edge: Edge) -> Sequence[str]:
        """Adds the fleet service to a server and returns its name."""
        servicer = FleetServicer(
            fleet=self.fleet,
            router=self.router,
            default_model=self.settings.default_model,
            edge=edge,
            activity=self.activity,
            reload=self.reload,
        )
        self._servicers.append(servicer)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(servicer, server)
        return [FLEET_SERVICE]

    def change(self, settings: OrchestratorSettings) -> list[str]:
        """Goes by other settings from now on. Calls in progress end on what they began with.

        Returns:
            What was changed besides the settings, a line each.

        Raises:
            OSError: a file that a backend needs cannot be read; nothing was changed.
        """
        before = self.settings
        members: list[Member] = []
        news: list[str] = []
        for backend in settings.backends:
            if not backend.enabled:
                continue
            known = self.fleet.member(backend.name) if backend.name in self.fleet else None
            stays = known is not None and not replaces(known.endpoint.settings, backend)
            is_known_there = known is not None and known.credentials == _credentials(backend)
            if known is None or not stays or not is_known_there:
                if stays and not is_known_there:
                    news.append(f'backend "{backend.name}": token read again')
                known = self._member(backend, settings)
            members.append(known)
        if settings == before and not news:
            return news
        # From here on nothing may fail.
        self.settings = settings
        for member in members:
            if member.endpoint.name in self.fleet and member is self.fleet.member(member.endpoint.name):
                self._change_member(member, before, settings)
        for name in self.fleet.names:
            if self.fleet.member(name) not in members:
                self.placement.lost(name)
        self.fleet.replace(members, grace=settings.reload.grace.total_seconds())
        self.placement.change(settings.placement)
        self._matcher.change(settings.matching, own_names=settings.aliases)
        self.router.change(weights=settings.scorers, picker=settings.picker)
        self._budget.change(ratio=settings.retry.budget_ratio, per_second=settings.retry.budget_per_second)
        self._capacity.change(unknown=settings.admission.concurrency)
        self.admission.change(
            queue=settings.admission.queue,
            queue_bytes=settings.admission.queue_bytes,
            ageing=settings.admission.ageing.total_seconds(),
        )
        self.inference.change(service=self._stack(settings), default_model=settings.default_model)
        for servicer in self._servicers:
            servicer.default_model = settings.default_model
        return news

    def _change_member(
        self, member: Member, before: OrchestratorSettings, settings: OrchestratorSettings
    ) -> None:
        endpoint = member.endpoint
        backend = next(each for each in settings.backends if each.name == endpoint.name)
        was = endpoint.settings
        endpoint.change(backend, aliases=_aliases(settings, backend.name))
        if was != backend:
            self._wire(member)
        if before.probe != settings.probe:
            member.probe.change(settings.probe)

    def _stack(self, settings: OrchestratorSettings) -> Service:
        return request_stack(
            settings,
            fleet=self.fleet,
            router=self.router,
            budget=self._budget,
            source=self._source,
            admission=self.admission,
            pool=self._capacity.pool,
            judge=self.fleet.judge,
            store=self._answers,
            spawn=self.fleet.spawn,
            weights=self.fleet.weights,
            times=self._times,
            affinity=self._affinity,
            telemetry=self._telemetry,
            activity=self.activity,
        )

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

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        self.fleet.spawn(work, name)

    def _member(self, backend: BackendSettings, settings: OrchestratorSettings) -> Member:
        endpoint = Endpoint(
            backend,
            aliases=_aliases(settings, backend.name),
            clock=self._clock,
            source=self._source,
            on_change=self._feed.publish,
            on_first_delta=self._times.note,
            performance=self.settings.performance,
            slow_start=self.settings.slow_start,
        )
        channel = connect(backend.address, tls_roots=backend.tls_roots)
        credentials = _credentials(backend)
        endpoint.memory = partial(self.placement.memory, endpoint.name)
        endpoint.room = partial(self.placement.room, endpoint.name)
        probe = Probe(
            endpoint,
            channel,
            settings.probe,
            source=self._source,
            credentials=credentials,
            observer=self.placement,
        )
        member = Member(endpoint=endpoint, channel=channel, probe=probe, credentials=credentials)
        self._wire(member)
        return member

    def _wire(self, member: Member) -> None:
        """Gives a backend the stack that its settings ask for."""
        endpoint = member.endpoint
        endpoint.service = endpoint_stack(
            endpoint,
            channel=Channel(member.channel, endpoint.name, credentials=member.credentials),
            clock=self._clock,
            telemetry=self._telemetry,
            held=partial(self.placement.held, endpoint),
        )

    def _management(self, name: str) -> Management:
        member = self.fleet.member(name)
        return Management(
            member.channel,
            name,
            on_change=member.probe.refresh,
            credentials=member.credentials,
            held=member.endpoint.held,
        )


def _aliases(settings: OrchestratorSettings, backend: str) -> dict[str, str]:
    """Returns the operator's names for a backend's models."""
    return {
        alias: spellings[backend] for alias, spellings in settings.aliases.items() if backend in spellings
    }


def _credentials(backend: BackendSettings) -> Pairs:
    """Returns the metadata that proves to a backend who we are."""
    token = backend.token()
    return () if token is None else (("authorization", f"Bearer {token.get_secret_value()}"),)
