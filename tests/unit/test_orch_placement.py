"""Models that come and go over played backends, in virtual time: one account, one load, one outcome."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendBusy,
    BackendUnavailable,
    CapabilityUnsupported,
    DeadlineExceeded,
    Failure,
    MemoryExhausted,
    ModelLoadFailed,
)
from forebay.kit.metrics import Metric, Metrics, Samples
from forebay.kit.pipeline import Call, Request, Send
from forebay.kit.telemetry import off
from forebay.models.v1 import models_pb2 as models_pb
from forebay.orchestrator.config import (
    BackendSettings,
    OrchestratorSettings,
    PlacementSettings,
    ScorerWeights,
)
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.layers.deadline import Deadline
from forebay.orchestrator.layers.place import Place
from forebay.orchestrator.placement import host as host_module
from forebay.orchestrator.placement.host import LOCAL, LocalMemory, host_of
from forebay.orchestrator.placement.placement import HEARTBEAT, Placement, Tell
from forebay.orchestrator.placement.room import Room, estimate
from forebay.orchestrator.routing.router import Router
from forebay.orchestrator.stack import endpoint_stack
from forebay.testing.calls import Sink, ask, serve
from forebay.testing.clock import now, virtual

GIB = 2**30
ACTIVE, AVAILABLE = pb.Model.STATE_ACTIVE, pb.Model.STATE_AVAILABLE


class Memory(LocalMemory):
    """A machine of ten GiB."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 10 * GIB
        self.left: int | None = None

    def limit(self, settings: PlacementSettings) -> int:
        return settings.memory or self.total

    def available(self, settings: PlacementSettings) -> int | None:
        return self.left


class Host:
    """A played backend: its models, how long they take to load, and what goes wrong."""

    def __init__(self, name: str, *, address: str = "127.0.0.1:1", **sizes: float) -> None:
        settings = BackendSettings.model_validate({"name": name, "address": address})
        self.sizes = {model: int(size * GIB) for model, size in sizes.items()}
        self.endpoint = Endpoint(settings, aliases={}, clock=now, source=random.Random(0))
        self.loaded: set[str] = set()
        self.orders: list[str] = []
        self.pinned: list[str] = []
        self.seconds = 4.0
        self.fault: Failure | None = None
        self.unload_fault: Failure | None = None
        self.report = pb.Memory()

    def answer(self) -> pb.ListModelsResponse:
        models = [
            pb.Model(id=name, state=ACTIVE if name in self.loaded else AVAILABLE, memory_bytes=size)
            for name, size in self.sizes.items()
        ]
        return pb.ListModelsResponse(models=models, memory=self.report)

    async def load(self, request: models_pb.LoadModelRequest, send: Tell) -> None:
        self.orders.append(f"load {request.model}")
        if request.pinned:
            self.pinned.append(request.model)
        for quarter in range(4) if request.model not in self.loaded else ():
            progress = models_pb.LoadProgress(fraction=quarter / 4)
            await send(models_pb.LoadModelResponse(progress=progress))
            await asyncio.sleep(self.seconds / 4)
        if self.fault is not None:
            raise self.fault
        self.loaded.add(request.model)
        model = pb.Model(id=request.model, state=ACTIVE, memory_bytes=self.sizes[request.model])
        await send(models_pb.LoadModelResponse(loaded=models_pb.ModelLoaded(model=model)))

    async def unload(self, model: str, *, force: bool) -> models_pb.UnloadModelResponse:
        assert not force
        self.orders.append(f"unload {model}")
        await asyncio.sleep(1.0)
        if self.unload_fault is not None:
            raise self.unload_fault
        self.loaded.discard(model)
        return models_pb.UnloadModelResponse()


