"""The MLX service's engine: finds the model, has it loaded, and passes the call to its worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import genai, telemetry
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.failure import (
    BackendUnavailable,
    CapabilityUnsupported,
    Failure,
    InvalidRequest,
    MemoryExhausted,
    ModelLoadFailed,
    ModelNotFound,
    PermissionDenied,
    StreamInterrupted,
)
from forebay.kit.pipeline import Call, Request, Send
from forebay.kit.relay import failure_of, relay_generate, relay_unary
from forebay.mlx_service.companions import Companions
from forebay.mlx_service.config import DIGESTS, AdapterSettings, MlxSettings
from forebay.mlx_service.default_model import (
    DEFAULT_EMBEDDING_MODEL,
    DEFAULT_MODEL,
    PackagedFolder,
    PackagedModel,
)
from forebay.mlx_service.fetch import (
    Progress,
    Report,
    ensure_default_model,
    ensure_packaged_folder,
    pull_from_hub,
)
from forebay.mlx_service.fetches import Fetches, Tell
from forebay.mlx_service.ledger import WANTED
from forebay.mlx_service.models.identity import known_digest
from forebay.mlx_service.process import Worker
from forebay.mlx_service.registry import Entry, Registry
from forebay.mlx_service.supervisor import Options, Prepare, Residence, State, Supervisor, Waiting
from forebay.models.v1 import models_pb2 as models_pb

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", pb.GenerateRequest, pb.EmbedRequest, pb.CountTokensRequest)


class MlxEngine:
    """Serves the models of this machine, each from a worker process of its own.

    Use it as a block: at its end no fetch is running.

    Args:
        settings: the service's settings.
        registry: what models there are.
        supervisor: keeps the workers.
        hub_cache: where models of the Hugging Face hub are kept.
        companions: what is loaded beside models. None is what the settings name.
        default: the embedded default model.
        embedding: the embedded default model for embeddings.
    """

    def __init__(
        self,
        settings: MlxSettings,
        *,
        registry: Registry,
        supervisor: Supervisor,
        hub_cache: Path,
        companions: Companions | None = None,
        default: PackagedModel = DEFAULT_MODEL,
        embedding: PackagedFolder = DEFAULT_EMBEDDING_MODEL,
    ) -> None:
        self._settings = settings
        self._name = settings.name
        self._registry = registry
        self._supervisor = supervisor
        self._hub_cache = hub_cache
        self._companions = companions or Companions(settings, registry)
        self._default = default
        self._embedding = embedding
        self._fetches = Fetches()

    def __repr__(self) -> str:
        return f"<MlxEngine {self._registry!r} {self._supervisor!r}>"

    async def __aenter__(self) -> MlxEngine:
        await self._fetches.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._fetches.__aexit__(*exc)

    async def preload(self) -> None:
        """Loads the models that are to be in memory from the start. What fails is logged, and listed."""
        for name in self._settings.preloaded:
            try:
                id_, prepare = await self._source(name)
                await self._supervisor.load(
                    id_, prepare, _no_one, self._options(id_, models_pb.LoadModelRequest(model=name))
                )
                if (adapter := self._companions.adapter(name)) is not None:
                    await self._load_adapter(adapter, (id_, prepare), _ignore)
            except Failure as failure:
                logger.warning("%s is not loaded at start: %s", name, failure.message)

    @contextlib.asynccontextmanager
    async def leased(self, name: str) -> AsyncIterator[Worker]:
        """Gives the worker of a model that generates, loading it if it is not in memory.

        Raises:
            Failure: there is no such model, or it cannot be loaded.
        """
        async with self._worker(await self._source(name, embeds=False), _no_one) as (_, worker):
            yield worker

    def residence(self, name: str) -> Residence:
        """Returns a model's place in memory, by identifier or alias."""
        return self._supervisor.residence(self._settings.aliases.get(name, name))

    # InferenceEngine

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """Has the model loaded, saying so, and relays its worker's events."""

        async def waiting(residence: Residence) -> None:
            fraction = self._supervisor.progress(residence)
            progress = pb.Progress(stage=pb.Progress.STAGE_LOADING, fraction=fraction)
            await send(pb.GenerateResponse(progress=progress))

        source = await self._source(call.request.model, embeds=False)
        async with self._worker(source, waiting) as (id_, worker):
            request = _for_worker(call, self._served(call.request.model, id_))
            with self._attempt(call, send) as watched:
                try:
                    await relay_generate(worker.stub.Generate, request, call, watched, self._name)
                except MemoryExhausted as failure:
                    if not await self._widened(id_, failure):
                        raise
                    await relay_generate(worker.stub.Generate, request, call, watched, self._name)

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """Has the model loaded and relays its worker's answer."""
        source = await self._source(call.request.model, embeds=True)
        async with self._worker(source, _no_one) as (id_, worker):
            with self._attempt(call):
                return await relay_unary(worker.stub.Embed, _for_worker(call, id_), call, self._name)

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """Has the model loaded and relays its worker's answer."""
        async with self._worker(await self._source(call.request.model), _no_one) as (id_, worker):
            with self._attempt(call):
                request = _for_worker(call, self._served(call.request.model, id_))
                return await relay_unary(worker.stub.CountTokens, request, call, self._name)

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Lists the models on disk and what became of those that were loaded."""
        if request.backends and self._name not in request.backends:
            return pb.ListModelsResponse()
        entries = await self._registry.entries()
        async with asyncio.TaskGroup() as tasks:
            models = [tasks.create_task(self._describe(entry)) for entry in entries]
        described = [task.result() for task in models]
        described += await self._companions.describe(described, self._usable)
        return pb.ListModelsResponse(models=described, memory=self._supervisor.memory())

    # ModelEngine

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        """Describes one model."""
        if (adapter := self._companions.adapter(request.model)) is not None:
            return models_pb.GetModelResponse(model=await self._describe_adapter(adapter))
        entry = await self._registry.find(request.model)
        return models_pb.GetModelResponse(model=await self._describe(entry))

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """Loads a model; one that failed or crashed too often is tried again."""
        if "mlx" in request.backend_options:
            raise InvalidRequest(
                "backend_options: MLX has no options for loading",
                violations=[("backend_options", "leave out the key mlx")],
            )

        async def waiting(residence: Residence) -> None:
            fraction = self._supervisor.progress(residence)
            progress = models_pb.LoadProgress(detail=residence.detail or "loading", fraction=fraction)
            await send(models_pb.LoadModelResponse(progress=progress))

        id_, prepare = await self._source(request.model)
        was_loaded = self._supervisor.residence(id_).state is State.ACTIVE
        options = self._options(id_, request)
        residence = await self._supervisor.load(id_, prepare, waiting, options)
        if (adapter := self._companions.adapter(request.model)) is not None:
            await self._load_adapter(adapter, (id_, prepare), send)
            return
        loaded = models_pb.ModelLoaded(model=await self._describe(await self._registry.find(id_)))
        if not was_loaded:
            loaded.load_duration.FromTimedelta(timedelta(seconds=residence.load_seconds))
        await send(models_pb.LoadModelResponse(loaded=loaded))

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """Fetches a default model, or one of the Hugging Face hub. Who asks for the same shares a fetch."""

        async def report(step: Progress) -> None:
            progress = models_pb.PullProgress(
                detail=step.what,
                digest=step.digest,
                total_bytes=step.total,
                completed_bytes=step.done,
            )
            await send(models_pb.PullModelResponse(progress=progress))

        entry = await self._pull(request.model, report)
        pulled = models_pb.ModelPulled(model=await self._describe(entry))
        await send(models_pb.PullModelResponse(pulled=pulled))

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Ends a model's worker; when this returns its memory is free."""
        if (adapter := self._companions.adapter(request.model)) is not None:
            return await self._unload_adapter(adapter, force=request.force)
        entry = await self._registry.find(request.model)
        await self._supervisor.unload(entry.id, force=request.force)
        return models_pb.UnloadModelResponse(model=await self._describe(entry))

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Removes a model of Forebay's cache or the hub's, after the last call that uses it."""
        if (adapter := self._companions.adapter(request.model)) is not None:
            raise PermissionDenied(
                f"{adapter.name} is an adapter in {adapter.path}, which is yours: take it out of `adapters`",
                metadata={"model": adapter.name},
            )
        entry = await self._registry.find(request.model)
        if entry.removable is None:
            raise PermissionDenied(
                f"{entry.id} is in {entry.path.parent}, which is yours: Forebay removes only what is in its "
                "own cache or the Hugging Face cache",
                metadata={"model": entry.id},
            )
        await self._supervisor.unload(entry.id, force=False)
        await asyncio.to_thread(_remove, entry.removable)
        if entry.id == self._default.id:
            await asyncio.to_thread(_remove, self._default.gguf(self._settings.cache_dir))
        self._registry.forget()
        return models_pb.DeleteModelResponse()

    # Adapters: models that live in their base model's worker.

    async def _load_adapter(
        self, adapter: AdapterSettings, base: tuple[str, Prepare], send: SendLoad
    ) -> None:
        async with self._worker(base, _no_one) as (id_, worker):
            try:
                await self._open_adapter(adapter, worker, send)
            except MemoryExhausted as failure:
                if not await self._widened(id_, failure):
                    raise
                await self._open_adapter(adapter, worker, send)
        loaded = models_pb.ModelLoaded(model=await self._describe_adapter(adapter))
        await send(models_pb.LoadModelResponse(loaded=loaded))

    async def _open_adapter(self, adapter: AdapterSettings, worker: Worker, send: SendLoad) -> None:
        try:
            async for event in worker.models.LoadModel(models_pb.LoadModelRequest(model=adapter.name)):
                if event.WhichOneof("event") == "progress":
                    await send(event)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            raise failure_of(error, self._name, committed=False) from error

    async def _unload_adapter(
        self, adapter: AdapterSettings, *, force: bool
    ) -> models_pb.UnloadModelResponse:
        id_, _ = await self._source(adapter.name)
        worker = self._supervisor.residence(id_).usable
        if worker is not None:
            request = models_pb.UnloadModelRequest(model=adapter.name, force=force)
            await relay_unary(worker.models.UnloadModel, request, None, self._name)
        return models_pb.UnloadModelResponse(model=await self._describe_adapter(adapter))

    async def _describe_adapter(self, adapter: AdapterSettings) -> pb.Model:
        bases = []
        with contextlib.suppress(ModelNotFound):
            bases.append(await self._describe(await self._registry.find(adapter.base)))
        described = await self._companions.describe(bases, self._usable)
        return next(model for model in described if model.id == adapter.name)

    def _usable(self, id_: str) -> Worker | None:
        return self._supervisor.residence(id_).usable

    async def _widened(self, id_: str, failure: MemoryExhausted) -> bool:
        """Gives a model's worker the memory that it refused for lack of. Returns whether it has it now.

        Only refusals before the first event name a limit that would do.
        """
        wanted = int(failure.metadata.get(WANTED, "0"))
        return bool(wanted) and await self._supervisor.widen(id_, wanted)

    def _served(self, name: str, id_: str) -> str:
        """By what name the worker of a model knows what a caller named."""
        return id_ if self._companions.adapter(name) is None else name

    # Below: what the calls above share.

    def _attempt(
        self, call: Call[RequestT], send: Send | None = None
    ) -> contextlib.AbstractContextManager[genai.Watched]:
        """Gives the call to the worker its span."""
        return genai.attempted(
            telemetry.current(), cast("Call[Request]", call), send, backend=self._name, address="worker"
        )

    @contextlib.asynccontextmanager
    async def _worker(
        self, source: tuple[str, Prepare], waiting: Waiting
    ) -> AsyncIterator[tuple[str, Worker]]:
        """Gives the worker of a model and the model's identifier, and reports a worker that is lost."""
        id_, prepare = source
        async with self._supervisor.lease(id_, prepare, waiting) as worker:
            try:
                yield id_, worker
            except (BackendUnavailable, StreamInterrupted):
                self._supervisor.residence(id_).doubt(worker)
                raise

    async def _source(self, name: str, *, embeds: bool | None = None) -> tuple[str, Prepare]:
        """Returns a model's identifier, and what gives the folder to load.

        Args:
            name: the model, by identifier or alias.
            embeds: whether it is to embed texts or to generate them. A model that does the other is refused
                here: loading it would take long, and memory from others, to say the same.
        """
        adapter = self._companions.adapter(name)
        name = name if adapter is None else adapter.base
        try:
            entry = await self._registry.find(name)
        except ModelNotFound as error:
            if adapter is not None:
                raise ModelNotFound(
                    f"the base model of adapter {adapter.name} is not here: {error.message}",
                    metadata={"model": adapter.name},
                ) from error
            id_ = self._settings.aliases.get(name, name)
            if id_ not in self._packaged or not self._settings.fetch_default_model:
                raise
            _check_purpose(id_, id_ == self._embedding.id, embeds)
            return id_, lambda report: self._fetch_packaged(id_, report)
        if entry.fault:
            metadata = {"model": entry.id} | ({"problem": entry.problem} if entry.problem else {})
            raise ModelLoadFailed(f"{entry.id} cannot be loaded: {entry.fault}", metadata=metadata)
        if entry.facts is not None:
            _check_purpose(entry.id, entry.facts.recipe is not None, embeds)
        return entry.id, lambda report: self._folder(entry, report)

    async def _folder(self, entry: Entry, report: Report) -> Path:
        await self._companions.prepare(entry.id, report)
        return await self._registry.folder(entry, report)

    @property
    def _packaged(self) -> tuple[str, str]:
        """Identifiers of the models that are fetched from the package index."""
        return self._default.id, self._embedding.id

    async def _pull(self, name: str, tell: Tell) -> Entry:
        """Returns a model that is here in the end. Only the default models and the hub's can be fetched."""
        if name not in self._packaged and "/" not in name:
            with contextlib.suppress(ModelNotFound):
                return await self._registry.find(name)
        await self._fetch(name, tell)
        self._registry.forget()
        return await self._registry.find(name)

    async def _fetch_packaged(self, id_: str, report: Report) -> Path:
        async def tell(step: Progress) -> None:
            report(step)

        return await self._fetch(id_, tell)

    async def _fetch(self, id_: str, tell: Tell) -> Path:
        cache = self._settings.cache_dir
        if id_ == self._default.id:
            return await self._fetches.join(
                id_, lambda report: ensure_default_model(cache, report, model=self._default), tell
            )
        if id_ == self._embedding.id:
            return await self._fetches.join(
                id_, lambda report: ensure_packaged_folder(cache, report, model=self._embedding), tell
            )
        return await self._fetches.join(id_, lambda report: pull_from_hub(id_, self._hub_cache, report), tell)

    def _options(self, id_: str, request: models_pb.LoadModelRequest) -> Options:
        """How a model is to be kept: as is asked, and else as the settings say.

        An adapter joins its base model where that is in memory, and then changes only what is asked.
        """
        residence = self._supervisor.residence(id_)
        if residence.kept and self._companions.adapter(request.model) is not None:
            options = replace(residence.options)
        else:
            options = Options(
                context_token_count=self._settings.context_token_count,
                keep_alive=self._settings.keep_alive.total_seconds(),
                pinned=self._settings.pins(id_),
            )
        if request.HasField("keep_alive_duration"):
            options.keep_alive = request.keep_alive_duration.ToTimedelta().total_seconds()
        if request.HasField("context_token_count"):
            options.context_token_count = request.context_token_count
        options.pinned = options.pinned or request.pinned
        return options

    async def _describe(self, entry: Entry) -> pb.Model:
        """Returns a model as it is now: what its folder says, corrected by what its worker says."""
        digest = ""
        if entry.facts is not None:
            store = self._settings.cache_dir / DIGESTS
            digest = await asyncio.to_thread(known_digest, entry.facts.path, store)
        model = entry.to_model(self._name, digest)
        residence = self._supervisor.residence(entry.id)
        if residence.worker is not None and not residence.suspect:
            residence.described = await residence.worker.describe() or residence.described
        if residence.state is State.ACTIVE and residence.described is not None:
            del model.capabilities[:]  # what the worker says of them replaces what the folder says
            model.MergeFrom(_facts(residence.described))
        model.memory_bytes = self._supervisor.takes(entry.id, model.memory_bytes)
        if residence.kept or residence.state is not State.AVAILABLE:
            model.state = residence.state.value
            model.detail = residence.detail or model.detail
        now = asyncio.get_running_loop().time()
        if (left := residence.expires_in(now)) is not None:
            _set_time(model.expire_time, left)
        if residence.has_served or residence.calls:
            _set_time(model.use_time, 0.0 if residence.calls else residence.last_used - now)
        if residence.load_seconds:
            model.load_duration.FromTimedelta(timedelta(seconds=residence.load_seconds))
        model.pinned = residence.kept and residence.options.pinned
        return model


