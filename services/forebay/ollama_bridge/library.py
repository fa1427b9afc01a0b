"""The models of one Ollama server: which there are, and what is in memory.

A load belongs to nobody. Ollama gives a load up when the request that began it
goes away, so that a model that loads for longer than its callers wait never
loads. Here a load is a request of its own that all callers share, and so is a
pull.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Final, TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.failure import (
    BackendBusy,
    BrokenStream,
    Failure,
    InvalidRequest,
    ModelLoadFailed,
    PermissionDenied,
    printable,
)
from forebay.models.v1 import models_pb2 as models_pb
from forebay.ollama_bridge import translate
from forebay.ollama_bridge.client import Client, Version
from forebay.ollama_bridge.config import OllamaSettings
from forebay.ollama_bridge.models import Catalogue, Facts, Loaded, describe
from forebay.ollama_bridge.names import canonical, is_cloud, registry_of
from forebay.ollama_bridge.tasks import ticking
from forebay.ollama_bridge.translate import Setting
from forebay.upstream.errors import UpstreamError, translated
from forebay.upstream.singleflight import Report, SingleFlight
from forebay.upstream.values import JsonObject, integer, text

_log = logging.getLogger(__name__)

_UNLOAD_POLL: Final = (0.02, 0.5)  # seconds between looks whether a model is gone, first and at most
_Layers: TypeAlias = Mapping[str, models_pb.PullProgress]
"""How far each layer of a fetch is, the latest last. What is about no layer is under the empty digest."""

_VISION_CONTEXT: Final = 2048  # tokens that the server gives vision models at least


class Library:
    """A `ModelEngine` over one Ollama server, and what inference needs to know of its models.

    Args:
        settings: how.
        client: the server.
        group: owns loads and pulls.
    """

    def __init__(self, settings: OllamaSettings, client: Client, group: asyncio.TaskGroup) -> None:
        self._settings = settings
        self._name = settings.name
        self._client = client
        self._catalogue = Catalogue(client, backend=self._name, flights=SingleFlight(group))
        self._loads: SingleFlight[str, float, float] = SingleFlight(group)
        self._pulls: SingleFlight[str, _Layers, None] = SingleFlight(group)
        self._unloading: set[str] = set()
        self._asked: dict[str, Setting] = {}
        self.version = Version.of("")
        """The server's version, as the last probe found it."""
        self.break_off: Callable[[str], None] = lambda _: None
        """Breaks off the calls of a model. Set by whoever serves calls."""

    # ModelEngine

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        """See `ModelEngine.get_model`."""
        facts = await self.find(request.model, fresh=True)
        return models_pb.GetModelResponse(
            model=self._describe(facts, await self._catalogue.loaded(fresh=True))
        )

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """See `ModelEngine.load_model`. The options of a load are those of every later call of the model."""
        facts = await self.find(request.model, fresh=True)
        setting = self._asked_setting(request, facts)
        before = (await self._catalogue.loaded(fresh=True)).get(facts.key)
        same = before is not None and setting.load_options == self.setting(facts).load_options
        self._asked[facts.key] = setting

        async def progress(_: float) -> None:
            await send(models_pb.LoadModelResponse(progress=models_pb.LoadProgress(detail="loading")))

        took = await self.load(facts, progress)
        loaded = await self._catalogue.loaded(fresh=True)
        if facts.key not in loaded:
            raise ModelLoadFailed(
                f"{self._name} loaded {request.model}, and it is not in memory",
                metadata={"backend": self._name, "model": request.model},
            )
        done = models_pb.ModelLoaded(model=self._describe(facts, loaded))
        done.load_duration.FromTimedelta(timedelta(seconds=0.0 if same else took))
        await send(models_pb.LoadModelResponse(loaded=done))

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """See `ModelEngine.pull_model`."""
        self._check_pull(request)
        told: dict[str, models_pb.PullProgress] = {}

        async def progress(latest: _Layers) -> None:
            for digest, layer in latest.items():
                if told.get(digest) != layer:
                    told[digest] = layer
                    await send(models_pb.PullModelResponse(progress=layer))

        await self._pulls.join(
            canonical(request.model), lambda report: self._pull(request.model, report), progress=progress
        )
        facts = await self.find(request.model, fresh=True)
        model = self._describe(facts, await self._catalogue.loaded(fresh=True))
        await send(models_pb.PullModelResponse(pulled=models_pb.ModelPulled(model=model)))

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """See `ModelEngine.unload_model`."""
        facts = await self.find(request.model, fresh=True)
        self._asked.pop(facts.key, None)
        if request.force:
            self.break_off(facts.key)
        with translated(backend=self._name, model=request.model):
            await self._client.post(
                "/api/generate",
                {"model": request.model, "keep_alive": 0},
                timeout=self._settings.request_timeout.total_seconds(),
            )
        loaded = await self._wait_unloaded(facts)
        return models_pb.UnloadModelResponse(model=self._describe(facts, loaded))

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """See `ModelEngine.delete_model`."""
        if not self._settings.allow_delete:
            raise PermissionDenied("removing models is switched off; allow_delete in [ollama] switches it on")
        try:
            await self._client.delete(request.model)
        finally:
            self._catalogue.forget()
        return models_pb.DeleteModelResponse()

    # For inference

    async def list_models(self) -> list[pb.Model]:
        """Describes every model that can be served."""
        found = await self._catalogue.all()
        loaded = await self._catalogue.loaded(fresh=True)
        return [self._describe(f, loaded) for f in found if self._settings.allow_cloud or not f.remote]

    async def find(self, model: str, *, fresh: bool = False) -> Facts:
        """Returns what is known of a model that may be used.

        Args:
            model: in any spelling.
            fresh: whether the server is to be asked in any case.

        Raises:
            PermissionDenied: it runs on other people's machines.
            ModelNotFound: there is none of that name.
        """
        if not is_cloud(model) or self._settings.allow_cloud:
            facts = await self._catalogue.find(model, fresh=fresh)
            if not facts.remote or self._settings.allow_cloud:
                return facts
        raise PermissionDenied(
            f"{model} runs on other people's machines, which would get the prompt; allow_cloud in [ollama] "
            "allows that",
            metadata={"backend": self._name, "model": model},
        )

    def setting(self, facts: Facts) -> Setting:
        """Returns how a model is to be run: as it was last loaded by name, else as configured."""
        asked = self._asked.get(facts.key)
        if asked is not None:
            return asked
        own = self._settings.of_model(facts.key)
        return Setting(
            load_options=own.load_options(),
            keep_alive=own.keep_alive or self._settings.keep_alive,
            shift=None if facts.embeds_only else self._settings.context_shift,
        )

    def slots(self, facts: Facts) -> int:
        """Returns how many calls of a model the server runs at once."""
        return 1 if facts.embeds_only else self._settings.of_model(facts.key).slots or self._settings.slots

    def room(self, facts: Facts, loaded: Loaded | None) -> int:
        """Returns the most tokens of prompt and reply that fit, 0 if that is not known."""
        return (loaded.context if loaded is not None else 0) or facts.context

    async def is_loaded(self, facts: Facts) -> bool:
        """Whether a model is in memory, as far as the server tells."""
        try:
            return facts.key in await self._catalogue.loaded()
        except Failure:
            return False

    async def ensure_loaded(
        self, facts: Facts, progress: Callable[[float], Awaitable[None]] | None = None
    ) -> tuple[Loaded | None, float]:
        """Waits until a model is in memory as it is to be.

        Returns:
            How it is in memory, where that is known, and the seconds it took.
        """
        loaded = (await self._catalogue.loaded()).get(facts.key)
        if facts.remote or (loaded is not None and self._fits(facts, loaded)):
            return loaded, 0.0
        began = _now()
        await self.load(facts, progress)
        return (await self._catalogue.loaded()).get(facts.key), _now() - began

    async def load(self, facts: Facts, progress: Callable[[float], Awaitable[None]] | None = None) -> float:
        """Joins the load of a model or begins it; returns the seconds it took."""
        return await self._loads.join(facts.key, lambda report: self._load(facts, report), progress=progress)

    async def preload(self, name: str) -> None:
        """Loads a model. A failure is logged."""
        try:
            await self.load(await self.find(name))
        except Failure as failure:
            _log.warning("cannot preload %s: %s", printable(name), printable(failure.message))

    def _fits(self, facts: Facts, loaded: Loaded) -> bool:
        """Whether a loaded model has the context it is to have, as far as that is known."""
        wanted = self.setting(facts).load_options.get("num_ctx")
        if not isinstance(wanted, int) or not loaded.context:
            return True
        least = _VISION_CONTEXT if "vision" in (facts.capabilities or ()) else 0
        return loaded.context == max(least, min(wanted, facts.context or wanted))

    def _describe(self, facts: Facts, loaded: Mapping[str, Loaded]) -> pb.Model:
        state = pb.Model.STATE_UNSPECIFIED
        if facts.key in self._loads:
            state = pb.Model.STATE_LOADING
        elif facts.key in self._unloading and facts.key in loaded:
            state = pb.Model.STATE_UNLOADING
        return describe(
            facts,
            loaded.get(facts.key),
            backend=self._name,
            version=self.version,
            slots=self.slots(facts),
            state=state,
        )

    # Loading

    def _asked_setting(self, request: models_pb.LoadModelRequest, facts: Facts) -> Setting:
        """Returns the setting that a load asks for, which must not contradict the configuration."""
        configured = self._settings.of_model(facts.key).load_options()
        asked: JsonObject = {}
        if "ollama" in request.backend_options:
            asked = translate.load_options(request.backend_options["ollama"], "backend_options[ollama]")
        if request.HasField("context_token_count"):
            asked["num_ctx"] = request.context_token_count
        for key, value in asked.items():
            if configured.get(key, value) != value:
                path = "context_token_count" if key == "num_ctx" else f"backend_options[ollama].{key}"
                said = f"{key} is set to {configured[key]} for this model in the bridge's settings"
                raise InvalidRequest(f"{path}: {said}", violations=[(path, said)])
        setting = self.setting(facts)
        if asked:
            setting = replace(setting, load_options={**configured, **asked})
        if request.pinned:
            return replace(setting, keep_alive="-1")
        if request.HasField("keep_alive_duration"):
            seconds = request.keep_alive_duration.ToTimedelta().total_seconds()
            if seconds <= 0:
                said = "must be more than 0; set `pinned` to keep the model for ever"
                raise InvalidRequest(
                    f"keep_alive_duration: {said}", violations=[("keep_alive_duration", said)]
                )
            return replace(setting, keep_alive=f"{seconds:g}")
        return setting

    async def _load(self, facts: Facts, report: Report[float]) -> float:
        began = _now()

        async def tick() -> None:
            report(_now() - began)

        report(0.0)
        try:
            async with ticking(self._settings.progress_interval.total_seconds(), tick):
                with translated(backend=self._name, model=facts.name):
                    await self._send_load(facts)
        finally:
            self._catalogue.forget()
        took = _now() - began
        _log.info("%s loaded %s in %.1f s", self._name, printable(facts.name), took)
        return took

    async def _send_load(self, facts: Facts) -> None:
        setting = self.setting(facts)
        timeout = self._settings.load_timeout.total_seconds()
        if not facts.embeds_only:
            try:
                await self._client.post("/api/generate", setting.load_body(facts.name), timeout=timeout)
            except UpstreamError as error:
                if not error.says("does not support generate"):
                    raise
            else:
                return
        body = replace(setting, shift=None).load_body(facts.name)
        await self._client.post("/api/embed", body, timeout=timeout)

    async def _wait_unloaded(self, facts: Facts) -> Mapping[str, Loaded]:
        pause, most = _UNLOAD_POLL
        self._unloading.add(facts.key)
        try:
            async with asyncio.timeout(self._settings.unload_timeout.total_seconds()):
                while facts.key in (loaded := await self._catalogue.loaded(fresh=True)):
                    await asyncio.sleep(pause)
                    pause = min(most, 2 * pause)
                return loaded
        except TimeoutError as error:
            raise BackendBusy(
                f"{facts.name} is still in use on {self._name}; it is unloaded when its calls have ended",
                metadata={"backend": self._name, "model": facts.name},
                retry_after=timedelta(seconds=5),
            ) from error
        finally:
            self._unloading.discard(facts.key)

    # Pulling

    def _check_pull(self, request: models_pb.PullModelRequest) -> None:
        if not self._settings.allow_pull:
            raise PermissionDenied("fetching models is switched off; allow_pull in [ollama] switches it on")
        if "ollama" in request.backend_options and request.backend_options["ollama"].fields:
            path = "backend_options[ollama]"
            raise InvalidRequest(f"{path}: a fetch has no options", violations=[(path, "must be empty")])
        registry = registry_of(request.model)
        if registry is None:
            said = "is no name that Ollama could fetch, such as llama3.2:3b or hf.co/user/model:Q4_K_M"
            raise InvalidRequest(f"model: {said}", violations=[("model", said)])
        if registry not in self._settings.pull_registries:
            raise PermissionDenied(
                f"models are not fetched from {printable(registry)}; pull_registries in [ollama] lists hosts",
                metadata={"backend": self._name, "registry": registry},
            )

    async def _pull(self, model: str, report: Report[_Layers]) -> None:
        layers: dict[str, models_pb.PullProgress] = {}
        stall = self._settings.stall_timeout.total_seconds()
        body: JsonObject = {"model": model, "stream": True}
        with translated(backend=self._name, model=model):
            async with self._client.stream(
                "/api/pull", body, first_byte=stall, between_bytes=stall
            ) as objects:
                async for line in objects:
                    status, digest = text(line, "status"), text(line, "digest")
                    if status == "success":
                        self._catalogue.forget()
                        return
                    before = layers.pop(digest, None)
                    layers[digest] = models_pb.PullProgress(
                        detail=printable(status)[:200],
                        digest=digest,
                        total_bytes=integer(line, "total"),
                        # Two fetches may report one layer by turns, each with its own count.
                        completed_bytes=max(
                            integer(line, "completed"), before.completed_bytes if before is not None else 0
                        ),
                    )
                    report(dict(layers))
        raise BrokenStream(
            f"{self._name} stopped fetching {model} without saying why; asked again, it goes on where it was",
            metadata={"backend": self._name, "model": model},
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
