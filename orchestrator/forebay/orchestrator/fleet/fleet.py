"""The backends behind the orchestrator, together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from types import TracebackType

import grpc.aio

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendNotFound
from forebay.kit.pipeline import Service
from forebay.kit.relay import Pairs
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.fleet.feed import Feed
from forebay.orchestrator.fleet.probe import Probe
from forebay.orchestrator.routing.matching import Match, Matcher
from forebay.orchestrator.routing.view import EndpointView

logger = logging.getLogger(__name__)


class Member:
    """One backend with all that belongs to it.

    Args:
        endpoint: what is known of it.
        channel: the connection to it.
        probe: keeps it known.
        credentials: metadata that proves to it who we are.
    """

    def __init__(
        self, *, endpoint: Endpoint, channel: grpc.aio.Channel, probe: Probe, credentials: Pairs = ()
    ) -> None:
        self.credentials = credentials
        self.endpoint = endpoint
        self.channel = channel
        self.probe = probe
        self.tasks: list[asyncio.Task[None]] = []
        """What keeps it known, while the fleet runs."""


class Fleet:
    """Owns the backends and the tasks that watch them.

    It is entered with `async with`; the tasks run, and the connections are
    open, until the block ends.

    Args:
        members: the backends, in the order of the configuration.
        feed: passes on what changes.
        matcher: finds models by name. None is one with the default settings.
    """

    def __init__(self, members: Sequence[Member], feed: Feed, matcher: Matcher | None = None) -> None:
        # Never changed in place: metrics are read on another thread.
        self._members = {member.endpoint.name: member for member in members}
        self.feed = feed
        self._matcher = matcher or Matcher()
        self._keepers: list[Callable[[], Coroutine[None, None, None]]] = []
        self._group = asyncio.TaskGroup()
        self._keeping: list[asyncio.Task[None]] = []
        self._is_running = False
        self._leaving: set[Member] = set()
        self._guests: set[asyncio.Task[None]] = set()
        self._closers: list[Callable[[], Awaitable[None]]] = []

    def __repr__(self) -> str:
        return f"<Fleet [{' | '.join(member.endpoint.status() for member in self._members.values())}]>"

    def __iter__(self) -> Iterator[Endpoint]:
        return (member.endpoint for member in self._members.values())

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> Endpoint:
        """Returns a backend.

        Raises:
            BackendNotFound: there is none of that name.
        """
        return self.member(name).endpoint

    def member(self, name: str) -> Member:
        """Returns a backend with its connection.

        Raises:
            BackendNotFound: there is none of that name.
        """
        member = self._members.get(name)
        if member is None:
            raise BackendNotFound(
                f"there is no backend {name!r}; there are {', '.join(self._members)}",
                metadata={"backend": name},
            )
        return member

    @property
    def names(self) -> list[str]:
        """Every backend's name."""
        return list(self._members)

    def snapshot(self) -> list[EndpointView]:
        """Returns every backend as it is now."""
        return [endpoint.view() for endpoint in self]

    def service(self, name: str) -> Service:
        """Returns the stack of a backend."""
        return self[name]

    def weights(self, model: str) -> str:
        """Returns what tells the weights behind a model's name from others: digests, as far as known."""
        return " ".join(sorted({found.weights.digest for found in self.find(model).values()}))

    def find(self, model: str) -> dict[str, pb.Model]:
        """Returns the models that a name means for calls, by backend: those that may answer."""
        found = self._matcher.find(model, [endpoint.models for endpoint in self])
        may_be_like = self._matcher.settings.like
        return {
            name: each.model
            for name, each in zip(self._members, found, strict=True)
            if each is not None and (may_be_like or each.match is not Match.LIKE)
        }

    def judge(self, backend: str, model: str, capability: pb.Capability.ValueType, kept: bool) -> None:
        """Takes in whether a reply was what a capability of its model promises."""
        member = self._members.get(backend)
        if member is not None:  # it may have been removed while it answered
            member.endpoint.judge(model, capability, kept=kept)

    def spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        """Starts a task that ends with the fleet at the latest. It must not fail."""
        task = self._group.create_task(work, name=name)
        self._guests.add(task)
        task.add_done_callback(self._guests.discard)
        return task

    def while_open(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Has a task run from when the fleet is entered until it is left. It must not fail."""
        self._keepers.append(work)

    def on_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """Has something closed after all tasks have ended."""
        self._closers.append(close)

    async def __aenter__(self) -> Fleet:
        await self._group.__aenter__()
        self._is_running = True
        for member in self._members.values():
            self._start(member)
        self._keeping = [self._group.create_task(keeper(), name="keeper") for keeper in self._keepers]
        return self

    def _start(self, member: Member) -> None:
        for work in (member.probe.watch_health, member.probe.watch_models):
            name = f"{member.endpoint.name}.{work.__name__}"
            member.tasks.append(self._group.create_task(work(), name=name))

    def replace(self, members: Sequence[Member], *, grace: float) -> None:
        """Has other backends from now on. Who is in both lists stays as it is.

        Calls on a backend that is left out go on. When the last has ended its connection is closed.

        Args:
            members: the backends from now on, in the order of the configuration.
            grace: most seconds that calls on a backend that is left out may take.
        """
        before = self._members
        self._members = {member.endpoint.name: member for member in members}
        for member in before.values():
            if member not in members:
                for task in member.tasks:
                    task.cancel()
                self._leaving.add(member)
                self.spawn(self._part(member, grace), f"{member.endpoint.name}.part")
                self.feed.publish(member.endpoint.name)
        for member in members:
            if member not in before.values():
                if self._is_running:
                    self._start(member)
                self.feed.publish(member.endpoint.name)

    async def _part(self, member: Member, grace: float) -> None:
        endpoint = member.endpoint
        try:
            async with asyncio.timeout(grace):
                await endpoint.wait_idle()
        except TimeoutError:
            logger.warning(
                "backend %s was removed %g s ago: %d calls on it are broken off",
                endpoint.name,
                grace,
                endpoint.active + endpoint.queued,
            )
        await member.channel.close()
        self._leaving.discard(member)
        logger.info("backend %s: its connection is closed", endpoint.name)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        probes = [task for member in self._members.values() for task in member.tasks]
        for task in (*probes, *self._keeping, *self._guests):
            task.cancel()
        try:
            # The group has to know of a cancellation, which may be its own because a task of it crashed.
            # Any other exception of the block it would only wrap.
            if isinstance(error, asyncio.CancelledError):
                await self._group.__aexit__(kind, error, trace)
            else:
                await self._group.__aexit__(None, None, None)
        finally:
            for member in (*self._members.values(), *self._leaving):
                await member.channel.close()
            for close in self._closers:
                await close()
