"""The part of the GGUF import that needs mlx: reading the blocks and writing safetensors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from forebay.mlx_service.models.gguf_file import GgufError
from forebay.mlx_service.worker.runtime import leave_thread, mx

Array: TypeAlias = Any
"""An `mx.array`. mlx has no types that mypy can follow."""


def write(source: Path, target: Path, rename: Callable[[str], str], *, expected: int) -> None:
    """Writes the weights of a GGUF file as safetensors.

    Args:
        source: the GGUF file.
        target: the file to write.
        rename: gives the name that mlx-lm has for a tensor.
        expected: tensors that the file is known to hold.

    Raises:
        GgufError: mlx cannot read the file.
    """
    # On a thread of its own: one that gave back its streams, as each must in the end, cannot use mlx again.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_write, source, target, rename, expected).result()


def _write(source: Path, target: Path, rename: Callable[[str], str], expected: int) -> None:
    try:
        loaded: Any = mx.load(str(source), format="gguf")
        arrays: dict[str, Array] = loaded
        if sum(name.endswith(".weight") for name in arrays) != expected:
            raise GgufError(f"{source.name} holds tensors that mlx did not read")
        weights = {rename(name): _fitting(array) for name, array in arrays.items()}
        mx.save_safetensors(str(target), weights, metadata={"format": "mlx"})
    except (RuntimeError, ValueError) as error:
        raise GgufError(f"{source.name} cannot be read by mlx: {error}") from error
    finally:
        leave_thread()


def _fitting(array: Array) -> Array:
    """Returns the array in the type that steps are quick in.

    What is not packed sets the width that a step computes in. On Metal that is to be 16 bits; on a CPU, which
    has no arithmetic of 16 bits, a step in 32 bits is eight times as fast.
    """
    if array.dtype == mx.float32 and mx.metal.is_available():
        return array.astype(mx.float16)
    return array
