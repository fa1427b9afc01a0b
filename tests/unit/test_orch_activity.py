"""What the record of requests tells, in virtual time, over the whole stack and scripted backends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import genai
from forebay.kit.failure import Failure
from forebay.kit.pipeline import Call, Request, Service, Urgency
from forebay.kit.rpc import Edge, InFlight
from forebay.kit.telemetry import Telemetry, off
from forebay.orchestrator import activity as activities
from forebay.orchestrator.activity import Activity
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import BackendSettings, OrchestratorSettings
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.layers.hedge import FirstDeltas
from forebay.orchestrator.replies import MemoryStore
from forebay.orchestrator.routing.router import Router
from forebay.orchestrator.routing.view import EndpointView
from forebay.orchestrator.servicer import FleetServicer
from forebay.orchestrator.stack import endpoint_stack, request_stack
from forebay.testing.calls import Sink, ask, with_options
from forebay.testing.clock import now, virtual
from forebay.testing.script import Fault, Script, ScriptedModel
from forebay.testing.scripted import ScriptedCrashError, ScriptedEngine

A = fleet_pb2.RequestActivity
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)

SLOW = Script(token_count=20, first_delay=5.0, token_delay=0.5, load_delay=2.0, progress_delay=1.0)


class Rig:
    """The request stack over scripted backends `a`, `b` and so on, and a reader of its record."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        *backends: ScriptedEngine,
        permits: int = 2,
        queue: int = 2,
        remembered: int = activities.REMEMBERED,
        telemetry: Telemetry | None = None,
        times: FirstDeltas | None = None,
        **settings: object,
    ) -> None:
        self._group = group
        self.settings = OrchestratorSettings.model_validate({"max_deadline": "10h", **settings})
        self.backends = {backend.name: backend for backend in backends}
        source = random.Random(0)
        self.endpoints = {name: self._endpoint(each, source) for name, each in self.backends.items()}
        self.admission = Admission(queue=queue, ageing=15.0, capacity=lambda _: permits, clock=now)
        self.activity = Activity(
            self.admission,
            clock=now,
            now=lambda: NOON + timedelta(seconds=now()),
            remembered=remembered,
        )
        self.stack = request_stack(
            self.settings,
            fleet=self,
            router=Router(weights=self.settings.scorers, picker="best", source=source),
            budget=RetryBudget(ratio=0.2, per_second=10.0, clock=now),
            source=source,
            admission=self.admission,
            store=MemoryStore(max_bytes=2**20, ttl=3600.0, clock=now),
            spawn=lambda work, name: group.create_task(work, name=name),
            times=times,
            telemetry=telemetry,
            activity=self.activity,
        )
        self.reader = self.activity.watch()

    def _endpoint(self, backend: ScriptedEngine, source: random.Random) -> Endpoint:
        settings = BackendSettings(
            name=backend.name,
            address="127.0.0.1:1",
            between_events_timeout=timedelta(minutes=5),
        )
        endpoint = Endpoint(settings, aliases={}, clock=now, source=source)
        endpoint.service = endpoint_stack(endpoint, channel=backend.service, clock=now, telemetry=off())
        endpoint.found_serving()
        return endpoint

    async def up(self) -> Rig:
        """Has the models listed."""
        for name, backend in self.backends.items():
            listed = await backend.list_models(pb.ListModelsRequest())
            self.endpoints[name].list_models(listed.models)
        return self

    def snapshot(self) -> list[EndpointView]:
        return [endpoint.view() for endpoint in self.endpoints.values()]

    def service(self, name: str) -> Service:
        return self.endpoints[name]

    def start(self, request: Request, **fields: object) -> asyncio.Task[str]:
        """Asks, and returns the task; its result is the reason of the failure."""
        return self._group.create_task(self.ask(request, **fields))

    async def ask(self, request: Request, **fields: object) -> str:
        try:
            await self.stack(Call(request=request).with_(**fields), Sink())
        except Failure as failure:
            return failure.reason
        return ""

    def look(self) -> fleet_pb2.WatchActivityResponse:
        return self.reader.look()

    def one(self) -> A:
        (active,) = self.look().active_requests
        return active

    def last(self) -> A:
        return self.activity.watch().look().ended_requests[-1]


