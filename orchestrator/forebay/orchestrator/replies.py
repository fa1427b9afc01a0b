"""Which replies may be given again, under which key, and where they are kept: synchronous code, no I/O.

A reply may be given again if the same request must lead to the same answer:
greedy or seeded decoding, and no tools, since what a tool returns changes.
Keys are hashes of all that can change the answer, so no prompt is kept for
its key; unless callers share, who asks is part of it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import cachetools
from google.protobuf.message import DecodeError, Message

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Request
from forebay.orchestrator.clock import Clock

_OVERHEAD = 512
"""Bytes that an entry takes besides its value: key, links and objects, as measured and rounded up."""

_LARGEST = 8
"""An entry may have this part of a store's bytes, so that one reply cannot push out all others."""

_VERSION = b"forebay reply 1\0"
"""Part of every key. It changes when stored bytes change their meaning, as stores outlive processes."""

_LENGTH = struct.Struct(">I")

_REPEATABLE_ENDS = frozenset({pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH})


class Store(Protocol):
    """Keeps bytes for a while, as well as it can."""

    largest: int
    """Most bytes of one value."""

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Returns the value of each key, or None. Never fails."""

    async def put(self, values: Mapping[bytes, bytes]) -> None:
        """Keeps values. Never fails."""


class MemoryStore:
    """Keeps values in this process: the least recently used go first, and none stays longer than its time.

    Args:
        max_bytes: most bytes of all entries, what they cost besides their values included.
        ttl: seconds an entry lives.
        clock: gives the time in seconds.
    """

    def __init__(self, *, max_bytes: int, ttl: float, clock: Clock) -> None:
        self.largest = max_bytes // _LARGEST - _OVERHEAD
        self._entries: cachetools.TTLCache[bytes, bytes] = cachetools.TTLCache(
            maxsize=max_bytes, ttl=ttl, timer=clock, getsizeof=lambda value: len(value) + _OVERHEAD
        )

    def __repr__(self) -> str:
        return f"<MemoryStore {len(self)} entries, {self.used}/{int(self._entries.maxsize)} bytes>"

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used(self) -> int:
        """Bytes in use."""
        return int(self._entries.currsize)

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Returns the value of each key, or None."""
        found: list[bytes | None] = [self._entries.get(key) for key in keys]
        return found

    async def put(self, values: Mapping[bytes, bytes]) -> None:
        """Keeps values that are not too large."""
        for key, value in values.items():
            if len(value) <= self.largest:
                self._entries[key] = value


class Respite:
    """Keeps calls away from a store that fails: after a few failures in a row for a second, then ever longer.

    Args:
        clock: gives the time in seconds.
    """

    FAILURES = 3
    """Failures in a row that begin a respite; one slow answer happens to a healthy store."""
    SHORTEST, LONGEST = 1.0, 60.0
    """Seconds of the first respite, and of the longest; each is twice the one before."""

    def __init__(self, *, clock: Clock) -> None:
        self._clock = clock
        self._failures = 0
        self._length = self.SHORTEST
        self._until: float | None = None
        self._is_probing = False

    def may_try(self) -> bool:
        """Returns whether the store may be asked now; after a respite, one call at a time may."""
        if self._until is None:
            return True
        if self._clock() < self._until or self._is_probing:
            return False
        self._is_probing = True
        return True

    def succeed(self) -> None:
        """The store answered."""
        self._failures, self._length, self._until, self._is_probing = 0, self.SHORTEST, None, False

    def fail(self) -> bool:
        """The store failed, or did not answer in time. Returns whether a respite begins."""
        self._failures += 1
        if self._failures < self.FAILURES and not self._is_probing:
            return False
        self._is_probing = False
        self._until = self._clock() + self._length
        self._length = min(self.LONGEST, self._length * 2)
        return True

    def forget(self) -> None:
        """Whoever asked left before there was an answer."""
        self._is_probing = False


def is_asked_for(request: Request) -> bool:
    """Returns whether the caller allows that the answer is kept."""
    return request.routing.cache in {pb.CACHE_POLICY_USE, pb.CACHE_POLICY_REFRESH}


def is_repeatable(request: pb.GenerateRequest) -> bool:
    """Returns whether the same request must lead to the same reply."""
    sampling = request.sampling
    is_greedy = sampling.HasField("temperature") and sampling.temperature == 0.0
    if not (is_greedy or sampling.HasField("seed")) or request.tools:
        return False
    return not any(
        part.HasField("tool_call") or part.HasField("tool_result")
        for message in request.messages
        for part in message.parts
    )