class Rig:
    """A placement over played backends."""

    def __init__(self, group: asyncio.TaskGroup, *hosts: Host, **settings: object) -> None:
        self.hosts = {host.endpoint.name: host for host in hosts}
        self.memory = Memory()
        self.group = group
        self.active = 0
        self.placement = Placement(
            PlacementSettings.model_validate(settings),
            backends=lambda: [host.endpoint for host in self.hosts.values()],
            management=self.hosts.__getitem__,
            spawn=self._spawn,
            clock=now,
            memory=self.memory,
            today=lambda: datetime(2026, 1, 1, tzinfo=UTC),
        )
        self.placement.show(off().metrics)
        for host in hosts:
            host.endpoint.found_serving()
            self.look(host)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        self.group.create_task(work, name=name)

    def look(self, host: Host) -> None:
        """Lists a backend's models, as its probe does."""
        answer = host.answer()
        host.endpoint.list_models(answer.models)
        self.placement.listed(host.endpoint, answer, now())

    async def call(self, host: Host, model: str, sink: Sink | None = None, *, takes: float = 1.0) -> None:
        """Makes a call that takes some seconds once its model is there."""

        async def inner(call: Call[Request], send: Send) -> None:
            assert model in host.loaded, "the model is there"
            await asyncio.sleep(takes)

        name = host.endpoint.name
        layer = Place(
            inner, held=lambda asked, tell: self.placement.held(self.hosts[name].endpoint, asked, tell)
        )
        await serve(layer, ask(model=model), sink=sink)

    def start(self, host: Host, model: str, *, takes: float = 1.0) -> asyncio.Task[None]:
        return self.group.create_task(self.call(host, model, takes=takes))


@asynccontextmanager
async def rig(*hosts: Host, **settings: object) -> AsyncIterator[Rig]:
    async with asyncio.TaskGroup() as group:
        yield Rig(group, *hosts, **settings)


def stages(sink: Sink) -> list[tuple[int, float | None]]:
    return [
        (e.progress.stage, e.progress.fraction if e.progress.HasField("fraction") else None)
        for e in sink.events
        if isinstance(e, pb.GenerateResponse)
    ]


@virtual
async def test_calls_for_a_cold_model_wait_for_one_load_and_hear_how_far_it_is() -> None:
    a = Host("a", m=4)
    async with rig(a) as mesh:
        sink = Sink()
        mesh.start(a, "m")
        mesh.start(a, "m")
        await mesh.call(a, "m", sink)
        assert now() == 5.0
    assert a.orders == ["load m"]
    loading = pb.Progress.STAGE_LOADING
    assert stages(sink) == [(loading, None), *((loading, quarter / 4) for quarter in range(4))]


@virtual
async def test_a_model_that_is_there_is_not_loaded_and_its_calls_do_not_wait() -> None:
    a = Host("a", m=4)
    a.loaded.add("m")
    async with rig(a) as mesh:
        await mesh.call(a, "m")
        assert (now(), a.orders) == (1.0, [])


@virtual
async def test_two_frameworks_never_load_together_what_does_not_fit_together() -> None:
    a, b = Host("a", m=6), Host("b", n=6)
    async with rig(a, b) as mesh:
        mesh.start(a, "m")
        mesh.start(b, "n")
        await asyncio.sleep(4.5)
        assert (a.orders, b.orders) == (["load m"], []), "the first is in use"
        await asyncio.sleep(1.0)
        assert a.orders == ["load m", "unload m"]
        assert b.orders == []
    assert b.orders == ["load n"]
    assert now() == 4.0 + 1.0 + 1.0 + 4.0 + 1.0


@virtual
async def test_what_does_not_fit_is_refused_at_once_with_figures() -> None:
    a = Host("a", m=11)
    async with rig(a) as mesh:
        with pytest.raises(MemoryExhausted) as caught:
            await mesh.call(a, "m")
    assert caught.value.code.name == "RESOURCE_EXHAUSTED"
    assert caught.value.metadata["needed_bytes"] == str(11 * GIB)
    assert caught.value.metadata["limit_bytes"] == str(10 * GIB)
    assert (now(), a.orders) == (0.0, [])


