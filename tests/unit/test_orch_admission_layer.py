"""How calls wait in the orchestrator's queue, in virtual time: progress, permits, and every way out."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendError, Failure, ModelNotFound, QueueFull, QueueTimeout
from forebay.kit.pipeline import Call, Request, Send
from forebay.orchestrator.admission import Admission
from forebay.orchestrator.config import BackendSettings
from forebay.orchestrator.fleet.capacity import Capacity
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.layers.admit import Admit, Admitted
from forebay.testing.calls import Sink, ask, serve
from forebay.testing.clock import now, virtual


class Works:
    """Takes ten seconds a call, at 10 tokens, and counts the calls at once."""

    def __init__(self) -> None:
        self.active = 0
        self.most = 0
        self.order: list[str] = []

    async def __call__(self, call: Call[Request], send: Send) -> None:
        self.active += 1
        self.most = max(self.most, self.active)
        self.order.append(call.request_id)
        try:
            await asyncio.sleep(10.0)
            if call.request_id == "bad":
                raise BackendError("x")
            if isinstance(call.request, pb.EmbedRequest):
                await send(pb.EmbedResponse(usage=pb.Usage(prompt_token_count=80)))
                return
            await send(pb.GenerateResponse(started=pb.Started()))
            await send(
                pb.GenerateResponse(
                    finished=pb.Finished(usage=pb.Usage(output_token_count=10, prompt_token_count=8))
                )
            )
        finally:
            self.active -= 1


class Rig:
    def __init__(self, *, slots: int = 1, queue: int = 10) -> None:
        self.slots = slots
        self.inner = Works()
        self.told: list[Admitted] = []
        self.admission = Admission(queue=queue, ageing=1000.0, capacity=lambda _: self.slots, clock=now)
        self.layer = Admit(self.inner, admission=self.admission, on_admitted=self.told.append)

    def idle(self) -> bool:
        return (self.admission.running, self.admission.waiting, self.inner.active) == (0, 0, 0)


def urgent(priority: pb.Priority.ValueType) -> pb.GenerateRequest:
    request = ask(token_count=10)
    request.routing.priority = priority
    return request


def queue_news(sink: Sink) -> list[tuple[int, float | None]]:
    return [
        (
            event.progress.queue_position,
            event.progress.remaining_duration.ToTimedelta().total_seconds()
            if event.progress.HasField("remaining_duration")
            else None,
        )
        for event in sink.events
        if isinstance(event, pb.GenerateResponse) and event.HasField("progress")
    ]


@virtual
async def test_who_waits_is_told_place_and_wait_and_every_change() -> None:
    rig = Rig()
    await serve(rig.layer, ask(token_count=10))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(serve(rig.layer, ask(token_count=10))) for _ in range(3)]
    first, second, third = (queue_news(task.result()) for task in tasks)
    assert first == []
    assert [place for place, _ in second] == [0]
    assert [place for place, _ in third] == [1, 0]
    assert second[0][1] is not None
    assert 5.0 < second[0][1] < 20.0
    assert now() == 40.0
    assert rig.idle()
    assert [each.waited for each in rig.told] == [0.0, 0.0, 10.0, 20.0]
    assert repr(rig.layer) == "<Admit <Admission 0 running, queue 0/10>>"


@virtual
async def test_who_can_never_be_served_is_told_so_without_waiting_for_a_turn() -> None:
    rig = Rig()
    asked: list[str] = []

    def foresee(call: Call[Request]) -> Failure | None:
        asked.append(call.request.model)
        return ModelNotFound("x") if call.request.model == "nosuch" else None

    layer = Admit(rig.inner, admission=rig.admission, foresee=foresee)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(layer, ask(model="first")))
        await asyncio.sleep(1.0)
        group.create_task(serve(layer, ask(model="second")))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotFound):
            await serve(layer, ask(model="nosuch"))
        assert now() == 1.0
        assert rig.admission.waiting == 1
    assert asked == ["second", "nosuch"], "who runs at once need not be asked about"
    assert now() == 20.0
    assert rig.idle()


@virtual
async def test_the_urgent_overtake_and_no_more_run_than_may() -> None:
    rig = Rig(slots=2)
    async with asyncio.TaskGroup() as group:
        for number, priority in enumerate(
            [pb.PRIORITY_BATCH] * 4 + [pb.PRIORITY_UNSPECIFIED] * 2 + [pb.PRIORITY_INTERACTIVE] * 2
        ):
            group.create_task(serve(rig.layer, urgent(priority), request_id=str(number)))
    assert rig.inner.most == 2
    assert rig.inner.order == ["0", "1", "6", "7", "4", "5", "2", "3"]


@virtual
async def test_a_full_queue_refuses_in_no_time() -> None:
    rig = Rig(queue=0)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(rig.layer, ask()))
        await asyncio.sleep(1)
        with pytest.raises(QueueFull) as caught:
            await serve(rig.layer, ask())
        assert now() == 1.0
    assert caught.value.retry_after is not None
    assert rig.told[-1].failure is caught.value


@virtual
async def test_a_call_that_is_pushed_out_of_the_queue_is_told_so() -> None:
    rig = Rig(queue=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(rig.layer, ask()))
        await asyncio.sleep(1)
        batch = asyncio.ensure_future(serve(rig.layer, urgent(pb.PRIORITY_BATCH)))
        await asyncio.sleep(1)
        group.create_task(serve(rig.layer, urgent(pb.PRIORITY_INTERACTIVE)))
        with pytest.raises(QueueFull):
            await batch
        assert now() == 2.0
    assert len(rig.inner.order) == 2
    assert rig.idle()


@virtual
async def test_a_call_that_cannot_make_its_deadline_does_not_wait_for_it() -> None:
    rig = Rig()
    await serve(rig.layer, ask(token_count=10))
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(rig.layer, ask(token_count=10)))
        await asyncio.sleep(1)
        with pytest.raises(QueueTimeout):
            await serve(rig.layer, ask(token_count=10), deadline=now() + 3.0)
        assert now() == 11.0


@pytest.mark.parametrize("when", [0.0, 1.0, 10.0, 10.1, 15.0])
@virtual
async def test_a_caller_may_leave_at_any_moment(when: float) -> None:
    rig = Rig()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(rig.layer, ask()))
        leaver = group.create_task(serve(rig.layer, ask()))
        group.create_task(serve(rig.layer, ask()))
        await asyncio.sleep(when)
        leaver.cancel()
    assert rig.idle()
    assert now() <= 30.0


@virtual
async def test_a_client_that_breaks_while_it_waits_gives_up_its_place() -> None:
    rig = Rig()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(rig.layer, ask()))
        await asyncio.sleep(1)
        with pytest.raises(ConnectionError):
            await serve(rig.layer, ask(), sink=Sink(error=ConnectionError()))
        assert rig.admission.waiting == 0


@virtual
async def test_a_call_that_fails_gives_its_permit_back() -> None:
    rig = Rig()
    with pytest.raises(BackendError):
        await serve(rig.layer, ask(), request_id="bad")
    assert rig.idle()


@virtual
async def test_capacity_that_comes_back_is_noticed_by_who_waits() -> None:
    rig = Rig()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(rig.layer, ask()))
        group.create_task(serve(rig.layer, ask()))
        await asyncio.sleep(1)
        rig.slots = 2
    assert now() == 11.0


@virtual
async def test_embeddings_wait_too_and_counting_tokens_never() -> None:
    rig = Rig()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(rig.layer, pb.EmbedRequest(model="scripted", texts=["a b"])))
        waiting = group.create_task(serve(rig.layer, pb.EmbedRequest(model="scripted", texts=["c"])))
        await asyncio.sleep(1)
        assert rig.admission.waiting == 1
        group.create_task(serve(rig.layer, pb.CountTokensRequest(model="scripted")))
        await asyncio.sleep(0)
        assert rig.inner.active == 2
    assert waiting.result().kinds == ["EmbedResponse"]


@virtual
async def test_pictures_and_prompts_are_charged_before_they_are_measured() -> None:
    rig = Rig()
    request = ask("x" * 3200, token_count=10)
    request.messages[0].parts.add(image=pb.Blob(data=b"x"))
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(rig.layer, request, caller="c"))
        await asyncio.sleep(1)
        assert rig.admission.used("c") == 100 + 125 + 10
    assert rig.admission.used("c") == 11


class Overload:
    """Four slots, a second a call, and three times as many calls as fit, for a minute."""

    SLOTS, SECONDS = 4, 60

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.came: Counter[str] = Counter()
        self.late_refusals = 0
        self.admission = Admission(queue=64, ageing=15.0, capacity=lambda _: self.SLOTS, clock=now)
        self.layer = Admit(self._work, admission=self.admission)

    async def _work(self, call: Call[Request], send: Send) -> None:
        seconds = self.chance.uniform(0.5, 1.5)
        await asyncio.sleep(seconds)
        usage = pb.Usage(output_token_count=int(seconds * 100))
        await send(pb.GenerateResponse(finished=pb.Finished(usage=usage)))

    async def client(self, kind: str, priority: pb.Priority.ValueType, rate: float, patience: float) -> None:
        async with asyncio.TaskGroup() as group:
            while now() < self.SECONDS:
                await asyncio.sleep(self.chance.expovariate(rate))
                group.create_task(self._one(kind, priority, patience))

    async def _one(self, kind: str, priority: pb.Priority.ValueType, patience: float) -> None:
        self.came[kind] += 1
        since = now()
        request = urgent(priority)
        request.limits.max_output_token_count = 100
        try:
            async with asyncio.timeout(patience):
                await serve(self.layer, request, caller=kind, deadline=since + patience)
        except (QueueFull, QueueTimeout):
            return
        except TimeoutError:
            self.late_refusals += 1
            return
        self.done[kind] += 1


@pytest.mark.parametrize("seed", range(3))
@virtual
async def test_three_times_too_many_calls_cost_neither_the_urgent_nor_the_goodput(seed: int) -> None:
    overload = Overload(seed)
    async with asyncio.TaskGroup() as group:
        group.create_task(overload.client("chat", pb.PRIORITY_INTERACTIVE, 2.0, 10.0))
        group.create_task(overload.client("agent", pb.PRIORITY_UNSPECIFIED, 2.0, 30.0))
        group.create_task(overload.client("job", pb.PRIORITY_BATCH, 8.0, 300.0))
    assert overload.done["chat"] >= 0.99 * overload.came["chat"]
    assert overload.done.total() >= 0.9 * overload.SLOTS * overload.SECONDS
    assert overload.done["job"] > 0, "what can wait is served too"
    assert overload.late_refusals <= 0.01 * overload.came.total(), "who cannot make it learns so at once"
    assert (overload.admission.running, overload.admission.waiting) == (0, 0)


def endpoint(name: str, *models: pb.Model, slots: int = 0) -> Endpoint:
    settings = BackendSettings.model_validate({"name": name, "address": "127.0.0.1:1", "slots": slots})
    made = Endpoint(settings, aliases={}, clock=now, source=random.Random(0))
    made.found_serving()
    made.list_models(models)
    return made


@virtual
async def test_the_capacity_is_the_slots_of_who_takes_calls() -> None:
    listed = endpoint("listed", pb.Model(id="m", slot_count=4), pb.Model(id="n", slot_count=2))
    configured = endpoint("configured", pb.Model(id="m", slot_count=4), slots=1)
    silent = endpoint("silent", pb.Model(id="o"))
    capacity = Capacity([listed, configured, silent], unknown=100, clock=now)

    def of(model: str) -> int:
        return capacity(capacity.pool(model))

    assert (of("m"), of("n"), of("o"), of("nobody")) == (5, 2, 100, 100)
    assert capacity("") == 201
    listed.drain()
    assert of("m") == 5, "answers hold for a moment"
    await asyncio.sleep(1)
    assert (of("m"), of("n")) == (1, 100)
    for number in range(1000):
        of(f"no-model-{number}")
    assert len(capacity._known) <= 256
    assert len(capacity._pools) <= 256
