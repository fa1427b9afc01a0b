"""Reads what a model folder holds, without mlx and without reading a weight.

The front lists models it may never load, in a process that must not import
mlx. Everything here comes from `config.json` and from the headers of the
safetensors files: a few kilobytes, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from forebay.mlx_service.models.embedding import Recipe, RecipeError, is_embedding_model, read_recipe

HEADER_BYTES = 100_000_000
"""Most bytes of a safetensors header: the format's own limit."""

_SIZE = re.compile(r"(?<![A-Za-z0-9])(\d+(?:\.\d+)?)([bBmM])(?![A-Za-z0-9])")

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
    "model_max_length",
)


class NotAModelError(ValueError):
    """The folder does not hold a model that can be read. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model folder holds, as far as its configuration and headers tell."""

    path: Path
    """The folder."""
    family: str
    """Family as `config.json` names it, such as `llama` or `qwen2`."""
    size_label: str
    """Size as people write it, such as `135M` or `7.6B`. Empty if it is not known."""
    parameter_count: int
    """Number of parameters. 0 is unknown."""
    quantization: str
    """Such as `4bit` or `float16`. Empty if it is not known."""
    format: str
    """File format of the weights: `safetensors`."""
    outline: str
    """Digest of the configuration and of every header and size of the weights' files.

    Equal folders have equal ones. It says nothing of the weights themselves: see `identity`.
    """
    context_token_count: int
    """Most tokens of prompt and reply together, or of a text to embed, that the model was made for.
    0 is unknown."""
    disk_bytes: int
    """Bytes of all files of the folder."""
    weight_bytes: int
    """Bytes of the weights' files: close to the memory they take when loaded."""
    has_chat_template: bool
    """Whether the folder names a chat template."""
    architecture: str
    """Architecture's class, such as `LlamaForCausalLM`. Empty if it is not named."""
    recipe: Recipe | None
    """How it embeds texts. None is a model that generates them."""


def describe(path: Path) -> ModelFacts:
    """Returns what the folder holds. Answers are kept until a file of the folder changes.

    Raises:
        NotAModelError: there is no readable `config.json` or no weights.
    """
    path = path.resolve()
    return _describe(path, _stamp(path))


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the folder's files: changes when a file does."""
    try:
        files = sorted(p for p in path.iterdir() if p.is_file())
        return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    except OSError as error:
        raise NotAModelError(f"{path} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=256)
def _describe(path: Path, stamp: tuple[tuple[str, int, int], ...]) -> ModelFacts:
    config_text, config = _read_config(path / "config.json")
    weights = [name for name, _, _ in stamp if name.endswith(".safetensors") and name.startswith("model")]
    if not weights:
        raise NotAModelError(f"{path} holds no model*.safetensors")
    sizes = {name: size for name, size, _ in stamp}
    digest = hashlib.sha256(config_text)
    tensors: dict[str, _Tensor] = {}
    for name in weights:
        header = _read_header(path / name)
        digest.update(f"{name}\0{sizes[name]}\0".encode())
        digest.update(header)
        tensors.update(_tensors(header, path / name))
    quantization = _quantization(config, tensors)
    parameters = _parameter_count(config, tensors)
    text = cast("Mapping[str, object]", config.get("text_config")) or config
    architectures = config.get("architectures")
    recipe = _recipe(path, config)
    return ModelFacts(
        path=path,
        family=str(config.get("model_type", "")),
        size_label=_size_label(path.name, parameters),
        parameter_count=parameters,
        quantization=quantization,
        format="safetensors",
        outline=digest.hexdigest(),
        context_token_count=_context(text) if recipe is None else recipe.token_count,
        disk_bytes=sum(sizes.values()),
        weight_bytes=sum(sizes[name] for name in weights),
        has_chat_template=_has_chat_template(path),
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        recipe=recipe,
    )


def _recipe(path: Path, config: Mapping[str, object]) -> Recipe | None:
    if not is_embedding_model(path, config):
        return None
    try:
        return read_recipe(path, config)
    except RecipeError as error:
        raise NotAModelError(f"{path} cannot be used for embeddings: {error}") from error


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _read_config(path: Path) -> tuple[bytes, dict[str, object]]:
    try:
        text = path.read_bytes()
        config = json.loads(text)
    except FileNotFoundError as error:
        raise NotAModelError(f"{path.parent} holds no config.json") from error
    except (OSError, ValueError) as error:
        raise NotAModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise NotAModelError(f"{path} is not a JSON object")
    return text, config


def _read_header(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise NotAModelError(f"{path} is cut short")
            (length,) = struct.unpack("<Q", prefix)
            if length > HEADER_BYTES:
                raise NotAModelError(f"{path} is not a safetensors file")
            header = file.read(length)
    except OSError as error:
        raise NotAModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(header) < length:
        raise NotAModelError(f"{path} is cut short")
    return header


def _tensors(header: bytes, path: Path) -> dict[str, _Tensor]:
    try:
        entries = json.loads(header)
        return {
            name: _Tensor(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotAModelError(f"{path} has a broken safetensors header") from error


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _quantization(config: Mapping[str, object], tensors: Mapping[str, _Tensor]) -> str:
    for key in ("quantization", "quantization_config"):
        entry = config.get(key)
        if isinstance(entry, Mapping):
            if "bits" in entry:
                return f"{entry['bits']}bit"
            method = entry.get("quant_method")
            if method:
                return str(method)
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    if not sizes:
        return ""
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return _DTYPES.get(most, most.lower())


def _parameter_count(config: Mapping[str, object], tensors: Mapping[str, _Tensor]) -> int:
    """Counts parameters; a packed weight of 32-bit words holds `32 / bits` of them a word."""
    quantization = config.get("quantization")
    settings: Mapping[str, object] = quantization if isinstance(quantization, Mapping) else {}
    count = 0
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in {"scales", "biases"} and f"{stem}.weight" in tensors:
            continue
        if leaf == "weight" and tensor.dtype == "U32" and f"{stem}.scales" in tensors:
            own = settings.get(stem)
            bits = own.get("bits") if isinstance(own, Mapping) else settings.get("bits")
            if not isinstance(bits, int) or bits <= 0:
                return 0
            count += tensor.size * 32 // bits
        else:
            count += tensor.size
    return count


def _size_label(name: str, parameters: int) -> str:
    """Size in the folder's name, which is what people call the model, else counted."""
    found = _SIZE.search(name)
    if found:
        return f"{found[1]}{found[2].upper()}"
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= scale:
            number = parameters / scale
            return f"{number:.1f}{unit}" if number < 10 else f"{number:.0f}{unit}"
    return str(parameters) if parameters else ""


def _context(config: Mapping[str, object]) -> int:
    for key in _CONTEXT_KEYS:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").exists() or (path / "chat_template.json").exists():
        return True
    try:
        config = json.loads((path / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))