@virtual
async def test_a_call_waits_for_models_in_use_only_as_long_as_is_configured() -> None:
    a, b = Host("a", m=6), Host("b", n=6)
    async with rig(a, b, wait="5s") as mesh:
        mesh.start(a, "m", takes=100.0)
        await asyncio.sleep(4.0)
        since = now()
        with pytest.raises(MemoryExhausted):
            await mesh.call(b, "n")
        assert 5.0 <= now() - since <= 6.0
    assert b.orders == []


@virtual
async def test_a_wait_is_bounded_by_the_deadline_of_its_call_and_the_load_goes_on() -> None:
    a = Host("a", m=6)
    async with rig(a) as mesh:
        layer = Deadline(
            Place(_nothing, held=partial(mesh.placement.held, a.endpoint)),
            default=timedelta(seconds=2),
            longest=timedelta(hours=1),
            margin=timedelta(0),
        )
        with pytest.raises(DeadlineExceeded):
            await serve(layer, ask(model="m"))
        assert now() == 2.0
    assert a.loaded == {"m"}


async def _nothing(call: Call[Request], send: Send) -> None:
    pass


@virtual
async def test_a_long_load_gives_signs_of_life() -> None:
    a = Host("a", m=6)
    a.seconds = 100.0
    async with rig(a) as mesh:
        sink = Sink()
        await mesh.call(a, "m", sink)
    assert len(stages(sink)) >= 1 + 4 + 4 * 2
    assert HEARTBEAT < 100 / 4


@virtual
async def test_unary_calls_wait_without_a_word_and_counting_needs_no_model() -> None:
    a = Host("a", m=6)
    async with rig(a) as mesh:
        layer = Place(_nothing, held=partial(mesh.placement.held, a.endpoint))
        sink = Sink()
        await serve(layer, pb.CountTokensRequest(model="m"), sink=sink)
        assert a.orders == []
        await serve(layer, pb.EmbedRequest(model="m", texts=["x"]), sink=sink)
        assert a.orders == ["load m"]
        assert sink.events == []


@virtual
async def test_a_cold_load_never_moves_a_breaker_however_it_ends() -> None:
    a = Host("a", m=6)
    a.fault = ModelLoadFailed("no such file", metadata={"backend": "a"})
    async with rig(a) as mesh:
        a.endpoint.service = endpoint_stack(
            a.endpoint,
            channel=_nothing,
            clock=now,
            telemetry=off(),
            held=partial(mesh.placement.held, a.endpoint),
        )
        for _ in range(8):
            with pytest.raises(ModelLoadFailed):
                await serve(a.endpoint, ask(model="m"))
            await asyncio.sleep(70.0)
        assert a.endpoint.breakers.not_closed() == []
        assert a.endpoint.breakers.whole.success_rate == 1.0
        a.fault, a.seconds = None, 500.0  # longer than any watchdog below would stand
        await serve(a.endpoint, ask(model="m"))
        assert a.endpoint.view().success_rate == 1.0


@virtual
async def test_a_load_that_failed_is_not_tried_again_for_every_call() -> None:
    a = Host("a", m=6)
    a.fault = ModelLoadFailed("no such file")
    async with rig(a) as mesh:
        for _ in range(3):
            with pytest.raises(ModelLoadFailed):
                await mesh.call(a, "m")
        assert a.orders == ["load m"]
        with pytest.raises(ModelLoadFailed) as caught:
            await mesh.call(a, "m")
        assert caught.value.retry_after == timedelta(seconds=1)
        await asyncio.sleep(1.0)
        with pytest.raises(ModelLoadFailed):
            await mesh.call(a, "m")
        await asyncio.sleep(1.5)
        with pytest.raises(ModelLoadFailed):
            await mesh.call(a, "m")
        assert a.orders == ["load m"] * 2, "the second pause is longer"
        a.fault = None
        await mesh.placement.load(a.endpoint, models_pb.LoadModelRequest(model="m"), _ignore)
        assert a.loaded == {"m"}, "whoever names it does not wait"


