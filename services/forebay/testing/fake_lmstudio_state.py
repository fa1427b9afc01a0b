"""What an LM Studio has on disk and in memory: models, instances, downloads.

Knows nothing of HTTP but the bodies of errors, which come in the four shapes
that the real server uses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from forebay.testing.fake_lmstudio_script import Gates

Json = dict[str, object]


class RefusedError(Exception):
    """The server answers with an error.

    Args:
        status: HTTP status.
        body: JSON of the reply.
    """

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


def bare(message: str, *, status: int = 400) -> RefusedError:
    """Returns an error whose `error` is a string."""
    return RefusedError(status, {"error": message})


def compatible(
    message: str,
    *,
    status: int = 404,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> RefusedError:
    """Returns an error in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return RefusedError(status, {"error": error})


def native(
    message: str,
    *,
    status: int = 400,
    kind: str = "invalid_request",
    code: str | None = None,
    param: str | None = None,
) -> RefusedError:
    """Returns an error in the shape of the native API."""
    error: Json = {"type": kind, "message": message}
    if code is not None:
        error["code"] = code
    if param is not None:
        error["param"] = param
    return RefusedError(status, {"error": error})


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """A model on disk."""

    key: str
    """What requests name."""
    type: Literal["llm", "embedding"] = "llm"
    """What it does."""
    publisher: str = "forebay-tests"
    """Who made it."""
    architecture: str = "llama"
    """Architecture."""
    quantization: str | None = "Q4_K_M"
    """Name of the quantisation."""
    bits_per_weight: int | None = 4
    """Bits a weight."""
    size_bytes: int = 1_234_567
    """Size on disk."""
    max_context_length: int = 8192
    """Longest context the model was made for, in tokens."""
    params: str | None = "135M"
    """Size as people write it."""
    format: Literal["gguf", "mlx"] = "gguf"
    """File format."""
    vision: bool = False
    """Whether it reads images."""
    tools: bool = True
    """Whether it was trained to call tools."""
    reasoning: Literal["", "reasoning", "reasoning_content", "inline"] = ""
    """Where its reasoning goes: nowhere, a key of the message, or `<think>` tags in the text."""
    dimensions: int = 8
    """Components of an embedding."""
    load_error: str = ""
    """Why it cannot be loaded. Empty if it can."""


@dataclass(kw_only=True)
class Instance:
    """A model in memory."""

    id: str
    model: FakeModel
    context_length: int
    parallel: int
    config: Json
    jit: bool = False
    ttl: float | None = None
    last_used: float = 0.0
    busy: int = 0
    waiting: int = 0
    unloaded: bool = False

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.parallel)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Holds one of the slots, after a silent wait without bound."""
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self._slots.release()

    def config_json(self) -> Json:
        """Returns the configuration as a listing shows it."""
        return {"context_length": self.context_length, **self.config}


@dataclass(kw_only=True)
class Download:
    """A download under way or over."""

    id: str
    model: FakeModel
    total: int
    status: Literal["downloading", "paused", "completed", "failed"] = "downloading"
    done: int = 0
    fails_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """A model that can be downloaded."""

    model: FakeModel
    """What is on disk afterwards."""
    total: int = 1000
    """Bytes to fetch."""
    fails_at: int | None = None
    """Bytes after which the download fails. None never."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of the server, and what it can do."""

    number: tuple[int, int, int] = (0, 4, 4)

    @classmethod
    def parse(cls, text: str) -> Version:
        """Returns the version that `0.4.4` names; missing parts are 0."""
        parts = [int(part) for part in text.split(".")][:3]
        padded = (*parts, 0, 0, 0)
        return cls(number=(padded[0], padded[1], padded[2]))

    @property
    def has_v0(self) -> bool:
        """Whether `/api/v0` is there."""
        return self.number >= (0, 3, 6)

    @property
    def has_v1(self) -> bool:
        """Whether the native `/api/v1` is there."""
        return self.number >= (0, 4, 0)

    @property
    def has_auth(self) -> bool:
        """Whether tokens can be required."""
        return self.number >= (0, 4, 0)

    @property
    def has_parallel(self) -> bool:
        """Whether an instance serves several requests at once."""
        return self.number >= (0, 4, 0)

    @property
    def has_stream_usage(self) -> bool:
        """Whether `stream_options.include_usage` is known."""
        return self.number >= (0, 3, 18)

    @property
    def refuses_empty_text(self) -> bool:
        """Whether an empty text cannot be embedded."""
        return self.number < (0, 3, 6)


