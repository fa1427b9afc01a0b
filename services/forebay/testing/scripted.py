"""An engine that does what its script says: the other end of nearly every test.

What it says is computed in `tokens`. How fast, how much and where it fails is a
`Script`, set for each model, queued for the next call, given with a request in
`backend_options["scripted"]`, or read from the model's name:
`fail:UNAVAILABLE@3` fails so after three deltas.

`python -m forebay.testing.scripted` serves it as a process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import cast

import grpc
from google.protobuf import json_format, struct_pb2

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit import failure, process, telemetry
from forebay.kit.config import ServerSettings, parse_duration
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.layers.limit import Limit
from forebay.kit.pipeline import Call, Event, Request, Send, Service
from forebay.kit.rpc import INFERENCE_SERVICE, Context, Edge, InferenceServicer, write
from forebay.kit.server import Register, serving
from forebay.models.v1 import models_pb2 as models_pb
from forebay.testing import tokens
from forebay.testing.reply import Plan, compose, require, shortfalls
from forebay.testing.script import (
    ALL,
    BEFORE,
    DEFAULT_CAPABILITIES,
    OPTION,
    Chaos,
    Fault,
    Script,
    ScriptedModel,
    Trick,
    model_of,
)

_KEPT = 1024
"""Records that a process keeps."""


class ScriptedCrashError(Exception):
    """A fault in an engine's code, as far as anyone can tell."""


class ScriptUnusedError(AssertionError):
    """Scripts were queued for calls that did not come."""


class Fate(Enum):
    """How far a call has come."""

    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Record:
    """What happened to one call."""

    request_id: str
    """The call's identifier."""
    kind: str
    """`generate`, `embed` or `count_tokens`."""
    model: str
    """The model asked for."""
    request: Request
    """The request, as it arrived."""
    fate: Fate = Fate.ACTIVE
    """How far it has come."""
    delta_count: int = 0
    """Deltas sent."""
    failure: str = ""
    """Reason of its failure."""

    def to_json(self) -> str:
        """Returns a line for a journal. Its time is the machine's monotonic clock, which processes share."""
        return json.dumps(
            {
                "time": time.monotonic(),
                "request_id": self.request_id,
                "kind": self.kind,
                "model": self.model,
                "fate": self.fate.value,
                "delta_count": self.delta_count,
                "failure": self.failure,
            }
        )


