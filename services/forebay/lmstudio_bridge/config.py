"""Settings of the bridge to LM Studio: section `[lmstudio]`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pydantic
from pydantic import Field, SecretStr

from forebay.kit.config import Address, ByteSize, Duration, ServerSettings, Settings
from forebay.upstream.http import normalize_base_url

TOKEN_VARIABLES = ("LM_API_TOKEN", "LMSTUDIO_API_TOKEN")
"""Environment variables that LM Studio's own tools read; the first that is set counts."""


class LoadSettings(Settings):
    """How one model is loaded. What is not set is LM Studio's own default."""

    context_length: int | None = Field(
        None, ge=1, description="Tokens of prompt and reply together to make room for."
    )
    eval_batch_size: int | None = Field(None, ge=1, description="Tokens of a prompt read at once.")
    flash_attention: bool | None = Field(None, description="Whether to use flash attention (GGUF only).")
    num_experts: int | None = Field(
        None, ge=1, description="Experts to use of a mixture-of-experts model (GGUF only)."
    )
    offload_kv_cache_to_gpu: bool | None = Field(
        None, description="Whether the KV cache is kept in GPU memory (GGUF only)."
    )

    def body(self) -> dict[str, int | bool]:
        """Returns the settings that are set, as LM Studio spells them."""
        return self.model_dump(exclude_none=True)


class LmStudioSettings(ServerSettings):
    """Where LM Studio is, and how much it may be given at once."""

    address: Address = Field("127.0.0.1:50153", description="Address to listen on. Port 0 picks a free one.")
    name: str = Field("lmstudio", min_length=1, max_length=64, description="The backend's name.")
    base_url: str = Field(
        "http://127.0.0.1:1234",
        description="Where LM Studio's server is. A `/v1` or `/api/v1` at its end is dropped.",
    )
    token: SecretStr | None = Field(
        None,
        description="API token, if LM Studio asks for one. Unset takes LM_API_TOKEN or "
        "LMSTUDIO_API_TOKEN from the environment.",
    )
    token_file: Path | None = Field(None, description="File that holds the API token, in place of `token`.")
    greeting: bool = Field(
        True,
        description="Whether the server must greet as LM Studio does. False serves through any "
        "OpenAI-compatible server at that address.",
    )
    native_chat: bool = Field(
        False,
        description="Whether plain questions go to LM Studio's native chat, which tells how far it is with "
        "the prompt. It takes no seed, no stop sequences, no tools and no earlier answers; calls with any "
        "of these go the usual way.",
    )
    slots: int = Field(
        0,
        ge=0,
        le=1024,
        description="Calls at once on one model. 0 takes LM Studio's own number where it tells one "
        "(0.4 and later), else 1.",
    )
    queue: int = Field(64, ge=0, le=100_000, description="Calls that may wait for a slot of one model.")
    queue_timeout: Duration | None = Field(
        timedelta(minutes=2), description="How long a call may wait for a slot. Unset is without end."
    )
    ttl: Duration | None = Field(
        None,
        description="How long a model that this bridge loaded stays in memory after its last use. Unset is "
        "until somebody unloads it. The bridge keeps the time, as LM Studio does so only for models that it "
        "loads by itself.",
    )
    load: LoadSettings = Field(LoadSettings.model_validate({}), description="How models are loaded.")
    models: Mapping[str, LoadSettings] = Field(
        {}, description="How single models are loaded, by their keys; goes before `load`, key by key."
    )
    preload: tuple[str, ...] = Field(
        (), description="Models to load when LM Studio is there, and to keep. `ttl` does not unload them."
    )
    connect_timeout: Duration = Field(timedelta(seconds=5), description="How long connecting may take.")
    first_byte_timeout: Duration | None = Field(
        timedelta(minutes=10),
        description="How long LM Studio may take until its first byte: it is silent while it reads a long "
        "prompt. Unset is without end.",
    )
    between_bytes_timeout: Duration | None = Field(
        timedelta(minutes=5),
        description="How long LM Studio may be silent in the middle of a reply. It sends nothing while it "
        "reads another caller's long prompt. Unset is without end.",
    )
    load_timeout: Duration = Field(timedelta(minutes=30), description="How long loading a model may take.")
    probe_interval: Duration = Field(
        timedelta(seconds=2), description="Time between two looks whether LM Studio is there."
    )
    pull_interval: Duration = Field(
        timedelta(seconds=1), description="Time between two looks at how far a download is."
    )
    line_limit: ByteSize = Field(
        64 * 1024 * 1024, description="Most bytes of one event, and of one whole reply, of LM Studio."
    )
    embed_batch_texts: int = Field(
        64,
        ge=1,
        le=4096,
        description="Most texts sent in one request. LM Studio's engine fails on big batches.",
    )
    embed_batch_characters: int = Field(65_536, ge=1, description="Most characters sent in one request.")
    embed_concurrency: int = Field(2, ge=1, le=64, description="Requests for embeddings at once.")
    embed_cache: ByteSize = Field(64 * 1024 * 1024, description="Memory for embeddings kept. 0 keeps none.")
    embed_cache_ttl: Duration = Field(timedelta(hours=1), description="How long an embedding is kept.")

    @pydantic.field_validator("base_url")
    @classmethod
    def _normalize(cls, value: str) -> str:
        return normalize_base_url(value)

    @pydantic.model_validator(mode="after")
    def _check_token(self) -> LmStudioSettings:
        if self.token is not None and self.token_file is not None:
            raise ValueError("set token or token_file, not both")
        return self

    def read_token(self, env: Mapping[str, str] | None = None) -> str:
        """Returns the API token, empty if there is none.

        Raises:
            OSError: the file cannot be read.
        """
        if self.token_file is not None:
            return self.token_file.read_text(encoding="utf-8").strip()
        if self.token is not None:
            return self.token.get_secret_value()
        env = os.environ if env is None else env
        return next((env[name].strip() for name in TOKEN_VARIABLES if env.get(name)), "")

    def load_options(self, key: str) -> dict[str, int | bool]:
        """Returns how a model is to be loaded, as LM Studio spells it."""
        own = self.models.get(key)
        return self.load.body() | (own.body() if own is not None else {})
