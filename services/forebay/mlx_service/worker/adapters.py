"""Adapters: views of one model, each changed by a few matrices of its own, over one copy of the weights.

A view is a module tree of its own whose arrays are the base model's; mlx-lm
then puts the adapter's matrices beside them. So a view takes the memory of its
adapter and no more, and the base model knows nothing of it. Rows of a view run
in lanes of their own, for a step runs one module tree.

A view is opened when it is first asked for and stays until it is unloaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.failure import CapabilityUnsupported, ModelLoadFailed, ModelNotFound
from forebay.mlx_service.models.adapter import WEIGHTS, AdapterFacts, describe_adapter
from forebay.mlx_service.models.describe import NotAModelError
from forebay.mlx_service.worker.engine import Engine
from forebay.mlx_service.worker.runtime import load_adapters, mx, tree_flatten
from forebay.models.v1 import models_pb2 as models_pb

_ADAPTED = frozenset({"lora_a", "lora_b", "m"})
"""Names of an adapter's own arrays."""


def needs_plain_layers(paths: Iterable[Path]) -> bool:
    """Whether one of the adapters is of a kind that looks at the weights of the layers it changes."""
    for path in paths:
        with contextlib.suppress(NotAModelError):  # it is told to who asks for it
            if describe_adapter(path).kind == "dora":
                return True
    return False


def make_view(base: object, path: Path, base_name: str) -> object:
    """Returns a view of a model with an adapter. Call it on the engine's thread.

    Raises:
        ModelLoadFailed: the adapter is not one for this model.
    """
    shared = {id(array): array for _, array in tree_flatten(base.parameters())}  # type: ignore[attr-defined]  # a module
    try:
        view = copy.deepcopy(base, shared)
        load_adapters(view, str(path))
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _unfit(path, base_name, lines[-1] if lines else type(error).__name__) from error
    here = {name for name, _ in tree_flatten(view.parameters()) if name.rpartition(".")[2] in _ADAPTED}  # type: ignore[attr-defined]  # a module
    missing = sorted(here - set(mx.load(str(path / WEIGHTS))))
    if missing or not here:
        raise _unfit(path, base_name, f"it lacks {missing[0]}" if missing else "it changes no layer")
    view.eval()  # type: ignore[attr-defined]  # a module
    mx.eval(view.parameters())  # type: ignore[attr-defined]  # a module
    return view


def _unfit(path: Path, base_name: str, why: str) -> ModelLoadFailed:
    return ModelLoadFailed(
        f"{path / WEIGHTS} does not fit {base_name}: {why}. Set its `base` to the model it was trained on, "
        f"and keep the adapter_config.json it was trained with beside it",
        metadata={"model": base_name, "file": str(path / WEIGHTS)},
    )


@dataclass(slots=True, eq=False)
class _Adapter:
    path: Path
    facts: AdapterFacts | None = None
    """What is open. None if it is not."""
    users: int = 0
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is opened or closed, so that of many who ask for it one opens it."""
    unused: asyncio.Event = field(default_factory=asyncio.Event)


class Adapters:
    """The adapters of the model that a worker serves. On the event loop.

    Args:
        engine: runs the model.
        base: name of the model.
        paths: folders of the adapters by their names.
    """

    def __init__(self, engine: Engine, base: str, paths: Mapping[str, Path]) -> None:
        self._engine = engine
        self._base = base
        self._adapters = {name: _Adapter(path) for name, path in paths.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    @property
    def open(self) -> dict[str, AdapterFacts | None]:
        """Every adapter, and what is open of it."""
        return {name: adapter.facts for name, adapter in self._adapters.items()}

    @contextlib.asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[AdapterFacts]:
        """Keeps an adapter open for the length of a block, opening it first if it is not.

        Raises:
            ModelLoadFailed: it does not fit the model.
            MemoryExhausted: there is no room for it.
        """
        adapter = self._adapters[name]
        async with adapter.changing:
            if adapter.facts is None:
                adapter.facts = await self._open(name, adapter.path)
            facts = adapter.facts
            adapter.users += 1
        try:
            yield facts
        finally:
            adapter.users -= 1
            if not adapter.users:
                adapter.unused.set()

    async def unload(self, name: str, *, force: bool) -> None:
        """Closes an adapter after the last call that uses it, or ends those calls."""
        adapter = self._adapters[name]
        async with adapter.changing:
            if adapter.facts is None:
                return
            if force:
                self._engine.end_view(name)
            while adapter.users:
                adapter.unused.clear()
                await adapter.unused.wait()
            await self._engine.close_view(name)
            adapter.facts = None

    async def _open(self, name: str, path: Path) -> AdapterFacts:
        try:
            facts = await asyncio.to_thread(describe_adapter, path)
        except NotAModelError as error:
            raise ModelLoadFailed(f"adapter {name}: {error}", metadata={"model": name}) from error
        await self._engine.open_view(
            name, partial(make_view, path=facts.path, base_name=self._base), size=facts.disk_bytes
        )
        return facts


class AdapterModels:
    """The `ModelEngine` of a worker: loads and unloads its adapters by name.

    Args:
        adapters: the adapters.
        backend: name of the backend.
    """

    def __init__(self, adapters: Adapters, backend: str) -> None:
        self._adapters = adapters
        self._backend = backend

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        """Describes an adapter."""
        self._check(request.model)
        return models_pb.GetModelResponse(model=self._describe(request.model))

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """Opens an adapter."""
        self._check(request.model)
        async with self._adapters.using(request.model):
            loaded = models_pb.ModelLoaded(model=self._describe(request.model))
        await send(models_pb.LoadModelResponse(loaded=loaded))

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Closes an adapter."""
        self._check(request.model)
        await self._adapters.unload(request.model, force=request.force)
        return models_pb.UnloadModelResponse(model=self._describe(request.model))

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """Refuses: a worker fetches nothing."""
        raise self._refusal("fetch")

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Refuses: a worker removes nothing."""
        raise self._refusal("delete")

    def _check(self, name: str) -> None:
        if name not in self._adapters:
            raise ModelNotFound(f"this worker has no adapter {name}", metadata={"model": name})

    def _describe(self, name: str) -> pb.Model:
        is_open = self._adapters.open[name] is not None
        state = pb.Model.STATE_ACTIVE if is_open else pb.Model.STATE_AVAILABLE
        return pb.Model(id=name, backend=self._backend, state=state)

    def _refusal(self, what: str) -> CapabilityUnsupported:
        return CapabilityUnsupported(f"a worker does not {what} models", metadata={"capability": what})
