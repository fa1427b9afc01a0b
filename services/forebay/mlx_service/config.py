"""Settings of the MLX service."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from forebay.kit.config import Address, ByteSize, Duration, ServerSettings, Settings
from forebay.mlx_service import blas
from forebay.mlx_service.default_model import DEFAULT_MODEL
from forebay.mlx_service.fetch import default_cache_dir
from forebay.mlx_service.quick_import import FOLDER_VARIABLE
from forebay.mlx_service.shards import ShardSettings

DIGESTS = "digests"
"""Folder within `cache_dir` in which the digests of weights are remembered."""


class AdapterSettings(Settings):
    """An adapter that is served as a model of its own."""

    name: str = Field(min_length=1, description="Name under which it is asked for.")
    path: Path = Field(
        description="Folder with adapter_config.json and adapters.safetensors, as mlx-lm writes."
    )
    base: str = Field(min_length=1, description="Model that it was trained on, by identifier or alias.")


class MlxSettings(ServerSettings):
    """Settings of the MLX service: section `[mlx]`."""

    address: Address = Field("127.0.0.1:50151", description="Address to listen on. Port 0 picks a free one.")
    name: str = Field("mlx", min_length=1, description="Name of this backend, as answers give it.")

    model_folders: tuple[Path, ...] = Field(
        (), description="Folders to search for models: MLX folders and GGUF files, up to three levels deep."
    )
    huggingface_cache: bool = Field(
        True,
        description="Whether models in the Hugging Face cache are served too, and models of the hub are "
        "fetched into it. Otherwise they are kept apart, in `cache_dir`.",
    )
    ollama_models: bool = Field(
        True,
        description="Whether GGUF models that Ollama has fetched are served too, under their names there. "
        "Nothing of Ollama's is changed.",
    )
    ollama_folder: Path | None = Field(
        None, description="Ollama's models folder. Default: OLLAMA_MODELS, else ~/.ollama/models."
    )
    cache_dir: Path = Field(
        default_factory=default_cache_dir,
        description="Folder for fetched and converted models. Default: the user's cache folder; "
        "FOREBAY_CACHE_DIR names another.",
    )
    aliases: dict[str, str] = Field(
        {}, description="Other names for models: name = identifier. A name may be another model's."
    )
    shards: dict[str, ShardSettings] = Field(
        {},
        description="Models that several machines share, by identifier. Experimental. No prefixes are kept "
        "of them.",
    )
    default_model: str = Field(
        DEFAULT_MODEL.id, description="Model that `preload` starts with. Empty has none."
    )
    fetch_default_model: bool = Field(
        True,
        description="Whether the embedded default models, for chat and for embeddings, are fetched (93 and "
        "84 MB, once) when they are asked for and are not there.",
    )

    smg_model: str | None = Field(
        None,
        description="Model behind the interface mlx.grpc.engine.MlxEngine, which knows no names. Default: "
        "the default model. Empty leaves the interface out. It is there where smg-grpc-proto is installed.",
    )
    preload: tuple[str, ...] | None = Field(
        None, description="Models to load at start. Default: the default model. An empty list loads none."
    )
    pinned: tuple[str, ...] = Field(
        (),
        description="Models that stay in memory once they are loaded, by identifier or alias: neither "
        "`keep_alive` nor others that need the room drive them out, only an unload by name. What is to be "
        "there from the start is in `preload` too.",
    )
    max_loaded_models: int = Field(
        2,
        ge=1,
        description="Most models in memory. One more makes an idle one leave: the longest unused, and rather "
        "one that loads fast. Two, so that a chat model and an embedding model live side by side.",
    )
    keep_alive: Duration = Field(
        timedelta(0), description="A model unused for this long leaves memory. 0 keeps it."
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Most replies one model generates at once. Default: what was measured here, else by the "
        "machine: 8, or 4 on a small Mac. `forebay mlx doctor` shows it.",
    )
    prefill_chunk_token_count: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="Most tokens of a prompt read in one step. A model for which such a step takes more than "
        "half a second reads fewer. Default: as for `max_rows`.",
    )
    profile_file: Path | None = Field(
        None,
        description="File that `forebay mlx bench --write` writes and the service reads. Default: "
        "mlx-profile.json in `cache_dir`.",
    )
    context_token_count: int | None = Field(
        None,
        ge=1,
        description="Most tokens of prompt and reply together. Default: what the model was made for.",
    )
    default_max_output_token_count: int | None = Field(
        None, ge=1, description="Most tokens of a reply whose request sets no limit. Default: the worker's."
    )
    prefix_cache_bytes: ByteSize = Field(
        512 << 20,
        ge=0,
        description="Memory in which each model keeps what it has read, for prompts that begin the same. "
        "0 keeps nothing. Where callers must prove who they are, nobody's prompt serves another caller.",
    )
    prefix_disk_bytes: ByteSize = Field(
        0,
        ge=0,
        description="Disk space, for all models together, in which what leaves the prefix cache is kept and "
        "outlives restarts. The files hold what callers said, and only this user may read them. 0 is none.",
    )
    prefix_disk_folder: Path | None = Field(
        None, description="Folder for that. Default: `prefixes` in `cache_dir`."
    )
    prefix_disk_write: Literal["evicted", "finished"] = Field(
        "evicted",
        description="When it is written: `evicted` writes what leaves memory, what is pinned, and all when a "
        "model is unloaded; `finished` writes each reply's state at once, which survives crashes and wears "
        "the disk more.",
    )
    prompt_lookup: bool = Field(
        True,
        description="Whether a reply that runs alone and repeats its prompt or itself is written several "
        "tokens at a time, by guessing that what followed before follows again. It changes no reply, and "
        "stops where it does not pay.",
    )
    draft_models: dict[str, str] = Field(
        {},
        description="Small models that guess ahead for a reply that runs alone: model = small model of the "
        "same family, which takes memory too. It changes no reply, and stops where it does not pay.",
    )
    adapters: tuple[AdapterSettings, ...] = Field(
        (),
        description="LoRA adapters, each a model of its own: tables of `name`, `path` (a folder that "
        "mlx-lm's training wrote) and `base` (the model it was trained on). They share one copy of their "
        "base model's weights.",
    )
    memory_ceiling: ByteSize | None = Field(
        None,
        ge=1,
        description="Memory that all models together may take: weights, requests, and their processes. Idle "
        "models leave before another is loaded, and what could still exceed it is refused with figures. "
        "Default: the machine's memory but `memory_reserve`, and no more than 95 % of what Metal recommends.",
    )
    memory_reserve: ByteSize | None = Field(
        None,
        ge=0,
        description="Memory that is left to everything else. Default: 35 % of the machine's, at least 2 GiB "
        "and at most 12 GiB.",
    )
    cache_limit: ByteSize | None = Field(
        None,
        ge=0,
        description="Freed memory that MLX keeps for its next step, in each worker. Default: 5 % of the "
        "machine's memory, at least 512 MiB and at most 4 GiB.",
    )
    wired_limit: ByteSize | None = Field(
        None,
        ge=0,
        description="Memory of each worker that macOS may not page out. Default: 0, which leaves it alone: "
        "wired memory and several requests at once have panicked macOS kernels. Does nothing without Metal.",
    )

    cpu_blas: str = Field(
        "auto",
        min_length=1,
        description="Library for matrix products on Linux, where the one that mlx brings is slow: `auto` "
        "takes the package scipy-openblas32 or the system's OpenBLAS, `off` takes mlx's own, and anything "
        "else is the file of an OpenBLAS with 32-bit integers.",
    )
    cpu_threads: int | None = Field(
        None,
        ge=1,
        description="Threads on which that library computes. Default: OPENBLAS_NUM_THREADS, or all cores but "
        "one, which stays free for whoever else there is.",
    )
    cpu_weights: Literal["auto", "stored", "float32"] = Field(
        "auto",
        description="How weights are held where there is no GPU: `stored` as they are, `float32` unpacked, "
        "which makes prompts some twenty times faster and takes up to eight times the memory, `auto` "
        "unpacked if that library is there and they fit into 60 % of what is free below `memory_ceiling`.",
    )

    load_timeout: Duration = Field(
        timedelta(minutes=10), description="How long a model may take to load before that counts as failed."
    )
    restart_wait: Duration = Field(
        timedelta(seconds=60),
        description="How long a call waits for a worker that is being restarted. The first load of a model "
        "is bound by `load_timeout` and the caller's deadline instead.",
    )
    restart_backoff_min: Duration = Field(
        timedelta(milliseconds=250),
        description="Wait before the second restart of a worker that crashes. The first is immediate.",
    )
    restart_backoff_max: Duration = Field(
        timedelta(seconds=15), description="Longest wait before a restart; waits double up to it."
    )
    quarantine_crashes: int = Field(
        4, ge=1, description="Crashes within `quarantine_window` after which a model is left alone."
    )
    quarantine_window: Duration = Field(
        timedelta(minutes=2), description="Time in which crashes are counted towards a quarantine."
    )
    failed_retry: Duration = Field(
        timedelta(seconds=30),
        description="How long a failed load is answered from memory before a call tries it again. "
        "Loading the model by name tries at once.",
    )
    health_interval: Duration = Field(
        timedelta(seconds=1), description="How often each worker is asked whether it is well."
    )
    health_timeout: Duration = Field(
        timedelta(seconds=5),
        description="A worker that does not answer for this long is replaced. One that the system has "
        "stopped, as SIGSTOP does, is replaced half a second after that is seen.",
    )
    stop_grace: Duration = Field(
        timedelta(seconds=5), description="How long a worker may take to end before it is killed."
    )

    @model_validator(mode="after")
    def _check_backoff(self) -> MlxSettings:
        if self.restart_backoff_min > self.restart_backoff_max:
            raise ValueError("restart_backoff_min is longer than restart_backoff_max")
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> MlxSettings:
        names = [adapter.name for adapter in self.adapters]
        for adapter in self.adapters:
            if names.count(adapter.name) > 1 or adapter.name in self.aliases:
                raise ValueError(f"adapters: the name {adapter.name!r} is there twice")
            if "=" in adapter.name or adapter.name == adapter.base or adapter.base in names:
                raise ValueError(
                    f"adapters: {adapter.name!r} needs a name of its own and a model as its base"
                )
        return self

    def pins(self, model_id: str) -> bool:
        """Whether a model stays in memory whatever else comes."""
        return model_id in {self.aliases.get(name, name) for name in self.pinned}

    @property
    def smg(self) -> str:
        """Model behind mlx.grpc.engine.MlxEngine; empty is none."""
        return self.default_model if self.smg_model is None else self.smg_model

    @property
    def worker_environment(self) -> dict[str, str]:
        """Environment variables that all workers get: what they have to know before they import mlx."""
        variables = {blas.LIBRARY_VARIABLE: self.cpu_blas, FOLDER_VARIABLE: str(self.cache_dir)}
        if self.cpu_threads is not None:
            variables[blas.THREADS_VARIABLE] = str(self.cpu_threads)
        return variables

    @property
    def preloaded(self) -> tuple[str, ...]:
        """Models to load at start."""
        if self.preload is not None:
            return self.preload
        return (self.default_model,) if self.default_model else ()
