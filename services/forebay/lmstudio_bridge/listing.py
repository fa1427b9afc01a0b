"""What LM Studio says about its models, in each of its three dialects, read into one form.

Nothing in a listing is trusted to be there: keys differ by version and by kind
of model, so a field that is missing or odd costs that field and not the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.upstream.values import JsonObject, JsonValue, array, flag, integer, obj, text

_PARAMETERS: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT])", re.IGNORECASE)
_SCALE: Final = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

YES: Final = pb.CapabilityReport.SUPPORT_YES
NO: Final = pb.CapabilityReport.SUPPORT_NO


class Dialect(Enum):
    """Which of LM Studio's APIs a server has. A newer one includes the older ones."""

    NATIVE = "/api/v1"
    OLDER = "/api/v0"
    COMPATIBLE = "/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A model in memory."""

    id: str
    """What a request names to reach this instance."""
    context_length: int = 0
    """Tokens it has room for. 0 is unknown."""
    parallel: int = 0
    """Requests it serves at once. 0 is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model that LM Studio lists."""

    key: str
    """What requests name."""
    kind: Literal["llm", "embedding", ""] = ""
    """What it does. Empty is unknown."""
    instances: tuple[Instance, ...] = ()
    """Where it is in memory."""
    loading: bool = False
    """Whether LM Studio says that it is being loaded."""
    states_known: bool = True
    """Whether the dialect tells what is in memory."""
    max_context_length: int = 0
    """Tokens it was made for. 0 is unknown."""
    architecture: str = ""
    """Family of the model."""
    quantization: str = ""
    """Name of the quantisation."""
    size_bytes: int = 0
    """Bytes on disk. 0 is unknown."""
    params: str = ""
    """Size as people write it."""
    format: str = ""
    """`gguf` or `mlx`."""
    vision: bool | None = None
    """Whether it reads images. None is unknown."""
    tools: bool | None = None
    """Whether it was trained to call tools. None is unknown."""
    reasoning: bool | None = None
    """Whether it reasons. None is unknown."""
    efforts: tuple[str, ...] = ()
    """Settings of reasoning it knows, such as `on` or `low`."""

    @property
    def identity(self) -> str:
        """Tells these weights from others as well as LM Studio lets us. Empty if it tells nothing."""
        if not self.size_bytes:
            return ""
        return "|".join((self.key, self.architecture, self.quantization, self.format, str(self.size_bytes)))

    @property
    def slots(self) -> int:
        """Requests all its instances serve at once. 0 is unknown."""
        return sum(instance.parallel for instance in self.instances)

    @property
    def context_length(self) -> int:
        """Tokens that each of its instances has room for. 0 is unknown or not loaded."""
        return min((one.context_length for one in self.instances), default=0)

    def answers_to(self, name: str) -> bool:
        """Whether a request that names `name` means this model."""
        return name == self.key or any(one.id == name for one in self.instances)

    def weights(self) -> pb.WeightIdentity:
        """Returns which weights these are."""
        return pb.WeightIdentity(
            family=self.architecture,
            size_label=self.params,
            quantization=self.quantization,
            format={"mlx": "safetensors"}.get(self.format, self.format),
            parameter_count=parameter_count(self.params),
        )

    def capabilities(self, *, reports_logprobs: bool | None = None) -> list[pb.CapabilityReport]:
        """Returns what it can do, as far as LM Studio says or its API settles.

        Args:
            reports_logprobs: whether the server was seen to give log probabilities; None if it was not tried.
        """
        known: list[tuple[pb.Capability.ValueType, bool | None]] = []
        if self.kind == "embedding":
            known += [(pb.CAPABILITY_EMBED, True), (pb.CAPABILITY_GENERATE, False)]
        elif self.kind == "llm":
            known += [
                (pb.CAPABILITY_GENERATE, True),
                (pb.CAPABILITY_EMBED, False),
                (pb.CAPABILITY_VISION, self.vision),
                (pb.CAPABILITY_TOOLS, self.tools),
                (pb.CAPABILITY_REASONING, self.reasoning),
                (pb.CAPABILITY_JSON_SCHEMA, True),
                (pb.CAPABILITY_SEED, True),
            ]
        never = (
            pb.CAPABILITY_GRAMMAR,
            pb.CAPABILITY_CONTINUE,
            pb.CAPABILITY_COUNT_TOKENS,
            pb.CAPABILITY_TOKEN_IDS,
            pb.CAPABILITY_STOP_TOKEN_IDS,
        )
        known += [(capability, False) for capability in never]
        reports = [
            pb.CapabilityReport(capability=capability, support=YES if support else NO)
            for capability, support in known
            if support is not None
        ]
        if reports_logprobs is not None:
            reports.append(
                pb.CapabilityReport(
                    capability=pb.CAPABILITY_LOGPROBS, support=YES if reports_logprobs else NO, probed=True
                )
            )
        return reports


