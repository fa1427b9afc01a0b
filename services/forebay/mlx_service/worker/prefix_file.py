"""Pieces of evaluated prefixes as files: safetensors, checked to the last byte, for their owner only.

A piece is what was kept of some tokens of a text. Its name and head say of
which: `begin` and `end` are digests of the text before the piece and of the
text with it, both mixed with everything that state depends on, so that a piece
is found only by who asks for the very same text with the very same model, and
where callers are kept apart, by the same caller.

No file is synced to the disk. After a power failure it may be cut short or
hold anything; then its check digest is wrong, and it is read from the model
again. A file appears under its name whole or not at all.

Nothing here knows mlx: it runs on a thread of its own, on plain memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

Block: TypeAlias = npt.NDArray[np.generic]
"""Plain memory."""

SUFFIX = ".safetensors"
VERSION = "prefix 1"

TYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
    "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
}  # fmt: skip
"""How numpy holds what safetensors names. It knows no bfloat16, which is held as the integers of its bits."""

_LONGEST_HEAD = 16 << 20
"""Most bytes of a head: ten times what the longest piece needs."""


class BrokenPieceError(ValueError):
    """A file is no piece, not whole, or not what its name says. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a piece says of itself."""

    identity: str
    """Digest of all that state depends on but the text: model, versions, layout."""
    begin: str
    """Digest of the text before the piece."""
    end: str
    """Digest of the text with the piece."""
    skipped: int
    """Tokens of the text before the piece."""
    tokens: tuple[int, ...]
    """Tokens of the piece."""
    marks: tuple[tuple[int, int], ...] = ()
    """Numbers by which beginnings that end in the piece are known, and their tokens."""
    run_groups: tuple[tuple[int, ...], ...] = ()
    """How runs are stacked."""
    rest_groups: tuple[tuple[int, ...], ...] = ()
    """How the snapshot after the piece is stacked."""
    has_rest: bool = False
    """Whether there is such a snapshot."""

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.end}-{self.begin}{SUFFIX}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece with its arrays: safetensors' name of their type, and the memory."""

    head: Head
    runs: tuple[tuple[str, Block], ...]
    rest: tuple[tuple[str, Block], ...]


def write(folder: Path, piece: Piece) -> int:
    """Writes a piece and returns its bytes.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    head = piece.head
    blocks: dict[str, tuple[str, Block]] = {"tokens": ("I32", np.asarray(head.tokens, np.int32))}
    blocks |= {f"run.{i}": block for i, block in enumerate(piece.runs)}
    blocks |= {f"rest.{i}": block for i, block in enumerate(piece.rest)}
    entries: dict[str, object] = {}
    parts: list[memoryview] = []
    offset = 0
    for name, (kind, block) in blocks.items():
        whole = np.ascontiguousarray(block)
        entries[name] = {
            "dtype": kind,
            "shape": list(block.shape),
            "data_offsets": [offset, offset + whole.nbytes],
        }
        offset += whole.nbytes
        parts.append(whole.reshape(-1).view(np.uint8).data)
    meta = {
        "forebay": VERSION,
        "identity": head.identity,
        "begin": head.begin,
        "end": head.end,
        "skipped": str(head.skipped),
        "text": _text_digest(head.tokens),
        "marks": json.dumps(head.marks),
        "run_groups": json.dumps(head.run_groups),
        "rest_groups": json.dumps(head.rest_groups),
        "has_rest": json.dumps(head.has_rest),
    }
    check = _check(meta, entries, parts)
    text = json.dumps({"__metadata__": {**meta, "check": check}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    scratch = folder / f".{os.getpid()}-{head.name}.tmp"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with os.fdopen(os.open(scratch, flags, 0o600), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for part in parts:
                file.write(part)
        scratch.replace(folder / head.name)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    return 8 + len(text) + offset


def read_head(path: Path) -> Head:
    """Returns what a file says of itself. Whether it says the truth only `read` can tell.

    Raises:
        BrokenPieceError: it is no piece, or cut short.
        OSError: it cannot be read.
    """
    with _opened(path) as (descriptor, size):
        head, _, _ = _parse(path, descriptor, size)
        return head


def read(path: Path) -> Piece:
    """Returns a piece that is whole and the one that was written.

    Raises:
        BrokenPieceError: it is not.
        OSError: it cannot be read.
    """
    with _opened(path) as (descriptor, size):
        head, meta, entries = _parse(path, descriptor, size)
        length = sum(_span(entry)[1] - _span(entry)[0] for entry in entries.values())
        data = bytearray(length)
        view = memoryview(data)
        got = 0
        while got < length and (count := os.preadv(descriptor, [view[got:]], size - length + got)):
            got += count
    if got < length:
        raise BrokenPieceError("it is cut short")
    check = meta.pop("check", "")
    if _check(meta, entries, [view]) != check:
        raise BrokenPieceError("its digest is wrong")

    def blocks(kind: str) -> tuple[tuple[str, Block], ...]:
        names = [name for name in entries if name.startswith(f"{kind}.")]
        return tuple(_block(entries[f"{kind}.{i}"], view) for i in range(len(names)))

    return Piece(head, blocks("run"), blocks("rest"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise BrokenPieceError("it is no file of ours")
        yield descriptor, found.st_size
    finally:
        os.close(descriptor)


def _parse(
    path: Path, descriptor: int, size: int
) -> tuple[Head, dict[str, str], dict[str, Mapping[str, object]]]:
    try:
        (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
        if length > min(_LONGEST_HEAD, size - 8):
            raise BrokenPieceError("it is cut short")
        entries = json.loads(os.pread(descriptor, length, 8))
        meta = entries.pop("__metadata__")
        end = max(_span(entry)[1] for entry in entries.values())
        first, last = _span(entries["tokens"])
        tokens = np.frombuffer(os.pread(descriptor, last - first, 8 + length + first), np.int32)
        head = Head(
            identity=meta["identity"],
            begin=meta["begin"],
            end=meta["end"],
            skipped=int(meta["skipped"]),
            tokens=tuple(tokens.tolist()),
            marks=tuple((int(mark), int(count)) for mark, count in json.loads(meta["marks"])),
            run_groups=_groups(meta["run_groups"]),
            rest_groups=_groups(meta["rest_groups"]),
            has_rest=bool(json.loads(meta["has_rest"])),
        )
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenPieceError(f"its head cannot be read: {type(error).__name__}") from error
    is_named = path.name == head.name and meta.get("text") == _text_digest(head.tokens)
    if meta.get("forebay") != VERSION or not is_named or not head.tokens:
        raise BrokenPieceError("it is not what its name says")
    if size != 8 + length + end:
        raise BrokenPieceError("it is cut short")
    return head, meta, entries


def _span(entry: Mapping[str, object]) -> tuple[int, int]:
    first, last = cast("Sequence[int]", entry["data_offsets"])
    if not 0 <= first <= last:
        raise ValueError("an array has no place")
    return int(first), int(last)


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(place) for place in group) for group in json.loads(text))


def _block(entry: Mapping[str, object], data: memoryview) -> tuple[str, Block]:
    first, last = _span(entry)
    kind = str(entry["dtype"])
    shape = cast("Sequence[int]", entry["shape"])
    return kind, np.frombuffer(data[first:last], TYPES[kind]).reshape(shape)


def _text_digest(tokens: Sequence[int]) -> str:
    """Of what the piece is, so that a wrong text is noticed before the whole file is read."""
    return hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=20).hexdigest()


def _check(meta: Mapping[str, str], entries: Mapping[str, object], parts: Sequence[memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    digest.update(json.dumps([meta, entries], sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
