"""Loads and unloads models across backends, as the ledger decides, and lets calls wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Protocol, TypeAlias

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import metrics
from forebay.kit.failure import BackendUnavailable, CapabilityUnsupported, Failure, ModelLoadFailed
from forebay.kit.metrics import Metrics
from forebay.models.v1 import models_pb2 as models_pb
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import PlacedModel, PlacementSettings
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.placement.host import LOCAL, LocalMemory, host_of
from forebay.orchestrator.placement.ledger import Entry, Figures, Key, Ledger, Listed, Stage
from forebay.orchestrator.placement.room import ROOMY, Room, estimate

logger = logging.getLogger(__name__)

HEARTBEAT = 10.0
"""Seconds after which a call that waits is told that it still does, though nothing changed. Whoever takes
silence for a fault waits longer than that."""

PERIOD = 1.0
"""Seconds between two looks at the memory while somebody waits for room."""

UNLOAD_TIMEOUT = 60.0
"""Seconds that unloading may take: frameworks finish their calls first, and not all of them are ours."""

_COOLDOWN_MIN, _COOLDOWN_MAX = 1.0, 60.0
"""Seconds for which a load that failed is not tried again for a call, the first time and at most."""

Tell: TypeAlias = Callable[[models_pb.LoadModelResponse], Awaitable[None]]
"""Is told how far a load is."""


class Manages(Protocol):
    """What is needed of a backend's model management."""

    async def load(self, request: models_pb.LoadModelRequest, send: Tell) -> None:
        """Loads a model."""

    async def unload(self, model: str, *, force: bool) -> models_pb.UnloadModelResponse:
        """Removes a model from memory."""


