"""LM Studio as an engine: calls of ours in, its REST APIs out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Final

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.failure import (
    BackendUnavailable,
    CapabilityUnsupported,
    Failure,
    ModelNotFound,
    StreamInterrupted,
    WrongModel,
)
from forebay.kit.pipeline import Call, Send
from forebay.lmstudio_bridge import native, translate
from forebay.lmstudio_bridge.client import LmStudioClient
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.flight import take_off
from forebay.lmstudio_bridge.listing import Dialect, Entry
from forebay.lmstudio_bridge.memory import LISTING_AGE, Memory, Ready, too_small
from forebay.lmstudio_bridge.pulls import Pulls
from forebay.lmstudio_bridge.reply import ChatReply
from forebay.lmstudio_bridge.translate import Options, Shortfalls
from forebay.models.v1 import models_pb2 as models_pb
from forebay.upstream.embeds import Batch, Embedder
from forebay.upstream.errors import UpstreamError, to_failure
from forebay.upstream.presence import Change, watch_presence
from forebay.upstream.tasks import OwnedTasks

logger = logging.getLogger(__name__)

_NO_IMAGES: Final = ("does not support images", "image input is not supported")


@dataclass(slots=True)
class _Telling:
    """One reply on its way to its caller."""

    call: Call[pb.GenerateRequest]
    send: Send
    ready: Ready
    shortfalls: Shortfalls
    began: float
    queued: float = 0.0
    started: bool = False
    first: float | None = None
    last: float | None = None

    @property
    def request(self) -> pb.GenerateRequest:
        """What was asked."""
        return self.call.request


class LmStudioEngine:
    """Serves both of Forebay's interfaces through one LM Studio.

    Used as `async with LmStudioEngine(settings, client) as engine`; its loads and
    downloads end with the block.

    Args:
        settings: how it behaves.
        client: LM Studio.
    """

    def __init__(self, settings: LmStudioSettings, client: LmStudioClient) -> None:
        self._settings = settings
        self._name = settings.name
        self._client = client
        self._tasks = OwnedTasks()
        self._memory = Memory(client, settings, self._tasks)
        self._pulls = Pulls(client, self._memory, settings, self._tasks)
        self._embedder = Embedder(
            backend=settings.name,
            batch_texts=settings.embed_batch_texts,
            batch_characters=settings.embed_batch_characters,
            concurrency=settings.embed_concurrency,
            cache_bytes=settings.embed_cache,
            cache_ttl=settings.embed_cache_ttl,
        )
        self._reports_logprobs: bool | None = None
        self._preloaded = False

    def __repr__(self) -> str:
        return f"<LmStudioEngine {self._client!r} {self._memory!r}>"

    async def __aenter__(self) -> LmStudioEngine:
        await self._tasks.__aenter__()
        self._tasks.create_task(self._memory.expire())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._tasks.__aexit__(None, None, None)

    async def watch(self, change: Change) -> None:
        """Looks, until cancelled, whether LM Studio is there, and says so; loads what is to be preloaded."""

        async def changed(serves: bool, why: str) -> None:
            if serves:
                self._preload()
            else:
                self._client.forget()
                self._memory.forget()
                self._preloaded = False
            await change(serves, why)

        await watch_presence(
            self._client.probe,
            changed,
            name=self._name,
            interval=self._settings.probe_interval.total_seconds(),
        )

    def _preload(self) -> None:
        if not self._preloaded:
            self._preloaded = True
            for key in self._settings.preload:
                self._tasks.create_task(self._preload_one(key))

    async def _preload_one(self, key: str) -> None:
        try:
            await self._memory.ready(key, fresh=True)
        except Failure as failure:
            logger.warning("%s could not preload %s: %s", self._name, key, failure.message)

    # Inference

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """Streams a reply. See `InferenceEngine`."""
        began = asyncio.get_running_loop().time()
        options = translate.read_options(call.request.backend_options)
        ready = await self._ready(call, send, options)
        for attempt in (0, 1):
            telling = _Telling(call, send, ready, self._shortfalls(call.request, ready.entry), began)
            try:
                await self._generate(telling, options)
                return
            except ModelNotFound:
                # It was unloaded, or loaded again under another name, since we looked.
                if attempt or telling.started:
                    raise
            except CapabilityUnsupported:
                accepts = pb.DEGRADATION_KIND_IMAGE_DROPPED in call.request.accepted_degradations
                if attempt or telling.started or not accepts or not self._memory.is_blind(ready.entry.key):
                    raise
            ready = await self._ready(call, send, options, fresh=True)

    def _shortfalls(self, request: pb.GenerateRequest, entry: Entry) -> Shortfalls:
        return Shortfalls(request.accepted_degradations, backend=self._name, model=entry.key)

    async def _ready(
        self, call: Call[pb.GenerateRequest], send: Send, options: Options, *, fresh: bool = False
    ) -> Ready:
        async def loading(detail: str) -> None:
            del detail
            await send(_progress(pb.Progress.STAGE_LOADING))

        entry = await self._memory.find(call.request.model, max_age=0.0 if fresh else LISTING_AGE)
        if entry.kind == "embedding":
            raise CapabilityUnsupported(
                f"{entry.key} is an embedding model and generates nothing",
                metadata={"backend": self._name, "model": entry.key},
            )
        # Refuses what cannot be served before it loads anything for it.
        self._body(call.request, entry, entry.key, options, self._shortfalls(call.request, entry))
        return await self._memory.ready(call.request.model, loading=loading, ttl=options.ttl, fresh=fresh)

    def _body(
        self,
        request: pb.GenerateRequest,
        entry: Entry,
        model: str,
        options: Options,
        shortfalls: Shortfalls,
    ) -> tuple[dict[str, object], bool]:
        """Returns the body of a request upstream, and whether it is for the native chat."""
        if self._settings.native_chat and self._client.dialect is Dialect.NATIVE:
            body = native.chat_body(
                request, entry=entry, model=model, options=options, item=self._client.item
            )
            if body is not None:
                return body, True
        jit = self._client.dialect is not Dialect.NATIVE
        return (
            translate.chat_body(
                request,
                entry=entry,
                model=model,
                options=options,
                shortfalls=shortfalls,
                backend=self._name,
                jit=jit,
            ),
            False,
        )

    async def _generate(self, telling: _Telling, options: Options) -> None:
        request, ready = telling.request, telling.ready
        body, is_native = self._body(request, ready.entry, ready.name, options, telling.shortfalls)
        reply: ChatReply | native.NativeReply = (
            native.NativeReply(backend=self._name, limit=request.limits.max_output_token_count)
            if is_native
            else ChatReply(request, backend=self._name, context_length=ready.context_length)
        )

        async def queued(ahead: int) -> None:
            progress = _progress(pb.Progress.STAGE_QUEUED)
            progress.progress.queue_position = ahead
            await telling.send(progress)

        async with AsyncExitStack() as held:
            # In use from here, so that it is not unloaded while the call waits for its slot.
            held.enter_context(self._memory.using(ready, ttl=options.ttl))
            admission = self._memory.admission(ready.entry)
            telling.queued = await held.enter_async_context(admission.hold(telling.call, queued))
            await telling.send(_progress(pb.Progress.STAGE_PREFILLING))
            try:
                flight = await take_off(
                    self._tasks,
                    held.pop_all(),
                    lambda: self._client.native_chat(body) if is_native else self._client.chat(body),
                    patient=self._settings.greeting,
                )
                async with flight as events:
                    async for event in events:
                        await self._tell(telling, reply, reply.feed(event))
                        if reply.done:
                            break
                deltas, finished = reply.finish()
            except UpstreamError as error:
                if ready.entry.vision is None and error.says(*_NO_IMAGES):
                    self._memory.note_blind(ready.entry.key)
                raise to_failure(
                    error, backend=self._name, model=request.model, started=telling.first is not None
                ) from error
            except StreamInterrupted as error:
                if telling.first is not None:
                    raise
                raise BackendUnavailable(error.message, metadata=error.metadata) from error
        await self._tell(telling, reply, deltas)
        await self._start(telling, reply, None)
        self._time(telling, finished)
        await telling.send(pb.GenerateResponse(finished=finished))

    async def _tell(
        self,
        telling: _Telling,
        reply: ChatReply | native.NativeReply,
        parts: Sequence[pb.Delta | pb.Progress],
    ) -> None:
        for part in parts:
            if isinstance(part, pb.Progress):
                await telling.send(pb.GenerateResponse(progress=part))
                continue
            await self._start(telling, reply, part)
            telling.last = asyncio.get_running_loop().time()
            if telling.first is None:
                telling.first = telling.last
            await telling.send(pb.GenerateResponse(delta=part))

    async def _start(
        self, telling: _Telling, reply: ChatReply | native.NativeReply, first: pb.Delta | None
    ) -> None:
        """Sends `started` before the first delta, when it is known who answers and how well."""
        if telling.started:
            return
        request, entry = telling.request, telling.ready.entry
        model = self._check_model(telling, reply.model)
        if request.HasField("logprobs") and first is not None and not first.HasField("tool_call"):
            self._reports_logprobs = bool(first.logprobs)
            if not first.logprobs:
                telling.shortfalls.add(
                    pb.DEGRADATION_KIND_OPTION_IGNORED,
                    "logprobs",
                    "this LM Studio does not report log probabilities",
                    "No log probabilities are given.",
                )
        telling.started = True
        started = pb.Started(
            backend=self._name,
            model=model,
            request_id=telling.call.request_id,
            degradations=telling.shortfalls.found,
        )
        if model == request.model:
            started.weights.CopyFrom(entry.weights())
        await telling.send(pb.GenerateResponse(started=started))

    def _check_model(self, telling: _Telling, said: str) -> str:
        """Returns the model that answers.

        Raises:
            WrongModel: it is not the one asked for, and the caller does not accept that.
        """
        request = telling.request
        if is_same_model(said, telling.ready):
            return request.model
        if pb.DEGRADATION_KIND_MODEL_SUBSTITUTED not in request.accepted_degradations:
            raise wrong_model(self._name, asked=request.model, said=said)
        telling.shortfalls.found.append(
            pb.Degradation(
                kind=pb.DEGRADATION_KIND_MODEL_SUBSTITUTED,
                field="model",
                detail="LM Studio answers with another model that it has loaded.",
            )
        )
        return said

    def _time(self, telling: _Telling, finished: pb.Finished) -> None:
        now = asyncio.get_running_loop().time()
        timings = finished.timings
        timings.queue_duration.FromTimedelta(timedelta(seconds=telling.queued))
        timings.load_duration.FromTimedelta(timedelta(seconds=telling.ready.load_seconds))
        first = telling.first if telling.first is not None else now
        timings.first_delta_duration.FromTimedelta(timedelta(seconds=first - telling.began))
        last = telling.last if telling.last is not None else first
        timings.generation_duration.FromTimedelta(timedelta(seconds=last - first))

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """Embeds texts. See `InferenceEngine`."""
        request = call.request
        options = translate.read_options(request.backend_options, draft=False)
        entry = await self._memory.find(request.model, max_age=LISTING_AGE)
        if entry.kind == "llm":
            raise CapabilityUnsupported(
                f"{entry.key} is no embedding model",
                metadata={"backend": self._name, "model": entry.key},
            )

        async def fetch(texts: Sequence[str]) -> Batch:
            ready = await self._memory.ready(request.model, ttl=options.ttl)
            with self._memory.using(ready, ttl=options.ttl):
                said, batch = await self._client.embed(ready.name, texts)
            if not is_same_model(said, ready):
                raise wrong_model(self._name, asked=request.model, said=said)
            return batch

        response = await self._embedder.embed(call, fetch, identity=entry.identity, model=request.model)
        response.weights.CopyFrom(entry.weights())
        return response

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """Refuses: LM Studio counts tokens over its SDK's own protocol only."""
        raise CapabilityUnsupported(
            "LM Studio's REST API cannot count tokens",
            metadata={"backend": self._name, "model": call.request.model},
        )

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Lists what LM Studio has on disk. See `InferenceEngine`."""
        del request  # there is one backend here, whichever names it holds
        return pb.ListModelsResponse(models=[self._model(entry) for entry in await self._memory.entries()])

    # Models

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        """Describes one model. See `ModelEngine`."""
        return models_pb.GetModelResponse(model=self._model(await self._memory.find(request.model)))

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """Loads a model. See `ModelEngine`."""
        options = translate.read_load_options(request.backend_options)
        if request.HasField("context_token_count"):
            options["context_length"] = request.context_token_count
        ttl: float | None = None
        if request.HasField("keep_alive_duration"):
            ttl = max(0.0, request.keep_alive_duration.ToTimedelta().total_seconds())

        async def loading(detail: str) -> None:
            await send(models_pb.LoadModelResponse(progress=models_pb.LoadProgress(detail=detail)))

        entry = await self._memory.find(request.model)
        if not entry.states_known:
            raise CapabilityUnsupported(
                f"{self._name} cannot load: LM Studio has that since 0.3.6; update it or load there",
                metadata={"backend": self._name, "model": entry.key},
            )
        ready = await self._memory.ready(request.model, loading=loading, options=options, ttl=ttl, fresh=True)
        wanted = options.get("context_length", 0)
        if 0 < ready.entry.context_length < min(wanted, ready.entry.max_context_length or wanted):
            raise too_small(ready.entry, wanted, backend=self._name)
        self._memory.keep(ready.entry.key, ttl=ttl, pinned=request.pinned)
        loaded = models_pb.ModelLoaded(model=self._model(ready.entry))
        loaded.load_duration.FromTimedelta(timedelta(seconds=ready.load_seconds))
        await send(models_pb.LoadModelResponse(loaded=loaded))

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """Fetches a model. See `ModelEngine`."""
        quantization = translate.read_quantization(request.backend_options)
        await self._memory.entries()  # finds out what this LM Studio can do, if that is not known
        entry = await self._pulls.pull(request.model, quantization, send)
        pulled = models_pb.ModelPulled(model=self._model(entry))
        await send(models_pb.PullModelResponse(pulled=pulled))

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Removes a model from memory. See `ModelEngine`."""
        entry = await self._memory.unload(request.model, force=request.force)
        return models_pb.UnloadModelResponse(model=self._model(entry))

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Refuses: LM Studio has no interface for it."""
        await self._memory.find(request.model)
        raise CapabilityUnsupported(
            "LM Studio cannot be asked to delete a model: remove it under My Models in its window",
            metadata={"backend": self._name, "model": request.model},
        )

    def _model(self, entry: Entry) -> pb.Model:
        memory = self._memory
        trouble = memory.trouble(entry.key)
        state = pb.Model.STATE_AVAILABLE
        if memory.is_leaving(entry.key):
            state = pb.Model.STATE_UNLOADING
        elif entry.instances:
            state, trouble = pb.Model.STATE_ACTIVE, ""
        elif entry.loading or memory.is_loading(entry.key):
            state, trouble = pb.Model.STATE_LOADING, ""
        elif trouble:
            state = pb.Model.STATE_FAILED
        model = pb.Model(
            id=entry.key,
            backend=self._name,
            state=state,
            context_token_count=entry.max_context_length,
            memory_bytes=entry.size_bytes,
            loaded_context_token_count=entry.context_length,
            slot_count=memory.admission(entry).slots if entry.instances else self._settings.slots,
            capabilities=entry.capabilities(
                reports_logprobs=self._reports_logprobs if entry.kind == "llm" else None
            ),
            weights=entry.weights(),
            aliases=[one.id for one in entry.instances if one.id != entry.key],
            disk_bytes=entry.size_bytes,
            detail=trouble,
        )
        left = memory.expires_in(entry.key)
        if left is not None:
            model.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=left))
        return model


def is_same_model(said: str, ready: Ready) -> bool:
    """Whether the model that LM Studio names is the one that was asked; silence counts as yes.

    Replies name the instance or the key, and embeddings add the variant, as in
    `nomic-embed-text-v1.5@q4_k_m`.
    """
    names = {ready.entry.key.lower(), ready.name.lower(), *(one.id.lower() for one in ready.entry.instances)}
    plain = said.lower()
    return not plain or plain in names or plain.partition("@")[0] in {one.partition("@")[0] for one in names}


def wrong_model(backend: str, *, asked: str, said: str) -> WrongModel:
    """Returns the failure of an answer by another model."""
    return WrongModel(
        f"{backend} answered with another model than {asked}; accept DEGRADATION_KIND_MODEL_SUBSTITUTED, or "
        "load the model",
        metadata={"backend": backend, "model": asked, "answering_model": said},
    )


def _progress(stage: pb.Progress.Stage.ValueType) -> pb.GenerateResponse:
    return pb.GenerateResponse(progress=pb.Progress(stage=stage))
