"""What is loaded beside a model: a small one that guesses for it, and adapters that change it.

An adapter is a model of its own to callers, and shares a worker, and one copy
of the weights, with its base model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grpc.aio

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import ModelLoadFailed, ModelNotFound
from forebay.kit.relay import is_cancelled_here
from forebay.mlx_service.config import AdapterSettings, MlxSettings
from forebay.mlx_service.fetch import Report
from forebay.mlx_service.models.adapter import describe_adapter
from forebay.mlx_service.models.describe import NotAModelError
from forebay.mlx_service.process import Spec, Worker
from forebay.mlx_service.registry import Registry

_DESCRIBE_TIMEOUT = 2.0
"""Seconds a worker gets to describe its adapters."""


class Companions:
    """Drafters and adapters of the service's models.

    Args:
        settings: name them.
        registry: knows the models.
    """

    def __init__(self, settings: MlxSettings, registry: Registry) -> None:
        self._name = settings.name
        self._adapters = {adapter.name: adapter for adapter in settings.adapters}
        self._drafts = settings.draft_models
        self._registry = registry
        self._arguments: dict[str, list[str]] = {}
        self._folders: dict[str, Path] = {}

    @property
    def adapters(self) -> Iterable[AdapterSettings]:
        """The adapters, in the order of the settings."""
        return self._adapters.values()

    def adapter(self, name: str) -> AdapterSettings | None:
        """Returns the adapter of that name, or None if it names none."""
        return self._adapters.get(name)

    def arguments(self, spec: Spec) -> Sequence[str]:
        """Returns what else a worker is told. `prepare` has to come first."""
        return self._arguments.get(spec.model_id, ())

    def draft(self, id_: str) -> Path | None:
        """Returns the folder of what guesses for a model, or None. `prepare` has to come first."""
        return self._folders.get(id_)

    async def prepare(self, id_: str, progress: Report) -> None:
        """Finds what belongs to a model that is about to be loaded.

        Raises:
            ModelLoadFailed: its draft model is not here, or not one.
        """
        arguments: list[str] = []
        self._folders.pop(id_, None)
        for name, small in self._drafts.items():
            if await self._id_of(name) == id_:
                self._folders[id_] = await self._draft(id_, small, progress)
                arguments += ["--draft-model", str(self._folders[id_])]
                break
        for adapter in self.adapters:
            if await self._id_of(adapter.base) == id_:
                arguments += ["--adapter", f"{adapter.name}={adapter.path.expanduser()}"]
        self._arguments[id_] = arguments

    async def describe(
        self, models: Iterable[pb.Model], worker_of: Callable[[str], Worker | None]
    ) -> list[pb.Model]:
        """Describes the adapters.

        Args:
            models: the models, described.
            worker_of: returns the worker that serves a model, or None if none does.
        """
        bases = {model.id: model for model in models}
        told: dict[str, dict[str, pb.Model]] = {}
        described = []
        for adapter in self.adapters:
            base = bases.get(await self._id_of(adapter.base))
            if base is None:
                detail = f"its base model {adapter.base} is not here: fetch it, or correct `base`"
                described.append(self._failed(adapter, detail))
                continue
            if base.id not in told:
                worker = worker_of(base.id)
                told[base.id] = {} if worker is None else await _told(worker)
            described.append(await self._describe(adapter, base, told[base.id].get(adapter.name)))
        return described

    async def _describe(self, adapter: AdapterSettings, base: pb.Model, told: pb.Model | None) -> pb.Model:
        try:
            facts = await asyncio.to_thread(describe_adapter, adapter.path)
        except NotAModelError as error:
            return self._failed(adapter, str(error))
        model = told or pb.Model(state=pb.Model.STATE_AVAILABLE)
        model.id, model.backend = adapter.name, self._name
        model.context_token_count = base.context_token_count
        if not model.capabilities:
            model.capabilities.extend(base.capabilities)
        model.detail = f"adapter of {base.id}"
        model.disk_bytes = facts.disk_bytes
        if not model.weights.digest and base.weights.digest:  # a worker knows better what it has loaded
            model.weights.CopyFrom(base.weights)
            model.weights.digest = facts.weights_digest(base.weights.digest)
        return model

    def _failed(self, adapter: AdapterSettings, detail: str) -> pb.Model:
        return pb.Model(id=adapter.name, backend=self._name, state=pb.Model.STATE_FAILED, detail=detail)

    async def _id_of(self, name: str) -> str:
        """The identifier that a name in the settings stands for."""
        try:
            return (await self._registry.find(name)).id
        except ModelNotFound:
            return name

    async def _draft(self, id_: str, small: str, progress: Report) -> Path:
        try:
            entry = await self._registry.find(small)
        except ModelNotFound as error:
            raise ModelLoadFailed(
                f"the draft model {small} of {id_} is not here: fetch it, or correct draft_models",
                metadata={"model": id_, "draft_model": small},
            ) from error
        return await self._registry.folder(entry, progress)


async def _told(worker: Worker) -> dict[str, pb.Model]:
    """What a worker says of its models, by name; nothing if it does not say so soon."""
    try:
        answer = await worker.stub.ListModels(pb.ListModelsRequest(), timeout=_DESCRIBE_TIMEOUT)
    except (grpc.aio.AioRpcError, grpc.aio.UsageError):
        return {}
    except asyncio.CancelledError:
        if is_cancelled_here():
            raise
        return {}
    return {model.id: model for model in answer.models}
