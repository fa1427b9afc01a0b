"""The engine behind the bridge: finds the server, admits calls, and relays what it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Final

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.failure import CapabilityUnsupported, Failure, InvalidRequest, ModelNotFound
from forebay.kit.pipeline import Call, Send
from forebay.models.v1 import models_pb2 as models_pb
from forebay.openai_bridge.client import PATHS, Client, Identity, Offer
from forebay.openai_bridge.config import OpenAiSettings
from forebay.openai_bridge.loading import Loader
from forebay.openai_bridge.relay import Relay
from forebay.openai_bridge.translate import OPTIONS_KEY, Shortfalls, chat_body, count_body, embed_body
from forebay.upstream.admission import Admission, tell_queued
from forebay.upstream.embeds import Batch, Embedder
from forebay.upstream.errors import translated
from forebay.upstream.http import Upstream
from forebay.upstream.presence import Change, watch_presence
from forebay.upstream.stats import Stats
from forebay.upstream.tasks import OwnedTasks

_log = logging.getLogger(__name__)

DEFAULT_SLOTS: Final = 4
"""Calls at once where neither the settings nor the server say: llama-server's own default."""

_LISTED_FOR: Final = 3.0  # seconds a list of models is taken for true: a burst of calls asks once


class OpenAiEngine:
    """Serves inference and models of one OpenAI-compatible server.

    Used as `async with OpenAiEngine(settings) as engine`. The server need not
    be there: calls fail with `BackendUnavailable` until it is.

    Args:
        settings: where the server is, and how much it may be given.
        token: the server's API key.
    """

    def __init__(self, settings: OpenAiSettings, *, token: str = "") -> None:
        self._settings = settings
        self._name = settings.name
        self._upstream = Upstream(
            settings.base_url,
            allowed=PATHS,
            name=settings.name,
            token=token,
            host=settings.host_header,
            connect_timeout=settings.connect_timeout.total_seconds(),
            line_limit=settings.line_limit,
            keepalive=0,  # eight idle connections are all the threads that a llama-server has
        )
        self._client = Client(self._upstream, flavor=settings.flavor)
        self._admission = Admission(
            name=settings.name,
            slots=settings.slots or DEFAULT_SLOTS,
            queue=settings.queue,
            max_wait=_seconds(settings.queue_timeout),
        )
        self._embedder = Embedder(
            backend=settings.name,
            batch_texts=settings.embed_batch_texts,
            batch_characters=settings.embed_batch_characters,
            concurrency=settings.embed_concurrency,
            cache_bytes=settings.embed_cache,
            cache_ttl=settings.embed_cache_ttl,
        )
        self._first_byte = _seconds(settings.first_byte_timeout)
        self._between_bytes = _seconds(settings.between_bytes_timeout)
        self._identity: Identity | None = None
        self._epoch = 0
        self._listed: list[Offer] = []
        self._listed_at = float("-inf")
        self._tasks = OwnedTasks()
        self._loader = Loader(
            self._client,
            self._look,
            self._tasks,
            timeout=settings.load_timeout.total_seconds(),
            keep=_seconds(settings.keep_alive),
            pinned=settings.pinned,
        )
        self._exit = AsyncExitStack()
        self.stats = Stats()
        """Outcomes and latencies."""

    def __repr__(self) -> str:
        kind = self._identity.flavor.name if self._identity else "absent"
        return f"<OpenAiEngine {self._name} {self._upstream.base_url} {kind} {self._admission!r}>"

    async def __aenter__(self) -> OpenAiEngine:
        await self._exit.enter_async_context(self._upstream)
        await self._exit.enter_async_context(self._tasks)
        self._tasks.create_task(self._loader.reap())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._exit.__aexit__(kind, error, trace)

    def watch(self, change: Change) -> None:
        """Tells from now on, through `change`, whether the server can serve."""
        interval = self._settings.probe_interval.total_seconds()
        self._tasks.create_task(
            watch_presence(self._probe, change, name=self._name, interval=max(0.05, interval))
        )

    # Inference

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """Sends `progress* started progress* delta* finished`."""
        with self._counted():
            request = call.request
            identity, offer = await self._find(request.model)
            shortfalls = Shortfalls(accepted=request.accepted_degradations, backend=self._name)
            vision = identity.vision if offer.vision is None else offer.vision
            body = chat_body(
                request, model=offer.id, flavor=identity.flavor, vision=vision, shortfalls=shortfalls
            )
            async with self._admission.hold(call, tell_queued(send)) as waited:
                with self._loader.using(offer.id):
                    loading = await self._ready(identity, offer, _tell_loading(send))
                    relay = Relay(
                        call,
                        send,
                        offer=offer,
                        shortfalls=shortfalls,
                        stops=() if identity.flavor.stops else request.limits.stop_sequences,
                        backend=self._name,
                    )
                    finished = await relay.run(
                        self._client,
                        body,
                        identity.flavor,
                        first_byte=self._first_byte,
                        between_bytes=self._between_bytes,
                    )
                timings = finished.timings
                timings.queue_duration.FromTimedelta(timedelta(seconds=waited))
                timings.load_duration.FromTimedelta(timedelta(seconds=loading))
                self.stats.first_delta.add(timings.first_delta_duration.ToTimedelta().total_seconds())
                await send(pb.GenerateResponse(finished=finished))

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """Embeds the texts, in order."""
        with self._counted():
            request = call.request
            identity, offer = await self._find(request.model)
            if not identity.flavor.embeds:
                raise CapabilityUnsupported(
                    f"{self._name} has no embeddings", metadata={"backend": self._name}
                )
            embed_body(request, (), model=offer.id, flavor=identity.flavor)  # refuses bad options at once

            async def fetch(texts: Sequence[str]) -> Batch:
                body = embed_body(request, texts, model=offer.id, flavor=identity.flavor)
                with translated(backend=self._name, model=request.model):
                    return await self._client.embed(body, len(texts), timeout=self._first_byte)

            known = f"{self._epoch}/{offer.fingerprint}"
            async with self._admission.hold(call):
                with self._loader.using(offer.id):
                    await self._ready(identity, offer)
                    response = await self._embedder.embed(
                        call,
                        fetch,
                        identity="" if OPTIONS_KEY in request.backend_options else known,
                    )
            response.weights.CopyFrom(offer.weights)
            return response

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """Counts the tokens of a conversation, with the model's own chat template."""
        with self._counted():
            request = call.request
            identity, offer = await self._find(request.model)
            body = count_body(request, model=offer.id, flavor=identity.flavor, backend=self._name)
            with self._loader.using(offer.id):
                await self._ready(identity, offer)
                with translated(backend=self._name, model=request.model):
                    count = await self._client.count(body, flavor=identity.flavor)
            return pb.CountTokensResponse(token_count=count, backend=self._name, model=request.model)

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Lists the models that the server offers. Loads none."""
        if request.backends and self._name not in request.backends:
            return pb.ListModelsResponse()
        identity = await self._known()
        offers = await self._offers(identity, fresh=True)
        return pb.ListModelsResponse(models=[self._model(identity, offer) for offer in offers])

    # Models

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        """Describes one model."""
        identity, offer = await self._find(request.model, fresh=True)
        return models_pb.GetModelResponse(model=self._model(identity, offer))

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """Loads a model, where the server is a llama-server that can. Who leaves does not stop the load."""
        identity, offer = await self._find(request.model, fresh=True)
        self._needs_router(identity, "load models")
        if request.HasField("context_token_count"):
            raise CapabilityUnsupported(
                f"{self._name} cannot choose a context; set it where the server is started",
                metadata={"backend": self._name, "field": "context_token_count"},
            )
        if OPTIONS_KEY in request.backend_options:
            raise InvalidRequest(
                f"{self._name} knows no options for a load",
                violations=[(f"backend_options.{OPTIONS_KEY}", "leave it out")],
            )

        async def tell(detail: str) -> None:
            await send(models_pb.LoadModelResponse(progress=models_pb.LoadProgress(detail=detail)))

        seconds = await self._ready(identity, offer, tell)
        asked = request.HasField("keep_alive_duration")
        keep = request.keep_alive_duration.ToTimedelta().total_seconds() if asked else None
        self._loader.keep(offer.id, seconds=keep, pinned=request.pinned)
        _, loaded = await self._find(request.model, fresh=True)
        event = models_pb.ModelLoaded(model=self._model(identity, loaded))
        event.load_duration.FromTimedelta(timedelta(seconds=seconds))
        await send(models_pb.LoadModelResponse(loaded=event))

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Unloads a model, where the server is a llama-server that can. Its calls end first unless forced."""
        identity, offer = await self._find(request.model, fresh=True)
        self._needs_router(identity, "unload models")
        await self._loader.unload(offer.id, force=request.force)
        _, left = await self._find(request.model, fresh=True)
        return models_pb.UnloadModelResponse(model=self._model(identity, left))

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """Refuses: the dialect has no such operation."""
        raise CapabilityUnsupported(f"{self._name} cannot fetch models", metadata={"backend": self._name})

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Refuses: the dialect has no such operation."""
        raise CapabilityUnsupported(f"{self._name} cannot delete models", metadata={"backend": self._name})

    # The server

    async def _probe(self) -> None:
        """Asks whether the server can serve, and what it is if that is not known."""
        if self._identity is None:
            identity = await self._known()
            if identity.router:
                self._pin()
            return
        try:
            await self._client.probe(self._identity.flavor)
        except Failure:
            self._forget()
            raise

    async def _known(self) -> Identity:
        """Returns what the server is, asking it if that is not known."""
        if self._identity is None:
            identity = await self._client.identify()
            self._identity = identity
            self._epoch += 1  # whatever answers now may have other weights under the old names
            self._listed_at = float("-inf")
            if not self._settings.slots:
                self._admission.resize(identity.slots or DEFAULT_SLOTS)
            _log.info("%s is %s%s", self._name, identity.flavor.name, " (router)" if identity.router else "")
        return self._identity

    def _forget(self) -> None:
        self._identity = None
        self._listed_at = float("-inf")

    async def _offers(self, identity: Identity, *, fresh: bool = False) -> list[Offer]:
        clock = asyncio.get_running_loop().time
        if fresh or clock() - self._listed_at > _LISTED_FOR:
            offers = await self._client.offers(identity)
            if only := self._settings.models:
                offers = [offer for offer in offers if any(offer.answers_to(name) for name in only)]
            self._listed, self._listed_at = offers, clock()
        return self._listed

    async def _find(self, model: str, *, fresh: bool = False) -> tuple[Identity, Offer]:
        """Returns the model of a name.

        It is looked for before anything is sent: llama-server answers to any
        name with the model it has, and mlx_lm.server downloads what it does
        not know.
        """
        identity = await self._known()
        for again in (fresh, True):
            for offer in await self._offers(identity, fresh=again):
                if offer.answers_to(model):
                    return identity, offer
            if again:
                break
        names = ", ".join(offer.id for offer in self._listed[:8]) or "none"
        raise ModelNotFound(
            f"{self._name} has no model {model!r}; it has {names}",
            metadata={"backend": self._name, "model": model},
        )

    def _needs_router(self, identity: Identity, what: str) -> None:
        if not identity.router:
            raise CapabilityUnsupported(
                f"{self._name} cannot {what}: only a llama-server that was started without a model can",
                metadata={"backend": self._name, "flavor": identity.flavor.name},
            )

    async def _ready(
        self, identity: Identity, offer: Offer, tell: Callable[[str], Awaitable[None]] | None = None
    ) -> float:
        """Returns when the model can answer; the result is the seconds that loading it took."""
        return await self._loader.ready(offer, tell) if identity.router else 0.0

    async def _look(self, model: str) -> Offer | None:
        offers = await self._offers(await self._known(), fresh=True)
        return next((offer for offer in offers if offer.id == model), None)

    def _pin(self) -> None:
        """Begins to load the models that are to be there from the start."""
        for name in self._settings.pinned:
            self._tasks.create_task(self._load_pinned(name))

    async def _load_pinned(self, name: str) -> None:
        try:
            identity, offer = await self._find(name)
            await self._ready(identity, offer)
        except Failure as failure:
            _log.warning("%s cannot load pinned model %s: %s", self._name, name, failure.message)

    def _model(self, identity: Identity, offer: Offer) -> pb.Model:
        model = pb.Model(
            id=offer.id,
            backend=self._name,
            state=offer.state,
            context_token_count=offer.context,
            loaded_context_token_count=offer.loaded_context,
            memory_bytes=offer.size,
            disk_bytes=offer.size,
            slot_count=identity.slots,
            weights=offer.weights,
            aliases=offer.aliases,
            detail=offer.detail,
        )
        for capability, can in _capabilities(identity, offer).items():
            support = pb.CapabilityReport.SUPPORT_YES if can else pb.CapabilityReport.SUPPORT_NO
            model.capabilities.add(capability=capability, support=support)
        lease = self._loader.lease(offer.id)
        if lease is not None and (ends := lease.ends_at()) is not None:
            left = ends - asyncio.get_running_loop().time()
            model.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=left))
        return model

    @contextmanager
    def _counted(self) -> Iterator[None]:
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            yield
        except Failure as failure:
            self.stats.count(failure.reason)
            raise
        except asyncio.CancelledError:
            self.stats.count("cancelled")
            raise
        self.stats.count("ok")
        self.stats.whole.add(clock() - began)


def _capabilities(identity: Identity, offer: Offer) -> dict[pb.Capability.ValueType, bool]:
    """Returns what is known of a model. What depends on its chat template is not."""
    flavor = identity.flavor
    known: dict[pb.Capability.ValueType, bool] = {
        pb.CAPABILITY_GENERATE: True,
        pb.CAPABILITY_JSON_SCHEMA: flavor.output_format,
        pb.CAPABILITY_GRAMMAR: False,
        pb.CAPABILITY_SEED: "seed" in flavor.sampling,
        pb.CAPABILITY_LOGPROBS: flavor.top_logprobs is not None,
        pb.CAPABILITY_CONTINUE: flavor.continues,
        pb.CAPABILITY_COUNT_TOKENS: flavor.counts,
        pb.CAPABILITY_TOKEN_IDS: flavor.token_ids,
        pb.CAPABILITY_STOP_TOKEN_IDS: False,
    }
    vision = offer.vision if offer.vision is not None else (False if not identity.vision else None)
    if not flavor.images:
        vision = False
    if vision is not None:
        known[pb.CAPABILITY_VISION] = vision
    if not flavor.embeds:
        known[pb.CAPABILITY_EMBED] = False
    elif identity.embeds is not None:
        known[pb.CAPABILITY_EMBED] = identity.embeds
    return known


def _tell_loading(send: Send) -> Callable[[str], Awaitable[None]]:
    async def tell(_: str) -> None:
        await send(pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_LOADING)))

    return tell


def _seconds(span: timedelta | None) -> float | None:
    return None if span is None else span.total_seconds()
