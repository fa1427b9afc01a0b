"""Settings of the Ollama bridge: the `[ollama]` section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, field_validator

from forebay.kit.config import Address, ByteSize, Duration, ServerSettings, Settings
from forebay.ollama_bridge.names import canonical
from forebay.upstream.http import normalize_base_url
from forebay.upstream.values import JsonObject, JsonValue

_KEEP_ALIVE = re.compile(r"-?\d+(\.\d+)?|-?(\d+(\.\d+)?(ns|us|ms|s|m|h))+")


def _check_keep_alive(value: str) -> str:
    if value and not _KEEP_ALIVE.fullmatch(value):
        raise ValueError('write a duration such as "5m" or "1h30m", "-1" for ever, or "0" for not at all')
    return value


KeepAlive = Annotated[str, AfterValidator(_check_keep_alive)]
"""How long a model stays in memory: `"5m"`, `"-1"`, `"0"`; empty leaves it to the server."""


def keep_alive_value(text: str) -> JsonValue:
    """Returns `keep_alive` as the server wants it: a number of seconds, else a duration."""
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else text


class ModelSettings(Settings):
    """Settings of one model that are fixed when it is loaded.

    Ollama loads a model anew whenever one of them differs from one request to
    the next, so the bridge sends the same ones with every request.
    """

    num_ctx: int | None = Field(None, ge=4, description="Tokens of prompt and reply together.")
    num_batch: int | None = Field(None, ge=1, description="Tokens of the prompt that are read at once.")
    num_gpu: int | None = Field(None, ge=-1, description="Layers on the GPU; -1 lets the server decide.")
    main_gpu: int | None = Field(None, ge=0, description="GPU for small tensors.")
    use_mmap: bool | None = Field(None, description="Whether the weights are mapped and not read.")
    num_thread: int | None = Field(None, ge=0, description="Threads; 0 lets the server decide.")
    draft_num_predict: int | None = Field(None, ge=0, description="Tokens a draft model proposes at once.")
    keep_alive: KeepAlive = Field("", description="How long it stays in memory after its last use.")
    slots: int | None = Field(None, ge=1, description="Calls of this model at once, if not `slots`.")

    def load_options(self) -> JsonObject:
        """Returns the options that are set and fixed at load time."""
        return {
            key: value
            for key, value in self.model_dump(exclude={"keep_alive", "slots"}).items()
            if value is not None
        }


_NO_MODEL_SETTINGS = ModelSettings.model_validate({})


class OllamaSettings(ServerSettings):
    """The `[ollama]` section."""

    address: Address = Field("127.0.0.1:50152", description="Address to listen on. Port 0 picks a free one.")
    name: str = Field("ollama", min_length=1, description="Name of this backend in answers and spans.")
    base_url: Annotated[str, AfterValidator(normalize_base_url)] = Field(
        "http://127.0.0.1:11434", description="Where Ollama listens."
    )
    host_header: str = Field(
        "",
        description="Value of the Host header, if not the base URL's. Ollama on a loopback address refuses "
        "public names; behind a proxy set localhost:11434.",
    )
    token: SecretStr = Field(
        SecretStr(""), description="Bearer token for a proxy in front of Ollama, which itself wants none."
    )
    slots: int = Field(
        1, ge=1, description="Calls of one model at once: what OLLAMA_NUM_PARALLEL is set to, 1 by default."
    )
    queue: int = Field(64, ge=0, description="Calls of one model that may wait for a slot.")
    queue_timeout: Duration = Field(timedelta(minutes=5), description="How long a call may wait for a slot.")
    keep_alive: KeepAlive = Field(
        "", description="How long models stay in memory after their last use; empty leaves it to the server."
    )
    preload: tuple[str, ...] = Field((), description="Models to load whenever the server comes up.")
    models: Mapping[str, ModelSettings] = Field(
        {}, description="Settings of single models that are fixed at load time, by name."
    )
    context_shift: bool = Field(
        False,
        description="Whether the server may drop the oldest tokens when a reply outgrows the context, "
        "without a word. False ends the reply with FINISH_REASON_LENGTH. A change loads the model anew.",
    )
    first_token_timeout: Duration = Field(
        timedelta(minutes=15),
        description="Silence before the first token. Reading a long prompt without a GPU takes minutes.",
    )
    stall_timeout: Duration = Field(
        timedelta(minutes=5),
        description="Silence between tokens. Parsers of tool calls hold text back, so it is not short.",
    )
    load_timeout: Duration = Field(timedelta(minutes=30), description="How long a load may take.")
    unload_timeout: Duration = Field(
        timedelta(minutes=1), description="How long to wait for a model to leave the memory."
    )
    request_timeout: Duration = Field(
        timedelta(seconds=30), description="How long a call that does no inference may take."
    )
    probe_interval: Duration = Field(timedelta(seconds=2), description="Time between two health probes.")
    progress_interval: Duration = Field(
        timedelta(seconds=5),
        description="Time between two signs of life while a call waits for its first token.",
    )
    embed_batch_texts: int = Field(64, ge=1, description="Most texts in one request.")
    embed_batch_characters: int = Field(65_536, ge=1, description="Most characters in one request.")
    embed_concurrency: int = Field(2, ge=1, description="Requests for embeddings at once.")
    embed_cache_size: ByteSize = Field(64 * 2**20, description="Room for embeddings kept; 0 keeps none.")
    embed_cache_ttl: Duration = Field(timedelta(hours=1), description="How long an embedding is kept.")
    allow_pull: bool = Field(True, description="Whether callers may fetch models.")
    pull_registries: tuple[str, ...] = Field(
        ("registry.ollama.ai", "hf.co", "huggingface.co"),
        description="Hosts that models may be fetched from. The server is the one that connects to them.",
    )
    allow_delete: bool = Field(True, description="Whether callers may remove models from disk.")
    allow_cloud: bool = Field(
        False, description="Whether models that Ollama runs on other people's machines may be used."
    )

    @field_validator("models")
    @classmethod
    def _canonical_names(cls, models: Mapping[str, ModelSettings]) -> Mapping[str, ModelSettings]:
        by_name = {canonical(name): settings for name, settings in models.items()}
        if len(by_name) < len(models):
            raise ValueError("two names in models are spellings of one model")
        return by_name

    def of_model(self, key: str) -> ModelSettings:
        """Returns the settings of a model by its canonical name."""
        return self.models.get(key) or _NO_MODEL_SETTINGS