@dataclass(kw_only=True)
class FakeOptions:
    """How a fake behaves. May be changed while it runs."""

    version: Version = field(default_factory=Version)
    """Version it plays."""
    token: str = ""
    """API token it asks for. Empty asks for none."""
    jit: bool = True
    """Whether a request for a model on disk loads it."""
    jit_race: bool = True
    """Whether simultaneous first requests load an instance each, as the real server does."""
    jit_ttl: float = 3600.0
    """Seconds after its last use when a model loaded by a request is unloaded."""
    auto_evict: bool = True
    """Whether loading a model by request unloads the others loaded so, in the middle of their replies."""
    answers_with_loaded: bool = False
    """Whether a request for an unknown model is served by the only loaded one."""
    context_length: int = 4096
    """Context of an instance that was loaded without saying, in tokens."""
    parallel: int = 4
    """Requests an instance serves at once."""
    overflow: Literal["event", "silent"] = "event"
    """How a stream says that the prompt is too long: an error event, or nothing at all."""
    done_after_error: bool = True
    """Whether `[DONE]` follows an error event."""
    logprobs: bool = False
    """Whether log probabilities are given when asked for."""
    input_item: Literal["text", "message"] = "text"
    """Type of text items in `input` of the native chat."""
    embed_batch: int = 256
    """Most texts of one request before the engine fails."""
    cors: bool = False
    """Whether `OPTIONS` is answered."""
    keep_alive: float = 5.0
    """Seconds until an idle connection is closed."""
    load_seconds: float = 0.0
    """Seconds a load takes."""
    prefill_seconds: float = 0.0
    """Seconds a prompt takes."""
    token_seconds: float = 0.0
    """Seconds a token takes."""
    download_step: int = 250
    """Bytes a download gets on with at each look at its status."""


_LOAD_FIELDS: Mapping[str, type] = {
    "context_length": int,
    "eval_batch_size": int,
    "flash_attention": bool,
    "num_experts": int,
    "offload_kv_cache_to_gpu": bool,
}