class _Ear:
    """What one who waits has heard so far."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.event = _progress("loading")
        self.is_over = False
        self.failure: Failure | None = None

    def hear(self, event: models_pb.LoadModelResponse) -> None:
        self.event = event
        self.news.set()

    def end(self, failure: Failure | None) -> None:
        self.is_over, self.failure = True, failure
        self.news.set()


@dataclass(frozen=True, slots=True)
class _Cooldown:
    failure: Failure
    until: float
    length: float


class Placement:
    """Keeps the ledger in line with the backends, and the backends in line with the ledger.

    Args:
        settings: how much memory there is for models, and which are always there.
        backends: returns every backend there is.
        management: returns the model management of a backend.
        spawn: starts a task that ends with the fleet.
        clock: gives the time in seconds.
        memory: this machine's memory.
        today: gives the time of day.
    """

    def __init__(
        self,
        settings: PlacementSettings,
        *,
        backends: Callable[[], Iterable[Endpoint]],
        management: Callable[[str], Manages],
        spawn: Callable[[Coroutine[None, None, None], str], object],
        clock: Clock,
        memory: LocalMemory | None = None,
        today: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings = settings
        self._backends = backends
        self._management = management
        self._spawn = spawn
        self._clock = clock
        self._memory = memory or LocalMemory()
        self._today = today
        self.ledger = Ledger(_Orders(self), clock=clock)
        self._ears: dict[Key, set[_Ear]] = {}
        self._asked_in: dict[Key, Context] = {}
        self._requests: dict[Key, models_pb.LoadModelRequest] = {}  # of loads that were asked for by name
        self._cooldowns: dict[Key, _Cooldown] = {}
        self._blind: set[str] = set()  # backends that load and unload by themselves
        self._local_names: set[str] = set()  # what services on this machine call it
        self._totals: dict[str, int] = {}  # bytes of other hosts, as their services told
        self._metrics: Metrics | None = None

    def __repr__(self) -> str:
        return f"<Placement {self.ledger!r}>"

    def show(self, to: Metrics) -> None:
        """Has the memory of every host read as gauges, and evictions counted, from now on."""
        self._metrics = to

        def each(value: Callable[[Figures], int]) -> metrics.Samples:
            return lambda: [(value(host), {"forebay.host": host.host}) for host in self.ledger.figures()]

        def loads() -> Iterator[tuple[float, dict[str, str]]]:
            for host in self.ledger.figures():
                yield host.loads, {"forebay.host": host.host, "forebay.state": "active"}
                yield host.waiting, {"forebay.host": host.host, "forebay.state": "waiting"}

        to.observe(metrics.HOST_LIMIT, each(lambda host: host.limit))
        to.observe(metrics.HOST_USED, each(lambda host: host.used))
        to.observe(metrics.HOST_RESERVED, each(lambda host: host.reserved))
        to.observe(metrics.HOST_LOADS, loads)

    def change(self, settings: PlacementSettings) -> None:
        """Goes by other settings from now on."""
        before, self._settings = self._settings, settings
        if settings == before:
            return
        if not settings.enabled:
            for endpoint in self._backends():
                self.lost(endpoint.name)
            return
        for figures in self.ledger.figures():
            self._measure(figures.host)
        for endpoint in self._backends():
            for placed in before.models:
                key = self._key(endpoint, placed)
                if key is not None and placed.pinned and not self._is_pinned(key):
                    self.ledger.pin(key, pinned=False)
            if self.ledger.is_known(endpoint.name):
                self._preload(endpoint, [each for each in settings.models if each not in before.models])

    # What is known of backends.

    def listed(self, endpoint: Endpoint, answer: pb.ListModelsResponse, asked: float) -> None:
        """Takes in a list of models.

        Args:
            endpoint: whose it is.
            answer: the list.
            asked: when it was asked for.
        """
        if not self._settings.enabled:
            return
        is_new = not self.ledger.is_known(endpoint.name)
        reported = answer.memory
        host = host_of(endpoint.settings.address, reported.host, self._local_names)
        if host == LOCAL:
            self._local_names |= {reported.host} - {""}
        else:
            self._totals[host] = reported.total_bytes or self._totals.get(host, 0)
        self.ledger.place(endpoint.name, host=host, limit=reported.limit_bytes)
        self._measure(host, reported.available_bytes)
        self.ledger.observe(endpoint.name, [self._read(model) for model in answer.models], asked=asked)
        if is_new:
            if endpoint.name in self._blind:
                self.ledger.cannot_unload(endpoint.name)
            self._preload(endpoint, self._settings.models)

    def _read(self, model: pb.Model) -> Listed:
        return Listed(
            model=model.id,
            size=estimate(model),
            is_loaded=model.state in (pb.Model.STATE_ACTIVE, pb.Model.STATE_UNLOADING),
            is_loading=model.state == pb.Model.STATE_LOADING,
            pinned=model.pinned,
            seconds=model.load_duration.ToTimedelta().total_seconds() or None,
            idle=(self._today() - model.use_time.ToDatetime(UTC)).total_seconds()
            if model.HasField("use_time")
            else None,
        )

    def lost(self, backend: str) -> None:
        """Notes that a backend, or the framework behind it, is away."""
        failure = BackendUnavailable(f"backend {backend} was lost", metadata={"backend": backend})
        self.ledger.lose(backend, failure)
        self._cooldowns = {key: each for key, each in self._cooldowns.items() if key[0] != backend}

    def room(self, backend: str, model: str) -> Room:
        """Returns how much room there is for a model on a backend."""
        entry = self.ledger.find((backend, model))
        if entry is not None and entry.stage in (Stage.LOADING, Stage.RESIDENT):
            return ROOMY  # it has its room, though the last list does not say so yet
        return self.ledger.room(backend) or ROOMY

    def memory(self, backend: str) -> pb.Memory | None:
        """Returns the memory that a backend's models share with others; None if it is not known."""
        figures = self.ledger.figures_of(backend)
        if figures is None:
            return None
        return pb.Memory(
            host=figures.host,
            total_bytes=self._memory.total if figures.host == LOCAL else self._totals.get(figures.host, 0),
            available_bytes=figures.available or 0,
            limit_bytes=figures.limit,
            used_bytes=figures.used,
            reserved_bytes=figures.reserved,
        )

    def _measure(self, host: str, available: int = 0) -> None:
        if host == LOCAL:
            limit = self._memory.limit(self._settings)
            self.ledger.measure(host, limit=limit, available=self._memory.available(self._settings))
        else:
            limit = int(self._totals.get(host, 0) * self._settings.share)
            self.ledger.measure(host, limit=limit, available=available or None)

    # What calls want.

    def held(self, endpoint: Endpoint, name: str, tell: Tell | None) -> AbstractAsyncContextManager[None]:
        """Has a model in memory for the length of a block. See `take`."""
        return _Held(self, endpoint, name, tell)

    async def take(self, endpoint: Endpoint, name: str, tell: Tell | None) -> Entry | None:
        """Has a model in memory until its entry in the ledger is released, loading it first if need be.

        Args:
            endpoint: the backend.
            name: the model, as the backend spells it.
            tell: told how far the load is.

        Returns:
            What holds it. None if no account can be kept of it.

        Raises:
            MemoryExhausted: there is no room for it.
            ModelLoadFailed: it cannot be loaded.
            Failure: as the backend said.
        """
        model = endpoint.find(name)
        # What a framework does not say of its models cannot be kept account of.
        if (
            model is None
            or model.state == pb.Model.STATE_UNSPECIFIED
            or not self.ledger.is_known(endpoint.name)
        ):
            return None
        key = (endpoint.name, model.id)
        entry = self.ledger.hold(key)
        if entry is None:
            self._refuse_while_cooling(key)
            entry, _ = await self._wait(key, estimate(model), tell, pinned=self._is_pinned(key))
        return entry

    async def load(self, endpoint: Endpoint, request: models_pb.LoadModelRequest, send: Tell) -> None:
        """Loads a model because somebody asked for that by name.

        Raises:
            MemoryExhausted: there is no room for it.
            Failure: as the backend said.
        """
        model = endpoint.find(request.model)
        if model is None or not self.ledger.is_known(endpoint.name):
            await self._management(endpoint.name).load(request, send)
            return
        key = (endpoint.name, model.id)
        entry = self.ledger.hold(key)
        last: models_pb.LoadModelResponse | None = None
        if entry is None:
            self._requests.setdefault(key, request)
            entry, last = await self._wait(key, estimate(model), send, pinned=request.pinned)
        try:
            if last is None or not last.HasField("loaded"):
                # It was there. The backend may still change for how long, and says what it is now.
                await self._management(endpoint.name).load(request, send)
                if request.pinned:
                    self.ledger.pin(key, pinned=True)
            else:
                await send(last)
        finally:
            self.ledger.release(entry)

    async def _wait(
        self, key: Key, size: int, tell: Tell | None, *, pinned: bool
    ) -> tuple[Entry, models_pb.LoadModelResponse]:
        """Waits for a model. Returns what is held, and the last that was heard of the load."""
        ear = _Ear()
        ears = self._ears.setdefault(key, set())
        ears.add(ear)
        self._asked_in.setdefault(key, otel_context.get_current())
        waiter = self.ledger.ask(key, size, ear.end, pinned=pinned)
        if self.ledger.is_waiting(waiter):
            ear.event = _progress("waiting for room")
        since = told_at = self._clock()
        told: models_pb.LoadModelResponse | None = None
        try:
            while not ear.is_over:
                now = self._clock()
                if tell is not None and (ear.event is not told or now - told_at >= HEARTBEAT):
                    told, told_at = ear.event, now
                    if told.HasField("progress"):
                        await tell(told)
                        continue  # what came while the caller took that in goes first
                if self.ledger.is_waiting(waiter):
                    if now - since >= self._settings.wait.total_seconds():
                        raise self.ledger.refusal(key, size)
                    self._look_again(key[0])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PERIOD):
                        await ear.news.wait()
                ear.news.clear()
            if waiter.held is None:
                raise _copy(ear.failure or BackendUnavailable(f"model {key[1]} is not in memory"))
        except BaseException:
            self.ledger.leave(waiter)
            raise
        finally:
            ears.discard(ear)
            if not ears:
                self._ears.pop(key, None)
                self._asked_in.pop(key, None)
        return waiter.held, ear.event

    def _look_again(self, backend: str) -> None:
        """Looks whether another program has made room: nobody tells."""
        figures = self.ledger.figures_of(backend)
        if figures is not None and figures.host == LOCAL:
            self._measure(LOCAL)
        self.ledger.pump()

    def _refuse_while_cooling(self, key: Key) -> None:
        cooldown = self._cooldowns.get(key)
        left = cooldown.until - self._clock() if cooldown is not None else 0.0
        if cooldown is not None and left > 0:
            failure = _copy(cooldown.failure)
            failure.retry_after = timedelta(seconds=left)
            raise failure

    # What is always there.

    def _key(self, endpoint: Endpoint, placed: PlacedModel) -> Key | None:
        """Returns the model that a setting means on a backend; None if it means none there."""
        found = endpoint.find(placed.model) if placed.backend in (None, endpoint.name) else None
        return (endpoint.name, found.id) if found is not None else None

    def _is_pinned(self, key: Key) -> bool:
        endpoint = next((each for each in self._backends() if each.name == key[0]), None)
        return endpoint is not None and any(
            placed.pinned and self._key(endpoint, placed) == key for placed in self._settings.models
        )

    def _preload(self, endpoint: Endpoint, models: Iterable[PlacedModel]) -> None:
        for placed in models:
            key = self._key(endpoint, placed)
            if key is None or (placed.backend is None and self._is_elsewhere(endpoint, placed)):
                continue
            self._spawn(self._bring(endpoint, key, placed), f"{key[0]}.preload")

    def _is_elsewhere(self, here: Endpoint, placed: PlacedModel) -> bool:
        keys = (self._key(each, placed) for each in self._backends() if each is not here)
        return any(key is not None and self.ledger.find(key) is not None for key in keys)

    async def _bring(self, endpoint: Endpoint, key: Key, placed: PlacedModel) -> None:
        async def ignore(event: models_pb.LoadModelResponse) -> None:
            pass

        request = models_pb.LoadModelRequest(model=key[1], pinned=placed.pinned)
        try:
            await self.load(endpoint, request, ignore)
        except Failure as failure:
            logger.warning("backend %s: %s is not loaded: %s", key[0], key[1], failure.message)
        else:
            logger.info("backend %s: %s is in memory, as configured", key[0], key[1])

    # What the ledger orders.

    async def carry_out_load(self, key: Key) -> None:
        """Loads a model, and tells the ledger how that ended."""
        backend, model = key
        named = self._requests.pop(key, None)
        request = models_pb.LoadModelRequest()
        request.CopyFrom(named or models_pb.LoadModelRequest(pinned=self._is_pinned(key)))
        request.model, request.backend = model, ""
        since = self._clock()
        size = 0
        # What orders a load may be the end of another call, which made room. It belongs to who asked first.
        otel_context.attach(self._asked_in.get(key, Context()))

        async def hear(event: models_pb.LoadModelResponse) -> None:
            nonlocal size
            if event.HasField("loaded"):
                size = event.loaded.model.memory_bytes
            for ear in list(self._ears.get(key, ())):
                ear.hear(event)

        failure: Failure = BackendUnavailable(f"model {model} was not loaded on backend {backend}")
        try:
            async with asyncio.timeout(self._settings.load_timeout.total_seconds()):
                await self._management(backend).load(request, hear)
        except CapabilityUnsupported as unsupported:
            if named is None:
                self._note_blind(backend)
                self.ledger.loaded(key)  # it will, with the call that waits for it
            failure = unsupported
        except Failure as caught:
            failure = caught
            if isinstance(caught, ModelLoadFailed):
                self._cool(key, caught)
        except TimeoutError:
            seconds = self._settings.load_timeout.total_seconds()
            failure = ModelLoadFailed(
                f"backend {backend} did not load model {model} within {seconds:g} s",
                metadata={"backend": backend, "model": model},
            )
            self._cool(key, failure)
        else:
            self._cooldowns.pop(key, None)
            self.ledger.loaded(key, size=size, seconds=self._clock() - since)
        finally:
            self.ledger.failed(key, failure)  # which it takes for nothing where it was loaded

    async def carry_out_eviction(self, key: Key) -> None:
        """Unloads a model, and tells the ledger how that ended."""
        backend, model = key
        logger.info("backend %s: %s leaves memory for another model", backend, model)
        try:
            async with asyncio.timeout(UNLOAD_TIMEOUT):
                await self._management(backend).unload(model, force=False)
        except CapabilityUnsupported:
            self._note_blind(backend)
        except (Failure, TimeoutError) as error:
            why = error.message if isinstance(error, Failure) else f"it took over {UNLOAD_TIMEOUT:g} s"
            logger.warning("backend %s: %s could not be unloaded: %s", backend, model, why)
        else:
            self.ledger.evicted(key)
            if self._metrics is not None:
                self._metrics.add(metrics.EVICTIONS, {"forebay.backend": backend})
        finally:
            self.ledger.kept(key)  # which it takes for nothing where it was evicted

    def order(self, work: Coroutine[None, None, None], name: str) -> None:
        """Has an order carried out."""
        self._spawn(work, name)

    def _note_blind(self, backend: str) -> None:
        if backend not in self._blind:
            self._blind.add(backend)
            logger.info(
                "backend %s loads and unloads models by itself: they are counted, and cannot be unloaded "
                "for others",
                backend,
            )
        if self.ledger.is_known(backend):
            self.ledger.cannot_unload(backend)

    def _cool(self, key: Key, failure: Failure) -> None:
        before = self._cooldowns.get(key)
        length = min(_COOLDOWN_MAX, before.length * 2.0) if before is not None else _COOLDOWN_MIN
        self._cooldowns[key] = _Cooldown(failure, self._clock() + length, length)


