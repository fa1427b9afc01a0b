"""Settings of the bridge to OpenAI-compatible servers: section `[openai]`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field, SecretStr

from forebay.kit.config import Address, ByteSize, Duration, ServerSettings
from forebay.upstream.http import normalize_base_url


class OpenAiSettings(ServerSettings):
    """Where the server is, what it is, and how much it may be given at once."""

    address: Address = Field("127.0.0.1:50154", description="Address to listen on. Port 0 picks a free one.")
    name: str = Field("openai", min_length=1, max_length=64, description="The backend's name.")
    base_url: str = Field(
        "http://127.0.0.1:8080",
        description="Where the server is. A `/v1` at its end is dropped.",
    )
    token: SecretStr | None = Field(None, description="API key of the server, if it wants one.")
    token_file: Path | None = Field(None, description="File that holds the API key, in place of `token`.")
    host_header: str = Field("", description="`Host` header to send in place of the base URL's.")
    flavor: Literal["auto", "llama-server", "mlx-lm", "vllm", "generic"] = Field(
        "auto",
        description="What the server is. It decides which settings of a request are honoured and which "
        "are refused. `auto` asks the server.",
    )
    models: tuple[str, ...] = Field(
        (), description="Models to offer. Empty offers all that the server lists."
    )
    pinned: tuple[str, ...] = Field(
        (), description="Models to load at start and keep, where the server can load models (router mode)."
    )
    keep_alive: Duration | None = Field(
        None,
        description="How long a model that this bridge loaded stays in memory after its last use. Unset is "
        "until somebody unloads it.",
    )
    slots: int = Field(
        0,
        ge=0,
        le=1024,
        description="Calls at once. 0 takes the server's own number where it tells one, else 4.",
    )
    queue: int = Field(64, ge=0, le=100_000, description="Calls that may wait for a slot.")
    queue_timeout: Duration | None = Field(
        timedelta(minutes=2), description="How long a call may wait for a slot. Unset is without end."
    )
    connect_timeout: Duration = Field(timedelta(seconds=5), description="How long connecting may take.")
    first_byte_timeout: Duration | None = Field(
        timedelta(minutes=10),
        description="How long the server may take until its first byte: it may load a model and read a "
        "long prompt before. Unset is without end.",
    )
    between_bytes_timeout: Duration | None = Field(
        timedelta(minutes=2),
        description="How long the server may be silent in the middle of a reply. Comments count as a sign "
        "of life. Unset is without end.",
    )
    load_timeout: Duration = Field(timedelta(minutes=15), description="How long loading a model may take.")
    probe_interval: Duration = Field(
        timedelta(seconds=2), description="Time between two looks whether the server is there."
    )
    line_limit: ByteSize = Field(
        64 * 1024 * 1024, description="Most bytes of one event, and of one whole reply, of the server."
    )
    embed_batch_texts: int = Field(64, ge=1, le=4096, description="Most texts sent in one request.")
    embed_batch_characters: int = Field(65_536, ge=1, description="Most characters sent in one request.")
    embed_concurrency: int = Field(2, ge=1, le=64, description="Requests for embeddings at once.")
    embed_cache: ByteSize = Field(64 * 1024 * 1024, description="Memory for embeddings kept. 0 keeps none.")
    embed_cache_ttl: Duration = Field(timedelta(hours=1), description="How long an embedding is kept.")

    @pydantic.field_validator("base_url")
    @classmethod
    def _normalize(cls, value: str) -> str:
        return normalize_base_url(value)

    @pydantic.model_validator(mode="after")
    def _check_token(self) -> OpenAiSettings:
        if self.token is not None and self.token_file is not None:
            raise ValueError("set token or token_file, not both")
        return self

    def read_token(self) -> str:
        """Returns the API key, empty if there is none.

        Raises:
            OSError: the file cannot be read.
        """
        if self.token_file is not None:
            return self.token_file.read_text(encoding="utf-8").strip()
        return self.token.get_secret_value() if self.token is not None else ""