class Studio:
    """Disk and memory of a fake.

    Args:
        models: what is on disk.
        catalogue: what can be downloaded, by identifier or address.
        options: how it behaves.
        gates: where a test can make it wait: `load`.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        models: Sequence[FakeModel],
        *,
        catalogue: Mapping[str, CatalogueEntry],
        options: FakeOptions,
        gates: Gates,
        clock: Callable[[], float],
    ) -> None:
        self.models = {model.key: model for model in models}
        self.catalogue = dict(catalogue)
        self.options = options
        self.instances: dict[str, Instance] = {}
        self.downloads: dict[str, Download] = {}
        self.loads: list[str] = []
        self._gates = gates
        self._clock = clock
        self._jit_loads: dict[str, asyncio.Event] = {}
        self._jobs = 0

    def restart(self) -> None:
        """Forgets what was in memory and every download, as a restart of the application does."""
        for instance in self.instances.values():
            instance.unloaded = True
        self.instances.clear()
        self.downloads.clear()

    def loaded(self) -> list[Instance]:
        """Returns what is in memory, after unloading what was idle for too long."""
        now = self._clock()
        for instance in list(self.instances.values()):
            idle = instance.busy == 0 and instance.waiting == 0
            if instance.ttl is not None and idle and now - instance.last_used >= instance.ttl:
                self.unload(instance.id)
        return list(self.instances.values())

    async def load(
        self,
        key: str,
        *,
        config: Json | None = None,
        jit: bool = False,
        ttl: float | None = None,
        identifier: str = "",
        parallel: int | None = None,
    ) -> Instance:
        """Loads a model. A model that is loaded gets one more instance.

        Raises:
            RefusedError: there is no such model, or it cannot be loaded.
        """
        model = self.models.get(key)
        if model is None:
            raise native(
                f'Model "{key}" not found', status=404, kind="model_not_found", code="model_not_found"
            )
        self.loads.append(key)
        await self._gates.pass_("load")
        if self.options.load_seconds:
            await asyncio.sleep(self.options.load_seconds)
        if model.load_error:
            raise native(
                f'Failed to load model "{key}". {model.load_error}', status=500, kind="internal_error"
            )
        config = dict(config or {})
        wanted = config.pop("context_length", self.options.context_length)
        context = min(wanted if isinstance(wanted, int) else 1, model.max_context_length)
        versioned = self.options.version.has_parallel
        slots = (parallel or self.options.parallel) if versioned and model.type == "llm" else 1
        if versioned and model.type == "llm":
            config = {"eval_batch_size": 512, "parallel": slots, "flash_attention": True} | config
        if jit and self.options.auto_evict:
            for other in [one for one in self.instances.values() if one.jit and one.model.key != key]:
                self.unload(other.id)
        instance = Instance(
            id=identifier or self._free_id(key),
            model=model,
            context_length=context,
            parallel=slots,
            config=config,
            jit=jit,
            ttl=ttl,
            last_used=self._clock(),
        )
        self.instances[instance.id] = instance
        return instance

    def unload(self, identifier: str) -> None:
        """Unloads an instance, in the middle of what it serves.

        Raises:
            RefusedError: there is no such instance.
        """
        instance = self.instances.pop(identifier, None)
        if instance is None:
            message = f'Model instance "{identifier}" not found'
            raise native(message, status=404, kind="model_not_found", code="model_not_found")
        instance.unloaded = True

    def find(self, name: str) -> Instance | None:
        """Returns the instance of that identifier, else one of that model."""
        loaded = self.loaded()
        for instance in loaded:
            if instance.id == name:
                return instance
        return next((one for one in loaded if one.model.key == name), None)

    async def resolve(self, name: str, *, kind: Literal["llm", "embedding"], ttl: object = None) -> Instance:
        """Returns the instance that serves a request, loading one if that is allowed.

        Raises:
            RefusedError: no instance can serve it.
        """
        found = self.find(name)
        loaded = [one for one in self.loaded() if one.model.type == kind]
        if found is None and not name and len(loaded) == 1:
            found = loaded[0]
        if found is None and self.options.jit and name in self.models:
            found = await self._load_just_in_time(name, ttl)
        if found is None and self.options.answers_with_loaded and len(loaded) == 1:
            found = loaded[0]
        if found is None or found.model.type != kind:
            raise self._not_found(name, bool(loaded))
        found.last_used = self._clock()
        return found

    async def _load_just_in_time(self, key: str, ttl: object) -> Instance:
        seconds = float(ttl) if isinstance(ttl, int | float) else self.options.jit_ttl
        while not self.options.jit_race and key in self._jit_loads:
            await self._jit_loads[key].wait()
            found = self.find(key)
            if found is not None:
                return found
        over = self._jit_loads[key] = asyncio.Event()
        try:
            return await self.load(key, jit=True, ttl=seconds)
        finally:
            if self._jit_loads.get(key) is over:
                del self._jit_loads[key]
            over.set()

    def _not_found(self, name: str, some_loaded: bool) -> RefusedError:
        if not some_loaded and not self.options.jit:
            newer = self.options.version.number >= (0, 4, 8)
            return compatible(
                "No models loaded. Please load a model in the developer page or use the 'lms load' command.",
                param="model",
                code=None if newer else "model_not_found",
            )
        names = "\n".join(self.models)
        return compatible(
            f'Model "{name}" not found. Please specify a valid model.\n\nYour models:\n\n{names}',
            param="model",
            code="model_not_found",
        )

    def _free_id(self, key: str) -> str:
        if key not in self.instances:
            return key
        number = 2
        while f"{key}:{number}" in self.instances:
            number += 1
        return f"{key}:{number}"

    def listing(self) -> Json:
        """Returns the native listing."""
        return {"models": [self._entry(model) for model in self.models.values()]}

    def _entry(self, model: FakeModel) -> Json:
        instances = [one for one in self.loaded() if one.model.key == model.key]
        entry: Json = {
            "type": model.type,
            "publisher": model.publisher,
            "key": model.key,
            "display_name": model.key.rpartition("/")[2].replace("-", " ").title(),
            "quantization": {"name": model.quantization, "bits_per_weight": model.bits_per_weight},
            "size_bytes": model.size_bytes,
            "params_string": model.params,
            "loaded_instances": [{"id": one.id, "config": one.config_json()} for one in instances],
            "max_context_length": model.max_context_length,
            "format": model.format,
        }
        if model.type == "llm":
            capabilities: Json = {"vision": model.vision, "trained_for_tool_use": model.tools}
            if model.reasoning:
                capabilities["reasoning"] = {"allowed_options": ["off", "on"], "default": "on"}
            entry |= {"architecture": model.architecture, "capabilities": capabilities, "description": None}
        return entry

    def listing_v0(self) -> list[Json]:
        """Returns the entries of the older listing."""
        return [self.entry_v0(model) for model in self.models.values()]

    def entry_v0(self, model: FakeModel) -> Json:
        """Returns one entry of the older listing."""
        instance = self.find(model.key)
        kind = "embeddings" if model.type == "embedding" else "vlm" if model.vision else "llm"
        entry: Json = {
            "id": model.key,
            "object": "model",
            "type": kind,
            "publisher": model.publisher,
            "arch": model.architecture,
            "compatibility_type": model.format,
            "quantization": model.quantization,
            "state": "not-loaded" if instance is None else "loaded",
            "max_context_length": model.max_context_length,
        }
        if model.tools and model.type == "llm":
            entry["capabilities"] = ["tool_use"]
        if instance is not None:
            entry["loaded_context_length"] = instance.context_length
        return entry

    def listing_compatible(self) -> Json:
        """Returns the listing of the OpenAI-compatible API: no states."""
        if self.options.jit:
            names = list(self.models)
            names += [one.id for one in self.loaded() if one.id not in self.models]
        else:
            names = [one.id for one in self.loaded()]
        data = [{"id": name, "object": "model", "owned_by": "organization_owner"} for name in names]
        return {"object": "list", "data": data}

    def check_load(self, body: Json) -> tuple[str, Json, bool]:
        """Returns model, configuration and whether to echo it, of a load request.

        Raises:
            RefusedError: the request is malformed.
        """
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise native('"model" is required', code="missing_required_parameter", param="model")
        config: Json = {}
        for name, value in body.items():
            if name in ("model", "echo_load_config"):
                continue
            expected = _LOAD_FIELDS.get(name)
            if expected is None:
                raise native(f"Unrecognized key(s) in object: '{name}'", code="unrecognized_keys", param=name)
            if type(value) is not expected:
                raise native(f'"{name}" must be of type {expected.__name__}', code="invalid_type", param=name)
            config[name] = value
        return model, config, body.get("echo_load_config") is True

    def start_download(self, body: Json) -> Json:
        """Starts a download, or joins one.

        Raises:
            RefusedError: there is no such model in the catalogue.
        """
        name = body.get("model")
        if not isinstance(name, str) or not name:
            raise native('"model" is required', code="missing_required_parameter", param="model")
        quantization = body.get("quantization")
        entry = self.catalogue.get(f"{name}@{quantization}" if quantization else name)
        if entry is None and name in self.models:
            return {"status": "already_downloaded"}
        if entry is None:
            raise native(
                f'Model "{name}" not found', status=404, kind="model_not_found", code="model_not_found"
            )
        if entry.model.key in self.models:
            return {"status": "already_downloaded"}
        for job in self.downloads.values():
            if job.model.key == entry.model.key and job.status == "downloading":
                return self._download_json(job) | {"total_size_bytes": job.total}
        self._jobs += 1
        job = Download(
            id=f"job_{self._jobs:010x}", model=entry.model, total=entry.total, fails_at=entry.fails_at
        )
        self.downloads[job.id] = job
        return {
            "job_id": job.id,
            "status": job.status,
            "total_size_bytes": job.total,
            "started_at": "2026-01-02T03:04:05.678Z",
        }

    def look_at_download(self, job_id: str) -> Json:
        """Returns where a download is. It gets on a step with each look.

        Raises:
            RefusedError: there is no such job.
        """
        job = self.downloads.get(job_id)
        if job is None:
            raise native(f'Job "{job_id}" not found', status=404, kind="job_not_found", code="job_not_found")
        if job.status == "downloading":
            job.done = min(job.total, job.done + self.options.download_step)
            if job.fails_at is not None and job.done >= job.fails_at:
                job.status = "failed"
            elif job.done >= job.total:
                job.status = "completed"
                self.models[job.model.key] = job.model
        return self._download_json(job)

    def _download_json(self, job: Download) -> Json:
        reply: Json = {"job_id": job.id, "status": job.status, "started_at": "2026-01-02T03:04:05.678Z"}
        if job.status == "completed":
            return reply | {"total_size_bytes": job.total, "completed_at": "2026-01-02T03:05:05.678Z"}
        if job.status == "downloading":
            reply |= {"bytes_per_second": 1000, "estimated_completion": "2026-01-02T03:05:05.678Z"}
        return reply | {"total_size_bytes": job.total, "downloaded_bytes": job.done}