async def _ignore(event: models_pb.LoadModelResponse) -> None:
    pass


@virtual
async def test_a_load_that_never_ends_is_given_up() -> None:
    a = Host("a", m=6)
    a.seconds = 1e6
    async with rig(a, load_timeout="60s") as mesh:
        with pytest.raises(ModelLoadFailed, match="within 60 s"):
            await mesh.call(a, "m")
        assert now() == 60.0
        (figures,) = mesh.placement.ledger.figures()
        assert figures.reserved == 0


@virtual
async def test_everybody_who_waits_hears_of_a_failure_as_their_own() -> None:
    a = Host("a", m=6)
    a.fault = BackendBusy("x", retry_after=timedelta(seconds=3), metadata={"k": "v"})
    heard: list[BackendBusy] = []

    async def one(mesh: Rig) -> None:
        with pytest.raises(BackendBusy) as caught:
            await mesh.call(a, "m")
        heard.append(caught.value)

    async with rig(a) as mesh, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(one(mesh))
    assert len({id(each) for each in heard}) == 3
    assert all(each.retry_after == timedelta(seconds=3) and each.metadata["k"] == "v" for each in heard)


@virtual
async def test_a_framework_that_loads_by_itself_is_counted_and_said_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    a, b = Host("a", m=6, m2=2), Host("b", n=6)
    a.fault, a.seconds = CapabilityUnsupported("x"), 0.0
    a.loaded = {"m", "m2"}  # which is what the calls themselves do
    listing = a.answer()
    a.loaded.clear()
    async with rig(a, b) as mesh:
        a.loaded = {"m", "m2"}
        with caplog.at_level(logging.INFO):
            await mesh.call(a, "m")
            await mesh.call(a, "m2")
        assert caplog.text.count("loads and unloads models by itself") == 1
        assert mesh.placement.memory("b") == mesh.placement.memory("a")
        shown = mesh.placement.memory("a")
        assert shown is not None
        assert shown.used_bytes == 8 * GIB
        with pytest.raises(MemoryExhausted, match="unload only by themselves"):
            await mesh.call(b, "n")
        mesh.placement.lost("a")
        mesh.placement.listed(a.endpoint, listing, now())
        with pytest.raises(MemoryExhausted, match="unload only by themselves"):
            await mesh.call(b, "n")
        with pytest.raises(CapabilityUnsupported):
            await mesh.placement.load(a.endpoint, models_pb.LoadModelRequest(model="m"), _ignore)


@virtual
async def test_a_model_that_cannot_be_unloaded_stays_and_another_is_refused() -> None:
    a, b = Host("a", m=6), Host("b", n=6)
    async with rig(a, b) as mesh:
        for fault in (BackendBusy("x"), CapabilityUnsupported("x")):
            a.unload_fault = fault
            await mesh.call(a, "m")
            with pytest.raises(MemoryExhausted):
                await mesh.call(b, "n")
            await asyncio.sleep(60.0)
        assert a.orders == ["load m", "unload m", "unload m"]
        assert b.orders == []


@virtual
async def test_pinned_models_are_loaded_at_the_start_and_again_when_their_backend_returns() -> None:
    a, b = Host("a", m=6, other=1), Host("b", m=6, n=5)
    models = [{"model": "m", "pinned": True}, {"model": "other", "backend": "a"}, {"model": "nobody"}]
    async with rig(a, b, models=models) as mesh:
        await asyncio.sleep(10.0)
        assert sorted(a.orders) == ["load m", "load other"]
        assert b.orders == [], "one that may be anywhere is loaded once"
        assert a.pinned == ["m"]
        with pytest.raises(MemoryExhausted):
            await mesh.call(b, "n")
        mesh.placement.lost("a")
        a.loaded.clear()
        mesh.look(a)
        await asyncio.sleep(10.0)
        assert sorted(a.orders) == ["load m", "load m", "load other", "load other"]
        mesh.look(a)
        await asyncio.sleep(10.0)
        assert len(a.orders) == 4, "a list is no return"


