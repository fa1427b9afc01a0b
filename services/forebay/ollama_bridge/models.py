"""What the server has on disk and in memory, put together from its three lists of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from cachetools import LRUCache

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure, ModelNotFound
from forebay.ollama_bridge.client import Client, Version
from forebay.ollama_bridge.names import aliases, canonical, is_cloud
from forebay.upstream.singleflight import SingleFlight
from forebay.upstream.values import JsonObject, array, integer, obj, text

_FRESH: Final = 2.0  # seconds a list is used for: one list serves a burst of calls
_BLOB = re.compile(r"(?m)^FROM \S*?sha256[-:]([0-9a-f]{64})\s*$")
_NEVER: Final = 2200  # the year 2318 stands for a model that is never unloaded
_CAPABILITIES: Final[Mapping[pb.Capability.ValueType, str]] = {
    pb.CAPABILITY_GENERATE: "completion",
    pb.CAPABILITY_EMBED: "embedding",
    pb.CAPABILITY_VISION: "vision",
    pb.CAPABILITY_TOOLS: "tools",
    pb.CAPABILITY_REASONING: "thinking",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A model on disk."""

    key: str
    """Canonical name."""
    name: str
    """Name as listed."""
    digest: str = ""
    """Digest of the manifest: weights, template and parameters."""
    weights: str = ""
    """Digest of the weights alone, where the server tells it."""
    capabilities: frozenset[str] | None = None
    """What it can do; None is not known."""
    context: int = 0
    """Tokens it was trained for; 0 is not known."""
    dimensions: int = 0
    """Components of its embeddings; 0 is not known."""
    parameters: int = 0
    """Number of parameters; 0 is not known."""
    family: str = ""
    size_label: str = ""
    quantization: str = ""
    format: str = ""
    disk_bytes: int = 0
    remote: bool = False
    """Whether it runs on other people's machines."""

    def can(self, capability: str) -> bool:
        """Whether it can do something; what is not known it may try."""
        return self.capabilities is None or capability in self.capabilities

    @property
    def embeds_only(self) -> bool:
        """Whether it embeds and does not generate."""
        known = self.capabilities
        return known is not None and "embedding" in known and "completion" not in known

    def identity(self) -> pb.WeightIdentity:
        """Returns which weights these are."""
        digest = self.weights or self.digest
        return pb.WeightIdentity(
            family=self.family,
            size_label=self.size_label,
            quantization=self.quantization,
            digest=f"sha256:{digest}" if digest else "",
            format=self.format,
            parameter_count=self.parameters,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory."""

    key: str
    """Canonical name."""
    context: int = 0
    """Tokens of prompt and reply together; 0 is not known."""
    memory_bytes: int = 0
    expires: datetime | None = None
    """When it is unloaded; None is never or not known."""


def read_tag(entry: JsonObject) -> Facts | None:
    """Reads an entry of `/api/tags`; None if it has no name."""
    name = text(entry, "name") or text(entry, "model")
    if not name:
        return None
    details = obj(entry.get("details"))
    return Facts(
        key=canonical(name),
        name=name,
        digest=text(entry, "digest").removeprefix("sha256:"),
        capabilities=_capabilities(entry),
        context=integer(details, "context_length"),
        dimensions=integer(details, "embedding_length"),
        family=text(details, "family"),
        size_label=text(details, "parameter_size"),
        quantization=text(details, "quantization_level"),
        format=text(details, "format"),
        disk_bytes=integer(entry, "size"),
        remote=bool(text(entry, "remote_host") or text(entry, "remote_model")) or is_cloud(name),
    )


def read_show(facts: Facts, shown: JsonObject) -> Facts:
    """Adds what `/api/show` says of a model."""
    info = obj(shown.get("model_info"))
    family = text(info, "general.architecture") or facts.family
    blob = _BLOB.search(text(shown, "modelfile"))
    return replace(
        facts,
        capabilities=facts.capabilities if facts.capabilities is not None else _capabilities(shown),
        context=facts.context or integer(info, f"{family}.context_length"),
        dimensions=facts.dimensions or integer(info, f"{family}.embedding_length"),
        parameters=integer(info, "general.parameter_count"),
        weights=blob[1] if blob else "",
        remote=facts.remote or bool(text(shown, "remote_host") or text(shown, "remote_model")),
    )


def _capabilities(source: JsonObject) -> frozenset[str] | None:
    if not isinstance(source.get("capabilities"), list):
        return None
    return frozenset(name for name in array(source["capabilities"]) if isinstance(name, str))


def read_process(entry: JsonObject) -> Loaded | None:
    """Reads an entry of `/api/ps`; None if it has no name."""
    name = text(entry, "name") or text(entry, "model")
    if not name:
        return None
    return Loaded(
        key=canonical(name),
        context=integer(entry, "context_length"),
        memory_bytes=integer(entry, "size"),
        expires=read_time(text(entry, "expires_at")),
    )


def read_time(said: str) -> datetime | None:
    """Reads a moment of RFC 3339 with any number of digits; None if it is none, or stands for never."""
    try:
        moment = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", said))
    except ValueError:
        return None
    if moment.tzinfo is None or not 1970 < moment.year < _NEVER:
        return None
    return moment.astimezone(UTC)


class Catalogue:
    """The server's models, asked for at most every two seconds however many calls there are.

    Args:
        client: the server.
        backend: the backend's name, for messages.
        flights: joins the calls that ask for the same list.
    """

    def __init__(self, client: Client, *, backend: str, flights: SingleFlight[str, None, None]) -> None:
        self._client = client
        self._backend = backend
        self._flights = flights
        self._shown: LRUCache[str, Facts] = LRUCache(512)
        self._facts: dict[str, Facts] = {}
        self._facts_until = 0.0
        self._loaded: dict[str, Loaded] = {}
        self._loaded_until = 0.0

    def forget(self) -> None:
        """Asks anew the next time, since something has changed."""
        self._facts_until = self._loaded_until = 0.0

    async def find(self, name: str, *, fresh: bool = False) -> Facts:
        """Returns what is known of a model.

        Args:
            name: in any spelling.
            fresh: whether the server is to be asked in any case.

        Raises:
            ModelNotFound: the server has no such model.
        """
        key = canonical(name)
        if fresh:
            await self._read_facts()
        elif key not in self._facts or self._facts_until <= _now():
            await self._flights.join("tags", lambda _: self._read_facts())
        facts = self._facts.get(key)
        if facts is None:
            raise ModelNotFound(
                f"{self._backend} has no model {name!r}",
                metadata={"backend": self._backend, "model": name},
            )
        return await self._complete(facts)

    async def all(self) -> list[Facts]:
        """Returns every model on disk, as the server lists them now."""
        await self._read_facts()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._complete(facts)) for facts in self._facts.values()]
        return [task.result() for task in tasks]

    async def loaded(self, *, fresh: bool = False) -> Mapping[str, Loaded]:
        """Returns the models in memory by canonical name."""
        if fresh:
            await self._read_loaded()
        elif self._loaded_until <= _now():
            await self._flights.join("ps", lambda _: self._read_loaded())
        return self._loaded

    async def _read_loaded(self) -> None:
        entries = [read_process(entry) for entry in await self._client.processes()]
        self._loaded = {entry.key: entry for entry in entries if entry is not None}
        self._loaded_until = _now() + _FRESH

    async def _read_facts(self) -> None:
        entries = [read_tag(entry) for entry in await self._client.tags()]
        self._facts = {facts.key: facts for facts in entries if facts is not None}
        self._facts_until = _now() + _FRESH

    async def _complete(self, facts: Facts) -> Facts:
        """Adds what only `/api/show` tells, which is kept for as long as the digest stays the same."""
        if facts.remote:
            return facts
        identity = f"{facts.key} {facts.digest}"
        known = self._shown.get(identity)
        if known is None:
            try:
                known = read_show(facts, await self._client.show(facts.name))
            except Failure:
                return facts  # it serves as well without
            if facts.digest:
                self._shown[identity] = known
        return known


def _now() -> float:
    return asyncio.get_running_loop().time()


def describe(
    facts: Facts,
    loaded: Loaded | None,
    *,
    backend: str,
    version: Version,
    slots: int,
    state: pb.Model.State.ValueType = pb.Model.STATE_UNSPECIFIED,
) -> pb.Model:
    """Returns a model as the contract describes it.

    Args:
        facts: what it is.
        loaded: how it is in memory, if it is.
        backend: the backend's name.
        version: the server's.
        slots: calls of it at once.
        state: its state, where that is not for `loaded` to say.
    """
    if state == pb.Model.STATE_UNSPECIFIED:
        state = pb.Model.STATE_AVAILABLE if loaded is None else pb.Model.STATE_ACTIVE
    model = pb.Model(
        id=facts.name,
        backend=backend,
        state=state,
        context_token_count=facts.context,
        memory_bytes=loaded.memory_bytes if loaded else facts.disk_bytes,
        loaded_context_token_count=loaded.context if loaded else 0,
        slot_count=1 if facts.embeds_only else slots,
        weights=facts.identity(),
        aliases=aliases(facts.name),
        disk_bytes=facts.disk_bytes,
        detail=version.warning,
    )
    if loaded is not None and loaded.expires is not None:
        model.expire_time.FromDatetime(loaded.expires)
    yes, no = pb.CapabilityReport.SUPPORT_YES, pb.CapabilityReport.SUPPORT_NO
    if facts.capabilities is not None:
        for capability, name in _CAPABILITIES.items():
            model.capabilities.add(capability=capability, support=yes if name in facts.capabilities else no)
    generates = facts.can("completion")
    by_server: dict[pb.Capability.ValueType, bool] = {
        pb.CAPABILITY_JSON_SCHEMA: generates and version.has_schemas,
        pb.CAPABILITY_SEED: generates,
        pb.CAPABILITY_LOGPROBS: generates and version.has_logprobs,
        pb.CAPABILITY_GRAMMAR: False,
        pb.CAPABILITY_CONTINUE: False,
        pb.CAPABILITY_COUNT_TOKENS: False,
        pb.CAPABILITY_TOKEN_IDS: False,
        pb.CAPABILITY_STOP_TOKEN_IDS: False,
    }
    for capability, can in by_server.items():
        model.capabilities.add(capability=capability, support=yes if can else no)
    return model
