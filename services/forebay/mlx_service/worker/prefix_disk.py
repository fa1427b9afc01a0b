"""The prefix cache's second tier: what leaves memory, and what is to outlive the process, on disk.

The engine's thread decides: it knows what is on disk from an index in memory,
looks a text up there, and hands over what is to be written. A thread of its
own does the reading and the writing, on plain memory, so no step of a row that
writes ever waits for a disk. What it has to say it says by posting calls to
the engine's thread, which alone turns memory into arrays and lets go of them.

Files lie in `folder/MODEL/IDENTITY`: the model's path and all that its state
depends on, hashed. Who starts with another identity removes those of the same
model that it replaces. Files that are broken, strange or cut short are removed
where they are met. The least recently used leave when the folder exceeds its
budget, which all models share.

A piece's place in a text is a digest of everything before it, mixed with whose
it is: two callers who are kept apart can never find each other's, whatever
they ask.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import queue
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from forebay.mlx_service.worker import prefix_file
from forebay.mlx_service.worker.prefix_cache import MIN_TOKENS, MOST_MARKS, Packed, Stretch
from forebay.mlx_service.worker.prefix_file import Block, BrokenPieceError, Head, Piece
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array

log = logging.getLogger(__name__)

PIECE_TOKENS = 1024
"""Most tokens of a file: read in a tenth of a second for a large model, and a whole is what leaves."""

PENDING_BYTES = 256 << 20
"""Memory that may wait to be written. What leaves memory while so much waits is not written."""

STALE_SECONDS = 120.0
"""Age from which a half-written file is what a process that died has left."""

FREE_SHARE = 0.5
"""Share of the disk's free space that may be taken, whatever the budget says."""

_OURS = re.compile(r"[0-9a-f]{24}/[0-9a-f]{32}/[0-9a-f]{40}-[0-9a-f]{40}\.safetensors")
"""Names of pieces within the folder. Nothing else in it is ever removed to make room."""

Write: TypeAlias = Literal["evicted", "finished"]
"""When what is kept is written: once it leaves memory, or as soon as its reply is over."""

Post: TypeAlias = Callable[[Callable[[], None]], None]
"""Has the engine's thread run a call soon."""