@virtual
async def test_a_preload_that_fails_is_logged_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    a = Host("a", m=60)
    async with rig(a, models=[{"model": "m"}]):
        await asyncio.sleep(1.0)
    assert "m is not loaded: model m needs 60.0 GiB" in caplog.text


@virtual
async def test_settings_that_change_pin_unpin_and_measure_anew() -> None:
    a = Host("a", m=6, n=3)
    pinned = {"models": [{"model": "m", "pinned": True}]}
    async with rig(a, **pinned) as mesh:
        await asyncio.sleep(5.0)

        def change(**settings: object) -> None:
            mesh.placement.change(PlacementSettings.model_validate(settings))

        def is_pinned() -> bool:
            entry = mesh.placement.ledger.find(("a", "m"))
            return entry is not None and entry.pinned

        assert is_pinned()
        change(**pinned)
        change(models=[{"model": "n"}], memory="16GiB")
        await asyncio.sleep(5.0)
        assert a.orders == ["load m", "load n"]
        assert not is_pinned()
        (figures,) = mesh.placement.ledger.figures()
        assert figures.limit == 16 * GIB
        change(enabled=False)
        assert mesh.placement.memory("a") is None
        mesh.look(a)
        assert mesh.placement.memory("a") is None
        await mesh.call(a, "m")
        await mesh.placement.load(a.endpoint, models_pb.LoadModelRequest(model="m"), _ignore)


@virtual
async def test_a_load_by_name_is_told_to_its_end_and_joins_one_in_progress() -> None:
    a = Host("a", m=6)
    async with rig(a) as mesh:
        events: list[models_pb.LoadModelResponse] = []

        async def send(event: models_pb.LoadModelResponse) -> None:
            events.append(event)

        mesh.start(a, "m")
        await asyncio.sleep(1.5)
        await mesh.placement.load(a.endpoint, models_pb.LoadModelRequest(model="m", pinned=True), send)
        assert a.orders == ["load m"]
        assert [event.WhichOneof("event") for event in events][-1] == "loaded"
        assert all(event.HasField("progress") for event in events[:-1])
        await mesh.placement.load(a.endpoint, models_pb.LoadModelRequest(model="m", pinned=True), send)
        assert a.orders == ["load m"] * 2, "the backend may change how long it stays"
        await asyncio.sleep(2.0)
        entry = mesh.placement.ledger.find(("a", "m"))
        assert entry is not None
        assert (entry.pinned, entry.users) == (True, 0)


@virtual
async def test_a_model_that_somebody_else_loaded_meanwhile_is_asked_of_its_backend() -> None:
    a, b = Host("a", m=6), Host("b", n=6)
    async with rig(a, b) as mesh:
        busy = mesh.start(b, "n", takes=20.0)
        await asyncio.sleep(5.0)
        events: list[models_pb.LoadModelResponse] = []

        async def send(event: models_pb.LoadModelResponse) -> None:
            events.append(event)

        load = mesh.group.create_task(
            mesh.placement.load(a.endpoint, models_pb.LoadModelRequest(model="m"), send)
        )
        await asyncio.sleep(1.0)
        a.loaded.add("m")
        mesh.look(a)
        await load
        assert not busy.done()
        assert events[0].progress.detail == "waiting for room"
        assert events[-1].HasField("loaded")


@virtual
async def test_a_backend_that_is_lost_fails_its_waiting_calls_so_that_they_go_elsewhere() -> None:
    a, b = Host("a", m=6), Host("b", n=6)
    async with rig(a, b) as mesh:
        mesh.start(a, "m", takes=50.0)
        await asyncio.sleep(5.0)

        async def lose() -> None:
            await asyncio.sleep(1.0)
            mesh.placement.lost("b")

        mesh.group.create_task(lose())
        with pytest.raises(BackendUnavailable) as caught:
            await mesh.call(b, "n")
        assert caught.value.elsewhere
        assert mesh.placement._ears == {}


