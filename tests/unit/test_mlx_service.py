"""The worker's service on real mlx with tiny models: batching, limits, cancelling and failing alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    CapabilityUnsupported,
    ContextExceeded,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
)
from forebay.kit.pipeline import Call, Event
from forebay.mlx_service.worker import engine as engine_module
from forebay.mlx_service.worker.engine import Engine, Over, Row, Written
from forebay.mlx_service.worker.sampling import Array, Processor, SamplingParams
from mlx_worker_rig import MODEL, Reply, Rig, ask, rig, until

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("random"))


@pytest.fixture
async def tiny(random_model: Path) -> AsyncIterator[Rig]:
    async with rig(random_model) as running:
        yield running


PROMPTS = ("hi", "the man in the other tent is on a train", "x" * 90, "What then?")


async def test_rows_in_a_batch_get_the_very_tokens_they_get_alone(tiny: Rig) -> None:
    alone = [(await tiny.generate(ask(p, most=24, include_token_ids=True))).token_ids for p in PROMPTS]
    late = [ask(p, most=24, include_token_ids=True) for p in PROMPTS]
    async with asyncio.TaskGroup() as tasks:
        together = [tasks.create_task(tiny.generate(request)) for request in late]
    assert [task.result().token_ids for task in together] == alone
    assert all(alone)


async def test_a_stream_says_started_deltas_finished_and_counts_its_tokens(tiny: Rig) -> None:
    reply = await tiny.generate(ask(most=12, include_token_ids=True), request_id="r1")
    assert reply.kinds[0] == "started"
    assert set(reply.kinds[1:-1]) == {"delta"}
    started, finished = reply.started, reply.finished
    assert (started.backend, started.model, started.request_id) == ("mlx", MODEL, "r1")
    assert started.weights.family == "llama"
    assert started.weights.digest.startswith("sha256:")
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert finished.usage.output_token_count == 12
    assert sum(delta.token_count for delta in reply.deltas) <= 12
    assert finished.usage.prompt_token_count == (await count(tiny, "hi"))
    assert (
        finished.timings.first_delta_duration.ToTimedelta() >= finished.timings.prefill_duration.ToTimedelta()
    )


async def count(tiny: Rig, text: str, **fields: object) -> int:
    request = pb.CountTokensRequest(model=MODEL, messages=ask(text).messages, **fields)  # type: ignore[arg-type]
    return (await tiny.service.count_tokens(Call(request=request))).token_count


async def test_a_seed_gives_the_same_reply_whoever_shares_the_batch(tiny: Rig) -> None:
    def seeded(seed: int) -> pb.GenerateRequest:
        return ask(
            most=16, include_token_ids=True, sampling=pb.Sampling(temperature=1.3, top_p=0.95, seed=seed)
        )

    alone = (await tiny.generate(seeded(7))).token_ids
    async with asyncio.TaskGroup() as tasks:
        same = tasks.create_task(tiny.generate(seeded(7)))
        other = tasks.create_task(tiny.generate(seeded(8)))
        tasks.create_task(
            tiny.generate(ask(PROMPTS[1], most=16, sampling=pb.Sampling(temperature=1.0, top_k=5)))
        )
    assert same.result().token_ids == alone
    assert other.result().token_ids != alone


async def test_two_workers_do_not_make_up_the_same_reply(random_model: Path) -> None:
    request = ask("a poem", most=40, sampling=pb.Sampling(temperature=1.5), include_token_ids=True)
    replies = []
    for _ in range(2):
        async with rig(random_model) as one:
            replies.append((await one.generate(request)).token_ids)
    assert replies[0] != replies[1]  # every thread of mlx begins with the same random numbers


async def test_a_reply_continued_from_its_tokens_ends_as_the_uninterrupted_one(tiny: Rig) -> None:
    for sampling in (pb.Sampling(temperature=0), pb.Sampling(temperature=1.0, seed=3)):
        whole = await tiny.generate(ask(most=20, include_token_ids=True, sampling=sampling))
        assert len(whole.token_ids) >= 18
        prefix = pb.ReplyPrefix(token_ids=whole.token_ids[:9])
        rest = await tiny.generate(
            ask(most=11, include_token_ids=True, sampling=sampling, continue_from=prefix)
        )
        assert whole.token_ids[9:] == rest.token_ids


@pytest.mark.parametrize(
    "sampling",
    [
        pb.Sampling(temperature=0.8, top_k=100_000),
        pb.Sampling(temperature=0.8, top_k=1),
        pb.Sampling(temperature=1.5, min_p=0.2, top_p=0.3),
        pb.Sampling(temperature=0, repetition_penalty=1.8),
        pb.Sampling(temperature=0, presence_penalty=1.5, frequency_penalty=1.5),
        pb.Sampling(),
    ],
    ids=str,
)
async def test_every_kind_of_sampling_gives_a_full_reply(tiny: Rig, sampling: pb.Sampling) -> None:
    reply = await tiny.generate(ask(most=8, sampling=sampling))
    assert reply.finished.usage.output_token_count == 8


async def test_the_likeliest_of_one_is_greedy(tiny: Rig) -> None:
    greedy = await tiny.generate(ask(most=10, include_token_ids=True))
    one = await tiny.generate(
        ask(most=10, include_token_ids=True, sampling=pb.Sampling(temperature=1, top_k=1))
    )
    narrow = await tiny.generate(
        ask(most=10, include_token_ids=True, sampling=pb.Sampling(temperature=1, top_p=0.001))
    )
    assert greedy.token_ids == one.token_ids == narrow.token_ids


async def test_a_bias_can_force_and_forbid_a_token(tiny: Rig) -> None:
    forced = await tiny.generate(
        ask(most=6, include_token_ids=True, sampling=pb.Sampling(temperature=0, logit_bias={65: 100.0}))
    )
    assert set(forced.token_ids) == {65}
    frequent = await tiny.generate(
        ask(
            most=6,
            include_token_ids=True,
            sampling=pb.Sampling(
                temperature=0, logit_bias={65: 25.0}, presence_penalty=2, frequency_penalty=2
            ),
        )
    )
    assert 65 in frequent.token_ids


async def test_log_probabilities_come_only_if_asked_for(tiny: Rig) -> None:
    plain = await tiny.generate(ask(most=5))
    assert not any(delta.logprobs or delta.token_ids for delta in plain.deltas)
    asked = await tiny.generate(
        ask(most=5, include_token_ids=True, logprobs=pb.LogprobOptions(top_logprob_count=3))
    )
    told = [entry for delta in asked.deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in told] == asked.token_ids
    for entry in told:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token_id == entry.token_id  # greedy
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
    none = await tiny.generate(ask(most=2, logprobs=pb.LogprobOptions()))
    assert all(not entry.top_logprobs for delta in none.deltas for entry in delta.logprobs)


async def test_a_prompt_that_does_not_fit_is_refused_with_figures(tiny: Rig) -> None:
    with pytest.raises(ContextExceeded) as caught:
        await tiny.generate(ask("y" * 600))
    assert int(caught.value.metadata["prompt_token_count"]) > 600
    assert caught.value.metadata["context_token_count"] == "512"
    with pytest.raises(ContextExceeded) as caught:
        await tiny.generate(ask(most=500))
    assert caught.value.metadata["max_output_token_count"] == "500"


async def test_a_reply_without_limit_ends_at_the_default_or_the_context(tiny: Rig) -> None:
    by_default = (await tiny.generate(ask())).finished
    assert (by_default.reason, by_default.usage.output_token_count) == (pb.FINISH_REASON_LENGTH, 64)
    long = "z" * (512 - (await count(tiny, "")) - 10)
    by_context = (await tiny.generate(ask(long))).finished
    assert (by_context.reason, by_context.usage.output_token_count) == (pb.FINISH_REASON_LENGTH, 10)


async def test_a_long_prompt_tells_how_far_it_is_read(tiny: Rig) -> None:
    reply = await tiny.generate(ask("w" * 300, most=2))
    fractions = [
        e.progress.fraction for e in reply.events if e.progress.stage == pb.Progress.STAGE_PREFILLING
    ]
    assert len(fractions) >= 2
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


async def test_a_cancelled_reply_frees_its_place_within_a_step(tiny: Rig) -> None:
    running = asyncio.create_task(tiny.generate(ask(most=400)))
    await until(lambda: tiny.engine.stats().live == 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    before = tiny.engine.stats().steps
    await until(lambda: tiny.engine.stats().live == 0)
    assert tiny.engine.stats().steps - before <= 2


async def test_waiting_replies_are_told_their_place_and_served_by_urgency(tmp_path: Path) -> None:
    never_ends = tiny_models.build_random(tmp_path, plain=True)
    async with rig(never_ends, rows=1, queue_rows=2, context=2048) as tiny:
        order: list[str] = []

        async def run(name: str, most: int, priority: pb.Priority.ValueType, reply: Reply) -> None:
            request = ask(most=most, routing=pb.RoutingHints(priority=priority))
            await tiny.service.generate(Call(request=request), reply.send)
            order.append(name)

        def places(reply: Reply) -> list[int]:
            queued = [e.progress for e in reply.events if e.progress.stage == pb.Progress.STAGE_QUEUED]
            return [progress.queue_position for progress in queued]

        waiting = Reply()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(run("first", 1900, pb.PRIORITY_UNSPECIFIED, Reply()))
            await until(lambda: tiny.engine.stats().live == 1)
            tasks.create_task(run("batch", 2, pb.PRIORITY_BATCH, waiting))
            await until(lambda: tiny.engine.stats().waiting == 1 and places(waiting) == [0])
            tasks.create_task(run("urgent", 2, pb.PRIORITY_INTERACTIVE, Reply()))
            await until(lambda: tiny.engine.stats().waiting == 2)
            with pytest.raises(QueueFull) as caught:
                await tiny.generate(ask(most=2))
            await until(lambda: 1 in places(waiting))
            first.cancel()
        assert caught.value.retry_after is not None
        assert caught.value.metadata == {"running": "1", "waiting": "2"}
        assert order == ["urgent", "batch"]
        assert places(waiting)[0] == 0


async def test_a_reader_that_stalls_gets_everything_in_few_events(tiny: Rig) -> None:
    go_on = asyncio.Event()
    reply = Reply()

    async def send(event: Event) -> None:
        await reply.send(event)
        if len(reply.deltas) == 1:
            await go_on.wait()

    request = ask(most=60, include_token_ids=True)
    running = asyncio.create_task(tiny.service.generate(Call(request=request), send))
    await until(lambda: tiny.engine.stats().steps > 0 and tiny.engine.stats().live == 0)
    go_on.set()
    await running
    assert len(reply.deltas) <= 4
    assert reply.finished.usage.output_token_count == 60
    assert reply.token_ids == (await tiny.generate(request)).token_ids


async def test_a_deadline_ends_a_reply_and_one_that_waits(random_model: Path) -> None:
    async with rig(random_model, rows=1) as tiny:
        late = time.monotonic() + 0.05
        async with asyncio.TaskGroup() as tasks:
            rows = [tasks.create_task(failing(tiny, deadline=late)) for _ in range(2)]
        assert [type(row.result()) for row in rows] == [DeadlineExceeded, DeadlineExceeded]
        assert tiny.engine.stats().live == 0


async def failing(tiny: Rig, **call: object) -> BaseException:
    try:
        await tiny.generate(ask(most=480), **call)
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


class Raises:
    """A constraint whose processor raises after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def processor(self, prompt_count: int) -> Processor:
        def process(tokens: Array, logits: Array) -> Array:
            if len(tokens) - prompt_count >= self.steps:
                raise RuntimeError("secret")
            return logits

        return process


