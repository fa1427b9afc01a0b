"""Reads what an adapter's folder holds, without mlx and without loading it.

An adapter is what fine-tuning with mlx-lm writes: `adapter_config.json` and
`adapters.safetensors`. It is a few megabytes that change a base model, and
serves as a model of its own beside it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from forebay.mlx_service.models.describe import NotAModelError

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"

PEFT_WEIGHTS = "adapter_model.safetensors"
"""What the PEFT library writes. Its tensors have other names and another orientation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What an adapter's folder holds."""

    path: Path
    kind: str
    """`lora` or `dora`."""
    rank: int
    """Rank of its matrices. 0 is unknown."""
    digest: str
    """`sha256:` and the digest of configuration and weights."""
    disk_bytes: int

    def weights_digest(self, base: str) -> str:
        """Returns the digest of a base model, given by its own digest, as this adapter changes it."""
        return f"sha256:{hashlib.sha256(f'{base} {self.digest}'.encode()).hexdigest()}"


def describe_adapter(path: Path) -> AdapterFacts:
    """Returns what the folder holds. Reads all of it; answers are kept until a file changes.

    Raises:
        NotAModelError: it holds no adapter that can be used. The message names the file and the remedy.
    """
    path = path.expanduser().resolve()
    if (path / PEFT_WEIGHTS).exists() and not (path / WEIGHTS).exists():
        raise NotAModelError(
            f"{path / PEFT_WEIGHTS} is an adapter of the PEFT library: convert it to mlx-lm's {WEIGHTS} first"
        )
    try:
        stamp = tuple((path / name).stat().st_mtime_ns for name in (CONFIG, WEIGHTS))
        size = sum((path / name).stat().st_size for name in (CONFIG, WEIGHTS))
    except FileNotFoundError as error:
        raise NotAModelError(
            f"{error.filename} is not there: an adapter is a folder with {CONFIG} and {WEIGHTS}"
        ) from error
    except OSError as error:
        raise NotAModelError(f"{error.filename} cannot be read: {error.strerror}") from error
    return _describe(path, size, stamp)


@lru_cache(maxsize=256)
def _describe(path: Path, size: int, stamp: tuple[int, ...]) -> AdapterFacts:
    digest = hashlib.sha256()
    try:
        text = (path / CONFIG).read_bytes()
        config = json.loads(text)
        digest.update(text)
        with (path / WEIGHTS).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError) as error:
        raise NotAModelError(f"{path / CONFIG} or {WEIGHTS} beside it cannot be read: {error}") from error
    parameters = config.get("lora_parameters") if isinstance(config, dict) else None
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else ""
    if kind not in {"lora", "dora"} or not isinstance(parameters, dict) or "num_layers" not in config:
        raise NotAModelError(
            f"{path / CONFIG} is no adapter of mlx-lm: it needs fine_tune_type lora or dora, num_layers and "
            "lora_parameters. A full fine-tune is a model: put its folder into model_folders"
        )
    rank = parameters.get("rank")
    return AdapterFacts(
        path=path,
        kind=str(kind),
        rank=rank if isinstance(rank, int) else 0,
        digest=f"sha256:{digest.hexdigest()}",
        disk_bytes=size,
    )