@virtual
async def test_room_that_another_program_makes_is_found() -> None:
    a = Host("a", m=4)
    async with rig(a) as mesh:
        mesh.memory.left = 5 * GIB
        mesh.look(a)
        first = mesh.start(a, "m", takes=8.0)
        await asyncio.sleep(4.5)
        a.sizes["n"] = 4 * GIB
        mesh.memory.left = 1 * GIB
        mesh.look(a)
        second = mesh.start(a, "n")
        await asyncio.sleep(1.0)
        assert a.orders == ["load m"]
        mesh.memory.left = 6 * GIB
        await asyncio.sleep(1.0)
        assert a.orders == ["load m", "load n"]
        await asyncio.wait([first, second])


@virtual
async def test_what_is_listed_of_use_and_load_is_believed() -> None:
    a = Host("a", m=4)
    async with rig(a) as mesh:
        model = pb.Model(id="m", state=ACTIVE, memory_bytes=4 * GIB, pinned=True)
        model.use_time.FromDatetime(datetime(2025, 12, 31, 23, 59, tzinfo=UTC))
        model.load_duration.FromTimedelta(timedelta(seconds=7))
        await asyncio.sleep(100.0)
        mesh.placement.listed(a.endpoint, pb.ListModelsResponse(models=[model]), now())
        entry = mesh.placement.ledger.find(("a", "m"))
        assert entry is not None
        assert (entry.used, entry.seconds, entry.pinned) == (40.0, 7.0, True)
        assert repr(mesh.placement) == "<Placement <Ledger [a/m resident]>>"