def row(tokens: tuple[int, ...] = (5, 6, 7), most: int = 12, **fields: object) -> Row:
    return Row(tokens=tokens, most=most, sampling=SamplingParams(temperature=0), **fields)  # type: ignore[arg-type]


async def finish(engine: Engine, wanted: Row) -> tuple[list[int], Over]:
    ticket = engine.submit(wanted)
    tokens: list[int] = []
    while True:
        for happening in await ticket.next():
            if isinstance(happening, Written):
                tokens.append(happening.token)
            elif isinstance(happening, Over):
                return tokens, happening


@pytest.mark.parametrize("steps", [0, 3])
async def test_a_processor_that_raises_fails_its_own_row_only(tiny: Rig, steps: int) -> None:
    alone, _ = await finish(tiny.engine, row())
    async with asyncio.TaskGroup() as tasks:
        good = tasks.create_task(finish(tiny.engine, row()))
        bad = tasks.create_task(finish(tiny.engine, row((8, 9), constraint=Raises(steps))))
    assert good.result()[0] == alone
    tokens, over = bad.result()
    assert isinstance(over.failure, BackendError)
    assert "secret" not in over.failure.message
    assert len(tokens) <= max(1, steps + 1)


class Unmakeable:
    def processor(self, prompt_count: int) -> Processor:
        raise InvalidRequest("no such format")


