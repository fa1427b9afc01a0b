"""Lanes: batches over one model, so that a short row never pays for a long one's padding.

A batch pads every row to its longest. One row of 60,000 tokens would make
seven of a dozen tokens hold 60,000 each, and attend to the padding in every
step. So a row joins a lane only if the lane's padding stays small against what
is useful in it, and opens another otherwise. Rows of a lane grow together, so
what padding a lane begins with it never exceeds.

Every step runs one lane: that whose rows have had the least of the thread's
time, each row counting the same. So a long prompt that is read chunk by chunk,
or a lane whose attention is slow, takes its share and no more.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from forebay.mlx_service.worker.batch import Batch, Generated, Kept, Prefilled
from forebay.mlx_service.worker.runtime import KVCache
from forebay.mlx_service.worker.sampling import Processor, Sampler

MAX_LANES = 4
"""Most batches at once. Each reads all the weights for a step of its own, so few beat many."""

PADDED = 1.5
"""Tokens that a lane may hold for each useful one."""

FREE_TOKENS = 512
"""Tokens that a lane may hold whatever is useful in it. Apart, so short rows would cost more than padding."""


@dataclass(slots=True, eq=False)
class _Lane:
    batch: Batch
    rows: dict[int, int] = field(default_factory=dict)
    """Numbers of its rows here by those in the batch."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Tokens of its rows, prompt and reply."""
    time: float = 0.0
    """Seconds of the thread's time that each of its rows has had."""

    def padding_with(self, length: int) -> int:
        """Tokens of padding with one more row."""
        lengths = [*self.lengths.values(), length]
        return max(lengths) * len(lengths) - sum(lengths)

    def has_place_for(self, length: int) -> bool:
        lengths = [*self.lengths.values(), length]
        return max(lengths) * len(lengths) <= max(FREE_TOKENS, PADDED * sum(lengths))


class Lanes:
    """Rows that are generated together, in as many batches as their lengths call for.

    Args:
        new_batch: makes an empty batch.
        shared_step: tokens of a prompt read in one step while rows write; None reads as many as else.
        clock: tells how long a step took.
    """

    def __init__(
        self,
        new_batch: Callable[[], Batch],
        *,
        shared_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._new_batch = new_batch
        self._shared_step = shared_step
        self._writing: set[int] = set()
        self._clock = clock
        self._lanes: list[_Lane] = []
        self._places: dict[int, tuple[_Lane, int]] = {}
        self._stepping: _Lane | None = None
        self._count = 0

    @property
    def widths(self) -> list[int]:
        """Rows of every lane."""
        return [len(lane.rows) for lane in self._lanes]

    @property
    def cache_bytes(self) -> int:
        """Bytes that the rows' attention caches take."""
        return sum(lane.batch.cache_bytes for lane in self._lanes)

    def insert(
        self,
        tokens: Sequence[int],
        *,
        most: int,
        sampler: Sampler,
        processors: Sequence[Processor],
        caches: list[KVCache] | None = None,
        cached: int = 0,
        stops: Sequence[int] = (),
    ) -> int:
        """Adds a row to the lane that suits its length. See `Batch.insert`."""
        lane = self._lane_for(len(tokens))
        uid = lane.batch.insert(
            tokens,
            most=most,
            sampler=sampler,
            processors=processors,
            caches=caches,
            cached=cached,
            stops=stops,
        )
        self._count += 1
        lane.rows[uid] = self._count
        lane.lengths[uid] = len(tokens)
        self._places[self._count] = lane, uid
        return self._count

    def step(self) -> tuple[list[Prefilled], list[Generated]]:
        """Runs the lane whose turn it is. If it raises, `broken` tells which rows are lost."""
        lane = self._stepping = min((x for x in self._lanes if x.rows), key=lambda x: x.time)
        width = len(lane.rows)
        lane.batch.share_step(self._shared_step if self._writing else None)
        began = self._clock()
        read, written = lane.batch.step()
        lane.time += (self._clock() - began) / width
        read = [replace(progress, uid=lane.rows[progress.uid]) for progress in read]
        told = []
        for token in written:
            told.append(replace(token, uid=lane.rows[token.uid]))
            lane.lengths[token.uid] += 1
            self._writing.add(lane.rows[token.uid])
            if token.ended is not None:
                self._forget(lane, token.uid)
        return read, told

    def peek(self, uid: int) -> Kept | None:
        """Returns what attention holds of a row that stays. See `Batch.peek`."""
        lane, inner = self._places[uid]
        return lane.batch.peek(inner)

    def remove(self, uid: int) -> Kept | None:
        """Takes a row out, and returns what attention holds of it. See `Batch.remove`."""
        lane, inner = self._places[uid]
        kept = lane.batch.remove(inner)
        self._forget(lane, inner)
        return kept

    def broken(self) -> Collection[int]:
        """Throws the lane away whose step raised, and returns its rows."""
        lane = self._stepping
        assert lane is not None
        lost = list(lane.rows.values())
        for uid in lost:
            del self._places[uid]
            self._writing.discard(uid)
        self._lanes.remove(lane)
        self._stepping = None
        lane.batch.close()
        return lost

    def close(self) -> None:
        """Gives back what all rows hold."""
        self._stepping = None
        self._places.clear()
        self._writing.clear()
        while self._lanes:
            self._lanes.pop().batch.close()

    def _forget(self, lane: _Lane, inner: int) -> None:
        uid = lane.rows.pop(inner)
        del self._places[uid]
        self._writing.discard(uid)
        del lane.lengths[inner]
        if not lane.rows and len(self._lanes) > 1:
            self._lanes.remove(lane)
            lane.batch.close()

    def _lane_for(self, length: int) -> _Lane:
        fitting = [lane for lane in self._lanes if lane.has_place_for(length)]
        if fitting:
            lane = min(fitting, key=lambda one: one.padding_with(length))
        elif len(self._lanes) < MAX_LANES:
            lane = _Lane(self._new_batch())
            self._lanes.append(lane)
        else:
            lane = min(self._lanes, key=lambda one: one.padding_with(length))
        if not lane.rows:
            # A lane that stood still has no claim on the time that passed.
            lane.time = min((other.time for other in self._lanes if other.rows), default=0.0)
        return lane