_DTYPES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.int8: "I8", mx.int16: "I16",
    mx.int32: "I32", mx.int64: "I64", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSettings:
    """Where and how much."""

    folder: Path
    """Holds all models' files."""
    max_bytes: int
    """Most bytes in it."""
    write: Write = "evicted"
    """When what is kept is written."""
    piece_tokens: int = PIECE_TOKENS
    """Most tokens of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStats:
    """What is on disk of this model, and how it did."""

    bytes: int = 0
    """Bytes of files."""
    pieces: int = 0
    """Files."""
    written: int = 0
    """Pieces written."""
    restored_tokens: int = 0
    """Tokens that were read back and did not have to be read by the model."""
    removed: int = 0
    """Files removed because they were broken or no use any more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be read back for a text."""

    key: str
    tokens: tuple[int, ...]
    parts: tuple[tuple[Head, int], ...]
    """Pieces, and how many of their tokens are wanted."""


@dataclass(slots=True, eq=False)
class _Entry:
    head: Head
    size: int
    tokens: np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(slots=True, eq=False)
class _Job:
    """A piece on its way to disk. It holds the arrays' memory until the engine's thread lets go of it."""

    head: Head
    runs: list[tuple[str, Block]] = field(default_factory=list)
    rest: list[tuple[str, Block]] = field(default_factory=list)
    size: int = 0


class DiskTier:
    """Keeps pieces of evaluated prefixes on disk. To be used by one thread, but for its figures.

    Args:
        settings: where, and how much.
        model: the model's folder.
        identity: returns a text of all that state depends on but the text and the caller, empty if it is not
            known. It is asked on the tier's thread and may take its time; until then nothing is on disk.
        is_cuttable: whether runs can be cut anywhere, and need no snapshot.
        post: has calls run by the thread that uses the tier.
    """

    def __init__(
        self,
        settings: DiskSettings,
        *,
        model: Path,
        identity: Callable[[], str],
        is_cuttable: bool,
        post: Post,
    ) -> None:
        self.marks: tuple[int, ...] = ()
        """Marks of beginnings on disk, newest first. May be read on any thread."""
        self._settings = settings
        self._model = model
        self._ask = identity
        self._is_cuttable = is_cuttable
        self._post = post
        self._identity = ""
        self._entries: dict[str, _Entry] = {}
        self._after: dict[str, dict[str, _Entry]] = {}
        self._jobs: dict[str, _Job] = {}
        self._pending = 0
        self._stats = DiskStats()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefix-disk", daemon=True)
        # On its own thread:
        self._folder = Path()
        self._thread.start()

    @property
    def stats(self) -> DiskStats:
        """What is on disk now."""
        return self._stats

    @property
    def writes_finished(self) -> bool:
        """Whether what is kept of a reply is to be written when the reply is over."""
        return self._settings.write == "finished"

    # On the thread that uses it

    def lookup(self, key: str, tokens: Sequence[int], known: int, ends: Sequence[int]) -> Plan | None:
        """Returns what to read back for a text, or None if what is known of it is about as much.

        Args:
            key: whose it is.
            tokens: the text. Its last token is never part of what is found.
            known: tokens of it that need not be read anyway.
            ends: after how many of its tokens runs in memory end; a piece may follow any of them.
        """
        if not self._entries:
            return None
        wanted = np.asarray(tokens[:-1], np.int32)
        starts = [0, *ends]
        stack: list[tuple[int, str, tuple[tuple[Head, int], ...]]] = [
            (place, state, ()) for place, state in zip(starts, self._states(key, wanted, starts), strict=True)
        ]
        reach = known + MIN_TOKENS - 1
        best: tuple[tuple[Head, int], ...] = ()
        seen: set[str] = set()
        while stack:
            place, state, chain = stack.pop()
            for name, entry in self._after.get(state, {}).items():
                if entry.head.skipped != place or name in seen:
                    continue
                there = wanted[place : place + len(entry.tokens)]
                differ = np.nonzero(entry.tokens[: len(there)] != there)[0]
                same = int(differ[0]) if len(differ) else len(there)
                whole = same == len(entry.tokens)
                longer = (*chain, (entry.head, same))
                if whole:
                    seen.add(name)
                    stack.append((place + same, entry.head.end, longer))
                useful = same >= MIN_TOKENS or whole if self._is_cuttable else whole and entry.head.has_rest
                if useful and place + same > reach:
                    reach, best = place + same, longer
        covered = ends[-1] if ends else 0
        parts = [part for part in best if part[0].skipped + part[1] > covered or part is best[-1]]
        return Plan(key, tuple(tokens), tuple(parts)) if parts else None

    def read(self, plan: Plan, take: Callable[[Stretch], bool], done: Callable[[], None]) -> None:
        """Reads back what a plan says, piece by piece.

        Args:
            plan: what to read.
            take: is given each piece, in order; once it returns False no more are.
            done: is called after the last.
        """
        self._work.put(partial(self._read, plan, take, done))

    def write(self, stretch: Stretch, *, patiently: bool = False) -> None:
        """Writes a stretch, unless it is on disk or too much waits to be written.

        Args:
            stretch: what to write. Its arrays are evaluated and stay as they are.
            patiently: whether to write it however much waits.
        """
        if not self._identity:
            return
        tokens = np.asarray(stretch.tokens, np.int32)
        step = self._settings.piece_tokens if stretch.kept.arrays else len(tokens)
        places = [*range(stretch.begin, len(tokens), step), len(tokens)]
        states = self._states(stretch.key, tokens, places)
        for (begin, end), (before, after) in zip(
            itertools.pairwise(places), itertools.pairwise(states), strict=True
        ):
            rest = stretch.rest if end == len(tokens) else None
            marks = [
                (mark, count)
                for mark, count in stretch.marks
                if (rest is not None if stretch.rest is not None else begin < count <= end)
            ]
            head = Head(
                identity=self._identity,
                begin=before,
                end=after,
                skipped=begin,
                tokens=stretch.tokens[begin:end],
                marks=tuple(marks),
                run_groups=stretch.kept.groups,
                rest_groups=rest.groups if rest is not None else (),
                has_rest=rest is not None,
            )
            there = self._entries.get(head.name)
            if head.name in self._jobs or (there is not None and there.head.has_rest >= head.has_rest):
                continue
            if not patiently and self._pending > PENDING_BYTES:
                return
            self._submit(head, stretch.kept, slice(begin - stretch.begin, end - stretch.begin), rest)

    def close(self, timeout: float) -> None:
        """Writes what waits, as far as time allows, and ends the thread. Holds no array after that.

        Args:
            timeout: seconds that may take.
        """
        self._work.put(None)
        self._thread.join(timeout)
        self._closing.set()
        self._thread.join(timeout)
        for job in self._jobs.values():
            job.runs.clear()
            job.rest.clear()
        self._jobs.clear()

    def _states(
        self, key: str, tokens: np.ndarray[tuple[int], np.dtype[np.int32]], ends: Sequence[int]
    ) -> list[str]:
        """Returns the digests of the text's beginnings of so many tokens, in order."""
        whole = hashlib.blake2b(f"{self._identity}\0{key}".encode("utf-8", "surrogatepass"), digest_size=20)
        found = []
        begin = 0
        for end in ends:
            whole.update(tokens[begin:end].tobytes())
            begin = end
            found.append(whole.copy().hexdigest())
        return found

    def _submit(self, head: Head, kept: Packed, part: slice, rest: Packed | None) -> None:
        try:
            job = _Job(head)
            job.runs += [(kind, block[..., part, :]) for kind, block in map(_block, kept.arrays)]
            job.rest += [_block(array) for array in (rest.arrays if rest is not None else ())]
        except KeyError:
            log.info("state of a type that no file can hold is not written")
            return
        job.size = sum(block.nbytes for _, block in (*job.runs, *job.rest))
        self._jobs[head.name] = job
        self._pending += job.size
        self._work.put(partial(self._write, job))

    def _opened(self, identity: str, heads: list[tuple[Head, int]], removed: int) -> None:
        self._identity = identity
        for head, size in heads:
            self._add(head, size)
        self._stats = replace(self._stats, removed=self._stats.removed + removed)
        self._count()

    def _written(self, job: _Job, size: int, lost: Sequence[str]) -> None:
        self._jobs.pop(job.head.name, None)
        self._pending -= job.size
        job.runs.clear()
        job.rest.clear()
        if size:
            self._add(job.head, size)
            self._stats = replace(self._stats, written=self._stats.written + 1)
        self._forget(lost)

    def _add(self, head: Head, size: int) -> None:
        self._forget([head.name], count=False)
        entry = _Entry(head, size, np.asarray(head.tokens, np.int32))
        self._entries[head.name] = self._after.setdefault(head.begin, {})[head.name] = entry

    def _forget(self, names: Iterable[str], *, count: bool = True, broken: bool = False) -> None:
        for name in names:
            entry = self._entries.pop(name, None)
            if entry is not None:
                del self._after[entry.head.begin][name]
                if not self._after[entry.head.begin]:
                    del self._after[entry.head.begin]
            if broken:
                self._stats = replace(self._stats, removed=self._stats.removed + 1)
        if count:
            self._count()

    def _count(self) -> None:
        size = sum(entry.size for entry in self._entries.values())
        self._stats = replace(self._stats, bytes=size, pieces=len(self._entries))
        # Only what can be reached from a text's beginning answers anything after a restart.
        reached: set[str] = set()
        for entry in sorted(self._entries.values(), key=lambda entry: entry.head.skipped):
            if not entry.head.skipped or entry.head.begin in reached:
                reached.add(entry.head.end)
        marks = dict.fromkeys(
            mark
            for entry in reversed(self._entries.values())
            if entry.head.end in reached
            for mark, _ in reversed(entry.head.marks)
        )
        self.marks = tuple(itertools.islice(marks, MOST_MARKS))

    def _take(self, plan: Plan, piece: Piece, count: int, take: Callable[[Stretch], bool]) -> bool:
        head = piece.head
        runs = tuple(_array(kind, block) for kind, block in piece.runs)
        rest = tuple(_array(kind, block) for kind, block in piece.rest)
        mx.eval(runs, rest)
        # All of it, though the text may part from it: cut off here it would be written once more as a piece
        # of its own. It is its owner's either way, and who finds it is given no more than matches.
        stretch = Stretch(
            key=plan.key,
            tokens=plan.tokens[: head.skipped] + head.tokens,
            begin=head.skipped,
            kept=Packed(head.run_groups, runs),
            rest=Packed(head.rest_groups, rest) if head.has_rest else None,
            marks=head.marks,
        )
        taken = take(stretch)
        if taken:
            self._stats = replace(self._stats, restored_tokens=self._stats.restored_tokens + count)
        return taken

    # On its own thread

    def _run(self) -> None:
        try:
            self._open()
        except OSError as error:
            log.warning("prefixes are not kept on disk: %s", error.strerror or type(error).__name__)
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception as error:  # a cache that fails costs time and no reply
                log.error("keeping prefixes on disk failed: %s", type(error).__name__, exc_info=error)

    def _open(self) -> None:
        identity = self._ask()
        if not identity:
            log.info("prefixes are not kept on disk: the weights' digest is not known")
            return
        name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        home = _hash(os.fsencode(self._model.resolve()))
        folder = self._settings.folder / home / name
        self._settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in (folder.parent, folder):
            _make_private(each)
        removed = 0
        for other in folder.parent.iterdir():
            if other.name != name:  # the model was replaced, or what runs it
                shutil.rmtree(other, ignore_errors=True)
                removed += 1
        heads: list[tuple[float, Head, int]] = []
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                found = path.lstat()
                if path.suffix == ".tmp" and time.time() - found.st_mtime < STALE_SECONDS:
                    continue  # another process is at it
                try:
                    head = prefix_file.read_head(path)
                    if head.identity != name:
                        raise BrokenPieceError("it is another model's")
                    heads.append((found.st_mtime, head, found.st_size))
                except (BrokenPieceError, OSError):
                    _remove(path)
                    removed += 1
        heads.sort(key=lambda each: each[0])
        self._folder = folder
        ready = [(head, size) for _, head, size in heads]
        self._post(partial(self._opened, name, ready, removed))

    def _write(self, job: _Job) -> None:
        size, lost = 0, []
        if not self._closing.is_set():
            try:
                piece = Piece(job.head, tuple(job.runs), tuple(job.rest))
                size = prefix_file.write(self._folder, piece)
                del piece
                lost = self._trim()
            except OSError as error:
                log.warning("a prefix cannot be written: %s", error.strerror or type(error).__name__)
        self._post(partial(self._written, job, size, lost))

    def _read(self, plan: Plan, take: Callable[[Stretch], bool], done: Callable[[], None]) -> None:
        wanted = True

        def taking(piece: Piece, count: int) -> None:
            nonlocal wanted
            wanted = wanted and self._take(plan, piece, count, take)

        now = time.time()
        for number, (head, count) in enumerate(plan.parts):
            path = self._folder / head.name
            try:
                if not wanted:
                    break
                piece = prefix_file.read(path)
                if replace(piece.head, marks=()) != replace(head, marks=()):
                    raise BrokenPieceError("it was replaced")
                # What follows a piece is of no use without it, so it leaves first.
                os.utime(path, (now, now - number / 1000))
            except (BrokenPieceError, OSError) as error:
                _remove(path)
                log.info("a prefix on disk is of no use and is removed: %s", error)
                self._post(partial(self._forget, [head.name], broken=True))
                break
            self._post(partial(taking, piece, count))
            del piece
        self._post(done)

    def _trim(self) -> list[str]:
        """Removes the least recently used files of all models until they fit, and returns those of ours."""
        found: list[tuple[float, int, str]] = []
        for path in self._settings.folder.glob(f"*/*/*{prefix_file.SUFFIX}"):
            if not _OURS.fullmatch(path.relative_to(self._settings.folder).as_posix()):
                continue  # somebody may keep models in the same folder
            with contextlib.suppress(OSError):
                each = path.stat()
                found.append((each.st_mtime, each.st_size, str(path)))
        held = sum(size for _, size, _ in found)
        free = shutil.disk_usage(self._settings.folder).free
        most = min(self._settings.max_bytes, int((held + free) * FREE_SHARE))
        lost = []
        for _, size, name in sorted(found):
            if held <= most:
                break
            path = Path(name)
            _remove(path)
            held -= size
            if path.parent == self._folder:
                lost.append(path.name)
        return lost


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _make_private(folder: Path) -> None:
    """Makes a folder that only its owner may enter.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(1, f"{folder} is not a folder of ours")
    folder.chmod(0o700)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _block(array: Array) -> tuple[str, Block]:
    """Returns an evaluated array's type and its memory, which is not copied."""
    kind = _DTYPES[array.dtype]
    if kind == "BF16":
        array = array.view(mx.uint16)
        mx.eval(array)
    return kind, np.array(array, copy=False)


def _array(kind: str, block: Block) -> Array:
    array: Array = mx.array(np.ascontiguousarray(block))
    return array.view(mx.bfloat16) if kind == "BF16" else array