class _Held:
    """A model in memory, for `async with`. A class, for a generator costs more than it would wrap."""

    __slots__ = ("_endpoint", "_entry", "_name", "_placement", "_tell")

    def __init__(self, placement: Placement, endpoint: Endpoint, name: str, tell: Tell | None) -> None:
        self._placement = placement
        self._endpoint = endpoint
        self._name = name
        self._tell = tell

    async def __aenter__(self) -> None:
        self._entry = await self._placement.take(self._endpoint, self._name, self._tell)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._entry is not None:
            self._placement.ledger.release(self._entry)


class _Orders:
    """Turns orders of the ledger into tasks. See `Effects`."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def load(self, key: Key) -> None:
        self._placement.order(self._placement.carry_out_load(key), f"{key[0]}.load")

    def evict(self, key: Key) -> None:
        self._placement.order(self._placement.carry_out_eviction(key), f"{key[0]}.evict")


def _progress(detail: str) -> models_pb.LoadModelResponse:
    return models_pb.LoadModelResponse(progress=models_pb.LoadProgress(detail=detail))


def _copy(failure: Failure) -> Failure:
    """Returns the same failure for one more who hears of it: what is raised twice must not be one object."""
    return type(failure)(
        failure.message,
        metadata=failure.metadata,
        retry_after=failure.retry_after,
        violations=failure.violations,
    )