async def test_a_row_that_cannot_be_begun_fails_alone(tiny: Rig) -> None:
    _, over = await finish(tiny.engine, row(constraint=Unmakeable()))
    assert isinstance(over.failure, InvalidRequest)
    assert (await finish(tiny.engine, row()))[1].reason in {"length", "stop"}


async def test_a_step_that_fails_once_costs_no_row_a_token(
    tiny: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(), row((9, 10)), row((11,))]
    alone = [(await finish(tiny.engine, one))[0] for one in rows]
    step = engine_module.Batch.step
    calls = 0

    def failing_step(batch: engine_module.Batch) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("the device hiccups")
        return step(batch)

    monkeypatch.setattr(engine_module.Batch, "step", failing_step)
    async with asyncio.TaskGroup() as tasks:
        together = [tasks.create_task(finish(tiny.engine, one)) for one in rows]
    assert [task.result()[0] for task in together] == alone
    assert tiny.engine.stats().faults == 1


async def test_a_row_that_breaks_every_step_fails_and_the_others_live(
    tiny: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = await finish(tiny.engine, row())
    insert, step = engine_module.Batch.insert, engine_module.Batch.step
    poisoned: dict[int, set[int]] = {}

    def noting_insert(batch: engine_module.Batch, tokens: object, **rest: object) -> int:
        uid = insert(batch, tokens, **rest)  # type: ignore[arg-type]
        if tuple(tokens)[:2] == (66, 66):  # type: ignore[arg-type]
            poisoned.setdefault(id(batch), set()).add(uid)
        return uid

    def breaking_step(batch: engine_module.Batch) -> object:
        if poisoned.get(id(batch)):
            poisoned.clear()
            raise RuntimeError("poison")
        return step(batch)

    monkeypatch.setattr(engine_module.Batch, "insert", noting_insert)
    monkeypatch.setattr(engine_module.Batch, "step", breaking_step)
    async with asyncio.TaskGroup() as tasks:
        good = tasks.create_task(finish(tiny.engine, row()))
        bad = tasks.create_task(finish(tiny.engine, row((66, 66, 66))))
    assert isinstance(bad.result()[1].failure, BackendError)
    assert good.result()[0] == alone
    assert good.result()[1].failure is None


async def test_stopping_ends_rows_and_refuses_new_ones(random_model: Path) -> None:
    async with rig(random_model, rows=1) as tiny:
        async with asyncio.TaskGroup() as tasks:
            rows = [tasks.create_task(failing(tiny)) for _ in range(2)]
            await until(lambda: tiny.engine.stats().waiting == 1)
            await tiny.engine.stop(timeout=10)
        assert [type(one.result()) for one in rows] == [Draining, Draining]
        with pytest.raises(Draining):
            tiny.engine.submit(row())
        assert tiny.engine.has_ended


async def test_an_engine_whose_model_cannot_be_loaded_says_so() -> None:
    def load() -> tuple[object, list[int]]:
        raise FileNotFoundError("weights")

    engine = Engine(load, rows=1)
    with pytest.raises(FileNotFoundError, match="weights"):
        await engine.start()
    await engine.stop(timeout=5)


async def test_an_engine_that_was_never_started_can_be_stopped() -> None:
    await Engine(lambda: (None, []), rows=1).stop(timeout=1)


async def test_the_prefill_step_is_measured(random_model: Path) -> None:
    async with rig(random_model, prefill_step=None) as tiny:
        alone, shared = tiny.engine._prefill_step, tiny.engine._shared_step
        assert {alone, shared} <= set(engine_module.PREFILL_STEPS)
        assert alone is not None
        assert shared is not None
        assert shared <= alone
        assert tiny.engine.stats().cache_bytes == 0


async def test_an_idle_engine_does_not_run(tiny: Rig) -> None:
    await tiny.generate(ask(most=2))
    await until(lambda: tiny.engine.stats().live == 0)
    steps, used = tiny.engine.stats().steps, time.thread_time()
    await asyncio.sleep(0.2)
    assert tiny.engine.stats().steps == steps
    assert tiny.engine.stats().last_step_age == 0
    assert time.thread_time() - used < 0.2


async def test_an_engine_that_is_stuck_before_a_row_is_in_the_batch_tells_its_age(tiny: Rig) -> None:
    held, reached = threading.Event(), threading.Event()

    def stick() -> None:
        reached.set()
        held.wait(30)

    assert (await tiny.generate(ask(most=2))).finished
    stuck = asyncio.create_task(tiny.engine.run(stick))
    try:
        await until(reached.is_set)
        assert tiny.engine.stats().last_step_age == 0.0  # nobody waits for it
        reply = asyncio.create_task(tiny.generate(ask(most=2)))
        await until(lambda: tiny.engine.stats().last_step_age > 0.3)
        assert tiny.engine.stats().live == 0
    finally:
        held.set()
        await stuck
    assert (await reply).finished
    await until(lambda: tiny.engine.stats().last_step_age == 0.0)


async def test_the_model_is_listed_with_what_it_can_do(tiny: Rig) -> None:
    (model,) = (await tiny.service.list_models(pb.ListModelsRequest())).models
    support = {report.capability: report.support for report in model.capabilities}
    assert (model.id, model.backend, model.state) == (MODEL, "mlx", pb.Model.STATE_ACTIVE)
    assert (model.slot_count, model.loaded_context_token_count, model.context_token_count) == (4, 512, 2048)
    assert model.memory_bytes > 400_000
    assert support[pb.CAPABILITY_GENERATE] == pb.CapabilityReport.SUPPORT_YES
    assert support[pb.CAPABILITY_TOOLS] == pb.CapabilityReport.SUPPORT_NO
    assert not (await tiny.service.list_models(pb.ListModelsRequest(backends=["other"]))).models


async def test_embedding_and_other_models_are_refused(tiny: Rig) -> None:
    with pytest.raises(CapabilityUnsupported):
        await tiny.service.embed(Call(request=pb.EmbedRequest(model=MODEL, texts=["a"])))
    with pytest.raises(ModelNotFound):
        await tiny.service.embed(Call(request=pb.EmbedRequest(model="other", texts=["a"])))


async def test_a_model_that_is_still_loading_is_unavailable(tiny: Rig) -> None:
    tiny.engine.vocabulary_size = 0
    with pytest.raises(BackendUnavailable):
        await tiny.generate(ask())


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"sampling": pb.Sampling(logit_bias={100_000: 1})}, "sampling.logit_bias[100000]"),
        ({"limits": pb.GenerationLimits(stop_token_ids=[5, 100_000])}, "limits.stop_token_ids[1]"),
        ({"continue_from": pb.ReplyPrefix(token_ids=[5, -1])}, "continue_from.token_ids[1]"),
    ],
)
async def test_tokens_that_the_model_has_not_are_refused(
    tiny: Rig, fields: dict[str, object], path: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await tiny.generate(ask(**fields))
    assert caught.value.violations[0][0] == path


async def test_options_that_do_not_exist_are_refused(tiny: Rig) -> None:
    request = ask()
    request.backend_options["mlx"].update({"speed": 11})
    request.backend_options["ollama"].update({"num_ctx": 1})
    with pytest.raises(InvalidRequest, match=r"backend_options\[mlx\]\.speed"):
        await tiny.generate(request)


IMAGE = pb.Message(
    role=pb.ROLE_USER, parts=[pb.Part(text="see"), pb.Part(image=pb.Blob(media_type="image/png", data=b"x"))]
)


@pytest.mark.parametrize(
    ("change", "kind", "field"),
    [
        ({"messages": [IMAGE]}, pb.DEGRADATION_KIND_IMAGE_DROPPED, "messages[0].parts[1].image"),
        ({"tools": [pb.Tool(name="f")]}, pb.DEGRADATION_KIND_TOOLS_DROPPED, "tools"),
        ({"sampling": pb.Sampling(typical_p=0.5)}, pb.DEGRADATION_KIND_OPTION_IGNORED, "sampling.typical_p"),
        (
            {"reasoning_effort": pb.REASONING_EFFORT_HIGH},
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "reasoning_effort",
        ),
    ],
)
async def test_a_shortfall_is_refused_unless_it_was_accepted(
    tiny: Rig, change: dict[str, object], kind: pb.DegradationKind.ValueType, field: str
) -> None:
    request = ask(most=2)
    wanted = pb.GenerateRequest(**change)  # type: ignore[arg-type]
    if wanted.messages:
        request.ClearField("messages")
    request.MergeFrom(wanted)
    with pytest.raises(CapabilityUnsupported) as caught:
        await tiny.generate(request)
    assert caught.value.metadata["field"] == field
    request.accepted_degradations.append(kind)
    reply = await tiny.generate(request)
    assert [(d.kind, d.field) for d in reply.started.degradations] == [(kind, field)]


async def test_what_costs_nothing_is_no_shortfall(tiny: Rig) -> None:
    reply = await tiny.generate(
        ask(
            most=2,
            tools=[pb.Tool(name="f")],
            tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE),
            reasoning_effort=pb.REASONING_EFFORT_NONE,
            sampling=pb.Sampling(typical_p=1.0),
        )
    )
    assert not reply.started.degradations


async def test_tokens_of_what_the_model_cannot_read_are_not_counted(tiny: Rig) -> None:
    with pytest.raises(CapabilityUnsupported):
        await count(tiny, "a", tools=[pb.Tool(name="f")])
    request = pb.CountTokensRequest(model=MODEL, messages=[IMAGE])
    with pytest.raises(CapabilityUnsupported):
        await tiny.service.count_tokens(Call(request=request))