def _check_purpose(id_: str, is_embedding: bool, embeds: bool | None) -> None:
    """Raises if a model for embeddings is to generate, or the other way round."""
    if embeds is None or embeds is is_embedding:
        return
    does, wanted = ("embeds", "generate") if is_embedding else ("generates", "embed")
    other = "a chat model" if is_embedding else f"an embedding model, such as {DEFAULT_EMBEDDING_MODEL.id}"
    raise CapabilityUnsupported(
        f"model {id_} {does} text and does not {wanted} it: ask {other}",
        metadata={"capability": wanted, "model": id_},
    )


def _set_time(field: Timestamp, seconds: float) -> None:
    """Sets a time that is so many seconds from now."""
    field.GetCurrentTime()
    field.FromNanoseconds(field.ToNanoseconds() + int(seconds * 1e9))


def _for_worker(call: Call[RequestT], id_: str) -> RequestT:
    """Returns the call's request with the identifiers by which the worker knows the model and the call."""
    request = type(call.request)()
    request.CopyFrom(call.request)
    request.model = id_
    request.request_id = call.request_id
    return request


def _facts(described: pb.Model) -> pb.Model:
    """Returns what only the loaded model knows of itself."""
    return pb.Model(
        memory_bytes=described.memory_bytes,
        context_token_count=described.context_token_count,
        loaded_context_token_count=described.loaded_context_token_count,
        slot_count=described.slot_count,
        capabilities=described.capabilities,
        weights=described.weights,
        prefix_digests=described.prefix_digests,
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


async def _ignore(event: models_pb.LoadModelResponse) -> None:
    """Tells nobody how a load at start goes."""


async def _no_one(residence: Residence) -> None:
    """Tells nobody that a call waits: a unary call has no way to be told."""