async def up(group: asyncio.TaskGroup, *backends: ScriptedEngine, **settings: Any) -> Rig:
    return await Rig(group, *backends, **settings).up()


def rig(test: Callable[[asyncio.TaskGroup], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    async def body() -> None:
        async with asyncio.TaskGroup() as group:
            await test(group)

    body.__name__ = test.__name__
    return virtual(body)


def engine(name: str = "a", script: Script | None = None, **fields: Any) -> ScriptedEngine:
    model = ScriptedModel(name="m", script=script or Script(), weights="w", loaded=script is not SLOW)
    return ScriptedEngine(name=name, models=[model], **fields)


def greedy(**options: str | float) -> pb.GenerateRequest:
    request = with_options(ask(model="m"), **options)
    request.sampling.temperature = 0.0
    request.routing.cache = pb.CACHE_POLICY_USE
    return request


@rig
async def test_a_request_is_followed_from_its_load_to_its_last_token(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(script=SLOW))
    task = mesh.start(ask(model="m"), request_id="r1")
    phases = []
    for _ in range(20):
        await asyncio.sleep(1.0)
        phases += [A.Phase.Name(request.phase) for request in mesh.look().active_requests]
    assert list(dict.fromkeys(phases)) == ["PHASE_LOADING", "PHASE_PREFILL", "PHASE_DECODE"]
    assert await task == ""
    message = mesh.activity.watch().look()
    (ended,) = message.ended_requests
    assert not message.active_requests
    assert (ended.request_id, ended.operation, ended.model, ended.served_model) == (
        "r1",
        "generate",
        "m",
        "m",
    )
    assert (ended.backend, ended.attempt_count, ended.request_class) == ("a", 1, "chat")
    assert ended.phase == A.PHASE_SUCCEEDED
    assert ended.create_time.ToDatetime(UTC) == NOON
    assert ended.first_delta_duration.ToTimedelta() == timedelta(seconds=7)
    assert ended.elapsed_duration.ToTimedelta() == timedelta(seconds=16.5)
    assert ended.output_token_count == 20
    assert ended.input_token_count > 0
    assert ended.output_tokens_per_second == pytest.approx(2.0)
    assert not ended.cached
    assert not ended.error_reason
    (candidate,) = ended.candidates
    assert (candidate.backend, candidate.refused_by) == ("a", "")
    assert candidate.scores["load"] == pytest.approx(1.0)
    assert message.totals.request_count == 1
    assert message.totals.output_token_count == 20


@rig
async def test_a_reply_in_progress_has_its_rate_and_counts_in_the_totals(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(script=SLOW))
    mesh.start(ask(model="m"))
    await asyncio.sleep(10.2)
    message = mesh.look()
    (request,) = message.active_requests
    assert request.output_token_count == 7
    assert request.output_tokens_per_second == pytest.approx(2.0)
    assert request.elapsed_duration.ToTimedelta() == timedelta(seconds=10.2)
    assert message.totals.output_token_count == 7
    assert message.queue.admitted_count == 1
    assert message.queue.permit_count == 2
    assert message.observe_time.ToDatetime(UTC) == NOON + timedelta(seconds=10.2)


@rig
async def test_who_waits_is_shown_with_the_queue(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(script=SLOW), permits=1, queue=3)
    assert mesh.look().queue.expected_wait_duration.ToTimedelta() == timedelta(0)
    mesh.start(ask(model="m"))
    await asyncio.sleep(1.0)
    for priority in (pb.PRIORITY_BATCH, pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_INTERACTIVE):
        waiting = ask(model="m")
        waiting.routing.priority = priority
        mesh.start(waiting)
    await asyncio.sleep(1.0)
    message = mesh.look()
    assert [each.phase for each in message.active_requests] == [A.PHASE_LOADING, *[A.PHASE_QUEUED] * 3]
    assert [each.backend for each in message.active_requests] == ["a", "", "", ""]
    queue = message.queue
    assert queue.waiting_interactive_count == queue.waiting_normal_count == queue.waiting_batch_count == 1
    assert queue.oldest_wait_duration.ToTimedelta() == timedelta(seconds=1)
    assert not queue.HasField("expected_wait_duration")  # nobody knows yet how long a call takes
    impatient = ask(model="m")
    impatient.routing.priority = pb.PRIORITY_BATCH
    assert await mesh.ask(impatient) == "QUEUE_FULL"
    message = mesh.look()
    refused = message.ended_requests[-1]
    assert (refused.phase, refused.error_reason) == (A.PHASE_FAILED, "QUEUE_FULL")
    assert refused.attempt_count == 0
    assert not refused.candidates
    assert message.totals.refused_request_count == message.totals.failed_request_count == 1
    await asyncio.sleep(16.0)
    later = mesh.look()
    assert [each.phase for each in later.active_requests][:2] == [A.PHASE_QUEUED, A.PHASE_QUEUED]
    assert later.queue.expected_wait_duration.ToTimedelta() > timedelta(0)


@rig
async def test_an_embedding_that_waits_is_queued_too(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(script=SLOW), permits=1)
    mesh.start(ask(model="m"))
    await asyncio.sleep(1.0)
    mesh.start(pb.EmbedRequest(model="m", texts=["x"]))
    await asyncio.sleep(1.0)
    request = mesh.look().active_requests[-1]
    assert (request.operation, request.phase) == ("embed", A.PHASE_QUEUED)
    await asyncio.sleep(60.0)
    ended = mesh.last()
    assert (ended.operation, ended.phase, ended.backend) == ("embed", A.PHASE_SUCCEEDED, "a")
    assert not ended.HasField("first_delta_duration")


@rig
async def test_a_fallback_shows_both_attempts_and_the_last_decision(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine("a", Script(fault=Fault.parse("UNAVAILABLE@before"))), engine("b", SLOW))
    request = ask(model="m")
    request.routing.backends.extend(["a", "b"])
    task = mesh.start(request)
    await asyncio.sleep(1.0)
    shown = mesh.one()
    assert (shown.backend, shown.attempt_count, shown.phase) == ("b", 2, A.PHASE_LOADING)
    assert [(each.backend, each.refused_by) for each in shown.candidates] == [("b", ""), ("a", "tried")]
    assert shown.candidates[1].refusal_detail
    assert await task == ""
    assert mesh.activity.totals().retry_count == 1
    assert mesh.activity.totals().failed_request_count == 0
    assert mesh.last().backend == "b"


@rig
async def test_a_failure_has_its_reason_and_who_could_not(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine("a"))
    mesh.endpoints["a"].lose("gone")
    assert await mesh.ask(ask(model="m")) == "NO_BACKEND"
    ended = mesh.last()
    assert (ended.phase, ended.error_reason, ended.attempt_count) == (A.PHASE_FAILED, "NO_BACKEND", 0)
    assert (ended.backend, ended.served_model) == ("", "")
    assert [(each.backend, each.refused_by) for each in ended.candidates] == [("a", "reachable")]


@rig
async def test_who_leaves_has_cancelled_and_nothing_has_failed(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(script=SLOW))
    task = mesh.start(ask(model="m"))
    await asyncio.sleep(8.2)
    task.cancel()
    await asyncio.sleep(1.0)
    message = mesh.look()
    (ended,) = message.ended_requests
    assert (ended.phase, ended.error_reason, ended.output_token_count) == (A.PHASE_CANCELLED, "", 3)
    assert message.totals.failed_request_count == 0
    assert message.totals.output_token_count == 3


@rig
async def test_a_deadline_is_no_cancellation(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(script=SLOW))
    assert await mesh.ask(ask(model="m"), deadline=now() + 3.0) == "DEADLINE_EXCEEDED"
    assert (mesh.last().phase, mesh.last().error_reason) == (A.PHASE_FAILED, "DEADLINE_EXCEEDED")
    # The edge cancels a call whose deadline has passed before the stack has said so.
    late = mesh.start(ask(model="m"), deadline=now() + 0.5)
    asyncio.get_running_loop().call_at(now() + 0.5, late.cancel)
    await asyncio.sleep(1.0)
    assert mesh.last().phase == A.PHASE_FAILED


@rig
async def test_a_fault_of_ours_is_internal(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(script=Script(fault=Fault.parse("CRASH@before"))))
    with pytest.raises(ScriptedCrashError):
        await mesh.ask(ask(model="m"))
    assert (mesh.last().phase, mesh.last().error_reason) == (A.PHASE_FAILED, "INTERNAL")


@rig
async def test_an_answer_from_the_cache_is_marked(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine())
    assert await mesh.ask(greedy()) == ""
    assert not mesh.last().cached
    assert await mesh.ask(greedy()) == ""
    ended = mesh.last()
    assert (ended.cached, ended.attempt_count, ended.backend) == (True, 0, "a")
    assert not ended.candidates
    totals = mesh.activity.totals()
    assert (totals.cache_hit_count, totals.request_count) == (1, 2)


@rig
async def test_a_shared_reply_is_marked_for_whoever_joined(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(script=SLOW))
    first, second = mesh.start(greedy()), mesh.start(greedy())
    await asyncio.sleep(8.0)
    shown = mesh.look().active_requests
    assert [(each.cached, each.phase, each.backend) for each in shown] == [
        (False, A.PHASE_DECODE, "a"),
        (True, A.PHASE_DECODE, "a"),
    ]
    first.cancel()
    assert await second == ""
    assert mesh.activity.totals().coalesced_request_count == 1
    assert {each.phase for each in mesh.activity.watch().look().ended_requests} == {
        A.PHASE_CANCELLED,
        A.PHASE_SUCCEEDED,
    }


@rig
async def test_what_a_shared_reply_does_after_its_first_caller_left_changes_nothing_told(
    group: asyncio.TaskGroup,
) -> None:
    mesh = await up(group, engine("a", Script(fault=Fault.parse("STALL@before"))), engine("b"))
    request = greedy()
    request.routing.backends.extend(["a", "b"])
    first, second = mesh.start(request), mesh.start(request)
    await asyncio.sleep(1.0)
    first.cancel()
    await asyncio.sleep(0.1)
    told = mesh.last()
    assert await second == ""
    left, stayed = mesh.activity.watch().look().ended_requests
    assert left == told
    assert (left.backend, left.attempt_count, left.phase) == ("a", 1, A.PHASE_CANCELLED)
    assert stayed.backend == "b"
    assert mesh.activity.totals().retry_count == 1


@rig
async def test_a_continued_reply_says_who_goes_on(group: asyncio.TaskGroup) -> None:
    broken = Script(token_count=10, token_delay=1.0, fault=Fault.parse("STREAM_INTERRUPTED@4"))
    mesh = await up(
        group, engine("a", broken), engine("b", Script(token_count=10, first_delay=5.0, token_delay=1.0))
    )
    request = ask(model="m")
    request.routing.backends.extend(["a", "b"])
    request.routing.continuation = pb.CONTINUATION_POLICY_ANY_MODEL
    task = mesh.start(request)
    await asyncio.sleep(2.5)
    assert (mesh.one().backend, mesh.one().phase) == ("a", A.PHASE_DECODE)
    await asyncio.sleep(4.0)
    assert mesh.one().phase == A.PHASE_PREFILL
    assert await task == ""
    message = mesh.look()
    (ended,) = message.ended_requests
    assert (ended.backend, ended.continuation_count, ended.attempt_count) == ("b", 1, 2)
    assert ended.output_token_count == 10
    assert message.totals.continuation_count == 1


@rig
async def test_a_race_is_counted_and_the_winner_is_shown(group: asyncio.TaskGroup) -> None:
    times = FirstDeltas()
    times.note(1.0)
    mesh = await up(
        group,
        engine("a", Script(first_delay=60.0)),
        engine("b", Script(token_delay=1.0)),
        times=times,
        hedge={"enabled": True, "min_samples": 1},
    )
    request = ask(model="m")
    request.routing.backends.extend(["a", "b"])
    assert await mesh.ask(request) == ""
    assert (mesh.last().backend, mesh.last().attempt_count) == ("b", 2)
    assert mesh.activity.totals().hedge_count == 1


@rig
async def test_a_backend_that_counts_no_tokens_has_its_deltas_counted(group: asyncio.TaskGroup) -> None:
    record = Activity(Admission(queue=0, ageing=1.0, capacity=lambda _: 1, clock=now), clock=now)
    call: Call[Request] = Call(request=ask(model="m"))

    async def nowhere(event: object) -> None:
        pass

    with (
        genai.requested(off(), call, nowhere, framework=lambda name: "x", clock=now) as watched,
        record.follow(call, watched),
    ):
        for _ in range(5):
            await watched(pb.GenerateResponse(delta=pb.Delta(text="word")))
            await asyncio.sleep(0.5)
        (shown,) = record.watch().look().active_requests
    assert (shown.output_token_count, shown.output_tokens_per_second) == (5, 2.0)


@rig
async def test_counting_tokens_is_not_recorded(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine())
    assert await mesh.ask(pb.CountTokensRequest(model="m", messages=ask().messages)) == ""
    assert mesh.activity.totals().request_count == 0
    assert repr(mesh.activity) == "<Activity 0 active, 0 ended>"


@rig
async def test_no_text_and_no_caller_is_in_the_record(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine())
    request = ask("the secret question", model="m")
    assert await mesh.ask(request, caller="token:identity") == ""
    answer = mesh.backends["a"].expected(request)
    told = str(mesh.activity.watch().look())
    for word in ("secret", "identity", *answer.split()):
        assert f'"{word}' not in told
        assert word not in told or len(word) < 4
    assert "chat" in told


@rig
async def test_names_that_callers_choose_are_short_and_printable(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine())
    assert await mesh.ask(ask(model="n" * 5000 + "\x1b"), request_id="\n" + "r" * 5000) == "MODEL_NOT_FOUND"
    ended = mesh.last()
    assert len(ended.model) <= 200
    assert len(ended.request_id) <= 200
    assert ended.request_id.isprintable()
    assert all(len(each.refusal_detail) <= 200 for each in ended.candidates)


@pytest.mark.parametrize("sampler", [ALWAYS_ON, ALWAYS_OFF])
def test_the_trace_is_named_where_it_is_sampled(sampler: Sampler) -> None:
    @rig
    async def body(group: asyncio.TaskGroup) -> None:
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        mesh = await up(group, engine(), telemetry=Telemetry(provider.get_tracer("test"), provider))
        assert await mesh.ask(ask(model="m")) == ""
        trace_id = mesh.last().trace_id
        assert bool(trace_id) is (sampler is ALWAYS_ON)
        if trace_id:
            assert len(trace_id) == 32
            assert int(trace_id, 16)

    body()


# What watchers get.


@rig
async def test_the_first_message_is_whole_and_the_next_have_what_is_new(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine())
    for number in range(3):
        assert await mesh.ask(ask(model="m"), request_id=str(number)) == ""
    assert [each.request_id for each in mesh.look().ended_requests] == ["0", "1", "2"]
    assert not mesh.look().ended_requests
    assert await mesh.ask(ask(model="m"), request_id="3") == ""
    assert [each.request_id for each in mesh.look().ended_requests] == ["3"]
    assert [each.request_id for each in mesh.activity.watch().look().ended_requests] == ["0", "1", "2", "3"]


@rig
async def test_who_looks_seldom_is_told_how_many_they_missed(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, engine(), remembered=3)
    assert mesh.look().skipped_request_count == 0
    for number in range(5):
        assert await mesh.ask(ask(model="m"), request_id=str(number)) == ""
    message = mesh.look()
    assert [each.request_id for each in message.ended_requests] == ["2", "3", "4"]
    assert message.skipped_request_count == 2
    assert mesh.activity.watch().look().skipped_request_count == 0
    assert len(mesh.activity.ended) == 3


@rig
async def test_a_message_has_a_bound_whatever_goes_on(group: asyncio.TaskGroup) -> None:
    mesh = await up(group, *(engine(f"backend-{number}") for number in range(12)), permits=1000)
    for _ in range(270):
        assert await mesh.ask(ask(model="n" * 128)) == "MODEL_NOT_FOUND"
    tasks = [mesh.start(with_options(ask(model="m"), first_delay="1m")) for _ in range(530)]
    await asyncio.sleep(1.0)
    message = mesh.look()
    assert len(message.active_requests) == activities.MOST_ACTIVE
    assert len(message.ended_requests) == activities.REMEMBERED
    assert message.ByteSize() < 2**22
    assert message.active_requests[0].candidates
    for task in tasks:
        task.cancel()


class Reader:
    """A context whose caller takes so many messages, each in so many seconds, and hangs up."""

    def __init__(self, *, takes: int, seconds: float = 0.0) -> None:
        self.messages: list[fleet_pb2.WatchActivityResponse] = []
        self.times: list[float] = []
        self._takes = takes
        self._seconds = seconds

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, message: fleet_pb2.WatchActivityResponse) -> None:
        if len(self.messages) == self._takes:
            raise grpc.aio.UsageError("the call is over")
        self.messages.append(message)
        self.times.append(now())
        await asyncio.sleep(self._seconds)


def servicer(mesh: Rig, inflight: InFlight) -> FleetServicer:
    nothing: Any = None  # no other method is asked here
    return FleetServicer(
        fleet=nothing, router=nothing, default_model="", edge=Edge(inflight), activity=mesh.activity
    )


@pytest.mark.parametrize(("asked", "interval"), [(None, 1.0), (0.05, 0.05), (60.0, 60.0)])
def test_a_watch_has_a_message_in_each_interval(asked: float | None, interval: float) -> None:
    @rig
    async def body(group: asyncio.TaskGroup) -> None:
        mesh, inflight = await up(group, engine()), InFlight()
        request = fleet_pb2.WatchActivityRequest()
        if asked is not None:
            request.interval.FromNanoseconds(int(asked * 1e9))
        caller: Any = Reader(takes=3)
        watch = group.create_task(servicer(mesh, inflight).WatchActivity(request, caller))
        await asyncio.sleep(interval * 1.5)
        assert inflight.count == 0, "a drain would wait for it"
        await watch
        assert caller.times == pytest.approx([0.0, interval, 2 * interval])

    body()


@rig
async def test_a_slow_watcher_is_sent_what_is_then_and_nothing_is_kept_for_them(
    group: asyncio.TaskGroup,
) -> None:
    mesh = await up(group, engine(), remembered=4)
    caller: Any = Reader(takes=3, seconds=30.0)
    watch = group.create_task(
        servicer(mesh, InFlight()).WatchActivity(fleet_pb2.WatchActivityRequest(), caller)
    )
    for number in range(20):
        await asyncio.sleep(3.0)
        assert await mesh.ask(ask(model="m"), request_id=str(number)) == ""
    await watch
    told = sum(len(each.ended_requests) + each.skipped_request_count for each in caller.messages)
    assert told == 20
    assert caller.messages[1].skipped_request_count == 6
    assert [each.request_id for each in caller.messages[1].ended_requests] == ["6", "7", "8", "9"]


# The forecast for a newcomer.


@virtual
async def test_the_wait_of_a_newcomer_is_that_of_the_forecast() -> None:
    queue = Admission(queue=9, ageing=15.0, capacity=lambda _: 1, clock=now)
    assert (queue.prospect(), queue.oldest_wait, queue.permits) == (0.0, None, 1)
    running = queue.arrive(urgency=Urgency.NORMAL, caller="a", pool="m", cost=10)
    assert queue.prospect() is None
    await asyncio.sleep(10.0)
    queue.leave(running, tokens=10)  # a second a token
    queue.arrive(urgency=Urgency.NORMAL, caller="a", pool="m", cost=10)
    assert queue.prospect() == pytest.approx(10.0)
    queue.arrive(urgency=Urgency.BATCH, caller="b", pool="m", cost=50)
    await asyncio.sleep(4.0)
    assert queue.prospect() == pytest.approx(6.0)
    assert queue.oldest_wait == pytest.approx(4.0)
    assert queue.waiting == 1