def reply_key(request: pb.GenerateRequest, *, caller: str, weights: str) -> bytes:
    """Returns the key of a reply.

    Args:
        request: what is asked.
        caller: whose reply it is; empty if callers share.
        weights: what is known of the weights behind the model's name.
    """
    copy = pb.GenerateRequest()
    copy.CopyFrom(request)
    copy.ClearField("request_id")
    _clear_manner(copy.routing)
    return _digest(caller, weights, copy)


def embedding_keys(request: pb.EmbedRequest, *, caller: str, weights: str) -> list[bytes]:
    """Returns the key of each text's embedding. The arguments are those of `reply_key`."""
    frame = pb.EmbedRequest()
    frame.CopyFrom(request)
    frame.ClearField("texts")
    frame.ClearField("request_id")
    frame.ClearField("allow_partial")
    _clear_manner(frame.routing)
    base = _digest(caller, weights, frame)
    return [hashlib.sha256(base + text.encode()).digest() for text in request.texts]


def _clear_manner(hints: pb.RoutingHints) -> None:
    """Removes what says how and not what; the rest of the hints decides who may answer."""
    hints.ClearField("priority")
    hints.ClearField("cache")
    hints.ClearField("max_attempt_count")


def _digest(caller: str, weights: str, request: Message) -> bytes:
    digest = hashlib.sha256(_VERSION)
    for part in (
        caller.encode(),
        weights.encode(),
        request.DESCRIPTOR.full_name.encode(),
        request.SerializeToString(deterministic=True),
    ):
        digest.update(_LENGTH.pack(len(part)))
        digest.update(part)
    return digest.digest()


class Recording:
    """A reply that is being written down.

    Args:
        largest: bytes above which it is given up.
    """

    def __init__(self, *, largest: int) -> None:
        self._largest = largest
        self._chunks: list[bytes] = []
        self._size = 0
        self._is_worth_it = True
        self._is_done = False

    def take(self, event: pb.GenerateResponse) -> None:
        """Notes an event."""
        kind = event.WhichOneof("event")
        if kind == "progress" or not self._is_worth_it:
            return
        if kind == "continued":  # spliced from two backends: true once, and no promise for the next time
            self._give_up()
            return
        if kind == "finished":
            self._is_done = event.finished.reason in _REPEATABLE_ENDS
        data = event.SerializeToString()
        self._size += len(data) + _LENGTH.size
        if self._size > self._largest:
            self._give_up()
            return
        self._chunks += (_LENGTH.pack(len(data)), data)

    def value(self) -> bytes | None:
        """Returns the whole reply for a store, or None if it is not to be kept."""
        return b"".join(self._chunks) if self._is_done and self._is_worth_it else None

    def _give_up(self) -> None:
        self._is_worth_it = False
        self._chunks.clear()


def events(value: bytes) -> list[pb.GenerateResponse] | None:
    """Returns the events of a stored reply as a replay sends them, or None if the bytes are no reply."""
    found = []
    try:
        for chunk in _chunks(value):
            event = pb.GenerateResponse.FromString(chunk)
            event.ClearField("sequence")
            found.append(event)
    except (DecodeError, struct.error):
        return None
    if not found or not found[0].HasField("started") or not found[-1].HasField("finished"):
        return None
    found[0].started.replayed = True
    # They tell how long a backend took, and none did.
    found[-1].finished.ClearField("timings")
    return found


def _chunks(value: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(value):
        (length,) = _LENGTH.unpack_from(value, place)
        place += _LENGTH.size + length
        if place > len(value):
            raise DecodeError("cut short")
        yield value[place - length : place]


def embedding(value: bytes) -> pb.EmbedResponse | None:
    """Returns a stored embedding, or None if the bytes are none."""
    try:
        found = pb.EmbedResponse.FromString(value)
    except DecodeError:
        return None
    return found if len(found.embeddings) == 1 and found.embeddings[0].values else None


def single(answer: pb.EmbedResponse, place: int) -> bytes:
    """Returns one embedding of an answer, for a store."""
    kept = pb.EmbedResponse(
        embeddings=[answer.embeddings[place]],
        backend=answer.backend,
        model=answer.model,
        dimension_count=answer.dimension_count,
        normalized=answer.normalized,
    )
    if answer.HasField("weights"):
        kept.weights.CopyFrom(answer.weights)
    return kept.SerializeToString()


def origin(answer: pb.EmbedResponse) -> tuple[object, ...]:
    """Returns what two embeddings must have in common to be comparable."""
    digest = answer.weights.digest
    # Of unknown weights only those of one backend are surely the same.
    return (digest or (answer.backend, answer.model), answer.dimension_count, answer.normalized)