class Gauges(Metrics):
    """Keeps what would be read, and what was counted."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, Callable[[], Iterable[tuple[float, Mapping[str, str]]]]] = {}
        self.counted: list[tuple[str, Mapping[str, str]]] = []

    def observe(self, metric: Metric, samples: Samples) -> None:
        self.read[metric.name] = samples

    def add(self, metric: Metric, labels: Mapping[str, str], value: int = 1) -> None:
        self.counted.append((metric.name, labels))


@virtual
async def test_the_account_can_be_seen_and_evictions_are_counted() -> None:
    a, b = Host("a", m=6), Host("b", n=6)
    async with rig(a, b) as mesh:
        gauges = Gauges()
        mesh.placement.show(gauges)

        def value(name: str, state: str = "") -> float:
            return sum(
                value
                for value, labels in gauges.read[f"forebay.host.{name}"]()
                if labels["forebay.host"] == LOCAL and labels.get("forebay.state", "") == state
            )

        mesh.start(a, "m")
        mesh.start(b, "n")
        await asyncio.sleep(1.0)
        assert value("memory.limit") == 10 * GIB
        assert (value("memory.used"), value("memory.reserved")) == (0, 6 * GIB)
        assert (value("loads", "active"), value("loads", "waiting")) == (1, 1)
        await asyncio.sleep(4.5)
        assert (value("memory.used"), value("memory.reserved")) == (6 * GIB, 0)
        assert gauges.counted == []
        await asyncio.sleep(6.0)
        assert gauges.counted == [("forebay.evictions", {"forebay.backend": "a"})]


# Hosts.


def test_a_backend_on_this_machine_is_known_by_its_address_or_its_name() -> None:
    names = frozenset({"boot-1"})
    assert host_of("127.0.0.1:1", "", names) == LOCAL
    assert host_of("unix:/x", "boot-9", names) == LOCAL
    assert host_of("10.0.0.7:1", "boot-1", names) == LOCAL
    assert host_of("10.0.0.7:1", "boot-2", names) == "boot-2"
    assert host_of("10.0.0.7:1", "", names) == "10.0.0.7"


@virtual
async def test_another_machine_has_an_account_of_its_own_as_its_services_tell() -> None:
    here, there = Host("here", m=6), Host("there", address="10.0.0.7:1", m=6)
    there.report.CopyFrom(pb.Memory(host="big", total_bytes=100 * GIB, available_bytes=20 * GIB))
    async with rig(here, there) as mesh:
        await mesh.call(here, "m")
        await mesh.call(there, "m")
        shown = mesh.placement.memory("there")
        assert shown is not None
        assert (shown.host, shown.total_bytes, shown.limit_bytes) == ("big", 100 * GIB, 75 * GIB)
        assert (shown.used_bytes, shown.available_bytes) == (6 * GIB, 20 * GIB)


@pytest.mark.parametrize("has_card", [True, False])
def test_a_graphics_card_with_memory_of_its_own_makes_the_machines_say_nothing(
    has_card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "card"
    if has_card:
        card.touch()
    monkeypatch.setattr(host_module, "_CARDS", (card,))
    memory, plain = LocalMemory(), PlacementSettings()
    assert memory.limit(plain) == (0 if has_card else int(memory.total * 0.75))
    assert (memory.available(plain) is None) is has_card
    configured = PlacementSettings(memory=GIB)
    assert memory.limit(configured) == GIB
    assert memory.available(configured) is None


# Routing.


def routed(*rooms: tuple[str, pb.Model, Room]) -> Callable[[], object]:
    views = []
    for name, model, room in rooms:
        made = Host(name).endpoint
        made.found_serving()
        made.list_models([model])
        made.room = lambda asked, room=room: room  # type: ignore[misc]  # bound now
        views.append(made.view())
    router = Router(weights=ScorerWeights(), picker="best", source=random.Random(0))
    decision = router.decide(ask(model="m"), views)

    def chosen() -> object:
        if decision.chosen is None:
            raise decision.failure()
        return decision.chosen.name

    return chosen


def cold(size: float = 4) -> pb.Model:
    return pb.Model(id="m", state=AVAILABLE, memory_bytes=int(size * GIB))


@virtual
async def test_a_cold_model_goes_where_there_is_room_and_not_where_there_never_is() -> None:
    full = Room(free=0, limit=10 * GIB, host="h")
    idle = Room(free=0, evictable=8 * GIB, limit=10 * GIB, host="h")
    busy = Room(free=0, passing=8 * GIB, limit=10 * GIB, host="h")
    free = Room(free=5 * GIB, limit=10 * GIB, host="h")
    assert routed(("full", cold(), full), ("idle", cold(), idle), ("free", cold(), free))() == "free"
    assert routed(("full", cold(), full), ("busy", cold(), busy), ("idle", cold(), idle))() == "idle"
    assert routed(("full", cold(), full), ("busy", cold(), busy))() == "busy"
    warm = pb.Model(id="m", state=ACTIVE, memory_bytes=4 * GIB)
    assert routed(("free", cold(), free), ("warm", warm, full))() == "warm"
    with pytest.raises(MemoryExhausted, match=r"needs 4\.0 GiB of memory, and 0\.0 GiB of the 10\.0 GiB"):
        routed(("full", cold(), full))()


@virtual
async def test_a_model_that_is_being_loaded_has_its_room_whatever_is_listed() -> None:
    a = Host("a", m=9)
    async with rig(a) as mesh:
        mesh.start(a, "m")
        await asyncio.sleep(1.0)
        assert mesh.placement.room("a", "m").most == float("inf")
        assert mesh.placement.room("a", "n").free == GIB
        assert mesh.placement.room("nobody", "n").most == float("inf")


def test_a_size_that_nobody_measured_is_guessed_from_the_files() -> None:
    assert estimate(pb.Model(disk_bytes=10)) == 12
    assert estimate(pb.Model(disk_bytes=10, memory_bytes=7)) == 7


def test_a_model_is_placed_only_on_a_backend_that_exists() -> None:
    with pytest.raises(ValueError, match="there is no backend nope"):
        OrchestratorSettings.model_validate({"placement": {"models": [{"model": "m", "backend": "nope"}]}})
