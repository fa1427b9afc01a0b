"""Serves Ollama's models by the contract.

A call is planned, waits for its slot, waits for its model, and is then one
request to `/api/chat`. Ollama queues requests for a loaded model without limit
and without a word, so the waiting is done here, where it is bounded and told.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendUnavailable,
    BrokenStream,
    CapabilityUnsupported,
    ContextExceeded,
    InvalidRequest,
    StreamInterrupted,
    WrongModel,
    printable,
)
from forebay.kit.pipeline import Call, Send
from forebay.ollama_bridge import translate
from forebay.ollama_bridge.client import ALLOWED, Client
from forebay.ollama_bridge.config import OllamaSettings, keep_alive_value
from forebay.ollama_bridge.library import Library
from forebay.ollama_bridge.models import Facts
from forebay.ollama_bridge.names import canonical
from forebay.ollama_bridge.reply import Reply
from forebay.ollama_bridge.tasks import background, ticking
from forebay.ollama_bridge.translate import Plan
from forebay.upstream.admission import Admission
from forebay.upstream.embeds import Batch, Embedder
from forebay.upstream.errors import UpstreamError, to_failure, translated
from forebay.upstream.http import Upstream
from forebay.upstream.values import JsonObject, array, integer, text

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Talk:
    """How far a call is. Times are on the clock of the running loop."""

    arrived: float
    """When it came."""
    queued: float = 0.0
    """Seconds it waited for its slot."""
    loaded: float = 0.0
    """Seconds it waited for its model."""
    room: int = 0
    """Tokens of prompt and reply that fit; 0 is not known."""
    first: float | None = None
    """When its first delta was sent."""
    last: float = 0.0
    """When its latest delta was sent."""
    begun: bool = False
    """Whether `started` was sent."""

    async def send(self, delta: pb.Delta, send: Send) -> None:
        """Sends a delta and takes the time."""
        self.last = _now()
        if self.first is None:
            self.first = self.last
        await send(pb.GenerateResponse(delta=delta))

    def finished(self, reply: Reply) -> pb.GenerateResponse:
        """Returns the last event."""
        first, last = self.first, self.last
        return pb.GenerateResponse(
            finished=reply.finished(
                queued=self.queued,
                loaded=self.loaded,
                first=None if first is None else first - self.arrived,
                spoke=0.0 if first is None else last - first,
            )
        )


class OllamaEngine:
    """An `InferenceEngine` over one Ollama server.

    Args:
        settings: how.
        upstream: the HTTP client, entered.
        group: owns loads and pulls.
    """

    def __init__(self, settings: OllamaSettings, upstream: Upstream, group: asyncio.TaskGroup) -> None:
        self._settings = settings
        self._name = settings.name
        self._group = group
        self._client = Client(upstream, name=self._name, timeout=settings.request_timeout.total_seconds())
        self._embedder = Embedder(
            backend=self._name,
            batch_texts=settings.embed_batch_texts,
            batch_characters=settings.embed_batch_characters,
            concurrency=settings.embed_concurrency,
            cache_bytes=settings.embed_cache_size,
            cache_ttl=settings.embed_cache_ttl,
        )
        self._admissions: dict[str, Admission] = {}
        self._fuses: defaultdict[str, set[asyncio.Timeout]] = defaultdict(set)
        self._warned = ""
        self.library = Library(settings, self._client, group)
        """The models, which are a `ModelEngine`."""
        self.library.break_off = self._break_off

    def __repr__(self) -> str:
        busy = " ".join(
            f"{key} {a.active}/{a.slots} queue {a.waiting}" for key, a in self._admissions.items()
        )
        return f"<OllamaEngine {self._name} {self.library.version.text or '?'} [{busy}]>"

    @classmethod
    @asynccontextmanager
    async def running(cls, settings: OllamaSettings) -> AsyncIterator[OllamaEngine]:
        """Runs an engine for the block. Loads and pulls that are under way at its end are broken off."""
        upstream = Upstream(
            settings.base_url,
            allowed=ALLOWED,
            name=settings.name,
            token=settings.token.get_secret_value(),
            host=settings.host_header,
        )
        async with upstream, background() as group:
            yield cls(settings, upstream, group)

    async def probe(self) -> None:
        """Asks for the server's version, which loads no model.

        Raises:
            BackendUnavailable: it does not answer as Ollama does.
        """
        version = self.library.version = await self._client.version()
        if version.warning and version.warning != self._warned:
            _log.warning("%s", version.warning)
        self._warned = version.warning

    def preload(self) -> None:
        """Begins to load the models that are to be in memory from the start."""
        for name in self._settings.preload:
            self._group.create_task(self.library.preload(name))

    # InferenceEngine

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """See `InferenceEngine.generate`."""
        request = call.request
        talk = _Talk(arrived=_now())
        facts = await self.library.find(request.model)
        setting = self.library.setting(facts)
        version = self.library.version
        plan = translate.plan(request, facts=facts, setting=setting, version=version, backend=self._name)

        async def queued(ahead: int) -> None:
            stage = pb.Progress(stage=pb.Progress.STAGE_QUEUED, queue_position=ahead)
            await send(pb.GenerateResponse(progress=stage))

        async def loading(_: float) -> None:
            await send(_progress(pb.Progress.STAGE_LOADING))

        async with (
            self._admission(facts).hold(call, queued) as talk.queued,
            self._breakable(facts.key, talk),
        ):
            loaded, talk.loaded = await self.library.ensure_loaded(facts, loading)
            talk.room = self.library.room(facts, loaded)
            if pb.DEGRADATION_KIND_PROMPT_TRUNCATED not in request.accepted_degradations:
                translate.check_fits(plan.words, talk.room, backend=self._name)
            while not talk.begun:
                try:
                    await self._chat(call, facts, plan, send, talk)
                except UpstreamError as error:
                    plan = self._second_chance(request, plan, talk, error)

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """See `InferenceEngine.embed`."""
        request = call.request
        facts = await self.library.find(request.model)
        body = self._embed_body(request, facts)
        truncates = pb.DEGRADATION_KIND_PROMPT_TRUNCATED in request.accepted_degradations
        cut: set[str] = set()

        async def fetch(texts: Sequence[str]) -> Batch:
            try:
                return await self._embed_batch(request.model, {**body, "input": list(texts)})
            except ContextExceeded:
                if not truncates or len(texts) > 1:
                    raise
                cut.update(texts)
                return await self._embed_batch(
                    request.model, {**body, "input": list(texts), "truncate": True}
                )

        talk = _Talk(arrived=_now())
        async with self._admission(facts).hold(call), self._breakable(facts.key, talk):
            await self.library.ensure_loaded(facts)
            # A vector of half a text must never be found later under the whole text.
            identity = "" if truncates or not facts.digest else f"{facts.key} {facts.digest}"
            response = await self._embedder.embed(call, fetch, identity=identity)
        response.weights.CopyFrom(facts.identity())
        for index, said in enumerate(request.texts):
            if said in cut:
                response.degradations.add(
                    kind=pb.DEGRADATION_KIND_PROMPT_TRUNCATED,
                    field=f"texts[{index}]",
                    detail="Only the beginning of the text is embedded.",
                )
        return response

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """See `InferenceEngine.count_tokens`. Ollama renders prompts for us and counts only what it runs."""
        raise CapabilityUnsupported(
            f"{self._name} counts tokens only of what it generates from", metadata={"backend": self._name}
        )

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """See `InferenceEngine.list_models`."""
        return pb.ListModelsResponse(models=await self.library.list_models())

    # What a call holds

    def _admission(self, facts: Facts) -> Admission:
        # Only models that exist come here, so this does not grow without bound.
        if facts.key not in self._admissions:
            self._admissions[facts.key] = Admission(
                name=self._name,
                slots=self.library.slots(facts),
                queue=self._settings.queue,
                max_wait=self._settings.queue_timeout.total_seconds(),
            )
        return self._admissions[facts.key]

    @asynccontextmanager
    async def _breakable(self, key: str, talk: _Talk) -> AsyncIterator[None]:
        """Lets `_break_off` end the block."""
        fuses = self._fuses[key]
        try:
            async with asyncio.timeout(None) as fuse:
                fuses.add(fuse)
                try:
                    yield
                finally:
                    fuses.discard(fuse)
        except TimeoutError as error:
            kind = StreamInterrupted if talk.begun else BackendUnavailable
            raise kind(f"{key} was unloaded by force", metadata={"backend": self._name}) from error

    def _break_off(self, key: str) -> None:
        for fuse in self._fuses[key]:
            fuse.reschedule(_now())

    # One chat

    async def _chat(
        self, call: Call[pb.GenerateRequest], facts: Facts, plan: Plan, send: Send, talk: _Talk
    ) -> None:
        """Sends one chat and passes its reply on.

        Raises:
            UpstreamError: the server refused it.
            Failure: the reply broke off.
        """
        version = self.library.version
        reply = Reply(
            backend=self._name,
            wants_logprobs="logprobs" in plan.body,
            splits_reasoning=not version.thinks,
            least_prompt_tokens=0 if version.counts_cached else plan.words,
        )

        async def waiting() -> None:
            here = await self.library.is_loaded(facts)
            await send(_progress(pb.Progress.STAGE_PREFILLING if here else pb.Progress.STAGE_LOADING))

        interval = self._settings.progress_interval.total_seconds()
        async with (
            ticking(interval, waiting) as stop_waiting,
            self._client.stream(
                "/api/chat",
                plan.body,
                first_byte=self._settings.first_token_timeout.total_seconds(),
                between_bytes=self._settings.stall_timeout.total_seconds(),
            ) as chunks,
        ):
            async for chunk in chunks:
                if not talk.begun:
                    started = self._started(call, facts, plan, chunk)
                    await stop_waiting()
                    talk.begun = True
                    await send(pb.GenerateResponse(started=started))
                for delta in reply.feed(chunk):
                    await talk.send(delta, send)
                if reply.done:
                    break  # whatever may come after the end is no part of the reply
        if not reply.done:
            kind = StreamInterrupted if talk.begun else BrokenStream
            raise kind(
                f"{self._name} ended its reply without saying that it is complete",
                metadata={"backend": self._name, "model": call.request.model},
            )
        self._check_whole(plan, reply, talk)
        await send(talk.finished(reply))

    def _started(
        self, call: Call[pb.GenerateRequest], facts: Facts, plan: Plan, chunk: JsonObject
    ) -> pb.Started:
        asked, answers = call.request.model, text(chunk, "model")
        started = pb.Started(
            backend=self._name,
            model=asked,
            request_id=call.request_id,
            degradations=plan.degradations,
            weights=facts.identity(),
        )
        if answers and canonical(answers) != facts.key:
            if pb.DEGRADATION_KIND_MODEL_SUBSTITUTED not in call.request.accepted_degradations:
                raise WrongModel(
                    f"{self._name} answered from {printable(answers)[:100]!r} and not from {asked!r}",
                    metadata={"backend": self._name, "model": asked, "answered": answers},
                )
            started.model = answers
            started.ClearField("weights")
            started.degradations.add(
                kind=pb.DEGRADATION_KIND_MODEL_SUBSTITUTED, field="model", detail="Another model answers."
            )
        return started

    def _second_chance(
        self, request: pb.GenerateRequest, plan: Plan, talk: _Talk, error: UpstreamError
    ) -> Plan:
        """Returns what to send in place of a chat that was refused, if the caller accepts what it lacks.

        Raises:
            Failure: there is nothing else to send.
        """
        failure = to_failure(error, backend=self._name, model=request.model, started=talk.begun)
        accepted = request.accepted_degradations
        if talk.begun:
            raise failure from error
        if isinstance(failure, ContextExceeded) and plan.body["truncate"] is False:
            kind = pb.DEGRADATION_KIND_PROMPT_TRUNCATED
            if kind in accepted:
                said = "The oldest messages are left out until the rest fits."
                return plan.with_(pb.Degradation(kind=kind, field="messages", detail=said), truncate=True)
        elif error.says("think value") and isinstance(plan.body.get("think"), str):
            kind = pb.DEGRADATION_KIND_OPTION_IGNORED
            if kind in accepted:
                said = "The model reasons as much as it does by itself."
                return plan.with_(
                    pb.Degradation(kind=kind, field="reasoning_effort", detail=said), think=True
                )
            raise CapabilityUnsupported(
                f"{request.model} reasons or does not, and has no degrees of it; leave reasoning_effort "
                f"unset or accept {pb.DegradationKind.Name(kind)}",
                metadata={"backend": self._name, "model": request.model, "field": "reasoning_effort"},
            ) from error
        raise failure from error

    def _check_whole(self, plan: Plan, reply: Reply, talk: _Talk) -> None:
        """Finds out whether the server dropped part of the prompt though it was told not to.

        A prompt has more tokens than words, so one with fewer tokens was cut, if
        it fills the context to a good part: some templates leave out a message.

        Raises:
            ContextExceeded: it did.
        """
        count = reply.prompt_tokens
        cut = self.library.version.counts_cached and max(1, talk.room // 2) <= count < plan.words
        if cut and talk.room and plan.body["truncate"] is False:
            raise ContextExceeded(
                f"{self._name} read {count} tokens of a prompt of at least {plan.words}: the reply is to "
                "part of the conversation",
                metadata={"backend": self._name, "prompt_token_count": str(plan.words)},
            )

    # Embeddings

    def _embed_body(self, request: pb.EmbedRequest, facts: Facts) -> JsonObject:
        """Returns what every request for these embeddings has in common.

        Raises:
            CapabilityUnsupported: the model does not embed.
            InvalidRequest: it has fewer components than are wanted, or an option cannot be sent.
        """
        if not facts.can("embedding"):
            raise CapabilityUnsupported(
                f"{request.model} generates text and cannot embed it",
                metadata={"backend": self._name, "model": request.model},
            )
        wanted = request.dimension_count if request.HasField("dimension_count") else 0
        if 0 < facts.dimensions < wanted:
            raise InvalidRequest(
                f"dimension_count: {request.model} has {facts.dimensions} components and not {wanted}",
                metadata={"backend": self._name, "dimension_count": str(facts.dimensions)},
                violations=[("dimension_count", f"must be at most {facts.dimensions}")],
            )
        setting = replace(self.library.setting(facts), shift=None)
        body: JsonObject = {**setting.body(request.model), "truncate": False}
        if "ollama" in request.backend_options:
            path = "backend_options[ollama]"
            keep_alive = translate.embed_options(request.backend_options["ollama"], setting, path)
            if keep_alive:
                body["keep_alive"] = keep_alive_value(keep_alive)
        if wanted:
            body["dimensions"] = wanted
        return body

    async def _embed_batch(self, model: str, body: JsonObject) -> Batch:
        with translated(backend=self._name, model=model):
            said = await self._client.post(
                "/api/embed", body, timeout=self._settings.first_token_timeout.total_seconds()
            )
        answers = text(said, "model")
        if answers and canonical(answers) != canonical(model):
            raise WrongModel(
                f"{self._name} answered from {printable(answers)[:100]!r} and not from {model!r}",
                metadata={"backend": self._name, "model": model, "answered": answers},
            )
        vectors = [
            [float(value) for value in array(vector) if isinstance(value, int | float)]
            for vector in array(said.get("embeddings"))
        ]
        return Batch(vectors=vectors, prompt_tokens=integer(said, "prompt_eval_count"))


def _progress(stage: pb.Progress.Stage.ValueType) -> pb.GenerateResponse:
    return pb.GenerateResponse(progress=pb.Progress(stage=stage))


def _now() -> float:
    return asyncio.get_running_loop().time()