class ScriptedEngine:
    """An `InferenceEngine` and `ModelEngine` whose every answer a test can foretell.

    Args:
        name: the backend's name in answers.
        models: its models; a string is a model of that name with the default script.
        slots: most calls at once. None is no limit.
        queue: most calls that wait for a slot.
        pullable: models that can be fetched.
        chaos: faults by chance, for calls whose script has none.
        numbered: whether it numbers its events itself, for tests without a gRPC edge.
        on_change: called whenever a call begins or ends.
    """

    def __init__(
        self,
        *,
        name: str = "scripted",
        models: Iterable[ScriptedModel | str] = ("scripted",),
        slots: int | None = None,
        queue: int = 64,
        pullable: Iterable[ScriptedModel | str] = (),
        chaos: Chaos | None = None,
        numbered: bool = False,
        on_change: Callable[[Record], None] | None = None,
    ) -> None:
        self.name = name
        self.models = {model.name: model for model in map(model_of, models)}
        self.records: list[Record] = []
        """Every call that was let in, in order."""
        self.active: list[Record] = []
        """Calls that are being served now. Empty is: no orphan generation."""
        self._call_count = 0
        self.peak = 0
        """Most calls that were active at once."""
        self._slots = slots
        self._pullable = {model.name: model for model in map(model_of, pullable)}
        self._chaos = chaos
        self._numbered = numbered
        self._on_change = on_change
        self._queued: deque[Script] = deque()
        self._met: dict[tuple[str, Fault], int] = {}
        self._ready_at: dict[str, float] = {}
        self._unloaded = {model.name for model in self.models.values() if not model.loaded}
        self._leashes: dict[str, set[asyncio.Timeout]] = {}
        self._let_go = asyncio.Event()
        self.service: Service = self._dispatch
        """The engine as a service, for every kind of call."""
        if slots is not None:
            self.service = Limit(self._dispatch, slots=slots, queue=queue, name=name)

    def __repr__(self) -> str:
        counts = " ".join(f"{fate.value} {sum(r.fate is fate for r in self.records)}" for fate in Fate)
        return f"<ScriptedEngine {self.name} {counts}>"

    def then(self, *scripts: Script) -> None:
        """Queues scripts for the next calls, whatever their model."""
        self._queued.extend(scripts)

    def assert_used(self) -> None:
        """Asserts that every queued script met its call.

        Raises:
            ScriptUnusedError: some did not.
        """
        if self._queued:
            raise ScriptUnusedError(f"{len(self._queued)} scripts were never used: {list(self._queued)}")

    def expected(self, request: pb.GenerateRequest) -> str:
        """Returns the text that the request's reply will have if nothing goes wrong."""
        model = self._find(request.model)
        return "".join(delta.text for delta in self._plan(request, model, model.script).deltas)

    # Inference.

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """Sends the scripted reply."""
        await self.service(cast("Call[Request]", call), send)

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """Returns a unit vector for each text."""
        return cast("pb.EmbedResponse", await self._one(cast("Call[Request]", call)))

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """Counts words."""
        return cast("pb.CountTokensResponse", await self._one(cast("Call[Request]", call)))

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Lists the models."""
        return pb.ListModelsResponse(models=[self._describe(model) for model in self.models.values()])

    # Models.

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        """Describes one model."""
        return models_pb.GetModelResponse(model=self._describe(self._find(request.model)))

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """Loads a model in the script's time."""
        model = self._find(request.model)

        async def report(fraction: float) -> None:
            progress = models_pb.LoadProgress(fraction=fraction, detail="reading the script")
            await send(models_pb.LoadModelResponse(progress=progress))

        seconds = await self._load(model, report)
        loaded = models_pb.ModelLoaded(model=self._describe(model))
        loaded.load_duration.FromNanoseconds(round(seconds * 1e9))
        await send(models_pb.LoadModelResponse(loaded=loaded))

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """Makes a pullable model available."""
        if request.model not in self.models:
            model = self._pullable.get(request.model)
            if model is None:
                raise failure.ModelNotFound(
                    f"there is no model {request.model} to fetch", metadata={"model": request.model}
                )
            total = 4096
            for done in range(0, total + 1, total // 4):
                progress = models_pb.PullProgress(
                    detail="fetching",
                    digest=tokens.digest_of(model.key),
                    total_bytes=total,
                    completed_bytes=done,
                )
                await send(models_pb.PullModelResponse(progress=progress))
                await asyncio.sleep(model.script.load_delay / 4)
            self.models[model.name] = model
            self._unloaded.add(model.name)
        model = self.models[request.model]
        await send(models_pb.PullModelResponse(pulled=models_pb.ModelPulled(model=self._describe(model))))

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Removes a model from memory, and breaks off its calls or waits for them."""
        model = self._find(request.model)
        leashes = self._leashes.get(model.name, set())
        if request.force:
            for leash in leashes:
                leash.reschedule(_now())
        while leashes:
            self._let_go.clear()
            await self._let_go.wait()
        self._unloaded.add(model.name)
        self._ready_at.pop(model.name, None)
        return models_pb.UnloadModelResponse(model=self._describe(model))

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Removes a model for good, unless it is pullable."""
        model = self._find(request.model)
        del self.models[model.name]
        return models_pb.DeleteModelResponse()

    # Serving one call.

    async def _one(self, call: Call[Request]) -> Event:
        events: list[Event] = []

        async def keep(event: Event) -> None:
            events.append(event)

        await self.service(call, keep)
        return events[0]

    async def _dispatch(self, call: Call[Request], send: Send) -> None:
        request = call.request
        with self._recorded(call) as record:
            if isinstance(request, pb.GenerateRequest):
                await self._reply(cast("Call[pb.GenerateRequest]", call), send, record)
            elif isinstance(request, pb.EmbedRequest):
                await send(await self._embedding(request))
            else:
                await send(await self._count(request))

    @contextmanager
    def _recorded(self, call: Call[Request]) -> Iterator[Record]:
        kind = {"GenerateRequest": "generate", "EmbedRequest": "embed"}.get(
            type(call.request).__name__, "count_tokens"
        )
        record = Record(call.request_id, kind, call.request.model, call.request)
        self.records.append(record)
        self._call_count += 1
        self.active.append(record)
        self.peak = max(self.peak, len(self.active))
        self._changed(record)
        try:
            yield record
            record.fate = Fate.COMPLETED
        except Exception as error:
            record.fate = Fate.FAILED
            record.failure = error.reason if isinstance(error, failure.Failure) else type(error).__name__
            raise
        except BaseException:
            record.fate = Fate.CANCELLED
            raise
        finally:
            self.active = [other for other in self.active if other is not record]
            self._changed(record)

    def _changed(self, record: Record) -> None:
        if self._on_change is not None:
            self._on_change(record)

    async def _reply(self, call: Call[pb.GenerateRequest], send: Send, record: Record) -> None:
        request = call.request
        script = self._script(request.model, request.backend_options)
        fault = self._fault(request.model, script)
        since = _now()
        before = fault is not None and fault.at == BEFORE
        if fault is not None and before and fault.kind not in (Trick.SKIP, Trick.ENCORE):
            if await self._go_wrong(fault):
                return
            fault = None
        model = self._find(request.model)
        degradations = shortfalls(request, model)
        plan = self._plan(request, model, script)
        talk = _Talk(send, numbered=self._numbered)
        try:
            async with asyncio.timeout(None) as leash:
                self._leashes.setdefault(model.name, set()).add(leash)
                try:
                    load_seconds = await self._load(model, talk.loading, script)
                    started = pb.Started(
                        backend=self.name,
                        model=model.name,
                        request_id=call.request_id,
                        degradations=degradations,
                        weights=_weights(model),
                    )
                    if fault is not None and before and fault.kind is Trick.SKIP:
                        talk.skip = True
                        fault = None
                    await talk.say(pb.GenerateResponse(started=started))
                    encore = await self._talk(plan, script, fault, talk, record)
                    if encore is None:
                        return
                    finished = _finished(request, plan, talk, since=since, load_seconds=load_seconds)
                    for _ in range(2 if encore else 1):
                        await talk.say(pb.GenerateResponse(finished=finished))
                except asyncio.CancelledError:
                    await asyncio.sleep(script.unwind_delay)
                    raise
                finally:
                    self._leashes[model.name].discard(leash)
                    self._let_go.set()
        except TimeoutError as error:
            raise failure.StreamInterrupted(
                f"model {model.name} was unloaded", metadata={"model": model.name}
            ) from error

    async def _talk(
        self, plan: Plan, script: Script, fault: Fault | None, talk: _Talk, record: Record
    ) -> bool | None:
        """Sends the deltas; returns None to end without `finished`, True to send it twice."""
        point = None if fault is None else min(fault.at, len(plan.deltas))
        encore = fault is not None and fault.kind is Trick.ENCORE
        for number in range(len(plan.deltas) + 1):
            if fault is not None and number == point and not encore:
                match fault.kind:
                    case Trick.SKIP:
                        talk.skip = True
                    case Trick.REPEAT:
                        await talk.again()
                    case _ if await self._go_wrong(fault):
                        return None
            if number < len(plan.deltas):
                if number:
                    await asyncio.sleep(script.token_delay)
                else:
                    await _prefill(script, talk)
                await talk.say(pb.GenerateResponse(delta=plan.deltas[number]))
                record.delta_count += 1
        return encore

    async def _go_wrong(self, fault: Fault) -> bool:
        """Fails as told; returns True if the call is to end without another word."""
        match fault.kind:
            case Trick.STALL:
                await asyncio.Event().wait()
            case Trick.CRASH:
                raise ScriptedCrashError(f"as scripted: {fault}")
            case Trick.EXIT:
                os._exit(70)
            case Trick():
                return fault.kind is Trick.TRUNCATE
            case kind:
                raise kind(f"as scripted: {fault}", metadata={"fault": str(fault), "backend": self.name})
        return False

    async def _embedding(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        await self._unary(request.model, request.backend_options)
        model = self._find(request.model)
        require(model, pb.CAPABILITY_EMBED, "texts")
        count = request.dimension_count if request.HasField("dimension_count") else model.dimension_count
        if count > model.dimension_count:
            text = f"model {model.name} has {model.dimension_count} components, not {count}"
            raise failure.InvalidRequest(text, violations=[("dimension_count", text)])
        response = pb.EmbedResponse(
            backend=self.name,
            model=model.name,
            dimension_count=count,
            normalized=True,
            weights=_weights(model),
        )
        for index, text in enumerate(request.texts):
            words = tokens.words(text)
            response.usage.prompt_token_count += words
            vector = response.embeddings.add()
            if words <= model.context_token_count:
                vector.values.extend(tokens.vector_for(model.key, text, dimension_count=count))
                continue
            problem = failure.ContextExceeded(
                f"texts[{index}] has {words} tokens and the model takes {model.context_token_count}",
                metadata={"index": str(index)},
                violations=[(f"texts[{index}]", "too long")],
            )
            if not request.allow_partial:
                raise problem
            response.failures.add(index=index, reason=problem.reason, message=problem.message)
        return response

    async def _count(self, request: pb.CountTokensRequest) -> pb.CountTokensResponse:
        await self._unary(request.model, {})
        model = self._find(request.model)
        require(model, pb.CAPABILITY_COUNT_TOKENS, "messages")
        count = tokens.count_tokens(request.messages, request.tools)
        return pb.CountTokensResponse(token_count=count, backend=self.name, model=model.name)

    async def _unary(self, model: str, options: Mapping[str, struct_pb2.Struct]) -> None:
        script = self._script(model, options)
        if script.fault is not None and (fault := self._fault(model, script)) is not None:
            await self._go_wrong(fault)
        await self._load(self._find(model), None, script)
        await asyncio.sleep(script.first_delay)

    # What to do and what to say.

    def _script(self, name: str, options: Mapping[str, struct_pb2.Struct]) -> Script:
        if self._queued:
            script = self._queued.popleft()
        elif name in self.models or not name.startswith("fail:"):
            model = next((m for m in self.models.values() if name in (m.name, *m.aliases)), None)
            script = model.script if model is not None else Script()
        else:
            script = self._find(name).script
        own = options.get(OPTION)
        return script if own is None else script.changed(json_format.MessageToDict(own))

    def _fault(self, name: str, script: Script) -> Fault | None:
        if script.fault is None:
            return self._chaos.fault_for(self._call_count) if self._chaos is not None else None
        if script.fault.times is not None:
            key = (name, script.fault)
            self._met[key] = self._met.get(key, 0) + 1
            if self._met[key] > script.fault.times:
                return None
        return script.fault

    def _find(self, name: str) -> ScriptedModel:
        for model in self.models.values():
            if name in (model.name, *model.aliases):
                return model
        if name.startswith("fail:"):
            try:
                return ScriptedModel(name=name, script=Script(fault=Fault.parse(name.removeprefix("fail:"))))
            except ValueError as error:
                raise failure.ModelNotFound(str(error), metadata={"model": name}) from error
        raise failure.ModelNotFound(
            f"backend {self.name} has no model {name}", metadata={"model": name, "backend": self.name}
        )

    async def _load(
        self,
        model: ScriptedModel,
        report: Callable[[float], Awaitable[None]] | None,
        script: Script | None = None,
    ) -> float:
        """Waits until a model is in memory and returns the seconds that took.

        A load is a point in time and not a task: it goes on when its caller leaves, and others join it.
        """
        seconds = (script or model.script).load_delay
        if model.name in self._unloaded:
            self._unloaded.discard(model.name)
            self._ready_at[model.name] = _now() + seconds
        since = _now()
        ready_at = self._ready_at.get(model.name, since)
        if ready_at <= since:
            return 0.0
        for quarter in range(4):
            if report is not None:
                await report(quarter / 4)
            await asyncio.sleep((ready_at - since) / 4)
        return ready_at - since

    def _plan(self, request: pb.GenerateRequest, model: ScriptedModel, script: Script) -> Plan:
        prompt_count = tokens.count_tokens(request.messages, request.tools)
        prefix = request.continue_from
        room = model.context_token_count - prompt_count - tokens.words(prefix.text + prefix.reasoning)
        limit = room
        if request.limits.HasField("max_output_token_count"):
            limit = request.limits.max_output_token_count
        if min(limit, room) < max(limit, 1):
            raise failure.ContextExceeded(
                f"{prompt_count} tokens of prompt leave no room for the reply in a context of "
                f"{model.context_token_count}",
                metadata={
                    "prompt_token_count": str(prompt_count),
                    "context_token_count": str(model.context_token_count),
                },
            )
        seed = request.sampling.seed
        if request.sampling.temperature > 0 and not request.sampling.HasField("seed"):
            seed = self._call_count  # nobody asked for the same reply twice, so nobody gets it
        return compose(request, model, script, seed=seed, limit=limit)

    def _describe(self, model: ScriptedModel) -> pb.Model:
        state = pb.Model.STATE_ACTIVE
        if model.name in self._unloaded:
            state = pb.Model.STATE_AVAILABLE
        elif self._ready_at.get(model.name, 0.0) > _now():
            state = pb.Model.STATE_LOADING
        described = pb.Model(
            id=model.name,
            backend=self.name,
            state=state,
            context_token_count=model.context_token_count,
            loaded_context_token_count=model.context_token_count if state == pb.Model.STATE_ACTIVE else 0,
            memory_bytes=1 << 20,
            disk_bytes=1 << 20,
            slot_count=self._slots or 0,
            weights=_weights(model),
            aliases=model.aliases,
        )
        for capability in sorted(ALL):
            has = capability in model.capabilities
            described.capabilities.add(
                capability=capability,
                support=pb.CapabilityReport.SUPPORT_YES if has else pb.CapabilityReport.SUPPORT_NO,
            )
        return described


class _Talk:
    """The sending side of one reply: numbers, drops and repeats events as told."""

    def __init__(self, send: Send, *, numbered: bool) -> None:
        self._send = send
        self._numbered = numbered
        self._sequence = 0
        self._latest: pb.GenerateResponse | None = None
        self.skip = False
        self.first_delta: float | None = None
        self.last_delta = 0.0

    async def say(self, event: pb.GenerateResponse) -> None:
        if self._numbered:
            event.sequence = self._sequence
            self._sequence += 1
        if event.WhichOneof("event") == "delta":
            self.last_delta = _now()
            if self.first_delta is None:
                self.first_delta = self.last_delta
        if self.skip:
            self.skip = False
            return
        self._latest = event
        await self._send(event)

    async def again(self) -> None:
        if self._latest is not None:
            await self._send(self._latest)

    async def loading(self, fraction: float) -> None:
        progress = pb.Progress(stage=pb.Progress.STAGE_LOADING, fraction=fraction)
        await self.say(pb.GenerateResponse(progress=progress))


async def _prefill(script: Script, talk: _Talk) -> None:
    step = script.progress_delay
    if step is None:
        await asyncio.sleep(script.first_delay)
        return
    until = _now() + script.first_delay
    while (left := until - _now()) > 0:
        progress = pb.Progress(stage=pb.Progress.STAGE_PREFILLING, fraction=1 - left / script.first_delay)
        await talk.say(pb.GenerateResponse(progress=progress))
        await asyncio.sleep(min(step, left))


def _finished(
    request: pb.GenerateRequest, plan: Plan, talk: _Talk, *, since: float, load_seconds: float
) -> pb.Finished:
    finished = pb.Finished(
        reason=plan.reason, stop_sequence=plan.stop_sequence, stop_token_id=plan.stop_token
    )
    # What the reply already holds is read like a prompt, and counted so.
    held = len(request.continue_from.token_ids) or tokens.words(request.continue_from.text)
    finished.usage.prompt_token_count = tokens.count_tokens(request.messages, request.tools) + held
    finished.usage.output_token_count = len(plan.deltas)
    finished.usage.reasoning_token_count = plan.reasoning_token_count
    first = since if talk.first_delta is None else talk.first_delta
    finished.timings.queue_duration.FromNanoseconds(0)
    finished.timings.load_duration.FromNanoseconds(round(load_seconds * 1e9))
    finished.timings.first_delta_duration.FromNanoseconds(round((first - since) * 1e9))
    finished.timings.generation_duration.FromNanoseconds(round(max(0.0, talk.last_delta - first) * 1e9))
    return finished


def _weights(model: ScriptedModel) -> pb.WeightIdentity:
    return pb.WeightIdentity(family="scripted", quantization="none", digest=tokens.digest_of(model.key))


def _now() -> float:
    return asyncio.get_running_loop().time()


class RawServicer(InferenceServicer):
    """Writes the events of `Generate` as the engine numbered them, where the kit's edge would number them.

    With it a lost or repeated event can be seen on the wire. The engine must have been made with `numbered`.
    """

    async def Generate(  # type: ignore[override]  # stubs know only generators
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Streams a reply."""

        async def send(event: Event) -> None:
            await write(context, event)

        async with self._edge.serve(context, f"{INFERENCE_SERVICE}/Generate") as visit:
            await self._engine.generate(self._call(request, context, visit), send)


def raw(engine: ScriptedEngine) -> Register:
    """Returns what `serving(more=[...])` needs to serve an engine through `RawServicer`."""

    def register(server: grpc.aio.Server, edge: Edge) -> list[str]:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(RawServicer(engine, edge), server)
        return [INFERENCE_SERVICE]

    return register


def main(argv: Sequence[str] | None = None) -> int:
    """Serves a scripted engine as a process and returns its exit code."""
    arguments = _parser().parse_args(argv)
    tracing = telemetry.setup(
        f"forebay-{arguments.name}",
        telemetry.TelemetrySettings.model_validate({"otlp_endpoint": arguments.otlp}),
    )
    try:
        asyncio.run(_serve(arguments, tracing))
    finally:
        tracing.shutdown()
    return 0


async def _serve(arguments: argparse.Namespace, tracing: telemetry.Telemetry) -> None:
    with contextlib.ExitStack() as files:
        journal = None
        if arguments.journal is not None:
            journal = files.enter_context(arguments.journal.open("a", buffering=1))

        def note(record: Record) -> None:
            if journal is not None:
                journal.write(record.to_json() + "\n")
            if len(engine.records) > _KEPT:  # nobody reads them here, and a soak makes a million
                del engine.records[: _KEPT // 2]

        engine = ScriptedEngine(
            name=arguments.name,
            models=_models(arguments, arguments.models),
            pullable=_models(arguments, arguments.pullable),
            slots=arguments.slots,
            queue=arguments.queue,
            chaos=arguments.chaos,
            numbered=arguments.raw,
            on_change=note,
        )
        settings = ServerSettings.model_validate(
            {"address": arguments.address, "grace": arguments.grace, "notice": arguments.notice}
        )
        # The block of signals is the outer one: a SIGTERM counts from the first moment on.
        async with (
            process.stop_requests() as stopped,
            serving(
                settings,
                inference=None if arguments.raw else engine,
                models=engine,
                more=[raw(engine)] if arguments.raw else [],
                telemetry=tracing,
            ) as up,
        ):
            process.announce("scripted", up.address)
            await asyncio.sleep(arguments.ready_delay)
            await up.set_ready(True)
            await stopped.wait()


def _models(arguments: argparse.Namespace, names: Sequence[str]) -> list[ScriptedModel]:
    script = Script(
        token_count=arguments.token_count,
        reasoning_token_count=arguments.reasoning_token_count,
        tool_call_count=arguments.tool_call_count,
        token_delay=arguments.token_delay,
        first_delay=arguments.first_delay,
        progress_delay=arguments.progress_delay,
        load_delay=arguments.load_delay,
        unwind_delay=arguments.unwind_delay,
        fault=arguments.fault,
    )
    return [
        ScriptedModel(
            name=name,
            script=script,
            capabilities=DEFAULT_CAPABILITIES - arguments.without,
            context_token_count=arguments.context,
            dimension_count=arguments.dimensions,
            weights=arguments.weights,
            loaded=not arguments.unloaded,
        )
        for name in names
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m forebay.testing.scripted", description="Serves a scripted engine."
    )

    def seconds(text: str) -> float:
        return parse_duration(text).total_seconds()

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    def capabilities(text: str) -> frozenset[pb.Capability.ValueType]:
        return frozenset(pb.Capability.Value(f"CAPABILITY_{name.upper()}") for name in names(text))

    def chaos(text: str) -> Chaos:
        seed, rate, *deltas = text.split(":")
        chaos = Chaos(seed=int(seed), rate=float(rate))
        return replace(chaos, deltas=int(deltas[0])) if deltas else chaos

    usual = Script()
    parser.add_argument("--address", default="127.0.0.1:0", help="address to listen on")
    parser.add_argument("--name", default="scripted", help="the backend's name in answers")
    parser.add_argument("--models", type=names, default=["scripted"], help="models, with commas between")
    parser.add_argument("--pullable", type=names, default=[], help="models that can be fetched")
    parser.add_argument("--weights", default="", help="equal weights say the same; default: the model's name")
    parser.add_argument("--without", type=capabilities, default=frozenset(), help="such as tools,seed")
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and reply together")
    parser.add_argument("--dimensions", type=int, default=8, help="components of embeddings")
    parser.add_argument("--unloaded", action="store_true", help="models are not in memory from the start")
    parser.add_argument("--slots", type=int, help="most calls at once; default: no limit")
    parser.add_argument("--queue", type=int, default=64, help="most calls that wait for a slot")
    parser.add_argument("--token-count", type=int, default=usual.token_count)
    parser.add_argument("--reasoning-token-count", type=int, default=usual.reasoning_token_count)
    parser.add_argument("--tool-call-count", type=int, default=usual.tool_call_count)
    parser.add_argument("--token-delay", type=seconds, default=usual.token_delay, help="such as 10ms")
    parser.add_argument("--first-delay", type=seconds, default=usual.first_delay)
    parser.add_argument("--progress-delay", type=seconds, default=usual.progress_delay)
    parser.add_argument("--load-delay", type=seconds, default=usual.load_delay)
    parser.add_argument("--unwind-delay", type=seconds, default=usual.unwind_delay)
    parser.add_argument("--ready-delay", type=seconds, default=0.0, help="time until health says SERVING")
    parser.add_argument("--fault", type=Fault.parse, help="such as UNAVAILABLE@3, STALL@before or EXIT@5x1")
    parser.add_argument("--chaos", type=chaos, help="SEED:RATE or SEED:RATE:DELTAS, faults by chance")
    parser.add_argument("--journal", type=Path, help="file for a line of JSON whenever a call begins or ends")
    parser.add_argument("--raw", action="store_true", help="keep the engine's numbers, with their gaps")
    parser.add_argument("--otlp", default="", help="OTLP endpoint for traces")
    parser.add_argument("--grace", default="30s", help="how long calls may go on after SIGTERM")
    parser.add_argument("--notice", default="200ms", help="time between NOT_SERVING and refusing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
