"""Reads the head of a GGUF file: its metadata and what tensors it holds, without mlx and without a weight.

Lengths in the file come from whoever made it, so each is checked against what
is left of the file before anything of that length is read.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

MAGIC = b"GGUF"
VERSIONS = frozenset({2, 3})

Value: TypeAlias = "int | float | bool | str | list[Value]"
"""A value of the metadata."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9

_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class GgufError(ValueError):
    """The file cannot be used. The message says why, in one line for people."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as mlx has it."""
    type: str
    """Such as `F32` or `Q4_1`."""


@dataclass(frozen=True, slots=True)
class Head:
    """Everything of a GGUF file but its weights."""

    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]

    @property
    def most_common_type(self) -> str:
        """The type that most of its tensors of two dimensions have: those are the weights. Empty is none."""
        counts = Counter(tensor.type for tensor in self.tensors if len(tensor.shape) > 1)
        return counts.most_common(1)[0][0] if counts else ""

    @property
    def context_token_count(self) -> int:
        """Most tokens that the model was made for. 0 is unknown."""
        value = self.metadata.get(f"{self.text('general.architecture')}.context_length")
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns an integer of the metadata.

        Raises:
            GgufError: there is none and no default.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise GgufError(f"the file's {key} is missing or no integer")
        return value

    def number(self, key: str, default: float) -> float:
        """Returns a number of the metadata, or the default."""
        value = self.metadata.get(key, default)
        return float(value) if isinstance(value, int | float) else default

    def text(self, key: str, default: str = "") -> str:
        """Returns a text of the metadata, or the default."""
        value = self.metadata.get(key, default)
        return value if isinstance(value, str) else default

    def items(self, key: str) -> list[Value]:
        """Returns a list of the metadata, empty if there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, list) else []


def read_head(path: Path) -> Head:
    """Reads a GGUF file up to its weights.

    Raises:
        GgufError: it is no GGUF file, or it is broken.
    """
    try:
        with path.open("rb") as file:
            reader = _Reader(file, path.stat().st_size)
            if reader.take(4) != MAGIC:
                raise GgufError(f"{path.name} is no GGUF file")
            version = reader.scalar("I")
            if version not in VERSIONS:
                raise GgufError(f"{path.name} is of GGUF version {version}; versions 2 and 3 can be read")
            tensor_count, entry_count = int(reader.scalar("Q")), int(reader.scalar("Q"))
            metadata = {}
            for _ in range(entry_count):
                key = reader.string()
                metadata[key] = reader.value(int(reader.scalar("I")))
            tensors = tuple(_tensor(reader) for _ in range(tensor_count))
    except OSError as error:
        raise GgufError(f"{path.name} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, struct.error) as error:
        raise GgufError(f"{path.name} is broken: {error}") from error
    return Head(metadata, tensors)


def _tensor(reader: _Reader) -> Tensor:
    name = reader.string()
    dimensions = int(reader.scalar("I"))
    shape = [int(reader.scalar("Q")) for _ in range(reader.count(dimensions, 8))]
    kind = int(reader.scalar("I"))
    reader.scalar("Q")  # where its weights begin
    return Tensor(name, tuple(reversed(shape)), _TYPES.get(kind, f"type {kind}"))


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def take(self, length: int) -> bytes:
        """Reads so many bytes."""
        if length > self._left:
            raise GgufError("the GGUF file is cut short or broken")
        self._left -= length
        return self._file.read(length)

    def count(self, count: int, size: int) -> int:
        """Checks that so many items of at least this size can be left, and returns their number."""
        if count * size > self._left:
            raise GgufError("the GGUF file is cut short or broken")
        return count

    def scalar(self, code: str) -> int | float | bool:
        """Reads a number or a truth value."""
        value: int | float | bool = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def string(self) -> str:
        """Reads a text."""
        return self.take(int(self.scalar("Q"))).decode()

    def value(self, kind: int) -> Value:
        """Reads a value of a kind."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise GgufError(f"the GGUF file has a value of unknown kind {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list[Value]:
        kind, count = int(self.scalar("I")), int(self.scalar("Q"))
        if kind in _SCALARS:
            code = _SCALARS[kind]
            size = struct.calcsize(f"<{code}")
            return list(struct.unpack(f"<{self.count(count, size)}{code}", self.take(count * size)))
        return [self.value(kind) for _ in range(self.count(count, 8))]
