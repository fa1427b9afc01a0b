"""Settings of the MLX service."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from forebay.kit.config import Address, ByteSize, Duration, ServerSettings
from forebay.mlx_service import blas
from forebay.mlx_service.default_model import DEFAULT_MODEL
from forebay.mlx_service.fetch import default_cache_dir


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
    cache_dir: Path = Field(
        default_factory=default_cache_dir,
        description="Folder for fetched and converted models. Default: the user's cache folder; "
        "FOREBAY_CACHE_DIR names another.",
    )
    aliases: dict[str, str] = Field(
        {}, description="Other names for models: name = identifier. A name may be another model's."
    )
    default_model: str = Field(
        DEFAULT_MODEL.id, description="Model that `preload` starts with. Empty has none."
    )
    fetch_default_model: bool = Field(
        True,
        description="Whether the embedded default models, for chat and for embeddings, are fetched (93 and "
        "84 MB, once) when they are asked for and are not there.",
    )

    preload: tuple[str, ...] | None = Field(
        None, description="Models to load at start. Default: the default model. An empty list loads none."
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
    max_rows: int = Field(
        8,
        ge=1,
        le=64,
        description="Most replies one model generates at once. Beyond 8 they slow each other down.",
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
    memory_ceiling: ByteSize | None = Field(
        None,
        ge=1,
        description="Memory that all models together may take: weights, requests, and their processes. Idle "
        "models leave before another is loaded, and what could still exceed it is refused with figures. "
        "Default: the machine's memory but 35 %, of that at least 2 GiB and at most 12 GiB, and no more than "
        "95 % of what Metal recommends.",
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
        timedelta(milliseconds=250), description="Wait before the first restart of a crashed worker."
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
        timedelta(seconds=5), description="A worker that does not answer for this long is replaced."
    )
    stop_grace: Duration = Field(
        timedelta(seconds=5), description="How long a worker may take to end before it is killed."
    )

    @model_validator(mode="after")
    def _check_backoff(self) -> MlxSettings:
        if self.restart_backoff_min > self.restart_backoff_max:
            raise ValueError("restart_backoff_min is longer than restart_backoff_max")
        return self

    @property
    def worker_environment(self) -> dict[str, str]:
        """Environment variables that all workers get: what they have to know before they import mlx."""
        variables = {blas.LIBRARY_VARIABLE: self.cpu_blas}
        if self.cpu_threads is not None:
            variables[blas.THREADS_VARIABLE] = str(self.cpu_threads)
        return variables

    @property
    def preloaded(self) -> tuple[str, ...]:
        """Models to load at start."""
        if self.preload is not None:
            return self.preload
        return (self.default_model,) if self.default_model else ()