_ReadOne: TypeAlias = Callable[[JsonObject], Entry]


def read(value: JsonValue, dialect: Dialect) -> tuple[Entry, ...] | None:
    """Returns the models of a listing, or None if it is no listing in that dialect."""
    body = obj(value)
    if dialect is Dialect.NATIVE:
        listed = body.get("models")
        return _entries(listed, _native) if isinstance(listed, list) else None
    if "data" not in body or not isinstance(body["data"], list | None):
        return None
    return _entries(body["data"], _older if dialect is Dialect.OLDER else _compatible)


def parameter_count(label: str) -> int:
    """Returns the number that a label such as `7.6B` means, 0 if it means none."""
    found = _PARAMETERS.fullmatch(label.strip())
    return int(float(found[1]) * _SCALE[found[2].upper()]) if found else 0


def _entries(listed: JsonValue, read_one: _ReadOne) -> tuple[Entry, ...]:
    entries = (read_one(obj(one)) for one in array(listed))
    return tuple(entry for entry in entries if entry.key)


def _native(model: JsonObject) -> Entry:
    kind = text(model, "type")
    capabilities = obj(model.get("capabilities"))
    reasoning = obj(capabilities.get("reasoning"))
    told = "capabilities" in model
    return Entry(
        key=text(model, "key"),
        kind="embedding" if kind == "embedding" else "llm" if kind == "llm" else "",
        instances=tuple(_instances(array(model.get("loaded_instances")))),
        max_context_length=integer(model, "max_context_length"),
        architecture=text(model, "architecture"),
        quantization=text(obj(model.get("quantization")), "name"),
        size_bytes=integer(model, "size_bytes"),
        params=text(model, "params_string"),
        format=text(model, "format"),
        vision=flag(capabilities, "vision") if told else None,
        tools=flag(capabilities, "trained_for_tool_use") if told else None,
        reasoning=bool(reasoning) if told else None,
        efforts=tuple(one for one in array(reasoning.get("allowed_options")) if isinstance(one, str)),
    )


def _instances(listed: Iterable[JsonValue]) -> Iterable[Instance]:
    for one in listed:
        instance = obj(one)
        config = obj(instance.get("config"))
        if identifier := text(instance, "id"):
            yield Instance(
                id=identifier,
                context_length=integer(config, "context_length"),
                parallel=max(0, integer(config, "parallel")),
            )


def _older(model: JsonObject) -> Entry:
    key = text(model, "id")
    kind = text(model, "type")
    loaded = text(model, "state") == "loaded"
    instance = Instance(id=key, context_length=integer(model, "loaded_context_length"))
    capabilities = model.get("capabilities")
    return Entry(
        key=key,
        kind="embedding" if kind == "embeddings" else "llm" if kind in {"llm", "vlm"} else "",
        instances=(instance,) if loaded else (),
        loading=text(model, "state") == "loading",
        max_context_length=integer(model, "max_context_length"),
        architecture=text(model, "arch"),
        quantization=text(model, "quantization"),
        format=text(model, "compatibility_type"),
        vision=kind == "vlm" if kind in {"llm", "vlm"} else None,
        tools="tool_use" in array(capabilities) if isinstance(capabilities, list) else None,
    )


def _compatible(model: JsonObject) -> Entry:
    meta = obj(model.get("meta"))  # llama-server's
    return Entry(
        key=text(model, "id"),
        states_known=False,
        max_context_length=integer(meta, "n_ctx_train"),
        size_bytes=integer(meta, "size"),
    )
